#include "llama-adapter-mem-config.h"

#include "llama-adapter-mem-sidecar.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <set>
#include <vector>

using json = nlohmann::json;

static const size_t ADAPTER_MEM_JSON_MAX_SIZE  = 16u << 20; // bytes
static const int    ADAPTER_MEM_JSON_MAX_DEPTH = 8;

// brackets outside of strings: of any text, before a parser sees it
static int adapter_mem_json_depth(std::string_view text) {
    int  res       = 0;
    int  depth     = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"') {
            in_string = !in_string;
        } else if (in_string) {
            i += c == '\\' ? 1 : 0;
        } else if (c == '[' || c == '{') {
            res = std::max(res, ++depth);
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return res;
}

// a pass of its own for the first member that stands twice in its object, of which the parser lets the last one win:
// a callback of the parser would see it too, but with one the time is quadratic in the number of objects
struct adapter_mem_json_members : nlohmann::json_sax<json> {
    std::vector<std::set<std::string>> open; // names, of each open object

    bool        is_twice = false;
    std::string twice;

    bool null() override { return true; }
    bool boolean(bool) override { return true; }
    bool number_integer(number_integer_t) override { return true; }
    bool number_unsigned(number_unsigned_t) override { return true; }
    bool number_float(number_float_t, const string_t &) override { return true; }
    bool string(string_t &) override { return true; }
    bool binary(binary_t &) override { return true; }
    bool start_array(size_t) override { return true; }
    bool end_array() override { return true; }
    bool start_object(size_t) override {
        open.emplace_back();
        return true;
    }
    bool end_object() override {
        open.pop_back();
        return true;
    }
    bool parse_error(size_t, const std::string &, const json::exception &) override { return false; }

    bool key(string_t & name) override {
        if (!is_twice && !open.back().insert(name).second) {
            is_twice = true;
            twice    = name;
        }
        return true;
    }
};

json llama_adapter_mem_json_parse(const char * key, std::string_view text, json::value_t type) {
    if (text.size() > ADAPTER_MEM_JSON_MAX_SIZE) {
        llama_adapter_mem_fail("json-size", "key '%s' has %zu bytes of JSON, at most %zu are read", key, text.size(), ADAPTER_MEM_JSON_MAX_SIZE);
    }
    if (adapter_mem_json_depth(text) > ADAPTER_MEM_JSON_MAX_DEPTH) {
        llama_adapter_mem_fail("json-depth", "key '%s' has JSON that is nested deeper than %d levels", key, ADAPTER_MEM_JSON_MAX_DEPTH);
    }

    // the parser passes over a byte order mark, and takes a NUL for the end
    const bool is_odd = text.substr(0, 3) == "\xef\xbb\xbf" || text.find('\0') != std::string_view::npos;

    adapter_mem_json_members members;
    if (is_odd || !json::sax_parse(text, &members)) {
        llama_adapter_mem_fail("json-invalid", "key '%s' is not valid JSON", key);
    }
    if (members.is_twice) {
        llama_adapter_mem_fail("json-duplicate", "key '%s' has JSON with the member %s twice", key,
                llama_adapter_mem_quote(members.twice).c_str());
    }

    json res = json::parse(text);
    if (res.type() != type) {
        llama_adapter_mem_fail("json-type", "key '%s' must be a JSON %s", key, type == json::value_t::object ? "object" : "list");
    }
    return res;
}

std::string llama_adapter_mem_json_text(const json & value) {
    return llama_adapter_mem_quote(value.dump(-1, ' ', /*ensure_ascii =*/true, json::error_handler_t::replace));
}

const json * llama_adapter_mem_json_find(const json & obj, const char * key) {
    const auto it = obj.is_object() ? obj.find(key) : obj.end();
    return it == obj.end() ? nullptr : &*it;
}

bool llama_adapter_mem_json_is_int(const json & value, int64_t min, int64_t max) {
    // unsigned values above INT64_MAX would wrap in get<int64_t>
    const bool is_int = value.is_number_unsigned() ? value.get<uint64_t>() <= (uint64_t) INT64_MAX : value.is_number_integer();
    return is_int && value.get<int64_t>() >= min && value.get<int64_t>() <= max;
}

//
// members of config_json
//

static const json & adapter_mem_config_at(const json & config, const char * key) {
    const json * res = llama_adapter_mem_json_find(config, key);
    if (!res) {
        llama_adapter_mem_fail("config-missing", "config_json: %s is missing", key);
    }
    return *res;
}

int64_t llama_adapter_mem_config_int(const json & config, const char * key, int64_t min, int64_t max) {
    const json & value = adapter_mem_config_at(config, key);
    if (!llama_adapter_mem_json_is_int(value, min, max)) {
        llama_adapter_mem_fail("config-value", "config_json: %s is %s, must be an integer from %lld to %lld", key,
                llama_adapter_mem_json_text(value).c_str(), (long long) min, (long long) max);
    }
    return value.get<int64_t>();
}

double llama_adapter_mem_config_num(const json & config, const char * key) {
    const json & value = adapter_mem_config_at(config, key);
    if (!value.is_number() || !(std::fabs(value.get<double>()) <= FLT_MAX)) {
        llama_adapter_mem_fail("config-value", "config_json: %s is %s, must be a number that fits f32", key, llama_adapter_mem_json_text(value).c_str());
    }
    return value.get<double>();
}

bool llama_adapter_mem_config_bool(const json & config, const char * key) {
    const json & value = adapter_mem_config_at(config, key);
    if (!value.is_boolean()) {
        llama_adapter_mem_fail("config-value", "config_json: %s is %s, must be true or false", key, llama_adapter_mem_json_text(value).c_str());
    }
    return value.get<bool>();
}

std::string llama_adapter_mem_config_str(const json & config, const char * key) {
    const json & value = adapter_mem_config_at(config, key);
    if (!value.is_string()) {
        llama_adapter_mem_fail("config-value", "config_json: %s is %s, must be a string", key, llama_adapter_mem_json_text(value).c_str());
    }
    return value.get<std::string>();
}

//
// the allow-list of config_json [TAG_ADAPTER_MEM_CONFIG]
//

// read by the loader
static const std::set<std::string> adapter_mem_config_read = {
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

// read of a delta rule, with what a member that is not there means; not one must be there
static const json & adapter_mem_delta_defaults() {
    static const json res = {
        { "rank", 8 },
        { "alpha", 16.0 },
        { "num_state_heads", 1 },
        { "couple_lambda", true },
        { "state_update_mode", "standard" },
        { "rankwise_gates", true },
        { "target_layers", json::array() },
        { "delta_heads", { "q", "k", "v", "o" } },
        { "memory_backend", "delta_rule" },
        { "memory_readout_mode", "delta" },
        { "normalize_qk", true },
        { "delta_o_rmsnorm", false },
        { "delta_o_rmsnorm_eps", 1e-6 },
        { "trainable_delta_scale", false },
        { "delta_scale_max", 2.0 },
        { "delta_scale_granularity", "layer" },
    };
    return res;
}

// can change the maths: only the implemented value, which is also the meaning of an absent key
static const json & adapter_mem_config_fixed() {
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

// the same of a delta rule, where some of those are read, and more could be on
static const json & adapter_mem_delta_fixed() {
    static const json res = [] {
        json res = adapter_mem_config_fixed();
        for (const auto & item : adapter_mem_delta_defaults().items()) {
            res.erase(item.key());
        }
        res.erase("delta_scale_init");
        res.update({
                { "global_memory_mode", "shared_rw" },
                { "global_memory_merge_mode", "gated_residual" },
                { "global_memory_read_logit_bias", 0.0 },
                { "memory_reader_hidden_size", 1024 },
                { "memory_reader_residual_scale", 0.1 },
                { "memory_reader_read_only", true },
                { "memory_write_proposals_per_message", 2 },
                { "latent_memory_hidden_size", 1024 },
                { "latent_memory_residual_scale", 0.1 },
                { "latent_memory_slots", 4 },
        });
        return res;
    }();
    return res;
}

// cannot change the maths: values at the start of training, options of training, figures of the features that are off
static const std::set<std::string> adapter_mem_config_inert_num = {
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

static const std::set<std::string> adapter_mem_config_inert_str = {
    "output_init",
    "global_memory_mode",
    "global_memory_merge_mode",
    "delta_scale_granularity",
};

static const std::set<std::string> adapter_mem_config_inert_bool = {
    "memory_reader_read_only",
    "rwkv_ms_detach_read_scores",
};

// of a delta rule also what a file for both kinds has of the other one
static const std::set<std::string> adapter_mem_delta_inert_num = {
    "delta_scale_init",
    "rwkv_ms_num_states",
    "rwkv_ms_chunk_size",
    "rwkv_ms_erase_gate",
    "rwkv_ms_semantics_version",
};

static const std::set<std::string> adapter_mem_delta_inert_str = {
    "rwkv_ms_boundary_mode",
    "rwkv_ms_state_dtype",
};

static std::string adapter_mem_config_why(const std::string & key, const json & value) {
    if (key == "memory_write_granularity" && (value == "message_mean" || value == "sentence_mean")) {
        return "it writes once for a whole message or sentence, with the mean of its tokens, and a batch does not say which tokens those are: "
               "use an adapter that writes token by token";
    }
    return "export a checkpoint without it";
}

void llama_adapter_mem_config_check(const json & config, llama_adapter_mem_kind kind) {
    const bool   is_delta = kind == LLAMA_ADAPTER_MEM_KIND_DELTA_RULE;
    const json & fixed    = is_delta ? adapter_mem_delta_fixed() : adapter_mem_config_fixed();

    const auto is_read = [&](const std::string & key) {
        return is_delta ? adapter_mem_delta_defaults().contains(key) : adapter_mem_config_read.count(key) > 0;
    };
    for (const auto & item : config.items()) {
        const std::string & key   = item.key();
        const json &        value = item.value();

        if (fixed.contains(key)) {
            const json & want = fixed.at(key);
            // 1.0 where 1 is wanted is another type, 1 where 1.0 is wanted is not
            if (value != want || (want.is_number_integer() && !value.is_number_integer())) {
                llama_adapter_mem_fail("config-unsupported", "config_json: %s is %s, but only %s is implemented: %s", key.c_str(),
                        llama_adapter_mem_json_text(value).c_str(), llama_adapter_mem_json_text(want).c_str(), adapter_mem_config_why(key, value).c_str());
            }
        } else if (is_delta && is_read(key)) {
            continue;
        } else if (adapter_mem_config_inert_num.count(key) || (is_delta && adapter_mem_delta_inert_num.count(key))) {
            llama_adapter_mem_config_num(config, key.c_str());
        } else if (adapter_mem_config_inert_str.count(key) || (is_delta && adapter_mem_delta_inert_str.count(key))) {
            llama_adapter_mem_config_str(config, key.c_str());
        } else if (adapter_mem_config_inert_bool.count(key)) {
            llama_adapter_mem_config_bool(config, key.c_str());
        } else if (!is_read(key)) {
            llama_adapter_mem_fail("config-unknown", "config_json: unknown member %s: it may change the maths, so the sidecar needs a newer build",
                    llama_adapter_mem_quote(key).c_str());
        }
    }
}

void llama_adapter_mem_config_fill(json & config, llama_adapter_mem_kind kind) {
    if (kind == LLAMA_ADAPTER_MEM_KIND_DELTA_RULE) {
        for (const auto & item : adapter_mem_delta_defaults().items()) {
            if (!config.contains(item.key())) {
                config[item.key()] = item.value();
            }
        }
    }
}
