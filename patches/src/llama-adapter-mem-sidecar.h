#pragma once

// A sidecar file, read and checked as far as that goes without its base model.

#include <atomic>
#include <cstdint>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_model;

enum llama_adapter_mem_kind : int {
    LLAMA_ADAPTER_MEM_KIND_RWKV_MS,
    LLAMA_ADAPTER_MEM_KIND_DELTA_RULE,
};

// the name of a kind in files, "rwkv_ms" or "delta_rule"
const char * llama_adapter_mem_kind_name(llama_adapter_mem_kind kind);

struct llama_adapter_mem_hparams {
    uint32_t rank    = 0; // R, the size of a state head
    uint32_t n_head  = 0; // N
    uint32_t n_state = 1; // M, states per head
    uint32_t n_gate  = 0; // G: D if the gates are rank-wise, else N

    float alpha = 0.0f;     // the deltas are scaled by alpha / rank

    int  update_mode   = 0; // 0 standard, 1 lambda_outside, 2 no_lambda
    bool couple_lambda = true;

    // RWKV-MS
    uint32_t n_chunk    = 0; // C, tokens; of a delta rule 2^24, where its counter wraps
    uint32_t n_lora     = 0; // L
    uint32_t semantics  = 0; // 1 or 2, 0 of another kind
    float    erase_gate = 1.0f;

    // delta rule
    bool     normalize_qk = true;  // q and k: l2 norm of tanh, each state head by itself
    bool     o_norm       = false; // RMS norm over the delta of o, after its scaling; weight: tensor delta_o_norm
    float    o_norm_eps   = 0.0f;
    uint32_t n_scale      = 0;     // entries of tensor delta_scale: 0 (deltas are not scaled further), 1, or 4: q k v o
    float    scale_max    = 0.0f;  // the factor is scale_max * sigmoid(delta_scale)

    uint32_t n_rank_total() const { return rank * n_head; } // D
};

struct llama_adapter_mem_tensor {
    std::vector<int64_t> shape; // torch order
    std::vector<float>   data;
};

struct llama_adapter_mem_sidecar {
    struct layer {
        int32_t il       = -1;
        bool    is_swa   = false;
        int64_t width[4] = {}; // q k v o, 0 where the layer has no such projection

        // by short name without "blk.N.", only those that the maths uses
        std::map<std::string, llama_adapter_mem_tensor> tensors;
    };

    std::string path;
    std::string path_base;   // empty: the base is not checked

    // lower-case hex
    std::string sha256;      // of the sidecar file
    std::string base_sha256; // of the base GGUF that it is bound to
    std::string fingerprint; // SHA-256 of the two digests one after the other: what a state belongs to

    llama_adapter_mem_kind kind = LLAMA_ADAPTER_MEM_KIND_RWKV_MS;

    uint32_t    format = 0;       // version of the format
    std::string base_arch;        // name of the base's architecture, as llm_arch_name has it
    std::string source_prefix;    // of the tensors in the checkpoint
    uint32_t    rope_head_dim = 0; // rows of delta_q and delta_k are permuted in heads of this width; 0: as in the checkpoint
    bool        all_layers    = false; // the layers below are all that the base has to have

    int64_t n_embd  = 0;     // H
    bool    head[4] = {};    // q k v o: active deltas

    llama_adapter_mem_hparams hparams;

    std::vector<layer> layers;

    llama_adapter_mem_sidecar() = default;
    ~llama_adapter_mem_sidecar(); // does not wait for the whole base to be hashed

    llama_adapter_mem_sidecar(const llama_adapter_mem_sidecar &)             = delete;
    llama_adapter_mem_sidecar & operator=(const llama_adapter_mem_sidecar &) = delete;

    // hashes the base in a thread of its own, so that it overlaps with loading the weights
    void base_hash_start(const char * path);

    // waits for the hash and throws if it is not the bound one; does nothing without a base_hash_start
    void base_hash_check() const;

private:
    std::atomic<bool>               base_hash_cancel{ false };
    std::shared_future<std::string> base_hash;
};

// throws std::runtime_error with one line: the file, the reason as in docs/sidecar.md, and what is wrong in it
std::unique_ptr<llama_adapter_mem_sidecar> llama_adapter_mem_sidecar_load(const char * path);

// the same for a file in memory; path is its name
std::unique_ptr<llama_adapter_mem_sidecar> llama_adapter_mem_sidecar_read(const char * path, const uint8_t * data, size_t size);

// the part that needs the base (its tensors may be unallocated), throws in the same way
void llama_adapter_mem_sidecar_check_model(const llama_adapter_mem_sidecar & sidecar, const llama_model & model);
