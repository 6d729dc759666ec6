#include "llama-rwkv-ms-config.h"
#include "llama-rwkv-ms-sidecar.h"

#include "gguf.h"

#include <cctype>
#include <cmath>
#include <cstring>
#include <set>

using json = nlohmann::json;

static const int64_t  RWKV_MS_MAX_EMBD   = 1 << 20;
static const int64_t  RWKV_MS_MAX_PERIOD = 1 << 24; // chunk*states: the counter is kept modulo this in f32
static const uint64_t RWKV_MS_MAX_CELL   = 1 << 24; // elements of the state of one layer and sequence
static const int32_t  RWKV_MS_MAX_LAYER  = 4096;

static const char * const RWKV_MS_SCHEMA = "delta_mem_rwkv_ms_memory_gguf_sidecar";
static const char * const RWKV_MS_HEADS  = "qkvo";

//
// key-value pairs
//

// getters of gguf.h abort on a wrong type, so the type is checked here first
static int64_t rwkv_ms_kv_find(const gguf_context * gguf, const std::string & key, gguf_type type, bool required) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0) {
        if (required) {
            llama_rwkv_ms_fail("key '%s' is missing", key.c_str());
        }
        return -1;
    }
    if (gguf_get_kv_type(gguf, id) != type) {
        llama_rwkv_ms_fail("key '%s' has type %s, must be %s", key.c_str(), gguf_type_name(gguf_get_kv_type(gguf, id)), gguf_type_name(type));
    }
    return id;
}

static std::string rwkv_ms_kv_str(const gguf_context * gguf, const char * key) {
    return gguf_get_val_str(gguf, rwkv_ms_kv_find(gguf, std::string("delta_mem.") + key, GGUF_TYPE_STRING, true));
}

static uint32_t rwkv_ms_kv_u32(const gguf_context * gguf, const char * key) {
    return gguf_get_val_u32(gguf, rwkv_ms_kv_find(gguf, std::string("delta_mem.") + key, GGUF_TYPE_UINT32, true));
}

static uint64_t rwkv_ms_kv_u64(const gguf_context * gguf, const char * key) {
    return gguf_get_val_u64(gguf, rwkv_ms_kv_find(gguf, std::string("delta_mem.") + key, GGUF_TYPE_UINT64, true));
}

static void rwkv_ms_kv_expect(const gguf_context * gguf, const char * key, const char * want) {
    const std::string value = rwkv_ms_kv_str(gguf, key);
    if (value != want) {
        llama_rwkv_ms_fail("key 'delta_mem.%s' is %s, but only '%s' is implemented", key, llama_rwkv_ms_quote(value).c_str(), want);
    }
}

static json rwkv_ms_kv_json(const gguf_context * gguf, const char * key) {
    return llama_rwkv_ms_json_parse(key, rwkv_ms_kv_str(gguf, key));
}

static void rwkv_ms_check_keys(const gguf_context * gguf) {
    static const std::set<std::string> known = {
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
    static const std::set<std::string> informative = {
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

    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        const std::string key = gguf_get_key(gguf, i);
        if (key.rfind("delta_mem.", 0) == 0) {
            const std::string name = key.substr(strlen("delta_mem."));
            if (informative.count(name)) {
                rwkv_ms_kv_find(gguf, key, GGUF_TYPE_STRING, true);
                continue;
            }
            if (known.count(name)) {
                continue;
            }
        } else if (key.rfind("general.", 0) == 0 || key.rfind("GGUF.", 0) == 0) {
            continue;
        }
        llama_rwkv_ms_fail("unknown key %s: it may change the maths, so the sidecar needs a newer build", llama_rwkv_ms_quote(key).c_str());
    }
}

static uint32_t rwkv_ms_read_versions(const gguf_context * gguf) {
    const uint32_t format = rwkv_ms_kv_u32(gguf, "format_version");
    if (format != 1 && format != 2) {
        llama_rwkv_ms_fail("key 'delta_mem.format_version' is %u, this build reads 1 and 2", format);
    }
    rwkv_ms_kv_expect(gguf, "schema", (std::string(RWKV_MS_SCHEMA) + ".v" + std::to_string(format)).c_str());

    uint32_t semantics = 1;
    if (rwkv_ms_kv_find(gguf, "delta_mem.rwkv_ms_semantics_version", GGUF_TYPE_UINT32, format >= 2) >= 0) {
        semantics = rwkv_ms_kv_u32(gguf, "rwkv_ms_semantics_version");
    }
    if (semantics < 1 || semantics > format) {
        llama_rwkv_ms_fail("key 'delta_mem.rwkv_ms_semantics_version' is %u, in format %u it must be %s", semantics, format,
                format == 1 ? "1" : "1 or 2");
    }
    if (rwkv_ms_kv_find(gguf, "delta_mem.rwkv_ms_state_dtype", GGUF_TYPE_STRING, false) >= 0) {
        rwkv_ms_kv_expect(gguf, "rwkv_ms_state_dtype", "f32");
    }
    return semantics;
}

//
// parameters of the memory
//

// the same figure stands in a key of the file and in config_json
static uint32_t rwkv_ms_read_u32(const gguf_context * gguf, const json & config, const char * key, int64_t max) {
    const int64_t  in_config = llama_rwkv_ms_json_int("config_json", config, key, 1, max);
    const uint32_t in_file   = rwkv_ms_kv_u32(gguf, key);
    if (in_config != in_file) {
        llama_rwkv_ms_fail("key 'delta_mem.%s' is %u, but config_json has %lld", key, in_file, (long long) in_config);
    }
    return in_file;
}

static void rwkv_ms_read_mode(const gguf_context * gguf, const json & config, const char * key, const char * want) {
    rwkv_ms_kv_expect(gguf, key, want);
    if (llama_rwkv_ms_json_str("config_json", config, key) != want) {
        llama_rwkv_ms_fail("config_json: %s is %s, but only '%s' is implemented", key,
                llama_rwkv_ms_quote(config.at(key).get<std::string>()).c_str(), want);
    }
}

// a list of config_json that also stands in a key of the file
static json rwkv_ms_read_list(const gguf_context * gguf, const json & config, const char * key) {
    const std::string key_json = std::string(key) + "_json";

    const json res = rwkv_ms_kv_json(gguf, key_json.c_str());
    if (!config.contains(key) || config.at(key) != res) {
        llama_rwkv_ms_fail("key 'delta_mem.%s' and config_json: %s must both be there and be equal", key_json.c_str(), key);
    }
    return res;
}

static void rwkv_ms_read_hparams(const gguf_context * gguf, const json & config, llama_rwkv_ms_sidecar & res) {
    const std::string what = "config_json";

    auto & hparams = res.hparams;

    rwkv_ms_read_mode(gguf, config, "memory_backend", "rwkv_ms");
    rwkv_ms_read_mode(gguf, config, "memory_readout_mode", "delta");
    rwkv_ms_read_mode(gguf, config, "rwkv_ms_boundary_mode", "fixed_chunk");

    const int64_t semantics = config.contains("rwkv_ms_semantics_version") ? llama_rwkv_ms_json_int(what, config, "rwkv_ms_semantics_version", 1, 2) : 1;
    if (semantics != hparams.semantics) {
        llama_rwkv_ms_fail("config_json: rwkv_ms_semantics_version is %lld, but the file has %u", (long long) semantics, hparams.semantics);
    }
    if (config.contains("rwkv_ms_state_dtype") && llama_rwkv_ms_json_str(what, config, "rwkv_ms_state_dtype") != "f32") {
        llama_rwkv_ms_fail("config_json: rwkv_ms_state_dtype must be 'f32'");
    }

    hparams.rank    = rwkv_ms_read_u32(gguf, config, "rank", 256);
    hparams.n_head  = rwkv_ms_read_u32(gguf, config, "num_state_heads", 64);
    hparams.n_state = rwkv_ms_read_u32(gguf, config, "rwkv_ms_num_states", 1024);
    hparams.n_chunk = rwkv_ms_read_u32(gguf, config, "rwkv_ms_chunk_size", RWKV_MS_MAX_PERIOD);

    if ((int64_t) hparams.n_chunk * hparams.n_state > RWKV_MS_MAX_PERIOD) {
        llama_rwkv_ms_fail("rwkv_ms_chunk_size*rwkv_ms_num_states is %lld, at most %lld are implemented",
                (long long) hparams.n_chunk * hparams.n_state, (long long) RWKV_MS_MAX_PERIOD);
    }
    if ((uint64_t) hparams.n_head * hparams.n_state * hparams.rank * hparams.rank > RWKV_MS_MAX_CELL) {
        llama_rwkv_ms_fail("rank, num_state_heads and rwkv_ms_num_states give a state of more than %llu values a layer",
                (unsigned long long) RWKV_MS_MAX_CELL);
    }

    hparams.alpha = gguf_get_val_f32(gguf, rwkv_ms_kv_find(gguf, "delta_mem.alpha", GGUF_TYPE_FLOAT32, true));
    if (!std::isfinite(hparams.alpha) || hparams.alpha != (float) llama_rwkv_ms_json_num(what, config, "alpha")) {
        llama_rwkv_ms_fail("key 'delta_mem.alpha' is %g, must be finite and equal to config_json: alpha", hparams.alpha);
    }
    hparams.erase_gate = (float) llama_rwkv_ms_json_num(what, config, "rwkv_ms_erase_gate");
    if (!std::isfinite(hparams.erase_gate)) {
        llama_rwkv_ms_fail("config_json: rwkv_ms_erase_gate is out of the range of f32");
    }

    const std::string mode = llama_rwkv_ms_json_str(what, config, "state_update_mode");
    hparams.update_mode =
            mode == "standard" ? 0 : mode == "lambda_outside" ? 1
            : mode == "no_lambda"                             ? 2
                                                              : -1;
    if (hparams.update_mode < 0) {
        llama_rwkv_ms_fail("config_json: state_update_mode is %s, must be standard, lambda_outside or no_lambda", llama_rwkv_ms_quote(mode).c_str());
    }

    hparams.couple_lambda = llama_rwkv_ms_json_bool(what, config, "couple_lambda");
    hparams.n_gate        = llama_rwkv_ms_json_bool(what, config, "rankwise_gates") ? hparams.n_rank_total() : hparams.n_head;

    const auto heads = llama_rwkv_ms_json_strs("delta_heads_json", rwkv_ms_read_list(gguf, config, "delta_heads"));
    if (heads.empty()) {
        llama_rwkv_ms_fail("delta_heads_json is empty: such a sidecar changes nothing");
    }
    for (const auto & head : heads) {
        const char * pos = head.size() == 1 ? strchr(RWKV_MS_HEADS, head[0]) : nullptr;
        if (!pos || *pos == '\0' || res.head[pos - RWKV_MS_HEADS]) {
            llama_rwkv_ms_fail("delta_heads_json: %s is unknown or there twice, the heads are q k v o", llama_rwkv_ms_quote(head).c_str());
        }
        res.head[pos - RWKV_MS_HEADS] = true;
    }
}

static void rwkv_ms_read_layers(const gguf_context * gguf, const json & config, llama_rwkv_ms_sidecar & res) {
    const auto ils = llama_rwkv_ms_json_ints("target_layers_json", rwkv_ms_read_list(gguf, config, "target_layers"), 0, RWKV_MS_MAX_LAYER - 1);

    const json attention = rwkv_ms_kv_json(gguf, "per_layer_attention_json");
    if (ils.empty() || !attention.is_array() || attention.size() != ils.size()) {
        llama_rwkv_ms_fail("per_layer_attention_json must have one entry for each of the %zu (at least one) layers of target_layers_json", ils.size());
    }

    static const char * const widths[4] = { "q_out", "k_out", "v_out", "o_out" };

    for (size_t i = 0; i < ils.size(); ++i) {
        const std::string what = "per_layer_attention_json[" + std::to_string(i) + "]";
        const json &      obj  = attention.at(i);

        if (i > 0 && ils[i] <= ils[i - 1]) {
            llama_rwkv_ms_fail("target_layers_json must be in ascending order without duplicates");
        }
        if (llama_rwkv_ms_json_int(what, obj, "layer", 0, RWKV_MS_MAX_LAYER - 1) != ils[i]) {
            llama_rwkv_ms_fail("%s: layer must be %lld as in target_layers_json", what.c_str(), (long long) ils[i]);
        }

        llama_rwkv_ms_sidecar::layer layer;
        layer.il = (int32_t) ils[i];

        const std::string kind = llama_rwkv_ms_json_str(what, obj, "attention_kind");
        layer.is_swa           = kind == "sliding_attention" || kind == "sliding";
        if (!layer.is_swa && kind != "full_attention" && kind != "full") {
            llama_rwkv_ms_fail("%s: attention_kind is %s, must be sliding_attention or full_attention", what.c_str(), llama_rwkv_ms_quote(kind).c_str());
        }

        for (int h = 0; h < 4; ++h) {
            // null: a layer that shares the KV of an earlier one has no projection of its own
            const bool is_null = obj.contains(widths[h]) && obj.at(widths[h]).is_null();
            layer.width[h]     = is_null ? 0 : llama_rwkv_ms_json_int(what, obj, widths[h], 0, RWKV_MS_MAX_EMBD);
            if (res.head[h] && layer.width[h] == 0) {
                llama_rwkv_ms_fail("%s: %s must be positive, because delta head %c is active", what.c_str(), widths[h], RWKV_MS_HEADS[h]);
            }
        }

        if (obj.contains("active_delta_heads")) {
            bool head[4] = {};
            for (const auto & name : llama_rwkv_ms_json_strs(what + ": active_delta_heads", obj.at("active_delta_heads"))) {
                for (int h = 0; h < 4; ++h) {
                    head[h] = head[h] || name == std::string(1, RWKV_MS_HEADS[h]);
                }
            }
            if (memcmp(head, res.head, sizeof(head)) != 0) {
                llama_rwkv_ms_fail("%s: active_delta_heads differ from delta_heads_json, which is not implemented", what.c_str());
            }
        }
        res.layers.push_back(std::move(layer));
    }
}

llama_rwkv_ms_manifest llama_rwkv_ms_sidecar_read_keys(const gguf_context * gguf, llama_rwkv_ms_sidecar & res) {
    // before anything else: a later format has other keys
    res.hparams.semantics = rwkv_ms_read_versions(gguf);

    rwkv_ms_check_keys(gguf);
    rwkv_ms_kv_expect(gguf, "tensor_name_format", "compact_with_source_name_manifest");

    res.base_sha256 = rwkv_ms_kv_str(gguf, "base_gguf_sha256");
    for (char & c : res.base_sha256) {
        c = (char) tolower((unsigned char) c);
    }
    if (res.base_sha256.size() != 64 || res.base_sha256.find_first_not_of("0123456789abcdef") != std::string::npos) {
        llama_rwkv_ms_fail("key 'delta_mem.base_gguf_sha256' is %s, must be 64 hex digits", llama_rwkv_ms_quote(res.base_sha256).c_str());
    }

    const json config = rwkv_ms_kv_json(gguf, "config_json");

    llama_rwkv_ms_config_check(config);
    rwkv_ms_read_hparams(gguf, config, res);
    rwkv_ms_read_layers(gguf, config, res);

    llama_rwkv_ms_manifest manifest;
    manifest.entries   = rwkv_ms_kv_json(gguf, "tensor_manifest_json");
    manifest.n_tensors = rwkv_ms_kv_u32(gguf, "tensor_count");
    manifest.n_numel   = rwkv_ms_kv_u64(gguf, "total_numel");
    manifest.n_bytes   = rwkv_ms_kv_u64(gguf, "total_bytes");
    return manifest;
}
