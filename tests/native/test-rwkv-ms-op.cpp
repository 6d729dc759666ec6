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
