// The op on every GPU here against the CPU's: shapes, semantics, masks, roll-over, 1 to 64 cells.
//
// usage: test-rwkv-ms-gpu
// exit status: 77 without a GPU that has the op

#include "op-data.h"
#include "testing.h"

static void test_shape(ggml_backend_t cpu, ggml_backend_t gpu, const ggml_rwkv_ms_params & p, bool features, int n_cells, int n_tokens, const char * name) {
    const op_data data = op_data_make(p, features, n_cells, n_tokens, 7);

    op_data    on_cpu = data;
    const auto want   = op_run(on_cpu, 0, n_tokens, cpu);

    for (const int n_piece : { n_tokens, 1, 5, 9 }) {
        op_data            on_gpu = data;
        std::vector<float> got;
        for (int t = 0; t < n_tokens; t += n_piece) {
            const auto piece = op_run(on_gpu, t, std::min(n_piece, n_tokens - t), gpu);
            got.insert(got.end(), piece.begin(), piece.end());
        }
        const double d_dst   = op_distance(got, want);
        const double d_state = op_distance(on_gpu.state, on_cpu.state);
        CHECK(d_dst <= 1e-5);
        CHECK(d_state <= 1e-5);
        printf("  %-22s %2d cells, %3d tokens by %3d: %.1e, state %.1e\n", name, n_cells, n_tokens, n_piece, d_dst, d_state);
    }
}

int main() {
    ggml_backend_load_all();

    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
    int              n_gpu = 0;
    int              res   = 0;

    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_GPU) {
            continue;
        }
        ggml_backend_ptr gpu{ ggml_backend_dev_init(dev, nullptr) };

        printf("%s: %s\n", ggml_backend_dev_name(dev), ggml_backend_dev_description(dev));
        n_gpu++;
        res |= run_tests({ { "overflows", [&] {
                                for (const auto & shape : op_shapes()) {
                                    for (const int n_tokens : { 7, 40 }) {
                                        op_check_overflows(shape.second, false, n_tokens, shape.first, [&](op_data & d) { return op_run(d, 0, n_tokens, gpu.get()); });
                                    }
                                }
                            } },
                { "op", [&] {
                     for (const auto & shape : op_shapes()) {
                         test_shape(cpu.get(), gpu.get(), shape.second, false, 1, 40, shape.first);
                         test_shape(cpu.get(), gpu.get(), shape.second, false, 5, 37, shape.first);
                         test_shape(cpu.get(), gpu.get(), shape.second, true, 3, 20, shape.first);
                     }
                     for (const int n_cells : { 2, 8, 64 }) {
                         test_shape(cpu.get(), gpu.get(), op_published(), false, n_cells, 512, "published");
                     }
                 } } });
    }
    if (n_gpu == 0) {
        printf("SKIP: no GPU here\n");
        return 77;
    }
    return res;
}
