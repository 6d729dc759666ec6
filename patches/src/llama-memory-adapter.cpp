#include "llama-memory-adapter.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"
#include "llama-adapter-mem-state.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

//
// llama_memory_adapter
//

llama_memory_adapter::llama_memory_adapter(
        const llama_model &       model,
        const llama_adapter_mem & weights,
        ggml_type                 type_k,
        ggml_type                 type_v,
        bool                      v_trans,
        bool                      offload,
        bool                      swa_full,
        bool                      unified,
        uint32_t                  kv_size,
        uint32_t                  n_seq_max,
        uint32_t                  n_ubatch,
        uint32_t                  n_pad,
        const layer_filter_cb &   filter,
        const layer_reuse_cb &    reuse) :
    llama_kv_cache_iswa(model, type_k, type_v, v_trans, offload, swa_full, unified,
            kv_size, n_seq_max, n_ubatch, n_pad, nullptr, filter, reuse, nullptr),
    model(model), weights(weights),
    n_cells(n_seq_max), n_cell(ggml_rwkv_ms_n_cell(&weights.params)), seqs(n_seq_max) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (const auto & layer : weights.layers) {
        auto * buft = offload ? llama_adapter_mem_buft_op(model, weights.params, layer.il) : ggml_backend_cpu_buffer_type();

        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ctx = llama_adapter_mem_ctx(weights.layers.size());
        }

        states.push_back(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_cell, n_cells));
        ggml_format_name(states.back(), "rwkv_ms_state_l%d", layer.il);
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_ptr buf;
        if (model.hparams.no_alloc) {
            buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get();
            }
        } else {
            buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate a buffer for the rwkv-ms state");
        }

        LLAMA_LOG_INFO("%s: %10s RWKV-MS state buffer size = %8.2f KiB\n", __func__,
                ggml_backend_buft_name(buft), ggml_backend_buffer_get_size(buf.get()) / 1024.0);

        // NaN everywhere: a cell that is used before it was zeroed is found by the op's range check
        ggml_backend_buffer_clear(buf.get(), 0xff);

        ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    LLAMA_LOG_INFO("%s: size = %7.2f KiB (%u cells, %zu layers)\n", __func__,
            n_cell * sizeof(float) * n_cells * states.size() / 1024.0, n_cells, states.size());

    if (!model.hparams.no_alloc) {
        zero(-1);
        flush();
    }
}

llama_memory_context_ptr llama_memory_adapter::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    const llama_batch & batch = balloc.get_batch();

    std::vector<llama_pos> pos_last(n_cells, -1);

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.n_seq_id[i] != 1) {
            LLAMA_LOG_ERROR("%s: token %d belongs to %d sequences: with rwkv-ms memory a token belongs to one\n",
                    __func__, i, batch.n_seq_id[i]);
            return std::make_unique<llama_kv_cache_iswa_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
        }

        const llama_seq_id seq_id = batch.seq_id[i][0];

        if ((uint32_t) seq_id >= n_cells) {
            LLAMA_LOG_ERROR("%s: seq_id[%d] = %d, but the context was created for %u sequences\n", __func__, i, seq_id, n_cells);
            return std::make_unique<llama_kv_cache_iswa_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
        }

        if (batch.pos[i] <= pos_last[seq_id]) {
            LLAMA_LOG_ERROR("%s: sequence %d goes back from position %d to %d: with rwkv-ms memory positions increase\n",
                    __func__, seq_id, pos_last[seq_id], batch.pos[i]);
            return std::make_unique<llama_kv_cache_iswa_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
        }
        pos_last[seq_id] = batch.pos[i];
    }

    return llama_kv_cache_iswa::init_batch(balloc, n_ubatch, embd_all);
}

llama_memory_context_ptr llama_memory_adapter::init_update(llama_context * lctx, bool optimize) {
    if (!pending.empty()) {
        // not llama_synchronize: it books tokens that are not computed yet
        ggml_backend_sched_synchronize(lctx->get_sched());
        flush();
    }

    return llama_kv_cache_iswa::init_update(lctx, optimize);
}

void llama_memory_adapter::clear(bool data) {
    llama_kv_cache_iswa::clear(data);

    // even without data: an empty sequence has an empty memory
    zero(-1);
}

llama_memory_adapter::rm_type llama_memory_adapter::get_rm_type(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    // the state is that of the SWA cache's last position; after a checkpoint the base cache can hold later ones
    const llama_pos pos_min = get_base()->seq_pos_min(seq_id);
    const llama_pos pos_max = seq_pos_max(seq_id);

    if (p0 < 0 && p1 > pos_max) {
        return RM_FULL;
    }
    if (pos_max < 0) {
        return RM_KEEP;
    }
    if (p0 <= std::max(0, pos_min) && p1 > pos_max) {
        return RM_TEXT;
    }
    return p0 <= pos_max && pos_max < p1 ? RM_REFUSE : RM_KEEP;
}

bool llama_memory_adapter::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }

    const llama_seq_id s0 = seq_id < 0 ? 0 : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (llama_seq_id) n_cells : std::min(seq_id + 1, (llama_seq_id) n_cells);

    for (llama_seq_id s = s0; s < s1; ++s) {
        if (get_rm_type(s, p0, p1) == RM_REFUSE) {
            LLAMA_LOG_DEBUG("%s: refused: [%d, %d) holds the end of sequence %d\n", __func__, p0, p1, s);
            return false;
        }
    }

    for (llama_seq_id s = s0; s < s1; ++s) {
        switch (get_rm_type(s, p0, p1)) {
            case RM_FULL:
                zero(s);
                break;
            case RM_TEXT:
                rewind(s);
                break;
            default:
                break;
        }
    }

    return llama_kv_cache_iswa::seq_rm(seq_id, p0, p1);
}

void llama_memory_adapter::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const bool has_tail = p1 < 0 || p1 > seq_pos_max(seq_id_src);

    llama_kv_cache_iswa::seq_cp(seq_id_src, seq_id_dst, p0, p1);

    if ((uint32_t) seq_id_src >= n_cells || (uint32_t) seq_id_dst >= n_cells) {
        return;
    }

    seqs[seq_id_dst] = seqs[seq_id_src];

    if (has_tail) {
        pending.push_back({ seq_id_src, seq_id_dst, {} });
    } else {
        LLAMA_LOG_ERROR("%s: [%d, %d) does not hold the end of sequence %d: sequence %d starts with an empty memory\n",
                __func__, p0, p1, seq_id_src, seq_id_dst);
        zero(seq_id_dst);
    }
}

void llama_memory_adapter::seq_keep(llama_seq_id seq_id) {
    llama_kv_cache_iswa::seq_keep(seq_id);

    for (uint32_t s = 0; s < n_cells; ++s) {
        if ((llama_seq_id) s != seq_id) {
            zero(s);
        }
    }
}

llama_pos llama_memory_adapter::seq_pos_min(llama_seq_id seq_id) const {
    // nothing before the end can be returned to
    return seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_memory_adapter::memory_breakdown() const {
    auto res = llama_kv_cache_iswa::memory_breakdown();

    for (const auto & [ctx, buf] : ctxs_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());

        res[buft] += model.hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

//
// cells
//

void llama_memory_adapter::zero(llama_seq_id seq_id) {
    if (seq_id < 0) {
        pending.clear(); // whatever was to be done is undone by this
    }
    for (uint32_t s = 0; s < n_cells; ++s) {
        if (seq_id < 0 || seq_id == (llama_seq_id) s) {
            seqs[s].origin.clear();
            pending.push_back({ -1, (int32_t) s, {} });
        }
    }
}

void llama_memory_adapter::rewind(llama_seq_id seq_id) {
    pending.push_back({ -1, seq_id, seqs[seq_id].origin });
}

void llama_memory_adapter::start(llama_seq_id seq_id, const std::vector<float> & origin) {
    seq_rm(seq_id, -1, -1);

    seqs[seq_id].origin = origin;
    rewind(seq_id);
}

bool llama_memory_adapter::has_scale() const {
    return std::any_of(seqs.begin(), seqs.end(), [](const seq_info & seq) { return seq.params.scale != 1.0f; });
}

void llama_memory_adapter::flush() {
    const size_t size = n_cell * sizeof(float);

    std::vector<float> data(n_cell);

    for (const auto & op : pending) {
        for (size_t i = 0; i < states.size(); ++i) {
            if (op.src >= 0) {
                ggml_backend_tensor_get(states[i], data.data(), op.src * size, size);
            } else if (op.data.empty()) {
                std::fill(data.begin(), data.end(), 0.0f);
            } else {
                std::copy_n(op.data.begin() + i * n_cell, n_cell, data.begin());
            }
            ggml_backend_tensor_set(states[i], data.data(), op.dst * size, size);
        }
    }

    pending.clear();
}

std::vector<float> llama_memory_adapter::get_cell(uint32_t cell) const {
    std::vector<float> res(states.size() * n_cell, 0.0f);

    // the cell whose content this one has once all is applied, -1 if that is data
    int32_t src = cell;
    for (auto it = pending.rbegin(); it != pending.rend() && src >= 0; ++it) {
        if (it->dst == src) {
            src = it->src;
            if (src < 0 && !it->data.empty()) {
                res = it->data;
            }
        }
    }

    if (src >= 0) {
        for (size_t i = 0; i < states.size(); ++i) {
            ggml_backend_tensor_get(states[i], res.data() + i * n_cell, src * n_cell * sizeof(float), n_cell * sizeof(float));
        }
    }
    return res;
}

void llama_memory_adapter::set_cell(uint32_t cell, const std::vector<float> & data) {
    GGML_ASSERT(data.size() == states.size() * n_cell);

    flush();

    for (size_t i = 0; i < states.size(); ++i) {
        ggml_backend_tensor_set(states[i], data.data() + i * n_cell, cell * n_cell * sizeof(float), n_cell * sizeof(float));
    }
}

//
// state
//

// counts, to know the size of what follows before it is written
class llama_adapter_mem_io_count : public llama_io_write_i {
public:
    explicit llama_adapter_mem_io_count(bool skip_tensors) : skip_tensors(skip_tensors) {}

    void   write(const void *, size_t size) override { n += size; }
    void   write_tensor(ggml_tensor *, size_t, size_t size) override { n += skip_tensors ? 0 : size; }
    size_t n_bytes() override { return n; }

private:
    const bool skip_tensors;

    size_t n = 0;
};

void llama_memory_adapter::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id >= (llama_seq_id) n_cells) {
        throw std::runtime_error(format("rwkv-ms: there is no sequence %d", seq_id));
    }

    const uint32_t kind = llama_adapter_mem_block_kind_of(seq_id, flags);

    const uint32_t s0 = seq_id < 0 ? 0 : seq_id;
    const uint32_t s1 = seq_id < 0 ? n_cells : seq_id + 1;

    std::vector<float> cells, origins;

    bool has_origin = false;
    for (uint32_t s = s0; s < s1; ++s) {
        const auto   cell   = get_cell(s);
        const auto & origin = seqs[s].origin;

        cells.insert(cells.end(), cell.begin(), cell.end());
        origins.insert(origins.end(), origin.begin(), origin.end());
        origins.resize(cells.size(), 0.0f);

        has_origin = has_origin || !origin.empty();
    }
    if (!has_origin || kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
        origins.clear();
    }

    llama_adapter_mem_io_count count(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE);
    if (kind != LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
        llama_kv_cache_iswa::state_write(count, seq_id, flags);
    }

    // the memory comes first, so that a state that does not fit is refused before the KV cache is touched
    const auto setting = seq_id < 0 || kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY ? llama_adapter_mem_setting() : llama_adapter_mem_setting{ seqs[seq_id].params.scale, seqs[seq_id].params.frozen, seqs[seq_id].params.tag };

    const auto block = llama_adapter_mem_block_write(weights, kind, cells, origins, setting, count.n_bytes());

    io.write(block.data(), block.size());

    if (kind != LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
        llama_kv_cache_iswa::state_write(io, seq_id, flags);
    }
}

void llama_memory_adapter::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id >= (llama_seq_id) n_cells) {
        throw std::runtime_error(format("rwkv-ms: there is no sequence %d", seq_id));
    }

    const uint32_t kind = llama_adapter_mem_block_kind_of(seq_id, flags);

    const uint32_t s0 = seq_id < 0 ? 0 : seq_id;
    const uint32_t s1 = seq_id < 0 ? n_cells : seq_id + 1;

    llama_adapter_mem_block_header header;
    io.read(&header, sizeof(header));
    llama_adapter_mem_block_check(weights, header, kind, s1 - s0);

    std::vector<float> cells(llama_adapter_mem_block_n_cells(header) * states.size() * n_cell);
    io.read(cells.data(), cells.size() * sizeof(float));
    llama_adapter_mem_block_check_cells(weights, header, cells);

    if (kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
        // the text of the sequence is not the one that this memory is of
        seq_rm(seq_id, -1, -1);
    } else {
        // what the KV cache changes before it fails: cells, but no data, which a read of a buffer sets at its end
        const auto base = get_base()->state_backup();
        const auto swa  = get_swa()->state_backup();

        try {
            const size_t i_kv = io.n_bytes();

            llama_kv_cache_iswa::state_read(io, seq_id, flags);

            if (io.n_bytes() - i_kv != header.n_bytes_kv) {
                throw std::runtime_error(format("it has %zu bytes, not %llu", io.n_bytes() - i_kv, (unsigned long long) header.n_bytes_kv));
            }
        } catch (const std::exception & e) {
            get_base()->state_rollback(base);
            get_swa()->state_rollback(swa);

            llama_adapter_mem_state_fail("state-kv", "the KV cache does not take the state (%s): everything is as before", e.what());
        }
    }

    const size_t n = states.size() * n_cell;
    for (uint32_t s = s0; s < s1; ++s) {
        const auto cell = cells.begin() + (s - s0) * n;

        set_cell(s, { cell, cell + n });

        if (kind == LLAMA_ADAPTER_MEM_BLOCK_SEQ) {
            const auto setting = llama_adapter_mem_block_setting(header);
            seqs[s].params     = { setting.frozen != 0, setting.scale, setting.tag };
        }

        seqs[s].origin.clear();
        if (kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
            seqs[s].origin.assign(cell, cell + n);
        } else if (header.flags & LLAMA_ADAPTER_MEM_BLOCK_ORIGIN) {
            seqs[s].origin.assign(cell + (s1 - s0) * n, cell + (s1 - s0 + 1) * n);
        }
    }
}

//
// interface
//

static llama_memory_adapter * llama_adapter_mem_get_memory(llama_context * ctx, llama_seq_id seq_id, uint32_t i) {
    auto * mem = dynamic_cast<llama_memory_adapter *>(llama_get_memory(ctx));

    if (!mem || seq_id < 0 || (uint32_t) seq_id >= mem->get_n_cells() || i >= mem->get_weights().info.n_layer) {
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

    const auto & params = mem->get_weights().params;
    const auto   cell   = mem->get_cell(seq_id);

    return ggml_rwkv_ms_cell_get(&params, cell.data() + i * ggml_rwkv_ms_n_cell(&params), S, prev);
}

bool llama_adapter_mem_set_state(llama_context * ctx, llama_seq_id seq_id, uint32_t i, const float * S, const float * prev, int64_t n_tokens) {
    auto * mem = llama_adapter_mem_get_memory(ctx, seq_id, i);
    if (!mem || n_tokens < 0) {
        return false;
    }

    llama_synchronize(ctx);

    const auto & params = mem->get_weights().params;
    auto         cell   = mem->get_cell(seq_id);

    ggml_rwkv_ms_cell_set(&params, cell.data() + i * ggml_rwkv_ms_n_cell(&params), S, prev, n_tokens);

    if (!llama_adapter_mem_cell_check(mem->get_weights(), cell.data()).empty()) {
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
    if (!mem || (values && !llama_adapter_mem_cell_check(mem->get_weights(), values).empty())) {
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
