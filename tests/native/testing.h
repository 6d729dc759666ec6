#pragma once

// What the native tests share: checks, small models and contexts, decoding, states.

#include "llama-adapter-mem.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

static int n_fail = 0;

#define CHECK(x)                                                  \
    do {                                                          \
        if (!(x)) {                                               \
            printf("  FAIL %s:%d: %s\n", __FILE__, __LINE__, #x); \
            ++n_fail;                                             \
        }                                                         \
    } while (0)

struct model_deleter {
    void operator()(llama_model * m) { llama_model_free(m); }
};
struct ctx_deleter {
    void operator()(llama_context * c) { llama_free(c); }
};

using model_ptr = std::unique_ptr<llama_model, model_deleter>;
using ctx_ptr   = std::unique_ptr<llama_context, ctx_deleter>;

static uint32_t n_tokens_text = 400; // the tokens that texts are of, those from 10 on

static std::string last_error; // what llama.cpp logged as an error

static inline void log_keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        last_error = text;
    }
}

static inline model_ptr model_load(const char * path, const char * path_sidecar) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers       = 0;

    model_ptr model{ llama_model_load_from_file(path, params) };
    if (!model) {
        printf("failed to load %s\n", path);
        exit(1);
    }
    n_tokens_text = std::min(400, llama_vocab_n_tokens(llama_model_get_vocab(model.get())) - 10);

    if (path_sidecar) {
        char err[512];
        if (!llama_model_load_adapter_mem(model.get(), path_sidecar, path, LLAMA_ADAPTER_MEM_MODE_BATCHED, err, sizeof(err))) {
            printf("%s\n", err);
            exit(1);
        }
    }
    return model;
}

static inline ctx_ptr ctx_init(llama_model * model, uint32_t n_seq, bool unified, uint32_t n_ubatch = 512, bool swa_full = false) {
    llama_context_params params = llama_context_default_params();

    params.n_ctx           = unified ? 1024 : 1024 * n_seq;
    params.n_batch         = 1024;
    params.n_ubatch        = n_ubatch;
    params.n_seq_max       = n_seq;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.type_k          = GGML_TYPE_F32;
    params.type_v          = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.kv_unified      = unified;
    params.swa_full        = swa_full;

    return ctx_ptr{ llama_init_from_model(model, params) };
}

struct token_at {
    llama_token  id;
    llama_pos    pos;
    llama_seq_id seq;
};

static inline int decode(llama_context * ctx, const std::vector<token_at> & tokens, std::vector<std::vector<float>> * logits = nullptr) {
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));

    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i]     = tokens[i].id;
        batch.pos[i]       = tokens[i].pos;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = tokens[i].seq;
        batch.logits[i]    = true;
    }
    batch.n_tokens = tokens.size();

    const int res = llama_decode(ctx, batch);
    if (res == 0 && logits) {
        for (size_t i = 0; i < tokens.size(); ++i) {
            const float * row = llama_get_logits_ith(ctx, i);
            logits->emplace_back(row, row + n_vocab);
        }
    }
    llama_batch_free(batch);
    return res;
}

static inline std::vector<token_at> text(llama_seq_id seq, int n, uint32_t seed, llama_pos pos0 = 0) {
    std::vector<token_at> res;
    for (int i = 0; i < n; ++i) {
        seed = seed * 1664525u + 1013904223u;
        res.push_back({ (llama_token) (10 + (seed >> 8) % n_tokens_text), pos0 + i, seq });
    }
    return res;
}

// all states of a sequence: matrices and previous sources of each layer, then the counters; empty if there is a NaN
static inline std::vector<float> state(llama_context * ctx, llama_seq_id seq) {
    llama_adapter_mem_info info;
    if (!llama_model_adapter_mem_info(llama_get_model(ctx), &info)) {
        return {};
    }
    const size_t n_S = info.n_head * info.n_state * info.rank * info.rank;
    const size_t n_p = info.n_head * info.rank;

    std::vector<float> res;
    for (uint32_t i = 0; i < info.n_layer; ++i) {
        std::vector<float> S(n_S, NAN), prev(n_p, NAN);
        const int64_t      n = llama_adapter_mem_get_state(ctx, seq, i, S.data(), prev.data());
        res.insert(res.end(), S.begin(), S.end());
        res.insert(res.end(), prev.begin(), prev.end());
        res.push_back((float) n);
    }
    return std::any_of(res.begin(), res.end(), [](float x) { return !std::isfinite(x); }) ? std::vector<float>() : res;
}

// NaN counts as infinitely far
static inline double max_diff(const std::vector<float> & a, const std::vector<float> & b) {
    if (a.empty() || a.size() != b.size()) {
        return INFINITY;
    }
    double res = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        const double d = std::fabs((double) a[i] - b[i]);
        if (!(d <= res)) {
            res = std::isnan(d) ? INFINITY : d;
        }
    }
    return res;
}

static inline double max_diff(const std::vector<std::vector<float>> & a, const std::vector<std::vector<float>> & b) {
    double res = a.size() == b.size() && !a.empty() ? 0.0 : INFINITY;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        res = std::max(res, max_diff(a[i], b[i]));
    }
    return res;
}

static inline bool is_zero(const std::vector<float> & x) {
    return !x.empty() && std::all_of(x.begin(), x.end(), [](float v) { return v == 0.0f; });
}

// finite garbage in every cell: what is not cleared shows
static inline void fill_garbage(llama_context * ctx, uint32_t n_seq) {
    llama_adapter_mem_info info;
    if (!llama_model_adapter_mem_info(llama_get_model(ctx), &info)) {
        return;
    }
    std::vector<float> S(info.n_head * info.n_state * info.rank * info.rank, 123.0f), prev(info.n_head * info.rank, -7.0f);
    for (uint32_t s = 0; s < n_seq; ++s) {
        for (uint32_t i = 0; i < info.n_layer; ++i) {
            CHECK(llama_adapter_mem_set_state(ctx, s, i, S.data(), prev.data(), 5));
        }
    }
    llama_memory_clear(llama_get_memory(ctx), true);
}

using test_list = std::vector<std::pair<const char *, std::function<void()>>>;

// the exit status
static inline int run_tests(const test_list & tests) {
    for (const auto & [name, fn] : tests) {
        const int n_fail_before = n_fail;
        printf("%s\n", name);
        fn();
        printf("%s: %s\n", name, n_fail == n_fail_before ? "ok" : "FAILED");
    }
    printf("%d failed\n", n_fail);
    return n_fail == 0 ? 0 : 1;
}
