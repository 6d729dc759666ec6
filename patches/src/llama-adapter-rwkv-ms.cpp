#include "llama-adapter-mem-impl.h"

// RWKV-MS: a token's source is mixed with the one before it and goes through the core of an RWKV-7 layer. A head has several
// states: one is written at a time, all are read.

llama_adapter_mem_core llama_adapter_mem_core_rwkv_ms(const llama_adapter_mem_hparams & hparams) {
    llama_adapter_mem_core res(hparams);

    res.params.n_state    = hparams.n_state;
    res.params.n_chunk    = hparams.n_chunk;
    res.params.n_lora     = hparams.n_lora;
    res.params.semantics  = hparams.semantics;
    res.params.erase_gate = hparams.erase_gate;

    res.names_in = { "mem_v" };

    res.names = { "rwkv.x_r", "rwkv.x_w", "rwkv.x_k", "rwkv.x_v", "rwkv.x_a", "rwkv.x_g", "rwkv.w0", "rwkv.a0", "rwkv.k_k", "rwkv.k_a",
        "rwkv.ln_x.weight", "rwkv.w1", "rwkv.a1", "rwkv.g1", "rwkv.w2", "rwkv.a2", "rwkv.g2" };

    res.names_transposed = { "rwkv.receptance.weight", "rwkv.key.weight", "rwkv.value.weight", "rwkv.output.weight" };

    return res;
}
