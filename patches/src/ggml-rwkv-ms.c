#include "ggml-rwkv-ms.h"

#include "ggml-impl.h"

#include <string.h>

// elements of the projections and weights of the gates
static int64_t ggml_rwkv_ms_n_gates(const struct ggml_rwkv_ms_params * p) {
    return (p->couple_lambda ? 1 : 2) * p->n_gate;
}

// elements of one state cell before prev
static int64_t ggml_rwkv_ms_n_state_elements(const struct ggml_rwkv_ms_params * p) {
    return (int64_t) p->n_head * p->n_state * p->n_rank * p->n_rank;
}

static int64_t ggml_rwkv_ms_n_prev(const struct ggml_rwkv_ms_params * p) {
    return p->semantics == 0 ? 0 : p->n_head * p->n_rank;
}

int64_t ggml_rwkv_ms_n_cell(const struct ggml_rwkv_ms_params * p) {
    return ggml_rwkv_ms_n_state_elements(p) + ggml_rwkv_ms_n_prev(p) + 2;
}

int64_t ggml_rwkv_ms_n_weight(const struct ggml_rwkv_ms_params * p) {
    const int64_t D = p->n_head * p->n_rank;

    return ggml_rwkv_ms_n_gates(p) + (p->semantics == 0 ? 0 : 11 * D + 6 * D * p->n_lora + 4 * D * D);
}

int64_t ggml_rwkv_ms_n_in(const struct ggml_rwkv_ms_params * p) {
    return (p->semantics == 0 ? 3 : 1) * p->n_head * p->n_rank + ggml_rwkv_ms_n_gates(p);
}

// the matrices of a cell and of the specification are each other's transposes
static void ggml_rwkv_ms_transpose(const struct ggml_rwkv_ms_params * p, const float * src, float * dst) {
    const int64_t R = p->n_rank;

    for (int64_t m = 0; m < (int64_t) p->n_head * p->n_state; ++m) {
        for (int64_t i = 0; i < R; ++i) {
            for (int64_t j = 0; j < R; ++j) {
                dst[(m * R + i) * R + j] = src[(m * R + j) * R + i];
            }
        }
    }
}

int64_t ggml_rwkv_ms_cell_get(const struct ggml_rwkv_ms_params * p, const float * cell, float * S, float * prev) {
    const float * cell_prev = cell + ggml_rwkv_ms_n_state_elements(p);
    const float * cell_n    = cell_prev + ggml_rwkv_ms_n_prev(p);

    if (S) {
        ggml_rwkv_ms_transpose(p, cell, S);
    }
    if (prev) {
        memset(prev, 0, p->n_head * p->n_rank * sizeof(float));
        memcpy(prev, cell_prev, ggml_rwkv_ms_n_prev(p) * sizeof(float));
    }
    return (int64_t) cell_n[0] + (int64_t) cell_n[1] * p->n_state * p->n_chunk;
}

void ggml_rwkv_ms_cell_set(const struct ggml_rwkv_ms_params * p, float * cell, const float * S, const float * prev, int64_t n_tokens) {
    const int64_t n_period = (int64_t) p->n_state * p->n_chunk;

    float * cell_prev = cell + ggml_rwkv_ms_n_state_elements(p);
    float * cell_n    = cell_prev + ggml_rwkv_ms_n_prev(p);

    if (S) {
        ggml_rwkv_ms_transpose(p, S, cell);
    }
    if (prev) {
        memcpy(cell_prev, prev, ggml_rwkv_ms_n_prev(p) * sizeof(float));
    }
    cell_n[0] = (float) (n_tokens % n_period);
    cell_n[1] = (float) (n_tokens / n_period);
}

struct ggml_tensor * ggml_rwkv_ms(
        struct ggml_context *              ctx,
        struct ggml_tensor *               x,
        struct ggml_tensor *               w,
        struct ggml_tensor *               state,
        struct ggml_tensor *               ids,
        const struct ggml_rwkv_ms_params * params) {
    const int64_t D        = params->n_head * params->n_rank;
    const int64_t n_tokens = x->ne[1];
    const int64_t n_in     = w ? ggml_rwkv_ms_n_in(params) : 9 * D;

    GGML_ASSERT(D > 0 && params->n_state > 0 && params->n_chunk > 0);
    GGML_ASSERT(params->semantics != 0 || params->n_state == 1);
    // the counter has to be exact in F32
    GGML_ASSERT((int64_t) params->n_state * params->n_chunk <= (1 << 24));

    GGML_ASSERT(x->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(x) && x->ne[0] == n_in && x->ne[2] * x->ne[3] == 1);
    GGML_ASSERT(state->type == GGML_TYPE_F32 && ggml_is_contiguous(state) && state->ne[0] == ggml_rwkv_ms_n_cell(params));
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ggml_is_contiguous(ids) && ids->ne[0] == 2 && ids->ne[1] == n_tokens);
    if (w) {
        GGML_ASSERT(w->type == GGML_TYPE_F32 && ggml_is_contiguous(w) && ggml_nelements(w) == ggml_rwkv_ms_n_weight(params));
    }

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32,
            params->trace ? 13 * D + params->n_head * params->n_state : D, n_tokens);

    ggml_set_op_params(result, params, sizeof(*params));

    // w comes last because a missing source ends the list
    result->op     = GGML_OP_RWKV_MS;
    result->src[0] = x;
    result->src[1] = state;
    result->src[2] = ids;
    result->src[3] = w;

    return result;
}
