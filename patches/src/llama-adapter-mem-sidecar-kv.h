#pragma once

// The keys of a sidecar by name, each checked for being there and for its type.

#include "llama-adapter-mem-config.h"

#include <initializer_list>

struct llama_adapter_mem_sidecar;

struct llama_adapter_mem_kvs {
    const llama_adapter_mem_gguf & gguf;

    bool        is_3;   // version 3 of the format
    std::string prefix; // what all keys but general.* begin with

    explicit llama_adapter_mem_kvs(const llama_adapter_mem_gguf & gguf);

    // nullptr if there is no such key and none is required; key is without the prefix, as everywhere below
    const llama_adapter_mem_gguf::kv * find(const std::string & key, gguf_type type, bool required) const;

    std::string_view str(const char * key) const;
    uint32_t         u32(const char * key) const;
    uint64_t         u64(const char * key) const;
    float            f32(const char * key) const;
    nlohmann::json   json(const char * key, nlohmann::json::value_t type) const;

    // one of a few strings
    std::string_view choice(const char * key, std::initializer_list<std::string_view> allowed) const;
    void             expect(const char * key, const char * want) const;

    // throws for a value that is impossible, or for another reason; text follows the name of the key
    [[noreturn]] void fail(const char * key, const std::string & text, const char * reason = "key-value") const;
};

// fills in what comes before config_json: format, kind, hparams.semantics, the base and the order of rows
void llama_adapter_mem_sidecar_read_header(const llama_adapter_mem_kvs & kvs, llama_adapter_mem_sidecar & res);
