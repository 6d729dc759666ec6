#include "ggml-rwkv-ms.h"
#include "ggml-rwkv-ms-impl.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
#include <vector>

// reads all M states of a head: read[R], route[M]; tmp[M*R]
template <int R_CONST>
static void ggml_rwkv_ms_read(
        const ggml_rwkv_ms_params & p,
        const float *               S,     // [M, R, R]
        const float *               r,     // [R]
        float *                     read,  // [R]
        float *                     route, // [M]
        float *                     tmp) { // [M, R]
    const int R = R_CONST > 0 ? R_CONST : p.n_rank;
    const int M = p.n_state;

    float score_max = -INFINITY;

    for (int m = 0; m < M; ++m) {
        const float * Sm = S + m * R * R;
        float *       y  = tmp + m * R;

        ggml_rwkv_ms_thread::matvec(R, R, Sm, r, y);

        float score = 0.0f;
        for (int i = 0; i < R; ++i) {
            score += y[i] * r[i];
        }

        score /= p.semantics == 1 ? std::sqrt((float) R) : std::fmax(ggml_rwkv_ms_norm(R, y), 1e-6f) * std::fmax(ggml_rwkv_ms_norm(R, r), 1e-6f);

        route[m]  = score;
        score_max = std::fmax(score_max, score);
    }

    float sum = 0.0f;
    for (int m = 0; m < M; ++m) {
        route[m] = std::exp(route[m] - score_max);
        sum += route[m];
    }

    for (int i = 0; i < R; ++i) {
        read[i] = 0.0f;
    }
    for (int m = 0; m < M; ++m) {
        route[m] /= sum;
        for (int i = 0; i < R; ++i) {
            read[i] += route[m] * tmp[m * R + i];
        }
    }
}

// writes one state of a head; tmp[R]
template <int R_CONST>
static void ggml_rwkv_ms_write(
        const ggml_rwkv_ms_params &   p,
        float *                       S,                       // [R, R]
        const ggml_rwkv_ms_features & f,
        int                           i0,                      // offset of the head in the features
        float *                       tmp) {                   // [R]
    const int R = R_CONST > 0 ? R_CONST : p.n_rank;

    // the erase term uses the state before this token
    ggml_rwkv_ms_thread::matvec(R, R, S, f.a + i0, tmp);

    for (int i = 0; i < R; ++i) {
        tmp[i] *= p.erase_gate * f.erase[i0 + i];
    }

    for (int j = 0; j < R; ++j) {
        const float decay = f.decay[i0 + j];
        const float k     = f.k[i0 + j];
        const float b     = f.b[i0 + j];

        for (int i = 0; i < R; ++i) {
            S[j * R + i] = ggml_rwkv_ms_update(S[j * R + i], f.keep[i0 + i], decay, f.write[i0 + i], f.v[i0 + i], k, tmp[i], b);
        }
    }
}

template <int R_CONST>
static void ggml_compute_forward_rwkv_ms_f32(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src_x     = dst->src[0];
    const ggml_tensor * src_state = dst->src[1];
    const ggml_tensor * src_ids   = dst->src[2];
    const ggml_tensor * src_w     = dst->src[3];

    ggml_rwkv_ms_params p;
    memcpy(&p, dst->op_params, sizeof(p));

    const int R = R_CONST > 0 ? R_CONST : p.n_rank;
    const int N = p.n_head;
    const int M = p.n_state;
    const int D = N * R;

    const int64_t n_tokens = src_x->ne[1];
    const int64_t n_cells  = src_state->ne[1];

    const int32_t n_period = M * p.n_chunk; // the counter wraps here

    const int n_row   = ggml_rwkv_ms_row::n_row(p);
    const int n_trace = ggml_rwkv_ms_row::n_trace(p);

    // of one token at a time
    std::vector<float> row(n_row);
    std::vector<float> scratch(ggml_rwkv_ms_scratch::n_scratch(p));
    std::vector<float> y(M * R);

    const ggml_rwkv_ms_row     t(p, row.data());
    const ggml_rwkv_ms_scratch tmp(p, scratch.data());

    const ggml_rwkv_ms_weights w(p, (const float *) (src_w ? src_w : src_x)->data); // not looked at without weights

    using lanes = ggml_rwkv_ms_thread;

    for (int64_t it = 0; it < n_tokens; ++it) {
        const int32_t * id   = (const int32_t *) src_ids->data + 2 * it;
        const int32_t   cell = id[0];
        const int32_t   mask = id[1];

        GGML_ASSERT(cell >= 0 && cell < n_cells);

        // the tokens of a cell depend on each other, cells do not
        if (cell % params->nth != params->ith) {
            continue;
        }

        const float * x    = (const float *) ((const char *) src_x->data + it * src_x->nb[1]);
        float *       S    = (float *) ((char *) src_state->data + cell * src_state->nb[1]);
        float *       prev = S + N * M * R * R;
        float *       n_lo = prev + D;
        float *       n_hi = n_lo + 1;

        GGML_ASSERT(*n_lo >= 0.0f && *n_lo < (float) n_period); // false for NaN too

        ggml_rwkv_ms_features f;
        if (src_w) {
            ggml_rwkv_ms_source<lanes>(p, x, t.s);
            ggml_rwkv_ms_token_features<lanes>(p, w, x, prev, t, tmp);
            f = t.features();
        } else {
            std::fill(row.begin(), row.end(), 0.0f);
            f = { x, x + D, x + 2 * D, x + 3 * D, x + 4 * D, x + 5 * D, x + 6 * D, x + 7 * D, x + 8 * D };
        }

        if (mask == GGML_RWKV_MS_MASK_PADDING) {
            std::fill(t.read, t.read + D, 0.0f);
            std::fill(t.out, t.out + D, 0.0f);
            std::fill(t.route, t.route + N * M, 0.0f);
        } else {
            for (int n = 0; n < N; ++n) {
                ggml_rwkv_ms_read<R_CONST>(p, S + n * M * R * R, f.r + n * R, t.read + n * R, t.route + n * M, y.data());
            }
            if (src_w) {
                ggml_rwkv_ms_token_output<lanes>(p, w, t, tmp);
            } else {
                std::copy(t.read, t.read + D, t.out);
            }
            ggml_rwkv_ms_token_guard<lanes>(D, t.out);
        }

        if (mask == GGML_RWKV_MS_MASK_LIVE) {
            const int32_t m = (int32_t) *n_lo / p.n_chunk;

            for (int n = 0; n < N; ++n) {
                ggml_rwkv_ms_write<R_CONST>(p, S + (n * M + m) * R * R, f, n * R, y.data());
            }
            if (src_w) {
                std::copy(t.s, t.s + D, prev);
            }

            *n_lo += 1.0f;
            if (*n_lo == (float) n_period) {
                *n_lo = 0.0f;
                *n_hi += 1.0f;
            }
        }

        float * res = (float *) ((char *) dst->data + it * dst->nb[1]);
        if (p.trace) {
            std::copy(row.begin(), row.begin() + n_trace, res);
        } else {
            std::copy(t.out, t.out + D, res);
        }
    }
}

void ggml_compute_forward_rwkv_ms(const ggml_compute_params * params, ggml_tensor * dst) {
    if (dst->op_params[0] == 8) {
        ggml_compute_forward_rwkv_ms_f32<8>(params, dst);
    } else {
        ggml_compute_forward_rwkv_ms_f32<0>(params, dst);
    }
}
