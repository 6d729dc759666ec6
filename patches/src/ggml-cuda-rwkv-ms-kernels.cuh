#pragma once

// The kernels of GGML_OP_RWKV_MS. One warp has the rows of all states of a head: lane m*R + i has row i of state m, all F32.
//
// Few tokens run through one kernel. Many run through three: features of all tokens at once, the serial scan, and reads and
// outputs of all tokens at once. The scan only writes: it leaves the state that each token reads, and its latency is all that is
// left of a prompt's.
//
// Nothing here needs more of CUDA than what tests/native/test-rwkv-ms-cuda-emulated.cpp emulates.

#include "ggml-rwkv-ms-impl.h"

#ifndef GGML_RWKV_MS_SHARED
#define GGML_RWKV_MS_SHARED(name) extern __shared__ float name[]
#endif

// a warp for each of the most heads that rwkv_ms_is_supported takes
#define RWKV_MS_BOUNDS(R) __launch_bounds__(RWKV_MS_WARP * rwkv_ms_max_heads(R), 1)

static constexpr int      RWKV_MS_WARP = 32;
static constexpr unsigned RWKV_MS_ALL  = 0xffffffffu;

static constexpr int rwkv_ms_max_heads(int R) {
    return R == 16 ? 12 : 16;
}

struct rwkv_ms_warp {
    static __device__ int lane() { return threadIdx.x; }

    static __device__ int n_lane() { return RWKV_MS_WARP; }

    static __device__ void sync() { __syncwarp(); }

    static __device__ bool any(bool x) { return __ballot_sync(RWKV_MS_ALL, x) != 0; }

    static __device__ void matvec(int n_in, int n_out, const float * w, const float * x, float * y) {
        for (int o = lane(); o < n_out; o += n_lane()) {
            float sum = 0.0f;
#pragma unroll 8
            for (int i = 0; i < n_in; ++i) {
                sum += w[i * n_out + o] * x[i];
            }
            y[o] = sum;
        }
        sync();
    }
};

struct rwkv_ms_args {
    ggml_rwkv_ms_params p;

    const float *   x;
    int64_t         stride_x;
    const int32_t * ids;
    int64_t         n_tokens;
    const float *   weights;   // nullptr: x has the features
    int             n_weights; // of them, if shared memory has room for them, else 0
    float *         state;
    int64_t         stride_state;
    int64_t         n_cells;
    float *         work; // [n_tokens, rwkv_ms_n_work], of the three kernels
    int64_t         stride_work;
    float *         dst;
    int64_t         stride_dst;

    __device__ const float * x_of(int64_t t) const { return x + t * stride_x; }

    __device__ ggml_rwkv_ms_row row_of(int64_t t) const { return { p, work + t * stride_work }; }

    // the rows of a head's states before a token, as the lanes have them
    __device__ float * history_of(int64_t t, int n) const {
        const int n_row = ggml_rwkv_ms_row::n_row(p);
        return work + t * stride_work + n_row + n * ((stride_work - n_row) / p.n_head);
    }

    // what the scan takes of a token
    __device__ ggml_rwkv_ms_features features_of(int64_t t, const ggml_rwkv_ms_row & row) const {
        const int     D = p.n_head * p.n_rank;
        const float * f = x_of(t);
        return weights ? row.features() : ggml_rwkv_ms_features{ f, f + D, f + 2 * D, f + 3 * D, f + 4 * D, f + 5 * D, f + 6 * D, f + 7 * D, f + 8 * D };
    }

    // the matrices of a cell are followed by prev, which the delta rule has not, and the counter
    __device__ float * prev_of(int cell) const { return state + cell * stride_state + p.n_head * p.n_state * p.n_rank * p.n_rank; }

    __device__ float * counter_of(int cell) const { return prev_of(cell) + (p.semantics == 0 ? 0 : p.n_head * p.n_rank); }

    // is it RWKV-MS from its source to its output, or are the reads all
    __device__ bool has_core() const { return weights && p.semantics != 0; }
};

// asserted by the CPU
static __device__ int32_t rwkv_ms_cell_of(const rwkv_ms_args & a, int64_t t) {
    const int32_t cell = a.ids[2 * t];
    if (cell < 0 || cell >= a.n_cells) {
        __trap();
    }
    return cell;
}

static __device__ void rwkv_ms_copy(int n, const float * src, float * dst) {
#pragma unroll 8
    for (int i = rwkv_ms_warp::lane(); i < n; i += RWKV_MS_WARP) {
        dst[i] = src ? src[i] : 0.0f;
    }
    rwkv_ms_warp::sync();
}

// the last token before t that wrote to its cell, -1 if none did
static __device__ int64_t rwkv_ms_prev_token(const rwkv_ms_args & a, int64_t t) {
    const int32_t cell = a.ids[2 * t];

    for (int64_t t1 = t; t1 > 0; t1 -= RWKV_MS_WARP) {
        const int64_t  i    = t1 - 1 - rwkv_ms_warp::lane();
        const unsigned hits = __ballot_sync(RWKV_MS_ALL, i >= 0 && a.ids[2 * i] == cell && a.ids[2 * i + 1] == GGML_RWKV_MS_MASK_LIVE);
        if (hits) {
            return t1 - __ffs(hits);
        }
    }
    return -1;
}

// the weights, at hand: one warp waits long for what it takes from elsewhere step by step
static __device__ const float * rwkv_ms_fetch_weights(const rwkv_ms_args & a, float * shared) {
    if (a.n_weights == 0) {
        return a.weights;
    }
    rwkv_ms_copy(a.n_weights, a.weights, shared);
    return shared;
}

// features of a token from its source and the previous one; by one warp
static __device__ void rwkv_ms_features(const rwkv_ms_args & a, const float * w, int64_t t, const float * prev, const ggml_rwkv_ms_row & row, float * shared) {
    if (!a.has_core()) {
        ggml_rwkv_ms_delta_features<rwkv_ms_warp>(a.p, { a.p, w }, a.x_of(t), row);
        return;
    }
    ggml_rwkv_ms_source<rwkv_ms_warp>(a.p, a.x_of(t), row.s);
    ggml_rwkv_ms_token_features<rwkv_ms_warp>(a.p, { a.p, w }, a.x_of(t), prev, row, { a.p, shared });
}

// what dst has of a token; by one warp
static __device__ void rwkv_ms_output(const rwkv_ms_args & a, const float * w, int64_t t, const ggml_rwkv_ms_row & row, float * shared) {
    const int D = a.p.n_head * a.p.n_rank;

    if (a.ids[2 * t + 1] == GGML_RWKV_MS_MASK_PADDING) {
        rwkv_ms_copy(D, nullptr, row.out);
    } else if (a.has_core()) {
        ggml_rwkv_ms_token_output<rwkv_ms_warp>(a.p, { a.p, w }, row, { a.p, shared });
    } else {
        rwkv_ms_copy(D, row.read, row.out);
    }
    ggml_rwkv_ms_token_guard<rwkv_ms_warp>(D, row.out);
    rwkv_ms_copy(a.p.trace ? ggml_rwkv_ms_row::n_trace(a.p) : D, a.p.trace ? row.s : row.out, a.dst + t * a.stride_dst);
}

// grid: tokens; block: one warp; shared: n_weights + D + n_scratch
static __global__ void rwkv_ms_features_kernel(const rwkv_ms_args a) {
    GGML_RWKV_MS_SHARED(shared);

    const int     D    = a.p.n_head * a.p.n_rank;
    const int64_t t    = blockIdx.x;
    const int32_t cell = rwkv_ms_cell_of(a, t);

    const ggml_rwkv_ms_row row = a.row_of(t);

    if (!a.weights) {
        rwkv_ms_copy(ggml_rwkv_ms_row::n_row(a.p), nullptr, row.s);
        return;
    }

    const float * w      = rwkv_ms_fetch_weights(a, shared);
    float *       prev   = shared + a.n_weights;
    const int64_t t_prev = a.has_core() ? rwkv_ms_prev_token(a, t) : -1;
    if (t_prev < 0) {
        rwkv_ms_copy(D, a.has_core() ? a.prev_of(cell) : nullptr, prev);
    } else {
        ggml_rwkv_ms_source<rwkv_ms_warp>(a.p, a.x_of(t_prev), prev);
    }
    rwkv_ms_features(a, w, t, prev, row, prev + D);
}

// sum over the lanes of a state (the rows of it), or over those of all states that have the same row
template <int R>
static __device__ float rwkv_ms_sum_rows(float x) {
    for (int o = 1; o < R; o *= 2) {
        x += __shfl_xor_sync(RWKV_MS_ALL, x, o);
    }
    return x;
}

template <int R>
static __device__ float rwkv_ms_sum_states(float x) {
    for (int o = R; o < RWKV_MS_WARP; o *= 2) {
        x += __shfl_xor_sync(RWKV_MS_ALL, x, o);
    }
    return x;
}

template <int R>
static __device__ float rwkv_ms_max_states(float x) {
    for (int o = R; o < RWKV_MS_WARP; o *= 2) {
        x = fmaxf(x, __shfl_xor_sync(RWKV_MS_ALL, x, o));
    }
    return x;
}

// two chains of additions, because the scan waits for them
template <int R>
static __device__ float rwkv_ms_dot(const float * x, const float * y) {
    float even = 0.0f;
    float odd  = 0.0f;
#pragma unroll
    for (int j = 0; j < R; j += 2) {
        even += x[j] * y[j];
        odd += x[j + 1] * y[j + 1];
    }
    return even + odd;
}

// the rows of a head's states that a lane has, K of them; all functions are for a whole warp
template <int R, int K>
struct rwkv_ms_rows {
    float    S[K][R];
    unsigned written = 0; // bit k: row k

    static __device__ int i() { return threadIdx.x % R; }

    static __device__ int state_of(int k) { return (threadIdx.x + k * RWKV_MS_WARP) / R; }

    __device__ void load(const float * S_head, int M) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int j = 0; j < R; ++j) {
                S[k][j] = state_of(k) < M ? S_head[(state_of(k) * R + j) * R + i()] : 0.0f;
            }
        }
    }

    // what was written, nothing else
    __device__ void store(float * S_head) const {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (written >> k & 1) {
#pragma unroll
                for (int j = 0; j < R; ++j) {
                    S_head[(state_of(k) * R + j) * R + i()] = S[k][j];
                }
            }
        }
    }

    __device__ void put(float * history) const {
#pragma unroll
        for (int x = 0; x < K * R; ++x) {
            history[x * RWKV_MS_WARP + threadIdx.x] = S[x / R][x % R];
        }
    }

    __device__ void get(const float * history) {
#pragma unroll
        for (int x = 0; x < K * R; ++x) {
            S[x / R][x % R] = history[x * RWKV_MS_WARP + threadIdx.x];
        }
    }

    // the read of head n and how much of it is each state's
    __device__ void read(const ggml_rwkv_ms_params & p, const float * r, bool reads, int n, const ggml_rwkv_ms_row & row) const {
        const float r_norm = sqrtf(rwkv_ms_dot<R>(r, r));

        float y[K], score[K];
        float score_max = -INFINITY;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            y[k]     = rwkv_ms_dot<R>(S[k], r);
            score[k] = rwkv_ms_sum_rows<R>(y[k] * r[i()]);
            if (p.semantics != 2) {
                score[k] /= sqrtf((float) R);
            } else {
                score[k] /= fmaxf(sqrtf(rwkv_ms_sum_rows<R>(y[k] * y[k])), 1e-6f) * fmaxf(r_norm, 1e-6f);
            }
            if (state_of(k) >= p.n_state) {
                score[k] = -INFINITY;
            }
            score_max = fmaxf(score_max, score[k]);
        }
        score_max = rwkv_ms_max_states<R>(score_max);

        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            score[k] = expf(score[k] - score_max);
            sum += score[k];
        }
        sum = rwkv_ms_sum_states<R>(sum);

        float read = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            read += score[k] / sum * y[k];
        }
        read = rwkv_ms_sum_states<R>(read);

        if (threadIdx.x < R) {
            row.read[n * R + i()] = reads ? read : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (i() == 0 && state_of(k) < p.n_state) {
                row.route[n * p.n_state + state_of(k)] = reads ? score[k] / sum : 0.0f;
            }
        }
    }

    // a token into state m; f: of this head
    __device__ void write(float erase_gate, const ggml_rwkv_ms_features & f, int m) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (state_of(k) == m) {
                const float erased = rwkv_ms_dot<R>(S[k], f.a) * erase_gate * f.erase[i()];
#pragma unroll
                for (int j = 0; j < R; ++j) {
                    S[k][j] = ggml_rwkv_ms_update(S[k][j], f.keep[i()], f.decay[j], f.write[i()], f.v[i()], f.k[j], erased, f.b[j]);
                }
                written |= 1u << k;
            }
        }
    }
};

// which state a cell's next token is written to
struct rwkv_ms_counter {
    int32_t m;    // state
    int32_t n_m;  // tokens written to it in this turn
    float   n_hi; // turns

    __device__ void load(const ggml_rwkv_ms_params & p, const float * counter) {
        if (!(counter[0] >= 0.0f && counter[0] < (float) (p.n_state * p.n_chunk))) {
            __trap(); // NaN too
        }
        m    = (int32_t) counter[0] / p.n_chunk;
        n_m  = (int32_t) counter[0] % p.n_chunk;
        n_hi = counter[1];
    }

    __device__ void store(const ggml_rwkv_ms_params & p, float * counter) const {
        counter[0] = (float) (m * p.n_chunk + n_m);
        counter[1] = n_hi;
    }

    __device__ void advance(const ggml_rwkv_ms_params & p) {
        if (++n_m < p.n_chunk) {
            return;
        }
        n_m = 0;
        if (++m == p.n_state) {
            m = 0;
            n_hi += 1.0f;
        }
    }
};

static __device__ ggml_rwkv_ms_features rwkv_ms_of_head(const ggml_rwkv_ms_features & f, int i) {
    return { f.r + i, f.decay + i, f.k + i, f.v + i, f.a + i, f.b + i, f.keep + i, f.erase + i, f.write + i };
}

// bit i: token t0 + i is one of the cell
static __device__ unsigned rwkv_ms_tokens_of(const rwkv_ms_args & a, int64_t t0, int cell) {
    const int64_t t = t0 + rwkv_ms_warp::lane();
    return __ballot_sync(RWKV_MS_ALL, t < a.n_tokens && rwkv_ms_cell_of(a, t) == cell);
}

// All three of a token, few tokens. grid: cells; block: warp x heads; shared: n_weights + D + n_row + n_scratch
template <int R, int K>
static __global__ void RWKV_MS_BOUNDS(R) rwkv_ms_fused_kernel(const rwkv_ms_args a) {
    GGML_RWKV_MS_SHARED(shared);

    const ggml_rwkv_ms_params & p = a.p;

    const int  D     = p.n_head * R;
    const int  n     = threadIdx.y;
    const int  cell  = blockIdx.x;
    const bool first = n == 0; // the warp that works for all heads

    float * S_head = a.state + cell * a.stride_state + n * p.n_state * R * R;
    float * prev   = a.prev_of(cell);

    const float *          w       = a.weights;
    float *                s_prev  = shared + a.n_weights;
    float *                scratch = s_prev + D + ggml_rwkv_ms_row::n_row(p);
    const ggml_rwkv_ms_row row     = { p, s_prev + D };

    rwkv_ms_rows<R, K> rows;
    rwkv_ms_counter    counter;
    bool               loaded = false;
    bool               wrote  = false;

    for (int64_t t0 = 0; t0 < a.n_tokens; t0 += RWKV_MS_WARP) {
        for (unsigned own = rwkv_ms_tokens_of(a, t0, cell); own; own &= own - 1) {
            const int64_t t    = t0 + __ffs(own) - 1;
            const int32_t mask = a.ids[2 * t + 1];

            if (!loaded) {
                rows.load(S_head, p.n_state);
                counter.load(p, a.counter_of(cell));
                if (first) {
                    w = rwkv_ms_fetch_weights(a, shared);
                    rwkv_ms_copy(D, a.has_core() ? prev : nullptr, s_prev);
                }
                loaded = true;
            }
            if (first) {
                if (a.weights) {
                    rwkv_ms_features(a, w, t, s_prev, row, scratch);
                } else {
                    rwkv_ms_copy(ggml_rwkv_ms_row::n_row(p), nullptr, row.s);
                }
            }
            __syncthreads();

            const ggml_rwkv_ms_features f = rwkv_ms_of_head(a.features_of(t, row), n * R);

            rows.read(p, f.r, mask != GGML_RWKV_MS_MASK_PADDING, n, row);
            if (mask == GGML_RWKV_MS_MASK_LIVE) {
                rows.write(p.erase_gate, f, counter.m);
                counter.advance(p);
                wrote = true;
            }
            __syncthreads();

            if (first) {
                rwkv_ms_output(a, w, t, row, scratch);
                if (mask == GGML_RWKV_MS_MASK_LIVE && a.has_core()) {
                    rwkv_ms_copy(D, row.s, s_prev);
                }
            } // the others wait for it before they read
        }
    }

    if (!wrote) {
        return; // the same for all warps
    }
    rows.store(S_head);
    if (first) {
        if (a.has_core()) {
            rwkv_ms_copy(D, s_prev, prev);
        }
        if (rwkv_ms_warp::lane() == 0) {
            counter.store(p, a.counter_of(cell));
        }
    }
}

// tokens whose features a warp of the scan fetches at once
static constexpr int RWKV_MS_TILE = 8;

// fetches what the scan takes of a token: decay k v a b and keep erase write, consecutive in a row as well as in given features
template <int R>
static __device__ void rwkv_ms_fetch(const ggml_rwkv_ms_features & f, int n, int D, float * to) {
    for (int x = rwkv_ms_warp::lane(); x < 8 * R; x += RWKV_MS_WARP) {
        const int     q    = x / R;
        const float * from = q < 5 ? f.decay + q * D : f.keep + (q - 5) * D;

        to[x] = from[n * R + x % R];
    }
}

// The writes of many tokens, and the state that each of them reads. grid: cells; block: warp x heads; shared: heads x tile x 8 R
template <int R, int K>
static __global__ void RWKV_MS_BOUNDS(R) rwkv_ms_scan_kernel(const rwkv_ms_args a) {
    GGML_RWKV_MS_SHARED(shared);

    const ggml_rwkv_ms_params & p = a.p;

    const int D    = p.n_head * R;
    const int n    = threadIdx.y;
    const int cell = blockIdx.x;

    float * S_head = a.state + cell * a.stride_state + n * p.n_state * R * R;
    float * prev   = a.prev_of(cell);
    float * tile   = shared + n * RWKV_MS_TILE * 8 * R;

    rwkv_ms_rows<R, K> rows;
    rwkv_ms_counter    counter;
    bool               loaded = false;
    int64_t            t_live = -1;

    for (int64_t t0 = 0; t0 < a.n_tokens; t0 += RWKV_MS_WARP) {
        const int64_t  t_lane = t0 + rwkv_ms_warp::lane();
        const unsigned live   = __ballot_sync(RWKV_MS_ALL, t_lane < a.n_tokens && a.ids[2 * t_lane + 1] == GGML_RWKV_MS_MASK_LIVE);

        unsigned own = rwkv_ms_tokens_of(a, t0, cell);
        if (own && !loaded) {
            rows.load(S_head, p.n_state);
            counter.load(p, a.counter_of(cell));
            loaded = true;
        }
        while (own) {
            unsigned next = own;
            for (int i = 0; i < RWKV_MS_TILE && next; ++i, next &= next - 1) {
                const int64_t t = t0 + __ffs(next) - 1;
                rwkv_ms_fetch<R>(a.features_of(t, a.row_of(t)), n, D, tile + i * 8 * R);
            }
            rwkv_ms_warp::sync();

            for (const float * f = tile; own != next; own &= own - 1, f += 8 * R) {
                const int     bit = __ffs(own) - 1;
                const int64_t t   = t0 + bit;

                rows.put(a.history_of(t, n));
                if (live >> bit & 1) {
                    rows.write(p.erase_gate, { nullptr, f, f + R, f + 2 * R, f + 3 * R, f + 4 * R, f + 5 * R, f + 6 * R, f + 7 * R }, counter.m);
                    counter.advance(p);
                    t_live = t;
                }
            }
            rwkv_ms_warp::sync();
        }
    }

    if (t_live < 0) {
        return; // the same for all warps
    }
    rows.store(S_head);
    __syncthreads(); // all have read the counter
    if (n == 0) {
        if (a.has_core()) {
            rwkv_ms_copy(D, a.row_of(t_live).s, prev);
        }
        if (rwkv_ms_warp::lane() == 0) {
            counter.store(p, a.counter_of(cell));
        }
    }
}

// Reads and outputs. grid: tokens; block: warp x heads; shared: n_scratch
template <int R, int K>
static __global__ void RWKV_MS_BOUNDS(R) rwkv_ms_read_kernel(const rwkv_ms_args a) {
    GGML_RWKV_MS_SHARED(shared);

    const int     n = threadIdx.y;
    const int64_t t = blockIdx.x;

    const ggml_rwkv_ms_row row = a.row_of(t);

    rwkv_ms_rows<R, K> rows;
    rows.get(a.history_of(t, n));
    rows.read(a.p, a.features_of(t, row).r + n * R, a.ids[2 * t + 1] != GGML_RWKV_MS_MASK_PADDING, n, row);
    __syncthreads();
    if (n == 0) {
        rwkv_ms_output(a, a.weights, t, row, shared);
    }
}

//
// launches
//

// tokens up to which one kernel is faster than three
static constexpr int RWKV_MS_FUSED_MAX = 8;

typedef void (*rwkv_ms_kernel)(const rwkv_ms_args a);

struct rwkv_ms_kernels {
    rwkv_ms_kernel fused, scan, read;

    int n_rows; // of a lane
};

template <int R, int K>
static inline rwkv_ms_kernels rwkv_ms_kernels_of() {
    return { rwkv_ms_fused_kernel<R, K>, rwkv_ms_scan_kernel<R, K>, rwkv_ms_read_kernel<R, K>, K };
}

template <int R>
static inline rwkv_ms_kernels rwkv_ms_kernels_of(int n_state) {
    const int n_rows = n_state * R;

    return n_rows <= RWKV_MS_WARP ? rwkv_ms_kernels_of<R, 1>() : n_rows <= 2 * RWKV_MS_WARP ? rwkv_ms_kernels_of<R, 2>()
                                                                                            : rwkv_ms_kernels_of<R, 4>();
}

static inline rwkv_ms_kernels rwkv_ms_kernels_of(const ggml_rwkv_ms_params & p) {
    return p.n_rank == 4 ? rwkv_ms_kernels_of<4>(p.n_state) : p.n_rank == 8 ? rwkv_ms_kernels_of<8>(p.n_state)
                                                                            : rwkv_ms_kernels_of<16>(p.n_state);
}

static constexpr int RWKV_MS_MAX_SHARED = 48 * 1024 / sizeof(float);

// floats of shared memory without the weights, the most that any of the kernels takes
static inline int rwkv_ms_n_shared(const ggml_rwkv_ms_params & p) {
    const int n_fused = p.n_head * p.n_rank + ggml_rwkv_ms_row::n_row(p) + ggml_rwkv_ms_scratch::n_scratch(p);
    const int n_scan  = p.n_head * RWKV_MS_TILE * 8 * p.n_rank;

    return n_fused > n_scan ? n_fused : n_scan;
}

// floats of work memory for a token: its row, and the states that it reads
static inline int64_t rwkv_ms_n_work(const ggml_rwkv_ms_params & p) {
    return ggml_rwkv_ms_row::n_row(p) + p.n_head * p.n_rank * rwkv_ms_kernels_of(p).n_rows * RWKV_MS_WARP;
}

// tokens that run through the three kernels at once, so that work memory has a limit
#ifndef RWKV_MS_MAX_WORK
#define RWKV_MS_MAX_WORK (16 * 1024 * 1024)
#endif

static inline int64_t rwkv_ms_n_piece(const ggml_rwkv_ms_params & p, int64_t n_tokens) {
    const int64_t n_piece = RWKV_MS_MAX_WORK / (rwkv_ms_n_work(p) * sizeof(float));

    return n_tokens < n_piece ? n_tokens : n_piece;
}

static inline bool rwkv_ms_is_supported(const ggml_rwkv_ms_params & p) {
    return (p.n_rank == 4 || p.n_rank == 8 || p.n_rank == 16) && p.n_state * p.n_rank <= 4 * RWKV_MS_WARP && p.n_head <= rwkv_ms_max_heads(p.n_rank) &&
            rwkv_ms_n_shared(p) <= RWKV_MS_MAX_SHARED;
}

static inline bool rwkv_ms_is_fused(int64_t n_tokens) {
    return n_tokens <= RWKV_MS_FUSED_MAX;
}

// launch(kernel, blocks, warps a block, floats of shared memory), in this order; with the arguments as they are then
template <typename F>
static inline void rwkv_ms_run(rwkv_ms_args & a, F && launch) {
    const rwkv_ms_kernels kernels   = rwkv_ms_kernels_of(a.p);
    const int             n_weights = a.weights ? ggml_rwkv_ms_n_weight(&a.p) : 0;
    int                   n_shared  = rwkv_ms_n_shared(a.p);

    if (n_shared + n_weights <= RWKV_MS_MAX_SHARED) {
        a.n_weights = n_weights;
        n_shared += n_weights;
    }
    if (rwkv_ms_is_fused(a.n_tokens)) {
        launch(kernels.fused, a.n_cells, a.p.n_head, n_shared);
        return;
    }
    const int64_t n_piece = rwkv_ms_n_piece(a.p, a.n_tokens);
    for (int64_t n_left = a.n_tokens; n_left > 0; n_left -= n_piece) {
        a.n_tokens = n_left < n_piece ? n_left : n_piece;
        launch(rwkv_ms_features_kernel, a.n_tokens, 1, n_shared);
        launch(kernels.scan, a.n_cells, a.p.n_head, n_shared);
        launch(kernels.read, a.n_tokens, a.p.n_head, n_shared);
        a.x += a.n_tokens * a.stride_x;
        a.ids += a.n_tokens * 2;
        a.dst += a.n_tokens * a.stride_dst;
    }
}
