#include "llama-adapter-mem-sidecar-kv.h"

#include "llama-adapter-mem-sidecar.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>

static const int64_t ADAPTER_MEM_MAX_HEAD = 1 << 20;

static const char * const ADAPTER_MEM_SCHEMA   = "delta_mem_rwkv_ms_memory_gguf_sidecar.v";
static const char * const ADAPTER_MEM_SCHEMA_3 = "memory_adapter_gguf_sidecar.v";

const char * llama_adapter_mem_kind_name(llama_adapter_mem_kind kind) {
    return kind == LLAMA_ADAPTER_MEM_KIND_DELTA_RULE ? "delta_rule" : "rwkv_ms";
}

//
// keys
//

llama_adapter_mem_kvs::llama_adapter_mem_kvs(const llama_adapter_mem_gguf & gguf) : gguf(gguf) {
    is_3   = gguf.find("general.architecture")->value == "memory_adapter";
    prefix = is_3 ? "memory_adapter." : "delta_mem.";
}

void llama_adapter_mem_kvs::fail(const char * key, const std::string & text, const char * reason) const {
    llama_adapter_mem_fail(reason, "key '%s%s' %s", prefix.c_str(), key, text.c_str());
}

const llama_adapter_mem_gguf::kv * llama_adapter_mem_kvs::find(const std::string & key, gguf_type type, bool required) const {
    const auto * res = gguf.find(prefix + key);
    if (!res && required) {
        fail(key.c_str(), "is missing: export the sidecar again", "key-missing");
    }
    if (res && res->type != type) {
        fail(key.c_str(), std::string("has type ") + gguf_type_name(res->type) + ", must be " + gguf_type_name(type), "key-type");
    }
    return res;
}

std::string_view llama_adapter_mem_kvs::str(const char * key) const {
    return find(key, GGUF_TYPE_STRING, true)->value;
}

template <typename T>
static T adapter_mem_kv_num(const llama_adapter_mem_kvs & kvs, const char * key, gguf_type type) {
    T res;
    memcpy(&res, kvs.find(key, type, true)->value.data(), sizeof(res));
    return res;
}

uint32_t llama_adapter_mem_kvs::u32(const char * key) const {
    return adapter_mem_kv_num<uint32_t>(*this, key, GGUF_TYPE_UINT32);
}

uint64_t llama_adapter_mem_kvs::u64(const char * key) const {
    return adapter_mem_kv_num<uint64_t>(*this, key, GGUF_TYPE_UINT64);
}

float llama_adapter_mem_kvs::f32(const char * key) const {
    return adapter_mem_kv_num<float>(*this, key, GGUF_TYPE_FLOAT32);
}

nlohmann::json llama_adapter_mem_kvs::json(const char * key, nlohmann::json::value_t type) const {
    return llama_adapter_mem_json_parse((prefix + key).c_str(), str(key), type);
}

std::string_view llama_adapter_mem_kvs::choice(const char * key, std::initializer_list<std::string_view> allowed) const {
    const std::string_view value = str(key);
    if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) {
        std::string names;
        for (const auto & name : allowed) {
            names += (names.empty() ? "'" : "' and '") + std::string(name);
        }
        fail(key, "is " + llama_adapter_mem_quote(value) + ", but only " + names + "' " + (allowed.size() > 1 ? "are" : "is") + " implemented", "unsupported");
    }
    return value;
}

void llama_adapter_mem_kvs::expect(const char * key, const char * want) const {
    choice(key, { want });
}

//
// which keys there may be
//

static void adapter_mem_check_names(const llama_adapter_mem_kvs & kvs, llama_adapter_mem_kind kind) {
    static const std::set<std::string_view> known = {
        "schema",
        "format_version",
        "memory_readout_mode",
        "base_gguf_sha256",
        "tensor_name_format",
        "tensor_count",
        "rank",
        "num_state_heads",
        "total_numel",
        "total_bytes",
        "alpha",
        "target_layers_json",
        "delta_heads_json",
        "per_layer_attention_json",
        "config_json",
        "tensor_manifest_json",
    };
    static const std::set<std::string_view> of_rwkv_ms = {
        "rwkv_ms_semantics_version",
        "rwkv_ms_state_dtype",
        "rwkv_ms_boundary_mode",
        "rwkv_ms_num_states",
        "rwkv_ms_chunk_size",
    };
    static const std::set<std::string_view> of_3 = {
        "kind",
        "base_architecture",
        "source_prefix",
        "qk_row_order",
        "rope_head_dim",
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

    for (const auto & kv : kvs.gguf.kvs) {
        if (kv.name.rfind("general.", 0) == 0) {
            continue;
        }
        const std::string_view name = kv.name.rfind(kvs.prefix, 0) == 0 ? kv.name.substr(kvs.prefix.size()) : "";
        if (informative.count(name) || (kvs.is_3 && name == "omitted_tensors_json")) {
            kvs.find(std::string(name), GGUF_TYPE_STRING, true);
            continue;
        }
        const bool is_known = known.count(name) || (kind == LLAMA_ADAPTER_MEM_KIND_RWKV_MS && of_rwkv_ms.count(name)) ||
                (kvs.is_3 ? of_3.count(name) > 0 : name == "memory_backend");
        if (!is_known) {
            llama_adapter_mem_fail("key-unknown", "unknown key %s: it may change the maths, so the sidecar needs a newer build",
                    llama_adapter_mem_quote(kv.name).c_str());
        }
    }
}

//
// what a file is
//

static uint32_t adapter_mem_read_format(const llama_adapter_mem_kvs & kvs) {
    // before anything else: a later format has other keys
    const uint32_t res = kvs.u32("format_version");
    if (kvs.is_3 ? res != 3 : res != 1 && res != 2) {
        kvs.fail("format_version", "is " + std::to_string(res) + ", this build reads " + (kvs.is_3 ? "3" : "1 and 2") + " there", "format-version");
    }
    const std::string      want   = (kvs.is_3 ? ADAPTER_MEM_SCHEMA_3 : ADAPTER_MEM_SCHEMA) + std::to_string(res);
    const std::string_view schema = kvs.str("schema");
    if (schema != want) {
        kvs.fail("schema", "is " + llama_adapter_mem_quote(schema) + ", must be '" + want + "'", "schema");
    }
    return res;
}

static uint32_t adapter_mem_read_semantics(const llama_adapter_mem_kvs & kvs, uint32_t format) {
    uint32_t res = 1;
    if (kvs.find("rwkv_ms_semantics_version", GGUF_TYPE_UINT32, format >= 2)) {
        res = kvs.u32("rwkv_ms_semantics_version");
    }
    if (res < 1 || res > std::min(format, 2u)) {
        kvs.fail("rwkv_ms_semantics_version",
                "is " + std::to_string(res) + ", in format " + std::to_string(format) + " it must be " + (format == 1 ? "1" : "1 or 2"), "semantics-version");
    }
    if (kvs.find("rwkv_ms_state_dtype", GGUF_TYPE_STRING, false)) {
        kvs.expect("rwkv_ms_state_dtype", "f32");
    }
    return res;
}

static std::string adapter_mem_read_base_arch(const llama_adapter_mem_kvs & kvs) {
    const std::string res(kvs.str("base_architecture"));
    const auto        is_ok = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
    if (res.empty() || res.size() > 63 || !is_ok(res[0]) ||
            !std::all_of(res.begin(), res.end(), [&](char c) { return is_ok(c) || c == '.' || c == '_' || c == '-'; })) {
        kvs.fail("base_architecture", "is " + llama_adapter_mem_quote(res) + ", must be a name as llama.cpp gives it");
    }
    return res;
}

static uint32_t adapter_mem_read_rope_head_dim(const llama_adapter_mem_kvs & kvs) {
    if (kvs.choice("qk_row_order", { "hf", "norm" }) == "hf") {
        if (kvs.gguf.find(kvs.prefix + "rope_head_dim")) {
            kvs.fail("rope_head_dim", "is there, but qk_row_order is hf: no rows are permuted");
        }
        return 0;
    }
    const uint32_t res = kvs.u32("rope_head_dim");
    if (res % 2 != 0 || res < 2 || res > ADAPTER_MEM_MAX_HEAD) {
        kvs.fail("rope_head_dim", "is " + std::to_string(res) + ", must be an even number from 2 to " + std::to_string(ADAPTER_MEM_MAX_HEAD));
    }
    return res;
}

static std::string adapter_mem_read_base_sha256(const llama_adapter_mem_kvs & kvs) {
    std::string res(kvs.str("base_gguf_sha256"));
    for (char & c : res) {
        c = (char) tolower((unsigned char) c);
    }
    if (res.size() != 64 || res.find_first_not_of("0123456789abcdef") != std::string::npos) {
        kvs.fail("base_gguf_sha256", "is " + llama_adapter_mem_quote(res) + ", must be 64 hex digits");
    }
    return res;
}

void llama_adapter_mem_sidecar_read_header(const llama_adapter_mem_kvs & kvs, llama_adapter_mem_sidecar & res) {
    res.format = adapter_mem_read_format(kvs);
    if (kvs.is_3 && kvs.choice("kind", { "rwkv_ms", "delta_rule" }) == "delta_rule") {
        res.kind = LLAMA_ADAPTER_MEM_KIND_DELTA_RULE;
    }
    if (res.kind == LLAMA_ADAPTER_MEM_KIND_RWKV_MS) {
        res.hparams.semantics = adapter_mem_read_semantics(kvs, res.format);
    }
    adapter_mem_check_names(kvs, res.kind);

    res.base_arch     = "gemma4";
    res.source_prefix = "model.language_model.layers.";
    if (kvs.is_3) {
        res.base_arch     = adapter_mem_read_base_arch(kvs);
        res.source_prefix = kvs.choice("source_prefix", { "model.layers.", "model.language_model.layers." });
        res.rope_head_dim = adapter_mem_read_rope_head_dim(kvs);
    }
    kvs.expect("tensor_name_format", "compact_with_source_name_manifest");
    res.base_sha256 = adapter_mem_read_base_sha256(kvs);
}
