#include "llama-memory-adapter.h"

#include "llama-adapter-mem-state.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

// Saved states of llama_memory_adapter: the block of the memory, then what the inner memory writes.

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

// A plain KV cache has all of its text, whatever comes after it: what a checkpoint needs of it is where the text ended.
static bool adapter_mem_is_end(const llama_memory_i * inner, llama_state_seq_flags flags) {
    return (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) && dynamic_cast<const llama_kv_cache *>(inner);
}

void llama_memory_adapter::inner_state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (!adapter_mem_is_end(inner.get(), flags)) {
        inner->state_write(io, seq_id, flags);
        return;
    }
    const llama_pos pos_max = inner->seq_pos_max(seq_id);
    io.write(&pos_max, sizeof(pos_max));
}

// puts back what a state_read() changes before it fails: cells, but no data, which a deferred reader sets at its end
static std::function<void()> adapter_mem_backup(llama_memory_i * inner) {
    if (auto * kv = dynamic_cast<llama_kv_cache *>(inner)) {
        return [kv, cells = kv->state_backup()] { kv->state_rollback(cells); };
    }
    if (auto * kv = dynamic_cast<llama_kv_cache_iswa *>(inner)) {
        return [base = adapter_mem_backup(kv->get_base()), swa = adapter_mem_backup(kv->get_swa())] { base(), swa(); };
    }
    return nullptr;
}

void llama_memory_adapter::inner_state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, uint64_t n_bytes) {
    if (adapter_mem_is_end(inner.get(), flags)) {
        llama_pos pos_max = -1;
        io.read(&pos_max, sizeof(pos_max));
        if (n_bytes != sizeof(pos_max) || pos_max > inner->seq_pos_max(seq_id)) {
            llama_adapter_mem_state_fail("state-kv", "the KV cache does not have the text of the state any more: everything is as before");
        }
        inner->seq_rm(seq_id, pos_max + 1, -1);
        return;
    }

    const auto rollback = adapter_mem_backup(inner.get());
    try {
        const size_t i_kv = io.n_bytes();

        inner->state_read(io, seq_id, flags);

        if (io.n_bytes() - i_kv != n_bytes) {
            throw std::runtime_error(format("it has %zu bytes, not %llu", io.n_bytes() - i_kv, (unsigned long long) n_bytes));
        }
    } catch (const std::exception & e) {
        if (rollback) {
            rollback();
        } else if (seq_id < 0) {
            clear(true);
        } else {
            seq_rm(seq_id, -1, -1);
        }
        llama_adapter_mem_state_fail("state-kv", "the KV cache does not take the state (%s): %s", e.what(),
                rollback ? "everything is as before" : "what it was for is empty");
    }
}

void llama_memory_adapter::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id >= (llama_seq_id) n_cells) {
        throw std::runtime_error(format("memory adapter: there is no sequence %d", seq_id));
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
        inner_state_write(count, seq_id, flags);
    }

    // the memory comes first, so that a state that does not fit is refused before the KV cache is touched
    const auto setting = seq_id < 0 || kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY ? llama_adapter_mem_setting() : llama_adapter_mem_setting{ seqs[seq_id].params.scale, seqs[seq_id].params.frozen, seqs[seq_id].params.tag };

    const auto block = llama_adapter_mem_block_write(adapter, kind, cells, origins, setting, count.n_bytes());

    io.write(block.data(), block.size());

    if (kind != LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
        inner_state_write(io, seq_id, flags);
    }
}

void llama_memory_adapter::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id >= (llama_seq_id) n_cells) {
        throw std::runtime_error(format("memory adapter: there is no sequence %d", seq_id));
    }

    const uint32_t kind = llama_adapter_mem_block_kind_of(seq_id, flags);

    const uint32_t s0 = seq_id < 0 ? 0 : seq_id;
    const uint32_t s1 = seq_id < 0 ? n_cells : seq_id + 1;

    llama_adapter_mem_block_header header;
    io.read(&header, sizeof(header));
    llama_adapter_mem_block_check(adapter, header, kind, s1 - s0);

    std::vector<float> cells(llama_adapter_mem_block_n_cells(header) * states.size() * n_cell);
    io.read(cells.data(), cells.size() * sizeof(float));
    llama_adapter_mem_block_check_cells(adapter, header, cells);

    if (kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
        // the text of the sequence is not the one that this memory is of
        seq_rm(seq_id, -1, -1);
    } else {
        inner_state_read(io, seq_id, flags, header.n_bytes_kv);
    }

    const size_t n = states.size() * n_cell;
    for (uint32_t s = s0; s < s1; ++s) {
        const auto cell = cells.begin() + (s - s0) * n;

        set_cell(s, { cell, cell + n });

        if (kind == LLAMA_ADAPTER_MEM_BLOCK_SEQ) {
            const auto setting = llama_adapter_mem_block_setting(header);
            seqs[s].params     = { setting.frozen != 0, setting.scale, setting.tag };
        }

        if (kind != LLAMA_ADAPTER_MEM_BLOCK_PARTIAL) {
            seqs[s].pos_min = 0; // it is not saved
        }

        seqs[s].origin.clear();
        if (kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY) {
            seqs[s].origin.assign(cell, cell + n);
        } else if (header.flags & LLAMA_ADAPTER_MEM_BLOCK_ORIGIN) {
            seqs[s].origin.assign(cell + (s1 - s0) * n, cell + (s1 - s0 + 1) * n);
        }
    }
}
