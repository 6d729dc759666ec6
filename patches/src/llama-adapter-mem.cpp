#include "llama-adapter-mem-impl.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-memory-adapter.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
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
// llama_adapter_mem_core
//

llama_adapter_mem_core::llama_adapter_mem_core(const llama_adapter_mem_hparams & hparams) {
    params.n_rank        = hparams.rank;
    params.n_head        = hparams.n_head;
    params.n_gate        = hparams.n_gate;
    params.update        = hparams.update_mode;
    params.couple_lambda = hparams.couple_lambda;
}

static void adapter_mem_append(std::vector<float> & dst, const std::vector<float> & src) {
    dst.insert(dst.end(), src.begin(), src.end());
}

std::vector<float> llama_adapter_mem_core::pack_in(const llama_adapter_mem_tensors & tensors) const {
    std::vector<float> res;

    for (const char * name : names_in) {
        adapter_mem_append(res, tensors.at(name).data);
    }
    adapter_mem_append(res, tensors.at("beta").data);
    if (!params.couple_lambda) {
        adapter_mem_append(res, tensors.at("lambda").data);
    }
    return res;
}

std::vector<float> llama_adapter_mem_core::pack_core(const llama_adapter_mem_tensors & tensors) const {
    std::vector<float> res;

    adapter_mem_append(res, tensors.at("beta_b").data);
    if (!params.couple_lambda) {
        adapter_mem_append(res, tensors.at("lambda_b").data);
    }
    for (const char * name : names) {
        adapter_mem_append(res, tensors.at(name).data);
    }
    for (const char * name : names_transposed) {
        adapter_mem_append(res, llama_adapter_mem_pack_delta(tensors, name, 1.0f));
    }
    return res;
}

ggml_tensor * llama_adapter_mem_core::build(ggml_context * ctx, const llama_adapter_mem_layer & layer, ggml_tensor * h, ggml_tensor * state, ggml_tensor * ids) const {
    ggml_tensor * x = ggml_mul_mat(ctx, layer.in, h); // [n_in, n_tokens]
    ggml_prec_set_src(x, GGML_PREC_F32, 1);           // whatever the number of tokens

    return ggml_rwkv_ms(ctx, x, layer.core, state, ids, &params); // [D, n_tokens]
}

std::vector<float> llama_adapter_mem_pack_delta(const llama_adapter_mem_tensors & tensors, const char * name, float factor) {
    const auto & tensor = tensors.at(name);

    const int64_t n_out = tensor.shape[0];
    const int64_t n_in  = tensor.shape[1];

    std::vector<float> res(n_out * n_in);
    for (int64_t o = 0; o < n_out; ++o) {
        for (int64_t i = 0; i < n_in; ++i) {
            res[i * n_out + o] = tensor.data[o * n_in + i] * factor;
        }
    }
    return res;
}

ggml_tensor * llama_adapter_mem_build_delta(ggml_context * ctx, ggml_tensor * delta, ggml_tensor * core) {
    // an outer product, because D is too short for the dot products of a matrix multiplication to be fast
    return ggml_out_prod(ctx, delta, ggml_transpose(ctx, core));
}

//
// llama_adapter_mem
//

ggml_backend_buffer_type_t llama_adapter_mem_buft_op(const llama_model & model, const ggml_rwkv_ms_params & params, int32_t il) {
    auto * dev_cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * dev     = model.dev_layer(il);

    if (dev && dev != dev_cpu) {
        ggml_context_ptr ctx = llama_adapter_mem_ctx(5);

        auto * x     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_in(&params), 1);
        auto * w     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_weight(&params));
        auto * state = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_cell(&params), 1);
        auto * ids   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, 1);

        if (ggml_backend_dev_supports_op(dev, ggml_rwkv_ms(ctx.get(), x, w, state, ids, &params))) {
            return ggml_backend_dev_buffer_type(dev);
        }
    }

    return ggml_backend_dev_buffer_type(dev_cpu);
}

static llama_adapter_mem_core adapter_mem_core_init(const llama_adapter_mem_sidecar & sidecar) {
    switch (sidecar.kind) {
        case LLAMA_ADAPTER_MEM_KIND_RWKV_MS:
            return llama_adapter_mem_core_rwkv_ms(sidecar.hparams);
        case LLAMA_ADAPTER_MEM_KIND_DELTA_RULE:
            return llama_adapter_mem_core_delta_rule(sidecar.hparams);
    }
    GGML_ABORT("fatal error");
}

// everything that the deltas of a head are multiplied by
static float adapter_mem_factor(const llama_adapter_mem_hparams & hparams, const llama_adapter_mem_tensors & tensors, int head) {
    const float res = hparams.alpha / hparams.rank;
    if (hparams.n_scale == 0) {
        return res;
    }
    const float raw = tensors.at("delta_scale").data[hparams.n_scale == 1 ? 0 : head];

    return res * hparams.scale_max / (1.0f + std::exp(-raw));
}

// tensors by the buffer types that they lie in
class adapter_mem_allocator {
public:
    explicit adapter_mem_allocator(size_t n_tensors) : n_tensors(n_tensors) {}

    ggml_tensor * create(ggml_backend_buffer_type_t buft, const std::vector<float> & data, int64_t ne0, int64_t ne1, const char * name, int il) {
        GGML_ASSERT((int64_t) data.size() == ne0 * ne1);

        auto & ctx = ctxs[buft];
        if (!ctx) {
            ctx = llama_adapter_mem_ctx(n_tensors);
        }
        ggml_tensor * res = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, ne1);
        ggml_format_name(res, "%s.%d", name, il);
        values.emplace_back(res, data);
        return res;
    }

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> alloc(bool no_alloc) {
        std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> res;

        for (auto & [buft, ctx] : ctxs) {
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

            res.emplace_back(std::move(ctx), std::move(buf));
        }
        for (const auto & [tensor, data] : values) {
            if (!no_alloc) {
                ggml_backend_tensor_set(tensor, data.data(), 0, ggml_nbytes(tensor));
            }
        }
        return res;
    }

private:
    const size_t n_tensors;

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr>    ctxs;
    std::vector<std::pair<ggml_tensor *, std::vector<float>>> values;
};

llama_adapter_mem::llama_adapter_mem(const llama_model & model, const llama_adapter_mem_sidecar & sidecar, llama_adapter_mem_mode mode) :
    path(sidecar.path), core(adapter_mem_core_init(sidecar)), no_alloc(model.hparams.no_alloc) {
    const auto & hparams = sidecar.hparams;
    const auto & params  = core.params;

    auto set_text = [](auto & dst, const std::string & src) {
        snprintf(dst, sizeof(dst), "%s", src.c_str());
    };
    set_text(info.sidecar_sha256, sidecar.sha256);
    set_text(info.base_sha256, sidecar.base_sha256);
    set_text(info.fingerprint, sidecar.fingerprint);
    set_text(info.kind, llama_adapter_mem_kind_name(sidecar.kind));

    info.n_layer   = sidecar.layers.size();
    info.rank      = params.n_rank;
    info.n_head    = params.n_head;
    info.n_state   = hparams.n_state;
    info.n_chunk   = hparams.n_chunk;
    info.semantics = hparams.semantics;
    info.alpha     = hparams.alpha;
    info.mode      = mode;

    const int64_t D = params.n_head * params.n_rank;

    static const char * const names[LLAMA_ADAPTER_MEM_HEAD_COUNT] = { "delta_q", "delta_k", "delta_v", "delta_o" };

    adapter_mem_allocator tensors(sidecar.layers.size() * (3 + LLAMA_ADAPTER_MEM_HEAD_COUNT));

    for (const auto & src : sidecar.layers) {
        auto * buft = ggml_backend_dev_buffer_type(model.dev_layer(src.il));

        llama_adapter_mem_layer layer;
        layer.il   = src.il;
        layer.in   = tensors.create(buft, core.pack_in(src.tensors), model.hparams.n_embd, ggml_rwkv_ms_n_in(&params), "adapter_mem_in", src.il);
        layer.core = tensors.create(llama_adapter_mem_buft_op(model, params, src.il), core.pack_core(src.tensors), ggml_rwkv_ms_n_weight(&params), 1,
                "adapter_mem_core", src.il);

        // [D][width] of a head, zeros where it is not active
        auto pack = [&](int h) {
            return sidecar.head[h] ? llama_adapter_mem_pack_delta(src.tensors, names[h], adapter_mem_factor(hparams, src.tensors, h)) : std::vector<float>(D * src.width[h]);
        };
        auto add = [&](const ggml_tensor * w, const char * name, bool is_in, bool is_active, const std::vector<float> & data) {
            if (!w && is_active) {
                throw std::runtime_error(format("sidecar '%s': [base-graph] layer %d of the base has no projection for %s", sidecar.path.c_str(), src.il, name));
            }
            if (!w) {
                return; // as k and v in a layer that shares those of another
            }
            auto & weight  = weights[w];
            weight.i_layer = layers.size();
            weight.is_in   = is_in;
            weight.name    = w->name;
            if (is_active) {
                weight.delta = tensors.create(buft, data, data.size() / D, D, name, src.il);
                if (weight.delta->ne[0] != w->ne[1]) {
                    throw std::runtime_error(format("sidecar '%s': [base-shape] %s has %lld rows, the sidecar's deltas of it %lld", sidecar.path.c_str(),
                            w->name, (long long) w->ne[1], (long long) weight.delta->ne[0]));
                }
            }
        };

        const auto & base = model.layers[src.il];
        if (base.wqkv) {
            // one product of all three, in this order
            const std::vector<float> q = pack(LLAMA_ADAPTER_MEM_HEAD_Q);
            const std::vector<float> k = pack(LLAMA_ADAPTER_MEM_HEAD_K);
            const std::vector<float> v = pack(LLAMA_ADAPTER_MEM_HEAD_V);

            std::vector<float> data;
            for (int64_t i = 0; i < D; ++i) {
                for (const auto * x : { &q, &k, &v }) {
                    data.insert(data.end(), x->begin() + i * (x->size() / D), x->begin() + (i + 1) * (x->size() / D));
                }
            }
            add(base.wqkv, "adapter_mem_delta_qkv", true, sidecar.head[0] || sidecar.head[1] || sidecar.head[2], data);
        } else {
            const ggml_tensor * const w[3] = { base.wq, base.wk, base.wv };
            for (int h = 0; h < 3; ++h) {
                add(w[h], format("adapter_mem_%s", names[h]).c_str(), true, sidecar.head[h], pack(h));
            }
        }
        add(base.wo, "adapter_mem_delta_o", false, sidecar.head[LLAMA_ADAPTER_MEM_HEAD_O], pack(LLAMA_ADAPTER_MEM_HEAD_O));

        if (hparams.o_norm && sidecar.head[LLAMA_ADAPTER_MEM_HEAD_O]) {
            auto & weight   = weights.at(base.wo);
            weight.norm     = tensors.create(buft, src.tensors.at("delta_o_norm").data, src.width[LLAMA_ADAPTER_MEM_HEAD_O], 1, "adapter_mem_norm_o", src.il);
            weight.norm_eps = hparams.o_norm_eps;
        }

        layers.push_back(layer);
    }

    ctxs_bufs = tensors.alloc(no_alloc);
}

const llama_adapter_mem_weight * llama_adapter_mem::get_weight(const ggml_tensor * w) const {
    const auto it = weights.find(w);

    return it == weights.end() ? nullptr : &it->second;
}

llama_memory_i * llama_adapter_mem::wrap(const llama_model & model, llama_memory_i * inner, const llama_cparams & cparams) const {
    llama_memory_ptr res{ inner };

    if (!res) {
        throw std::runtime_error("memory adapter: the architecture of the base has no context that goes on, so it cannot have a memory");
    }
    if (info.mode != LLAMA_ADAPTER_MEM_MODE_BATCHED && cparams.n_seq_max > 1) {
        throw std::runtime_error(format(
                "memory: mode '%s' allows one sequence, this context has %u: use one, or --memory-mode batched",
                llama_adapter_mem_mode_name(info.mode), cparams.n_seq_max));
    }
    if (info.mode == LLAMA_ADAPTER_MEM_MODE_SERIAL && cparams.n_ubatch > 1) {
        throw std::runtime_error(format(
                "memory: mode 'serial' allows --ubatch-size 1, this context has %u: use 1, or --memory-mode fused",
                cparams.n_ubatch));
    }
    return new llama_memory_adapter(model, *this, std::move(res), cparams.offload_kqv, cparams.n_seq_max);
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

// held to reference logits, see docs/porting.md [TAG_ADAPTER_MEM_TESTED]
static const llm_arch adapter_mem_tested[] = { LLM_ARCH_GEMMA4, LLM_ARCH_GEMMA3, LLM_ARCH_QWEN3, LLM_ARCH_SMOLLM3, LLM_ARCH_LLAMA };

static void adapter_mem_check_tested(const llama_adapter_mem_sidecar & sidecar, const llama_model & model, bool untested) {
    if (std::find(std::begin(adapter_mem_tested), std::end(adapter_mem_tested), model.arch) != std::end(adapter_mem_tested)) {
        return;
    }
    if (!untested) {
        throw std::runtime_error(format("sidecar '%s': [base-untested] no test is about a memory on architecture '%s': --memory-untested tries it",
                sidecar.path.c_str(), llm_arch_name(model.arch)));
    }
    LLAMA_LOG_WARN("%s: no test is about a memory on architecture '%s': compare it with the reference before it is relied on\n", __func__,
            llm_arch_name(model.arch));
}

bool llama_model_set_adapter_mem(llama_model * model, const llama_adapter_mem_sidecar * sidecar, llama_adapter_mem_mode mode, bool untested, char * err, size_t n_err) {
    try {
        if (model->adapter_mem) {
            throw std::runtime_error(format("%s: the model already has a sidecar; load the model again to change it", sidecar->path.c_str()));
        }

        if (model->split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
            throw std::runtime_error(format("%s: a memory is not split over devices tensor by tensor; use --split-mode layer", sidecar->path.c_str()));
        }

        llama_adapter_mem_sidecar_check_model(*sidecar, *model);
        adapter_mem_check_tested(*sidecar, *model, untested);

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

    return sidecar && llama_model_set_adapter_mem(model, sidecar.get(), mode, false, err, n_err);
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
