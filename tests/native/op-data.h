#pragma once

// Random inputs of GGML_OP_RWKV_MS in many shapes, and its run on a backend.

#include "testing.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-rwkv-ms.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>

struct op_data {
    ggml_rwkv_ms_params  p;
    std::vector<float>   x, weights, state;
    std::vector<int32_t> ids;

    int64_t n_tokens() const { return ids.size() / 2; }

    int64_t n_x() const { return x.size() / n_tokens(); }

    int64_t n_dst() const { return p.n_head * p.n_rank * (p.trace ? 13 : 1) + (p.trace ? p.n_head * p.n_state : 0); }

    int64_t n_cells() const { return state.size() / ggml_rwkv_ms_n_cell(&p); }
};

static inline op_data op_data_make(const ggml_rwkv_ms_params & p, bool features, int n_cells, int n_tokens, int seed, float deviation = 0.3f) {
    std::mt19937                          rng(seed);
    std::normal_distribution<float>       normal(0.0f, deviation);
    std::uniform_real_distribution<float> unit(0.0f, 1.0f);

    const int D = p.n_head * p.n_rank;

    op_data res = { p, {}, {}, {}, {} };

    const float fan_in = std::sqrt(24.0f / std::max(24, D)); // of many values, smaller products

    const int n_x = features ? 9 * D : ggml_rwkv_ms_n_in(&p);
    for (int i = 0; i < n_x * n_tokens; ++i) {
        res.x.push_back(features ? unit(rng) - (i % n_x < D ? 0.5f : 0.0f) : normal(rng));
    }
    if (!features) {
        for (int64_t i = 0; i < ggml_rwkv_ms_n_weight(&p); ++i) {
            res.weights.push_back(fan_in * normal(rng));
        }
    }
    const int64_t n_cell = ggml_rwkv_ms_n_cell(&p);
    for (int c = 0; c < n_cells; ++c) {
        for (int64_t i = 0; i < n_cell - 2; ++i) {
            res.state.push_back(0.3f * normal(rng));
        }
        res.state.push_back((float) (rng() % (p.n_state * p.n_chunk)));
        res.state.push_back((float) (rng() % 3));
    }
    if (n_cells > 2) {
        res.state[n_cell * (n_cells / 2)] = NAN; // a cell that no token has
    }
    for (int i = 0; i < n_tokens; ++i) {
        int c = rng() % n_cells;
        c     = n_cells > 2 && c == n_cells / 2 ? 0 : c;
        res.ids.push_back(c);
        res.ids.push_back(rng() % 8 == 0 ? 1 + rng() % 2 : 0);
    }
    return res;
}

// tokens [t0, t0 + n) by the op of a backend; the state in d is then the one after them
static inline std::vector<float> op_run(op_data & d, int64_t t0, int64_t n, ggml_backend_t backend) {
    ggml_init_params init = { ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx{ ggml_init(init) };

    ggml_tensor * x     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, d.n_x(), n);
    ggml_tensor * ids   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, n);
    ggml_tensor * state = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_rwkv_ms_n_cell(&d.p), d.n_cells());
    ggml_tensor * w     = d.weights.empty() ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, d.weights.size());
    ggml_tensor * out   = ggml_rwkv_ms(ctx.get(), x, w, state, ids, &d.p);
    ggml_cgraph * gf    = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, out);

    CHECK(ggml_backend_supports_op(backend, out));
    ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };
    ggml_backend_buffer_clear(buf.get(), 0xff); // NaN

    ggml_backend_tensor_set(x, d.x.data() + t0 * d.n_x(), 0, ggml_nbytes(x));
    ggml_backend_tensor_set(ids, d.ids.data() + 2 * t0, 0, ggml_nbytes(ids));
    ggml_backend_tensor_set(state, d.state.data(), 0, ggml_nbytes(state));
    if (w) {
        ggml_backend_tensor_set(w, d.weights.data(), 0, ggml_nbytes(w));
    }
    CHECK(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);
    ggml_backend_tensor_get(state, d.state.data(), 0, ggml_nbytes(state));

    std::vector<float> res(d.n_dst() * n);
    ggml_backend_tensor_get(out, res.data(), 0, ggml_nbytes(out));
    return res;
}

// the same with about half of the inputs and weights moved to the next float
static inline op_data op_data_nudge(op_data d, int seed) {
    std::mt19937 rng(seed);
    for (auto * values : { &d.x, &d.weights }) {
        for (float & value : *values) {
            value = rng() % 2 ? std::nextafterf(value, rng() % 2 ? INFINITY : -INFINITY) : value;
        }
    }
    return d;
}

// largest |a - b| / (1 + |b|), NaN equal to NaN alone
static inline double op_distance(const std::vector<float> & a, const std::vector<float> & b) {
    double res = a.size() == b.size() ? 0.0 : INFINITY;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        if (std::isnan(a[i]) != std::isnan(b[i])) {
            return INFINITY;
        }
        if (!std::isnan(a[i])) {
            res = std::max(res, std::fabs((double) a[i] - b[i]) / (1.0 + std::fabs(b[i])));
        }
    }
    return res;
}

static inline ggml_rwkv_ms_params op_published() {
    ggml_rwkv_ms_params p = {};

    p.n_rank        = 8;
    p.n_head        = 1;
    p.n_state       = 4;
    p.n_chunk       = 5;
    p.n_lora        = 32;
    p.n_gate        = 8;
    p.semantics     = 1;
    p.couple_lambda = true;
    p.trace         = true;
    p.erase_gate    = 1.0f;
    return p;
}

static inline std::vector<std::pair<const char *, ggml_rwkv_ms_params>> op_shapes() {
    const auto with = [](std::function<void(ggml_rwkv_ms_params &)> edit) {
        auto p = op_published();
        edit(p);
        return p;
    };
    return {
        { "published", op_published() },
        { "semantics 2", with([](auto & p) { p.semantics        = 2; }) },
        { "output alone", with([](auto & p) { p.trace           = false; }) },
        { "lambda", with([](auto & p) { p.couple_lambda         = false; }) },
        { "lambda outside", with([](auto & p) { p.couple_lambda = false, p.update = GGML_RWKV_MS_UPDATE_LAMBDA_OUTSIDE; }) },
        { "no lambda, erase 0.5", with([](auto & p) { p.update = GGML_RWKV_MS_UPDATE_NO_LAMBDA, p.erase_gate = 0.5f; }) },
        { "3 heads", with([](auto & p) { p.n_head = 3, p.n_gate = 24; }) },
        { "2 heads, a gate each", with([](auto & p) { p.n_head = 2, p.n_gate = 2, p.semantics = 2; }) },
        { "rank 4, 2 states", with([](auto & p) { p.n_rank = 4, p.n_gate = 4, p.n_state = 2, p.n_chunk = 1; }) },
        { "rank 16, 8 states", with([](auto & p) { p.n_rank = 16, p.n_gate = 16, p.n_state = 8, p.n_lora = 40; }) },
        { "rank 16, 4 heads", with([](auto & p) { p.n_rank = 16, p.n_head = 4, p.n_gate = 64, p.n_state = 2; }) },
        { "rank 16, 12 heads", with([](auto & p) { p.n_rank = 16, p.n_head = 12, p.n_gate = 12, p.n_state = 8; }) },
        { "rank 8, 16 heads", with([](auto & p) { p.n_head = 16, p.n_gate = 16, p.n_state = 16; }) },
        { "rank 8, 7 states", with([](auto & p) { p.n_state = 7, p.n_chunk = 2; }) },
        { "rank 8, 1 state", with([](auto & p) { p.n_state = 1; }) },
        { "delta rule", with([](auto & p) { p.semantics = 0, p.n_state = 1, p.normalize_qk = true; }) },
        { "delta rule, 4 heads, a gate each", with([](auto & p) { p.semantics = 0, p.n_state = 1, p.normalize_qk = true, p.n_head = 4, p.n_gate = 4; }) },
        { "delta rule, lambda", with([](auto & p) { p.semantics = 0, p.n_state = 1, p.normalize_qk = true, p.couple_lambda = false; }) },
        { "delta rule, raw", with([](auto & p) { p.semantics = 0, p.n_state = 1, p.update = GGML_RWKV_MS_UPDATE_LAMBDA_OUTSIDE, p.trace = false; }) },
    };
}

//
// what overflows
//

struct op_overflow {
    const char *                   name;
    std::function<void(op_data &)> spoil; // cell 0, or its tokens
    bool                           zeros; // all that is read of it is zeros
    bool                           stays; // once it was written to, the state says so
};

static inline std::vector<op_overflow> op_overflows(const ggml_rwkv_ms_params & p, bool features) {
    const auto matrices = [](float value) {
        return [value](op_data & d) { std::fill_n(d.state.begin(), d.p.n_head * d.p.n_state * d.p.n_rank * d.p.n_rank, value); };
    };
    const auto prev = [](float value) {
        return [value](op_data & d) { std::fill_n(d.state.begin() + ggml_rwkv_ms_n_cell(&d.p) - 2 - d.p.n_head * d.p.n_rank, d.p.n_head * d.p.n_rank, value); };
    };
    const auto inputs = [](float value) {
        return [value](op_data & d) {
            for (int64_t i = 0; i < (int64_t) d.x.size(); ++i) {
                d.x[i] = d.ids[2 * (i / d.n_x())] == 0 ? value : d.x[i];
            }
        };
    };
    std::vector<op_overflow> res = {
        { "a state of NaN", matrices(NAN), true, true },
        { "an infinite state", matrices(INFINITY), true, true },
        { "a state of 3.4e38", matrices(3.4e38f), !features && p.semantics != 0, false },
        { "inputs of NaN", inputs(NAN), true, true },
        { "inputs of 3e38", inputs(3e38f), features || p.semantics == 1, false },
    };
    if (!features && p.semantics != 0) {
        res.push_back({ "prev of NaN", prev(NAN), true, true });
        res.push_back({ "prev of 1e25", prev(1e25f), false, true });
    }
    return res;
}

// Of a cell that overflows: no output is anything but finite, those of other cells are what they are without it, and the state
// keeps what it is. run: all tokens, the state in d is then the one after them.
static inline void op_check_overflows(const ggml_rwkv_ms_params & p, bool features, int n_tokens, const char * name,
        const std::function<std::vector<float>(op_data &)> & run) {
    const int64_t D      = p.n_head * p.n_rank;
    const int64_t i_out  = p.trace ? 12 * D : 0;
    const int64_t n_cell = ggml_rwkv_ms_n_cell(&p);

    const auto is_finite = [](float x) { return std::isfinite(x); };

    for (const bool frozen : { false, true }) {
        op_data data = op_data_make(p, features, 2, n_tokens, 11);

        bool written = false;
        for (int i = 0; i < n_tokens; ++i) {
            int32_t * id = data.ids.data() + 2 * i;
            if (id[0] == 0 && frozen) {
                id[1] = GGML_RWKV_MS_MASK_FROZEN;
            }
            written = written || (id[0] == 0 && id[1] == GGML_RWKV_MS_MASK_LIVE);
        }
        op_data    clean = data;
        const auto want  = run(clean);

        for (const auto & overflow : op_overflows(p, features)) {
            op_data spoilt = data;
            overflow.spoil(spoilt);
            const std::vector<float> before = spoilt.state;
            const std::vector<float> got    = run(spoilt);

            int n_zero  = 0;
            int n_wrong = 0;
            for (int i = 0; i < n_tokens; ++i) {
                const float * row = got.data() + i * spoilt.n_dst();
                const float * out = row + i_out;

                n_wrong += !std::all_of(out, out + D, is_finite);
                if (data.ids[2 * i] == 1) {
                    n_wrong += memcmp(row, want.data() + i * spoilt.n_dst(), spoilt.n_dst() * sizeof(float)) != 0;
                } else if (data.ids[2 * i + 1] != GGML_RWKV_MS_MASK_PADDING) {
                    n_zero += std::all_of(out, out + D, [](float x) { return x == 0.0f; });
                }
            }
            const auto cell = spoilt.state.begin();

            n_wrong += memcmp(&cell[n_cell], &clean.state[n_cell], n_cell * sizeof(float)) != 0;
            if (written) {
                n_wrong += overflow.stays && std::all_of(cell, cell + n_cell, is_finite);
            } else {
                n_wrong += memcmp(&cell[0], before.data(), n_cell * sizeof(float)) != 0;
            }
            CHECK(n_wrong == 0);
            CHECK(n_zero > 0 || !overflow.zeros);
            if (n_wrong > 0 || (n_zero == 0 && overflow.zeros)) {
                printf("  FAIL %s, %d tokens: %s%s: %d wrong, %d of zeros\n", name, n_tokens, overflow.name, frozen ? ", frozen" : "", n_wrong, n_zero);
            }
        }
    }
}
