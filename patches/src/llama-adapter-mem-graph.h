#pragma once

// The memory in the compute graph of a base model: three kinds of calls in the model's graph builder.

#include "llama-adapter-mem-impl.h"

struct llm_graph_context;

class llm_graph_input_adapter_mem;

// the recurrent core on the hidden state h [n_embd, n_tokens]; state and ids as in ggml_rwkv_ms
// sets *core to the node that has to run where the state lies
ggml_tensor * llama_adapter_mem_build_core(
        ggml_context *                  ctx,
        const ggml_rwkv_ms_params &     params,
        const llama_adapter_mem_layer & layer,
        ggml_tensor *                   h,
        ggml_tensor *                   state,
        ggml_tensor *                   ids);

// the delta of a head [width, n_tokens] from the output of the core [D, n_tokens]
ggml_tensor * llama_adapter_mem_build_delta(ggml_context * ctx, const llama_adapter_mem_layer & layer, llama_adapter_mem_head head, ggml_tensor * core);

// Usage, once a graph: construct, then for each layer read() and, for each head, add().
// Without a memory, and in layers that are not target layers, read() does nothing and add() returns cur.
class llama_adapter_mem_graph {
public:
    explicit llama_adapter_mem_graph(const llm_graph_context & gctx);

    // reads and writes the memory with h [n_embd, n_tokens], the output of the layer's input norm
    void read(ggml_tensor * h, int il);

    // cur [width, n_tokens] + the delta of this head
    ggml_tensor * add(ggml_tensor * cur, llama_adapter_mem_head head) const;

private:
    const llm_graph_context & gctx;

    llm_graph_input_adapter_mem * inp = nullptr;

    // of the current layer, nullptr if it is not a target layer
    const llama_adapter_mem_layer * layer = nullptr;
    ggml_tensor *                   core  = nullptr; // [D, n_tokens]
    int                             il    = -1;
};
