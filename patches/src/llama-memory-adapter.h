#pragma once

// The states of a memory beside whatever memory the base has: a fixed state cell per sequence.
//
// The state is valid at one position only, the end of its sequence. What cannot be done with such a state is refused
// and changes nothing; what removes old text keeps the memory of it, which is what a memory is for.
//
// A sequence can start with a memory, its origin, instead of an empty one. Removing all of its text, seq_rm(0, -1), puts
// the memory back to the origin; removing the sequence, seq_rm(-1, -1), leaves nothing.

#include "llama-adapter-mem-impl.h"
#include "llama-memory.h"

#include <vector>

class llama_memory_adapter : public llama_memory_i {
public:
    llama_memory_adapter(
            const llama_model &       model,
            const llama_adapter_mem & adapter,
            llama_memory_ptr          inner,
            bool                      offload,
            uint32_t                  n_seq_max);

    //
    // llama_memory_i
    //

    // the contexts are those of the inner memory: its graph inputs cast them
    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t             n_ubatch,
            bool                 embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_memory_adapter specific API
    //

    // the memory of a model that shares another one's (cparams.ctx_other) takes what is inside; mem itself if it is no adapter
    static llama_memory_i * get_inner(llama_memory_i * mem);

    const llama_adapter_mem & get_adapter() const { return adapter; }

    uint32_t get_n_cells() const { return n_cells; }

    // the state of a target layer by its index in the sidecar, [n_cell, n_cells]
    ggml_tensor * get_state(uint32_t i) const { return states[i]; }

    // one cell of all target layers [n_layer, n_cell], with the pending operations applied; no computation may be running
    std::vector<float> get_cell(uint32_t cell) const;
    void               set_cell(uint32_t cell, const std::vector<float> & data);

    // what a sequence starts with, empty: an empty memory
    const std::vector<float> & get_origin(uint32_t cell) const { return seqs[cell].origin; }
    void                       set_origin(uint32_t cell, const std::vector<float> & data) { seqs[cell].origin = data; }

    // removes the text of the sequence, which starts with this memory
    void start(llama_seq_id seq_id, const std::vector<float> & origin);

    // frozen: reads, writes nothing; scale: factor of the deltas; tag: what else the text depends on, for the caller.
    // They stay until they are changed.
    struct seq_params {
        bool     frozen = false;
        float    scale  = 1.0f;
        uint64_t tag    = 0;
    };

    const seq_params & get_seq_params(llama_seq_id seq_id) const { return seqs[seq_id].params; }
    void               set_seq_params(llama_seq_id seq_id, const seq_params & params) { seqs[seq_id].params = params; }

    // does the graph have to scale at all
    bool has_scale() const;

    // applies the pending operations; no computation may be running
    void flush();

private:
    const llama_model &       model;
    const llama_adapter_mem & adapter;

    const llama_memory_ptr inner;

    const uint32_t n_cells;
    const int64_t  n_cell; // elements of a cell

    std::vector<ggml_tensor *> states;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    // seq_* may be called while a device still computes with the state, so cells change when the next batch is prepared
    struct pending_op {
        int32_t            src; // -1: data
        int32_t            dst;
        std::vector<float> data; // [n_layer, n_cell], empty: zeros
    };

    std::vector<pending_op> pending;

    struct seq_info {
        std::vector<float> origin;
        seq_params         params;

        llama_pos pos_min = 0; // of its text, as far as that is known: a memory may have dropped what is outside of a window
    };

    std::vector<seq_info> seqs; // [n_cells]

    // -1: all. An empty memory and origin, or back to the origin
    void zero(llama_seq_id seq_id);
    void rewind(llama_seq_id seq_id);

    // what removing [p0, p1) of a sequence means for its state
    enum rm_type {
        RM_KEEP,   // the end stays, or there is nothing to remove: so does the state
        RM_TEXT,   // no text stays
        RM_FULL,   // nothing stays
        RM_REFUSE, // an older state would be needed
    };

    rm_type get_rm_type(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // the part of a saved state that is the inner memory's
    void inner_state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void inner_state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, uint64_t n_bytes);
};
