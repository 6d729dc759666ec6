#include "llama-adapter-mem-impl.h"
#include "llama-impl.h"

#include "ggml-backend.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

// One layer of memory on host arrays. The graph is the model's (llama_adapter_mem_core::build), so that what is compared with
// reference vectors is what runs.

static int64_t llama_adapter_mem_dim(const llama_adapter_mem_tensors & tensors, const char * name, size_t i) {
    const auto it = tensors.find(name);
    if (it == tensors.end()) {
        throw std::runtime_error(format("tensor '%s' is missing", name));
    }
    return it->second.shape.at(i);
}

static void llama_adapter_mem_check_shape(const llama_adapter_mem_tensors & tensors, const char * name, int64_t ne0, int64_t ne1) {
    if (llama_adapter_mem_dim(tensors, name, 0) != ne0 || llama_adapter_mem_dim(tensors, name, 1) != ne1) {
        throw std::runtime_error(format("tensor '%s' has shape [%lld, %lld], expected [%lld, %lld]", name,
                (long long) llama_adapter_mem_dim(tensors, name, 0), (long long) llama_adapter_mem_dim(tensors, name, 1),
                (long long) ne0, (long long) ne1));
    }
}

static void llama_adapter_mem_eval_impl(const llama_adapter_mem_eval_params & p) {
    const int64_t D = p.n_head * p.rank;
    const int64_t T = p.n_tokens;

    if (D <= 0 || T <= 0 || p.n_state == 0 || p.n_chunk == 0 || (int64_t) p.n_state * p.n_chunk > (1 << 24)) {
        throw std::runtime_error("rank, heads, states, chunk and tokens have to be positive, states*chunk at most 2^24");
    }
    if (!p.S || !p.prev || !p.n_past || *p.n_past < 0) {
        throw std::runtime_error("S, prev and n_past >= 0 have to be given");
    }

    const bool from_features = p.features != nullptr;

    llama_adapter_mem_tensors tensors;
    for (uint32_t i = 0; i < p.n_tensors && !from_features; ++i) {
        llama_adapter_mem_tensor tensor;
        tensor.shape = { p.ne[2 * i], p.ne[2 * i + 1] };
        tensor.data.assign(p.data[i], p.data[i] + tensor.shape[0] * tensor.shape[1]);
        tensors.emplace(p.names[i], std::move(tensor));
    }

    llama_adapter_mem_hparams hparams;
    hparams.rank          = p.rank;
    hparams.n_head        = p.n_head;
    hparams.n_state       = p.n_state;
    hparams.n_chunk       = p.n_chunk;
    hparams.semantics     = p.semantics;
    hparams.update_mode   = p.update_mode;
    hparams.couple_lambda = p.couple_lambda;
    hparams.erase_gate    = p.erase_gate;
    hparams.n_gate        = from_features ? D : llama_adapter_mem_dim(tensors, "beta", 0);
    hparams.n_lora        = from_features ? 0 : llama_adapter_mem_dim(tensors, "rwkv.w1", 1);

    llama_adapter_mem_core kind   = llama_adapter_mem_core_rwkv_ms(hparams);
    ggml_rwkv_ms_params &  params = kind.params;

    params.trace = p.trace != nullptr;

    const int64_t G = params.n_gate;
    const int64_t L = params.n_lora;

    if (!from_features) {
        if (G != D && G != p.n_head) {
            throw std::runtime_error(format("tensor 'beta' has %lld rows, expected %lld or %u", (long long) G, (long long) D, p.n_head));
        }
        llama_adapter_mem_check_shape(tensors, "mem_v", D, p.n_embd);
        llama_adapter_mem_check_shape(tensors, "beta", G, p.n_embd);
        llama_adapter_mem_check_shape(tensors, "beta_b", G, 1);
        if (!p.couple_lambda) {
            llama_adapter_mem_check_shape(tensors, "lambda", G, p.n_embd);
            llama_adapter_mem_check_shape(tensors, "lambda_b", G, 1);
        }
        for (const char * x : { "x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight" }) {
            llama_adapter_mem_check_shape(tensors, (std::string("rwkv.") + x).c_str(), D, 1);
        }
        for (const char * x : { "w", "a", "g" }) {
            llama_adapter_mem_check_shape(tensors, (std::string("rwkv.") + x + "1").c_str(), D, L);
            llama_adapter_mem_check_shape(tensors, (std::string("rwkv.") + x + "2").c_str(), L, D);
        }
        for (const char * x : { "receptance", "key", "value", "output" }) {
            llama_adapter_mem_check_shape(tensors, (std::string("rwkv.") + x + ".weight").c_str(), D, D);
        }
    }

    const char * head_name[LLAMA_ADAPTER_MEM_HEAD_COUNT] = { "delta_q", "delta_k", "delta_v", "delta_o" };

    ggml_context_ptr ctx = llama_adapter_mem_ctx(32 + GGML_DEFAULT_GRAPH_SIZE); // the graph lies in the context, too

    ggml_tensor * x     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, from_features ? 9 * D : (int64_t) p.n_embd, T);
    ggml_tensor * ids   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, T);
    ggml_tensor * state = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_cell(&params), 1);

    llama_adapter_mem_layer layer;

    ggml_tensor * core;
    ggml_tensor * weight[LLAMA_ADAPTER_MEM_HEAD_COUNT] = {};
    ggml_tensor * delta[LLAMA_ADAPTER_MEM_HEAD_COUNT]  = {};

    ggml_cgraph * gf = ggml_new_graph(ctx.get());

    if (from_features) {
        core = ggml_rwkv_ms(ctx.get(), x, nullptr, state, ids, &params);
    } else {
        layer.in   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, p.n_embd, D + (p.couple_lambda ? 1 : 2) * G);
        layer.core = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_weight(&params));

        core = kind.build(ctx.get(), layer, x, state, ids);
    }
    ggml_build_forward_expand(gf, core);

    for (int h = 0; h < LLAMA_ADAPTER_MEM_HEAD_COUNT && !from_features; ++h) {
        if (p.delta[h]) {
            if (llama_adapter_mem_dim(tensors, head_name[h], 1) != D) {
                throw std::runtime_error(format("tensor '%s' has not %lld columns", head_name[h], (long long) D));
            }
            weight[h] = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, llama_adapter_mem_dim(tensors, head_name[h], 0), D);

            // a traced row ends with out, then the routes
            ggml_tensor * out = params.trace ? ggml_view_2d(ctx.get(), core, D, T, core->nb[1], 12 * D * sizeof(float)) : core;

            delta[h] = llama_adapter_mem_build_delta(ctx.get(), weight[h], out);
            ggml_build_forward_expand(gf, delta[h]);
        }
    }

    ggml_backend_ptr        backend{ ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buf) {
        throw std::runtime_error("failed to allocate the tensors");
    }

    // NaN: nothing may be read that was not written
    ggml_backend_buffer_clear(buf.get(), 0xff);

    auto set = [](ggml_tensor * tensor, const std::vector<float> & data) {
        GGML_ASSERT(ggml_nbytes(tensor) == data.size() * sizeof(float));
        ggml_backend_tensor_set(tensor, data.data(), 0, ggml_nbytes(tensor));
    };

    ggml_backend_tensor_set(x, from_features ? p.features : p.h, 0, ggml_nbytes(x));

    std::vector<int32_t> data_ids(2 * T, 0);
    for (int64_t i = 0; i < T && p.mask; ++i) {
        data_ids[2 * i + 1] = p.mask[i];
    }
    ggml_backend_tensor_set(ids, data_ids.data(), 0, ggml_nbytes(ids));

    std::vector<float> cell(ggml_rwkv_ms_n_cell(&params));
    ggml_rwkv_ms_cell_set(&params, cell.data(), p.S, p.prev, *p.n_past);
    set(state, cell);

    if (!from_features) {
        set(layer.in, kind.pack_in(tensors));
        set(layer.core, kind.pack_core(tensors));
        for (int h = 0; h < LLAMA_ADAPTER_MEM_HEAD_COUNT; ++h) {
            if (delta[h]) {
                set(weight[h], llama_adapter_mem_pack_delta(tensors, head_name[h], p.alpha / p.rank));
            }
        }
    }

    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("failed to compute the graph");
    }

    ggml_backend_tensor_get(state, cell.data(), 0, ggml_nbytes(state));
    *p.n_past = ggml_rwkv_ms_cell_get(&params, cell.data(), p.S, p.prev);

    if (p.trace) {
        ggml_backend_tensor_get(core, p.trace, 0, ggml_nbytes(core));
    }
    for (int h = 0; h < LLAMA_ADAPTER_MEM_HEAD_COUNT; ++h) {
        if (delta[h]) {
            ggml_backend_tensor_get(delta[h], p.delta[h], 0, ggml_nbytes(delta[h]));
        }
    }
}

bool llama_adapter_mem_eval(const llama_adapter_mem_eval_params * params, char * err, size_t n_err) {
    try {
        llama_adapter_mem_eval_impl(*params);
        return true;
    } catch (const std::exception & e) {
        if (err && n_err > 0) {
            snprintf(err, n_err, "%s", e.what());
        }
        return false;
    }
}
