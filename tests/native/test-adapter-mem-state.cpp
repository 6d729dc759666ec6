// Saved and loaded states: of a sequence, of a whole context, and the server's partial checkpoints.
//
// usage: test-adapter-mem-state [BASE.gguf SIDECAR.gguf]

#include "testing.h"

static void test_save_load(llama_model * base, llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 2, false);
    CHECK(decode(ctx.get(), text(0, 70, 1)) == 0);
    CHECK(decode(ctx.get(), text(1, 40, 2)) == 0);

    std::vector<uint8_t> seq(llama_state_seq_get_size(ctx.get(), 0));
    CHECK(llama_state_seq_get_data(ctx.get(), seq.data(), seq.size(), 0) == seq.size());
    std::vector<uint8_t> all(llama_state_get_size(ctx.get()));
    CHECK(llama_state_get_data(ctx.get(), all.data(), all.size()) == all.size());

    const std::vector<float> state0 = state(ctx.get(), 0), state1 = state(ctx.get(), 1);

    std::vector<std::vector<float>> want;
    CHECK(decode(ctx.get(), text(0, 10, 3, 70), &want) == 0);

    // the KV cells lie elsewhere then, so that attention sums in another order

    // one sequence, into the other place
    {
        ctx_ptr ctx2 = ctx_init(model, 2, false);
        fill_garbage(ctx2.get(), 2);
        CHECK(llama_state_seq_set_data(ctx2.get(), seq.data(), seq.size(), 1) == seq.size());
        CHECK(max_diff(state0, state(ctx2.get(), 1)) == 0.0);
        CHECK(is_zero(state(ctx2.get(), 0)));

        std::vector<std::vector<float>> got;
        CHECK(decode(ctx2.get(), text(1, 10, 3, 70), &got) == 0);
        printf("  continued in another sequence: %.1e\n", max_diff(want, got));
        CHECK(max_diff(want, got) < 2e-2);
    }
    // the whole context
    {
        ctx_ptr ctx2 = ctx_init(model, 2, false);
        CHECK(llama_state_set_data(ctx2.get(), all.data(), all.size()) == all.size());
        CHECK(max_diff(state0, state(ctx2.get(), 0)) == 0.0);
        CHECK(max_diff(state1, state(ctx2.get(), 1)) == 0.0);

        std::vector<std::vector<float>> got;
        CHECK(decode(ctx2.get(), text(0, 10, 3, 70), &got) == 0);
        printf("  continued in another context: %.1e\n", max_diff(want, got));
        CHECK(max_diff(want, got) < 2e-2);
    }
    // one that a base has saved
    {
        ctx_ptr ctx_base = ctx_init(base, 2, false);
        CHECK(decode(ctx_base.get(), text(0, 70, 1)) == 0);
        std::vector<uint8_t> of_base(llama_state_seq_get_size(ctx_base.get(), 0));
        CHECK(llama_state_seq_get_data(ctx_base.get(), of_base.data(), of_base.size(), 0) == of_base.size());

        const std::vector<float> before = state(ctx.get(), 1);

        last_error.clear();
        CHECK(llama_state_seq_set_data(ctx.get(), of_base.data(), of_base.size(), 1) == 0);
        CHECK(last_error.find("no memory in it") != std::string::npos);
        CHECK(max_diff(before, state(ctx.get(), 1)) == 0.0);
    }
}

// A server's checkpoint holds the window and the memory, not the rest of the KV cache: after it was restored, the rest is
// cut to the same length.
static void test_checkpoint(llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 1, true);
    auto *  mem = llama_get_memory(ctx.get());

    CHECK(decode(ctx.get(), text(0, 70, 1)) == 0);

    const llama_state_seq_flags flags = LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;
    std::vector<uint8_t>        data(llama_state_seq_get_size_ext(ctx.get(), 0, flags));
    CHECK(llama_state_seq_get_data_ext(ctx.get(), data.data(), data.size(), 0, flags) == data.size());
    const auto before = state(ctx.get(), 0);

    std::vector<std::vector<float>> want, got;
    CHECK(decode(ctx.get(), text(0, 10, 2, 70), &want) == 0);
    CHECK(!llama_memory_seq_rm(mem, 0, 70, -1));

    CHECK(llama_state_seq_set_data_ext(ctx.get(), data.data(), data.size(), 0, flags) == data.size());
    CHECK(llama_memory_seq_rm(mem, 0, 70, -1));
    CHECK(llama_memory_seq_pos_max(mem, 0) == 69);
    CHECK(max_diff(before, state(ctx.get(), 0)) == 0.0);

    CHECK(decode(ctx.get(), text(0, 10, 2, 70), &got) == 0);
    CHECK(max_diff(want, got) < 2e-2);
}

static bool has_origin(llama_context * ctx, llama_seq_id seq_id) {
    return llama_adapter_mem_seq_get_origin(ctx, seq_id, nullptr);
}

// A memory alone: the text goes, the memory stays; what is returned to when text is removed, and what drops it.
static void test_memory_only(llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 2, true);
    auto *  mem = llama_get_memory(ctx.get());

    CHECK(decode(ctx.get(), text(0, 70, 1)) == 0);
    const auto remembered = state(ctx.get(), 0);

    const llama_state_seq_flags flags = LLAMA_STATE_SEQ_FLAGS_ADAPTER_MEM_ONLY;
    std::vector<uint8_t>        data(llama_state_seq_get_size_ext(ctx.get(), 0, flags));
    CHECK(llama_state_seq_get_data_ext(ctx.get(), data.data(), data.size(), 0, flags) == data.size());
    printf("  %zu bytes\n", data.size());

    // into another sequence that has text
    CHECK(decode(ctx.get(), text(1, 30, 2)) == 0);
    CHECK(!has_origin(ctx.get(), 1));
    CHECK(llama_state_seq_set_data_ext(ctx.get(), data.data(), data.size(), 1, flags) == data.size());
    CHECK(llama_memory_seq_pos_max(mem, 1) == -1 && has_origin(ctx.get(), 1));
    CHECK(max_diff(remembered, state(ctx.get(), 1)) == 0.0);

    // the server's first step with an empty sequence changes nothing
    CHECK(llama_memory_seq_rm(mem, 1, 0, -1));
    CHECK(max_diff(remembered, state(ctx.get(), 1)) == 0.0);

    std::vector<std::vector<float>> first, again, blank;
    CHECK(decode(ctx.get(), text(1, 20, 3), &first) == 0);
    CHECK(max_diff(remembered, state(ctx.get(), 1)) > 0.0);

    // all text removed: from the start
    CHECK(llama_memory_seq_rm(mem, 1, 0, -1));
    CHECK(max_diff(remembered, state(ctx.get(), 1)) == 0.0);
    CHECK(decode(ctx.get(), text(1, 20, 3), &again) == 0);
    CHECK(max_diff(first, again) < 1e-3);

    // a saved sequence remembers what it started with
    std::vector<uint8_t> seq(llama_state_seq_get_size(ctx.get(), 1));
    CHECK(llama_state_seq_get_data(ctx.get(), seq.data(), seq.size(), 1) == seq.size());
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1));
    CHECK(llama_state_seq_set_data(ctx.get(), seq.data(), seq.size(), 0) == seq.size());
    CHECK(has_origin(ctx.get(), 0) && llama_memory_seq_pos_max(mem, 0) == 19);
    CHECK(llama_memory_seq_rm(mem, 0, 0, -1));
    CHECK(max_diff(remembered, state(ctx.get(), 0)) == 0.0);

    // so does a copy
    llama_memory_seq_rm(mem, 0, -1, -1);
    llama_memory_seq_cp(mem, 1, 0, -1, -1);
    CHECK(llama_memory_seq_rm(mem, 0, 0, -1));
    CHECK(max_diff(remembered, state(ctx.get(), 0)) == 0.0);

    // memory alone emptied
    CHECK(llama_adapter_mem_seq_reset(ctx.get(), 1));
    CHECK(is_zero(state(ctx.get(), 1)) && !has_origin(ctx.get(), 1) && llama_memory_seq_pos_max(mem, 1) == 19);
    CHECK(llama_memory_seq_rm(mem, 1, -1, -1));
    CHECK(decode(ctx.get(), text(1, 20, 3), &blank) == 0);
    CHECK(max_diff(first, blank) > 1e-3);

    // dropped: nothing is left
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1));
    CHECK(is_zero(state(ctx.get(), 0)) && !has_origin(ctx.get(), 0));
}

static std::vector<std::vector<float>> rows(const std::vector<std::vector<float>> & x, size_t i0, size_t i1) {
    return { x.begin() + i0, x.begin() + i1 };
}

// Frozen: the state stays bit for bit. Scaled by 0: the base's logits. Each sequence for itself, in one batch too.
static void test_frozen_scaled(llama_model * base, llama_model * model) {
    ctx_ptr ctx_base = ctx_init(base, 2, true);
    ctx_ptr ctx      = ctx_init(model, 2, true);

    std::vector<std::vector<float>> want, got, full;
    CHECK(decode(ctx_base.get(), text(0, 50, 1), &want) == 0);

    CHECK(llama_adapter_mem_seq_set(ctx.get(), 0, false, 0.0f));
    CHECK(decode(ctx.get(), text(0, 50, 1), &got) == 0);
    CHECK(max_diff(want, got) == 0.0);
    CHECK(!is_zero(state(ctx.get(), 0))); // it was written all the same

    // the other sequence is not scaled, also where both are in one batch
    CHECK(decode(ctx.get(), text(1, 50, 1), &full) == 0);
    CHECK(max_diff(want, full) > 1e-3);

    auto both = text(0, 10, 5, 50);
    for (const auto & t : text(1, 10, 6, 50)) {
        both.push_back(t);
    }
    std::vector<std::vector<float>> mixed, want_mixed;
    CHECK(decode(ctx_base.get(), text(1, 50, 1)) == 0);
    CHECK(decode(ctx_base.get(), both, &want_mixed) == 0);
    const auto before = state(ctx.get(), 1);
    CHECK(llama_adapter_mem_seq_set(ctx.get(), 1, true, 1.0f));
    CHECK(decode(ctx.get(), both, &mixed) == 0);
    CHECK(max_diff(rows(want_mixed, 0, 10), rows(mixed, 0, 10)) < 1e-4);
    CHECK(max_diff(rows(want_mixed, 10, 20), rows(mixed, 10, 20)) > 1e-3);
    CHECK(max_diff(before, state(ctx.get(), 1)) == 0.0); // frozen

    bool  frozen = false;
    float scale  = 0.0f;
    CHECK(llama_adapter_mem_seq_get(ctx.get(), 1, &frozen, &scale) && frozen && scale == 1.0f);
    CHECK(!llama_adapter_mem_seq_set(ctx.get(), 1, false, NAN) && !llama_adapter_mem_seq_set(ctx.get(), 2, false, 1.0f));

    // back to normal, a graph without the scale: as if nothing had been
    CHECK(llama_adapter_mem_seq_set(ctx.get(), 0, false, 1.0f) && llama_adapter_mem_seq_set(ctx.get(), 1, false, 1.0f));
    llama_memory_clear(llama_get_memory(ctx.get()), true);
    std::vector<std::vector<float>> normal;
    CHECK(decode(ctx.get(), text(1, 50, 1), &normal) == 0);
    CHECK(max_diff(full, normal) < 2e-2);
}

// What was copied between streams is there when a state is saved, and does not come over one that was loaded since: as an
// answer of several (n) that ends at once, and another client's text from the RAM cache in its place.
static void test_copied_stream(llama_model * model) {
    std::vector<std::vector<float>> want, got;

    for (const bool is_copied : { false, true }) {
        ctx_ptr ctx = ctx_init(model, 2, false);
        CHECK(decode(ctx.get(), text(0, 70, 1)) == 0);
        CHECK(decode(ctx.get(), text(1, 40, 2)) == 0);

        std::vector<uint8_t> seq(llama_state_seq_get_size(ctx.get(), 1));
        CHECK(llama_state_seq_get_data(ctx.get(), seq.data(), seq.size(), 1) == seq.size());

        auto * mem = llama_get_memory(ctx.get());
        llama_memory_seq_rm(mem, 1, -1, -1);
        if (is_copied) {
            llama_memory_seq_cp(mem, 0, 1, -1, -1);

            std::vector<uint8_t> source(llama_state_seq_get_size(ctx.get(), 0)), copy(llama_state_seq_get_size(ctx.get(), 1));
            CHECK(llama_state_seq_get_data(ctx.get(), copy.data(), copy.size(), 1) == copy.size());
            CHECK(llama_state_seq_get_data(ctx.get(), source.data(), source.size(), 0) == source.size());

            std::vector<std::vector<float>> of_source, of_copy;
            for (const bool is_source : { false, true }) {
                ctx_ptr      fresh = ctx_init(model, 2, false);
                const auto & data  = is_source ? source : copy;
                CHECK(llama_state_seq_set_data(fresh.get(), data.data(), data.size(), 0) == data.size());
                CHECK(decode(fresh.get(), text(0, 20, 4, 70), is_source ? &of_source : &of_copy) == 0);
            }
            CHECK(max_diff(of_source, of_copy) == 0.0);

            llama_memory_seq_cp(mem, 0, 1, -1, -1);
            llama_memory_seq_rm(mem, 1, -1, -1);
        }
        CHECK(llama_state_seq_set_data(ctx.get(), seq.data(), seq.size(), 1) == seq.size());
        CHECK(decode(ctx.get(), text(1, 20, 3, 40), is_copied ? &got : &want) == 0);
    }
    CHECK(max_diff(want, got) == 0.0);
}

int main(int argc, char ** argv) {
    const char * path         = argc == 3 ? argv[1] : LLAMAMEM_TEST_DATA "/model_a/model-f32.gguf";
    const char * path_sidecar = argc == 3 ? argv[2] : LLAMAMEM_TEST_DATA "/model_a/sidecar-v1.gguf";

    llama_log_set(log_keep_errors, nullptr);

    model_ptr base  = model_load(path, nullptr);
    model_ptr model = model_load(path, path_sidecar);

    return run_tests({
            { "save and load", [&] { test_save_load(base.get(), model.get()); } },
            { "a copied stream, of a base", [&] { test_copied_stream(base.get()); } },
            { "a copied stream", [&] { test_copied_stream(model.get()); } },
            { "checkpoint", [&] { test_checkpoint(model.get()); } },
            { "a memory alone", [&] { test_memory_only(model.get()); } },
            { "frozen and scaled", [&] { test_frozen_scaled(base.get(), model.get()); } },
    });
}
