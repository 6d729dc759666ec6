#include "llama-rwkv-ms-config.h"
#include "llama-rwkv-ms-sidecar.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <set>

using json = nlohmann::json;

static const int64_t  RWKV_MS_MAX_EMBD   = 1 << 20;
static const int64_t  RWKV_MS_MAX_PERIOD = 1 << 24; // chunk*states: the counter is kept modulo this in f32
static const uint64_t RWKV_MS_MAX_CELL   = 1 << 24; // elements of the state of one layer and sequence
static const int64_t  RWKV_MS_MAX_LAYER  = 4095;

static const char * const RWKV_MS_SCHEMA = "delta_mem_rwkv_ms_memory_gguf_sidecar.v";
static const char * const RWKV_MS_HEADS  = "qkvo";

//
// keys
//

// nullptr if there is no such key and none is required; key is without its prefix
static const llama_rwkv_ms_gguf::kv * rwkv_ms_kv_find(const llama_rwkv_ms_gguf & gguf, const std::string & key, gguf_type type, bool required) {
    const auto * res = gguf.find("delta_mem." + key);
    if (!res && required) {
        llama_rwkv_ms_fail("key-missing", "key 'delta_mem.%s' is missing: export the sidecar again", key.c_str());
    }
    if (res && res->type != type) {
        llama_rwkv_ms_fail("key-type", "key 'delta_mem.%s' has type %s, must be %s", key.c_str(), gguf_type_name(res->type), gguf_type_name(type));
    }
    return res;
}

static std::string_view rwkv_ms_kv_str(const llama_rwkv_ms_gguf & gguf, const char * key) {
    return rwkv_ms_kv_find(gguf, key, GGUF_TYPE_STRING, true)->value;
}

template <typename T>
static T rwkv_ms_kv_num(const llama_rwkv_ms_gguf & gguf, const char * key, gguf_type type) {
    T res;
    memcpy(&res, rwkv_ms_kv_find(gguf, key, type, true)->value.data(), sizeof(res));
    return res;
}

static uint32_t rwkv_ms_kv_u32(const llama_rwkv_ms_gguf & gguf, const char * key) {
    return rwkv_ms_kv_num<uint32_t>(gguf, key, GGUF_TYPE_UINT32);
}

static uint64_t rwkv_ms_kv_u64(const llama_rwkv_ms_gguf & gguf, const char * key) {
    return rwkv_ms_kv_num<uint64_t>(gguf, key, GGUF_TYPE_UINT64);
}

static void rwkv_ms_kv_expect(const llama_rwkv_ms_gguf & gguf, const char * key, const char * want) {
    const std::string_view value = rwkv_ms_kv_str(gguf, key);
    if (value != want) {
        llama_rwkv_ms_fail("unsupported", "key 'delta_mem.%s' is %s, but only '%s' is implemented", key, llama_rwkv_ms_quote(value).c_str(), want);
    }
}

static json rwkv_ms_kv_json(const llama_rwkv_ms_gguf & gguf, const char * key, json::value_t type) {
    return llama_rwkv_ms_json_parse(key, rwkv_ms_kv_str(gguf, key), type);
}

static void rwkv_ms_check_keys(const llama_rwkv_ms_gguf & gguf) {
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
            rwkv_ms_kv_find(gguf, std::string(name), GGUF_TYPE_STRING, true);
        } else if (!known.count(name)) {
            llama_rwkv_ms_fail("key-unknown", "unknown key %s: it may change the maths, so the sidecar needs a newer build",
                    llama_rwkv_ms_quote(kv.name).c_str());
        }
    }
}

// returns the version of the semantics
static uint32_t rwkv_ms_read_versions(const llama_rwkv_ms_gguf & gguf) {
    const uint32_t format = rwkv_ms_kv_u32(gguf, "format_version");
    if (format != 1 && format != 2) {
        llama_rwkv_ms_fail("format-version", "key 'delta_mem.format_version' is %u, this build reads 1 and 2", format);
    }

    const std::string      schema_want = RWKV_MS_SCHEMA + std::to_string(format);
    const std::string_view schema      = rwkv_ms_kv_str(gguf, "schema");
    if (schema != schema_want) {
        llama_rwkv_ms_fail("schema", "key 'delta_mem.schema' is %s, must be '%s'", llama_rwkv_ms_quote(schema).c_str(), schema_want.c_str());
    }

    uint32_t semantics = 1;
    if (rwkv_ms_kv_find(gguf, "rwkv_ms_semantics_version", GGUF_TYPE_UINT32, format >= 2)) {
        semantics = rwkv_ms_kv_u32(gguf, "rwkv_ms_semantics_version");
    }
    if (semantics < 1 || semantics > format) {
        llama_rwkv_ms_fail("semantics-version", "key 'delta_mem.rwkv_ms_semantics_version' is %u, in format %u it must be %s", semantics, format,
                format == 1 ? "1" : "1 or 2");
    }
    if (rwkv_ms_kv_find(gguf, "rwkv_ms_state_dtype", GGUF_TYPE_STRING, false)) {
        rwkv_ms_kv_expect(gguf, "rwkv_ms_state_dtype", "f32");
    }
    return semantics;
}

static std::string rwkv_ms_read_base_sha256(const llama_rwkv_ms_gguf & gguf) {
    std::string res(rwkv_ms_kv_str(gguf, "base_gguf_sha256"));
    for (char & c : res) {
        c = (char) tolower((unsigned char) c);
    }
    if (res.size() != 64 || res.find_first_not_of("0123456789abcdef") != std::string::npos) {
        llama_rwkv_ms_fail("key-value", "key 'delta_mem.base_gguf_sha256' is %s, must be 64 hex digits", llama_rwkv_ms_quote(res).c_str());
    }
    return res;
}

//
// parameters of the memory
//

static void rwkv_ms_check_mode(const char * key, const std::string & value, const char * want) {
    if (value != want) {
        llama_rwkv_ms_fail("config-unsupported", "config_json: %s is %s, but only '%s' is implemented", key, llama_rwkv_ms_quote(value).c_str(), want);
    }
}

static void rwkv_ms_read_mode(const llama_rwkv_ms_gguf & gguf, const json & config, const char * key, const char * want) {
    rwkv_ms_kv_expect(gguf, key, want);
    rwkv_ms_check_mode(key, llama_rwkv_ms_config_str(config, key), want);
}

// the same figure stands in a key of the file and in config_json
static uint32_t rwkv_ms_read_u32(const llama_rwkv_ms_gguf & gguf, const json & config, const char * key, int64_t max) {
    const int64_t  in_config = llama_rwkv_ms_config_int(config, key, 1, max);
    const uint32_t in_file   = rwkv_ms_kv_u32(gguf, key);
    if (in_config != in_file) {
        llama_rwkv_ms_fail("disagree", "key 'delta_mem.%s' is %u, but config_json has %lld", key, in_file, (long long) in_config);
    }
    return in_file;
}

static float rwkv_ms_read_alpha(const llama_rwkv_ms_gguf & gguf, const json & config) {
    const float res = rwkv_ms_kv_num<float>(gguf, "alpha", GGUF_TYPE_FLOAT32);
    if (!std::isfinite(res)) {
        llama_rwkv_ms_fail("key-value", "key 'delta_mem.alpha' is %g, must be finite", res);
    }
    const double in_config = llama_rwkv_ms_config_num(config, "alpha");
    if (res != (float) in_config) {
        llama_rwkv_ms_fail("disagree", "key 'delta_mem.alpha' is %g, but config_json has %g", res, in_config);
    }
    return res;
}

// a list of config_json that also stands in a key of the file
static void rwkv_ms_check_list(const json & config, const char * key, const json & in_file) {
    const json * in_config = llama_rwkv_ms_json_find(config, key);
    if (!in_config) {
        llama_rwkv_ms_fail("config-missing", "config_json: %s is missing", key);
    }
    if (*in_config != in_file) {
        llama_rwkv_ms_fail("disagree", "key 'delta_mem.%s_json' is %s, but config_json has %s", key, llama_rwkv_ms_json_text(in_file).c_str(),
                llama_rwkv_ms_json_text(*in_config).c_str());
    }
}

static void rwkv_ms_read_heads(const llama_rwkv_ms_gguf & gguf, const json & config, llama_rwkv_ms_sidecar & res) {
    const json heads = rwkv_ms_kv_json(gguf, "delta_heads_json", json::value_t::array);
    if (heads.empty()) {
        llama_rwkv_ms_fail("key-value", "key 'delta_mem.delta_heads_json' is empty: such a sidecar changes nothing");
    }
    for (const auto & head : heads) {
        const std::string name = head.is_string() ? head.get<std::string>() : "";
        const char *      pos  = name.size() == 1 ? (const char *) memchr(RWKV_MS_HEADS, name[0], 4) : nullptr;
        if (!pos || res.head[pos - RWKV_MS_HEADS]) {
            llama_rwkv_ms_fail("key-value", "key 'delta_mem.delta_heads_json' has %s, which is unknown or there twice: the heads are q k v o",
                    llama_rwkv_ms_json_text(head).c_str());
        }
        res.head[pos - RWKV_MS_HEADS] = true;
    }
    rwkv_ms_check_list(config, "delta_heads", heads);
}

static void rwkv_ms_read_hparams(const llama_rwkv_ms_gguf & gguf, const json & config, llama_rwkv_ms_sidecar & res) {
    auto & hparams = res.hparams;

    rwkv_ms_read_mode(gguf, config, "memory_backend", "rwkv_ms");
    rwkv_ms_read_mode(gguf, config, "memory_readout_mode", "delta");
    rwkv_ms_read_mode(gguf, config, "rwkv_ms_boundary_mode", "fixed_chunk");

    const int64_t semantics = config.contains("rwkv_ms_semantics_version") ? llama_rwkv_ms_config_int(config, "rwkv_ms_semantics_version", 1, 2) : 1;
    if (semantics != hparams.semantics) {
        llama_rwkv_ms_fail("disagree", "config_json: rwkv_ms_semantics_version is %lld, but the file has %u", (long long) semantics, hparams.semantics);
    }
    if (config.contains("rwkv_ms_state_dtype")) {
        rwkv_ms_check_mode("rwkv_ms_state_dtype", llama_rwkv_ms_config_str(config, "rwkv_ms_state_dtype"), "f32");
    }

    hparams.rank    = rwkv_ms_read_u32(gguf, config, "rank", 256);
    hparams.n_head  = rwkv_ms_read_u32(gguf, config, "num_state_heads", 64);
    hparams.n_state = rwkv_ms_read_u32(gguf, config, "rwkv_ms_num_states", 1024);
    hparams.n_chunk = rwkv_ms_read_u32(gguf, config, "rwkv_ms_chunk_size", RWKV_MS_MAX_PERIOD);

    if ((int64_t) hparams.n_chunk * hparams.n_state > RWKV_MS_MAX_PERIOD) {
        llama_rwkv_ms_fail("config-value", "config_json: rwkv_ms_chunk_size * rwkv_ms_num_states is %lld, at most %lld are implemented",
                (long long) hparams.n_chunk * hparams.n_state, (long long) RWKV_MS_MAX_PERIOD);
    }
    if ((uint64_t) hparams.n_head * hparams.n_state * hparams.rank * hparams.rank > RWKV_MS_MAX_CELL) {
        llama_rwkv_ms_fail("config-value", "config_json: num_state_heads, rwkv_ms_num_states and rank give a state of more than %llu values a layer",
                (unsigned long long) RWKV_MS_MAX_CELL);
    }

    hparams.alpha      = rwkv_ms_read_alpha(gguf, config);
    hparams.erase_gate = (float) llama_rwkv_ms_config_num(config, "rwkv_ms_erase_gate");

    static const char * const modes[] = { "standard", "lambda_outside", "no_lambda" };

    const std::string mode = llama_rwkv_ms_config_str(config, "state_update_mode");
    hparams.update_mode    = (int) (std::find(std::begin(modes), std::end(modes), mode) - std::begin(modes));
    if (hparams.update_mode == 3) {
        llama_rwkv_ms_fail("config-unsupported", "config_json: state_update_mode is %s, must be standard, lambda_outside or no_lambda",
                llama_rwkv_ms_quote(mode).c_str());
    }

    hparams.couple_lambda = llama_rwkv_ms_config_bool(config, "couple_lambda");
    hparams.n_gate        = llama_rwkv_ms_config_bool(config, "rankwise_gates") ? hparams.n_rank_total() : hparams.n_head;
}

//
// layers
//

static json rwkv_ms_read_targets(const llama_rwkv_ms_gguf & gguf, const json & config) {
    const json res  = rwkv_ms_kv_json(gguf, "target_layers_json", json::value_t::array);
    int64_t    last = -1;
    for (const auto & il : res) {
        if (!llama_rwkv_ms_json_is_int(il, last + 1, RWKV_MS_MAX_LAYER)) {
            llama_rwkv_ms_fail("key-value", "key 'delta_mem.target_layers_json' has %s, must be layers from 0 to %lld in ascending order",
                    llama_rwkv_ms_json_text(il).c_str(), (long long) RWKV_MS_MAX_LAYER);
        }
        last = il.get<int64_t>();
    }
    if (res.empty()) {
        llama_rwkv_ms_fail("key-value", "key 'delta_mem.target_layers_json' is empty: such a sidecar changes nothing");
    }
    rwkv_ms_check_list(config, "target_layers", res);
    return res;
}

// an entry of per_layer_attention_json
static llama_rwkv_ms_sidecar::layer rwkv_ms_read_layer(const json & obj, int32_t il, const json & heads, const bool * is_active) {
    const std::string what = "per_layer_attention_json: layer " + std::to_string(il);

    const json * layer = llama_rwkv_ms_json_find(obj, "layer");
    if (!layer || !llama_rwkv_ms_json_is_int(*layer, il, il)) {
        llama_rwkv_ms_fail("attention", "%s: must have an object whose layer is %d, as in target_layers_json", what.c_str(), il);
    }

    llama_rwkv_ms_sidecar::layer res;
    res.il = il;

    static const json sliding = { "sliding_attention", "sliding" };
    static const json full    = { "full_attention", "full" };

    const json kind = obj.value("attention_kind", json());

    res.is_swa = std::find(sliding.begin(), sliding.end(), kind) != sliding.end();
    if (!res.is_swa && std::find(full.begin(), full.end(), kind) == full.end()) {
        llama_rwkv_ms_fail("attention", "%s: attention_kind is %s, must be sliding_attention or full_attention", what.c_str(), llama_rwkv_ms_json_text(kind).c_str());
    }

    for (int h = 0; h < 4; ++h) {
        const std::string key   = std::string(1, RWKV_MS_HEADS[h]) + "_out";
        const json        width = obj.value(key, json());
        // null: a layer that shares the KV of an earlier one has no projection of its own
        if (!width.is_null() && !llama_rwkv_ms_json_is_int(width, 0, RWKV_MS_MAX_EMBD)) {
            llama_rwkv_ms_fail("attention", "%s: %s is %s, must be null or an integer from 0 to %lld", what.c_str(), key.c_str(),
                    llama_rwkv_ms_json_text(width).c_str(), (long long) RWKV_MS_MAX_EMBD);
        }
        res.width[h] = width.is_null() ? 0 : width.get<int64_t>();
        if (is_active[h] && res.width[h] == 0) {
            llama_rwkv_ms_fail("attention", "%s: %s must be positive, because delta head %c is active", what.c_str(), key.c_str(), RWKV_MS_HEADS[h]);
        }
    }

    const json active = obj.value("active_delta_heads", heads);
    if (!active.is_array() || active.size() != heads.size() || !std::is_permutation(active.begin(), active.end(), heads.begin(), heads.end())) {
        llama_rwkv_ms_fail("attention", "%s: active_delta_heads is %s, which differs from delta_heads_json: that is not implemented", what.c_str(),
                llama_rwkv_ms_json_text(active).c_str());
    }
    return res;
}

static void rwkv_ms_read_layers(const llama_rwkv_ms_gguf & gguf, const json & config, llama_rwkv_ms_sidecar & res) {
    const json ils       = rwkv_ms_read_targets(gguf, config);
    const json attention = rwkv_ms_kv_json(gguf, "per_layer_attention_json", json::value_t::array);
    if (attention.size() != ils.size()) {
        llama_rwkv_ms_fail("disagree", "key 'delta_mem.per_layer_attention_json' has %zu entries, must have one for each of the %zu target layers",
                attention.size(), ils.size());
    }
    for (size_t i = 0; i < ils.size(); ++i) {
        res.layers.push_back(rwkv_ms_read_layer(attention[i], ils[i].get<int32_t>(), config.at("delta_heads"), res.head));
    }
}

llama_rwkv_ms_manifest llama_rwkv_ms_sidecar_read_keys(const llama_rwkv_ms_gguf & gguf, llama_rwkv_ms_sidecar & res) {
    // before anything else: a later format has other keys
    res.hparams.semantics = rwkv_ms_read_versions(gguf);

    rwkv_ms_check_keys(gguf);
    rwkv_ms_kv_expect(gguf, "tensor_name_format", "compact_with_source_name_manifest");
    res.base_sha256 = rwkv_ms_read_base_sha256(gguf);

    const json config = rwkv_ms_kv_json(gguf, "config_json", json::value_t::object);

    llama_rwkv_ms_config_check(config);
    rwkv_ms_read_hparams(gguf, config, res);
    rwkv_ms_read_heads(gguf, config, res);
    rwkv_ms_read_layers(gguf, config, res);

    llama_rwkv_ms_manifest manifest;
    manifest.n_tensors = rwkv_ms_kv_u32(gguf, "tensor_count");
    manifest.n_numel   = rwkv_ms_kv_u64(gguf, "total_numel");
    manifest.n_bytes   = rwkv_ms_kv_u64(gguf, "total_bytes");
    manifest.entries   = rwkv_ms_kv_json(gguf, "tensor_manifest_json", json::value_t::array);
    return manifest;
}
