#pragma once

// The weights of the memory as the graph uses them, owned by llama_model.

#include "llama-adapter-mem.h"
#include "llama-adapter-mem-sidecar.h"

#include "ggml-cpp.h"
#include "ggml-rwkv-ms.h"

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct llama_model;
struct llama_cparams;
struct llama_memory_i;

enum llama_adapter_mem_head {
    LLAMA_ADAPTER_MEM_HEAD_Q,
    LLAMA_ADAPTER_MEM_HEAD_K,
    LLAMA_ADAPTER_MEM_HEAD_V,
    LLAMA_ADAPTER_MEM_HEAD_O,
    LLAMA_ADAPTER_MEM_HEAD_COUNT,
};

struct llama_adapter_mem_layer {
    int32_t il = -1;

    ggml_tensor * in   = nullptr; // [n_embd, n_in]: what is projected of the hidden state, see ggml_rwkv_ms
    ggml_tensor * core = nullptr; // [n_weight]: see ggml_rwkv_ms_n_weight
};

// what is added to the product of a weight of the base
struct llama_adapter_mem_weight {
    size_t i_layer = 0;     // in llama_adapter_mem::layers
    bool   is_in   = false; // the weight is multiplied by the hidden state that the layer's memory reads

    ggml_tensor * delta    = nullptr; // [width, D] with all factors folded in, nullptr: nothing is added
    ggml_tensor * norm     = nullptr; // [width]: weight of an RMS norm of it, nullptr: none
    float         norm_eps = 0.0f;

    std::string name; // of the base's weight
};

// named tensors (torch layout)
using llama_adapter_mem_tensors = std::map<std::string, llama_adapter_mem_tensor>;

// What differs from kind to kind, a file each: the parameters of the op, which all kinds have, and the tensors of the sidecar
// that it takes.
struct llama_adapter_mem_core {
    explicit llama_adapter_mem_core(const llama_adapter_mem_hparams & hparams);

    // one after the other with the tensors of the gates: [n_in][n_embd] and [n_weight]
    std::vector<float> pack_in(const llama_adapter_mem_tensors & tensors) const;
    std::vector<float> pack_core(const llama_adapter_mem_tensors & tensors) const;

    // the op on the hidden state h [n_embd, n_tokens]; state and ids as in ggml_rwkv_ms
    ggml_tensor * build(ggml_context * ctx, const llama_adapter_mem_layer & layer, ggml_tensor * h, ggml_tensor * state, ggml_tensor * ids) const;

    int64_t n_cell() const { return ggml_rwkv_ms_n_cell(&params); }

    ggml_rwkv_ms_params params = {};

    std::vector<const char *> names_in;         // projections of the hidden state, before those of the gates
    std::vector<const char *> names;            // weights, after those of the gates
    std::vector<const char *> names_transposed; // after those, from torch's [out, in] to [in][out]
};

llama_adapter_mem_core llama_adapter_mem_core_rwkv_ms(const llama_adapter_mem_hparams & hparams);
llama_adapter_mem_core llama_adapter_mem_core_delta_rule(const llama_adapter_mem_hparams & hparams);

struct llama_adapter_mem {
    llama_adapter_mem(const llama_model & model, const llama_adapter_mem_sidecar & sidecar, llama_adapter_mem_mode mode);

    // nullptr if nothing of the memory is about w
    const llama_adapter_mem_weight * get_weight(const ggml_tensor * w) const;

    // The memory of a context of the model, with the one that its architecture has inside, which it takes.
    // throws std::runtime_error if the mode does not allow such a context
    llama_memory_i * wrap(const llama_model & model, llama_memory_i * inner, const llama_cparams & cparams) const;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

    llama_adapter_mem_info info = {};
    std::string            path; // of the sidecar, for messages

    llama_adapter_mem_core core;

    std::vector<llama_adapter_mem_layer> layers;

    std::unordered_map<const ggml_tensor *, llama_adapter_mem_weight> weights;

private:
    const bool no_alloc;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};

// the buffer type for what the op of layer il works on: the layer's device if it has the op, else the CPU
ggml_backend_buffer_type_t llama_adapter_mem_buft_op(const llama_model & model, const ggml_rwkv_ms_params & params, int32_t il);

// a tensor [width, D] -> [D][width], times factor
std::vector<float> llama_adapter_mem_pack_delta(const llama_adapter_mem_tensors & tensors, const char * name, float factor);

// the delta of a head [width, n_tokens]; delta [width, D], core [D, n_tokens]
ggml_tensor * llama_adapter_mem_build_delta(ggml_context * ctx, ggml_tensor * delta, ggml_tensor * core);

// a pool of tensors in one context and, once allocated, in one buffer
ggml_context_ptr llama_adapter_mem_ctx(size_t n_tensors);
