#pragma once

// The memory in one compute graph of a base model. Every projection of a model goes through build_lora_mm, which asks here
// whether something is to be added to the product: the first of a target layer's q, k, v projections shows the hidden
// state that the memory reads and writes with.

#include "llama-graph.h"

#include <unordered_map>
#include <vector>

class llama_memory_adapter;

class llama_adapter_mem_graph : public llm_graph_input_i {
public:
    // makes it an input of the graph, which owns it; nullptr if params have no memory
    static llama_adapter_mem_graph * init(const llm_graph_params & params);

    // res [width, n_tokens] = w @ cur, and the memory's delta of it
    ggml_tensor * add(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res);

    // throws std::runtime_error if not all deltas came into the graph, once each
    void check(const llm_graph_context & gctx) const;

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

private:
    explicit llama_adapter_mem_graph(const llm_graph_params & params);

    const llama_memory_adapter * mem;

    ggml_tensor * ids   = nullptr; // I32 [2, n_tokens]: the state cell and the mask of each token
    ggml_tensor * scale = nullptr; // F32 [1, n_tokens], nullptr if it is 1 for all sequences

    struct layer {
        ggml_tensor * h      = nullptr; // [n_embd, n_tokens], what the memory reads and writes with
        ggml_tensor * core   = nullptr; // [D, n_tokens], the op
        ggml_tensor * scaled = nullptr; // times scale
    };

    std::vector<layer> layers; // of the sidecar

    std::unordered_map<const ggml_tensor *, int> n_met; // how often a weight of the base came by
};
