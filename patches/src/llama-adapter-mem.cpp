#include "llama-adapter-mem-impl.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

ggml_context_ptr llama_adapter_mem_ctx(size_t n_tensors) {
    ggml_init_params params = {
        /*.mem_size   =*/n_tensors * ggml_tensor_overhead(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };

    ggml_context_ptr ctx{ ggml_init(params) };
    if (!ctx) {
        throw std::runtime_error("failed to create a ggml context");
    }
    return ctx;
}

//
// packing
//

ggml_rwkv_ms_params llama_adapter_mem_params_from_hparams(const llama_adapter_mem_hparams & hparams) {
    ggml_rwkv_ms_params res = {};

    res.n_rank        = hparams.rank;
    res.n_head        = hparams.n_head;
    res.n_state       = hparams.n_state;
    res.n_chunk       = hparams.n_chunk;
    res.n_lora        = hparams.n_lora;
    res.n_gate        = hparams.n_gate;
    res.semantics     = hparams.semantics;
    res.update        = hparams.update_mode;
    res.couple_lambda = hparams.couple_lambda;
    res.erase_gate    = hparams.erase_gate;

    return res;
}

static void llama_adapter_mem_append(std::vector<float> & dst, const llama_adapter_mem_tensors & tensors, const char * name) {
    const auto & data = tensors.at(name).data;
    dst.insert(dst.end(), data.begin(), data.end());
}

// torch's [out, in] -> [in][out]
static std::vector<float> llama_adapter_mem_transposed(const llama_adapter_mem_tensor & tensor) {
    const int64_t n_out = tensor.shape[0];
    const int64_t n_in  = tensor.shape[1];

    std::vector<float> res(n_out * n_in);
    for (int64_t o = 0; o < n_out; ++o) {
        for (int64_t i = 0; i < n_in; ++i) {
            res[i * n_out + o] = tensor.data[o * n_in + i];
        }
    }
    return res;
}

std::vector<float> llama_adapter_mem_pack_in(const llama_adapter_mem_tensors & tensors, bool couple_lambda) {
    std::vector<float> res;

    llama_adapter_mem_append(res, tensors, "mem_v");
    llama_adapter_mem_append(res, tensors, "beta");
    if (!couple_lambda) {
        llama_adapter_mem_append(res, tensors, "lambda");
    }
    return res;
}

std::vector<float> llama_adapter_mem_pack_core(const llama_adapter_mem_tensors & tensors, bool couple_lambda) {
    std::vector<float> res;

    llama_adapter_mem_append(res, tensors, "beta_b");
    if (!couple_lambda) {
        llama_adapter_mem_append(res, tensors, "lambda_b");
    }
    for (const char * name : { "x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight",
                 "w1", "a1", "g1", "w2", "a2", "g2" }) {
        llama_adapter_mem_append(res, tensors, (std::string("rwkv.") + name).c_str());
    }

    for (const char * name : { "rwkv.receptance.weight", "rwkv.key.weight", "rwkv.value.weight", "rwkv.output.weight" }) {
        const auto data = llama_adapter_mem_transposed(tensors.at(name));
        res.insert(res.end(), data.begin(), data.end());
    }
    return res;
}

std::vector<float> llama_adapter_mem_pack_delta(const llama_adapter_mem_tensors & tensors, const char * name, float scale) {
    const auto & tensor = tensors.at(name);

    std::vector<float> res = llama_adapter_mem_transposed(tensor);
    for (float & x : res) {
        x *= scale;
    }
    return res;
}

//
// llama_adapter_mem
//

ggml_backend_buffer_type_t llama_adapter_mem_buft_op(const llama_model & model, const ggml_rwkv_ms_params & params, int32_t il) {
    auto * dev_cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * dev     = model.dev_layer(il);

    if (dev && dev != dev_cpu) {
        const int64_t D = params.n_head * params.n_rank;

        ggml_context_ptr ctx = llama_adapter_mem_ctx(5);

        auto * x     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, D + (params.couple_lambda ? 1 : 2) * params.n_gate, 1);
        auto * w     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_weight(&params));
        auto * state = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_cell(&params), 1);
        auto * ids   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, 1);

        if (ggml_backend_dev_supports_op(dev, ggml_rwkv_ms(ctx.get(), x, w, state, ids, &params))) {
            return ggml_backend_dev_buffer_type(dev);
        }
    }

    return ggml_backend_dev_buffer_type(dev_cpu);
}

llama_adapter_mem::llama_adapter_mem(const llama_model & model, const llama_adapter_mem_sidecar & sidecar, llama_adapter_mem_mode mode) :
    params(llama_adapter_mem_params_from_hparams(sidecar.hparams)),
    no_alloc(model.hparams.no_alloc) {
    const auto & hparams = sidecar.hparams;

    auto set_hex = [](char (&dst)[65], const std::string & src) {
        snprintf(dst, sizeof(dst), "%s", src.c_str());
    };
    set_hex(info.sidecar_sha256, sidecar.sha256);
    set_hex(info.base_sha256, sidecar.base_sha256);
    set_hex(info.fingerprint, sidecar.fingerprint);

    info.n_layer   = sidecar.layers.size();
    info.rank      = hparams.rank;
    info.n_head    = hparams.n_head;
    info.n_state   = hparams.n_state;
    info.n_chunk   = hparams.n_chunk;
    info.semantics = hparams.semantics;
    info.alpha     = hparams.alpha;
    info.mode      = mode;

    const int64_t D      = params.n_head * params.n_rank;
    const int64_t n_in   = D + (params.couple_lambda ? 1 : 2) * params.n_gate;
    const int64_t n_embd = model.hparams.n_embd;

    const char * head_name[LLAMA_ADAPTER_MEM_HEAD_COUNT] = { "delta_q", "delta_k", "delta_v", "delta_o" };

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    auto ctx_for_buft = [&](ggml_backend_buffer_type_t buft) {
        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ctx = llama_adapter_mem_ctx(sidecar.layers.size() * (2 + LLAMA_ADAPTER_MEM_HEAD_COUNT));
        }
        return ctx.get();
    };

    for (const auto & src : sidecar.layers) {
        llama_adapter_mem_layer layer;
        layer.il = src.il;

        auto * ctx = ctx_for_buft(ggml_backend_dev_buffer_type(model.dev_layer(src.il)));

        layer.in = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n_in);
        ggml_format_name(layer.in, "rwkv_ms_in.%d", layer.il);

        for (int h = 0; h < LLAMA_ADAPTER_MEM_HEAD_COUNT; ++h) {
            if (sidecar.head[h]) {
                layer.delta[h] = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, src.width[h], D);
                ggml_format_name(layer.delta[h], "rwkv_ms_%s.%d", head_name[h], layer.il);
            }
        }

        layer.core = ggml_new_tensor_1d(ctx_for_buft(llama_adapter_mem_buft_op(model, params, src.il)),
                GGML_TYPE_F32, ggml_rwkv_ms_n_weight(&params));
        ggml_format_name(layer.core, "rwkv_ms_core.%d", layer.il);

        layers.push_back(layer);
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_ptr buf;
        if (no_alloc) {
            buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get(); // so that the scheduler does not try to allocate it
            }
        } else {
            buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        }
        if (!buf) {
            throw std::runtime_error(format("failed to allocate a buffer for the sidecar in %s", ggml_backend_buft_name(buft)));
        }
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

        LLAMA_LOG_INFO("%s: %10s sidecar buffer size = %8.2f MiB\n", __func__,
                ggml_backend_buft_name(buft), ggml_backend_buffer_get_size(buf.get()) / 1024.0 / 1024.0);

        ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    if (no_alloc) {
        return;
    }

    auto set = [](ggml_tensor * tensor, const std::vector<float> & data) {
        GGML_ASSERT(ggml_nbytes(tensor) == data.size() * sizeof(float));
        ggml_backend_tensor_set(tensor, data.data(), 0, ggml_nbytes(tensor));
    };

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & tensors = sidecar.layers[i].tensors;

        set(layers[i].in, llama_adapter_mem_pack_in(tensors, params.couple_lambda));
        set(layers[i].core, llama_adapter_mem_pack_core(tensors, params.couple_lambda));

        for (int h = 0; h < LLAMA_ADAPTER_MEM_HEAD_COUNT; ++h) {
            if (layers[i].delta[h]) {
                set(layers[i].delta[h], llama_adapter_mem_pack_delta(tensors, head_name[h], hparams.alpha / hparams.rank));
            }
        }
    }
}

const llama_adapter_mem_layer * llama_adapter_mem::get_layer(int32_t il) const {
    for (const auto & layer : layers) {
        if (layer.il == il) {
            return &layer;
        }
    }
    return nullptr;
}

void llama_adapter_mem::check_cparams(const llama_cparams & cparams) const {
    if (info.mode != LLAMA_ADAPTER_MEM_MODE_BATCHED && cparams.n_seq_max > 1) {
        throw std::runtime_error(format(
                "rwkv-ms: mode '%s' allows one sequence, this context has %u: use one, or --rwkv-ms-mode batched",
                llama_adapter_mem_mode_name(info.mode), cparams.n_seq_max));
    }
    if (info.mode == LLAMA_ADAPTER_MEM_MODE_SERIAL && cparams.n_ubatch > 1) {
        throw std::runtime_error(format(
                "rwkv-ms: mode 'serial' allows --ubatch-size 1, this context has %u: use 1, or --rwkv-ms-mode fused",
                cparams.n_ubatch));
    }
}

std::map<ggml_backend_buffer_type_t, size_t> llama_adapter_mem::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [ctx, buf] : ctxs_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());

        res[buft] += no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

//
// interface
//

static const char * const llama_adapter_mem_mode_names[] = { "serial", "fused", "batched" };

int32_t llama_adapter_mem_mode_from_name(const char * name) {
    for (int32_t i = 0; i < 3; ++i) {
        if (name && strcmp(name, llama_adapter_mem_mode_names[i]) == 0) {
            return i;
        }
    }
    return -1;
}

const char * llama_adapter_mem_mode_name(llama_adapter_mem_mode mode) {
    return mode >= 0 && mode < 3 ? llama_adapter_mem_mode_names[mode] : "unknown";
}

static void llama_adapter_mem_error(char * err, size_t n_err, const char * what) {
    if (err && n_err > 0) {
        snprintf(err, n_err, "%s", what);
    }
}

llama_adapter_mem_sidecar * llama_adapter_mem_sidecar_init(const char * path_sidecar, const char * path_base, char * err, size_t n_err) {
    try {
        auto res = llama_adapter_mem_sidecar_load(path_sidecar);
        if (path_base) {
            res->base_hash_start(path_base);
        }
        return res.release();
    } catch (const std::exception & e) {
        llama_adapter_mem_error(err, n_err, e.what());
        return nullptr;
    }
}

void llama_adapter_mem_sidecar_free(llama_adapter_mem_sidecar * sidecar) {
    delete sidecar;
}

bool llama_model_set_adapter_mem(llama_model * model, const llama_adapter_mem_sidecar * sidecar, llama_adapter_mem_mode mode, char * err, size_t n_err) {
    try {
        if (model->adapter_mem) {
            throw std::runtime_error(format("%s: the model already has a sidecar; load the model again to change it", sidecar->path.c_str()));
        }

        if (model->split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
            throw std::runtime_error(format("%s: a memory is not split over devices tensor by tensor; use --split-mode layer", sidecar->path.c_str()));
        }

        llama_adapter_mem_sidecar_check_model(*sidecar, *model);

        sidecar->base_hash_check();

        model->adapter_mem = std::make_unique<llama_adapter_mem>(*model, *sidecar, mode);
        return true;
    } catch (const std::exception & e) {
        llama_adapter_mem_error(err, n_err, e.what());
        return false;
    }
}

bool llama_model_load_adapter_mem(
        llama_model *          model,
        const char *           path_sidecar,
        const char *           path_base,
        llama_adapter_mem_mode mode,
        char * err, size_t n_err) {
    std::unique_ptr<llama_adapter_mem_sidecar> sidecar{ llama_adapter_mem_sidecar_init(path_sidecar, path_base, err, n_err) };

    return sidecar && llama_model_set_adapter_mem(model, sidecar.get(), mode, err, n_err);
}

bool llama_model_adapter_mem_info(const llama_model * model, llama_adapter_mem_info * info) {
    if (!model->adapter_mem) {
        return false;
    }
    *info = model->adapter_mem->info;
    return true;
}

int32_t llama_model_adapter_mem_layer(const llama_model * model, uint32_t i) {
    return model->adapter_mem && i < model->adapter_mem->layers.size() ? model->adapter_mem->layers[i].il : -1;
}
