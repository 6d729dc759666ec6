#include "llama-adapter-mem-graph.h"

#include "llama-adapter-mem-impl.h"
#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-memory-adapter.h"

#include <stdexcept>

llama_adapter_mem_graph * llama_adapter_mem_graph::init(const llm_graph_params & params) {
    if (!params.adapter_mem) {
        return nullptr;
    }
    return static_cast<llama_adapter_mem_graph *>(params.res->add_input(llm_graph_input_ptr(new llama_adapter_mem_graph(params))));
}

llama_adapter_mem_graph::llama_adapter_mem_graph(const llm_graph_params & params) :
    mem(params.adapter_mem), layers(mem->get_adapter().layers.size()) {
    ggml_context * ctx = params.res->get_ctx();

    ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, params.ubatch.n_tokens);
    ggml_set_input(ids);
    ggml_set_name(ids, "adapter_mem_ids");

    if (mem->has_scale()) {
        scale = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, params.ubatch.n_tokens);
        ggml_set_input(scale);
        ggml_set_name(scale, "adapter_mem_scale");
    }
}

// some of the tokens, chosen where their outputs are; not the embeddings of all, which are rows of a weight
static bool adapter_mem_is_rows(const ggml_tensor * t) {
    while (t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_CONT || t->op == GGML_OP_MUL) {
        t = t->src[0];
    }
    return t->op == GGML_OP_GET_ROWS && t->src[0]->op != GGML_OP_NONE;
}

[[noreturn]] static void adapter_mem_fail(const llm_graph_context & gctx, const llama_adapter_mem & adapter, const std::string & name, const char * what) {
    throw std::runtime_error(format("sidecar '%s': [base-graph] the graph of architecture '%s' %s %s: a memory cannot be added to it",
            adapter.path.c_str(), llm_arch_name(gctx.arch), what, name.c_str()));
}

ggml_tensor * llama_adapter_mem_graph::add(const llm_graph_context & gctx, ggml_tensor * w, ggml_tensor * cur, ggml_tensor * res) {
    const auto & adapter = mem->get_adapter();
    const auto * weight  = adapter.get_weight(w);
    if (!weight) {
        return res;
    }
    n_met[w]++;

    auto & layer = layers[weight->i_layer];

    if (weight->is_in && !layer.core) {
        layer.h = cur;
        if (ggml_nrows(cur) != gctx.n_tokens) {
            adapter_mem_fail(gctx, adapter, weight->name, "has not all tokens at");
        }

        ggml_tensor * state = mem->get_state(weight->i_layer);

        const int il = adapter.layers[weight->i_layer].il;

        layer.core = adapter.core.build(gctx.ctx0, adapter.layers[weight->i_layer], cur, state, ids);
        gctx.cb(layer.core, "adapter_mem_core", il);

        // run the op where its state lies, which is where it is supported: see llama_adapter_mem_buft_op
        for (int i = 0; i < ggml_backend_sched_get_n_backends(gctx.sched); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(gctx.sched, i);

            if (ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(state->buffer)) && ggml_backend_supports_op(backend, layer.core)) {
                ggml_backend_sched_set_tensor_backend(gctx.sched, layer.core, backend);
                break;
            }
        }
    }
    if (weight->is_in && layer.h != cur) {
        adapter_mem_fail(gctx, adapter, weight->name, "has another hidden state at");
    }
    if (!weight->delta) {
        return res;
    }
    if (!layer.core || res->ne[1] != gctx.n_tokens || adapter_mem_is_rows(cur)) {
        adapter_mem_fail(gctx, adapter, weight->name, "has not all tokens at");
    }

    if (scale && !layer.scaled) {
        layer.scaled = ggml_mul(gctx.ctx0, layer.core, scale);
    }

    ggml_tensor * core  = scale && !weight->norm ? layer.scaled : layer.core;
    ggml_tensor * delta = llama_adapter_mem_build_delta(gctx.ctx0, weight->delta, core); // [width, n_tokens]
    if (weight->norm) {
        // which would take a factor out
        delta = ggml_mul(gctx.ctx0, ggml_rms_norm(gctx.ctx0, delta, weight->norm_eps), weight->norm);
        delta = scale ? ggml_mul(gctx.ctx0, delta, scale) : delta;
    }
    gctx.cb(delta, "adapter_mem_delta", adapter.layers[weight->i_layer].il);

    return ggml_add(gctx.ctx0, res, delta);
}

void llama_adapter_mem_graph::check(const llm_graph_context & gctx) const {
    const auto & adapter = mem->get_adapter();

    for (const auto & [w, weight] : adapter.weights) {
        const auto it = n_met.find(w);
        if (weight.delta && (it == n_met.end() || it->second != 1)) {
            adapter_mem_fail(gctx, adapter, weight.name, it == n_met.end() ? "does not multiply, in a place that is known," : "multiplies more than once");
        }
    }
}

void llama_adapter_mem_graph::set_input(const llama_ubatch * ubatch) {
    if (!ids->buffer) {
        return; // no head is active
    }

    // the op writes the state in place: the scheduler must not have replaced it with a copy on another backend
    for (size_t i = 0; i < layers.size(); ++i) {
        GGML_ASSERT(!layers[i].core || layers[i].core->src[1] == mem->get_state(i));
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

bool llama_adapter_mem_graph::can_reuse(const llm_graph_params & params) {
    return mem == params.adapter_mem && ids->ne[1] == params.ubatch.n_tokens && mem->has_scale() == (scale != nullptr);
}
