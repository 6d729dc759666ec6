#pragma once

// Saved memories: the block in a saved state, and the files around it. The layout by byte is in docs/state-format.md.
//
// Everything is checked before anything is changed. What is refused is one line with its reason in brackets.

#include "llama-impl.h"
#include "llama-adapter-mem-impl.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct llama_context;

enum llama_adapter_mem_block_kind {
    LLAMA_ADAPTER_MEM_BLOCK_SEQ     = 1,
    LLAMA_ADAPTER_MEM_BLOCK_CONTEXT = 2,
    LLAMA_ADAPTER_MEM_BLOCK_PARTIAL = 3, // a checkpoint: without the part of the KV cache that can be rolled back
    LLAMA_ADAPTER_MEM_BLOCK_MEMORY  = 4, // without any KV cache
};

// seq_id -1: the whole context
uint32_t llama_adapter_mem_block_kind_of(llama_seq_id seq_id, llama_state_seq_flags flags);

enum llama_adapter_mem_block_flags {
    LLAMA_ADAPTER_MEM_BLOCK_DERIVED = 1, // made from other states by a tool
    LLAMA_ADAPTER_MEM_BLOCK_ORIGIN  = 2, // the cells are followed by those that the sequences started with
    LLAMA_ADAPTER_MEM_BLOCK_SETTING = 4, // the note is the setting of the sequence, which is not the default
};

// what the text of a sequence was computed under, see llama_memory_adapter::seq_params
struct llama_adapter_mem_setting {
    float    scale  = 1.0f;
    uint32_t frozen = 0;
    uint64_t tag    = 0;
};

struct llama_adapter_mem_block_header {
    char     magic[4]; // RMVS
    uint32_t version;
    uint32_t n_header; // bytes
    uint32_t kind;
    uint32_t n_layer;
    uint32_t n_head;
    uint32_t n_state;
    uint32_t rank;
    uint32_t n_chunk;
    uint32_t semantics;
    uint32_t n_cells;
    uint32_t n_cell;     // elements of one layer of a cell
    uint64_t n_bytes_kv; // of the KV cache that follows
    uint8_t  fingerprint[32];
    uint8_t  checksum[32]; // SHA-256 of header and cells, itself as zeros
    uint32_t flags;
    uint32_t zero;
    uint8_t  sidecar[32]; // SHA-256
    uint8_t  base[32];
    char     note[128];
};

static_assert(sizeof(llama_adapter_mem_block_header) == 320, "the layout is documented");
static_assert(offsetof(llama_adapter_mem_block_header, n_bytes_kv) == 48, "the layout is documented");
static_assert(offsetof(llama_adapter_mem_block_header, note) == 192, "the layout is documented");

// throws, and keeps the text for llama_adapter_mem_state_error
LLAMA_ATTRIBUTE_FORMAT(2, 3)
[[noreturn]] void llama_adapter_mem_state_fail(const char * reason, const char * format, ...);

// header and cells; origins has as many cells as cells, or none
std::vector<uint8_t> llama_adapter_mem_block_write(
        const llama_adapter_mem &         adapter,
        uint32_t                          kind,
        const std::vector<float> &        cells,
        const std::vector<float> &        origins,
        const llama_adapter_mem_setting & setting,
        uint64_t                          n_bytes_kv);

llama_adapter_mem_setting llama_adapter_mem_block_setting(const llama_adapter_mem_block_header & header);

// how many cells follow this header in all, once it is known to be one of this model
uint64_t llama_adapter_mem_block_n_cells(const llama_adapter_mem_block_header & header);

// fails unless the header is one of the given kind for this model and n_cells sequences
void llama_adapter_mem_block_check(const llama_adapter_mem & adapter, const llama_adapter_mem_block_header & header, uint32_t kind, uint32_t n_cells);

// fails unless n_rest bytes follow this header, as it says; then of the same things as the one above
void llama_adapter_mem_block_check_head(const llama_adapter_mem & adapter, const llama_adapter_mem_block_header & header, uint64_t n_rest, uint32_t kind, uint32_t n_cells);

// fails unless header and cells have the checksum, and the cells can be ones
void llama_adapter_mem_block_check_cells(const llama_adapter_mem & adapter, const llama_adapter_mem_block_header & header, const std::vector<float> & cells);

// fails unless the data are a whole block of this model and what it says of the KV cache that follows
void llama_adapter_mem_block_check_data(const llama_adapter_mem & adapter, const uint8_t * data, size_t size, uint32_t kind, uint32_t n_cells);

// "" if the values of one cell can be a state, else what is wrong with them
std::string llama_adapter_mem_cell_check(const llama_adapter_mem & adapter, const float * cell);

// A whole state in RAM as llama_context reads it, before any of it is read: fails if its block is not whole, or of another
// kind or model. seq_id -1: of the whole context. Does nothing without a memory.
void llama_adapter_mem_state_check(const llama_context & ctx, const uint8_t * data, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags);

// fails if the first integer of a KV cache's state is the magic of a block: the model has no memory to load it into
void llama_adapter_mem_state_check_base(uint32_t first);

//
// files: header of llama.cpp, tokens, state, trailer
//

// Writes beside the target, flushes to disk and renames. Returns the bytes written, fails with what went wrong.
size_t llama_adapter_mem_file_write(
        const std::string &          path,
        uint32_t                     magic,
        uint32_t                     version,
        const llama_token *          tokens,
        size_t                       n_tokens,
        const std::vector<uint8_t> & state);

struct llama_adapter_mem_file {
    std::vector<uint8_t>     data;   // the whole file
    std::vector<llama_token> tokens;

    size_t i_state = 0; // where the state begins
    size_t n_state = 0; // bytes of it, without the trailer
};

// (begin, n_begin): the first of n_state bytes
using llama_adapter_mem_file_check = std::function<void(const uint8_t * begin, size_t n_begin, size_t n_state, size_t n_tokens)>;

// Reads and checks all that is around the state: fails if it is no such file, cut, or changed.
// check: of a large file, before its body is read: fails if the state is refused whatever that holds
llama_adapter_mem_file llama_adapter_mem_file_read(const std::string & path, uint32_t magic, uint32_t version, const llama_adapter_mem_file_check & check);

// the same with the bytes in RAM; name is for messages
llama_adapter_mem_file llama_adapter_mem_file_parse(std::vector<uint8_t> data, const std::string & name, uint32_t magic, uint32_t version);
std::vector<uint8_t>   llama_adapter_mem_file_pack(uint32_t magic, uint32_t version, const llama_token * tokens, size_t n_tokens, const std::vector<uint8_t> & state);

// A file of a sequence, or of the whole context with seq_id -1. They fail with nothing changed, or return its bytes.
// Without tokens_out only the number of tokens is read.
size_t llama_adapter_mem_state_save(
        llama_context &       ctx,
        const char *          path,
        llama_seq_id          seq_id,
        llama_state_seq_flags flags,
        const llama_token *   tokens,
        size_t                n_tokens);

size_t llama_adapter_mem_state_load(
        llama_context &       ctx,
        const char *          path,
        llama_seq_id          seq_id,
        llama_state_seq_flags flags,
        llama_token *         tokens_out,
        size_t                n_capacity,
        size_t *              n_tokens);

// a file that was read: its state, into a sequence or the whole context
void llama_adapter_mem_state_set(llama_context & ctx, llama_adapter_mem_file & file, llama_seq_id seq_id, llama_state_seq_flags flags);
