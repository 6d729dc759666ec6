#include "common-adapter-mem.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

// common_fit_params loads models by path only; it is not thread safe itself
static thread_local common_adapter_mem * adapter_mem_current = nullptr;

// the flags were named for the first kind of memory
static const char * adapter_mem_env(const char * name, const char * name_old) {
    return !std::getenv(name) && std::getenv(name_old) ? name_old : name;
}

std::vector<common_arg> common_adapter_mem_args(const common_params & params) {
    std::vector<common_arg> res;

    res.push_back(common_arg(
            { "--rwkv-ms-sidecar", "--memory-adapter" }, "FNAME",
            "path to the memory adapter (a sidecar GGUF) of the model",
            [](common_params & params, const std::string & value) {
                params.adapter_mem_sidecar = value;
            }).set_env(adapter_mem_env("LLAMA_ARG_MEMORY_ADAPTER", "LLAMA_ARG_RWKV_MS_SIDECAR")));

    res.push_back(common_arg(
            { "--rwkv-ms-mode", "--memory-mode" }, "{serial,fused,batched}",
            string_format("contexts that the memory may have: serial (one sequence, -ub 1), fused (one sequence) or batched (default: %s)", params.adapter_mem_mode.c_str()),
            [](common_params & params, const std::string & value) {
                if (llama_adapter_mem_mode_from_name(value.c_str()) < 0) {
                    throw std::invalid_argument("must be serial, fused or batched");
                }
                params.adapter_mem_mode = value;
            }).set_env(adapter_mem_env("LLAMA_ARG_MEMORY_MODE", "LLAMA_ARG_RWKV_MS_MODE")));

    res.push_back(common_arg(
            { "--rwkv-ms-untested", "--memory-untested" },
            "warn instead of refusing if no test is about a memory on the architecture of the model",
            [](common_params & params) {
                params.adapter_mem_untested = true;
            }).set_env(adapter_mem_env("LLAMA_ARG_MEMORY_UNTESTED", "LLAMA_ARG_RWKV_MS_UNTESTED")));

    return res;
}

static std::string adapter_mem_refusal(const common_params & params) {
    const int32_t mode = llama_adapter_mem_mode_from_name(params.adapter_mem_mode.c_str());
    if (mode < 0) {
        return string_format("--memory-mode %s: must be serial, fused or batched", params.adapter_mem_mode.c_str());
    }

    // as llama_context does it
    const int32_t n_ubatch = std::min(params.n_batch, params.n_ubatch == 0 ? params.n_batch : params.n_ubatch);

    if (mode != LLAMA_ADAPTER_MEM_MODE_BATCHED && params.n_parallel > 1) {
        return string_format("--parallel %d: mode %s has one sequence, pass --parallel 1 or --memory-mode batched",
                params.n_parallel, params.adapter_mem_mode.c_str());
    }
    if (mode == LLAMA_ADAPTER_MEM_MODE_SERIAL && n_ubatch > 1) {
        return string_format("--ubatch-size %d: mode serial processes one token at a time, pass --ubatch-size 1 or "
                             "--memory-mode fused",
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
        LOG_ERR("memory: refused with --memory-adapter: %s\n", refusal.c_str());
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
    untested   = params.adapter_mem_untested;
    path_model = params.model.path;

    char err[1024];
    sidecar.reset(llama_adapter_mem_sidecar_init(params.adapter_mem_sidecar.c_str(), path_model.c_str(), err, sizeof(err)));
    sidecar_measure.reset(sidecar ? llama_adapter_mem_sidecar_init(params.adapter_mem_sidecar.c_str(), nullptr, err, sizeof(err)) : nullptr);
    if (!sidecar || !sidecar_measure) {
        LOG_ERR("memory: %s\n", err);
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
    if (!llama_model_set_adapter_mem(model, sidecar.get(), mode, untested, err, sizeof(err))) {
        LOG_ERR("memory: %s\n", err);
        return false;
    }

    // here and not in libllama, whose own lines are not shown by default
    llama_adapter_mem_info info;
    if (llama_model_adapter_mem_info(model, &info)) {
        LOG_INF("memory: memory active: kind=%s layers=%s rank=%u states=%u chunk=%u semantics=%u mode=%s sidecar=%s base=%s\n",
                info.kind, adapter_mem_layers(model, info.n_layer).c_str(), info.rank, info.n_state, info.n_chunk, info.semantics,
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
    if (!llama_model_set_adapter_mem(model, cur->sidecar_measure.get(), cur->mode, cur->untested, err, sizeof(err))) {
        LOG_WRN("memory: measuring without the sidecar: %s\n", err);
    }
}
