#pragma once

// The kernels of GGML_OP_RWKV_MS. One warp has the rows of all states of a head: lane m*R + i has row i of state m, all F32.
//
// Few tokens run through one kernel. Many run through three: features and outputs of all tokens at once, and between them the
// serial scan alone, so that its latency is all that is left of a prompt's.
//
// Nothing here needs more of CUDA than what tests/native/test-rwkv-ms-cuda-emulated.cpp emulates.

#include "ggml-rwkv-ms-impl.h"

#ifndef GGML_RWKV_MS_SHARED
#define GGML_RWKV_MS_SHARED(name) extern __shared__ float name[]
#endif

static constexpr int      RWKV_MS_WARP = 32;
static constexpr unsigned RWKV_MS_ALL  = 0xffffffffu;

struct rwkv_ms_warp {
    static __device__ int lane() { return threadIdx.x; }

    static __device__ int n_lane() { return RWKV_MS_WARP; }

    static __device__ void sync() { __syncwarp(); }

    static __device__ void matvec(int n_in, int n_out, const float * w, const float * x, float * y) {
        for (int o = lane(); o < n_out; o += n_lane()) {
            float sum = 0.0f;
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
    const float *   weights; // nullptr: x has the features
    float *         state;
    int64_t         stride_state;
    int64_t         n_cells;
    float *         rows; // [n_tokens, n_row], of the three kernels
    float *         dst;
    int64_t         stride_dst;

    __device__ const float * x_of(int64_t t) const { return x + t * stride_x; }

    __device__ ggml_rwkv_ms_row row_of(int64_t t) const { return { p, rows + t * ggml_rwkv_ms_row::n_row(p) }; }

    // n_lo, n_hi of a cell follow its matrices and prev
    __device__ float * prev_of(int cell) const { return state + cell * stride_state + p.n_head * p.n_state * p.n_rank * p.n_rank; }
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

// features of a token from its source and the previous one; by one warp
static __device__ void rwkv_ms_features(const rwkv_ms_args & a, int64_t t, const float * prev, const ggml_rwkv_ms_row & row, float * shared) {
    ggml_rwkv_ms_source<rwkv_ms_warp>(a.p, a.x_of(t), row.s);
    ggml_rwkv_ms_token_features<rwkv_ms_warp>(a.p, { a.p, a.weights }, a.x_of(t), prev, row, { a.p, shared });
}

// what dst has of a token; by one warp
static __device__ void rwkv_ms_output(const rwkv_ms_args & a, int64_t t, const ggml_rwkv_ms_row & row, float * shared) {
    const int D = a.p.n_head * a.p.n_rank;

    if (a.ids[2 * t + 1] == GGML_RWKV_MS_MASK_PADDING) {
        rwkv_ms_copy(D, nullptr, row.out);
    } else if (a.weights) {
        ggml_rwkv_ms_token_output<rwkv_ms_warp>(a.p, { a.p, a.weights }, row, { a.p, shared });
    } else {
        rwkv_ms_copy(D, row.read, row.out);
    }
    rwkv_ms_copy(a.p.trace ? ggml_rwkv_ms_row::n_trace(a.p) : D, a.p.trace ? row.s : row.out, a.dst + t * a.stride_dst);
}

// grid: tokens; block: one warp; shared: D + n_scratch
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

    const int64_t t_prev = rwkv_ms_prev_token(a, t);
    if (t_prev < 0) {
        rwkv_ms_copy(D, a.prev_of(cell), shared);
    } else {
        ggml_rwkv_ms_source<rwkv_ms_warp>(a.p, a.x_of(t_prev), shared);
    }
    rwkv_ms_features(a, t, shared, row, shared + D);
}

// grid: tokens; block: one warp; shared: n_scratch
static __global__ void rwkv_ms_output_kernel(const rwkv_ms_args a) {
    GGML_RWKV_MS_SHARED(shared);

    rwkv_ms_output(a, blockIdx.x, a.row_of(blockIdx.x), shared);
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

// grid: cells; block: warp x heads; K: rows of each lane; shared with fused: D + n_row + n_scratch
template <int R, int K, bool fused>
static __global__ void rwkv_ms_scan_kernel(const rwkv_ms_args a) {
    GGML_RWKV_MS_SHARED(shared);

    const ggml_rwkv_ms_params & p = a.p;

    const int N    = p.n_head;
    const int M    = p.n_state;
    const int D    = N * R;
    const int lane = threadIdx.x;
    const int n    = threadIdx.y;
    const int i    = lane % R;
    const int cell = blockIdx.x;

    const int32_t n_period = M * p.n_chunk;

    float * S_head  = a.state + cell * a.stride_state + n * M * R * R;
    float * prev    = a.prev_of(cell);
    float * counter = prev + D;

    float * s_prev    = shared;
    float * row_fused = s_prev + D;
    float * scratch   = row_fused + ggml_rwkv_ms_row::n_row(p);

    const bool first = n == 0; // the warp that works for all heads

    // the rows of this lane, loaded when the first token is found
    float    S[K][R];
    unsigned written = 0; // bit k: row k
    bool     loaded  = false;
    int32_t  n_lo    = 0;
    float    n_hi    = 0.0f;
    int64_t  t_live  = -1;

    for (int64_t t0 = 0; t0 < a.n_tokens; t0 += RWKV_MS_WARP) {
        const bool has = t0 + lane < a.n_tokens;
        unsigned   own = __ballot_sync(RWKV_MS_ALL, has && rwkv_ms_cell_of(a, t0 + lane) == cell);

        for (; own; own &= own - 1) {
            const int64_t t    = t0 + __ffs(own) - 1;
            const int32_t mask = a.ids[2 * t + 1];

            if (!loaded) {
                for (int k = 0; k < K; ++k) {
                    const int m = (lane + k * RWKV_MS_WARP) / R;
                    for (int j = 0; j < R; ++j) {
                        S[k][j] = m < M ? S_head[m * R * R + j * R + i] : 0.0f;
                    }
                }
                if (!(counter[0] >= 0.0f && counter[0] < (float) n_period)) {
                    __trap(); // NaN too
                }
                n_lo = (int32_t) counter[0];
                n_hi = counter[1];
                if (fused && first) {
                    rwkv_ms_copy(D, prev, s_prev);
                }
                loaded = true;
            }

            const ggml_rwkv_ms_row row = fused ? ggml_rwkv_ms_row(p, row_fused) : a.row_of(t);

            if (fused) {
                if (first && a.weights) {
                    rwkv_ms_features(a, t, s_prev, row, scratch);
                }
                if (first && !a.weights) {
                    rwkv_ms_copy(ggml_rwkv_ms_row::n_row(p), nullptr, row.s);
                }
                __syncthreads();
            }

            const float *               x = a.x_of(t);
            const ggml_rwkv_ms_features f = a.weights ? row.features()
                                                      : ggml_rwkv_ms_features{ x, x + D, x + 2 * D, x + 3 * D, x + 4 * D, x + 5 * D, x + 6 * D, x + 7 * D, x + 8 * D };

            float r[R];
            float r_norm = 0.0f;
            for (int j = 0; j < R; ++j) {
                r[j] = f.r[n * R + j];
                r_norm += r[j] * r[j];
            }
            const float r_i = f.r[n * R + i];

            // read
            float y[K], score[K];
            float score_max = -INFINITY;
            for (int k = 0; k < K; ++k) {
                y[k] = 0.0f;
                for (int j = 0; j < R; ++j) {
                    y[k] += S[k][j] * r[j];
                }
                score[k] = rwkv_ms_sum_rows<R>(y[k] * r_i);
                if (p.semantics == 1) {
                    score[k] /= sqrtf((float) R);
                } else {
                    score[k] /= fmaxf(sqrtf(rwkv_ms_sum_rows<R>(y[k] * y[k])), 1e-6f) * fmaxf(sqrtf(r_norm), 1e-6f);
                }
                if ((lane + k * RWKV_MS_WARP) / R >= M) {
                    score[k] = -INFINITY;
                }
                score_max = fmaxf(score_max, score[k]);
            }
            score_max = rwkv_ms_max_states<R>(score_max);

            float sum = 0.0f;
            for (int k = 0; k < K; ++k) {
                score[k] = expf(score[k] - score_max);
                sum += score[k];
            }
            sum = rwkv_ms_sum_states<R>(sum);

            float read = 0.0f;
            for (int k = 0; k < K; ++k) {
                read += score[k] / sum * y[k];
            }
            read = rwkv_ms_sum_states<R>(read);

            const bool reads = mask != GGML_RWKV_MS_MASK_PADDING;
            if (lane < R) {
                row.read[n * R + i] = reads ? read : 0.0f;
            }
            for (int k = 0; k < K; ++k) {
                const int m = (lane + k * RWKV_MS_WARP) / R;
                if (i == 0 && m < M) {
                    row.route[n * M + m] = reads ? score[k] / sum : 0.0f;
                }
            }

            // write
            if (mask == GGML_RWKV_MS_MASK_LIVE) {
                const int m_write = n_lo / p.n_chunk;

                for (int k = 0; k < K; ++k) {
                    if ((lane + k * RWKV_MS_WARP) / R != m_write) {
                        continue;
                    }
                    float erased = 0.0f;
                    for (int j = 0; j < R; ++j) {
                        erased += S[k][j] * f.a[n * R + j];
                    }
                    erased *= p.erase_gate * f.erase[n * R + i];
                    for (int j = 0; j < R; ++j) {
                        const int id = n * R + j;

                        S[k][j] = ggml_rwkv_ms_update(S[k][j], f.keep[n * R + i], f.decay[id], f.write[n * R + i], f.v[n * R + i], f.k[id], erased, f.b[id]);
                    }
                    written |= 1u << k;
                }

                t_live = t;
                if (++n_lo == n_period) {
                    n_lo = 0;
                    n_hi += 1.0f;
                }
            }

            if (fused) {
                __syncthreads();
                if (first) {
                    rwkv_ms_output(a, t, row, scratch);
                    if (mask == GGML_RWKV_MS_MASK_LIVE && a.weights) {
                        rwkv_ms_copy(D, row.s, s_prev);
                    }
                }
                __syncthreads();
            }
        }
    }

    if (t_live < 0) {
        return; // the same for all warps
    }

    // what was written, nothing else
    for (int k = 0; k < K; ++k) {
        if (written >> k & 1) {
            const int m = (lane + k * RWKV_MS_WARP) / R;
            for (int j = 0; j < R; ++j) {
                S_head[m * R * R + j * R + i] = S[k][j];
            }
        }
    }
    __syncthreads(); // all have read the counter
    if (first) {
        if (a.weights) {
            rwkv_ms_copy(D, fused ? s_prev : a.row_of(t_live).s, prev);
        }
        if (lane == 0) {
            counter[0] = (float) n_lo;
            counter[1] = n_hi;
        }
    }
}

//
// launches
//

// tokens up to which one kernel is faster than three
static constexpr int RWKV_MS_FUSED_MAX = 8;

static inline int rwkv_ms_n_shared(const ggml_rwkv_ms_params & p) {
    return p.n_head * p.n_rank + ggml_rwkv_ms_row::n_row(p) + ggml_rwkv_ms_scratch::n_scratch(p);
}

static inline bool rwkv_ms_is_supported(const ggml_rwkv_ms_params & p) {
    return (p.n_rank == 4 || p.n_rank == 8 || p.n_rank == 16) && p.n_state * p.n_rank <= 4 * RWKV_MS_WARP && p.n_head <= 16 &&
            rwkv_ms_n_shared(p) * sizeof(float) <= 48 * 1024;
}

static inline bool rwkv_ms_is_fused(int64_t n_tokens) {
    return n_tokens <= RWKV_MS_FUSED_MAX;
}

typedef void (*rwkv_ms_kernel)(const rwkv_ms_args a);

template <int R, bool fused>
static inline rwkv_ms_kernel rwkv_ms_scan_of(int n_state) {
    const int n_rows = n_state * R;

    return n_rows <= RWKV_MS_WARP        ? rwkv_ms_scan_kernel<R, 1, fused>
            : n_rows <= 2 * RWKV_MS_WARP ? rwkv_ms_scan_kernel<R, 2, fused>
                                         : rwkv_ms_scan_kernel<R, 4, fused>;
}

template <bool fused>
static inline rwkv_ms_kernel rwkv_ms_scan_of(const ggml_rwkv_ms_params & p) {
    return p.n_rank == 4    ? rwkv_ms_scan_of<4, fused>(p.n_state)
            : p.n_rank == 8 ? rwkv_ms_scan_of<8, fused>(p.n_state)
                            : rwkv_ms_scan_of<16, fused>(p.n_state);
}

// launch(kernel, blocks, warps a block, floats of shared memory), in this order
template <typename F>
static inline void rwkv_ms_run(const rwkv_ms_args & a, F && launch) {
    const int n_shared = rwkv_ms_n_shared(a.p);

    if (rwkv_ms_is_fused(a.n_tokens)) {
        launch(rwkv_ms_scan_of<true>(a.p), a.n_cells, a.p.n_head, n_shared);
        return;
    }
    launch(rwkv_ms_features_kernel, a.n_tokens, 1, n_shared);
    launch(rwkv_ms_scan_of<false>(a.p), a.n_cells, a.p.n_head, 0);
    launch(rwkv_ms_output_kernel, a.n_tokens, 1, n_shared);
}
