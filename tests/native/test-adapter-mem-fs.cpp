// Files of states where somebody else can write too: links, pipes, devices, holes of 2 GiB, what killed processes left.
//
// usage: test-adapter-mem-fs [BASE.gguf SIDECAR.gguf]

#include "testing.h"

#include "llama-adapter-mem-fs.h"
#include "llama-adapter-mem-state.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

namespace fs = std::filesystem;

static fs::path dir;

static std::string read_all(const fs::path & path) {
    std::ifstream in(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(in), {} };
}

static std::string write(const fs::path & path, const std::string & text) {
    return llama_adapter_mem_fs_write(path.string(), text.data(), text.size());
}

static int mode_of(const fs::path & path) {
    struct stat st = {};
    CHECK(lstat(path.c_str(), &st) == 0);
    return st.st_mode & 07777;
}

static size_t n_files(const fs::path & in) {
    return std::distance(fs::directory_iterator(in), fs::directory_iterator());
}

static fs::path fresh(const char * name) {
    const fs::path res = dir / name;
    fs::create_directories(res);
    return res;
}

static fs::path part_of(const fs::path & in, long long pid, int n) {
    return in / (".llamamem-" + std::to_string(pid) + "-" + std::to_string(n) + ".part");
}

static void test_write() {
    const fs::path in = fresh("write");

    std::ofstream(in / "open") << "old";
    fs::permissions(in / "open", fs::perms(0644));
    fs::create_symlink(in / "open", in / "link");

    CHECK(write(in / "new", "text") == "");
    CHECK(write(in / "link", "text") == "");
    CHECK(read_all(in / "open") == "old"); // not through the link
    CHECK(write(in / "open", "text") == "");
    for (const char * name : { "new", "link", "open" }) {
        CHECK(fs::symlink_status(in / name).type() == fs::file_type::regular);
        CHECK(mode_of(in / name) == 0600);
        CHECK(read_all(in / name) == "text");
    }
    CHECK(n_files(in) == 3);

    fs::create_directories(in / "directory");
    CHECK(write(in / "directory", "text") != "");
    CHECK(write(in / "none" / "new", "text") != "");
    CHECK(n_files(in) == 4);
}

// the name of a part that is taken is not written to, and nothing is written through it
static void test_part_taken() {
    const fs::path in = fresh("taken");

    std::ofstream(dir / "victim") << "old";
    for (int n = 0; n < 100; ++n) {
        fs::create_symlink(dir / "victim", part_of(in, getpid(), n));
    }
    CHECK(write(in / "new", "text") == "");
    CHECK(read_all(dir / "victim") == "old");
    CHECK(read_all(in / "new") == "text");
    CHECK(fs::symlink_status(in / "new").type() == fs::file_type::regular);
    CHECK(n_files(in) == 101);
}

static void test_sweep() {
    const pid_t child = fork();
    if (child == 0) {
        _exit(0);
    }
    waitpid(child, nullptr, 0); // gone, and nobody has its number yet

    const fs::path in = fresh("sweep");

    const auto make = [](const fs::path & path, int age) {
        std::ofstream(path) << "part";
        fs::last_write_time(path, fs::file_time_type::clock::now() - std::chrono::seconds(age));
        return path;
    };
    const fs::path dead  = make(part_of(in, child, 0), 120);
    const fs::path young = make(part_of(in, child, 1), 0);
    const fs::path alive = make(part_of(in, getpid(), 1000000), 120);
    const fs::path other = make(in / ("other." + std::to_string(child) + ".part"), 120);
    const fs::path more  = make(part_of(in, child, 2).string() + ".bin", 120);

    CHECK(write(in / "new", "text") == "");
    CHECK(!fs::exists(dead));
    CHECK(fs::exists(young));
    CHECK(fs::exists(alive));
    CHECK(fs::exists(other));
    CHECK(fs::exists(more));
}

static bool load(llama_context * ctx, const fs::path & path) {
    return llama_adapter_mem_state_load_file(ctx, path.c_str(), 0) > 0;
}

static double mib_peak() {
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss / 1024.0;
}

// refused at once and for this reason, whatever it takes to read all of it
static void expect_refused(llama_context * ctx, const fs::path & path, const char * reason, bool sequence = false) {
    const double  mib   = mib_peak();
    const int64_t start = ggml_time_ms();

    llama_adapter_mem_state_error_clear();

    llama_token tokens[64];
    size_t      n      = 0;
    const bool  loaded = sequence ? llama_state_seq_load_file(ctx, path.c_str(), 0, tokens, 64, &n) > 0 : load(ctx, path);

    const std::string err = llama_adapter_mem_state_error();
    const int64_t     ms  = ggml_time_ms() - start;
    if (loaded || err.rfind(reason, 0) != 0 || ms > 1000 || mib_peak() - mib > 64) {
        printf("  FAIL %s: expected %s: %s, %d ms, %.0f MiB\n", path.filename().c_str(), reason, err.c_str(), (int) ms, mib_peak() - mib);
        ++n_fail;
    }
}

static void test_no_file(llama_context * ctx) {
    const fs::path in = fresh("no-file");

    CHECK(mkfifo((in / "pipe").c_str(), 0600) == 0);
    fs::create_symlink("/dev/zero", in / "device");
    fs::create_directories(in / "directory");
    fs::create_symlink(in / "none", in / "dangling");
    for (const char * name : { "pipe", "device", "directory", "dangling", "none" }) {
        for (const bool sequence : { false, true }) {
            expect_refused(ctx, in / name, "[state-unreadable]", sequence);
        }
    }
}

// a file of n bytes: what is given, a hole, and a trailer that says so, whose hash is not right
static fs::path sparse(const fs::path & in, const std::string & begin, bool has_trailer) {
    const fs::path path = in / "sparse";
    const uint64_t n    = 2ull << 30;

    std::ofstream(path, std::ios::binary) << begin;
    fs::resize_file(path, n - (has_trailer ? 48 : 0));
    if (has_trailer) {
        const uint64_t n_bytes = n - 48;

        std::string trailer = "RMVE" + std::string("\1\0\0\0", 4) + std::string((const char *) &n_bytes, 8) + std::string(32, 'x');
        std::ofstream(path, std::ios::binary | std::ios::app) << trailer;
    }
    CHECK(fs::file_size(path) == n);
    return path;
}

static void test_sparse(llama_context * ctx) {
    const fs::path in = fresh("sparse");

    CHECK(decode(ctx, text(0, 30, 1)) == 0);
    CHECK(llama_adapter_mem_state_save_file(ctx, (in / "memory").c_str(), 0) > 0);
    const llama_token tokens[] = { 5, 6, 7 };
    CHECK(llama_state_seq_save_file(ctx, (in / "sequence").c_str(), 0, tokens, 3) > 0);
    CHECK(mode_of(in / "memory") == 0600 && mode_of(in / "sequence") == 0600);

    const std::string memory   = read_all(in / "memory");
    const std::string sequence = read_all(in / "sequence");
    const size_t      n_before = 12 + sizeof(llama_adapter_mem_block_header);

    // with a KV cache that fills the file
    const auto filled = [](std::string data, size_t i_block) {
        llama_adapter_mem_block_header header;
        memcpy(&header, data.data() + i_block, sizeof(header));
        header.n_bytes_kv = (2ull << 30) - 48 - i_block - sizeof(header) - 4ull * header.n_layer * header.n_cell * llama_adapter_mem_block_n_cells(header);
        memcpy(&data[i_block], &header, sizeof(header));
        return data;
    };
    expect_refused(ctx, sparse(in, "", false), "[state-format]");
    expect_refused(ctx, sparse(in, "", true), "[state-format]");
    expect_refused(ctx, sparse(in, memory.substr(0, 12), false), "[state-no-memory]");
    expect_refused(ctx, sparse(in, memory.substr(0, 12), true), "[state-no-memory]");
    expect_refused(ctx, sparse(in, memory.substr(0, n_before), false), "[state-truncated]");
    expect_refused(ctx, sparse(in, memory.substr(0, n_before), true), "[state-truncated]");
    expect_refused(ctx, sparse(in, filled(memory, 12), true), "[state-shape]");
    expect_refused(ctx, sparse(in, filled(sequence, 12 + sizeof(tokens)), true), "[state-kind]");
    expect_refused(ctx, sparse(in, filled(sequence, 12 + sizeof(tokens)), true), "[state-kv]", true);

    // a memory with 500 million tokens
    std::string many = memory.substr(0, 12);
    many.replace(8, 4, std::string("\0\0\0\x1c", 4));
    expect_refused(ctx, sparse(in, many, true), "[state-no-memory]");

    CHECK(load(ctx, in / "memory"));
    size_t      n = 0;
    llama_token got[8];
    CHECK(llama_state_seq_load_file(ctx, (in / "sequence").c_str(), 0, got, 8, &n) > 0);
    CHECK(n == 3 && memcmp(got, tokens, sizeof(tokens)) == 0);
}

// neither waits for a pipe nor reads a device: a sidecar, a base to be hashed
static void test_sidecar(const char * path_base) {
    const fs::path in = fresh("sidecar");

    CHECK(mkfifo((in / "pipe").c_str(), 0600) == 0);
    fs::create_symlink("/dev/zero", in / "device");

    model_ptr model = model_load(path_base, nullptr);
    for (const char * name : { "pipe", "device" }) {
        char err[512] = "";
        CHECK(!llama_model_load_adapter_mem(model.get(), (in / name).c_str(), path_base, LLAMA_ADAPTER_MEM_MODE_BATCHED, err, sizeof(err)));
        CHECK(strstr(err, "[unreadable] is not a file") != nullptr);
    }
}

int main(int argc, char ** argv) {
    const char * path         = argc == 3 ? argv[1] : LLAMAMEM_TEST_DATA "/model_a/model-f32.gguf";
    const char * path_sidecar = argc == 3 ? argv[2] : LLAMAMEM_TEST_DATA "/model_a/sidecar-v1.gguf";

    llama_log_set(log_keep_errors, nullptr);

    model_ptr model = model_load(path, path_sidecar);
    ctx_ptr   ctx   = ctx_init(model.get(), 1, true);

    dir = fs::temp_directory_path() / ("test-adapter-mem-fs-" + std::to_string(std::random_device()()));
    fs::create_directories(dir);

    const int res = run_tests({
            { "written", [&] { test_write(); } },
            { "the part's name is taken", [&] { test_part_taken(); } },
            { "what killed processes left", [&] { test_sweep(); } },
            { "what is no file", [&] { test_no_file(ctx.get()); } },
            { "holes of 2 GiB", [&] { test_sparse(ctx.get()); } },
            { "a sidecar that is no file", [&] { test_sidecar(path); } },
    });
    fs::remove_all(dir);
    return res;
}
