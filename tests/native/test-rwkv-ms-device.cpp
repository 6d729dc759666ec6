// The memory beside a device: one that cannot run the op (so that the CPU has to, without copying the state), one that
// can, layers on both sides, and estimates.
//
// The device is a stand-in for a GPU: its memory cannot be touched from outside of its own functions, which run the CPU's
// kernels. Whoever works on a copy of the state, or reads device memory directly, is found.

#include "testing.h"

#include "ggml-backend-impl.h"
#include "llama-ext.h"

#include <cstring>
#include <sys/mman.h>

//
// device
//

static bool device_has_op = false; // RWKV_MS

static ggml_backend_device device;
static ggml_backend_reg    device_reg;
static ggml_backend_t      device_cpu     = nullptr; // runs the kernels
static int                 n_op_on_device = 0;

// device memory is accessible while one of these lives
static std::vector<std::pair<void *, size_t>> device_memory;

struct device_access {
    device_access() { protect(PROT_READ | PROT_WRITE); }
    ~device_access() { protect(PROT_NONE); }

    static void protect(int flags) {
        for (const auto & [ptr, size] : device_memory) {
            mprotect(ptr, size, flags);
        }
    }
};

static void device_buffer_free(ggml_backend_buffer_t buffer) {
    const auto it = std::find_if(device_memory.begin(), device_memory.end(),
            [&](const auto & m) { return m.first == buffer->context; });
    munmap(it->first, it->second);
    device_memory.erase(it);
}

static void * device_buffer_get_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
}

static void device_buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    device_access access;
    memset((char *) t->data + offset, value, size);
}

static void device_buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    device_access access;
    memcpy((char *) t->data + offset, data, size);
}

static void device_buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    device_access access;
    memcpy(data, (const char *) t->data + offset, size);
}

static void device_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    device_access access;
    memset(buffer->context, value, buffer->size);
}

static const char * device_name_buft(ggml_backend_buffer_type_t) {
    return "TEST";
}

static ggml_backend_buffer_t device_buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    const size_t size_map = std::max<size_t>(size, 4096);

    void * ptr = mmap(nullptr, size_map, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    device_memory.emplace_back(ptr, size_map);

    ggml_backend_buffer_i iface = {};
    iface.free_buffer           = device_buffer_free;
    iface.get_base              = device_buffer_get_base;
    iface.memset_tensor         = device_buffer_memset;
    iface.set_tensor            = device_buffer_set;
    iface.get_tensor            = device_buffer_get;
    iface.clear                 = device_buffer_clear;

    return ggml_backend_buffer_init(buft, iface, ptr, size);
}

static size_t device_buft_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

static ggml_backend_buffer_type device_buft;

static const char * device_name_backend(ggml_backend_t) {
    return "TEST";
}

static void device_backend_free(ggml_backend_t backend) {
    delete backend;
}

static ggml_status device_backend_compute(ggml_backend_t, ggml_cgraph * gf) {
    device_access access;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        n_op_on_device += ggml_graph_node(gf, i)->op == GGML_OP_RWKV_MS;
    }
    return ggml_backend_graph_compute(device_cpu, gf);
}

static const char * device_name(ggml_backend_dev_t) {
    return "TEST";
}

static void device_get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = 1u << 30;
}

static enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = "TEST";
    props->description = "TEST";
    props->type        = device_type(dev);
    device_get_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 1, 2, 3 };

    ggml_backend_i iface = {};
    iface.get_name       = device_name_backend;
    iface.free           = device_backend_free;
    iface.graph_compute  = device_backend_compute;

    return new ggml_backend{ &guid, iface, dev, nullptr };
}

static ggml_backend_buffer_type_t device_get_buft(ggml_backend_dev_t) {
    return &device_buft;
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return op->op != GGML_OP_RWKV_MS || device_has_op;
}

static bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return buft == &device_buft;
}

static void device_init() {
    device_cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);

    device_reg.api_version    = GGML_BACKEND_API_VERSION;
    device_reg.iface.get_name = [](ggml_backend_reg_t) { return "TEST"; };
    // no proc addresses
    device_reg.iface.get_proc_address = [](ggml_backend_reg_t, const char *) { return (void *) nullptr; };

    device.reg                   = &device_reg;
    device.iface.get_name        = device_name;
    device.iface.get_description = device_name;
    device.iface.get_memory      = device_get_memory;
    device.iface.get_type        = device_type;
    device.iface.get_props       = device_get_props;
    device.iface.init_backend    = device_init_backend;
    device.iface.get_buffer_type = device_get_buft;
    device.iface.supports_op     = device_supports_op;
    device.iface.supports_buft   = device_supports_buft;

    device_buft.device              = &device;
    device_buft.iface.get_name      = device_name_buft;
    device_buft.iface.alloc_buffer  = device_buft_alloc;
    device_buft.iface.get_alignment = device_buft_alignment;
}

//
// tests
//

static model_ptr model_load_on_device(int32_t n_gpu_layers, const char * path, const char * path_sidecar, bool no_alloc = false) {
    ggml_backend_dev_t devices[] = { &device, nullptr };

    llama_model_params params = llama_model_default_params();
    params.devices            = devices;
    params.n_gpu_layers       = n_gpu_layers;
    params.no_alloc           = no_alloc;
    params.load_mode          = LLAMA_LOAD_MODE_NONE;

    model_ptr model{ llama_model_load_from_file(path, params) };
    CHECK((bool) model);

    char err[512] = "";
    if (path_sidecar) {
        CHECK(llama_model_load_adapter_mem(model.get(), path_sidecar, no_alloc ? nullptr : path, LLAMA_ADAPTER_MEM_MODE_BATCHED, err, sizeof(err)));
    }
    return model;
}

struct result {
    std::vector<std::vector<float>> logits;
    std::vector<float>              state;
};

// two sequences, in pieces, with a copy and a restart in between
static result run(llama_model * model, bool offload_kqv) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 512;
    params.n_batch              = 128;
    params.n_ubatch             = 16;
    params.n_seq_max            = 2;
    params.n_threads            = 1;
    params.n_threads_batch      = 1;
    params.type_k               = GGML_TYPE_F32;
    params.type_v               = GGML_TYPE_F32;
    params.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.offload_kqv          = offload_kqv;

    ctx_ptr ctx{ llama_init_from_model(model, params) };
    CHECK((bool) ctx);

    result res;
    fill_garbage(ctx.get(), 2);
    CHECK(decode(ctx.get(), text(0, 50, 1), &res.logits) == 0);
    llama_memory_seq_cp(llama_get_memory(ctx.get()), 0, 1, -1, -1);
    CHECK(decode(ctx.get(), text(1, 1, 2, 50), &res.logits) == 0);
    CHECK(decode(ctx.get(), text(1, 1, 3, 51), &res.logits) == 0); // the graph is used again
    CHECK(decode(ctx.get(), text(0, 30, 4, 50), &res.logits) == 0);

    res.state         = state(ctx.get(), 0);
    const auto state1 = state(ctx.get(), 1);
    res.state.insert(res.state.end(), state1.begin(), state1.end());
    return res;
}

static void test_device(const char * path, const char * path_sidecar) {
    device_has_op     = false;
    const result want = run(model_load(path, path_sidecar).get(), true);

    for (bool has_op : { false, true }) {
        for (int32_t n_gpu_layers : { 99, 9, 4 }) { // of 12 layers; the memory is in the first 6
            for (bool offload_kqv : { true, false }) {
                device_has_op  = has_op;
                n_op_on_device = 0;

                const result got = run(model_load_on_device(n_gpu_layers, path, path_sidecar).get(), offload_kqv);

                printf("  device %s the op, %2d layers on it, KV %s: logits %.1e, states %.1e, %d ops on the device\n",
                        has_op ? "has  " : "lacks", n_gpu_layers, offload_kqv ? "there" : "here ",
                        max_diff(want.logits, got.logits), max_diff(want.state, got.state), n_op_on_device);

                // the kernels are the same
                CHECK(max_diff(want.logits, got.logits) == 0.0);
                CHECK(max_diff(want.state, got.state) == 0.0);
                CHECK((n_op_on_device > 0) == (has_op && n_gpu_layers > 6 && offload_kqv));
            }
        }
    }
}

static size_t estimate(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_seq_max            = 4;

    ctx_ptr ctx{ llama_init_from_model(model, params) };
    CHECK((bool) ctx);

    size_t res = 0;
    for (const auto & [buft, data] : llama_get_memory_breakdown(ctx.get())) {
        res += data.model + data.context;
    }
    return res;
}

// what --fit goes by: a model without data
static void test_estimates(const char * path, const char * path_sidecar) {
    for (bool no_alloc : { true, false }) {
        const size_t without = estimate(model_load_on_device(99, path, nullptr, no_alloc).get());
        const size_t with    = estimate(model_load_on_device(99, path, path_sidecar, no_alloc).get());

        printf("  %s: %zu bytes without the sidecar, %zu with it\n", no_alloc ? "estimated" : "allocated", without, with);

        // 24,128 weights are used, and four cells of 266 values in each of six layers
        CHECK(with >= without + 4 * (24128 + 6 * 4 * 266));
        CHECK(with <= without + 4 * (24128 + 6 * 4 * 266) + 64 * 1024);
    }
}

static void test_split_mode(const char * path, const char * path_sidecar) {
    ggml_backend_dev_t devices[] = { &device, nullptr };

    auto params         = llama_model_default_params();
    params.devices      = devices;
    params.n_gpu_layers = 99;
    params.split_mode   = LLAMA_SPLIT_MODE_TENSOR;

    model_ptr model{ llama_model_load_from_file(path, params) };
    CHECK(model);

    char err[256];
    CHECK(!llama_model_load_adapter_mem(model.get(), path_sidecar, path, LLAMA_ADAPTER_MEM_MODE_BATCHED, err, sizeof(err)));
    CHECK(strstr(err, path_sidecar) && strstr(err, "--split-mode layer"));
}

int main() {
    const char * path         = LLAMAMEM_TEST_DATA "/model_a/model-f32.gguf";
    const char * path_sidecar = LLAMAMEM_TEST_DATA "/model_a/sidecar-v1.gguf";

    llama_log_set(log_keep_errors, nullptr);
    device_init();

    const int res = run_tests({
            { "device", [&] { test_device(path, path_sidecar); } },
            { "split mode", [&] { test_split_mode(path, path_sidecar); } },
            { "estimates", [&] { test_estimates(path, path_sidecar); } },
    });
    ggml_backend_free(device_cpu);
    return res;
}
