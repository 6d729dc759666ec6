// The CUDA kernels of the op on a machine without a GPU: the lanes of a block are fibers that run in a random order between
// the points where they wait for each other. What comes out is compared with the CPU's op.
//
// usage: test-rwkv-ms-cuda-emulated

#define GGML_RWKV_MS_EMULATE_CUDA
#define RWKV_MS_MAX_WORK (64 * rwkv_ms_n_work(p) * (int64_t) sizeof(float)) // 64 tokens at once

#include "op-data.h"
#include "testing.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

//
// as much of CUDA as the kernels need
//

#define __device__
#define __global__
#define __launch_bounds__(...)

struct emu_dim {
    int x, y;
};

static emu_dim threadIdx, blockIdx;
static float * emu_shared;

struct emu_trap {};

struct emu_barrier {
    int n_lanes  = 0;
    int n_here   = 0;
    int n_passed = 0;
};

struct emu_fiber {
    ucontext_t        ctx;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    emu_dim           idx;
    bool              done;
};

struct emu_block {
    ucontext_t                      main;
    std::vector<emu_fiber>          fibers;
    emu_fiber *                     now;
    emu_barrier                     all;
    std::vector<emu_barrier>        warps;
    std::vector<std::vector<float>> values; // of a warp's lanes
    std::function<void()>           kernel;
    bool                            trapped;
    int                             n_waits;
};

static emu_block    block;
static std::mt19937 emu_rng(1);

static void emu_yield() {
    emu_fiber * me = block.now;
    swapcontext(&me->ctx, &block.main);
}

static void emu_wait(emu_barrier & b) {
    const int n_passed = b.n_passed;
    block.n_waits++;
    if (++b.n_here == b.n_lanes) {
        b.n_here = 0;
        b.n_passed++;
    }
    while (b.n_passed == n_passed) {
        emu_yield();
    }
}

static void __syncwarp() {
    emu_wait(block.warps[threadIdx.y]);
}

static void __syncthreads() {
    emu_wait(block.all);
}

static void __trap() {
    throw emu_trap();
}

static float __shfl_xor_sync(unsigned, float x, int mask) {
    auto & values = block.values[threadIdx.y];

    values[threadIdx.x] = x;
    __syncwarp();
    const float res = values[threadIdx.x ^ mask];
    __syncwarp();
    return res;
}

static unsigned __ballot_sync(unsigned, bool x) {
    auto & values = block.values[threadIdx.y];

    values[threadIdx.x] = x;
    __syncwarp();
    unsigned res = 0;
    for (int i = 0; i < 32; ++i) {
        res |= (unsigned) (values[i] != 0) << i;
    }
    __syncwarp();
    return res;
}

static int __ffs(unsigned x) {
    return ffs((int) x);
}

#define GGML_RWKV_MS_SHARED(name) float * name = emu_shared

#include "ggml-cuda-rwkv-ms-kernels.cuh"

static void emu_fiber_main() {
    try {
        block.kernel();
    } catch (const emu_trap &) {
        block.trapped = true;
    }
    block.now->done = true;
    swapcontext(&block.now->ctx, &block.main);
}

// false: a lane trapped, or waits for others that have gone
static bool emu_launch(rwkv_ms_kernel kernel, const rwkv_ms_args & a, int64_t n_blocks, int n_warps, int n_shared) {
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        std::vector<float> shared(n_shared, NAN);

        emu_shared    = shared.data();
        block.trapped = false;
        block.kernel  = [&] { kernel(a); };
        block.all     = { n_warps * 32 };
        block.warps   = std::vector<emu_barrier>(n_warps, emu_barrier{ 32 });
        block.values  = std::vector<std::vector<float>>(n_warps, std::vector<float>(32));
        block.fibers.resize(n_warps * 32);

        std::vector<emu_fiber *> alive;
        for (int i = 0; i < n_warps * 32; ++i) {
            auto & f = block.fibers[i];

            getcontext(&f.ctx);
            f.ctx.uc_stack.ss_sp   = f.stack.data();
            f.ctx.uc_stack.ss_size = f.stack.size();
            f.ctx.uc_link          = nullptr;
            f.idx                  = { i % 32, i / 32 };
            f.done                 = false;
            makecontext(&f.ctx, emu_fiber_main, 0);
            alive.push_back(&f);
        }
        // one warp may be ahead of the others as far as it can get
        const int ahead  = emu_rng() % (n_warps + 1);
        int       n_idle = 0; // rounds without progress
        while (!alive.empty()) {
            std::shuffle(alive.begin(), alive.end(), emu_rng);

            const int    before   = block.n_waits;
            const size_t n_before = alive.size();
            for (auto * f : alive) {
                if (ahead < n_warps && n_idle == 0 && f->idx.y != ahead) {
                    continue;
                }
                block.now = f;
                threadIdx = f->idx;
                blockIdx  = { (int) ib, 0 };
                swapcontext(&block.main, &f->ctx);
                if (block.trapped) {
                    return false;
                }
            }
            alive.erase(std::remove_if(alive.begin(), alive.end(), [](const emu_fiber * f) { return f->done; }), alive.end());
            n_idle = block.n_waits == before && alive.size() == n_before ? n_idle + 1 : 0;
            if (n_idle > 3) {
                printf("  lanes wait for lanes that are gone\n");
                return false;
            }
        }
    }
    return true;
}

//
// tests
//

// the same by the kernels
static bool run_cuda(op_data & d, int64_t t0, int64_t n, std::vector<float> & res) {
    std::vector<float> work(rwkv_ms_is_fused(n) ? 0 : rwkv_ms_n_piece(d.p, n) * rwkv_ms_n_work(d.p), NAN);
    std::vector<float> dst(n * d.n_dst(), NAN);

    rwkv_ms_args a = {};

    a.p            = d.p;
    a.x            = d.x.data() + t0 * d.n_x();
    a.stride_x     = d.n_x();
    a.ids          = d.ids.data() + 2 * t0;
    a.n_tokens     = n;
    a.weights      = d.weights.empty() ? nullptr : d.weights.data();
    a.state        = d.state.data();
    a.stride_state = ggml_rwkv_ms_n_cell(&d.p);
    a.n_cells      = d.n_cells();
    a.work         = work.data();
    a.stride_work  = rwkv_ms_n_work(d.p);
    a.dst          = dst.data();
    a.stride_dst   = d.n_dst();

    bool ok = true;
    rwkv_ms_run(a, [&](rwkv_ms_kernel kernel, int64_t n_blocks, int n_warps, int n_shared) {
        ok = ok && emu_launch(kernel, a, n_blocks, n_warps, n_shared);
    });
    res.insert(res.end(), dst.begin(), dst.end());
    return ok;
}

static void test_shape(const ggml_rwkv_ms_params & p, bool features, int n_cells, int n_tokens, const char * name) {
    CHECK(rwkv_ms_is_supported(p));

    ggml_backend_ptr cpu_backend{ ggml_backend_cpu_init() };

    const op_data      data = op_data_make(p, features, n_cells, n_tokens, 7);
    op_data            cpu  = data;
    std::vector<float> want = op_run(cpu, 0, n_tokens, cpu_backend.get());
    std::vector<float> first;

    for (const int n_piece : { n_tokens, 1, 5, 9 }) {
        op_data            cuda = data;
        std::vector<float> got;
        for (int t = 0; t < n_tokens; t += n_piece) {
            CHECK(run_cuda(cuda, t, std::min(n_piece, n_tokens - t), got));
        }
        const double d_dst   = op_distance(got, want);
        const double d_state = op_distance(cuda.state, cpu.state);
        CHECK(d_dst <= 1e-5);
        CHECK(d_state <= 1e-5);
        if (d_dst > 1e-5 || d_state > 1e-5 || n_piece == n_tokens) {
            printf("  %-22s %2d cells, %3d tokens by %3d: %.1e, state %.1e\n", name, n_cells, n_tokens, n_piece, d_dst, d_state);
        }
        if (first.empty()) {
            first = got;
        }
        CHECK(memcmp(first.data(), got.data(), got.size() * sizeof(float)) == 0); // one kernel or three: the same
    }
}

static void test_shapes() {
    for (const auto & shape : op_shapes()) {
        test_shape(shape.second, false, 1, 40, shape.first);
        test_shape(shape.second, false, 5, 37, shape.first);
        test_shape(shape.second, true, 3, 20, shape.first);
    }
    test_shape(op_published(), false, 64, 100, "published");
}

// larger weights make the op ill-conditioned: no further from the CPU's op than that is from itself after a nudge
static void test_large_weights() {
    ggml_backend_ptr cpu_backend{ ggml_backend_cpu_init() };

    for (const auto & shape : op_shapes()) {
        double apart = 0.0;
        double own   = 0.0;
        for (int seed = 1; seed <= 3; ++seed) {
            const op_data      data   = op_data_make(shape.second, false, 2, 37, seed, 0.5f);
            op_data            cpu    = data;
            op_data            cuda   = data;
            op_data            nudged = op_data_nudge(data, seed);
            std::vector<float> want   = op_run(cpu, 0, 37, cpu_backend.get());
            std::vector<float> got;

            CHECK(run_cuda(cuda, 0, 37, got));
            own   = std::max(own, op_distance(op_run(nudged, 0, 37, cpu_backend.get()), want));
            apart = std::max(apart, op_distance(got, want));
        }
        CHECK(apart <= std::max(1e-5, 2 * own));
        printf("  %-22s %.1e, the CPU's own after a nudge %.1e\n", shape.first, apart, own);
    }
}

// what the CPU's op asserts ends a kernel
static void test_checks() {
    for (const int n_tokens : { 4, 20 }) {
        std::vector<float> out;

        auto d = op_data_make(op_published(), false, 2, n_tokens, 3);
        CHECK(run_cuda(d, 0, n_tokens, out));

        for (const float n : { -1.0f, 20.0f, NAN }) {
            auto bad                        = op_data_make(op_published(), false, 1, n_tokens, 3);
            bad.state[bad.state.size() - 2] = n;
            CHECK(!run_cuda(bad, 0, n_tokens, out));
        }
    }
    for (const int cell : { -1, 2 }) {
        std::vector<float> out;

        for (const int n_tokens : { 4, 20 }) {
            auto bad       = op_data_make(op_published(), false, 2, n_tokens, 3);
            bad.ids[2 * 3] = cell;
            CHECK(!run_cuda(bad, 0, n_tokens, out));
        }
    }
}

// what overflows stays in its cell, in one kernel and in three
static void test_overflows() {
    for (const auto & [name, p] : op_shapes()) {
        if (p.n_head > 3 || p.n_rank > 8) {
            continue; // lanes of no other kind, and many of them
        }
        for (const int n_tokens : { 7, 20 }) {
            op_check_overflows(p, false, n_tokens, name, [&, n = n_tokens](op_data & d) {
                std::vector<float> res;
                CHECK(run_cuda(d, 0, n, res));
                return res;
            });
        }
    }
}

int main() {
    return run_tests({
            { "shapes", [] { test_shapes(); } },
            { "large weights", [] { test_large_weights(); } },
            { "overflows", [] { test_overflows(); } },
            { "checks", [] { test_checks(); } },
    });
}
