#pragma once

// The JSON texts of a sidecar: they come from a file that may be hostile, so size, depth and types are bounded here.
// All functions throw std::runtime_error with one line.

#include "llama-impl.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <vector>

struct gguf_context;
struct llama_rwkv_ms_sidecar;

LLAMA_ATTRIBUTE_FORMAT(1, 2)
[[noreturn]] void llama_rwkv_ms_fail(const char * format, ...);

// untrusted text for a message: printable, short, in quotes
std::string llama_rwkv_ms_quote(const std::string & text);

// what is the name of the text in messages
nlohmann::json llama_rwkv_ms_json_parse(const std::string & what, const std::string & text);

// members of an object, with their type and range checked; what names the object
int64_t                  llama_rwkv_ms_json_int(const std::string & what, const nlohmann::json & obj, const char * key, int64_t min, int64_t max);
double                   llama_rwkv_ms_json_num(const std::string & what, const nlohmann::json & obj, const char * key);
bool                     llama_rwkv_ms_json_bool(const std::string & what, const nlohmann::json & obj, const char * key);
std::string              llama_rwkv_ms_json_str(const std::string & what, const nlohmann::json & obj, const char * key);
std::vector<int64_t>     llama_rwkv_ms_json_ints(const std::string & what, const nlohmann::json & arr, int64_t min, int64_t max);
std::vector<std::string> llama_rwkv_ms_json_strs(const std::string & what, const nlohmann::json & arr);

// Refuses every key of config_json that is not known, and every value that changes the maths and is not implemented.
// Keys that are parameters of the memory are left to the caller.
void llama_rwkv_ms_config_check(const nlohmann::json & config);

// what the file says about its tensors
struct llama_rwkv_ms_manifest {
    nlohmann::json entries;

    uint32_t n_tensors = 0;
    uint64_t n_numel   = 0;
    uint64_t n_bytes   = 0;
};

// fills in what the key-value pairs say: everything but the file's hash, n_embd, hparams.n_lora and the tensors
llama_rwkv_ms_manifest llama_rwkv_ms_sidecar_read_keys(const gguf_context * gguf, llama_rwkv_ms_sidecar & res);

// fills in the rest; file is the whole file
void llama_rwkv_ms_sidecar_read_tensors(
        const gguf_context *           gguf,
        const std::vector<uint8_t> &   file,
        const llama_rwkv_ms_manifest & manifest,
        llama_rwkv_ms_sidecar &        res);
