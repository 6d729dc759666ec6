#include "llama-adapter-mem-sidecar.h"

#include "llama-arch.h"
#include "llama-model.h"
#include "llama-adapter-mem-config.h"

#include <stdexcept>

static void adapter_mem_check_shape(const llama_adapter_mem_sidecar::layer & layer, const llama_model & model) {
    const auto & hparams = model.hparams;

    if ((uint32_t) layer.il >= hparams.n_layer()) {
        llama_adapter_mem_fail("base-shape", "target layer %d is out of range, the base has %u layers", layer.il, hparams.n_layer());
    }

    const uint32_t il = layer.il;

    if (layer.is_swa != hparams.is_swa(il)) {
        llama_adapter_mem_fail("base-shape", "per_layer_attention_json: layer %u is %s attention, but the base has %s there", il,
                layer.is_swa ? "sliding" : "full",
                hparams.is_swa(il) ? "sliding" : "full");
    }

    static const char * const names[4] = { "q_out", "k_out", "v_out", "o_out" };

    const int64_t widths[4] = {
        (int64_t) hparams.n_embd_head_k(il) * hparams.n_head(il),
        (int64_t) hparams.n_embd_k_gqa(il),
        (int64_t) hparams.n_embd_v_gqa(il),
        (int64_t) hparams.n_embd,
    };

    for (int h = 0; h < 4; ++h) {
        // a layer that shares the keys and values of an earlier one has no such projections
        const bool is_absent = (h == 1 || h == 2) && !hparams.has_kv(il);
        if (!is_absent && layer.width[h] != widths[h]) {
            llama_adapter_mem_fail("base-shape", "per_layer_attention_json: %s of layer %u is %lld, but the base has %lld", names[h], il,
                    (long long) layer.width[h], (long long) widths[h]);
        }
    }
}

static void adapter_mem_check_heads(const llama_adapter_mem_sidecar & sidecar, uint32_t il, const llama_model & model) {
    if (!sidecar.head[1] && !sidecar.head[2]) {
        return;
    }
    if (!model.hparams.has_kv(il)) {
        llama_adapter_mem_fail("base-heads", "delta head %c is active on layer %u, which shares the keys and values of an earlier layer",
                sidecar.head[1] ? 'k' : 'v', il);
    }
    // without a v projection the values are the keys: a delta of one would reach both
    if (!model.layers[il].wqkv && !model.layers[il].wv) {
        llama_adapter_mem_fail("base-heads", "delta heads k and v are not implemented for layer %u, which has no v projection of its own", il);
    }
}

void llama_adapter_mem_sidecar_check_model(const llama_adapter_mem_sidecar & sidecar, const llama_model & model) {
    try {
        if (model.arch != LLM_ARCH_GEMMA4) {
            llama_adapter_mem_fail("base-architecture", "the base has architecture '%s', only 'gemma4' is supported", llm_arch_name(model.arch));
        }
        if ((int64_t) model.hparams.n_embd != sidecar.n_embd) {
            llama_adapter_mem_fail("base-shape", "the base has hidden size %u, the sidecar is for %lld", model.hparams.n_embd, (long long) sidecar.n_embd);
        }
        for (const auto & layer : sidecar.layers) {
            adapter_mem_check_shape(layer, model);
        }
        for (const auto & layer : sidecar.layers) {
            adapter_mem_check_heads(sidecar, layer.il, model);
        }
    } catch (const std::exception & e) {
        throw std::runtime_error("sidecar '" + sidecar.path + "': " + e.what());
    }
}
