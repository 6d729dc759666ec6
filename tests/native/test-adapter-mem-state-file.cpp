// Files of states: whatever is wrong with one is refused with its reason, and two live sequences go on bit for bit as if
// nothing had been tried.
//
// usage: test-adapter-mem-state-file [BASE.gguf SIDECAR.gguf SIDECAR-2.gguf]

#include "testing.h"

#include "llama-adapter-mem-sha256.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>

namespace fs = std::filesystem;

static const size_t N_HEADER  = 320; // of the block, as documented
static const size_t N_TRAILER = 48;

using bytes = std::vector<uint8_t>;

static bytes file_read(const fs::path & path) {
    std::ifstream in(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(in), {} };
}

static void file_write(const fs::path & path, const bytes & data) {
    std::ofstream(path, std::ios::binary).write((const char *) data.data(), data.size());
}

static size_t find_block(const bytes & data) {
    const std::string magic = "RMVS";
    return std::search(data.begin(), data.end(), magic.begin(), magic.end()) - data.begin();
}

template <typename T>
static T get(const bytes & data, size_t at) {
    T res;
    memcpy(&res, data.data() + at, sizeof(res));
    return res;
}

// makes the hashes of block and file right again, as an honest writer of other content would have them
static void seal(bytes & data) {
    const size_t block = find_block(data);
    const size_t n     = N_HEADER + 4ull * get<uint32_t>(data, block + 16) * get<uint32_t>(data, block + 44) * get<uint32_t>(data, block + 40);

    std::fill_n(data.begin() + block + 88, 32, 0);
    const auto of_block = llama_adapter_mem_sha256::hash(data.data() + block, n);
    std::copy(of_block.begin(), of_block.end(), data.begin() + block + 88);

    const auto of_file = llama_adapter_mem_sha256::hash(data.data(), data.size() - N_TRAILER);
    std::copy(of_file.begin(), of_file.end(), data.end() - 32);
}

struct state_kind {
    const char * name;

    std::function<bool(llama_context *, const char *)> save;
    std::function<bool(llama_context *, const char *)> load; // into sequence 0, or the whole context
};

static const std::vector<llama_token> TOKENS = { 5, 6, 7 };

static const state_kind KINDS[] = {
    {
            "a sequence",
            [](llama_context * ctx, const char * path) { return llama_state_seq_save_file(ctx, path, 0, TOKENS.data(), TOKENS.size()) > 0; },
            [](llama_context * ctx, const char * path) {
                std::vector<llama_token> tokens(64);
                size_t                   n = 0;
                return llama_state_seq_load_file(ctx, path, 0, tokens.data(), tokens.size(), &n) > 0;
            },
    },
    {
            "a whole context",
            [](llama_context * ctx, const char * path) { return llama_state_save_file(ctx, path, TOKENS.data(), TOKENS.size()); },
            [](llama_context * ctx, const char * path) {
                std::vector<llama_token> tokens(64);
                size_t                   n = 0;
                return llama_state_load_file(ctx, path, tokens.data(), tokens.size(), &n);
            },
    },
    {
            "a memory alone",
            [](llama_context * ctx, const char * path) { return llama_adapter_mem_state_save_file(ctx, path, 0) > 0; },
            [](llama_context * ctx, const char * path) { return llama_adapter_mem_state_load_file(ctx, path, 0) > 0; },
    },
};

static fs::path dir;

// Two live sequences, and what they answer when they go on.
struct live {
    ctx_ptr ctx;

    live(llama_model * model, bool unified) : ctx(ctx_init(model, 2, unified)) {
        CHECK(decode(ctx.get(), text(0, 70, 1)) == 0);
        CHECK(decode(ctx.get(), text(1, 40, 2)) == 0);
    }

    std::vector<std::vector<float>> go_on() {
        std::vector<std::vector<float>> res;
        CHECK(decode(ctx.get(), text(0, 12, 3, 70), &res) == 0);
        CHECK(decode(ctx.get(), text(1, 12, 4, 40), &res) == 0);
        return res;
    }
};

// fails with one of the reasons
static void expect_refused(const state_kind & kind, llama_context * ctx, const bytes & data, const std::set<std::string> & reasons, const std::string & what) {
    const fs::path path = dir / "tried";
    file_write(path, data);

    llama_adapter_mem_state_error_clear();
    const bool        loaded = kind.load(ctx, path.string().c_str());
    const std::string err    = llama_adapter_mem_state_error();
    const std::string reason = err.substr(0, err.find(']') + 1);

    if (loaded || !reasons.count(reason)) {
        printf("  FAIL %s: %s: %s\n", kind.name, what.c_str(), loaded ? "loaded" : err.c_str());
        ++n_fail;
    }
}

static void test_refused(llama_model * model, llama_model * model_other, llama_model * base) {
    std::mt19937 rng(7);

    for (const bool unified : { true, false }) {
        const auto want = live(model, unified).go_on();

        for (const auto & kind : KINDS) {
            live it(model, unified);

            const fs::path path = dir / "good";
            CHECK(kind.save(it.ctx.get(), path.string().c_str()));

            const bytes  good  = file_read(path);
            const size_t block = find_block(good);
            const size_t end   = good.size() - N_TRAILER;

            const auto try_it = [&](const bytes & data, const std::set<std::string> & reasons, const std::string & what) {
                expect_refused(kind, it.ctx.get(), data, reasons, what);
            };
            const auto flip = [&](size_t at, const std::set<std::string> & reasons) {
                bytes bad = good;
                bad[at] ^= 1 << (rng() % 8);
                try_it(bad, reasons, "flipped byte " + std::to_string(at));
            };

            // headers: of the file, of the block, of the trailer
            for (size_t i = 0; i < 8; ++i) {
                flip(i, { "[state-format]" });
            }
            for (size_t i = 8; i < 12; ++i) {
                flip(i, { "[state-checksum]", "[state-truncated]" }); // the number of tokens
            }
            for (size_t i = 12; i < block + N_HEADER; ++i) {
                flip(i, { "[state-checksum]" });
            }
            for (size_t i = end; i < good.size(); ++i) {
                flip(i, i < end + 4 ? std::set<std::string>{ "[state-truncated]" } : i < end + 8 ? std::set<std::string>{ "[state-version]" }
                                : i < end + 16                                                   ? std::set<std::string>{ "[state-truncated]" }
                                                                                                 : std::set<std::string>{ "[state-checksum]" });
            }
            // payload
            for (int i = 0; i < (unified ? 2000 : 200); ++i) {
                flip(block + N_HEADER + rng() % (end - block - N_HEADER), { "[state-checksum]" });
            }
            // cut
            for (int i = 0; i < 200; ++i) {
                const size_t n = i < 20 ? i : rng() % good.size();
                try_it(bytes(good.begin(), good.begin() + n), { "[state-truncated]" }, "cut at " + std::to_string(n));
            }
            // more behind it
            for (const size_t n : { 1, 48, 4096 }) {
                bytes bad = good;
                bad.resize(good.size() + n, 0x5a);
                try_it(bad, { "[state-truncated]" }, "junk behind it");
            }
            bytes twice = good;
            twice.insert(twice.end(), good.begin(), good.end());
            try_it(twice, { "[state-truncated]" }, "twice");

            // other content with right hashes
            const auto edit = [&](size_t at, uint32_t value, const std::string & reason) {
                bytes bad = good;
                memcpy(bad.data() + block + at, &value, sizeof(value));
                seal(bad);
                try_it(bad, { reason }, "value at " + std::to_string(at));
            };
            edit(4, 2, "[state-version]");
            edit(160, 1, "[state-identity]");
            {
                bytes      bad = good; // an honest file of another base
                const auto of  = [&](size_t at) { return bad.begin() + block + at; };
                *of(160) ^= 1;
                const auto fingerprint = llama_adapter_mem_sha256::hash(bad.data() + block + 128, 64);
                std::copy(fingerprint.begin(), fingerprint.end(), of(56));
                seal(bad);
                try_it(bad, { "[state-identity]" }, "of another base");
            }
            edit(12, 3, "[state-kind]");
            edit(24, 8, "[state-shape]");
            edit(32, 7, "[state-shape]");
            edit(120, 8, "[state-shape]");
            edit(N_HEADER, 0x7fc00000, "[state-values]"); // NaN
            edit(N_HEADER + 4 * (get<uint32_t>(good, block + 44) - 2), 0xbf800000, "[state-values]"); // counter -1

            {
                bytes bad = good; // a tool's note that is not UTF-8
                bad[block + 120] |= 1;
                bad[block + 192] = 0xff;
                seal(bad);
                try_it(bad, { "[state-shape]" }, "a provenance that is not UTF-8");
            }

            // of another sidecar, of a base alone; and into a base
            {
                live       other(model_other, unified);
                const auto path_other = dir / "other";
                CHECK(kind.save(other.ctx.get(), path_other.string().c_str()));
                try_it(file_read(path_other), { "[state-identity]" }, "of another sidecar");

                live of_base(base, unified);
                if (kind.name != KINDS[2].name) {
                    CHECK(kind.save(of_base.ctx.get(), path_other.string().c_str()));
                    try_it(file_read(path_other), { "[state-no-memory]" }, "of a base");

                    const auto want_base = live(base, unified).go_on();
                    expect_refused(kind, of_base.ctx.get(), good, { "[state-has-memory]" }, "into a base");
                    CHECK(max_diff(want_base, of_base.go_on()) == 0.0);
                }
            }

            const auto got = it.go_on();
            CHECK(max_diff(want, got) == 0.0);

            // and it is a good one
            live again(model, unified);
            CHECK(kind.load(again.ctx.get(), path.string().c_str()));
        }
    }
}

// No room, or another type of cache: found out when the KV cache is filled, and taken back.
static void test_kv_refused(llama_model * model) {
    const fs::path path = dir / "long";
    {
        live it(model, true);
        CHECK(decode(it.ctx.get(), text(0, 500, 3, 70)) == 0);
        CHECK(KINDS[0].save(it.ctx.get(), path.string().c_str()));
        CHECK(KINDS[1].save(it.ctx.get(), (dir / "all").string().c_str()));
    }
    const bytes seq = file_read(path);
    const bytes all = file_read(dir / "all");

    const auto small = [&](ggml_type type, bool unified) {
        llama_context_params params = llama_context_default_params();

        params.n_ctx           = unified ? 512 : 1024;
        params.n_seq_max       = 2;
        params.n_threads       = 1;
        params.n_threads_batch = 1;
        params.kv_unified      = unified;
        params.type_k          = type;
        params.type_v          = type;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;

        ctx_ptr ctx{ llama_init_from_model(model, params) };
        CHECK(decode(ctx.get(), text(0, 70, 1)) == 0);
        CHECK(decode(ctx.get(), text(1, 40, 2)) == 0);
        return ctx;
    };
    for (const bool unified : { true, false }) {
        for (const auto type : { GGML_TYPE_F32, GGML_TYPE_F16 }) {
            std::vector<std::vector<float>> want, got;

            ctx_ptr ctx_want = small(type, unified);
            CHECK(decode(ctx_want.get(), text(0, 12, 3, 70), &want) == 0);
            CHECK(decode(ctx_want.get(), text(1, 12, 4, 40), &want) == 0);

            ctx_ptr ctx = small(type, unified);
            expect_refused(KINDS[0], ctx.get(), seq, { "[state-kv]" }, "a sequence that does not fit");
            expect_refused(KINDS[1], ctx.get(), all, { "[state-kv]" }, "a context that does not fit");
            CHECK(decode(ctx.get(), text(0, 12, 3, 70), &got) == 0);
            CHECK(decode(ctx.get(), text(1, 12, 4, 40), &got) == 0);
            CHECK(max_diff(want, got) == 0.0);
        }
    }
}

// an honest header over a KV cache that ends with n bytes too many
static bytes with_more_kv(bytes data, size_t n) {
    const size_t block = find_block(data);

    const auto add = [&](size_t at) {
        const uint64_t value = get<uint64_t>(data, at) + n;
        memcpy(data.data() + at, &value, sizeof(value));
    };
    add(block + 48);
    add(data.size() - N_TRAILER + 8);
    data.insert(data.end() - N_TRAILER, n, 0);

    seal(data);
    return data;
}

// Found out after the last of the KV cache was read: both halves of it, and the memory, are put back.
static void test_kv_too_long(llama_model * model) {
    for (const bool unified : { true, false }) {
        live it(model, unified);
        live longer(model, unified);
        CHECK(decode(longer.ctx.get(), text(0, 50, 3, 70)) == 0);

        const auto want = live(model, unified).go_on();

        for (const auto * kind : { &KINDS[0], &KINDS[1] }) {
            const fs::path path = dir / "long";
            CHECK(kind->save(longer.ctx.get(), path.string().c_str()));
            expect_refused(*kind, it.ctx.get(), with_more_kv(file_read(path), 8), { "[state-kv]" }, "a KV cache that is too long");
        }
        CHECK(max_diff(want, it.go_on()) == 0.0);
    }
}

// A whole context is not put into one with room for another number of sequences.
static void test_cells(llama_model * model) {
    const fs::path path = dir / "three";
    const auto     want = live(model, true).go_on();

    for (const uint32_t n_seq_max : { 1, 3 }) {
        ctx_ptr other = ctx_init(model, n_seq_max, true);
        CHECK(decode(other.get(), text(0, 70, 1)) == 0);
        CHECK(KINDS[1].save(other.get(), path.string().c_str()));

        live it(model, true);
        expect_refused(KINDS[1], it.ctx.get(), file_read(path), { "[state-shape]" }, "of another number of sequences");
        CHECK(max_diff(want, it.go_on()) == 0.0);
    }
}

// In RAM the block has its checksum, and the size is right: the server's checkpoints and its prompt cache.
static void test_ram(llama_model * model) {
    for (const llama_state_seq_flags flags : { 0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, LLAMA_STATE_SEQ_FLAGS_ADAPTER_MEM_ONLY }) {
        const auto want = live(model, true).go_on();

        live   it(model, true);
        auto * ctx = it.ctx.get();

        bytes good(llama_state_seq_get_size_ext(ctx, 0, flags));
        CHECK(llama_state_seq_get_data_ext(ctx, good.data(), good.size(), 0, flags) == good.size());

        const size_t n_block = N_HEADER + 4ull * get<uint32_t>(good, 8 + 16) * get<uint32_t>(good, 8 + 44);
        for (size_t i = 0; i < n_block; i += i < N_HEADER ? 1 : 37) {
            bytes bad = good;
            bad[8 + i] ^= 0x10;
            CHECK(llama_state_seq_set_data_ext(ctx, bad.data(), bad.size(), 0, flags) == 0);
        }
        for (size_t n = 8; n < good.size(); n += 1 + good.size() / 97) {
            CHECK(llama_state_seq_set_data_ext(ctx, good.data(), n, 0, flags) == 0);
        }
        bytes more = good;
        more.push_back(0);
        CHECK(llama_state_seq_set_data_ext(ctx, more.data(), more.size(), 0, flags) == 0);

        CHECK(max_diff(want, it.go_on()) == 0.0);
    }

    const auto want = live(model, true).go_on();

    live   it(model, true);
    auto * ctx = it.ctx.get();

    bytes good(llama_state_get_size(ctx));
    CHECK(llama_state_get_data(ctx, good.data(), good.size()) == good.size());
    const size_t block = find_block(good);
    for (size_t i = 0; i < N_HEADER + 100; ++i) {
        bytes bad = good;
        bad[block + i] ^= 0x10;
        CHECK(llama_state_set_data(ctx, bad.data(), bad.size()) == 0);
    }
    CHECK(llama_state_set_data(ctx, good.data(), good.size() - 1) == 0);
    good.push_back(0);
    CHECK(llama_state_set_data(ctx, good.data(), good.size()) == 0);
    CHECK(max_diff(want, it.go_on()) == 0.0);
}

int main(int argc, char ** argv) {
    const char * path         = argc == 4 ? argv[1] : LLAMAMEM_TEST_DATA "/model_a/model-f32.gguf";
    const char * path_sidecar = argc == 4 ? argv[2] : LLAMAMEM_TEST_DATA "/model_a/sidecar-v1.gguf";
    const char * path_other   = argc == 4 ? argv[3] : LLAMAMEM_TEST_DATA "/model_a/sidecar-v2.gguf";

    llama_log_set(log_keep_errors, nullptr);

    model_ptr base  = model_load(path, nullptr);
    model_ptr model = model_load(path, path_sidecar);
    model_ptr other = model_load(path, path_other);

    dir = fs::temp_directory_path() / ("test-adapter-mem-state-file-" + std::to_string(std::random_device()()));
    fs::create_directories(dir);

    const int res = run_tests({
            { "refused files", [&] { test_refused(model.get(), other.get(), base.get()); } },
            { "refused by the KV cache", [&] { test_kv_refused(model.get()); } },
            { "a KV cache that is too long", [&] { test_kv_too_long(model.get()); } },
            { "another number of sequences", [&] { test_cells(model.get()); } },
            { "states in RAM", [&] { test_ram(model.get()); } },
    });
    fs::remove_all(dir);
    return res;
}
