#include "server-rwkv-ms.h"

#include "llama-rwkv-ms.h"
#include "log.h"

#include <cmath>

common_json server_rwkv_ms_props(const llama_model * model) {
    llama_rwkv_ms_info info;
    if (!llama_model_rwkv_ms_info(model, &info)) {
        return nullptr;
    }

    common_json layers = common_json::array();
    for (uint32_t i = 0; i < info.n_layer; ++i) {
        layers.push_back(llama_model_rwkv_ms_layer(model, i));
    }

    return {
        { "sidecar_sha256", info.sidecar_sha256 },
        { "base_sha256", info.base_sha256 },
        { "fingerprint", info.fingerprint },
        { "layers", layers },
        { "rank", info.rank },
        { "state_heads", info.n_head },
        { "states", info.n_state },
        { "chunk", info.n_chunk },
        { "semantics", info.semantics },
        { "mode", llama_rwkv_ms_mode_name(info.mode) },
        { "alpha", info.alpha },
    };
}

common_json server_rwkv_ms_slot(llama_context * ctx, llama_seq_id seq_id) {
    llama_rwkv_ms_info info;
    if (!llama_model_rwkv_ms_info(llama_get_model(ctx), &info)) {
        return nullptr;
    }

    std::vector<float> S(info.n_head * info.n_state * info.rank * info.rank);

    int64_t     n_tokens = 0;
    common_json norms    = common_json::array();

    for (uint32_t i = 0; i < info.n_layer; ++i) {
        n_tokens = llama_rwkv_ms_get_state(ctx, seq_id, i, S.data(), nullptr);

        double sum = 0.0;
        for (const float x : S) {
            sum += (double) x * x;
        }
        norms.push_back(std::sqrt(sum));
    }

    return {
        { "tokens_written", n_tokens },
        { "current_state", n_tokens / info.n_chunk % info.n_state }, // the one that the next token is written to
        { "norms", norms },
    };
}

void server_rwkv_ms_log(const llama_model * model, const common_params & params, common_context_seq_rm_type seq_rm_type) {
    llama_rwkv_ms_info info;
    if (!llama_model_rwkv_ms_info(model, &info)) {
        return;
    }

    if (params.n_parallel == 1) {
        LOG_INF("rwkv-ms: one slot\n");
    } else {
        LOG_INF("rwkv-ms: %d slots\n", params.n_parallel);
    }
    LOG_INF("rwkv-ms: prompt cache %s: cache_prompt=%d cache_ram=%d MiB\n",
            params.cache_prompt || params.cache_ram_mib != 0 ? "on" : "off", params.cache_prompt, params.cache_ram_mib);
    LOG_INF("rwkv-ms: context checkpoints %s: max=%d\n", params.n_ctx_checkpoints > 0 ? "on" : "off", params.n_ctx_checkpoints);
    LOG_INF("rwkv-ms: warm-up %s\n", params.warmup ? "done" : "skipped");
    if (params.slot_save_path.empty()) {
        LOG_INF("rwkv-ms: slot save/restore disabled\n");
    } else {
        LOG_INF("rwkv-ms: slot save/restore enabled: %s\n", params.slot_save_path.c_str());
    }
    // a context that could drop the end of a sequence would let the memory of it stay
    if (seq_rm_type == COMMON_CONTEXT_SEQ_RM_TYPE_FULL && params.n_cache_reuse == 0) {
        LOG_INF("rwkv-ms: exact-prefix reuse: a prompt reuses a sequence only if it extends all of it\n");
    }
}
