#include "llama-adapter-mem-impl.h"

// The delta rule: query, key and value are projections of the hidden state. A head has one state: it is read with the query,
// and what it holds at the key is replaced by the value. What is read is the output.

llama_adapter_mem_core llama_adapter_mem_core_delta_rule(const llama_adapter_mem_hparams & hparams) {
    llama_adapter_mem_core res(hparams);

    res.params.n_state      = 1;
    res.params.n_chunk      = hparams.n_chunk; // there is nothing to count but what is shown
    res.params.semantics    = 0;
    res.params.erase_gate   = 1.0f;
    res.params.normalize_qk = hparams.normalize_qk;

    res.names_in = { "mem_q", "mem_k", "mem_v" };

    return res;
}
