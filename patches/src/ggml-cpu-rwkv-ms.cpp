#include "ggml-rwkv-ms.h"
#include "ggml-rwkv-ms-impl.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
#include <vector>

// views into the packed weights, see ggml_rwkv_ms_n_weight
struct ggml_rwkv_ms_weights {
    const float * beta_b   = nullptr;
    const float * lambda_b = nullptr; // stays so if coupled
    const float * x[6]     = {};      // r w k v a g

    // clang-format off
    const float * w0 = nullptr, * a0 = nullptr, * k_k = nullptr, * k_a = nullptr, * ln_x = nullptr;
    const float * w1 = nullptr, * a1 = nullptr, * g1  = nullptr;
    const float * w2 = nullptr, * a2 = nullptr, * g2  = nullptr;

    const float * receptance = nullptr, * key = nullptr, * value = nullptr, * output = nullptr;
    // clang-format on

    ggml_rwkv_ms_weights(const ggml_rwkv_ms_params & p, const float * w) {
        if (w == nullptr) {
            return;
        }

        const int D = p.n_head * p.n_rank;
        const int L = p.n_lora;

        auto take = [&w](int n) { const float * res = w; w += n; return res; };

        beta_b   = take(p.n_gate);
        lambda_b = p.couple_lambda ? nullptr : take(p.n_gate);
        for (auto & xi : x) {
            xi = take(D);
        }
        for (auto * v : { &w0, &a0, &k_k, &k_a, &ln_x }) {
            *v = take(D);
        }
        for (auto * v : { &w1, &a1, &g1, &w2, &a2, &g2 }) {
            *v = take(D * L);
        }
        for (auto * v : { &receptance, &key, &value, &output }) {
            *v = take(D * D);
        }
    }
};

// what one thread needs for one token; row is laid out as a traced dst row
struct ggml_rwkv_ms_scratch {
    std::vector<float> buf;

    // clang-format off
    float * row;
    float * s, * beta, * lam, * r, * w, * decay, * k, * v, * a, * b, * g, * read, * out; // [D]
    float * route;                  // [N*M]
    float * keep, * erase, * write; // [D]
    float * x, * y;                 // [D]
    float * lora;                   // [L]
    float * tmp;                    // [M*R]
    // clang-format on

    ggml_rwkv_ms_scratch(const ggml_rwkv_ms_params & p) {
        const int D = p.n_head * p.n_rank;

        buf.resize(18 * D + p.n_head * p.n_state + p.n_lora + p.n_state * p.n_rank);

        float * ptr  = buf.data();
        auto    take = [&ptr](int n) { float * res = ptr; ptr += n; return res; };

        row = ptr;
        for (auto * t : { &s, &beta, &lam, &r, &w, &decay, &k, &v, &a, &b, &g, &read, &out }) {
            *t = take(D);
        }
        route = take(p.n_head * p.n_state);
        for (auto * t : { &keep, &erase, &write, &x, &y }) {
            *t = take(D);
        }
        lora = take(p.n_lora);
        tmp  = take(p.n_state * p.n_rank);
    }
};

// memory source, gates and the features of the scan
static void ggml_rwkv_ms_token_features(
        const ggml_rwkv_ms_params &  p,
        const ggml_rwkv_ms_weights & w,
        const float *                in,   // [D + G (+ G)]
        const float *                prev, // [D]
        ggml_rwkv_ms_scratch &       t) {
    const int R = p.n_rank;
    const int N = p.n_head;
    const int D = N * R;
    const int L = p.n_lora;
    const int G = p.n_gate;

    for (int i = 0; i < D; ++i) {
        t.s[i] = in[i];
    }
    if (p.semantics == 2) {
        for (int n = 0; n < N; ++n) {
            float * s = t.s + n * R;
            for (int i = 0; i < R; ++i) {
                s[i] = std::tanh(s[i]);
            }
            const float norm = std::fmax(ggml_rwkv_ms_norm(R, s), 1e-6f);
            for (int i = 0; i < R; ++i) {
                s[i] /= norm;
            }
        }
    }

    for (int i = 0; i < D; ++i) {
        const int ig = G == D ? i : i / R; // a gate per row, or one per head

        t.beta[i] = ggml_rwkv_ms_sigmoid(in[D + ig] + w.beta_b[ig]);
        t.lam[i]  = w.lambda_b ? ggml_rwkv_ms_sigmoid(in[D + G + ig] + w.lambda_b[ig]) : 1.0f - t.beta[i];

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

    // time shift
    auto shift = [&](int ix) {
        for (int i = 0; i < D; ++i) {
            t.x[i] = t.s[i] + (prev[i] - t.s[i]) * w.x[ix][i];
        }
    };

    shift(0);
    ggml_rwkv_ms_matvec(D, D, w.receptance, t.x, t.r);

    shift(1);
    ggml_rwkv_ms_matvec(D, L, w.w1, t.x, t.lora);
    for (int i = 0; i < L; ++i) {
        t.lora[i] = std::tanh(t.lora[i]);
    }
    ggml_rwkv_ms_matvec(L, D, w.w2, t.lora, t.w);
    for (int i = 0; i < D; ++i) {
        t.w[i]     = -ggml_rwkv_ms_softplus(-(w.w0[i] + t.w[i])) - 0.5f;
        t.decay[i] = std::exp(-std::exp(t.w[i]));
    }

    shift(2);
    ggml_rwkv_ms_matvec(D, D, w.key, t.x, t.k);

    shift(3);
    ggml_rwkv_ms_matvec(D, D, w.value, t.x, t.v);

    shift(4);
    ggml_rwkv_ms_matvec(D, L, w.a1, t.x, t.lora);
    ggml_rwkv_ms_matvec(L, D, w.a2, t.lora, t.y);
    for (int n = 0; n < N; ++n) {
        float * kk = t.a + n * R;
        for (int i = 0; i < R; ++i) {
            kk[i] = t.k[n * R + i] * w.k_k[n * R + i];
        }
        const float norm = std::fmax(ggml_rwkv_ms_norm(R, kk), 1e-12f);
        for (int i = 0; i < R; ++i) {
            const int   id = n * R + i;
            const float ag = ggml_rwkv_ms_sigmoid(w.a0[id] + t.y[id]);

            kk[i] /= norm;
            t.b[id] = kk[i] * ag;
            t.k[id] *= 1.0f + (ag - 1.0f) * w.k_a[id];
            kk[i] = -kk[i];
        }
    }

    shift(5);
    ggml_rwkv_ms_matvec(D, L, w.g1, t.x, t.lora);
    for (int i = 0; i < L; ++i) {
        t.lora[i] = ggml_rwkv_ms_sigmoid(t.lora[i]);
    }
    ggml_rwkv_ms_matvec(L, D, w.g2, t.lora, t.g);
}

// group norm of the reads (a group per head), gate and output projection
static void ggml_rwkv_ms_token_output(const ggml_rwkv_ms_params & p, const ggml_rwkv_ms_weights & w, ggml_rwkv_ms_scratch & t) {
    const int R = p.n_rank;
    const int D = p.n_head * R;

    for (int n = 0; n < p.n_head; ++n) {
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

        const float scale = 1.0f / std::sqrt(var + 64e-5f);
        for (int i = 0; i < R; ++i) {
            t.y[n * R + i] = (read[i] - mean) * scale * w.ln_x[n * R + i] * t.g[n * R + i];
        }
    }

    ggml_rwkv_ms_matvec(D, D, w.output, t.y, t.out);
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

    ggml_rwkv_ms_scratch       t(p);
    const ggml_rwkv_ms_weights w(p, src_w ? (const float *) src_w->data : nullptr);

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
            ggml_rwkv_ms_token_features(p, w, x, prev, t);
            f = { t.r, t.decay, t.k, t.v, t.a, t.b, t.keep, t.erase, t.write };
        } else {
            std::fill(t.buf.begin(), t.buf.end(), 0.0f);
            f = { x, x + D, x + 2 * D, x + 3 * D, x + 4 * D, x + 5 * D, x + 6 * D, x + 7 * D, x + 8 * D };
        }

        if (mask == GGML_RWKV_MS_MASK_PADDING) {
            std::fill(t.read, t.read + D, 0.0f);
            std::fill(t.out, t.out + D, 0.0f);
            std::fill(t.route, t.route + N * M, 0.0f);
        } else {
            for (int n = 0; n < N; ++n) {
                ggml_rwkv_ms_read<R_CONST>(p, S + n * M * R * R, f.r + n * R, t.read + n * R, t.route + n * M, t.tmp);
            }
            if (src_w) {
                ggml_rwkv_ms_token_output(p, w, t);
            } else {
                std::copy(t.read, t.read + D, t.out);
            }
        }

        if (mask == GGML_RWKV_MS_MASK_LIVE) {
            const int32_t m = (int32_t) *n_lo / p.n_chunk;

            for (int n = 0; n < N; ++n) {
                ggml_rwkv_ms_write<R_CONST>(p, S + (n * M + m) * R * R, f, n * R, t.tmp);
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
            std::copy(t.row, t.row + 13 * D + N * M, res);
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
