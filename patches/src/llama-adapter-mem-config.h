#pragma once

// The JSON texts of a sidecar, and what of config_json is implemented: the file may be hostile, so size, depth and types
// are bounded here.

#include "llama-adapter-mem-gguf.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <string_view>

// the value of a key, an object or a list as asked for
nlohmann::json llama_adapter_mem_json_parse(const char * key, std::string_view text, nlohmann::json::value_t type);

// untrusted JSON for a message
std::string llama_adapter_mem_json_text(const nlohmann::json & value);

// nullptr if obj is no object or has no such member
const nlohmann::json * llama_adapter_mem_json_find(const nlohmann::json & obj, const char * key);

bool llama_adapter_mem_json_is_int(const nlohmann::json & value, int64_t min, int64_t max);

// members of config_json that must be there
int64_t     llama_adapter_mem_config_int(const nlohmann::json & config, const char * key, int64_t min, int64_t max);
double      llama_adapter_mem_config_num(const nlohmann::json & config, const char * key); // fits f32
bool        llama_adapter_mem_config_bool(const nlohmann::json & config, const char * key);
std::string llama_adapter_mem_config_str(const nlohmann::json & config, const char * key);

enum llama_adapter_mem_kind : int;

// Refuses every member of config_json that is not known of the kind of memory, and every value that changes the maths and is
// not implemented. Members that are parameters of the memory are left to the caller.
void llama_adapter_mem_config_check(const nlohmann::json & config, llama_adapter_mem_kind kind);

// Puts in what absent members mean: of an RWKV-MS nothing, all that is read must be there.
void llama_adapter_mem_config_fill(nlohmann::json & config, llama_adapter_mem_kind kind);

struct llama_adapter_mem_sidecar;

// what the file says about its tensors
struct llama_adapter_mem_manifest {
    nlohmann::json entries; // a list

    uint32_t n_tensors = 0;
    uint64_t n_numel   = 0;
    uint64_t n_bytes   = 0;
};

// fills in what the keys say: everything but the file's hash, n_embd, hparams.n_lora and the tensors
llama_adapter_mem_manifest llama_adapter_mem_sidecar_read_keys(const llama_adapter_mem_gguf & gguf, llama_adapter_mem_sidecar & res);

// fills in n_embd, hparams.n_lora and the tensors
void llama_adapter_mem_sidecar_read_tensors(const llama_adapter_mem_gguf & gguf, const llama_adapter_mem_manifest & manifest, llama_adapter_mem_sidecar & res);
