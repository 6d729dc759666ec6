#pragma once

// GGML_OP_RWKV_MS: the recurrent core of one memory layer: RWKV-MS, or the delta rule, whose state is written in the same way

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum ggml_rwkv_ms_update {
    GGML_RWKV_MS_UPDATE_STANDARD       = 0, // keep, erase, write = lam, beta, beta
    GGML_RWKV_MS_UPDATE_LAMBDA_OUTSIDE = 1, //                      lam, lam*beta, beta
    GGML_RWKV_MS_UPDATE_NO_LAMBDA      = 2, //                      1, beta, beta
};

enum ggml_rwkv_ms_mask {
    GGML_RWKV_MS_MASK_LIVE    = 0,
    GGML_RWKV_MS_MASK_FROZEN  = 1, // reads, writes nothing
    GGML_RWKV_MS_MASK_PADDING = 2, // reads zero, writes nothing
};

// symbols as in the specification of the memory: R, N, M, C, L, G
struct ggml_rwkv_ms_params {
    int32_t n_rank;
    int32_t n_head;
    int32_t n_state;
    int32_t n_chunk;
    int32_t n_lora;
    int32_t n_gate;        // D = R*N (a gate per row) or N (a gate per head)
    int32_t semantics;     // 1 or 2; 0: the delta rule, with n_state 1
    int32_t update;        // enum ggml_rwkv_ms_update
    int32_t couple_lambda; // lambda = 1 - beta; else the projections carry it
    int32_t normalize_qk;  // delta rule: q and k are normalized
    int32_t trace;         // tests: dst rows carry the intermediates, see below
    float   erase_gate;
};

// elements of one state cell: N*M matrices stored as [j][i] (the column of S is contiguous, so that a matrix times
// a vector runs along i), then prev [D] unless it is the delta rule, then the counter in two exact parts: n mod M*C, n div M*C
GGML_API int64_t ggml_rwkv_ms_n_cell(const struct ggml_rwkv_ms_params * params);

// elements of the packed weights, in this order ([in][out] means that the output index is contiguous):
//   beta_b [G], lambda_b [G] unless lambda is coupled, x_r x_w x_k x_v x_a x_g w0 a0 k_k k_a ln_x [D],
//   w1 a1 g1 [D][L], w2 a2 g2 [L][D], receptance key value output [in][out]; the delta rule has the first two alone
GGML_API int64_t ggml_rwkv_ms_n_weight(const struct ggml_rwkv_ms_params * params);

// x     F32 [D + G (+ G), n_tokens]: memory_v, beta (and lambda) projections of the hidden state
//       F32 [3*D + G (+ G), n_tokens] of the delta rule: memory_q, memory_k, memory_v, beta (and lambda)
//       F32 [9*D, n_tokens] if w == NULL: r decay k v a b keep erase write, scan only
// w     F32 [n_weight] or NULL
// state F32 [n_cell, n_cells], read and written in place
// ids   I32 [2, n_tokens]: the state cell of each token and its mask
// returns F32 [D, n_tokens]: the output of the core, to be multiplied by the delta heads;
//         with params->trace [13*D + N*M, n_tokens]: s beta lam r w decay k v a b g read out, route
//
// The state is written in place, so the node has to run where the state lies: see llama_adapter_mem_graph.
GGML_API struct ggml_tensor * ggml_rwkv_ms(
        struct ggml_context *              ctx,
        struct ggml_tensor *               x,
        struct ggml_tensor *               w,
        struct ggml_tensor *               state,
        struct ggml_tensor *               ids,
        const struct ggml_rwkv_ms_params * params);

// elements of a token's projections
GGML_API int64_t ggml_rwkv_ms_n_in(const struct ggml_rwkv_ms_params * params);

// one state cell from and to the layout of the specification: S [N, M, R, R], prev [D] (0 of the delta rule), each may be NULL
// returns the number of tokens written
GGML_API int64_t ggml_rwkv_ms_cell_get(const struct ggml_rwkv_ms_params * params, const float * cell, float * S, float * prev);
GGML_API void    ggml_rwkv_ms_cell_set(const struct ggml_rwkv_ms_params * params, float * cell, const float * S, const float * prev, int64_t n_tokens);

struct ggml_compute_params;

// CPU
size_t ggml_rwkv_ms_work_size(const struct ggml_tensor * dst, int n_tasks);
void   ggml_compute_forward_rwkv_ms(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
