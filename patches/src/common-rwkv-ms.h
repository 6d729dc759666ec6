#pragma once

// The RWKV-MS memory of the programs that take common_params, see llama-rwkv-ms.h.

#include "llama-rwkv-ms.h"

#include <memory>
#include <string>

struct common_params;

struct common_rwkv_ms_sidecar_deleter {
    void operator()(llama_rwkv_ms_sidecar * sidecar) { llama_rwkv_ms_sidecar_free(sidecar); }
};

typedef std::unique_ptr<llama_rwkv_ms_sidecar, common_rwkv_ms_sidecar_deleter> common_rwkv_ms_sidecar_ptr;

// false, with the reason in the log, if the parameters cannot work with the memory that they ask for
bool common_rwkv_ms_check(const common_params & params);

// A sidecar on its way into a model. All of it does nothing without params.rwkv_ms_sidecar.
struct common_rwkv_ms {
    common_rwkv_ms() = default;
    ~common_rwkv_ms();

    common_rwkv_ms(const common_rwkv_ms &)             = delete;
    common_rwkv_ms & operator=(const common_rwkv_ms &) = delete;

    // Before the model is loaded: checks the parameters, reads the sidecar and starts to hash the base.
    // From here on, until this object goes, common_fit_params measures params.model.path with the sidecar.
    bool init(const common_params & params);

    // after it is loaded, before its first context
    bool set(llama_model * model) const;

    // gives a model that is only measured the sidecar of this thread's current common_rwkv_ms, if it is for that path
    static void measure(const char * path_model, llama_model * model);

private:
    common_rwkv_ms_sidecar_ptr sidecar;
    common_rwkv_ms_sidecar_ptr sidecar_measure; // not bound to a base: nothing waits for the hash

    std::string        path_model;
    llama_rwkv_ms_mode mode = LLAMA_RWKV_MS_MODE_SERIAL;

    common_rwkv_ms * prev = nullptr;
};
