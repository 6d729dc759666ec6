#include "llama-adapter-mem-state.h"
#include "llama-context.h"
#include "llama-memory-adapter.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

// The memory of a sequence, for callers: see llama-adapter-mem.h.

static llama_memory_adapter * llama_adapter_mem_get_memory(llama_context * ctx, llama_seq_id seq_id, uint32_t i) {
    auto * mem = dynamic_cast<llama_memory_adapter *>(llama_get_memory(ctx));

    if (!mem || seq_id < 0 || (uint32_t) seq_id >= mem->get_n_cells() || i >= mem->get_adapter().info.n_layer) {
        return nullptr;
    }
    return mem;
}

int64_t llama_adapter_mem_get_state(llama_context * ctx, llama_seq_id seq_id, uint32_t i, float * S, float * prev) {
    const auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, i);
    if (!mem) {
        return -1;
    }

    llama_synchronize(ctx);

    const auto & params = mem->get_adapter().core.params;
    const auto   cell   = mem->get_cell(seq_id);

    return ggml_rwkv_ms_cell_get(&params, cell.data() + i * ggml_rwkv_ms_n_cell(&params), S, prev);
}

bool llama_adapter_mem_set_state(llama_context * ctx, llama_seq_id seq_id, uint32_t i, const float * S, const float * prev, int64_t n_tokens) {
    auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, i);
    if (!mem || n_tokens < 0) {
        return false;
    }

    llama_synchronize(ctx);

    const auto & params = mem->get_adapter().core.params;
    auto         cell   = mem->get_cell(seq_id);

    ggml_rwkv_ms_cell_set(&params, cell.data() + i * ggml_rwkv_ms_n_cell(&params), S, prev, n_tokens);

    if (!llama_adapter_mem_cell_check(mem->get_adapter(), cell.data()).empty()) {
        return false;
    }
    mem->set_cell(seq_id, cell);
    return true;
}

bool llama_adapter_mem_seq_get_values(llama_context * ctx, llama_seq_id seq_id, float * values) {
    const auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);
    if (!mem) {
        return false;
    }

    llama_synchronize(ctx);

    const auto cell = mem->get_cell(seq_id);
    std::copy(cell.begin(), cell.end(), values);
    return true;
}

bool llama_adapter_mem_seq_get_origin(llama_context * ctx, llama_seq_id seq_id, float * values) {
    const auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);
    if (!mem || mem->get_origin(seq_id).empty()) {
        return false;
    }

    if (values) {
        std::copy(mem->get_origin(seq_id).begin(), mem->get_origin(seq_id).end(), values);
    }
    return true;
}

bool llama_adapter_mem_seq_start(llama_context * ctx, llama_seq_id seq_id, const float * values) {
    auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);
    if (!mem || (values && !llama_adapter_mem_cell_check(mem->get_adapter(), values).empty())) {
        return false;
    }

    mem->start(seq_id, values ? std::vector<float>(values, values + llama_model_adapter_mem_n_values(llama_get_model(ctx))) : std::vector<float>());
    return true;
}

bool llama_adapter_mem_seq_reset(llama_context * ctx, llama_seq_id seq_id) {
    auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);
    if (!mem) {
        return false;
    }

    llama_synchronize(ctx);

    mem->set_cell(seq_id, std::vector<float>(mem->get_cell(seq_id).size(), 0.0f));
    mem->set_origin(seq_id, {});
    return true;
}

bool llama_adapter_mem_seq_set(llama_context * ctx, llama_seq_id seq_id, bool frozen, float scale) {
    auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);
    if (!mem || !std::isfinite(scale)) {
        return false;
    }
    mem->set_seq_params(seq_id, { frozen, scale, mem->get_seq_params(seq_id).tag });
    return true;
}

bool llama_adapter_mem_seq_get(llama_context * ctx, llama_seq_id seq_id, bool * frozen, float * scale) {
    const auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);
    if (!mem) {
        return false;
    }
    *frozen = mem->get_seq_params(seq_id).frozen;
    *scale  = mem->get_seq_params(seq_id).scale;
    return true;
}

bool llama_adapter_mem_seq_set_tag(llama_context * ctx, llama_seq_id seq_id, uint64_t tag) {
    auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);
    if (!mem) {
        return false;
    }
    const auto & params = mem->get_seq_params(seq_id);
    mem->set_seq_params(seq_id, { params.frozen, params.scale, tag });
    return true;
}

uint64_t llama_adapter_mem_seq_get_tag(llama_context * ctx, llama_seq_id seq_id) {
    const auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, 0);

    return mem ? mem->get_seq_params(seq_id).tag : 0;
}
