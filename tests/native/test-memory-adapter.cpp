// The memory of several sequences against each alone, and every operation on sequences.
//
// usage: test-memory-adapter [BASE.gguf SIDECAR.gguf]

#include "llama-adapter-mem-impl.h"
#include "llama-model.h"
#include "testing.h"

struct run {
    std::vector<std::vector<float>> logits;
    std::vector<float>              state;
};

static run run_alone(llama_model * model, const std::vector<token_at> & tokens, bool unified) {
    ctx_ptr ctx = ctx_init(model, 1, unified);
    fill_garbage(ctx.get(), 1);

    run  res;
    auto mine = tokens;
    for (auto & t : mine) {
        t.seq = 0;
    }
    CHECK(decode(ctx.get(), mine, &res.logits) == 0);
    res.state = state(ctx.get(), 0);
    return res;
}

// the largest difference between n_seq interleaved sequences in one context and each alone
static void interleaved_diff(llama_model * model, int n_seq, bool unified, uint32_t n_ubatch, double & d_logits, double & d_state) {
    std::vector<std::vector<token_at>> texts;
    for (int s = 0; s < n_seq; ++s) {
        texts.push_back(text(s, 40 + 7 * s, 1000 + s));
    }

    ctx_ptr ctx = ctx_init(model, n_seq, unified, n_ubatch);
    fill_garbage(ctx.get(), n_seq);

    std::vector<std::vector<std::vector<float>>> logits(n_seq);

    // uneven pieces of all sequences in each batch
    for (int i0 = 0; i0 < 120; i0 += 11) {
        std::vector<token_at> batch;
        for (int i = i0; i < i0 + 11; ++i) {
            for (int s = 0; s < n_seq; ++s) {
                if (i < (int) texts[s].size()) {
                    batch.push_back(texts[s][i]);
                }
            }
        }
        if (batch.empty()) {
            continue;
        }
        std::vector<std::vector<float>> rows;
        CHECK(decode(ctx.get(), batch, &rows) == 0);
        for (size_t i = 0; i < rows.size(); ++i) {
            logits[batch[i].seq].push_back(rows[i]);
        }
    }

    d_logits = 0.0;
    d_state  = 0.0;
    for (int s = 0; s < n_seq; ++s) {
        const run alone = run_alone(model, texts[s], unified);

        d_logits = std::max(d_logits, max_diff(logits[s], alone.logits));
        if (!alone.state.empty()) {
            d_state = std::max(d_state, max_diff(state(ctx.get(), s), alone.state));
        }
    }
}

static void test_interleaved(llama_model * base, llama_model * model) {
    for (bool unified : { false, true }) {
        for (int n_seq : { 2, 4, 8 }) {
            for (uint32_t n_ubatch : { 512, 32, 5 }) {
                double db, dm, ds, unused;
                interleaved_diff(base, n_seq, unified, n_ubatch, db, unused);
                interleaved_diff(model, n_seq, unified, n_ubatch, dm, ds);

                printf("  %d sequences, %-11s ub %3u: base %.1e, memory %.1e, states %.1e\n",
                        n_seq, unified ? "unified," : "separate,", n_ubatch, db, dm, ds);

                // as well as stock does on the same model; the floor covers another order of the same sums
                CHECK(dm <= 4.0 * db + 5e-3);
                CHECK(ds <= 5e-3);
            }
        }
    }
}

static void test_restart(llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 2, false);
    auto *  mem = llama_get_memory(ctx.get());

    const auto a = text(0, 60, 1);
    run        first, second;

    CHECK(decode(ctx.get(), a, &first.logits) == 0);
    first.state = state(ctx.get(), 0);
    CHECK(!is_zero(first.state));
    CHECK(is_zero(state(ctx.get(), 1)));

    CHECK(llama_memory_seq_rm(mem, 0, -1, -1));
    CHECK(is_zero(state(ctx.get(), 0)));

    CHECK(decode(ctx.get(), a, &second.logits) == 0);
    CHECK(max_diff(first.logits, second.logits) == 0.0);
    CHECK(max_diff(first.state, state(ctx.get(), 0)) == 0.0);

    // the metadata alone is enough to start anew
    llama_memory_clear(mem, false);
    CHECK(is_zero(state(ctx.get(), 0)));
}

static void test_copy(llama_model * model, bool unified) {
    ctx_ptr ctx = ctx_init(model, 3, unified);
    auto *  mem = llama_get_memory(ctx.get());

    CHECK(decode(ctx.get(), text(0, 50, 1)) == 0);
    llama_memory_seq_cp(mem, 0, 1, -1, -1);
    CHECK(max_diff(state(ctx.get(), 0), state(ctx.get(), 1)) == 0.0); // before the copy was carried out

    run r0, r1;
    CHECK(decode(ctx.get(), text(0, 20, 2, 50), &r0.logits) == 0);
    CHECK(decode(ctx.get(), text(1, 20, 3, 50), &r1.logits) == 0);
    CHECK(max_diff(state(ctx.get(), 0), state(ctx.get(), 1)) > 1e-3);

    // each as if it had been alone
    for (int s : { 0, 1 }) {
        auto all = text(0, 50, 1);
        for (const auto & t : text(0, 20, 2 + s, 50)) {
            all.push_back(t);
        }
        const run alone = run_alone(model, all, unified);
        CHECK(max_diff(alone.state, state(ctx.get(), s)) < 5e-3);
        CHECK(max_diff(alone.logits.back(), (s == 0 ? r0 : r1).logits.back()) < 2e-2);
    }

    if (unified) {
        // without the end of the source there is no state to copy
        last_error.clear();
        llama_memory_seq_cp(mem, 0, 2, 0, 30);
        CHECK(is_zero(state(ctx.get(), 2)));
        CHECK(last_error.find("empty memory") != std::string::npos);
    }
}

static void test_keep(llama_model * model, bool unified) {
    ctx_ptr ctx = ctx_init(model, 3, unified);
    auto *  mem = llama_get_memory(ctx.get());

    for (int s = 0; s < 3; ++s) {
        CHECK(decode(ctx.get(), text(s, 30, s + 1)) == 0);
    }
    const auto kept = state(ctx.get(), 1);

    llama_memory_seq_keep(mem, 1);

    CHECK(is_zero(state(ctx.get(), 0)) && is_zero(state(ctx.get(), 2)));
    CHECK(max_diff(kept, state(ctx.get(), 1)) == 0.0);
    CHECK(llama_memory_seq_pos_max(mem, 0) == -1 && llama_memory_seq_pos_max(mem, 2) == -1);
    CHECK(llama_memory_seq_pos_max(mem, 1) == 29);
}

// also of the base: the streams of the other sequences were left alone
static void test_keep_base(llama_model * base) {
    ctx_ptr ctx = ctx_init(base, 3, false);
    auto *  mem = llama_get_memory(ctx.get());

    for (int s = 0; s < 3; ++s) {
        CHECK(decode(ctx.get(), text(s, 30, s + 1)) == 0);
    }
    llama_memory_seq_keep(mem, 1);
    CHECK(llama_memory_seq_pos_max(mem, 0) == -1 && llama_memory_seq_pos_max(mem, 1) == 29 && llama_memory_seq_pos_max(mem, 2) == -1);
}

static void test_remove(llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 2, false, 512, /* swa_full */ true);
    auto *  mem = llama_get_memory(ctx.get());

    CHECK(decode(ctx.get(), text(0, 100, 1)) == 0);
    const auto before = state(ctx.get(), 0);

    // the end cannot be taken back, and nothing changes
    for (llama_pos p0 : { 1, 50, 99 }) {
        CHECK(!llama_memory_seq_rm(mem, 0, p0, -1));
        CHECK(!llama_memory_seq_rm(mem, 0, p0, 100));
        CHECK(!llama_memory_seq_rm(mem, -1, p0, -1));
    }
    CHECK(llama_memory_seq_pos_max(mem, 0) == 99);
    CHECK(llama_memory_seq_pos_min(mem, 0) == 99); // nothing earlier to return to
    CHECK(max_diff(before, state(ctx.get(), 0)) == 0.0);

    CHECK(llama_memory_seq_rm(mem, 0, 100, -1)); // nothing there

    // context shift: old text goes, the memory of it stays
    CHECK(llama_memory_can_shift(mem));
    CHECK(llama_memory_seq_rm(mem, 0, 10, 60));
    llama_memory_seq_add(mem, 0, 60, -1, -50);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 49);
    CHECK(max_diff(before, state(ctx.get(), 0)) == 0.0);

    CHECK(decode(ctx.get(), text(0, 5, 9, 50)) == 0);
    const auto after = state(ctx.get(), 0);
    CHECK(!after.empty() && max_diff(before, after) > 0.0);
    CHECK(after.back() == before.back() + 5); // the counter is not the position

    // all of it by its positions
    CHECK(llama_memory_seq_rm(mem, 0, 0, 55));
    CHECK(is_zero(state(ctx.get(), 0)));
}

static void test_refused_batches(llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 2, true);
    auto *  mem = llama_get_memory(ctx.get());

    CHECK(decode(ctx.get(), text(0, 20, 1)) == 0);
    const auto before = state(ctx.get(), 0);

    {
        llama_batch batch = llama_batch_init(2, 0, 2);
        for (int i = 0; i < 2; ++i) {
            batch.token[i]  = 20 + i;
            batch.pos[i]    = 20 + i;
            batch.logits[i] = true;
        }
        batch.n_tokens     = 2;
        batch.n_seq_id[0]  = 1;
        batch.seq_id[0][0] = 0;
        batch.n_seq_id[1]  = 2;
        batch.seq_id[1][0] = 0;
        batch.seq_id[1][1] = 1;

        last_error.clear();
        CHECK(llama_decode(ctx.get(), batch) != 0);

        // the same at the start of both, which is how a base shares a prompt
        ctx_ptr ctx2       = ctx_init(model, 2, true);
        batch.pos[0]       = 0;
        batch.pos[1]       = 1;
        batch.n_seq_id[0]  = 2;
        batch.seq_id[0][1] = 1;
        CHECK(llama_decode(ctx2.get(), batch) != 0);
        CHECK(is_zero(state(ctx2.get(), 0)) && is_zero(state(ctx2.get(), 1)));
        CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx2.get()), 0) == -1);

        llama_batch_free(batch);
    }

    CHECK(decode(ctx.get(), text(3, 4, 1)) != 0); // no such sequence

    CHECK(max_diff(before, state(ctx.get(), 0)) == 0.0);
    CHECK(is_zero(state(ctx.get(), 1)));
    CHECK(llama_memory_seq_pos_max(mem, 0) == 19 && llama_memory_seq_pos_max(mem, 1) == -1);
    CHECK(decode(ctx.get(), text(0, 3, 2, 20)) == 0);
}

static bool abort_now(void * data) {
    int & n = *(int *) data;
    return n > 0 && --n == 0;
}

// an aborted ubatch leaves the state in its middle: the sequence has to go
static void test_abort(llama_model * model) {
    ctx_ptr ctx = ctx_init(model, 2, false, 16);
    auto *  mem = llama_get_memory(ctx.get());

    CHECK(decode(ctx.get(), text(0, 20, 1)) == 0);
    CHECK(decode(ctx.get(), text(1, 20, 1)) == 0);
    const auto other = state(ctx.get(), 1);

    int n = 90; // in the second layer or later
    llama_set_abort_callback(ctx.get(), abort_now, &n);
    CHECK(decode(ctx.get(), text(0, 16, 2, 20)) == 2);
    llama_set_abort_callback(ctx.get(), nullptr, nullptr);

    CHECK(llama_memory_seq_pos_max(mem, 0) == -1);
    CHECK(is_zero(state(ctx.get(), 0)));
    CHECK(max_diff(other, state(ctx.get(), 1)) == 0.0);

    // to the memory that it was given, where it was given one
    const llama_state_seq_flags flags = LLAMA_STATE_SEQ_FLAGS_ADAPTER_MEM_ONLY;
    std::vector<uint8_t>        data(llama_state_seq_get_size_ext(ctx.get(), 1, flags));
    CHECK(llama_state_seq_get_data_ext(ctx.get(), data.data(), data.size(), 1, flags) == data.size());
    CHECK(llama_state_seq_set_data_ext(ctx.get(), data.data(), data.size(), 0, flags) == data.size());
    CHECK(decode(ctx.get(), text(0, 20, 3)) == 0);

    n = 90;
    llama_set_abort_callback(ctx.get(), abort_now, &n);
    CHECK(decode(ctx.get(), text(0, 16, 2, 20)) == 2);
    llama_set_abort_callback(ctx.get(), nullptr, nullptr);

    CHECK(llama_memory_seq_pos_max(mem, 0) == -1);
    CHECK(max_diff(other, state(ctx.get(), 0)) == 0.0);
}

// Several sequences on a unified cache whose window has passed, in batches of several ubatches: placing the ubatches for
// a try must leave no trace.
static void test_prepare(llama_model * model) {
    const int n_seq = 3;

    uint32_t seed   = 7;
    auto     random = [&](int n) { seed = seed*1664525u + 1013904223u; return (int) ((seed >> 10) % n); };

    std::vector<token_at> all;
    int                   pos[n_seq] = {};
    while (all.size() < 850) {
        const int s = random(n_seq);
        const int n = 1 + random(60);
        for (const auto & t : text(s, n, seed, pos[s])) {
            all.push_back(t);
        }
        pos[s] += n;
    }

    auto logits = [&](uint32_t n_batch) {
        ctx_ptr                         ctx = ctx_init(model, n_seq, true, 8);
        std::vector<std::vector<float>> res;
        for (size_t i = 0; i < all.size(); i += n_batch) {
            CHECK(decode(ctx.get(), { all.begin() + i, all.begin() + std::min(i + n_batch, all.size()) }, &res) == 0);
        }
        return res;
    };
    const double d = max_diff(logits(8), logits(512));
    printf("  %zu tokens in batches of one ubatch and of many: %.1e\n", all.size(), d);
    CHECK(d < 1e-4);
}

static void test_modes(const char * path, const char * path_sidecar) {
    for (auto mode : { LLAMA_ADAPTER_MEM_MODE_SERIAL, LLAMA_ADAPTER_MEM_MODE_FUSED, LLAMA_ADAPTER_MEM_MODE_BATCHED }) {
        model_ptr model = model_load(path, nullptr);
        char      err[512];
        CHECK(llama_model_load_adapter_mem(model.get(), path_sidecar, path, mode, err, sizeof(err)));

        CHECK(!llama_model_load_adapter_mem(model.get(), path_sidecar, path, mode, err, sizeof(err))); // a second one

        CHECK((bool) ctx_init(model.get(), 1, true, 1));
        last_error.clear();
        CHECK((bool) ctx_init(model.get(), 1, true, 2) == (mode != LLAMA_ADAPTER_MEM_MODE_SERIAL));
        CHECK((bool) ctx_init(model.get(), 2, true, 1) == (mode == LLAMA_ADAPTER_MEM_MODE_BATCHED));
        CHECK((mode == LLAMA_ADAPTER_MEM_MODE_BATCHED) == (last_error.find("--memory-mode") == std::string::npos));
    }
}

// what does not come into the graph of an architecture is named when the context is created, not left out
static void test_graph(const char * path, const char * path_sidecar) {
    model_ptr model = model_load(path, path_sidecar);

    auto &     weights = model->adapter_mem->weights;
    const auto it      = std::find_if(weights.begin(), weights.end(), [](const auto & item) { return item.second.delta; });
    CHECK(it != weights.end());

    auto weight  = weights.extract(it);
    weight.key() = model->output_norm; // not multiplied by anything that goes through the hook
    weights.insert(std::move(weight));

    last_error.clear();
    CHECK(!ctx_init(model.get(), 1, true));
    CHECK(last_error.find("[base-graph]") != std::string::npos && last_error.find("blk.") != std::string::npos);
    printf("  %s", last_error.c_str());
}

int main(int argc, char ** argv) {
    const char * path         = argc == 3 ? argv[1] : LLAMAMEM_TEST_DATA "/model_a/model-f32.gguf";
    const char * path_sidecar = argc == 3 ? argv[2] : LLAMAMEM_TEST_DATA "/model_a/sidecar-v1.gguf";

    llama_log_set(log_keep_errors, nullptr);

    model_ptr base  = model_load(path, nullptr);
    model_ptr model = model_load(path, path_sidecar);

    return run_tests({
            { "several sequences", [&] { test_interleaved(base.get(), model.get()); } },
            { "restart", [&] { test_restart(model.get()); } },
            { "copy then diverge", [&] { test_copy(model.get(), false); test_copy(model.get(), true); } },
            { "keep", [&] { test_keep(model.get(), false); test_keep(model.get(), true); } },
            { "keep, base", [&] { test_keep_base(base.get()); } },
            { "remove and context shift", [&] { test_remove(model.get()); } },
            { "refused batches", [&] { test_refused_batches(model.get()); } },
            { "aborted ubatch", [&] { test_abort(model.get()); } },
            { "prepare, base", [&] { test_prepare(base.get()); } },
            { "prepare", [&] { test_prepare(model.get()); } },
            { "modes", [&] { test_modes(path, path_sidecar); } },
            { "graph", [&] { test_graph(path, path_sidecar); } },
    });
}
