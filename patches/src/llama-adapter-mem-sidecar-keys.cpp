#include "llama-adapter-mem-config.h"
#include "llama-adapter-mem-sidecar.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <set>

using json = nlohmann::json;

static const int64_t  ADAPTER_MEM_MAX_EMBD   = 1 << 20;
static const int64_t  ADAPTER_MEM_MAX_PERIOD = 1 << 24; // chunk*states: the counter is kept modulo this in f32
static const uint64_t ADAPTER_MEM_MAX_CELL   = 1 << 24; // elements of the state of one layer and sequence
static const int64_t  ADAPTER_MEM_MAX_LAYER  = 4095;

static const char * const ADAPTER_MEM_SCHEMA = "delta_mem_rwkv_ms_memory_gguf_sidecar.v";
static const char * const ADAPTER_MEM_HEADS  = "qkvo";

//
// keys
//

// nullptr if there is no such key and none is required; key is without its prefix
static const llama_adapter_mem_gguf::kv * adapter_mem_kv_find(const llama_adapter_mem_gguf & gguf, const std::string & key, gguf_type type, bool required) {
    const auto * res = gguf.find("delta_mem." + key);
    if (!res && required) {
        llama_adapter_mem_fail("key-missing", "key 'delta_mem.%s' is missing: export the sidecar again", key.c_str());
    }
    if (res && res->type != type) {
        llama_adapter_mem_fail("key-type", "key 'delta_mem.%s' has type %s, must be %s", key.c_str(), gguf_type_name(res->type), gguf_type_name(type));
    }
    return res;
}

static std::string_view adapter_mem_kv_str(const llama_adapter_mem_gguf & gguf, const char * key) {
    return adapter_mem_kv_find(gguf, key, GGUF_TYPE_STRING, true)->value;
}

template <typename T>
static T adapter_mem_kv_num(const llama_adapter_mem_gguf & gguf, const char * key, gguf_type type) {
    T res;
    memcpy(&res, adapter_mem_kv_find(gguf, key, type, true)->value.data(), sizeof(res));
    return res;
}

static uint32_t adapter_mem_kv_u32(const llama_adapter_mem_gguf & gguf, const char * key) {
    return adapter_mem_kv_num<uint32_t>(gguf, key, GGUF_TYPE_UINT32);
}

static uint64_t adapter_mem_kv_u64(const llama_adapter_mem_gguf & gguf, const char * key) {
    return adapter_mem_kv_num<uint64_t>(gguf, key, GGUF_TYPE_UINT64);
}

static void adapter_mem_kv_expect(const llama_adapter_mem_gguf & gguf, const char * key, const char * want) {
    const std::string_view value = adapter_mem_kv_str(gguf, key);
    if (value != want) {
        llama_adapter_mem_fail("unsupported", "key 'delta_mem.%s' is %s, but only '%s' is implemented", key, llama_adapter_mem_quote(value).c_str(), want);
    }
}

static json adapter_mem_kv_json(const llama_adapter_mem_gguf & gguf, const char * key, json::value_t type) {
    return llama_adapter_mem_json_parse(key, adapter_mem_kv_str(gguf, key), type);
}

static void adapter_mem_check_keys(const llama_adapter_mem_gguf & gguf) {
    static const std::set<std::string_view> known = {
        "schema",
        "format_version",
        "rwkv_ms_semantics_version",
        "rwkv_ms_state_dtype",
        "memory_backend",
        "memory_readout_mode",
        "base_gguf_sha256",
        "tensor_name_format",
        "rwkv_ms_boundary_mode",
        "tensor_count",
        "rank",
        "num_state_heads",
        "rwkv_ms_num_states",
        "rwkv_ms_chunk_size",
        "total_numel",
        "total_bytes",
        "alpha",
        "target_layers_json",
        "delta_heads_json",
        "per_layer_attention_json",
        "config_json",
        "tensor_manifest_json",
    };
    // for people, not for the maths
    static const std::set<std::string_view> informative = {
        "status",
        "memory_type",
        "base_model",
        "checkpoint_repo",
        "base_gguf",
        "mmproj_gguf",
        "mmproj_gguf_sha256",
        "adapter_metadata_json",
        "required_runtime_hooks_json",
    };

    static const std::string_view prefix = "delta_mem.";

    for (const auto & kv : gguf.kvs) {
        if (kv.name.rfind("general.", 0) == 0) {
            continue;
        }
        const std::string_view name = kv.name.rfind(prefix, 0) == 0 ? kv.name.substr(prefix.size()) : "";
        if (informative.count(name)) {
            adapter_mem_kv_find(gguf, std::string(name), GGUF_TYPE_STRING, true);
        } else if (!known.count(name)) {
            llama_adapter_mem_fail("key-unknown", "unknown key %s: it may change the maths, so the sidecar needs a newer build",
                    llama_adapter_mem_quote(kv.name).c_str());
        }
    }
}

// returns the version of the semantics
static uint32_t adapter_mem_read_versions(const llama_adapter_mem_gguf & gguf) {
    const uint32_t format = adapter_mem_kv_u32(gguf, "format_version");
    if (format != 1 && format != 2) {
        llama_adapter_mem_fail("format-version", "key 'delta_mem.format_version' is %u, this build reads 1 and 2", format);
    }

    const std::string      schema_want = ADAPTER_MEM_SCHEMA + std::to_string(format);
    const std::string_view schema      = adapter_mem_kv_str(gguf, "schema");
    if (schema != schema_want) {
        llama_adapter_mem_fail("schema", "key 'delta_mem.schema' is %s, must be '%s'", llama_adapter_mem_quote(schema).c_str(), schema_want.c_str());
    }

    uint32_t semantics = 1;
    if (adapter_mem_kv_find(gguf, "rwkv_ms_semantics_version", GGUF_TYPE_UINT32, format >= 2)) {
        semantics = adapter_mem_kv_u32(gguf, "rwkv_ms_semantics_version");
    }
    if (semantics < 1 || semantics > format) {
        llama_adapter_mem_fail("semantics-version", "key 'delta_mem.rwkv_ms_semantics_version' is %u, in format %u it must be %s", semantics, format,
                format == 1 ? "1" : "1 or 2");
    }
    if (adapter_mem_kv_find(gguf, "rwkv_ms_state_dtype", GGUF_TYPE_STRING, false)) {
        adapter_mem_kv_expect(gguf, "rwkv_ms_state_dtype", "f32");
    }
    return semantics;
}

static std::string adapter_mem_read_base_sha256(const llama_adapter_mem_gguf & gguf) {
    std::string res(adapter_mem_kv_str(gguf, "base_gguf_sha256"));
    for (char & c : res) {
        c = (char) tolower((unsigned char) c);
    }
    if (res.size() != 64 || res.find_first_not_of("0123456789abcdef") != std::string::npos) {
        llama_adapter_mem_fail("key-value", "key 'delta_mem.base_gguf_sha256' is %s, must be 64 hex digits", llama_adapter_mem_quote(res).c_str());
    }
    return res;
}

//
// parameters of the memory
//

static void adapter_mem_check_mode(const char * key, const std::string & value, const char * want) {
    if (value != want) {
        llama_adapter_mem_fail("config-unsupported", "config_json: %s is %s, but only '%s' is implemented", key, llama_adapter_mem_quote(value).c_str(), want);
    }
}

static void adapter_mem_read_mode(const llama_adapter_mem_gguf & gguf, const json & config, const char * key, const char * want) {
    adapter_mem_kv_expect(gguf, key, want);
    adapter_mem_check_mode(key, llama_adapter_mem_config_str(config, key), want);
}

// the same figure stands in a key of the file and in config_json
static uint32_t adapter_mem_read_u32(const llama_adapter_mem_gguf & gguf, const json & config, const char * key, int64_t max) {
    const int64_t  in_config = llama_adapter_mem_config_int(config, key, 1, max);
    const uint32_t in_file   = adapter_mem_kv_u32(gguf, key);
    if (in_config != in_file) {
        llama_adapter_mem_fail("disagree", "key 'delta_mem.%s' is %u, but config_json has %lld", key, in_file, (long long) in_config);
    }
    return in_file;
}

static float adapter_mem_read_alpha(const llama_adapter_mem_gguf & gguf, const json & config) {
    const float res = adapter_mem_kv_num<float>(gguf, "alpha", GGUF_TYPE_FLOAT32);
    if (!std::isfinite(res)) {
        llama_adapter_mem_fail("key-value", "key 'delta_mem.alpha' is %g, must be finite", res);
    }
    const double in_config = llama_adapter_mem_config_num(config, "alpha");
    if (res != (float) in_config) {
        llama_adapter_mem_fail("disagree", "key 'delta_mem.alpha' is %g, but config_json has %g", res, in_config);
    }
    return res;
}

// a list of config_json that also stands in a key of the file
static void adapter_mem_check_list(const json & config, const char * key, const json & in_file) {
    const json * in_config = llama_adapter_mem_json_find(config, key);
    if (!in_config) {
        llama_adapter_mem_fail("config-missing", "config_json: %s is missing", key);
    }
    if (*in_config != in_file) {
        llama_adapter_mem_fail("disagree", "key 'delta_mem.%s_json' is %s, but config_json has %s", key, llama_adapter_mem_json_text(in_file).c_str(),
                llama_adapter_mem_json_text(*in_config).c_str());
    }
}

static void adapter_mem_read_heads(const llama_adapter_mem_gguf & gguf, const json & config, llama_adapter_mem_sidecar & res) {
    const json heads = adapter_mem_kv_json(gguf, "delta_heads_json", json::value_t::array);
    if (heads.empty()) {
        llama_adapter_mem_fail("key-value", "key 'delta_mem.delta_heads_json' is empty: such a sidecar changes nothing");
    }
    for (const auto & head : heads) {
        const std::string name = head.is_string() ? head.get<std::string>() : "";
        const char *      pos  = name.size() == 1 ? (const char *) memchr(ADAPTER_MEM_HEADS, name[0], 4) : nullptr;
        if (!pos || res.head[pos - ADAPTER_MEM_HEADS]) {
            llama_adapter_mem_fail("key-value", "key 'delta_mem.delta_heads_json' has %s, which is unknown or there twice: the heads are q k v o",
                    llama_adapter_mem_json_text(head).c_str());
        }
        res.head[pos - ADAPTER_MEM_HEADS] = true;
    }
    adapter_mem_check_list(config, "delta_heads", heads);
}

static void adapter_mem_read_hparams(const llama_adapter_mem_gguf & gguf, const json & config, llama_adapter_mem_sidecar & res) {
    auto & hparams = res.hparams;

    adapter_mem_read_mode(gguf, config, "memory_backend", "rwkv_ms");
    adapter_mem_read_mode(gguf, config, "memory_readout_mode", "delta");
    adapter_mem_read_mode(gguf, config, "rwkv_ms_boundary_mode", "fixed_chunk");

    const int64_t semantics = config.contains("rwkv_ms_semantics_version") ? llama_adapter_mem_config_int(config, "rwkv_ms_semantics_version", 1, 2) : 1;
    if (semantics != hparams.semantics) {
        llama_adapter_mem_fail("disagree", "config_json: rwkv_ms_semantics_version is %lld, but the file has %u", (long long) semantics, hparams.semantics);
    }
    if (config.contains("rwkv_ms_state_dtype")) {
        adapter_mem_check_mode("rwkv_ms_state_dtype", llama_adapter_mem_config_str(config, "rwkv_ms_state_dtype"), "f32");
    }

    hparams.rank    = adapter_mem_read_u32(gguf, config, "rank", 256);
    hparams.n_head  = adapter_mem_read_u32(gguf, config, "num_state_heads", 64);
    hparams.n_state = adapter_mem_read_u32(gguf, config, "rwkv_ms_num_states", 1024);
    hparams.n_chunk = adapter_mem_read_u32(gguf, config, "rwkv_ms_chunk_size", ADAPTER_MEM_MAX_PERIOD);

    if ((int64_t) hparams.n_chunk * hparams.n_state > ADAPTER_MEM_MAX_PERIOD) {
        llama_adapter_mem_fail("config-value", "config_json: rwkv_ms_chunk_size * rwkv_ms_num_states is %lld, at most %lld are implemented",
                (long long) hparams.n_chunk * hparams.n_state, (long long) ADAPTER_MEM_MAX_PERIOD);
    }
    if ((uint64_t) hparams.n_head * hparams.n_state * hparams.rank * hparams.rank > ADAPTER_MEM_MAX_CELL) {
        llama_adapter_mem_fail("config-value", "config_json: num_state_heads, rwkv_ms_num_states and rank give a state of more than %llu values a layer",
                (unsigned long long) ADAPTER_MEM_MAX_CELL);
    }

    hparams.alpha      = adapter_mem_read_alpha(gguf, config);
    hparams.erase_gate = (float) llama_adapter_mem_config_num(config, "rwkv_ms_erase_gate");

    static const char * const modes[] = { "standard", "lambda_outside", "no_lambda" };

    const std::string mode = llama_adapter_mem_config_str(config, "state_update_mode");
    hparams.update_mode    = (int) (std::find(std::begin(modes), std::end(modes), mode) - std::begin(modes));
    if (hparams.update_mode == 3) {
        llama_adapter_mem_fail("config-unsupported", "config_json: state_update_mode is %s, must be standard, lambda_outside or no_lambda",
                llama_adapter_mem_quote(mode).c_str());
    }

    hparams.couple_lambda = llama_adapter_mem_config_bool(config, "couple_lambda");
    hparams.n_gate        = llama_adapter_mem_config_bool(config, "rankwise_gates") ? hparams.n_rank_total() : hparams.n_head;
}

//
// layers
//

static json adapter_mem_read_targets(const llama_adapter_mem_gguf & gguf, const json & config) {
    const json res  = adapter_mem_kv_json(gguf, "target_layers_json", json::value_t::array);
    int64_t    last = -1;
    for (const auto & il : res) {
        if (!llama_adapter_mem_json_is_int(il, last + 1, ADAPTER_MEM_MAX_LAYER)) {
            llama_adapter_mem_fail("key-value", "key 'delta_mem.target_layers_json' has %s, must be layers from 0 to %lld in ascending order",
                    llama_adapter_mem_json_text(il).c_str(), (long long) ADAPTER_MEM_MAX_LAYER);
        }
        last = il.get<int64_t>();
    }
    if (res.empty()) {
        llama_adapter_mem_fail("key-value", "key 'delta_mem.target_layers_json' is empty: such a sidecar changes nothing");
    }
    adapter_mem_check_list(config, "target_layers", res);
    return res;
}

// an entry of per_layer_attention_json
static llama_adapter_mem_sidecar::layer adapter_mem_read_layer(const json & obj, int32_t il, const json & heads, const bool * is_active) {
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
        if (is_active[h] && res.width[h] == 0) {
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

static void adapter_mem_read_layers(const llama_adapter_mem_gguf & gguf, const json & config, llama_adapter_mem_sidecar & res) {
    const json ils       = adapter_mem_read_targets(gguf, config);
    const json attention = adapter_mem_kv_json(gguf, "per_layer_attention_json", json::value_t::array);
    if (attention.size() != ils.size()) {
        llama_adapter_mem_fail("disagree", "key 'delta_mem.per_layer_attention_json' has %zu entries, must have one for each of the %zu target layers",
                attention.size(), ils.size());
    }
    for (size_t i = 0; i < ils.size(); ++i) {
        res.layers.push_back(adapter_mem_read_layer(attention[i], ils[i].get<int32_t>(), config.at("delta_heads"), res.head));
    }
}

llama_adapter_mem_manifest llama_adapter_mem_sidecar_read_keys(const llama_adapter_mem_gguf & gguf, llama_adapter_mem_sidecar & res) {
    // before anything else: a later format has other keys
    res.hparams.semantics = adapter_mem_read_versions(gguf);

    adapter_mem_check_keys(gguf);
    adapter_mem_kv_expect(gguf, "tensor_name_format", "compact_with_source_name_manifest");
    res.base_sha256 = adapter_mem_read_base_sha256(gguf);

    const json config = adapter_mem_kv_json(gguf, "config_json", json::value_t::object);

    llama_adapter_mem_config_check(config);
    adapter_mem_read_hparams(gguf, config, res);
    adapter_mem_read_heads(gguf, config, res);
    adapter_mem_read_layers(gguf, config, res);

    llama_adapter_mem_manifest manifest;
    manifest.n_tensors = adapter_mem_kv_u32(gguf, "tensor_count");
    manifest.n_numel   = adapter_mem_kv_u64(gguf, "total_numel");
    manifest.n_bytes   = adapter_mem_kv_u64(gguf, "total_bytes");
    manifest.entries   = adapter_mem_kv_json(gguf, "tensor_manifest_json", json::value_t::array);
    return manifest;
}
