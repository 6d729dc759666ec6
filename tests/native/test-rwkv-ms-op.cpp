// The op and the graph around it against vectors of the NumPy oracle (tools/make_op_vectors.py), many cells in one op, and
// states that overflow.
//
// usage: test-rwkv-ms-op [VECTORS.gguf]

#include "op-data.h"
#include "testing.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-rwkv-ms.h"
#include "gguf.h"

#include <cstring>

struct vectors {
    gguf_context_ptr gguf;
    ggml_context_ptr ctx;

    explicit vectors(const char * path) {
        ggml_context *   data   = nullptr;
        gguf_init_params params = { /*.no_alloc =*/false, /*.ctx =*/&data };

        gguf.reset(gguf_init_from_file(path, params));
        ctx.reset(data);
        if (!gguf) {
            printf("failed to read %s\n", path);
            exit(1);
        }
    }

    ggml_tensor * at(const std::string & name) const {
        ggml_tensor * res = ggml_get_tensor(ctx.get(), name.c_str());
        if (!res) {
            printf("the vectors have no %s\n", name.c_str());
            exit(1);
        }
        return res;
    }

    std::vector<float> floats(const std::string & name) const {
        const ggml_tensor * t = at(name);
        return { (const float *) t->data, (const float *) t->data + ggml_nelements(t) };
    }

    const void * value(const std::string & key) const {
        return gguf_get_val_data(gguf.get(), gguf_find_key(gguf.get(), key.c_str()));
    }

    const int32_t * sizes(const std::string & c) const {
        return (const int32_t *) gguf_get_arr_data(gguf.get(), gguf_find_key(gguf.get(), (c + ".sizes").c_str()));
    }
};

// largest excess of |a - b| over an absolute and a relative bound, negative if all is within; NaN is infinitely far
static double excess(const std::vector<float> & a, const std::vector<float> & b, double atol = 1e-5, double rtol = 1e-5) {
    double res = a.size() == b.size() && !a.empty() ? -INFINITY : INFINITY;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        const double d = std::fabs((double) a[i] - b[i]) - (atol + rtol * std::fabs(b[i]));
        res            = d <= res ? res : std::isnan(d) ? INFINITY
                                                        : d;
    }
    return res;
}

// tokens [0, n) of a case in pieces of n_piece
static void test_case(const vectors & v, const std::string & c, uint32_t n_piece) {
    const int32_t * sizes = v.sizes(c);

    llama_adapter_mem_eval_params p = {};

    p.n_embd        = sizes[0];
    p.rank          = sizes[1];
    p.n_head        = sizes[2];
    p.n_state       = sizes[3];
    p.n_chunk       = sizes[4];
    p.semantics     = sizes[5];
    p.update_mode   = sizes[6];
    p.couple_lambda = sizes[7];
    p.alpha         = *(const float *) v.value(c + ".alpha");
    p.erase_gate    = *(const float *) v.value(c + ".erase_gate");

    const size_t D       = p.rank * p.n_head;
    const size_t n_trace = 13 * D + p.n_head * p.n_state;

    std::vector<const char *>  names;
    std::vector<const float *> data;
    std::vector<int64_t>       ne;

    const std::string prefix = c + ".w.";
    for (ggml_tensor * t = ggml_get_first_tensor(v.ctx.get()); t != nullptr; t = ggml_get_next_tensor(v.ctx.get(), t)) {
        if (strncmp(t->name, prefix.c_str(), prefix.size()) == 0) {
            names.push_back(t->name + prefix.size());
            data.push_back((const float *) t->data);
            // a vector is [n, 1] here
            ne.push_back(ggml_n_dims(t) == 1 ? t->ne[0] : t->ne[1]);
            ne.push_back(ggml_n_dims(t) == 1 ? 1 : t->ne[0]);
        }
    }
    p.n_tensors = names.size();
    p.names     = names.data();
    p.data      = data.data();
    p.ne        = ne.data();

    const auto     h        = v.floats(c + ".h");
    const auto *   mask     = (const int32_t *) v.at(c + ".mask")->data;
    const uint32_t n_tokens = h.size() / p.n_embd;
    const size_t   width    = v.floats(c + ".delta_q").size() / n_tokens;

    auto    S      = v.floats(c + ".S");
    auto    prev   = v.floats(c + ".prev");
    int64_t n_past = sizes[8];

    std::vector<float> trace(n_tokens * n_trace, NAN), delta_q(n_tokens * width, NAN), delta_o(n_tokens * width, NAN);

    for (uint32_t i = 0; i < n_tokens; i += n_piece) {
        p.n_tokens = std::min(n_piece, n_tokens - i);
        p.h        = h.data() + i * p.n_embd;
        p.mask     = mask + i;
        p.S        = S.data();
        p.prev     = prev.data();
        p.n_past   = &n_past;
        p.trace    = trace.data() + i * n_trace;
        p.delta[0] = delta_q.data() + i * width;
        p.delta[3] = delta_o.data() + i * width;

        char err[256] = "";
        CHECK(llama_adapter_mem_eval(&p, err, sizeof(err)));
        if (err[0]) {
            printf("  %s\n", err);
        }
    }

    // the routes of a padding token are not specified
    auto want = v.floats(c + ".trace");
    for (uint32_t i = 0; i < n_tokens; ++i) {
        if (mask[i] == GGML_RWKV_MS_MASK_PADDING) {
            std::copy_n(trace.begin() + i * n_trace + 13 * D, n_trace - 13 * D, want.begin() + i * n_trace + 13 * D);
        }
    }

    printf("  %-15s in pieces of %2u: intermediates %.1e, state %.1e\n", c.c_str(), n_piece, max_diff(trace, want),
            max_diff(S, v.floats(c + ".final_S")));

    CHECK(excess(trace, want) <= 0);
    CHECK(excess(delta_q, v.floats(c + ".delta_q")) <= 0);
    CHECK(excess(delta_o, v.floats(c + ".delta_o")) <= 0);
    CHECK(excess(S, v.floats(c + ".final_S")) <= 0);
    CHECK(excess(prev, v.floats(c + ".final_prev")) <= 0);
    CHECK(n_past == *(const int32_t *) v.at(c + ".final_pos")->data);
}

static void test_vectors(const vectors & v) {
    const int64_t key = gguf_find_key(v.gguf.get(), "cases");
    for (size_t i = 0; i < gguf_get_arr_n(v.gguf.get(), key); ++i) {
        for (uint32_t n_piece : { 40, 1, 7 }) {
            test_case(v, gguf_get_arr_str(v.gguf.get(), key, i), n_piece);
        }
    }
}

//
// cells
//

static std::vector<float> random(size_t n, uint32_t seed) {
    std::vector<float> res(n);
    for (float & x : res) {
        seed = seed * 1664525u + 1013904223u;
        x    = (seed >> 8) / (float) (1 << 24);
    }
    return res;
}

// the scan on features x [n_tokens, 9*D], of tokens that belong to cells
static std::vector<float> scan(const ggml_rwkv_ms_params & params, const std::vector<float> & x, const std::vector<int32_t> & ids,
        std::vector<float> & state, int n_threads) {
    const int64_t D        = params.n_head * params.n_rank;
    const int64_t n_tokens = ids.size() / 2;
    const int64_t n_cell   = ggml_rwkv_ms_n_cell(&params);

    ggml_init_params init = { ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx{ ggml_init(init) };

    ggml_tensor * t_x     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 9 * D, n_tokens);
    ggml_tensor * t_ids   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, n_tokens);
    ggml_tensor * t_state = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_cell, state.size() / n_cell);
    ggml_tensor * t_out   = ggml_rwkv_ms(ctx.get(), t_x, nullptr, t_state, t_ids, &params);
    ggml_cgraph * gf      = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, t_out);

    ggml_backend_ptr backend{ ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
    ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    ggml_backend_buffer_clear(buf.get(), 0xff); // NaN

    ggml_backend_tensor_set(t_x, x.data(), 0, ggml_nbytes(t_x));
    ggml_backend_tensor_set(t_ids, ids.data(), 0, ggml_nbytes(t_ids));
    ggml_backend_tensor_set(t_state, state.data(), 0, ggml_nbytes(t_state));
    CHECK(ggml_backend_graph_compute(backend.get(), gf) == GGML_STATUS_SUCCESS);
    ggml_backend_tensor_get(t_state, state.data(), 0, ggml_nbytes(t_state));

    std::vector<float> out(D * n_tokens);
    ggml_backend_tensor_get(t_out, out.data(), 0, ggml_nbytes(t_out));
    return out;
}

// interleaved cells in one op, by any number of threads, give what each gives alone; other cells are not touched
static void test_cells(int n_cells, int n_threads) {
    ggml_rwkv_ms_params params = {};

    params.n_rank        = 8;
    params.n_head        = 1;
    params.n_state       = 4;
    params.n_chunk       = 5;
    params.semantics     = 1;
    params.couple_lambda = true;
    params.erase_gate    = 1.0f;

    const int64_t D        = 8;
    const int64_t n_cell   = ggml_rwkv_ms_n_cell(&params);
    const int     n_tokens = 37 * n_cells;

    const std::vector<float> x = random(9 * D * n_tokens, 1);

    std::vector<float> state = random(n_cell * n_cells, 2);
    for (int c = 0; c < n_cells; ++c) {
        state[(c + 1) * n_cell - 2] = c % 20; // counters
        state[(c + 1) * n_cell - 1] = 0;
    }
    // garbage in a cell that no token has
    state[n_cell * (n_cells / 2)]   = NAN;
    const std::vector<float> before = state;

    std::vector<int32_t> ids;
    for (int i = 0; i < n_tokens; ++i) {
        int c = (i * 7 + i / 5) % n_cells;
        c     = c == n_cells / 2 ? (c + 1) % n_cells : c;
        ids.insert(ids.end(), { c, GGML_RWKV_MS_MASK_LIVE });
    }

    const std::vector<float> out = scan(params, x, ids, state, n_threads);

    for (int c = 0; c < n_cells; ++c) {
        std::vector<float>   x1, out1, state1(before.begin() + c * n_cell, before.begin() + (c + 1) * n_cell);
        std::vector<int32_t> ids1;
        for (int i = 0; i < n_tokens; ++i) {
            if (ids[2 * i] == c) {
                x1.insert(x1.end(), x.begin() + 9 * D * i, x.begin() + 9 * D * (i + 1));
                out1.insert(out1.end(), out.begin() + D * i, out.begin() + D * (i + 1));
                ids1.insert(ids1.end(), { 0, GGML_RWKV_MS_MASK_LIVE });
            }
        }
        if (!ids1.empty()) {
            CHECK(max_diff(scan(params, x1, ids1, state1, 1), out1) == 0.0);
        } else {
            CHECK(c == n_cells / 2);
        }
        CHECK(memcmp(state1.data(), state.data() + c * n_cell, n_cell * sizeof(float)) == 0);
    }
}

//
// delta rule
//

static ggml_rwkv_ms_params delta_params(int rank, int n_head, int n_gate) {
    ggml_rwkv_ms_params res = {};

    res.n_rank        = rank;
    res.n_head        = n_head;
    res.n_state       = 1;
    res.n_chunk       = 1 << 24;
    res.n_gate        = n_gate;
    res.semantics     = 0;
    res.couple_lambda = true;
    res.erase_gate    = 1.0f;
    res.normalize_qk  = true;
    return res;
}

// Three tokens worked out by hand: q k v and the logits of beta, then what is read, then the state as [i][j].
static void test_delta_vector() {
    static const float want[3][6] = {
        { 0, 0, 0.1611867f, -0.0854278f, 0.8835756f, -0.4682885f },
        { 0.1373756f, 0.7530503f, -0.4028691f, -0.4959761f, 0.7490065f, -0.3562431f },
        { -0.6235801f, 0.3668914f, -0.3144929f, -0.0121359f, 0.3971951f, -0.2254593f },
    };
    op_data d = { delta_params(2, 1, 2), { 1, 0.5f, 0.5f, -0.25f, 1, 2, -1.5f, 0, 0.3f, -1, 1, 1, -1, 0.5f, 0.5f, -1.5f, 2, 1, -0.5f, 2, 0.25f, -0.75f, 0, 0 },
        { 0, 0 }, std::vector<float>(6), { 0, 0, 0, 0, 0, 0 } };

    ggml_backend_ptr backend{ ggml_backend_cpu_init() };

    for (int i = 0; i < 3; ++i) {
        const auto         read = op_run(d, i, 1, backend.get());
        std::vector<float> S(4);

        CHECK(ggml_rwkv_ms_cell_get(&d.p, d.state.data(), S.data(), nullptr) == i + 1);
        CHECK(max_diff(read, std::vector<float>(want[i], want[i] + 2)) <= 2e-7);
        CHECK(max_diff(S, std::vector<float>(want[i] + 2, want[i] + 6)) <= 2e-7);
    }
}

// The rule as it is written down, in double; S [N, R, R]
static std::vector<float> delta_rule(const op_data & d, std::vector<double> & S) {
    const int R = d.p.n_rank;
    const int D = d.p.n_head * R;
    const int G = d.p.n_gate;

    std::vector<float> res;

    for (int64_t t = 0; t < d.n_tokens(); ++t) {
        const float * x    = d.x.data() + t * d.n_x();
        const int32_t mask = d.ids[2 * t + 1];

        for (int n = 0; n < d.p.n_head; ++n) {
            std::vector<double> q, k;
            for (auto * to : { &q, &k }) {
                double norm = 0.0;
                for (int i = 0; i < R; ++i) {
                    const double raw = x[(to == &k ? D : 0) + n * R + i];
                    to->push_back(d.p.normalize_qk ? std::tanh(raw) : raw);
                    norm += to->back() * to->back();
                }
                for (double & value : *to) {
                    value /= d.p.normalize_qk ? std::max(std::sqrt(norm), 1e-6) : 1.0;
                }
            }
            for (int i = 0; i < R; ++i) {
                double * row = S.data() + (n * R + i) * R;

                const int    ig   = G == D ? n * R + i : n;
                const auto   gate = [&](int at, int bias) { return 1.0 / (1.0 + std::exp(-(double) x[3 * D + at] - d.weights[bias])); };
                const double beta = gate(ig, ig);
                const double lam  = d.p.couple_lambda ? 1.0 - beta : gate(G + ig, G + ig);

                const double keep  = d.p.update == GGML_RWKV_MS_UPDATE_NO_LAMBDA ? 1.0 : lam;
                const double erase = d.p.update == GGML_RWKV_MS_UPDATE_LAMBDA_OUTSIDE ? lam * beta : beta;

                double read = 0.0, held = 0.0;
                for (int j = 0; j < R; ++j) {
                    read += row[j] * q[j];
                    held += row[j] * k[j];
                }
                res.push_back(mask == GGML_RWKV_MS_MASK_PADDING ? 0.0f : (float) read);
                for (int j = 0; j < R && mask == GGML_RWKV_MS_MASK_LIVE; ++j) {
                    row[j] = keep * row[j] - erase * held * k[j] + beta * x[2 * D + n * R + i] * k[j];
                }
            }
        }
    }
    return res;
}

static void test_delta_rule() {
    ggml_backend_ptr backend{ ggml_backend_cpu_init() };

    for (const int n_head : { 1, 4 }) {
        for (const bool rankwise : { true, false }) {
            for (const bool couple : { true, false }) {
                for (const int update : { GGML_RWKV_MS_UPDATE_STANDARD, GGML_RWKV_MS_UPDATE_LAMBDA_OUTSIDE, GGML_RWKV_MS_UPDATE_NO_LAMBDA }) {
                    for (const bool normalize : { true, false }) {
                        auto p = delta_params(8, n_head, rankwise ? 8 * n_head : n_head);

                        p.couple_lambda = couple;
                        p.update        = update;
                        p.normalize_qk  = normalize;

                        op_data data = op_data_make(p, false, 1, 40, 5, 0.5f);
                        data.state.assign(ggml_rwkv_ms_n_cell(&p), 0.0f);

                        std::vector<double>      S(64 * n_head, 0.0);
                        const std::vector<float> want = delta_rule(data, S);

                        for (const int n_piece : { 40, 1, 7 }) {
                            op_data            d = data;
                            std::vector<float> got, S_got(S.size());
                            for (int64_t t = 0; t < 40; t += n_piece) {
                                const auto piece = op_run(d, t, std::min<int64_t>(n_piece, 40 - t), backend.get());
                                got.insert(got.end(), piece.begin(), piece.end());
                            }
                            ggml_rwkv_ms_cell_get(&p, d.state.data(), S_got.data(), nullptr);
                            CHECK(excess(got, want, 2e-6, 2e-6) <= 0);
                            CHECK(excess(S_got, std::vector<float>(S.begin(), S.end()), 2e-6, 2e-6) <= 0);
                        }
                    }
                }
            }
        }
    }
}

// what overflows stays in its cell
static void test_overflows() {
    ggml_backend_ptr backend{ ggml_backend_cpu_init() };

    for (const int n_threads : { 1, 2 }) {
        ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
        for (const auto & shape : op_shapes()) {
            for (const bool features : { false, true }) {
                op_check_overflows(shape.second, features, 40, shape.first, [&](op_data & d) { return op_run(d, 0, 40, backend.get()); });
            }
        }
    }
}

int main(int argc, char ** argv) {
    const vectors v(argc > 1 ? argv[1] : LLAMAMEM_TEST_DATA "/op-vectors.gguf");

    return run_tests({
            { "vectors", [&] { test_vectors(v); } },
            { "delta rule, by hand", [] { test_delta_vector(); } },
            { "delta rule", [] { test_delta_rule(); } },
            { "overflows", [] { test_overflows(); } },
            { "cells", [&] {
                 for (int n_cells : { 2, 3, 8, 64 }) {
                     for (int n_threads : { 1, 2, 4 }) {
                         test_cells(n_cells, n_threads);
                     }
                 }
             } },
    });
}
