#include "llama-memory-adapter.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

//
// llama_memory_adapter
//

// of a batch that is refused
class llama_memory_adapter_context : public llama_memory_context_i {
public:
    bool next() override { return false; }
    bool apply() override { return false; }

    const llama_ubatch & get_ubatch() const override { return ubatch; }

    llama_memory_status get_status() const override { return LLAMA_MEMORY_STATUS_FAILED_COMPUTE; }

private:
    const llama_ubatch ubatch = {};
};

llama_memory_adapter::llama_memory_adapter(
        const llama_model &       model,
        const llama_adapter_mem & adapter,
        llama_memory_ptr          inner,
        bool                      offload,
        uint32_t                  n_seq_max) :
    model(model), adapter(adapter), inner(std::move(inner)),
    n_cells(n_seq_max), n_cell(adapter.core.n_cell()), seqs(n_seq_max) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (const auto & layer : adapter.layers) {
        auto * buft = offload ? llama_adapter_mem_buft_op(model, adapter.core.params, layer.il) : ggml_backend_cpu_buffer_type();

        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ctx = llama_adapter_mem_ctx(adapter.layers.size());
        }

        states.push_back(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_cell, n_cells));
        ggml_format_name(states.back(), "adapter_mem_state_l%d", layer.il);
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
            throw std::runtime_error("failed to allocate a buffer for the states of the memory");
        }

        LLAMA_LOG_INFO("%s: %10s memory state buffer size = %8.2f KiB\n", __func__,
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
            LLAMA_LOG_ERROR("%s: token %d belongs to %d sequences: with a memory a token belongs to one\n",
                    __func__, i, batch.n_seq_id[i]);
            return std::make_unique<llama_memory_adapter_context>();
        }

        const llama_seq_id seq_id = batch.seq_id[i][0];

        if ((uint32_t) seq_id >= n_cells) {
            LLAMA_LOG_ERROR("%s: seq_id[%d] = %d, but the context was created for %u sequences\n", __func__, i, seq_id, n_cells);
            return std::make_unique<llama_memory_adapter_context>();
        }

        if (batch.pos[i] <= pos_last[seq_id]) {
            LLAMA_LOG_ERROR("%s: sequence %d goes back from position %d to %d: with a memory positions increase\n",
                    __func__, seq_id, pos_last[seq_id], batch.pos[i]);
            return std::make_unique<llama_memory_adapter_context>();
        }
        pos_last[seq_id] = batch.pos[i];
    }

    // due already, unless the caller left init_update() out, as training does: then nothing is being computed
    flush();

    std::vector<bool> is_new(n_cells);
    for (uint32_t s = 0; s < n_cells; ++s) {
        is_new[s] = inner->seq_pos_max(s) < 0;
    }
    for (int32_t i = batch.n_tokens - 1; i >= 0; --i) {
        if (is_new[batch.seq_id[i][0]]) {
            seqs[batch.seq_id[i][0]].pos_min = batch.pos[i];
        }
    }

    return inner->init_batch(balloc, n_ubatch, embd_all);
}

llama_memory_context_ptr llama_memory_adapter::init_full() {
    return inner->init_full();
}

llama_memory_context_ptr llama_memory_adapter::init_update(llama_context * lctx, bool optimize) {
    if (!pending.empty()) {
        // not llama_synchronize: it books tokens that are not computed yet
        ggml_backend_sched_synchronize(lctx->get_sched());
        flush();
    }

    return inner->init_update(lctx, optimize);
}

bool llama_memory_adapter::get_can_shift() const {
    return inner->get_can_shift();
}

void llama_memory_adapter::clear(bool data) {
    inner->clear(data);

    // even without data: an empty sequence has an empty memory
    zero(-1);
}

llama_memory_adapter::rm_type llama_memory_adapter::get_rm_type(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const llama_pos pos_min = seqs[seq_id].pos_min;
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

    std::vector<rm_type> types;
    for (llama_seq_id s = s0; s < s1; ++s) {
        types.push_back(get_rm_type(s, p0, p1));
        if (types.back() == RM_REFUSE) {
            LLAMA_LOG_DEBUG("%s: refused: [%d, %d) holds the end of sequence %d\n", __func__, p0, p1, s);
            return false;
        }
    }

    if (!inner->seq_rm(seq_id, p0, p1)) {
        return false;
    }

    for (llama_seq_id s = s0; s < s1; ++s) {
        switch (types[s - s0]) {
            case RM_FULL:
                zero(s);
                break;
            case RM_TEXT:
                rewind(s);
                break;
            default:
                if (p0 <= seqs[s].pos_min && seqs[s].pos_min < p1 && seq_pos_max(s) >= 0) {
                    seqs[s].pos_min = p1;
                }
                break;
        }
    }
    return true;
}

void llama_memory_adapter::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const bool has_tail = p1 < 0 || p1 > seq_pos_max(seq_id_src);

    inner->seq_cp(seq_id_src, seq_id_dst, p0, p1);

    if ((uint32_t) seq_id_src >= n_cells || (uint32_t) seq_id_dst >= n_cells) {
        return;
    }

    seqs[seq_id_dst]         = seqs[seq_id_src];
    seqs[seq_id_dst].pos_min = std::max(seqs[seq_id_src].pos_min, p0);

    if (has_tail) {
        pending.push_back({ seq_id_src, seq_id_dst, {} });
    } else {
        LLAMA_LOG_ERROR("%s: [%d, %d) does not hold the end of sequence %d: sequence %d starts with an empty memory\n",
                __func__, p0, p1, seq_id_src, seq_id_dst);
        zero(seq_id_dst);
    }
}

void llama_memory_adapter::seq_keep(llama_seq_id seq_id) {
    inner->seq_keep(seq_id);

    for (uint32_t s = 0; s < n_cells; ++s) {
        if ((llama_seq_id) s != seq_id) {
            zero(s);
        }
    }
}

void llama_memory_adapter::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    inner->seq_add(seq_id, p0, p1, shift);

    for (uint32_t s = 0; s < n_cells; ++s) {
        if ((seq_id < 0 || seq_id == (llama_seq_id) s) && p0 <= seqs[s].pos_min && (p1 < 0 || seqs[s].pos_min < p1)) {
            seqs[s].pos_min = std::max(0, seqs[s].pos_min + shift);
        }
    }
}

void llama_memory_adapter::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    inner->seq_div(seq_id, p0, p1, d);

    for (uint32_t s = 0; s < n_cells; ++s) {
        if ((seq_id < 0 || seq_id == (llama_seq_id) s) && p0 <= seqs[s].pos_min && (p1 < 0 || seqs[s].pos_min < p1)) {
            seqs[s].pos_min /= d;
        }
    }
}

llama_pos llama_memory_adapter::seq_pos_min(llama_seq_id seq_id) const {
    // nothing before the end can be returned to
    return seq_pos_max(seq_id);
}

llama_pos llama_memory_adapter::seq_pos_max(llama_seq_id seq_id) const {
    return inner->seq_pos_max(seq_id);
}

llama_memory_i * llama_memory_adapter::get_inner(llama_memory_i * mem) {
    auto * adapter = dynamic_cast<llama_memory_adapter *>(mem);

    return adapter ? adapter->inner.get() : mem;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_memory_adapter::memory_breakdown() const {
    auto res = inner->memory_breakdown();

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
