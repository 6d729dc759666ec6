#pragma once

// The weights of the memory as the graph uses them, owned by llama_model.

#include "llama-adapter-mem.h"
#include "llama-adapter-mem-sidecar.h"

#include "ggml-cpp.h"
#include "ggml-rwkv-ms.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

struct llama_model;
struct llama_cparams;

enum llama_adapter_mem_head {
    LLAMA_ADAPTER_MEM_HEAD_Q,
    LLAMA_ADAPTER_MEM_HEAD_K,
    LLAMA_ADAPTER_MEM_HEAD_V,
    LLAMA_ADAPTER_MEM_HEAD_O,
    LLAMA_ADAPTER_MEM_HEAD_COUNT,
};

struct llama_adapter_mem_layer {
    int32_t il = -1;

    ggml_tensor * in   = nullptr; // [n_embd, D + G (+ G)]: memory_v, beta (and lambda) projections
    ggml_tensor * core = nullptr; // [n_weight], see ggml_rwkv_ms_n_weight

    // [width, D] with alpha/R folded in, nullptr where the head is not active
    ggml_tensor * delta[LLAMA_ADAPTER_MEM_HEAD_COUNT] = {};
};

struct llama_adapter_mem {
    llama_adapter_mem(const llama_model & model, const llama_adapter_mem_sidecar & sidecar, llama_adapter_mem_mode mode);

    // nullptr if il is not a target layer
    const llama_adapter_mem_layer * get_layer(int32_t il) const;

    // throws std::runtime_error if the mode does not allow such a context
    void check_cparams(const llama_cparams & cparams) const;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

    llama_adapter_mem_info info   = {};
    ggml_rwkv_ms_params    params = {};

    std::vector<llama_adapter_mem_layer> layers;

private:
    const bool no_alloc;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};

// the buffer type for what the op of layer il works on: the layer's device if it has the op, else the CPU
ggml_backend_buffer_type_t llama_adapter_mem_buft_op(const llama_model & model, const ggml_rwkv_ms_params & params, int32_t il);

// named tensors (torch layout) -> the layouts above
using llama_adapter_mem_tensors = std::map<std::string, llama_adapter_mem_tensor>;

ggml_rwkv_ms_params llama_adapter_mem_params_from_hparams(const llama_adapter_mem_hparams & hparams);

std::vector<float> llama_adapter_mem_pack_in(const llama_adapter_mem_tensors & tensors, bool couple_lambda);
std::vector<float> llama_adapter_mem_pack_core(const llama_adapter_mem_tensors & tensors, bool couple_lambda);
std::vector<float> llama_adapter_mem_pack_delta(const llama_adapter_mem_tensors & tensors, const char * name, float scale);

// a pool of tensors in one context and, once allocated, in one buffer
ggml_context_ptr llama_adapter_mem_ctx(size_t n_tensors);
