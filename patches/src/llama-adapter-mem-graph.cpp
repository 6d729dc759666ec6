#include "llama-adapter-mem-graph.h"

#include "llama-graph.h"
#include "llama-memory-adapter.h"

//
// llm_graph_input_adapter_mem
//

// the state cell and the mask of each token
class llm_graph_input_adapter_mem : public llm_graph_input_i {
public:
    llm_graph_input_adapter_mem(const llama_memory_adapter * mem) : mem(mem) {}

    void set_input(const llama_ubatch * ubatch) override {
        // the op writes the state in place: the scheduler must not have replaced it with a copy on another backend
        for (const auto & node : nodes) {
            GGML_ASSERT(node.first->src[1] == node.second);
        }

        std::vector<int32_t> data(2 * ubatch->n_tokens);
        std::vector<float>   factor(ubatch->n_tokens);

        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            const auto & seq = mem->get_seq_params(ubatch->seq_id[i][0]);

            data[2 * i + 0] = ubatch->seq_id[i][0];
            data[2 * i + 1] = seq.frozen ? GGML_RWKV_MS_MASK_FROZEN : GGML_RWKV_MS_MASK_LIVE;
            factor[i]       = seq.scale;
        }

        ggml_backend_tensor_set(ids, data.data(), 0, ggml_nbytes(ids));
        if (scale) {
            ggml_backend_tensor_set(scale, factor.data(), 0, ggml_nbytes(scale));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        return mem == params.adapter_mem && ids->ne[1] == params.ubatch.n_tokens && mem->has_scale() == (scale != nullptr);
    }

    const llama_memory_adapter * mem;

    ggml_tensor * ids   = nullptr; // I32 [2, n_tokens]
    ggml_tensor * scale = nullptr; // F32 [1, n_tokens], nullptr if it is 1 for all sequences

    std::vector<std::pair<ggml_tensor *, ggml_tensor *>> nodes; // the op and its state
};

//
// llama_adapter_mem_graph
//

ggml_tensor * llama_adapter_mem_build_core(
        ggml_context *                  ctx,
        const ggml_rwkv_ms_params &     params,
        const llama_adapter_mem_layer & layer,
        ggml_tensor *                   h,
        ggml_tensor *                   state,
        ggml_tensor *                   ids) {
    ggml_tensor * x = ggml_mul_mat(ctx, layer.in, h); // [D + G (+ G), n_tokens]
    ggml_prec_set_src(x, GGML_PREC_F32, 1);           // whatever the number of tokens

    return ggml_rwkv_ms(ctx, x, layer.core, state, ids, &params); // [D, n_tokens]
}

ggml_tensor * llama_adapter_mem_build_delta(ggml_context * ctx, const llama_adapter_mem_layer & layer, llama_adapter_mem_head head, ggml_tensor * core) {
    // an outer product, because D is too short for the dot products of a matrix multiplication to be fast
    return ggml_out_prod(ctx, layer.delta[head], ggml_transpose(ctx, core));
}

llama_adapter_mem_graph::llama_adapter_mem_graph(const llm_graph_context & gctx) : gctx(gctx) {
    if (!gctx.adapter_mem) {
        return;
    }

    auto res = std::make_unique<llm_graph_input_adapter_mem>(gctx.adapter_mem);

    res->ids = ggml_new_tensor_2d(gctx.ctx0, GGML_TYPE_I32, 2, gctx.n_tokens);
    ggml_set_input(res->ids);
    ggml_set_name(res->ids, "rwkv_ms_ids");

    if (gctx.adapter_mem->has_scale()) {
        res->scale = ggml_new_tensor_2d(gctx.ctx0, GGML_TYPE_F32, 1, gctx.n_tokens);
        ggml_set_input(res->scale);
        ggml_set_name(res->scale, "rwkv_ms_scale");
    }

    inp = static_cast<llm_graph_input_adapter_mem *>(gctx.res->add_input(std::move(res)));
}

void llama_adapter_mem_graph::read(ggml_tensor * h, int il) {
    layer = inp ? inp->mem->get_weights().get_layer(il) : nullptr;
    if (!layer) {
        return;
    }

    const auto & weights = inp->mem->get_weights();

    ggml_tensor * state = inp->mem->get_state(layer - weights.layers.data());

    core = llama_adapter_mem_build_core(gctx.ctx0, weights.params, *layer, h, state, inp->ids);
    gctx.cb(core, "rwkv_ms_core", il);

    inp->nodes.emplace_back(core, state);

    // run the op where its state lies, which is where it is supported: see llama_adapter_mem_buft_op
    for (int i = 0; i < ggml_backend_sched_get_n_backends(gctx.sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(gctx.sched, i);

        if (ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(state->buffer)) && ggml_backend_supports_op(backend, core)) {
            ggml_backend_sched_set_tensor_backend(gctx.sched, core, backend);
            break;
        }
    }

    if (inp->scale) {
        core = ggml_mul(gctx.ctx0, core, inp->scale);
    }

    this->il = il;
}

ggml_tensor * llama_adapter_mem_graph::add(ggml_tensor * cur, llama_adapter_mem_head head) const {
    if (!layer || !layer->delta[head]) {
        return cur;
    }

    ggml_tensor * delta = llama_adapter_mem_build_delta(gctx.ctx0, *layer, head, core); // [width, n_tokens]
    gctx.cb(delta, "rwkv_ms_delta", il);

    return ggml_add(gctx.ctx0, cur, delta);
}
