#include "llama-rwkv-ms-config.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <set>
#include <stdexcept>

using json = nlohmann::json;

static const size_t RWKV_MS_JSON_MAX_SIZE  = 16u << 20; // bytes
static const int    RWKV_MS_JSON_MAX_DEPTH = 8;

void llama_rwkv_ms_fail(const char * format, ...) {
    char buf[1024];

    va_list args;
    va_start(args, format);
    vsnprintf(buf, sizeof(buf), format, args);
    va_end(args);

    throw std::runtime_error(buf);
}

std::string llama_rwkv_ms_quote(const std::string & text) {
    const size_t n_max = 80;

    std::string res = "'";
    for (size_t i = 0; i < text.size() && i < n_max; ++i) {
        const unsigned char c = text[i];
        res += c >= 0x20 && c < 0x7f && c != '\'' ? (char) c : '?';
    }
    return res + (text.size() > n_max ? "...'" : "'");
}

json llama_rwkv_ms_json_parse(const std::string & what, const std::string & text) {
    if (text.size() > RWKV_MS_JSON_MAX_SIZE) {
        llama_rwkv_ms_fail("%s: %zu bytes of JSON, at most %zu are read", what.c_str(), text.size(), RWKV_MS_JSON_MAX_SIZE);
    }

    std::vector<std::set<std::string>> keys; // of the open objects: JSON would let a later duplicate win

    // the callback's depth counts differ between start and end of a value, ours does not
    int depth = 0;

    const auto callback = [&](int, json::parse_event_t event, json & parsed) {
        switch (event) {
            case json::parse_event_t::object_start:
                keys.emplace_back();
                depth++;
                break;
            case json::parse_event_t::array_start:
                depth++;
                break;
            case json::parse_event_t::object_end:
                keys.pop_back();
                depth--;
                break;
            case json::parse_event_t::array_end:
                depth--;
                break;
            case json::parse_event_t::key:
                if (!keys.back().insert(parsed.get_ref<const std::string &>()).second) {
                    llama_rwkv_ms_fail("%s: key %s is there twice", what.c_str(), llama_rwkv_ms_quote(parsed.get<std::string>()).c_str());
                }
                break;
            case json::parse_event_t::value:
                break;
        }
        if (depth > RWKV_MS_JSON_MAX_DEPTH) {
            llama_rwkv_ms_fail("%s: JSON is nested deeper than %d levels", what.c_str(), RWKV_MS_JSON_MAX_DEPTH);
        }
        return true;
    };

    json res = json::parse(text, callback, /*allow_exceptions =*/false);
    if (res.is_discarded()) {
        llama_rwkv_ms_fail("%s: not valid JSON", what.c_str());
    }
    return res;
}

static const json & rwkv_ms_json_at(const std::string & what, const json & obj, const char * key) {
    if (!obj.is_object()) {
        llama_rwkv_ms_fail("%s: must be a JSON object", what.c_str());
    }
    const auto it = obj.find(key);
    if (it == obj.end()) {
        llama_rwkv_ms_fail("%s: key '%s' is missing", what.c_str(), key);
    }
    return *it;
}

static std::string rwkv_ms_json_text(const json & value) {
    return llama_rwkv_ms_quote(value.dump(-1, ' ', /*ensure_ascii =*/true, json::error_handler_t::replace));
}

static int64_t rwkv_ms_json_to_int(const std::string & what, const json & value, int64_t min, int64_t max) {
    // unsigned values above INT64_MAX would wrap in get<int64_t>
    const bool is_int = value.is_number_unsigned() ? value.get<uint64_t>() <= (uint64_t) INT64_MAX : value.is_number_integer();
    if (!is_int || value.get<int64_t>() < min || value.get<int64_t>() > max) {
        llama_rwkv_ms_fail("%s is %s, must be an integer from %lld to %lld", what.c_str(), rwkv_ms_json_text(value).c_str(),
                (long long) min, (long long) max);
    }
    return value.get<int64_t>();
}

int64_t llama_rwkv_ms_json_int(const std::string & what, const json & obj, const char * key, int64_t min, int64_t max) {
    return rwkv_ms_json_to_int(what + ": " + key, rwkv_ms_json_at(what, obj, key), min, max);
}

double llama_rwkv_ms_json_num(const std::string & what, const json & obj, const char * key) {
    const json & value = rwkv_ms_json_at(what, obj, key);
    if (!value.is_number() || !std::isfinite(value.get<double>())) {
        llama_rwkv_ms_fail("%s: %s is %s, must be a finite number", what.c_str(), key, rwkv_ms_json_text(value).c_str());
    }
    return value.get<double>();
}

bool llama_rwkv_ms_json_bool(const std::string & what, const json & obj, const char * key) {
    const json & value = rwkv_ms_json_at(what, obj, key);
    if (!value.is_boolean()) {
        llama_rwkv_ms_fail("%s: %s is %s, must be true or false", what.c_str(), key, rwkv_ms_json_text(value).c_str());
    }
    return value.get<bool>();
}

std::string llama_rwkv_ms_json_str(const std::string & what, const json & obj, const char * key) {
    const json & value = rwkv_ms_json_at(what, obj, key);
    if (!value.is_string()) {
        llama_rwkv_ms_fail("%s: %s is %s, must be a string", what.c_str(), key, rwkv_ms_json_text(value).c_str());
    }
    return value.get<std::string>();
}

std::vector<int64_t> llama_rwkv_ms_json_ints(const std::string & what, const json & arr, int64_t min, int64_t max) {
    if (!arr.is_array()) {
        llama_rwkv_ms_fail("%s must be a list of integers", what.c_str());
    }
    std::vector<int64_t> res;
    for (const auto & value : arr) {
        res.push_back(rwkv_ms_json_to_int(what + ": an entry", value, min, max));
    }
    return res;
}

std::vector<std::string> llama_rwkv_ms_json_strs(const std::string & what, const json & arr) {
    if (!arr.is_array()) {
        llama_rwkv_ms_fail("%s must be a list of strings", what.c_str());
    }
    std::vector<std::string> res;
    for (const auto & value : arr) {
        if (!value.is_string()) {
            llama_rwkv_ms_fail("%s: an entry is %s, must be a string", what.c_str(), rwkv_ms_json_text(value).c_str());
        }
        res.push_back(value.get<std::string>());
    }
    return res;
}

//
// the allow-list of config_json
//

// read by the loader
static const std::set<std::string> rwkv_ms_config_read = {
    "rank",
    "alpha",
    "num_state_heads",
    "rwkv_ms_num_states",
    "rwkv_ms_chunk_size",
    "rwkv_ms_erase_gate",
    "couple_lambda",
    "state_update_mode",
    "rankwise_gates",
    "target_layers",
    "delta_heads",
    "memory_backend",
    "memory_readout_mode",
    "rwkv_ms_boundary_mode",
    "rwkv_ms_semantics_version",
    "rwkv_ms_state_dtype",
};

// can change the maths: only the implemented value, which is also the meaning of an absent key
static const json & rwkv_ms_config_fixed() {
    static const json res = {
        // what is read, when it is written, where the deltas go
        { "memory_write_source", "learned_hidden" },
        { "memory_write_granularity", "token" },
        { "memory_fusion_mode", "add" },
        { "memory_fusion_placement", "attention_output" },
        { "memory_fusion_residual_scale", 1.0 },
        { "memory_fusion_residual_scale_max", 1.0 },
        { "target_modules", json::array({ "self_attn" }) },
        { "delta_o_rmsnorm", false },
        { "trainable_delta_scale", false },
        { "delta_scale_init", 1.0 },
        { "delta_scale_parameterization", "alpha_over_rank" },
        { "normalize_qk", true },

        // the core
        { "rwkv_ms_write_mode", "recurrent" },
        { "rwkv_ms_read_temperature", 1.0 },
        { "rwkv_ms_read_top_k", 0 },
        { "rwkv_ms_mask_empty_slots", false },
        { "rwkv_ms_hybrid_mode", "residual" },
        { "rwkv_ms_write_address_gain", 0.0 },

        // features that are off
        { "rwkv_ms_anchor_interval", 0 },
        { "rwkv_ms_anchor_capacity", 0 },
        { "rwkv_ms_anchor_top_k", 0 },
        { "rwkv_ms_outer_ffn_layers", json::array() },
        { "num_memory_partitions", 1 },
        { "num_global_memory_partitions", 0 },
        { "memory_partition_routing", "soft" },
        { "memory_partition_basis", "shared" },
        { "memory_partition_read_mode", "softmax" },
        { "tie_memory_partition_read_write", false },
        { "slot_read_top_k", 0 },
        { "global_memory_read_top_k", 0 },
        { "synthetic_memory_slots", 1 },
        { "memory_reader_layers", json::array() },
        { "latent_memory_layers", json::array() },
    };
    return res;
}

// cannot change the maths: values at the start of training, options of training, figures of the features that are off
static const std::set<std::string> rwkv_ms_config_inert_num = {
    "beta_bias_init",
    "base_slice_ref_width",
    "online_gain",
    "memory_partition_sigmoid_gate_bias_init",
    "global_memory_gate_bias_init",
    "global_memory_read_logit_bias",
    "memory_reader_hidden_size",
    "memory_reader_residual_scale",
    "projected_kv_key_dim",
    "projected_kv_temperature",
    "projected_kv_update_cosine_threshold",
    "memory_write_proposals_per_message",
    "latent_memory_hidden_size",
    "latent_memory_residual_scale",
    "latent_memory_slots",
    "latent_memory_init_std",
    "latent_gate_init",
    "delta_o_rmsnorm_eps",
    "memory_fusion_gate_init",
    "delta_scale_max",
    "rwkv_ms_output_init_scale",
    "rwkv_ms_anchor_route_dim",
    "rwkv_ms_anchor_residual_scale",
    "rwkv_ms_anchor_null_bias_init",
    "rwkv_ms_hybrid_gain",
    "rwkv_ms_outer_ffn_gain",
};

static const std::set<std::string> rwkv_ms_config_inert_str = {
    "output_init",
    "global_memory_mode",
    "global_memory_merge_mode",
    "delta_scale_granularity",
};

static const std::set<std::string> rwkv_ms_config_inert_bool = {
    "memory_reader_read_only",
    "rwkv_ms_detach_read_scores",
};

void llama_rwkv_ms_config_check(const json & config) {
    const std::string what = "config_json";

    if (!config.is_object()) {
        llama_rwkv_ms_fail("%s: must be a JSON object", what.c_str());
    }

    const json & fixed = rwkv_ms_config_fixed();

    for (const auto & item : config.items()) {
        const std::string & key   = item.key();
        const json &        value = item.value();

        if (fixed.contains(key)) {
            const json & want = fixed.at(key);
            // 1.0 where 1 is wanted is another type, 1 where 1.0 is wanted is not
            if (value != want || (want.is_number_integer() && !value.is_number_integer())) {
                llama_rwkv_ms_fail("%s: %s is %s, but only %s is implemented: export a checkpoint without it", what.c_str(), key.c_str(),
                        rwkv_ms_json_text(value).c_str(), rwkv_ms_json_text(want).c_str());
            }
        } else if (rwkv_ms_config_inert_num.count(key)) {
            llama_rwkv_ms_json_num(what, config, key.c_str());
        } else if (rwkv_ms_config_inert_str.count(key)) {
            llama_rwkv_ms_json_str(what, config, key.c_str());
        } else if (rwkv_ms_config_inert_bool.count(key)) {
            llama_rwkv_ms_json_bool(what, config, key.c_str());
        } else if (!rwkv_ms_config_read.count(key)) {
            llama_rwkv_ms_fail("%s: unknown key %s: it may change the maths, so the sidecar needs a newer build", what.c_str(),
                    llama_rwkv_ms_quote(key).c_str());
        }
    }
}
