#include "llama-rwkv-ms-state.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>

static thread_local std::string rwkv_ms_state_error;

void llama_rwkv_ms_state_fail(const char * reason, const char * format, ...) {
    char buf[1024];

    const int n = snprintf(buf, sizeof(buf), "[%s] ", reason);

    va_list args;
    va_start(args, format);
    vsnprintf(buf + n, sizeof(buf) - n, format, args);
    va_end(args);

    rwkv_ms_state_error = buf;

    throw std::runtime_error(buf);
}

const char * llama_rwkv_ms_state_error(void) {
    return rwkv_ms_state_error.c_str();
}

void llama_rwkv_ms_state_error_clear(void) {
    rwkv_ms_state_error.clear();
}

// what precedes the state of a sequence in RAM [TAG_RWKV_MS_STATE_SEQ]: io_magic of llama-context.cpp, and its id
static const uint32_t RWKV_MS_SEQ_MAGIC  = 0xaf143cd8;
static const size_t   RWKV_MS_SEQ_PREFIX = 8;

uint32_t llama_rwkv_ms_block_kind_of(llama_seq_id seq_id, llama_state_seq_flags flags) {
    return flags & LLAMA_STATE_SEQ_FLAGS_RWKV_MS_ONLY ? LLAMA_RWKV_MS_BLOCK_MEMORY : flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY ? LLAMA_RWKV_MS_BLOCK_PARTIAL
            : seq_id < 0                                                                                                        ? LLAMA_RWKV_MS_BLOCK_CONTEXT
                                                                                                                                : LLAMA_RWKV_MS_BLOCK_SEQ;
}

void llama_rwkv_ms_state_check(const llama_context & ctx, const uint8_t * data, size_t size, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const auto & weights = ctx.get_model().rwkv_ms;
    if (!weights || size == SIZE_MAX) { // SIZE_MAX: the caller does not say
        return;
    }

    size_t skip = RWKV_MS_SEQ_PREFIX;
    if (seq_id < 0) {
        uint32_t n_arch = 0;
        memcpy(&n_arch, data, std::min(size, sizeof(n_arch)));
        skip = sizeof(n_arch) + (size_t) n_arch;
    }
    if (skip > size) {
        llama_rwkv_ms_state_fail("state-truncated", "the state has %zu bytes: it is cut", size);
    }

    llama_rwkv_ms_block_check_data(*weights, data + skip, size - skip, llama_rwkv_ms_block_kind_of(seq_id, flags), seq_id < 0 ? ctx.get_cparams().n_seq_max : 1);
}

void llama_rwkv_ms_state_check_base(uint32_t first) {
    if (memcmp(&first, "RMVS", sizeof(first)) == 0) {
        llama_rwkv_ms_state_fail("state-has-memory", "the state has a memory in it, this model has none: load it with the sidecar that it was saved with");
    }
}

size_t llama_rwkv_ms_state_save(
        llama_context &       ctx,
        const char *          path,
        llama_seq_id          seq_id,
        llama_state_seq_flags flags,
        const llama_token *   tokens,
        size_t                n_tokens) {
    std::vector<uint8_t> state(seq_id < 0 ? ctx.state_get_size() : ctx.state_seq_get_size(seq_id, flags));

    const size_t n = seq_id < 0 ? ctx.state_get_data(state.data(), state.size()) : ctx.state_seq_get_data(seq_id, state.data(), state.size(), flags);
    if (n == 0 || n != state.size()) {
        llama_rwkv_ms_state_fail("state-unwritable", "there is no state to save in '%s': see the log", path);
    }

    if (seq_id < 0) {
        return llama_rwkv_ms_file_write(path, LLAMA_SESSION_MAGIC, LLAMA_SESSION_VERSION, tokens, n_tokens, state);
    }
    state.erase(state.begin(), state.begin() + RWKV_MS_SEQ_PREFIX);
    return llama_rwkv_ms_file_write(path, LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION, tokens, n_tokens, state);
}

//
// loading
//

static const size_t RWKV_MS_LARGE_FILE = 64u << 20; // bytes

// more than a KV cache of this context has when it is saved: its buffers, and what is noted of each cell in both halves of it
static size_t rwkv_ms_state_max_kv(const llama_context & ctx) {
    const auto & cparams = ctx.get_cparams();

    size_t res = (1u << 20) + 2 * (size_t) cparams.n_ctx * (16 + sizeof(llama_seq_id) * cparams.n_seq_max);
    for (const auto & buf : ctx.get_memory()->memory_breakdown()) {
        res += buf.second;
    }
    return res;
}

// Of a large file, before its body is read: what it is refused for whatever that holds.
static void rwkv_ms_state_check_head(const llama_context & ctx, const llama_rwkv_ms_file & file, llama_seq_id seq_id, llama_state_seq_flags flags) {
    size_t i_block = 0;
    if (seq_id < 0) {
        uint32_t n_arch = 0;
        file.read_at(file.i_state, &n_arch, std::min(file.n_state, sizeof(n_arch)));
        i_block = sizeof(n_arch) + (size_t) n_arch;
    }

    const auto   header   = file.header(i_block);
    const size_t n_before = i_block + sizeof(header);

    llama_rwkv_ms_block_check_head(*ctx.get_model().rwkv_ms, header, file.n_state > n_before ? file.n_state - n_before : 0,
            llama_rwkv_ms_block_kind_of(seq_id, flags), seq_id < 0 ? ctx.get_cparams().n_seq_max : 1);

    if (header.n_bytes_kv > rwkv_ms_state_max_kv(ctx)) {
        llama_rwkv_ms_state_fail("state-kv", "%s has a KV cache of %llu bytes, which is more than this context has", file.name.c_str(),
                (unsigned long long) header.n_bytes_kv);
    }
}

static void rwkv_ms_state_check_tokens(const llama_rwkv_ms_file & file, uint32_t kind, size_t n_capacity) {
    if (file.n_tokens > n_capacity) {
        llama_rwkv_ms_state_fail("state-kv", "%s has %zu tokens, there is room for %zu", file.name.c_str(), file.n_tokens, n_capacity);
    }
    // a sequence is refused for what it is
    if (kind == LLAMA_RWKV_MS_BLOCK_MEMORY && file.n_tokens > 0) {
        llama_rwkv_ms_state_fail("state-shape", "%s is a memory alone, and has %zu tokens", file.name.c_str(), file.n_tokens);
    }
}

size_t llama_rwkv_ms_state_load(
        llama_context &       ctx,
        const char *          path,
        llama_seq_id          seq_id,
        llama_state_seq_flags flags,
        llama_token *         tokens_out,
        size_t                n_capacity,
        size_t *              n_tokens) {
    const llama_rwkv_ms_file file(path, seq_id < 0 ? LLAMA_SESSION_MAGIC : LLAMA_STATE_SEQ_MAGIC, seq_id < 0 ? LLAMA_SESSION_VERSION : LLAMA_STATE_SEQ_VERSION);

    const size_t n_room = tokens_out ? n_capacity : SIZE_MAX;

    if (file.size > RWKV_MS_LARGE_FILE) {
        rwkv_ms_state_check_head(ctx, file, seq_id, flags);
        rwkv_ms_state_check_tokens(file, llama_rwkv_ms_block_kind_of(seq_id, flags), n_room);
    }
    std::vector<uint8_t> bytes = file.read();

    if (n_tokens) {
        *n_tokens = file.n_tokens;
    }
    if (!tokens_out && n_tokens) {
        return file.i_state;
    }

    llama_rwkv_ms_block_header header = {};
    memcpy(&header, bytes.data() + file.i_state, std::min(file.n_state, sizeof(header)));
    rwkv_ms_state_check_tokens(file, header.kind, n_room);

    std::vector<llama_token> tokens(file.n_tokens);
    memcpy(tokens.data(), bytes.data() + file.i_state - tokens.size() * sizeof(llama_token), tokens.size() * sizeof(llama_token));

    uint8_t * data = bytes.data() + file.i_state;
    size_t    size = file.n_state;
    size_t    n;
    if (seq_id < 0) {
        n = ctx.state_set_data(data, size);
    } else {
        // the tokens, or the file's header, are in front of it: there is room
        data -= RWKV_MS_SEQ_PREFIX;
        size += RWKV_MS_SEQ_PREFIX;
        memcpy(data, &RWKV_MS_SEQ_MAGIC, sizeof(RWKV_MS_SEQ_MAGIC));
        memcpy(data + sizeof(RWKV_MS_SEQ_MAGIC), &seq_id, sizeof(seq_id));

        n = ctx.state_seq_set_data(seq_id, data, size, flags);
    }
    if (n == 0) {
        throw std::runtime_error(llama_rwkv_ms_state_error());
    }

    if (tokens_out) {
        std::copy(tokens.begin(), tokens.end(), tokens_out);
    }
    return file.size;
}

//
// interface
//

size_t llama_rwkv_ms_state_save_file(llama_context * ctx, const char * path, llama_seq_id seq_id) {
    ctx->synchronize();
    try {
        return llama_rwkv_ms_state_save(*ctx, path, seq_id, LLAMA_STATE_SEQ_FLAGS_RWKV_MS_ONLY, nullptr, 0);
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return 0;
    }
}

size_t llama_rwkv_ms_state_load_file(llama_context * ctx, const char * path, llama_seq_id seq_id) {
    ctx->synchronize();
    try {
        return llama_rwkv_ms_state_load(*ctx, path, seq_id, LLAMA_STATE_SEQ_FLAGS_RWKV_MS_ONLY, nullptr, 0, nullptr);
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return 0;
    }
}
