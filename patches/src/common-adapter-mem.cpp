#include "common-adapter-mem.h"

#include "common.h"
#include "log.h"

#include <algorithm>

// common_fit_params loads models by path only; it is not thread safe itself
static thread_local common_adapter_mem * adapter_mem_current = nullptr;

static std::string adapter_mem_refusal(const common_params & params) {
    const int32_t mode = llama_adapter_mem_mode_from_name(params.adapter_mem_mode.c_str());
    if (mode < 0) {
        return string_format("--rwkv-ms-mode %s: must be serial, fused or batched", params.adapter_mem_mode.c_str());
    }

    // as llama_context does it
    const int32_t n_ubatch = std::min(params.n_batch, params.n_ubatch == 0 ? params.n_batch : params.n_ubatch);

    if (mode != LLAMA_ADAPTER_MEM_MODE_BATCHED && params.n_parallel > 1) {
        return string_format("--parallel %d: mode %s has one sequence, pass --parallel 1 or --rwkv-ms-mode batched",
                params.n_parallel, params.adapter_mem_mode.c_str());
    }
    if (mode == LLAMA_ADAPTER_MEM_MODE_SERIAL && n_ubatch > 1) {
        return string_format("--ubatch-size %d: mode serial processes one token at a time, pass --ubatch-size 1 or "
                             "--rwkv-ms-mode fused",
                n_ubatch);
    }
    if (params.n_cache_reuse > 0) {
        return "--cache-reuse: the memory of the text that is cut out would stay, drop it";
    }
    if (!params.mmproj.path.empty() || !params.mmproj.url.empty()) {
        return "--mmproj: the memory is for text only, pass --no-mmproj";
    }

    const auto & types = params.speculative.types;
    if (params.speculative.has_dft() || std::any_of(types.begin(), types.end(), [](common_speculative_type type) {
            return type != COMMON_SPECULATIVE_TYPE_NONE;
        })) {
        return "speculative decoding: not proven to roll the memory back, drop --model-draft and --spec-type";
    }
    return "";
}

bool common_adapter_mem_check(const common_params & params) {
    if (params.adapter_mem_sidecar.empty()) {
        return true;
    }
    const std::string refusal = adapter_mem_refusal(params);
    if (!refusal.empty()) {
        LOG_ERR("rwkv-ms: refused with --rwkv-ms-sidecar: %s\n", refusal.c_str());
    }
    return refusal.empty();
}

common_adapter_mem::~common_adapter_mem() {
    if (adapter_mem_current == this) {
        adapter_mem_current = prev;
    }
}

bool common_adapter_mem::init(const common_params & params) {
    if (params.adapter_mem_sidecar.empty()) {
        return true;
    }
    if (!common_adapter_mem_check(params)) {
        return false;
    }
    mode       = (llama_adapter_mem_mode) llama_adapter_mem_mode_from_name(params.adapter_mem_mode.c_str());
    path_model = params.model.path;

    char err[1024];
    sidecar.reset(llama_adapter_mem_sidecar_init(params.adapter_mem_sidecar.c_str(), path_model.c_str(), err, sizeof(err)));
    sidecar_measure.reset(sidecar ? llama_adapter_mem_sidecar_init(params.adapter_mem_sidecar.c_str(), nullptr, err, sizeof(err)) : nullptr);
    if (!sidecar || !sidecar_measure) {
        LOG_ERR("rwkv-ms: %s\n", err);
        return false;
    }

    prev                = adapter_mem_current;
    adapter_mem_current = this;
    return true;
}

// "0-5,11"
static std::string adapter_mem_layers(const llama_model * model, uint32_t n_layer) {
    std::string res;
    for (uint32_t i = 0, j; i < n_layer; i = j) {
        const int32_t first = llama_model_adapter_mem_layer(model, i);
        for (j = i + 1; j < n_layer && llama_model_adapter_mem_layer(model, j) == first + (int32_t) (j - i); ++j) {}

        res += (i > 0 ? "," : "") + std::to_string(first) + (j - i > 1 ? "-" + std::to_string(first + (int32_t) (j - i) - 1) : "");
    }
    return res;
}

bool common_adapter_mem::set(llama_model * model) const {
    if (!sidecar) {
        return true;
    }

    char err[1024];
    if (!llama_model_set_adapter_mem(model, sidecar.get(), mode, err, sizeof(err))) {
        LOG_ERR("rwkv-ms: %s\n", err);
        return false;
    }

    // here and not in libllama, whose own lines are not shown by default
    llama_adapter_mem_info info;
    if (llama_model_adapter_mem_info(model, &info)) {
        LOG_INF("rwkv-ms: memory active: layers=%s rank=%u states=%u chunk=%u semantics=%u mode=%s sidecar=%s base=%s\n",
                adapter_mem_layers(model, info.n_layer).c_str(), info.rank, info.n_state, info.n_chunk, info.semantics,
                llama_adapter_mem_mode_name(info.mode), info.sidecar_sha256, info.base_sha256);
    }
    return true;
}

void common_adapter_mem::measure(const char * path_model, llama_model * model) {
    const common_adapter_mem * cur = adapter_mem_current;
    if (!cur || cur->path_model != path_model) {
        return;
    }
    // a base that it does not fit is refused by set(), with the weights loaded
    char err[1024];
    if (!llama_model_set_adapter_mem(model, cur->sidecar_measure.get(), cur->mode, err, sizeof(err))) {
        LOG_WRN("rwkv-ms: measuring without the sidecar: %s\n", err);
    }
}
