#include "server-rwkv-ms.h"

#include "llama-rwkv-ms.h"
#include "log.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>

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

    bool  frozen = false;
    float scale  = 1.0f;
    llama_rwkv_ms_seq_get(ctx, seq_id, &frozen, &scale);

    return {
        { "tokens_written", n_tokens },
        { "current_state", n_tokens / info.n_chunk % info.n_state }, // the one that the next token is written to
        { "norms", norms },
        { "frozen", frozen },
        { "scale", scale },
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

//
// settings
//

server_rwkv_ms_params server_rwkv_ms_params_parse(const common_json & data) {
    server_rwkv_ms_params res;
    if (data.is_null()) {
        return res;
    }
    if (!data.is_object()) {
        throw std::invalid_argument("\"rwkv_ms\" must be an object with \"frozen\" and \"scale\"");
    }
    for (const auto & item : data.items()) {
        const auto & value = item.value();

        if (item.key() == "frozen" && value.is_boolean()) {
            res.frozen = value.get<bool>();
        } else if (item.key() == "scale" && value.is_number() && std::isfinite(value.get<float>())) {
            res.scale = value.get<float>();
        } else {
            throw std::invalid_argument("\"rwkv_ms\": \"" + item.key() + "\" must be \"frozen\", true or false, or \"scale\", a number");
        }
    }
    return res;
}

bool server_rwkv_ms_params_apply(llama_context * ctx, llama_seq_id seq_id, const server_rwkv_ms_params & slot, const server_rwkv_ms_params & request) {
    const bool  frozen = request.frozen.value_or(slot.frozen.value_or(false));
    const float scale  = request.scale.value_or(slot.scale.value_or(1.0f));

    bool  frozen_old = false;
    float scale_old  = 1.0f;
    if (!llama_rwkv_ms_seq_get(ctx, seq_id, &frozen_old, &scale_old)) {
        return false;
    }

    llama_rwkv_ms_seq_set(ctx, seq_id, frozen, scale);

    if (scale == scale_old) {
        return false;
    }
    if (frozen) {
        // what is read is the memory as it is
        llama_rwkv_ms_seq_rm_text(ctx, seq_id);
    } else {
        // what is written is the whole text, once
        llama_memory_seq_rm(llama_get_memory(ctx), seq_id, 0, -1);
    }
    return true;
}

//
// states
//

std::string server_rwkv_ms_state_error(llama_seq_id seq_id, const char * def) {
    const std::string what = llama_rwkv_ms_state_error();
    if (what.empty()) {
        return def;
    }
    LOG_WRN("rwkv-ms: slot %d: rolled back, nothing is changed: %s\n", seq_id, what.c_str());
    return what;
}

std::vector<llama_token> server_rwkv_ms_file_tokens(llama_context * ctx, llama_seq_id seq_id, const std::string & filepath) {
    std::vector<llama_token> res;

    size_t n = 0;
    if (llama_state_seq_load_file(ctx, filepath.c_str(), seq_id, nullptr, 0, &n) == 0) {
        throw std::runtime_error(server_rwkv_ms_state_error(seq_id, "the file cannot be read"));
    }

    FILE * file = ggml_fopen(filepath.c_str(), "rb");
    if (file && fseek(file, 12, SEEK_SET) == 0) {
        res.resize(n);
        res.resize(fread(res.data(), sizeof(llama_token), n, file));
    }
    if (file) {
        fclose(file);
    }
    return res;
}

common_json server_rwkv_ms_action(
        llama_context *         ctx,
        llama_seq_id            seq_id,
        const std::string &     action,
        const std::string &     filename,
        const std::string &     filepath,
        const common_json &     data,
        server_rwkv_ms_params & slot,
        bool *                  rm_text) {
    llama_rwkv_ms_info info;
    if (!llama_model_rwkv_ms_info(llama_get_model(ctx), &info)) {
        throw std::runtime_error("this server has no memory: start it with --rwkv-ms-sidecar");
    }

    const int64_t t_start = ggml_time_us();

    common_json res = { { "id_slot", seq_id } };

    if (action == "memory-save" || action == "memory-restore") {
        const bool is_save = action == "memory-save";

        llama_rwkv_ms_state_error_clear();

        const size_t n_bytes = is_save ? llama_rwkv_ms_state_save_file(ctx, filepath.c_str(), seq_id) : llama_rwkv_ms_state_load_file(ctx, filepath.c_str(), seq_id);
        if (n_bytes == 0) {
            throw std::runtime_error(server_rwkv_ms_state_error(seq_id, "the memory cannot be saved or restored: see the log"));
        }

        res["filename"]       = filename;
        res["n_bytes"]        = n_bytes;
        res["tokens_written"] = llama_rwkv_ms_get_state(ctx, seq_id, 0, nullptr, nullptr);
        res["timings"]        = { { is_save ? "save_ms" : "restore_ms", (ggml_time_us() - t_start) / 1000.0 } };

        *rm_text = !is_save;
    } else if (action == "memory-reset") {
        llama_rwkv_ms_seq_reset(ctx, seq_id);
    } else if (action == "memory-set") {
        const auto params = server_rwkv_ms_params_parse(data);

        if (params.frozen) {
            slot.frozen = params.frozen;
        }
        if (params.scale) {
            slot.scale = params.scale;
        }
        *rm_text = server_rwkv_ms_params_apply(ctx, seq_id, slot, {});

        res["frozen"] = slot.frozen.value_or(false);
        res["scale"]  = slot.scale.value_or(1.0f);
    } else {
        throw std::runtime_error("unknown action '" + action + "': memory-save, memory-restore, memory-reset and memory-set are known");
    }
    return res;
}
