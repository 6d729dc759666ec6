#include "llama-rwkv-ms-memory.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

//
// llama_memory_rwkv_ms
//

llama_memory_rwkv_ms::llama_memory_rwkv_ms(
        const llama_model &     model,
        const llama_rwkv_ms &   weights,
        ggml_type               type_k,
        ggml_type               type_v,
        bool                    v_trans,
        bool                    offload,
        bool                    swa_full,
        bool                    unified,
        uint32_t                kv_size,
        uint32_t                n_seq_max,
        uint32_t                n_ubatch,
        uint32_t                n_pad,
        const layer_filter_cb & filter,
        const layer_reuse_cb &  reuse) :
    llama_kv_cache_iswa(model, type_k, type_v, v_trans, offload, swa_full, unified,
            kv_size, n_seq_max, n_ubatch, n_pad, nullptr, filter, reuse, nullptr),
    model(model), weights(weights),
    n_cells(n_seq_max), n_cell(ggml_rwkv_ms_n_cell(&weights.params)) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (const auto & layer : weights.layers) {
        auto * buft = offload ? llama_rwkv_ms_buft_op(model, weights.params, layer.il) : ggml_backend_cpu_buffer_type();

        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ctx = llama_rwkv_ms_ctx(weights.layers.size());
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

llama_memory_context_ptr llama_memory_rwkv_ms::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
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

llama_memory_context_ptr llama_memory_rwkv_ms::init_update(llama_context * lctx, bool optimize) {
    if (!pending.empty()) {
        llama_synchronize(lctx);
        flush();
    }

    return llama_kv_cache_iswa::init_update(lctx, optimize);
}

void llama_memory_rwkv_ms::clear(bool data) {
    llama_kv_cache_iswa::clear(data);

    // even without data: an empty sequence has an empty memory
    zero(-1);
}

llama_memory_rwkv_ms::rm_type llama_memory_rwkv_ms::get_rm_type(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    // the state is that of the SWA cache's last position; after a checkpoint the base cache can hold later ones
    const llama_pos pos_min = get_base()->seq_pos_min(seq_id);
    const llama_pos pos_max = seq_pos_max(seq_id);

    if (p0 <= std::max(0, pos_min) && p1 > pos_max) {
        return RM_FULL;
    }
    return p0 <= pos_max && pos_max < p1 ? RM_REFUSE : RM_KEEP;
}

bool llama_memory_rwkv_ms::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (p0 < 0) {
        p0 = 0;
    }
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
        if (get_rm_type(s, p0, p1) == RM_FULL) {
            zero(s);
        }
    }

    return llama_kv_cache_iswa::seq_rm(seq_id, p0, p1);
}

void llama_memory_rwkv_ms::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const bool has_tail = p1 < 0 || p1 > seq_pos_max(seq_id_src);

    llama_kv_cache_iswa::seq_cp(seq_id_src, seq_id_dst, p0, p1);

    if ((uint32_t) seq_id_src >= n_cells || (uint32_t) seq_id_dst >= n_cells) {
        return;
    }

    if (has_tail) {
        pending.push_back({ seq_id_src, seq_id_dst });
    } else {
        LLAMA_LOG_ERROR("%s: [%d, %d) does not hold the end of sequence %d: sequence %d starts with an empty memory\n",
                __func__, p0, p1, seq_id_src, seq_id_dst);
        zero(seq_id_dst);
    }
}

void llama_memory_rwkv_ms::seq_keep(llama_seq_id seq_id) {
    llama_kv_cache_iswa::seq_keep(seq_id);

    for (uint32_t s = 0; s < n_cells; ++s) {
        if ((llama_seq_id) s != seq_id) {
            zero(s);
        }
    }
}

llama_pos llama_memory_rwkv_ms::seq_pos_min(llama_seq_id seq_id) const {
    // nothing before the end can be returned to
    return seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_memory_rwkv_ms::memory_breakdown() const {
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

void llama_memory_rwkv_ms::zero(llama_seq_id seq_id) {
    if (seq_id < 0) {
        pending.clear(); // whatever was to be done is undone by this
    }
    for (uint32_t s = 0; s < n_cells; ++s) {
        if (seq_id < 0 || seq_id == (llama_seq_id) s) {
            pending.push_back({ -1, (int32_t) s });
        }
    }
}

void llama_memory_rwkv_ms::flush() {
    const size_t size = n_cell * sizeof(float);

    std::vector<float> data(n_cell);

    for (const auto & op : pending) {
        for (auto * state : states) {
            if (op.src < 0) {
                std::fill(data.begin(), data.end(), 0.0f);
            } else {
                ggml_backend_tensor_get(state, data.data(), op.src * size, size);
            }
            ggml_backend_tensor_set(state, data.data(), op.dst * size, size);
        }
    }

    pending.clear();
}

std::vector<float> llama_memory_rwkv_ms::get_cell(uint32_t cell) const {
    // the cell whose content this one has once all is applied, -1 if it is zero
    int32_t src = cell;
    for (auto it = pending.rbegin(); it != pending.rend() && src >= 0; ++it) {
        if (it->dst == src) {
            src = it->src;
        }
    }

    std::vector<float> res(states.size() * n_cell, 0.0f);

    if (src >= 0) {
        for (size_t i = 0; i < states.size(); ++i) {
            ggml_backend_tensor_get(states[i], res.data() + i * n_cell, src * n_cell * sizeof(float), n_cell * sizeof(float));
        }
    }
    return res;
}

void llama_memory_rwkv_ms::set_cell(uint32_t cell, const std::vector<float> & data) {
    GGML_ASSERT(data.size() == states.size() * n_cell);

    flush();

    for (size_t i = 0; i < states.size(); ++i) {
        ggml_backend_tensor_set(states[i], data.data() + i * n_cell, cell * n_cell * sizeof(float), n_cell * sizeof(float));
    }
}

std::string llama_memory_rwkv_ms::check_cell(const float * data) const {
    const float n_period = (float) weights.params.n_state * weights.params.n_chunk;

    for (size_t i = 0; i < states.size(); ++i, data += n_cell) {
        for (int64_t j = 0; j < n_cell; ++j) {
            if (!std::isfinite(data[j])) {
                return format("layer %d: value %lld is not finite", weights.layers[i].il, (long long) j);
            }
        }

        const float n_lo = data[n_cell - 2];
        const float n_hi = data[n_cell - 1];

        if (n_lo < 0 || n_lo >= n_period || n_lo != std::floor(n_lo) || n_hi < 0 || n_hi != std::floor(n_hi)) {
            return format("layer %d: the token counter is out of range", weights.layers[i].il);
        }
    }
    return "";
}

//
// state
//

// what precedes the cells in a saved state, little-endian
struct llama_rwkv_ms_state_header {
    char     magic[4]; // RMVS
    uint32_t version;
    uint32_t n_layer;
    uint32_t n_cell;   // elements of a cell of one layer
    uint32_t n_cells;
    char     fingerprint[64];
};

static llama_rwkv_ms_state_header llama_rwkv_ms_state_header_init(const llama_rwkv_ms & weights, uint32_t n_cells) {
    llama_rwkv_ms_state_header res;

    memcpy(res.magic, "RMVS", sizeof(res.magic));
    memcpy(res.fingerprint, weights.info.fingerprint, sizeof(res.fingerprint));

    res.version = 1;
    res.n_layer = weights.info.n_layer;
    res.n_cell  = ggml_rwkv_ms_n_cell(&weights.params);
    res.n_cells = n_cells;

    return res;
}

void llama_memory_rwkv_ms::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id >= (llama_seq_id) n_cells) {
        throw std::runtime_error(format("rwkv-ms: there is no sequence %d", seq_id));
    }

    // the memory comes first, so that a state that does not fit is refused before the KV cache is touched
    const auto header = llama_rwkv_ms_state_header_init(weights, seq_id < 0 ? n_cells : 1);

    io.write(&header, sizeof(header));

    for (uint32_t s = 0; s < header.n_cells; ++s) {
        const auto data = get_cell(seq_id < 0 ? s : seq_id);

        io.write(data.data(), data.size() * sizeof(float));
    }

    llama_kv_cache_iswa::state_write(io, seq_id, flags);
}

void llama_memory_rwkv_ms::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id >= (llama_seq_id) n_cells) {
        throw std::runtime_error(format("rwkv-ms: there is no sequence %d", seq_id));
    }

    const auto expected = llama_rwkv_ms_state_header_init(weights, seq_id < 0 ? n_cells : 1);

    llama_rwkv_ms_state_header header;
    io.read(&header, sizeof(header));

    if (memcmp(header.magic, expected.magic, sizeof(header.magic)) != 0) {
        throw std::runtime_error("rwkv-ms: the state has no memory in it (saved without a sidecar?)");
    }
    if (header.version != expected.version) {
        throw std::runtime_error(format("rwkv-ms: state version %u, this build reads %u", header.version, expected.version));
    }
    if (memcmp(header.fingerprint, expected.fingerprint, sizeof(header.fingerprint)) != 0) {
        throw std::runtime_error("rwkv-ms: the state belongs to another sidecar or base");
    }
    if (header.n_layer != expected.n_layer || header.n_cell != expected.n_cell || header.n_cells != expected.n_cells) {
        throw std::runtime_error(format("rwkv-ms: the state has %u layers, %u values, %u sequences; expected %u, %u, %u",
                header.n_layer, header.n_cell, header.n_cells, expected.n_layer, expected.n_cell, expected.n_cells));
    }

    std::vector<std::vector<float>> cells(header.n_cells, std::vector<float>(states.size() * n_cell));

    for (auto & data : cells) {
        io.read(data.data(), data.size() * sizeof(float));

        const std::string what = check_cell(data.data());
        if (!what.empty()) {
            throw std::runtime_error("rwkv-ms: bad state: " + what);
        }
    }

    try {
        llama_kv_cache_iswa::state_read(io, seq_id, flags);
    } catch (...) {
        // the KV cache has dropped some of the sequence, the memory of it cannot stay
        if (seq_id < 0) {
            clear(true);
        } else {
            seq_rm(seq_id, -1, -1);
        }
        throw;
    }

    for (uint32_t s = 0; s < header.n_cells; ++s) {
        set_cell(seq_id < 0 ? s : seq_id, cells[s]);
    }
}

//
// interface
//

static llama_memory_rwkv_ms * llama_rwkv_ms_get_memory(llama_context * ctx, llama_seq_id seq_id, uint32_t i) {
    auto * mem = dynamic_cast<llama_memory_rwkv_ms *>(llama_get_memory(ctx));

    if (!mem || seq_id < 0 || (uint32_t) seq_id >= mem->get_n_cells() || i >= mem->get_weights().info.n_layer) {
        return nullptr;
    }
    return mem;
}

int64_t llama_rwkv_ms_get_state(llama_context * ctx, llama_seq_id seq_id, uint32_t i, float * S, float * prev) {
    const auto * mem = llama_rwkv_ms_get_memory(ctx, seq_id, i);
    if (!mem) {
        return -1;
    }

    llama_synchronize(ctx);

    const auto & params = mem->get_weights().params;
    const auto   cell   = mem->get_cell(seq_id);

    return ggml_rwkv_ms_cell_get(&params, cell.data() + i * ggml_rwkv_ms_n_cell(&params), S, prev);
}

bool llama_rwkv_ms_set_state(llama_context * ctx, llama_seq_id seq_id, uint32_t i, const float * S, const float * prev, int64_t n_tokens) {
    auto * mem = llama_rwkv_ms_get_memory(ctx, seq_id, i);
    if (!mem || n_tokens < 0) {
        return false;
    }

    llama_synchronize(ctx);

    const auto & params = mem->get_weights().params;
    auto         cell   = mem->get_cell(seq_id);

    ggml_rwkv_ms_cell_set(&params, cell.data() + i * ggml_rwkv_ms_n_cell(&params), S, prev, n_tokens);

    if (!mem->check_cell(cell.data()).empty()) {
        return false;
    }
    mem->set_cell(seq_id, cell);
    return true;
}
