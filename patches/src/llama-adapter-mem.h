#pragma once

// RWKV-MS: an online recurrent memory beside the self-attention of an unchanged base model.
// The weights come from a sidecar GGUF, the state is kept per sequence by the context's memory module.
// Everything here is additive: no field of a public llama.cpp struct changes.

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// what a context with memory may be, checked when it is created
enum llama_adapter_mem_mode {
    LLAMA_ADAPTER_MEM_MODE_SERIAL  = 0, // n_seq_max == 1 and n_ubatch == 1
    LLAMA_ADAPTER_MEM_MODE_FUSED   = 1, // n_seq_max == 1
    LLAMA_ADAPTER_MEM_MODE_BATCHED = 2, // no limit
};

// -1 if the name is not one of serial, fused, batched
LLAMA_API int32_t      llama_adapter_mem_mode_from_name(const char * name);
LLAMA_API const char * llama_adapter_mem_mode_name(enum llama_adapter_mem_mode mode);

// identity of this build: <upstream commit>+<hash of the patch set>
LLAMA_API const char * llama_adapter_mem_build_id(void);

// SHA-256 in hex: 64 digits and NUL
LLAMA_API void llama_adapter_mem_hash(const void * data, size_t size, char * hex);

// Errors: functions that can fail take a buffer for one line of text (always NUL-terminated, cut to n_err) that names
// the file, key or tensor at fault. err may be NULL.

// A parsed and validated sidecar. Unless path_base is NULL, hashing of the base GGUF starts in the background, so that
// it overlaps with loading the weights. NULL on failure.
struct llama_adapter_mem_sidecar;

LLAMA_API struct llama_adapter_mem_sidecar * llama_adapter_mem_sidecar_init(
        const char * path_sidecar,
        const char * path_base,
        char * err, size_t n_err);

LLAMA_API void llama_adapter_mem_sidecar_free(struct llama_adapter_mem_sidecar * sidecar);

// Gives the model a memory. To be called once, after the model is loaded and before its first context.
// Waits for the base's hash and refuses a base other than the bound one (not checked if path_base was NULL: for estimates).
// An architecture that no test is about is refused, or if untested is set warned of.
// On success the model keeps what it needs; the caller still frees the sidecar.
LLAMA_API bool llama_model_set_adapter_mem(
        struct llama_model *                     model,
        const struct llama_adapter_mem_sidecar * sidecar,
        enum llama_adapter_mem_mode              mode,
        bool                                     untested,
        char * err, size_t n_err);

// the three calls above in one, for architectures that are tested
LLAMA_API bool llama_model_load_adapter_mem(
        struct llama_model *        model,
        const char *                path_sidecar,
        const char *                path_base,
        enum llama_adapter_mem_mode mode,
        char * err, size_t n_err);

struct llama_adapter_mem_info {
    char sidecar_sha256[65]; // of the sidecar file
    char base_sha256[65]; // of the base GGUF that the sidecar is bound to
    char fingerprint[65]; // SHA-256 over both: what a state belongs to

    uint32_t n_layer;        // target layers
    uint32_t rank;           // R
    uint32_t n_head;         // N, state heads
    uint32_t n_state;        // M, states per head
    uint32_t n_chunk;        // C, tokens; 2^24 of the delta rule
    uint32_t semantics;      // 1 or 2; 0 of the delta rule
    float    alpha;

    enum llama_adapter_mem_mode mode;

    char kind[16]; // rwkv_ms or delta_rule
};

// false if the model has no memory
LLAMA_API bool llama_model_adapter_mem_info(const struct llama_model * model, struct llama_adapter_mem_info * info);

// the base layer of target layer i, -1 if there is none
LLAMA_API int32_t llama_model_adapter_mem_layer(const struct llama_model * model, uint32_t i);

// The state of a sequence at target layer i. S: [N, M, R, R], prev: [N*R], both may be NULL.
// Returns the number of tokens written, -1 if there is no such sequence, layer or memory. Synchronizes the context.
LLAMA_API int64_t llama_adapter_mem_get_state(
        struct llama_context * ctx,
        llama_seq_id           seq_id,
        uint32_t               i,
        float *                S,
        float *                prev);

// Replaces it. Non-finite values and negative counts are refused with nothing changed.
LLAMA_API bool llama_adapter_mem_set_state(
        struct llama_context * ctx,
        llama_seq_id           seq_id,
        uint32_t               i,
        const float *          S,
        const float *          prev,
        int64_t                n_tokens);

//
// Saved memories: see docs/state-format.md. States of sequences and contexts (llama_state_*) carry the memory with them and
// are checked before anything is changed; a failed call leaves everything as it was.
//

// With llama_state_seq_*_ext: the memory of the sequence alone. Loading it removes the text of the sequence, whose next
// position is then 0. The sequence starts with it: llama_memory_seq_rm(mem, seq_id, 0, -1) returns to it,
// llama_memory_seq_rm(mem, seq_id, -1, -1) drops it too.
#define LLAMA_STATE_SEQ_FLAGS_ADAPTER_MEM_ONLY 0x10000

// the same as a file; return its bytes, 0 on failure
LLAMA_API size_t llama_adapter_mem_state_save_file(struct llama_context * ctx, const char * path, llama_seq_id seq_id);
LLAMA_API size_t llama_adapter_mem_state_load_file(struct llama_context * ctx, const char * path, llama_seq_id seq_id);

// why the last saving or loading call failed in this thread, "[reason] text" in one line; "" if none did since it was cleared
LLAMA_API const char * llama_adapter_mem_state_error(void);
LLAMA_API void         llama_adapter_mem_state_error_clear(void);

// empties the memory of a sequence, its text stays
LLAMA_API bool llama_adapter_mem_seq_reset(struct llama_context * ctx, llama_seq_id seq_id);

// Removes the text of a sequence, which starts with this memory (llama_model_adapter_mem_n_values floats, NULL: an empty one).
// false if the values cannot be a memory, with nothing changed.
LLAMA_API bool llama_adapter_mem_seq_start(struct llama_context * ctx, llama_seq_id seq_id, const float * values);

// The memory of a sequence. Synchronizes the context.
LLAMA_API bool llama_adapter_mem_seq_get_values(struct llama_context * ctx, llama_seq_id seq_id, float * values);

// The memory that it started with: false if that is an empty one. values may be NULL.
LLAMA_API bool llama_adapter_mem_seq_get_origin(struct llama_context * ctx, llama_seq_id seq_id, float * values);

// frozen: the sequence reads its memory and writes nothing; scale: factor of its deltas, 0 is the base, 1 the default.
// For the batches that follow, until it is changed.
LLAMA_API bool llama_adapter_mem_seq_set(struct llama_context * ctx, llama_seq_id seq_id, bool frozen, float scale);
LLAMA_API bool llama_adapter_mem_seq_get(struct llama_context * ctx, llama_seq_id seq_id, bool * frozen, float * scale);

// What else the text of a sequence was computed under, for the caller: a saved sequence remembers it with frozen and scale.
LLAMA_API bool     llama_adapter_mem_seq_set_tag(struct llama_context * ctx, llama_seq_id seq_id, uint64_t tag);
LLAMA_API uint64_t llama_adapter_mem_seq_get_tag(struct llama_context * ctx, llama_seq_id seq_id);

//
// A memory by its values, apart from any sequence: n_values floats, the cells of a memory-only state in its order.
// What can be called from any thread: only the model is read.
//

LLAMA_API size_t llama_model_adapter_mem_n_values(const struct llama_model * model); // 0 without a memory

// the part of target layer i as llama_adapter_mem_get_state gives it, or -1
LLAMA_API int64_t llama_model_adapter_mem_get_state(const struct llama_model * model, const float * values, uint32_t i, float * S, float * prev);

// finite, and counters in range
LLAMA_API bool llama_model_adapter_mem_check(const struct llama_model * model, const float * values);

// The bytes of a memory-only state file. Returns their number, 0 on failure with llama_adapter_mem_state_error(); without data
// only the number is returned. Writing refuses what llama_model_adapter_mem_check does.
LLAMA_API size_t llama_model_adapter_mem_write(const struct llama_model * model, const float * values, uint8_t * data, size_t size);
LLAMA_API bool   llama_model_adapter_mem_read(const struct llama_model * model, const uint8_t * data, size_t size, float * values);

// the same as a file; return its bytes, 0 on failure
LLAMA_API size_t llama_model_adapter_mem_save_file(const struct llama_model * model, const float * values, const char * path);
LLAMA_API size_t llama_model_adapter_mem_load_file(const struct llama_model * model, const char * path, float * values);

// A sequence from a file, as llama_state_seq_load_file: before anything is changed, check is asked whether the tokens will do.
typedef bool (*llama_adapter_mem_check_tokens)(const llama_token * tokens, size_t n_tokens, void * user_data);

LLAMA_API size_t llama_adapter_mem_seq_load_file(
        struct llama_context *         ctx,
        const char *                   path,
        llama_seq_id                   seq_id,
        llama_adapter_mem_check_tokens check,
        void *                         user_data);

// Runs one target layer on the CPU over host arrays, with the graph that the model runs: for tests and fixtures.
// Tensors are given by their sidecar short names ("mem_v", "rwkv.x_r", "delta_q", ...) in torch layout, F32.
// If features != NULL, the weights and h are not used: the scan runs on the given per-token features
// [n_tokens, 9*D] = r decay k v a b keep erase write, and only read and route are filled.
struct llama_adapter_mem_eval_params {
    uint32_t n_embd;
    uint32_t rank;
    uint32_t n_head;
    uint32_t n_state;
    uint32_t n_chunk;
    uint32_t semantics;
    float    alpha;
    float    erase_gate;
    int32_t  update_mode;    // 0 standard, 1 lambda_outside, 2 no_lambda
    bool     couple_lambda;

    uint32_t              n_tensors;
    const char * const *  names;
    const float * const * data;
    const int64_t *       ne;       // [n_tensors, 2] torch shape, second is 1 for vectors

    uint32_t        n_tokens;
    const float *   h;        // [n_tokens, n_embd]
    const float *   features; // [n_tokens, 9*D] or NULL
    const int32_t * mask;     // [n_tokens] or NULL; 0 live, 1 frozen (reads, nothing written), 2 padding (reads zero)

    // in and out
    float *   S;        // [N, M, R, R]
    float *   prev;     // [D]
    int64_t * n_past;   // tokens written

    // out, NULL where not wanted
    float * trace;      // [n_tokens, 13*D + N*M]: s beta lam r w decay k v a b g read out, then route
    float * delta[4];   // q k v o: [n_tokens, width]
};

LLAMA_API bool llama_adapter_mem_eval(const struct llama_adapter_mem_eval_params * params, char * err, size_t n_err);

#ifdef __cplusplus
}
#endif
