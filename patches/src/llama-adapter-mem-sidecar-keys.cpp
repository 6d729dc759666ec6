#include "llama-adapter-mem-sidecar-kv.h"
#include "llama-adapter-mem-sidecar.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using json = nlohmann::json;

static const int64_t  ADAPTER_MEM_MAX_EMBD   = 1 << 20;
static const int64_t  ADAPTER_MEM_MAX_PERIOD = 1 << 24; // chunk*states: the counter is kept modulo this in f32
static const uint64_t ADAPTER_MEM_MAX_CELL   = 1 << 24; // elements of the state of one layer and sequence
static const int64_t  ADAPTER_MEM_MAX_LAYER  = 4095;

static const char * const ADAPTER_MEM_HEADS = "qkvo";

//
// parameters of the memory
//

static void adapter_mem_check_mode(const char * key, const std::string & value, const char * want) {
    if (value != want) {
        llama_adapter_mem_fail("config-unsupported", "config_json: %s is %s, but only '%s' is implemented", key, llama_adapter_mem_quote(value).c_str(), want);
    }
}

static void adapter_mem_read_mode(const llama_adapter_mem_kvs & kvs, const json & config, const char * key, const char * want) {
    kvs.expect(key, want);
    adapter_mem_check_mode(key, llama_adapter_mem_config_str(config, key), want);
}

// the same figure stands in a key of the file and in config_json
static uint32_t adapter_mem_read_u32(const llama_adapter_mem_kvs & kvs, const json & config, const char * key, int64_t max) {
    const int64_t  in_config = llama_adapter_mem_config_int(config, key, 1, max);
    const uint32_t in_file   = kvs.u32(key);
    if (in_config != in_file) {
        kvs.fail(key, "is " + std::to_string(in_file) + ", but config_json has " + std::to_string(in_config), "disagree");
    }
    return in_file;
}

static float adapter_mem_read_alpha(const llama_adapter_mem_kvs & kvs, const json & config) {
    const float res = kvs.f32("alpha");
    if (!std::isfinite(res)) {
        kvs.fail("alpha", "is " + std::to_string(res) + ", must be finite");
    }
    const double in_config = llama_adapter_mem_config_num(config, "alpha");
    if (res != (float) in_config) {
        kvs.fail("alpha", "is " + std::to_string(res) + ", but config_json has " + std::to_string(in_config), "disagree");
    }
    return res;
}

// a list of config_json that also stands in a key of the file
static void adapter_mem_check_list(const llama_adapter_mem_kvs & kvs, const json & config, const char * key, const json & in_file) {
    const json * in_config = llama_adapter_mem_json_find(config, key);
    if (!in_config) {
        llama_adapter_mem_fail("config-missing", "config_json: %s is missing", key);
    }
    if (*in_config != in_file) {
        kvs.fail((std::string(key) + "_json").c_str(),
                "is " + llama_adapter_mem_json_text(in_file) + ", but config_json has " + llama_adapter_mem_json_text(*in_config), "disagree");
    }
}

static void adapter_mem_read_heads(const llama_adapter_mem_kvs & kvs, const json & config, llama_adapter_mem_sidecar & res) {
    const json heads = kvs.json("delta_heads_json", json::value_t::array);
    if (heads.empty() && res.kind == LLAMA_ADAPTER_MEM_KIND_RWKV_MS) {
        kvs.fail("delta_heads_json", "is empty: such a sidecar changes nothing");
    }
    for (const auto & head : heads) {
        const std::string name = head.is_string() ? head.get<std::string>() : "";
        const char *      pos  = name.size() == 1 ? (const char *) memchr(ADAPTER_MEM_HEADS, name[0], 4) : nullptr;
        if (!pos || res.head[pos - ADAPTER_MEM_HEADS]) {
            kvs.fail("delta_heads_json", "has " + llama_adapter_mem_json_text(head) + ", which is unknown or there twice: the heads are q k v o");
        }
        res.head[pos - ADAPTER_MEM_HEADS] = true;
    }
    adapter_mem_check_list(kvs, config, "delta_heads", heads);
}

// of an RWKV-MS, whose states are as many as its sizes say
static void adapter_mem_read_states(const llama_adapter_mem_kvs & kvs, const json & config, llama_adapter_mem_hparams & hparams) {
    hparams.n_state = adapter_mem_read_u32(kvs, config, "rwkv_ms_num_states", 1024);
    hparams.n_chunk = adapter_mem_read_u32(kvs, config, "rwkv_ms_chunk_size", ADAPTER_MEM_MAX_PERIOD);

    if ((int64_t) hparams.n_chunk * hparams.n_state > ADAPTER_MEM_MAX_PERIOD) {
        llama_adapter_mem_fail("config-value", "config_json: rwkv_ms_chunk_size * rwkv_ms_num_states is %lld, at most %lld are implemented",
                (long long) hparams.n_chunk * hparams.n_state, (long long) ADAPTER_MEM_MAX_PERIOD);
    }
    if ((uint64_t) hparams.n_head * hparams.n_state * hparams.rank * hparams.rank > ADAPTER_MEM_MAX_CELL) {
        llama_adapter_mem_fail("config-value", "config_json: num_state_heads, rwkv_ms_num_states and rank give a state of more than %llu values a layer",
                (unsigned long long) ADAPTER_MEM_MAX_CELL);
    }
}

static void adapter_mem_read_update_mode(const json & config, llama_adapter_mem_hparams & hparams) {
    static const char * const modes[] = { "standard", "lambda_outside", "no_lambda" };

    const std::string mode = llama_adapter_mem_config_str(config, "state_update_mode");
    hparams.update_mode    = (int) (std::find(std::begin(modes), std::end(modes), mode) - std::begin(modes));
    if (hparams.update_mode == 3) {
        llama_adapter_mem_fail("config-unsupported", "config_json: state_update_mode is %s, must be standard, lambda_outside or no_lambda",
                llama_adapter_mem_quote(mode).c_str());
    }
}

// what a delta rule does with q, k and its deltas
static void adapter_mem_read_delta_rule(const json & config, llama_adapter_mem_hparams & hparams) {
    hparams.n_chunk      = ADAPTER_MEM_MAX_PERIOD; // of the counter, which is for display
    hparams.normalize_qk = llama_adapter_mem_config_bool(config, "normalize_qk");
    hparams.o_norm       = llama_adapter_mem_config_bool(config, "delta_o_rmsnorm");

    const double eps = llama_adapter_mem_config_num(config, "delta_o_rmsnorm_eps");
    if (eps < 0.0) {
        llama_adapter_mem_fail("config-value", "config_json: delta_o_rmsnorm_eps is %g, must be 0 or more", eps);
    }
    hparams.o_norm_eps = (float) eps;

    const bool is_scaled = llama_adapter_mem_config_bool(config, "trainable_delta_scale");
    hparams.scale_max    = (float) llama_adapter_mem_config_num(config, "delta_scale_max");

    const std::string granularity = llama_adapter_mem_config_str(config, "delta_scale_granularity");
    if (granularity != "layer" && granularity != "head") {
        llama_adapter_mem_fail("config-unsupported", "config_json: delta_scale_granularity is %s, must be layer or head", llama_adapter_mem_quote(granularity).c_str());
    }
    hparams.n_scale = !is_scaled ? 0 : granularity == "head" ? 4
                                                             : 1;
}

static void adapter_mem_read_hparams(const llama_adapter_mem_kvs & kvs, const json & config, llama_adapter_mem_sidecar & res) {
    auto & hparams = res.hparams;

    const bool is_rwkv_ms = res.kind == LLAMA_ADAPTER_MEM_KIND_RWKV_MS;

    if (!kvs.is_3) {
        kvs.expect("memory_backend", "rwkv_ms");
    }
    adapter_mem_check_mode("memory_backend", llama_adapter_mem_config_str(config, "memory_backend"), llama_adapter_mem_kind_name(res.kind));
    adapter_mem_read_mode(kvs, config, "memory_readout_mode", "delta");

    if (is_rwkv_ms) {
        adapter_mem_read_mode(kvs, config, "rwkv_ms_boundary_mode", "fixed_chunk");

        const int64_t semantics = config.contains("rwkv_ms_semantics_version") ? llama_adapter_mem_config_int(config, "rwkv_ms_semantics_version", 1, 2) : 1;
        if (semantics != hparams.semantics) {
            llama_adapter_mem_fail("disagree", "config_json: rwkv_ms_semantics_version is %lld, but the file has %u", (long long) semantics, hparams.semantics);
        }
        if (config.contains("rwkv_ms_state_dtype")) {
            adapter_mem_check_mode("rwkv_ms_state_dtype", llama_adapter_mem_config_str(config, "rwkv_ms_state_dtype"), "f32");
        }
    }

    hparams.rank   = adapter_mem_read_u32(kvs, config, "rank", 256);
    hparams.n_head = adapter_mem_read_u32(kvs, config, "num_state_heads", 64);
    if (is_rwkv_ms) {
        adapter_mem_read_states(kvs, config, hparams);
    }

    hparams.alpha = adapter_mem_read_alpha(kvs, config);
    if (is_rwkv_ms) {
        hparams.erase_gate = (float) llama_adapter_mem_config_num(config, "rwkv_ms_erase_gate");
    }
    adapter_mem_read_update_mode(config, hparams);
    hparams.couple_lambda = llama_adapter_mem_config_bool(config, "couple_lambda");
    hparams.n_gate        = llama_adapter_mem_config_bool(config, "rankwise_gates") ? hparams.n_rank_total() : hparams.n_head;

    if (!is_rwkv_ms) {
        adapter_mem_read_delta_rule(config, hparams);
    }
}

//
// layers
//

static json adapter_mem_read_targets(const llama_adapter_mem_kvs & kvs, const json & config, llama_adapter_mem_sidecar & sidecar) {
    const json res  = kvs.json("target_layers_json", json::value_t::array);
    int64_t    last = -1;
    for (const auto & il : res) {
        if (!llama_adapter_mem_json_is_int(il, last + 1, ADAPTER_MEM_MAX_LAYER)) {
            kvs.fail("target_layers_json", "has " + llama_adapter_mem_json_text(il) + ", must be layers from 0 to " + std::to_string(ADAPTER_MEM_MAX_LAYER) + " in ascending order");
        }
        last = il.get<int64_t>();
    }
    if (res.empty()) {
        kvs.fail("target_layers_json", "is empty: such a sidecar changes nothing");
    }

    // an empty list of the config: all layers of the base
    const json * in_config = llama_adapter_mem_json_find(config, "target_layers");

    sidecar.all_layers = kvs.is_3 && in_config && *in_config == json::array();
    if (!sidecar.all_layers) {
        adapter_mem_check_list(kvs, config, "target_layers", res);
    } else if (last + 1 != (int64_t) res.size()) {
        kvs.fail("target_layers_json", "leaves layers out, but config_json: target_layers is empty: all", "disagree");
    }
    return res;
}

// an entry of per_layer_attention_json
static llama_adapter_mem_sidecar::layer adapter_mem_read_layer(const json & obj, int32_t il, const json & heads, const llama_adapter_mem_sidecar & sidecar) {
    const std::string what = "per_layer_attention_json: layer " + std::to_string(il);

    const json * layer = llama_adapter_mem_json_find(obj, "layer");
    if (!layer || !llama_adapter_mem_json_is_int(*layer, il, il)) {
        llama_adapter_mem_fail("attention", "%s: must have an object whose layer is %d, as in target_layers_json", what.c_str(), il);
    }

    llama_adapter_mem_sidecar::layer res;
    res.il = il;

    static const json sliding = { "sliding_attention", "sliding" };
    static const json full    = { "full_attention", "full" };

    const json kind = obj.value("attention_kind", json());

    res.is_swa = std::find(sliding.begin(), sliding.end(), kind) != sliding.end();
    if (!res.is_swa && std::find(full.begin(), full.end(), kind) == full.end()) {
        llama_adapter_mem_fail("attention", "%s: attention_kind is %s, must be sliding_attention or full_attention", what.c_str(), llama_adapter_mem_json_text(kind).c_str());
    }

    for (int h = 0; h < 4; ++h) {
        const std::string key   = std::string(1, ADAPTER_MEM_HEADS[h]) + "_out";
        const json        width = obj.value(key, json());
        // null: a layer that shares the KV of an earlier one has no projection of its own
        if (!width.is_null() && !llama_adapter_mem_json_is_int(width, 0, ADAPTER_MEM_MAX_EMBD)) {
            llama_adapter_mem_fail("attention", "%s: %s is %s, must be null or an integer from 0 to %lld", what.c_str(), key.c_str(),
                    llama_adapter_mem_json_text(width).c_str(), (long long) ADAPTER_MEM_MAX_EMBD);
        }
        res.width[h] = width.is_null() ? 0 : width.get<int64_t>();
        if (h < 2 && sidecar.rope_head_dim > 0 && res.width[h] % sidecar.rope_head_dim != 0) {
            llama_adapter_mem_fail("attention", "%s: %s is %lld, no multiple of rope_head_dim %u", what.c_str(), key.c_str(), (long long) res.width[h],
                    sidecar.rope_head_dim);
        }
        if (sidecar.head[h] && res.width[h] == 0) {
            llama_adapter_mem_fail("attention", "%s: %s must be positive, because delta head %c is active", what.c_str(), key.c_str(), ADAPTER_MEM_HEADS[h]);
        }
    }

    const json active = obj.value("active_delta_heads", heads);
    if (!active.is_array() || active.size() != heads.size() || !std::is_permutation(active.begin(), active.end(), heads.begin(), heads.end())) {
        llama_adapter_mem_fail("attention", "%s: active_delta_heads is %s, which differs from delta_heads_json: that is not implemented", what.c_str(),
                llama_adapter_mem_json_text(active).c_str());
    }
    return res;
}

static void adapter_mem_read_layers(const llama_adapter_mem_kvs & kvs, const json & config, llama_adapter_mem_sidecar & res) {
    const json ils       = adapter_mem_read_targets(kvs, config, res);
    const json attention = kvs.json("per_layer_attention_json", json::value_t::array);
    if (attention.size() != ils.size()) {
        kvs.fail("per_layer_attention_json",
                "has " + std::to_string(attention.size()) + " entries, must have one for each of the " + std::to_string(ils.size()) + " target layers", "disagree");
    }
    for (size_t i = 0; i < ils.size(); ++i) {
        res.layers.push_back(adapter_mem_read_layer(attention[i], ils[i].get<int32_t>(), config.at("delta_heads"), res));
    }
}

llama_adapter_mem_manifest llama_adapter_mem_sidecar_read_keys(const llama_adapter_mem_gguf & gguf, llama_adapter_mem_sidecar & res) {
    const llama_adapter_mem_kvs kvs(gguf);

    llama_adapter_mem_sidecar_read_header(kvs, res);

    json config = kvs.json("config_json", json::value_t::object);

    llama_adapter_mem_config_check(config, res.kind);
    llama_adapter_mem_config_fill(config, res.kind);

    adapter_mem_read_hparams(kvs, config, res);
    adapter_mem_read_heads(kvs, config, res);
    adapter_mem_read_layers(kvs, config, res);

    llama_adapter_mem_manifest manifest;
    manifest.n_tensors = kvs.u32("tensor_count");
    manifest.n_numel   = kvs.u64("total_numel");
    manifest.n_bytes   = kvs.u64("total_bytes");
    manifest.entries   = kvs.json("tensor_manifest_json", json::value_t::array);
    return manifest;
}
