// Which bases a sidecar is refused for: the checks that need the model's hyper-parameters, and nothing else of it.

#include "llama-arch.h"
#include "llama-model.h"
#include "llama-adapter-mem-sidecar.h"
#include "models/models.h"

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

static int n_failed = 0;

// layer 0 slides, layer 1 is full attention, layer 2 shares the keys and values of layer 0
static void init_model(llama_model_gemma4 & model) {
    auto & hparams = model.hparams;

    model.arch = LLM_ARCH_GEMMA4;
    model.layers.resize(3);

    hparams.n_embd                = 64;
    hparams.n_layer_all           = 3;
    hparams.n_layer_kv_from_start = 2;
    hparams.n_embd_head_k_full = hparams.n_embd_head_v_full = 32;
    hparams.n_embd_head_k_swa = hparams.n_embd_head_v_swa = 16;

    for (int il = 0; il < 3; ++il) {
        hparams.n_head_arr[il]    = 4;
        hparams.n_head_kv_arr[il] = 2;
        hparams.is_swa_impl[il]   = il != 1;
    }

    static ggml_tensor wv; // only whether there is one is looked at
    for (auto & layer : model.layers) {
        layer.wv = &wv;
    }
}

static void init_sidecar(llama_adapter_mem_sidecar & sidecar) {
    sidecar.path      = "test.gguf";
    sidecar.format    = 2;
    sidecar.base_arch = "gemma4";
    sidecar.n_embd    = 64;
    sidecar.head[0]   = true; // q
    sidecar.head[3]   = true; // o

    sidecar.layers.resize(2);
    sidecar.layers[0] = { 0, true, { 64, 32, 32, 64 }, {} };
    sidecar.layers[1] = { 1, false, { 128, 64, 64, 64 }, {} };
}

using edit_func = std::function<void(llama_adapter_mem_sidecar &, llama_model_gemma4 &)>;

// text == "": accepted
static void expect(const std::string & reason, const std::string & text, const edit_func & edit) {
    llama_model_gemma4        model(llama_model_default_params());
    llama_adapter_mem_sidecar sidecar;

    init_model(model);
    init_sidecar(sidecar);
    edit(sidecar, model);

    std::string err;
    try {
        llama_adapter_mem_sidecar_check_model(sidecar, model);
    } catch (const std::runtime_error & e) {
        err = e.what();
    }

    if (text.empty() ? !err.empty() : err.find(text) == std::string::npos || err.rfind("sidecar 'test.gguf': [" + reason + "] ", 0) != 0) {
        printf("FAIL expected [%s] '%s', got '%s'\n", reason.c_str(), text.c_str(), err.c_str());
        n_failed++;
    }
}

int main() {
    using sidecar_t = llama_adapter_mem_sidecar;
    using model_t   = llama_model_gemma4;

    expect("", "", [](sidecar_t &, model_t &) {});
    expect("", "", [](sidecar_t & s, model_t &) { s.head[1] = s.head[2] = true; });
    expect("", "", [](sidecar_t & s, model_t &) { s.layers[1] = { 2, true, { 64, 0, 0, 64 }, {} }; }); // no k and v of its own
    expect("", "", [](sidecar_t &, model_t & m) { m.gguf_kv["split.count"] = "3"; }); // bound as a whole, by its launcher

    expect("base-architecture", "architecture 'llama'", [](sidecar_t &, model_t & m) { m.arch = LLM_ARCH_LLAMA; });
    expect("base-shape", "hidden size 64", [](sidecar_t & s, model_t &) { s.n_embd = 128; });
    expect("base-shape", "target layer 3 is out of", [](sidecar_t & s, model_t &) { s.layers[1].il = 3; });
    expect("base-shape", "layer 0 is full attention", [](sidecar_t & s, model_t &) { s.layers[0].is_swa = false; });
    expect("base-shape", "q_out of layer 0 is 63", [](sidecar_t & s, model_t &) { s.layers[0].width[0] = 63; });
    expect("base-shape", "k_out of layer 1 is 0", [](sidecar_t & s, model_t &) { s.layers[1].width[1] = 0; });
    expect("base-shape", "v_out of layer 1 is 32", [](sidecar_t & s, model_t &) { s.layers[1].width[2] = 32; });
    expect("base-shape", "o_out of layer 1 is 128", [](sidecar_t & s, model_t &) { s.layers[1].width[3] = 128; });

    // version 3: what decides are the widths, and the order of rows has to be the base's
    expect("", "", [](sidecar_t & s, model_t &) {
        s.format           = 3;
        s.layers[0].is_swa = false;
    });
    expect("base-shape", "has 3 layers, the sidecar is for all of 2", [](sidecar_t & s, model_t &) { s.all_layers = true; });
    expect("base-rows", "in the order 'hf' in gemma4, the sidecar says 'norm'", [](sidecar_t & s, model_t &) { s.rope_head_dim = 16; });
    const auto norm = [](sidecar_t & s, model_t & m) {
        m.arch          = LLM_ARCH_SMOLLM3;
        s.base_arch     = "smollm3";
        s.format        = 3;
        s.rope_head_dim = 16;
        s.layers.pop_back(); // heads of one width
    };
    expect("", "", norm);
    expect("base-rows", "in the order 'norm' in smollm3, the sidecar says 'hf'", [&](sidecar_t & s, model_t & m) {
        norm(s, m);
        s.rope_head_dim = 0;
    });
    expect("base-rows", "has 16 rows, the sidecar's rows are permuted in heads of 8", [&](sidecar_t & s, model_t & m) {
        norm(s, m);
        s.rope_head_dim = 8;
    });

    expect("base-heads", "delta head k is active on layer 2", [](sidecar_t & s, model_t &) {
        s.head[1]   = true;
        s.layers[1] = { 2, true, { 64, 32, 32, 64 }, {} };
    });
    expect("base-heads", "no v projection of its own", [](sidecar_t & s, model_t & m) {
        s.head[2]      = true;
        m.layers[1].wv = nullptr;
    });

    printf(n_failed ? "%d checks failed\n" : "all tests passed\n", n_failed);
    return n_failed ? 1 : 0;
}
