// A memory that overflows ruins its own text and nothing else: not the text of another sequence in the same batch, nor the one
// that gets the cells of its KV cache afterwards. And what a clear costs is not taken for the time of a prompt.
//
// usage: test-adapter-mem-overflow [BASE.gguf SIDECAR.gguf]

#include "testing.h"

struct overflow {
    const char * name;

    float S, prev;
};

static const overflow OVERFLOWS[] = {
    { "states of 3.4e38", 3.4e38f, 0.1f },
    { "states of 1e30", 1e30f, 0.1f },
    { "prev of 1e25", 0.1f, 1e25f },
    { "prev of 3e38", 0.1f, 3e38f },
    { "both", 3e38f, -3e38f },
};

static void spoil(llama_context * ctx, llama_seq_id seq, const overflow & values) {
    llama_adapter_mem_info info;
    CHECK(llama_model_adapter_mem_info(llama_get_model(ctx), &info));

    const std::vector<float> S(info.n_head * info.n_state * info.rank * info.rank, values.S), prev(info.n_head * info.rank, values.prev);
    for (uint32_t i = 0; i < info.n_layer; ++i) {
        CHECK(llama_adapter_mem_set_state(ctx, seq, i, S.data(), prev.data(), 5));
    }
}

static std::vector<token_at> with(std::vector<token_at> a, const std::vector<token_at> & b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

static bool is_finite(const std::vector<std::vector<float>> & rows) {
    return std::all_of(rows.begin(), rows.end(), [](const auto & row) {
        return std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); });
    });
}

static void test_overflow(llama_model * model, bool unified, bool frozen) {
    for (const auto & values : OVERFLOWS) {
        ctx_ptr ctx = ctx_init(model, 2, unified);
        ctx_ptr own = ctx_init(model, 2, unified);

        // the same twice: beside a sequence whose memory overflows, and beside a sound one; then a text in its place
        std::vector<std::vector<float>> logits, want, after, want_after;
        for (auto * it : { ctx.get(), own.get() }) {
            const bool is_spoilt = it == ctx.get();
            if (is_spoilt) {
                spoil(it, 1, values);
                CHECK(llama_adapter_mem_seq_set(it, 1, frozen, 1.0f));
            }
            CHECK(decode(it, with(text(0, 60, 1), text(1, 60, 2)), is_spoilt ? &logits : &want) == 0);
            if (is_spoilt) {
                CHECK(llama_adapter_mem_seq_set(it, 1, false, 1.0f));
            }
            llama_memory_seq_rm(llama_get_memory(it), 1, -1, -1);
            CHECK(decode(it, text(1, 80, 3), is_spoilt ? &after : &want_after) == 0);
            CHECK(decode(it, text(0, 20, 4, 60), is_spoilt ? &after : &want_after) == 0);
        }
        CHECK(is_finite(logits));
        logits.resize(60); // of the one beside it
        want.resize(60);
        CHECK(max_diff(logits, want) == 0.0);
        CHECK(max_diff(after, want_after) == 0.0);
    }
}

// the state says that it overflowed, and is refused where it would be saved or given to another
static void test_seen(llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 1, true);
    spoil(ctx.get(), 0, OVERFLOWS[3]);
    CHECK(!state(ctx.get(), 0).empty());
    CHECK(decode(ctx.get(), text(0, 20, 1)) == 0);
    CHECK(state(ctx.get(), 0).empty()); // of what is not finite
}

// a clear is carried out when the next batch begins
static void test_prompt_time(llama_model * model) {
    llama_context_params params = llama_context_default_params();

    params.n_ctx           = 512;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.no_perf         = false;

    ctx_ptr ctx{ llama_init_from_model(model, params) };
    for (int i = 0; i < 3; ++i) {
        llama_memory_clear(llama_get_memory(ctx.get()), true);
        llama_perf_context_reset(ctx.get());

        const int64_t start = ggml_time_us();
        CHECK(decode(ctx.get(), text(0, 200, 1)) == 0);
        llama_synchronize(ctx.get());
        const double ms = (ggml_time_us() - start) / 1000.0;

        const auto perf = llama_perf_context(ctx.get());
        CHECK(perf.n_p_eval == 200);
        CHECK(i == 0 || (perf.t_p_eval_ms > 0.1 * ms && perf.t_p_eval_ms <= ms)); // the first batch reserves, in stock too
    }
}

int main(int argc, char ** argv) {
    const char * path         = argc == 3 ? argv[1] : LLAMAMEM_TEST_DATA "/model_a/model-f32.gguf";
    const char * path_sidecar = argc == 3 ? argv[2] : LLAMAMEM_TEST_DATA "/model_a/sidecar-v1.gguf";

    llama_log_set(log_keep_errors, nullptr);

    model_ptr model = model_load(path, path_sidecar);

    return run_tests({
            { "overflow, a KV cache each", [&] { test_overflow(model.get(), false, false); } },
            { "overflow, one KV cache", [&] { test_overflow(model.get(), true, false); } },
            { "overflow, frozen", [&] { test_overflow(model.get(), true, true); } },
            { "seen", [&] { test_seen(model.get()); } },
            { "the time of a prompt", [&] { test_prompt_time(model.get()); } },
    });
}
