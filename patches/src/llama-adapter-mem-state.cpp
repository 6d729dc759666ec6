#include "llama-adapter-mem-state.h"

#include "llama-context.h"
#include "llama-model.h"
#include "llama-adapter-mem-sha256.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>

static thread_local std::string adapter_mem_state_error;

void llama_adapter_mem_state_fail(const char * reason, const char * format, ...) {
    char buf[1024];

    const int n = snprintf(buf, sizeof(buf), "[%s] ", reason);

    va_list args;
    va_start(args, format);
    vsnprintf(buf + n, sizeof(buf) - n, format, args);
    va_end(args);

    adapter_mem_state_error = buf;

    throw std::runtime_error(buf);
}

const char * llama_adapter_mem_state_error(void) {
    return adapter_mem_state_error.c_str();
}

void llama_adapter_mem_state_error_clear(void) {
    adapter_mem_state_error.clear();
}

// what precedes the state of a sequence in RAM [TAG_ADAPTER_MEM_STATE_SEQ]: io_magic of llama-context.cpp, and its id
static const uint32_t ADAPTER_MEM_SEQ_MAGIC  = 0xaf143cd8;
static const size_t   ADAPTER_MEM_SEQ_PREFIX = 8;

uint32_t llama_adapter_mem_block_kind_of(llama_seq_id seq_id, llama_state_seq_flags flags) {
    return flags & LLAMA_STATE_SEQ_FLAGS_ADAPTER_MEM_ONLY ? LLAMA_ADAPTER_MEM_BLOCK_MEMORY : flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY ? LLAMA_ADAPTER_MEM_BLOCK_PARTIAL
            : seq_id < 0                                                                                                                ? LLAMA_ADAPTER_MEM_BLOCK_CONTEXT
                                                                                                                                        : LLAMA_ADAPTER_MEM_BLOCK_SEQ;
}

void llama_adapter_mem_state_check(const llama_context & ctx, const uint8_t * data, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const auto & adapter = ctx.get_model().adapter_mem;
    if (!adapter || size == SIZE_MAX) { // SIZE_MAX: the caller does not say
        return;
    }

    size_t skip = ADAPTER_MEM_SEQ_PREFIX;
    if (seq_id < 0) {
        uint32_t n_arch = 0;
        memcpy(&n_arch, data, std::min(size, sizeof(n_arch)));
        skip = sizeof(n_arch) + (size_t) n_arch;
    }
    if (skip > size) {
        llama_adapter_mem_state_fail("state-truncated", "the state has %zu bytes: it is cut", size);
    }

    llama_adapter_mem_block_check_data(*adapter, data + skip, size - skip, llama_adapter_mem_block_kind_of(seq_id, flags), seq_id < 0 ? ctx.get_cparams().n_seq_max : 1);
}

void llama_adapter_mem_state_check_base(uint32_t first) {
    if (memcmp(&first, "RMVS", sizeof(first)) == 0) {
        llama_adapter_mem_state_fail("state-has-memory", "the state has a memory in it, this model has none: load it with the sidecar that it was saved with");
    }
}

size_t llama_adapter_mem_state_save(
        llama_context &       ctx,
        const char *          path,
        llama_seq_id          seq_id,
        llama_state_seq_flags flags,
        const llama_token *   tokens,
        size_t                n_tokens) {
    std::vector<uint8_t> state(seq_id < 0 ? ctx.state_get_size() : ctx.state_seq_get_size(seq_id, flags));

    const size_t n = seq_id < 0 ? ctx.state_get_data(state.data(), state.size()) : ctx.state_seq_get_data(seq_id, state.data(), state.size(), flags);
    if (n == 0 || n != state.size()) {
        llama_adapter_mem_state_fail("state-unwritable", "there is no state to save in '%s': see the log", path);
    }

    // a file that could not be loaded again must not take the place of one that can
    llama_adapter_mem_state_check(ctx, state.data(), state.size(), seq_id, flags);

    if (seq_id < 0) {
        return llama_adapter_mem_file_write(path, LLAMA_SESSION_MAGIC, LLAMA_SESSION_VERSION, tokens, n_tokens, state);
    }
    state.erase(state.begin(), state.begin() + ADAPTER_MEM_SEQ_PREFIX);
    return llama_adapter_mem_file_write(path, LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION, tokens, n_tokens, state);
}

//
// of a large file, before its body is read: what it is refused for whatever that holds
//

static void adapter_mem_check_begin(
        const llama_adapter_mem & adapter,
        uint32_t                  kind,
        uint32_t                  n_cells,
        const uint8_t *           begin,
        size_t                    n_begin,
        size_t                    n_state,
        size_t                    n_tokens,
        size_t                    n_max_kv) {
    size_t i_block = 0;
    if (kind == LLAMA_ADAPTER_MEM_BLOCK_CONTEXT) {
        uint32_t n_arch = 0;
        memcpy(&n_arch, begin, std::min(n_begin, sizeof(n_arch)));
        i_block = std::min(n_begin, sizeof(n_arch) + (size_t) n_arch);
    }

    llama_adapter_mem_block_header header = {};
    memcpy(&header, begin + i_block, std::min(n_begin - i_block, sizeof(header)));

    const size_t n_before = i_block + sizeof(header);
    llama_adapter_mem_block_check_head(adapter, header, n_state > n_before ? n_state - n_before : 0, kind, n_cells);

    if (kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY && n_tokens > 0) {
        llama_adapter_mem_state_fail("state-shape", "the state is a memory alone, and has %zu tokens", n_tokens);
    }
    if (header.n_bytes_kv > n_max_kv || n_tokens > n_max_kv) {
        llama_adapter_mem_state_fail("state-kv", "the state has %zu tokens and a KV cache of %llu bytes, which is more than this context has",
                n_tokens, (unsigned long long) header.n_bytes_kv);
    }
}

// more than a KV cache of this context has when it is saved: its buffers, and what is noted of each cell in both halves of it
static size_t adapter_mem_max_kv(const llama_context & ctx) {
    const auto & cparams = ctx.get_cparams();

    size_t res = (1u << 20) + 2 * (size_t) cparams.n_ctx * (16 + sizeof(llama_seq_id) * cparams.n_seq_max);
    for (const auto & buf : ctx.get_memory()->memory_breakdown()) {
        res += buf.second;
    }
    return res;
}

static llama_adapter_mem_file adapter_mem_file_read(const llama_context & ctx, const char * path, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const auto check = [&](const uint8_t * begin, size_t n_begin, size_t n_state, size_t n_tokens) {
        adapter_mem_check_begin(*ctx.get_model().adapter_mem, llama_adapter_mem_block_kind_of(seq_id, flags), seq_id < 0 ? ctx.get_cparams().n_seq_max : 1, begin,
                n_begin, n_state, n_tokens, adapter_mem_max_kv(ctx));
    };
    return seq_id < 0 ? llama_adapter_mem_file_read(path, LLAMA_SESSION_MAGIC, LLAMA_SESSION_VERSION, check) : llama_adapter_mem_file_read(path, LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION, check);
}

size_t llama_adapter_mem_state_load(
        llama_context &       ctx,
        const char *          path,
        llama_seq_id          seq_id,
        llama_state_seq_flags flags,
        llama_token *         tokens_out,
        size_t                n_capacity,
        size_t *              n_tokens) {
    auto file = adapter_mem_file_read(ctx, path, seq_id, flags);

    if (n_tokens) {
        *n_tokens = file.tokens.size();
    }
    if (!tokens_out && n_tokens) {
        return file.i_state;
    }
    if (tokens_out && file.tokens.size() > n_capacity) {
        llama_adapter_mem_state_fail("state-kv", "'%s' has %zu tokens, there is room for %zu", path, file.tokens.size(), n_capacity);
    }

    llama_adapter_mem_state_set(ctx, file, seq_id, flags);

    if (tokens_out) {
        std::copy(file.tokens.begin(), file.tokens.end(), tokens_out);
    }
    return file.data.size();
}

// a sequence is refused for what it is
static void adapter_mem_file_check_tokens(const llama_adapter_mem_file & file) {
    llama_adapter_mem_block_header header = {};
    memcpy(&header, file.data.data() + file.i_state, std::min(file.n_state, sizeof(header)));
    if (header.kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY && !file.tokens.empty()) {
        llama_adapter_mem_state_fail("state-shape", "the state is a memory alone, and has %zu tokens", file.tokens.size());
    }
}

void llama_adapter_mem_state_set(llama_context & ctx, llama_adapter_mem_file & file, llama_seq_id seq_id, llama_state_seq_flags flags) {
    adapter_mem_file_check_tokens(file);

    uint8_t * data = file.data.data() + file.i_state;
    size_t    size = file.n_state;
    size_t    n;
    if (seq_id < 0) {
        n = ctx.state_set_data(data, size);
    } else {
        // the tokens, or the file's header, are in front of it: there is room
        data -= ADAPTER_MEM_SEQ_PREFIX;
        size += ADAPTER_MEM_SEQ_PREFIX;
        memcpy(data, &ADAPTER_MEM_SEQ_MAGIC, sizeof(ADAPTER_MEM_SEQ_MAGIC));
        memcpy(data + sizeof(ADAPTER_MEM_SEQ_MAGIC), &seq_id, sizeof(seq_id));

        n = ctx.state_seq_set_data(seq_id, data, size, flags);
    }
    if (n == 0) {
        throw std::runtime_error(llama_adapter_mem_state_error());
    }
}

//
// interface
//

// the value of a call that fails with a reason; def on failure
template <typename T>
static T adapter_mem_try(const char * func, T def, const std::function<T()> & call) {
    llama_adapter_mem_state_error_clear();
    try {
        return call();
    } catch (const std::exception & e) {
        if (adapter_mem_state_error.empty()) {
            adapter_mem_state_error = e.what();
        }
        LLAMA_LOG_ERROR("%s: %s\n", func, e.what());
        return def;
    }
}

size_t llama_adapter_mem_state_save_file(llama_context * ctx, const char * path, llama_seq_id seq_id) {
    ctx->synchronize();
    return adapter_mem_try<size_t>(__func__, 0, [&]() {
        return llama_adapter_mem_state_save(*ctx, path, seq_id, LLAMA_STATE_SEQ_FLAGS_ADAPTER_MEM_ONLY, nullptr, 0);
    });
}

size_t llama_adapter_mem_state_load_file(llama_context * ctx, const char * path, llama_seq_id seq_id) {
    ctx->synchronize();
    return adapter_mem_try<size_t>(__func__, 0, [&]() {
        return llama_adapter_mem_state_load(*ctx, path, seq_id, LLAMA_STATE_SEQ_FLAGS_ADAPTER_MEM_ONLY, nullptr, 0, nullptr);
    });
}

size_t llama_adapter_mem_seq_load_file(
        llama_context *                ctx,
        const char *                   path,
        llama_seq_id                   seq_id,
        llama_adapter_mem_check_tokens check,
        void *                         user_data) {
    ctx->synchronize();
    return adapter_mem_try<size_t>(__func__, 0, [&]() {
        auto file = adapter_mem_file_read(*ctx, path, seq_id, 0);
        // what is wrong with the block is said first, as everywhere
        llama_adapter_mem_block_check_data(*ctx->get_model().adapter_mem, file.data.data() + file.i_state, file.n_state, LLAMA_ADAPTER_MEM_BLOCK_SEQ, 1);
        if (!check(file.tokens.data(), file.tokens.size(), user_data)) {
            llama_adapter_mem_state_fail("state-kv", "'%s' has tokens that this sequence cannot have", path);
        }
        llama_adapter_mem_state_set(*ctx, file, seq_id, 0);
        return file.data.size();
    });
}

//
// a memory by its values
//

void llama_adapter_mem_hash(const void * data, size_t size, char * hex) {
    snprintf(hex, 65, "%s", llama_adapter_mem_sha256::hex(llama_adapter_mem_sha256::hash(data, size)).c_str());
}

static std::vector<uint8_t> adapter_mem_pack(const llama_model * model, const float * values) {
    const std::vector<float> cells(values, values + llama_model_adapter_mem_n_values(model));

    const std::string what = llama_adapter_mem_cell_check(*model->adapter_mem, values);
    if (!what.empty()) {
        llama_adapter_mem_state_fail("state-values", "%s", what.c_str());
    }
    return llama_adapter_mem_block_write(*model->adapter_mem, LLAMA_ADAPTER_MEM_BLOCK_MEMORY, cells, {}, {}, 0);
}

static size_t adapter_mem_unpack(const llama_model * model, const llama_adapter_mem_file & file, float * values) {
    adapter_mem_file_check_tokens(file);

    const uint8_t * data = file.data.data() + file.i_state;
    llama_adapter_mem_block_check_data(*model->adapter_mem, data, file.n_state, LLAMA_ADAPTER_MEM_BLOCK_MEMORY, 1);
    memcpy(values, data + sizeof(llama_adapter_mem_block_header), llama_model_adapter_mem_n_values(model) * sizeof(float));
    return file.data.size();
}

size_t llama_model_adapter_mem_n_values(const llama_model * model) {
    return model->adapter_mem ? model->adapter_mem->layers.size() * ggml_rwkv_ms_n_cell(&model->adapter_mem->core.params) : 0;
}

int64_t llama_model_adapter_mem_get_state(const llama_model * model, const float * values, uint32_t i, float * S, float * prev) {
    if (!model->adapter_mem || i >= model->adapter_mem->layers.size()) {
        return -1;
    }
    const auto & params = model->adapter_mem->core.params;
    return ggml_rwkv_ms_cell_get(&params, values + i * ggml_rwkv_ms_n_cell(&params), S, prev);
}

bool llama_model_adapter_mem_check(const llama_model * model, const float * values) {
    return model->adapter_mem && llama_adapter_mem_cell_check(*model->adapter_mem, values).empty();
}

size_t llama_model_adapter_mem_write(const llama_model * model, const float * values, uint8_t * data, size_t size) {
    return adapter_mem_try<size_t>(__func__, 0, [&]() {
        const auto bytes = llama_adapter_mem_file_pack(LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION, nullptr, 0, adapter_mem_pack(model, values));
        if (data) {
            GGML_ASSERT(size >= bytes.size());
            memcpy(data, bytes.data(), bytes.size());
        }
        return bytes.size();
    });
}

bool llama_model_adapter_mem_read(const llama_model * model, const uint8_t * data, size_t size, float * values) {
    return adapter_mem_try<size_t>(__func__, 0, [&]() {
        return adapter_mem_unpack(model, llama_adapter_mem_file_parse({ data, data + size }, "the memory", LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION), values);
    }) > 0;
}

size_t llama_model_adapter_mem_save_file(const llama_model * model, const float * values, const char * path) {
    return adapter_mem_try<size_t>(__func__, 0, [&]() {
        return llama_adapter_mem_file_write(path, LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION, nullptr, 0, adapter_mem_pack(model, values));
    });
}

size_t llama_model_adapter_mem_load_file(const llama_model * model, const char * path, float * values) {
    return adapter_mem_try<size_t>(__func__, 0, [&]() {
        const auto check = [&](const uint8_t * begin, size_t n_begin, size_t n_state, size_t n_tokens) {
            adapter_mem_check_begin(*model->adapter_mem, LLAMA_ADAPTER_MEM_BLOCK_MEMORY, 1, begin, n_begin, n_state, n_tokens, 0);
        };
        return adapter_mem_unpack(model, llama_adapter_mem_file_read(path, LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION, check), values);
    });
}
