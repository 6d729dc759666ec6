#include "llama-adapter-mem-sidecar.h"

#include "llama-arch.h"
#include "llama-model.h"
#include "llama-adapter-mem-config.h"

#include <algorithm>
#include <stdexcept>

static void adapter_mem_check_shape(const llama_adapter_mem_sidecar & sidecar, const llama_adapter_mem_sidecar::layer & layer, const llama_model & model) {
    const auto & hparams = model.hparams;

    if ((uint32_t) layer.il >= hparams.n_layer()) {
        llama_adapter_mem_fail("base-shape", "target layer %d is out of range, the base has %u layers", layer.il, hparams.n_layer());
    }

    const uint32_t il = layer.il;

    // what decides are the widths; in version 3 the kind is for people
    if (sidecar.format < 3 && layer.is_swa != hparams.is_swa(il)) {
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

// The rows of q and k of a base whose rope is over neighbours were permuted by its converter, and the deltas' have to be alike
// [TAG_ADAPTER_MEM_ROWS]. Of other architectures with such a rope, some converters do and some do not: the exporter was told.
static void adapter_mem_check_rows(const llama_adapter_mem_sidecar & sidecar, const llama_model & model) {
    static const llm_arch permuted[] = { LLM_ARCH_LLAMA, LLM_ARCH_SMOLLM3, LLM_ARCH_GRANITE, LLM_ARCH_ARCEE };

    const bool is_norm = std::find(std::begin(permuted), std::end(permuted), model.arch) != std::end(permuted);
    const bool is_hf   = llama_model_rope_type(&model) == LLAMA_ROPE_TYPE_NEOX;
    if (is_norm != (sidecar.rope_head_dim > 0) && (is_norm || is_hf)) {
        llama_adapter_mem_fail("base-rows", "rows of q and k are in the order '%s' in %s, the sidecar says '%s': export it again", is_norm ? "norm" : "hf",
                llm_arch_name(model.arch), is_norm ? "hf" : "norm");
    }
    for (const auto & layer : sidecar.layers) {
        const uint32_t n_rows = model.hparams.n_embd_head_k(layer.il);
        if (sidecar.rope_head_dim > 0 && sidecar.rope_head_dim != n_rows) {
            llama_adapter_mem_fail("base-rows", "a head of q has %u rows, the sidecar's rows are permuted in heads of %u: export it again", n_rows,
                    sidecar.rope_head_dim);
        }
    }
}

void llama_adapter_mem_sidecar_check_model(const llama_adapter_mem_sidecar & sidecar, const llama_model & model) {
    try {
        if (sidecar.base_arch != llm_arch_name(model.arch)) {
            llama_adapter_mem_fail("base-architecture", "the base has architecture '%s', the sidecar is for '%s'", llm_arch_name(model.arch),
                    sidecar.base_arch.c_str());
        }
        if ((int64_t) model.hparams.n_embd != sidecar.n_embd) {
            llama_adapter_mem_fail("base-shape", "the base has hidden size %u, the sidecar is for %lld", model.hparams.n_embd, (long long) sidecar.n_embd);
        }
        for (const auto & layer : sidecar.layers) {
            adapter_mem_check_shape(sidecar, layer, model);
        }
        if (sidecar.all_layers && sidecar.layers.size() != model.hparams.n_layer()) {
            llama_adapter_mem_fail("base-shape", "the base has %u layers, the sidecar is for all of %zu", model.hparams.n_layer(), sidecar.layers.size());
        }
        adapter_mem_check_rows(sidecar, model);
        for (const auto & layer : sidecar.layers) {
            adapter_mem_check_heads(sidecar, layer.il, model);
        }
    } catch (const std::exception & e) {
        throw std::runtime_error("sidecar '" + sidecar.path + "': " + e.what());
    }
}
