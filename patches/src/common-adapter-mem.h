#pragma once

// The memory of the programs that take common_params, see llama-adapter-mem.h.

#include "llama-adapter-mem.h"

#include <memory>
#include <string>
#include <vector>

struct common_arg;
struct common_params;

struct common_adapter_mem_sidecar_deleter {
    void operator()(llama_adapter_mem_sidecar * sidecar) { llama_adapter_mem_sidecar_free(sidecar); }
};

typedef std::unique_ptr<llama_adapter_mem_sidecar, common_adapter_mem_sidecar_deleter> common_adapter_mem_sidecar_ptr;

// the flags, with the defaults of params
std::vector<common_arg> common_adapter_mem_args(const common_params & params);

// false, with the reason in the log, if the parameters cannot work with the memory that they ask for
bool common_adapter_mem_check(const common_params & params);

// A sidecar on its way into a model. All of it does nothing without params.adapter_mem_sidecar.
struct common_adapter_mem {
    common_adapter_mem() = default;
    ~common_adapter_mem();

    common_adapter_mem(const common_adapter_mem &)             = delete;
    common_adapter_mem & operator=(const common_adapter_mem &) = delete;

    // Before the model is loaded: checks the parameters, reads the sidecar and starts to hash the base.
    // From here on, until this object goes, common_fit_params measures params.model.path with the sidecar.
    bool init(const common_params & params);

    // after it is loaded, before its first context
    bool set(llama_model * model) const;

    // gives a model that is only measured the sidecar of this thread's current common_adapter_mem, if it is for that path
    static void measure(const char * path_model, llama_model * model);

private:
    common_adapter_mem_sidecar_ptr sidecar;
    common_adapter_mem_sidecar_ptr sidecar_measure; // not bound to a base: nothing waits for the hash

    std::string            path_model;
    llama_adapter_mem_mode mode     = LLAMA_ADAPTER_MEM_MODE_SERIAL;
    bool                   untested = false;

    common_adapter_mem * prev = nullptr;
};
