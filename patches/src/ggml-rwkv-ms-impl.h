#pragma once

// The arithmetic of one token of a memory, all F32, for CPU and GPU. R is a compile-time constant where that pays (R > 0) or
// params.n_rank.
//
// A state matrix is stored as [j][i]: S[i][j] of the specification is S[j*R + i].

#include "ggml-rwkv-ms.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GGML_RWKV_MS_FUNC __host__ __device__ inline
#else
#define GGML_RWKV_MS_FUNC inline
#endif

// per-token features, [D] each
struct ggml_rwkv_ms_features {
    const float * r;
    const float * decay;
    const float * k;
    const float * v;
    const float * a;
    const float * b;
    const float * keep;
    const float * erase;
    const float * write;
};

// views into the packed weights, see ggml_rwkv_ms_n_weight: of the delta rule only those of the gates may be looked at
struct ggml_rwkv_ms_weights {
    // clang-format off
    const float * beta_b, * lambda_b; // nullptr if coupled
    const float * x;                  // [6][D]: r w k v a g
    const float * w0, * a0, * k_k, * k_a, * ln_x;
    const float * w1, * a1, * g1, * w2, * a2, * g2;
    const float * receptance, * key, * value, * output;
    // clang-format on

    GGML_RWKV_MS_FUNC ggml_rwkv_ms_weights(const ggml_rwkv_ms_params & p, const float * w) {
        const int D = p.n_head * p.n_rank;
        const int L = p.n_lora;

        beta_b   = w;
        lambda_b = p.couple_lambda ? nullptr : beta_b + p.n_gate;

        x   = beta_b + (p.couple_lambda ? 1 : 2) * p.n_gate;
        w0  = x + 6 * D;
        a0  = w0 + D;
        k_k = a0 + D;
        k_a = k_k + D;

        ln_x = k_a + D;

        w1 = ln_x + D;
        a1 = w1 + D * L;
        g1 = a1 + D * L;
        w2 = g1 + D * L;
        a2 = w2 + L * D;
        g2 = a2 + L * D;

        receptance = g2 + L * D;
        key        = receptance + D * D;
        value      = key + D * D;
        output     = value + D * D;
    }
};

// what is computed of one token: n_trace() values laid out as a traced dst row, then the rest of n_row()
struct ggml_rwkv_ms_row {
    // clang-format off
    float * s, * beta, * lam, * r, * w, * decay, * k, * v, * a, * b, * g, * read, * out; // [D]
    float * route;                  // [N*M]
    float * keep, * erase, * write; // [D]
    // clang-format on

    GGML_RWKV_MS_FUNC ggml_rwkv_ms_row(const ggml_rwkv_ms_params & p, float * row) {
        const int D = p.n_head * p.n_rank;

        s     = row;
        beta  = s + D;
        lam   = beta + D;
        r     = lam + D;
        w     = r + D;
        decay = w + D;
        k     = decay + D;
        v     = k + D;
        a     = v + D;
        b     = a + D;
        g     = b + D;
        read  = g + D;
        out   = read + D;
        route = out + D;
        keep  = route + p.n_head * p.n_state;
        erase = keep + D;
        write = erase + D;
    }

    GGML_RWKV_MS_FUNC ggml_rwkv_ms_features features() const { return { r, decay, k, v, a, b, keep, erase, write }; }

    static GGML_RWKV_MS_FUNC int n_trace(const ggml_rwkv_ms_params & p) { return 13 * p.n_head * p.n_rank + p.n_head * p.n_state; }

    static GGML_RWKV_MS_FUNC int n_row(const ggml_rwkv_ms_params & p) { return n_trace(p) + 3 * p.n_head * p.n_rank; }
};

// what is needed on the way to it
struct ggml_rwkv_ms_scratch {
    // clang-format off
    float * x, * y; // [D]
    float * lora;   // [L]
    // clang-format on

    GGML_RWKV_MS_FUNC ggml_rwkv_ms_scratch(const ggml_rwkv_ms_params & p, float * buf) {
        const int D = p.n_head * p.n_rank;

        x    = buf;
        y    = buf + D;
        lora = buf + 2 * D;
    }

    static GGML_RWKV_MS_FUNC int n_scratch(const ggml_rwkv_ms_params & p) { return 2 * p.n_head * p.n_rank + p.n_lora; }
};

GGML_RWKV_MS_FUNC float ggml_rwkv_ms_sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

GGML_RWKV_MS_FUNC float ggml_rwkv_ms_softplus(float x) {
    return x > 20.0f ? x : log1pf(expf(x));
}

// the fast math that CUDA code is compiled with has a tanh of 11 bits
GGML_RWKV_MS_FUNC float ggml_rwkv_ms_tanh(float x) {
#if defined(__CUDA_ARCH__) || defined(GGML_RWKV_MS_EMULATE_CUDA)
    const float t = expm1f(-2.0f * fabsf(x));
    return copysignf(-t / (t + 2.0f), x);
#else
    return tanhf(x);
#endif
}

// likewise its exp, whose errors near 1 would add up over a chunk
GGML_RWKV_MS_FUNC float ggml_rwkv_ms_decay(float w) {
#if defined(__CUDA_ARCH__) || defined(GGML_RWKV_MS_EMULATE_CUDA)
    return 1.0f + expm1f(-expf(w));
#else
    return expf(-expf(w));
#endif
}

// neither NaN nor infinite, by its bits: whatever the compiler was told to assume of floats
GGML_RWKV_MS_FUNC bool ggml_rwkv_ms_is_finite(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return (bits & 0x7f800000u) != 0x7f800000u;
}

GGML_RWKV_MS_FUNC float ggml_rwkv_ms_norm(int n, const float * x) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) {
        sum += x[i] * x[i];
    }
    return sqrtf(sum);
}

// one element of the state that is written; erased: erase_gate * erase_i * (S @ a)_i
GGML_RWKV_MS_FUNC float ggml_rwkv_ms_update(float S, float keep, float decay, float write, float v, float k, float erased, float b) {
    return keep * decay * S + write * v * k + erased * b;
}

// Who works on a token: one thread of the CPU, or the lanes of a warp, which take every n_lane()-th element.
struct ggml_rwkv_ms_thread {
    static int lane() { return 0; }

    static int n_lane() { return 1; }

    static void sync() {}

    static bool any(bool x) { return x; }

    // y[n_out] = x[n_in] @ w[n_in][n_out]; along the contiguous index
    static void matvec(int n_in, int n_out, const float * w, const float * x, float * GGML_RESTRICT y) {
        for (int o = 0; o < n_out; ++o) {
            y[o] = 0.0f;
        }
        for (int i = 0; i < n_in; ++i) {
            for (int o = 0; o < n_out; ++o) {
                y[o] += w[i * n_out + o] * x[i];
            }
        }
    }
};

// l2 norm of tanh, each head by itself
template <typename lanes>
GGML_RWKV_MS_FUNC void ggml_rwkv_ms_normalize(const ggml_rwkv_ms_params & p, const float * in, float * out) {
    const int R = p.n_rank;

    for (int n = lanes::lane(); n < p.n_head; n += lanes::n_lane()) {
        for (int i = n * R; i < (n + 1) * R; ++i) {
            out[i] = ggml_rwkv_ms_tanh(in[i]);
        }
        const float norm = fmaxf(ggml_rwkv_ms_norm(R, out + n * R), 1e-6f);
        for (int i = n * R; i < (n + 1) * R; ++i) {
            out[i] /= norm;
        }
    }
}

// the memory source of a token of RWKV-MS
template <typename lanes>
GGML_RWKV_MS_FUNC void ggml_rwkv_ms_source(const ggml_rwkv_ms_params & p, const float * in, float * s) {
    const int R = p.n_rank;

    if (p.semantics == 2) {
        ggml_rwkv_ms_normalize<lanes>(p, in, s);
    } else {
        for (int i = lanes::lane(); i < p.n_head * R; i += lanes::n_lane()) {
            s[i] = in[i];
        }
    }
    lanes::sync();
}

// what is kept, erased and written of a row; in: projections of the gates
template <typename lanes>
GGML_RWKV_MS_FUNC void ggml_rwkv_ms_token_gates(const ggml_rwkv_ms_params & p, const ggml_rwkv_ms_weights & w, const float * in, const ggml_rwkv_ms_row & t) {
    const int R = p.n_rank;
    const int D = p.n_head * R;
    const int G = p.n_gate;

    for (int i = lanes::lane(); i < D; i += lanes::n_lane()) {
        const int ig = G == D ? i : i / R; // a gate per row, or one per head

        t.beta[i] = ggml_rwkv_ms_sigmoid(in[ig] + w.beta_b[ig]);
        t.lam[i]  = w.lambda_b ? ggml_rwkv_ms_sigmoid(in[G + ig] + w.lambda_b[ig]) : 1.0f - t.beta[i];

        t.keep[i]  = t.lam[i];
        t.erase[i] = t.beta[i];
        t.write[i] = t.beta[i];
        if (p.update == GGML_RWKV_MS_UPDATE_LAMBDA_OUTSIDE) {
            t.erase[i] *= t.lam[i];
        }
        if (p.update == GGML_RWKV_MS_UPDATE_NO_LAMBDA) {
            t.keep[i] = 1.0f;
        }
        if (p.semantics == 2) {
            t.keep[i]  = 1.0f;
            t.erase[i] = t.write[i];
        }
    }
}

// The features of the delta rule: S <- keep S - erase (S k) k^T + write v k^T, which is the scan of RWKV-MS with a = -k, b = k.
template <typename lanes>
GGML_RWKV_MS_FUNC void ggml_rwkv_ms_delta_features(
        const ggml_rwkv_ms_params &  p,
        const ggml_rwkv_ms_weights & w,
        const float *                in,  // [3*D + G (+ G)]
        const ggml_rwkv_ms_row &     t) {
    const int D = p.n_head * p.n_rank;

    ggml_rwkv_ms_token_gates<lanes>(p, w, in + 3 * D, t);

    if (p.normalize_qk) {
        ggml_rwkv_ms_normalize<lanes>(p, in, t.r);
        ggml_rwkv_ms_normalize<lanes>(p, in + D, t.k);
        lanes::sync();
    }
    for (int i = lanes::lane(); i < D; i += lanes::n_lane()) {
        if (!p.normalize_qk) {
            t.r[i] = in[i];
            t.k[i] = in[D + i];
        }
        t.s[i] = t.v[i] = in[2 * D + i];

        t.a[i] = -t.k[i];
        t.b[i] = t.k[i];

        t.w[i]     = 0.0f;
        t.decay[i] = 1.0f;
        t.g[i]     = 1.0f;
    }
    lanes::sync();
}

// gates and the features of the scan; t.s is the source of the token
template <typename lanes>
GGML_RWKV_MS_FUNC void ggml_rwkv_ms_token_features(
        const ggml_rwkv_ms_params &  p,
        const ggml_rwkv_ms_weights & w,
        const float *                in,   // [D + G (+ G)]
        const float *                prev, // [D]
        const ggml_rwkv_ms_row &     t,
        const ggml_rwkv_ms_scratch & tmp) {
    const int R = p.n_rank;
    const int N = p.n_head;
    const int D = N * R;
    const int L = p.n_lora;

    const int i0 = lanes::lane();
    const int di = lanes::n_lane();

    ggml_rwkv_ms_token_gates<lanes>(p, w, in + D, t);

    // time shift
    auto shift = [&](int ix) {
        for (int i = i0; i < D; i += di) {
            tmp.x[i] = t.s[i] + (prev[i] - t.s[i]) * w.x[ix * D + i];
        }
        lanes::sync();
    };

    shift(0);
    lanes::matvec(D, D, w.receptance, tmp.x, t.r);

    shift(1);
    lanes::matvec(D, L, w.w1, tmp.x, tmp.lora);
    for (int i = i0; i < L; i += di) {
        tmp.lora[i] = ggml_rwkv_ms_tanh(tmp.lora[i]);
    }
    lanes::sync();
    lanes::matvec(L, D, w.w2, tmp.lora, t.w);
    for (int i = i0; i < D; i += di) {
        t.w[i]     = -ggml_rwkv_ms_softplus(-(w.w0[i] + t.w[i])) - 0.5f;
        t.decay[i] = ggml_rwkv_ms_decay(t.w[i]);
    }

    shift(2);
    lanes::matvec(D, D, w.key, tmp.x, t.k);

    shift(3);
    lanes::matvec(D, D, w.value, tmp.x, t.v);

    shift(4);
    lanes::matvec(D, L, w.a1, tmp.x, tmp.lora);
    lanes::matvec(L, D, w.a2, tmp.lora, tmp.y);
    for (int n = i0; n < N; n += di) {
        float * kk = t.a + n * R;
        for (int i = 0; i < R; ++i) {
            kk[i] = t.k[n * R + i] * w.k_k[n * R + i];
        }
        const float norm = fmaxf(ggml_rwkv_ms_norm(R, kk), 1e-12f);
        for (int i = 0; i < R; ++i) {
            const int   id = n * R + i;
            const float ag = ggml_rwkv_ms_sigmoid(w.a0[id] + tmp.y[id]);

            kk[i] /= norm;
            t.b[id] = kk[i] * ag;
            t.k[id] *= 1.0f + (ag - 1.0f) * w.k_a[id];
            kk[i] = -kk[i];
        }
    }

    shift(5);
    lanes::matvec(D, L, w.g1, tmp.x, tmp.lora);
    for (int i = i0; i < L; i += di) {
        tmp.lora[i] = ggml_rwkv_ms_sigmoid(tmp.lora[i]);
    }
    lanes::sync();
    lanes::matvec(L, D, w.g2, tmp.lora, t.g);
}

// group norm of the reads (a group per head), gate and output projection
template <typename lanes>
GGML_RWKV_MS_FUNC void ggml_rwkv_ms_token_output(
        const ggml_rwkv_ms_params &  p,
        const ggml_rwkv_ms_weights & w,
        const ggml_rwkv_ms_row &     t,
        const ggml_rwkv_ms_scratch & tmp) {
    const int R = p.n_rank;
    const int D = p.n_head * R;

    for (int n = lanes::lane(); n < p.n_head; n += lanes::n_lane()) {
        const float * read = t.read + n * R;

        float mean = 0.0f;
        for (int i = 0; i < R; ++i) {
            mean += read[i];
        }
        mean /= R;

        float var = 0.0f;
        for (int i = 0; i < R; ++i) {
            var += (read[i] - mean) * (read[i] - mean);
        }
        var /= R;

        const float scale = 1.0f / sqrtf(var + 64e-5f);
        for (int i = 0; i < R; ++i) {
            tmp.y[n * R + i] = (read[i] - mean) * scale * w.ln_x[n * R + i] * t.g[n * R + i];
        }
    }
    lanes::sync();

    lanes::matvec(D, D, w.output, tmp.y, t.out);
}

// The last step of a token: what is not finite is zeros, all D of it. NaN would get into the cells of a KV cache that texts
// share and from there, masked or not (0 * NaN), into all of them. The state keeps what is not finite: there it is seen.
//
// What is finite is small, however large the state: the group norm leaves at most sqrt(R - 1) of a read of any size, and zero
// where its variance overflows (from 1e19 on), so that |out[o]| <= sqrt(R - 1) * sum_i |ln_x[i] * output[i][o]| * sum_l |g2[l][i]|,
// which is the weights' alone, and is of the order of 10 where they are of the order of 1/sqrt(D). Without weights out is the read.
template <typename lanes>
GGML_RWKV_MS_FUNC void ggml_rwkv_ms_token_guard(int D, float * out) {
    bool bad = false;
    for (int i = lanes::lane(); i < D; i += lanes::n_lane()) {
        bad = bad || !ggml_rwkv_ms_is_finite(out[i]);
    }
    if (lanes::any(bad)) {
        for (int i = lanes::lane(); i < D; i += lanes::n_lane()) {
            out[i] = 0.0f;
        }
    }
    lanes::sync();
}
