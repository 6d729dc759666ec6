#pragma once

// The arithmetic of one token of RWKV-MS, all F32. R is a compile-time constant where that pays (R > 0) or params.n_rank.
//
// A state matrix is stored as [j][i]: S[i][j] of the specification is S[j*R + i].

#include "ggml-rwkv-ms.h"

#include <cmath>

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

static inline float ggml_rwkv_ms_sigmoid(float x) {
    return 1.0f / (1.0f + std::exp(-x));
}

static inline float ggml_rwkv_ms_softplus(float x) {
    return x > 20.0f ? x : std::log1p(std::exp(x));
}

// y[n_out] = x[n_in] @ w[n_in][n_out]
static inline void ggml_rwkv_ms_matvec(int n_in, int n_out, const float * w, const float * x, float * GGML_RESTRICT y) {
    for (int o = 0; o < n_out; ++o) {
        y[o] = 0.0f;
    }
    for (int i = 0; i < n_in; ++i) {
        for (int o = 0; o < n_out; ++o) {
            y[o] += w[i * n_out + o] * x[i];
        }
    }
}

static inline float ggml_rwkv_ms_norm(int n, const float * x) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) {
        sum += x[i] * x[i];
    }
    return std::sqrt(sum);
}

// reads all M states of a head: read[R], route[M]; tmp[M*R]
template <int R_CONST>
static inline void ggml_rwkv_ms_read(
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

        ggml_rwkv_ms_matvec(R, R, Sm, r, y);

        float score = 0.0f;
        for (int i = 0; i < R; ++i) {
            score += y[i] * r[i];
        }

        if (p.semantics == 1) {
            score /= std::sqrt((float) R);
        } else {
            const float eps = 1e-6f;
            score /= std::fmax(ggml_rwkv_ms_norm(R, y), eps) * std::fmax(ggml_rwkv_ms_norm(R, r), eps);
        }

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
static inline void ggml_rwkv_ms_write(
        const ggml_rwkv_ms_params &   p,
        float *                       S,                       // [R, R]
        const ggml_rwkv_ms_features & f,
        int                           i0,                      // offset of the head in the features
        float *                       tmp) {                   // [R]
    const int R = R_CONST > 0 ? R_CONST : p.n_rank;

    // the erase term uses the state before this token
    ggml_rwkv_ms_matvec(R, R, S, f.a + i0, tmp);

    for (int i = 0; i < R; ++i) {
        tmp[i] *= p.erase_gate * f.erase[i0 + i];
    }

    for (int j = 0; j < R; ++j) {
        const float decay = f.decay[i0 + j];
        const float k     = f.k[i0 + j];
        const float b     = f.b[i0 + j];

        for (int i = 0; i < R; ++i) {
            S[j * R + i] = f.keep[i0 + i] * decay * S[j * R + i] + f.write[i0 + i] * f.v[i0 + i] * k + tmp[i] * b;
        }
    }
}
