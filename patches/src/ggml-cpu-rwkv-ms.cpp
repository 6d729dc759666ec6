#include "ggml-rwkv-ms.h"
#include "ggml-rwkv-ms-impl.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

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

        score /= p.semantics != 2 ? std::sqrt((float) R) : std::fmax(ggml_rwkv_ms_norm(R, y), 1e-6f) * std::fmax(ggml_rwkv_ms_norm(R, r), 1e-6f);

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

// From so many tokens on, features and outputs are computed by all threads. Few are computed token by token, each cell by
// one thread: waiting for each other would cost more.
static constexpr int64_t RWKV_MS_TILED_MIN = 16;

// tokens whose rows are in work memory at once
static constexpr int64_t RWKV_MS_TILE = 256;

static bool rwkv_ms_is_tiled(const ggml_tensor * dst) {
    return dst->ne[1] >= RWKV_MS_TILED_MIN;
}

static int64_t rwkv_ms_n_rows(const ggml_tensor * dst, int nth) {
    return rwkv_ms_is_tiled(dst) ? std::min(dst->ne[1], RWKV_MS_TILE) : nth;
}

// floats of a thread's own: scratch, prev [D], then y [M*R]
static int64_t rwkv_ms_n_own(const ggml_rwkv_ms_params & p) {
    return GGML_PAD(ggml_rwkv_ms_scratch::n_scratch(p) + p.n_head * p.n_rank + p.n_state * p.n_rank, 16); // a cache line
}

static ggml_rwkv_ms_params rwkv_ms_params_of(const ggml_tensor * dst) {
    ggml_rwkv_ms_params res;
    memcpy(&res, dst->op_params, sizeof(res));
    return res;
}

size_t ggml_rwkv_ms_work_size(const ggml_tensor * dst, int n_tasks) {
    const ggml_rwkv_ms_params p = rwkv_ms_params_of(dst);

    return (rwkv_ms_n_rows(dst, n_tasks) * ggml_rwkv_ms_row::n_row(p) + n_tasks * rwkv_ms_n_own(p)) * sizeof(float);
}

// the steps of a token, in this order
template <int R_CONST>
struct ggml_rwkv_ms_token {
    using lanes = ggml_rwkv_ms_thread;

    ggml_rwkv_ms_token(const ggml_compute_params * params, ggml_tensor * dst) :
        p(rwkv_ms_params_of(dst)),
        R(R_CONST > 0 ? R_CONST : p.n_rank),
        D(p.n_head * R),
        has_core(dst->src[3] && p.semantics != 0),
        x(dst->src[0]),
        state(dst->src[1]),
        ids((const int32_t *) dst->src[2]->data),
        w(dst->src[3]),
        dst(dst),
        rows((float *) params->wdata),
        own(rows + rwkv_ms_n_rows(dst, params->nth) * ggml_rwkv_ms_row::n_row(p) + params->ith * rwkv_ms_n_own(p)),
        tmp(p, own) {
    }

    int32_t cell_of(int64_t it) const {
        const int32_t cell = ids[2 * it];
        GGML_ASSERT(cell >= 0 && cell < state->ne[1]);
        return cell;
    }

    int32_t mask_of(int64_t it) const { return ids[2 * it + 1]; }

    const float * x_of(int64_t it) const { return (const float *) ((const char *) x->data + it * x->nb[1]); }

    float * state_of(int32_t cell) const { return (float *) ((char *) state->data + cell * state->nb[1]); }

    float * prev_of(int32_t cell) const { return state_of(cell) + p.n_head * p.n_state * R * R; }

    float * counter_of(int32_t cell) const { return state_of(cell) + state->ne[0] - 2; }

    ggml_rwkv_ms_row row_of(int64_t i) const { return { p, rows + i * ggml_rwkv_ms_row::n_row(p) }; }

    // the source of the token that was written before it, from token t0 on, else the one in its cell
    const float * prev_in_tile(int64_t it, int64_t t0) const {
        const int32_t cell = cell_of(it);

        for (int64_t i = it - 1; i >= t0 && has_core; --i) {
            if (ids[2 * i] == cell && mask_of(i) == GGML_RWKV_MS_MASK_LIVE) {
                float * prev = own + ggml_rwkv_ms_scratch::n_scratch(p);
                ggml_rwkv_ms_source<lanes>(p, x_of(i), prev);
                return prev;
            }
        }
        return prev_of(cell);
    }

    void features(int64_t it, const float * prev, const ggml_rwkv_ms_row & t) const {
        if (has_core) {
            ggml_rwkv_ms_source<lanes>(p, x_of(it), t.s);
            ggml_rwkv_ms_token_features<lanes>(p, { p, (const float *) w->data }, x_of(it), prev, t, tmp);
        } else if (w) {
            ggml_rwkv_ms_delta_features<lanes>(p, { p, (const float *) w->data }, x_of(it), t);
        } else {
            std::fill(t.s, t.s + ggml_rwkv_ms_row::n_row(p), 0.0f);
        }
    }

    // reads all states, then writes one
    void scan(int64_t it, const ggml_rwkv_ms_row & t) const {
        const int N = p.n_head;
        const int M = p.n_state;

        const int32_t n_period = M * p.n_chunk; // the counter wraps here

        const int32_t cell = cell_of(it);
        const float * f0   = x_of(it);

        const ggml_rwkv_ms_features f = w ? t.features() : ggml_rwkv_ms_features{ f0, f0 + D, f0 + 2 * D, f0 + 3 * D, f0 + 4 * D, f0 + 5 * D, f0 + 6 * D, f0 + 7 * D, f0 + 8 * D };

        float * S       = state_of(cell);
        float * counter = counter_of(cell);
        float * y       = own + ggml_rwkv_ms_scratch::n_scratch(p) + D;

        GGML_ASSERT(counter[0] >= 0.0f && counter[0] < (float) n_period); // false for NaN too

        if (mask_of(it) == GGML_RWKV_MS_MASK_PADDING) {
            std::fill(t.read, t.read + D, 0.0f);
            std::fill(t.route, t.route + N * M, 0.0f);
        } else {
            for (int n = 0; n < N; ++n) {
                ggml_rwkv_ms_read<R_CONST>(p, S + n * M * R * R, f.r + n * R, t.read + n * R, t.route + n * M, y);
            }
        }

        if (mask_of(it) == GGML_RWKV_MS_MASK_LIVE) {
            const int32_t m = (int32_t) counter[0] / p.n_chunk;

            for (int n = 0; n < N; ++n) {
                ggml_rwkv_ms_write<R_CONST>(p, S + (n * M + m) * R * R, f, n * R, y);
            }
            if (has_core) {
                std::copy(t.s, t.s + D, prev_of(cell));
            }

            counter[0] += 1.0f;
            if (counter[0] == (float) n_period) {
                counter[0] = 0.0f;
                counter[1] += 1.0f;
            }
        }
    }

    void output(int64_t it, const ggml_rwkv_ms_row & t) const {
        if (mask_of(it) == GGML_RWKV_MS_MASK_PADDING) {
            std::fill(t.out, t.out + D, 0.0f);
        } else if (has_core) {
            ggml_rwkv_ms_token_output<lanes>(p, { p, (const float *) w->data }, t, tmp);
        } else {
            std::copy(t.read, t.read + D, t.out);
        }
        ggml_rwkv_ms_token_guard<lanes>(D, t.out);

        float * res = (float *) ((char *) dst->data + it * dst->nb[1]);
        if (p.trace) {
            std::copy(t.s, t.s + ggml_rwkv_ms_row::n_trace(p), res);
        } else {
            std::copy(t.out, t.out + D, res);
        }
    }

    const ggml_rwkv_ms_params p;

    const int R, D;

    const bool has_core; // RWKV-MS from its source to its output; else the reads are all

    const ggml_tensor * x;
    const ggml_tensor * state;
    const int32_t *     ids;
    const ggml_tensor * w;
    ggml_tensor *       dst;

    float * rows; // of all threads
    float * own;  // of this one

    const ggml_rwkv_ms_scratch tmp;
};

template <int R_CONST>
static void ggml_compute_forward_rwkv_ms_f32(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_rwkv_ms_token<R_CONST> token(params, dst);

    const int ith = params->ith;
    const int nth = params->nth;

    const int64_t n_tokens = dst->ne[1];

    if (!rwkv_ms_is_tiled(dst)) {
        for (int64_t it = 0; it < n_tokens; ++it) {
            // the tokens of a cell depend on each other, cells do not
            if (token.cell_of(it) % nth == ith) {
                const ggml_rwkv_ms_row row = token.row_of(ith);

                token.features(it, token.prev_of(token.cell_of(it)), row);
                token.scan(it, row);
                token.output(it, row);
            }
        }
        return;
    }

    for (int64_t t0 = 0; t0 < n_tokens; t0 += RWKV_MS_TILE) {
        const int64_t t1 = std::min(t0 + RWKV_MS_TILE, n_tokens);

        for (int64_t it = t0 + ith; it < t1; it += nth) {
            token.features(it, token.prev_in_tile(it, t0), token.row_of(it - t0));
        }
        ggml_barrier(params->threadpool);

        for (int64_t it = t0; it < t1; ++it) {
            if (token.cell_of(it) % nth == ith) {
                token.scan(it, token.row_of(it - t0));
            }
        }
        ggml_barrier(params->threadpool);

        // a row is used by the thread that filled it: nobody waits for the next tile
        for (int64_t it = t0 + ith; it < t1; it += nth) {
            token.output(it, token.row_of(it - t0));
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
