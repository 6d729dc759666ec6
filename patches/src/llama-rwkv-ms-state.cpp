#include "llama-rwkv-ms-state.h"

#include "llama-context.h"
#include "llama-model.h"
#include "llama-rwkv-ms-sha256.h"

#include "ggml-rwkv-ms.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#include <windows.h>
#else
#include <fcntl.h>
#include <unistd.h>
#endif

static const uint32_t RWKV_MS_BLOCK_VERSION   = 1;
static const uint32_t RWKV_MS_TRAILER_VERSION = 1;

// what ends a file
struct rwkv_ms_trailer {
    char     magic[4]; // RMVE
    uint32_t version;
    uint64_t n_bytes; // before the trailer
    uint8_t  hash[32];
};

static_assert(sizeof(rwkv_ms_trailer) == 48, "the layout is documented");

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

//
// the block
//

static void rwkv_ms_from_hex(uint8_t (&dst)[32], const char * hex) {
    for (size_t i = 0; i < sizeof(dst); ++i) {
        dst[i] = (uint8_t) std::stoi(std::string(hex + 2 * i, 2), nullptr, 16);
    }
}

static std::string rwkv_ms_to_hex(const uint8_t (&src)[32]) {
    llama_rwkv_ms_sha256::digest digest;
    memcpy(digest.data(), src, sizeof(src));
    return llama_rwkv_ms_sha256::hex(digest);
}

static llama_rwkv_ms_block_header rwkv_ms_block_header_init(const llama_rwkv_ms & weights) {
    llama_rwkv_ms_block_header res = {};

    memcpy(res.magic, "RMVS", sizeof(res.magic));

    res.version   = RWKV_MS_BLOCK_VERSION;
    res.n_header  = sizeof(res);
    res.n_layer   = weights.info.n_layer;
    res.n_head    = weights.info.n_head;
    res.n_state   = weights.info.n_state;
    res.rank      = weights.info.rank;
    res.n_chunk   = weights.info.n_chunk;
    res.semantics = weights.info.semantics;
    res.n_cell    = ggml_rwkv_ms_n_cell(&weights.params);

    rwkv_ms_from_hex(res.fingerprint, weights.info.fingerprint);
    rwkv_ms_from_hex(res.sidecar, weights.info.sidecar_sha256);
    rwkv_ms_from_hex(res.base, weights.info.base_sha256);

    return res;
}

static llama_rwkv_ms_sha256::digest rwkv_ms_block_hash(llama_rwkv_ms_block_header header, const void * cells, size_t size) {
    memset(header.checksum, 0, sizeof(header.checksum));

    llama_rwkv_ms_sha256 hash;
    hash.update(&header, sizeof(header));
    hash.update(cells, size);
    return hash.final();
}

uint64_t llama_rwkv_ms_block_n_cells(const llama_rwkv_ms_block_header & header) {
    return (uint64_t) header.n_cells * (header.flags & LLAMA_RWKV_MS_BLOCK_ORIGIN ? 2 : 1);
}

std::vector<uint8_t> llama_rwkv_ms_block_write(
        const llama_rwkv_ms &      weights,
        uint32_t                   kind,
        const std::vector<float> & cells,
        const std::vector<float> & origins,
        uint64_t                   n_bytes_kv) {
    GGML_ASSERT(origins.empty() || origins.size() == cells.size());

    auto header = rwkv_ms_block_header_init(weights);

    header.kind       = kind;
    header.n_cells    = cells.size() / ((size_t) header.n_layer * header.n_cell);
    header.n_bytes_kv = n_bytes_kv;
    header.flags      = origins.empty() ? 0 : LLAMA_RWKV_MS_BLOCK_ORIGIN;

    std::vector<float> all = cells;
    all.insert(all.end(), origins.begin(), origins.end());

    const auto digest = rwkv_ms_block_hash(header, all.data(), all.size() * sizeof(float));
    memcpy(header.checksum, digest.data(), sizeof(header.checksum));

    std::vector<uint8_t> res(sizeof(header) + all.size() * sizeof(float));
    memcpy(res.data(), &header, sizeof(header));
    memcpy(res.data() + sizeof(header), all.data(), all.size() * sizeof(float));
    return res;
}

static const char * rwkv_ms_kind_name(uint32_t kind) {
    static const char * const names[] = { "one sequence", "a whole context", "a checkpoint", "a memory alone" };

    return kind >= 1 && kind <= 4 ? names[kind - 1] : "an unknown kind of state";
}

static void rwkv_ms_block_check_version(const llama_rwkv_ms_block_header & header) {
    if (memcmp(header.magic, "RMVS", sizeof(header.magic)) != 0) {
        llama_rwkv_ms_state_fail("state-no-memory", "the state has no memory in it: it was saved without a sidecar");
    }
    if (header.version != RWKV_MS_BLOCK_VERSION || header.n_header != sizeof(header)) {
        llama_rwkv_ms_state_fail("state-version", "the memory has version %u, this build reads %u: load it with the build that saved it",
                header.version, RWKV_MS_BLOCK_VERSION);
    }
}

// a text and then zeros; none unless a tool made the state
static bool rwkv_ms_note_check(const llama_rwkv_ms_block_header & header) {
    const std::string note(header.note, sizeof(header.note));
    const size_t      n = header.flags & LLAMA_RWKV_MS_BLOCK_DERIVED ? std::min(note.find('\0'), note.size()) : 0;

    return note.find_first_not_of('\0', n) == std::string::npos;
}

void llama_rwkv_ms_block_check(const llama_rwkv_ms & weights, const llama_rwkv_ms_block_header & header, uint32_t kind, uint32_t n_cells) {
    rwkv_ms_block_check_version(header);

    const auto expected = rwkv_ms_block_header_init(weights);

    if (memcmp(header.fingerprint, expected.fingerprint, sizeof(header.fingerprint)) != 0 ||
            memcmp(header.sidecar, expected.sidecar, sizeof(header.sidecar)) != 0 ||
            memcmp(header.base, expected.base, sizeof(header.base)) != 0) {
        llama_rwkv_ms_state_fail("state-identity", "the state belongs to sidecar %s and base %s, this model has sidecar %s and base %s",
                rwkv_ms_to_hex(header.sidecar).c_str(), rwkv_ms_to_hex(header.base).c_str(), weights.info.sidecar_sha256, weights.info.base_sha256);
    }
    if (header.kind != kind) {
        llama_rwkv_ms_state_fail("state-kind", "the state is that of %s, expected %s", rwkv_ms_kind_name(header.kind), rwkv_ms_kind_name(kind));
    }
    if (header.n_cells != n_cells) {
        llama_rwkv_ms_state_fail("state-shape", "the state has %u sequences, expected %u", header.n_cells, n_cells);
    }

    const uint32_t flags = LLAMA_RWKV_MS_BLOCK_DERIVED | (kind == LLAMA_RWKV_MS_BLOCK_MEMORY ? 0 : LLAMA_RWKV_MS_BLOCK_ORIGIN);

    if (header.n_layer != expected.n_layer || header.n_head != expected.n_head || header.n_state != expected.n_state || header.rank != expected.rank ||
            header.n_chunk != expected.n_chunk || header.semantics != expected.semantics || header.n_cell != expected.n_cell ||
            header.zero != 0 || (header.flags & ~flags) != 0 || (kind == LLAMA_RWKV_MS_BLOCK_MEMORY && header.n_bytes_kv != 0) ||
            !rwkv_ms_note_check(header)) {
        llama_rwkv_ms_state_fail("state-shape", "the state has %u layers of %u values, this model %u of %u, or their parts differ",
                header.n_layer, header.n_cell, expected.n_layer, expected.n_cell);
    }
}

void llama_rwkv_ms_block_check_cells(const llama_rwkv_ms & weights, const llama_rwkv_ms_block_header & header, const std::vector<float> & cells) {
    const auto digest = rwkv_ms_block_hash(header, cells.data(), cells.size() * sizeof(float));

    if (memcmp(digest.data(), header.checksum, sizeof(header.checksum)) != 0) {
        llama_rwkv_ms_state_fail("state-checksum", "the memory does not have its checksum: the state is damaged");
    }

    const size_t n_cell = (size_t) header.n_layer * header.n_cell;
    for (size_t i = 0; i < cells.size(); i += n_cell) {
        const std::string what = llama_rwkv_ms_cell_check(weights, cells.data() + i);
        if (!what.empty()) {
            llama_rwkv_ms_state_fail("state-values", "%s", what.c_str());
        }
    }
}

std::string llama_rwkv_ms_cell_check(const llama_rwkv_ms & weights, const float * cell) {
    const int64_t n_cell   = ggml_rwkv_ms_n_cell(&weights.params);
    const float   n_period = (float) weights.params.n_state * weights.params.n_chunk;

    for (const auto & layer : weights.layers) {
        for (int64_t j = 0; j < n_cell; ++j) {
            if (!std::isfinite(cell[j])) {
                return format("layer %d: value %lld is not finite", layer.il, (long long) j);
            }
        }

        const float n_lo = cell[n_cell - 2];
        const float n_hi = cell[n_cell - 1];

        if (n_lo < 0 || n_lo >= n_period || n_lo != std::floor(n_lo) || n_hi < 0 || n_hi > (1 << 24) || n_hi != std::floor(n_hi)) {
            return format("layer %d: the token counter is out of range", layer.il);
        }
        cell += n_cell;
    }
    return "";
}

static void rwkv_ms_state_check(const llama_rwkv_ms & weights, const uint8_t * data, size_t size, uint32_t kind, uint32_t n_cells) {
    llama_rwkv_ms_block_header header = {};

    memcpy(&header, data, std::min(size, sizeof(header)));

    rwkv_ms_block_check_version(header);

    // no overflow: the factors have 32 bits, and each product is compared before the next
    const uint64_t rest     = size < sizeof(header) ? 0 : size - sizeof(header);
    const uint64_t n_floats = (uint64_t) header.n_layer * header.n_cell;
    const uint64_t n_all    = llama_rwkv_ms_block_n_cells(header);

    if (size < sizeof(header) || n_floats > rest || n_all > rest || n_floats * n_all > rest / sizeof(float) ||
            header.n_bytes_kv != rest - n_floats * n_all * sizeof(float)) {
        llama_rwkv_ms_state_fail("state-truncated", "the state has %zu bytes, its header says another number: it is cut, or something was added", size);
    }

    const auto digest = rwkv_ms_block_hash(header, data + sizeof(header), n_floats * n_all * sizeof(float));
    if (memcmp(digest.data(), header.checksum, sizeof(header.checksum)) != 0) {
        llama_rwkv_ms_state_fail("state-checksum", "the memory does not have its checksum: the state is damaged");
    }

    llama_rwkv_ms_block_check(weights, header, kind, n_cells);

    std::vector<float> cells(n_floats * n_all);
    memcpy(cells.data(), data + sizeof(header), cells.size() * sizeof(float));

    llama_rwkv_ms_block_check_cells(weights, header, cells);
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

    rwkv_ms_state_check(*weights, data + skip, size - skip, llama_rwkv_ms_block_kind_of(seq_id, flags), seq_id < 0 ? ctx.get_cparams().n_seq_max : 1);
}

void llama_rwkv_ms_state_check_base(uint32_t first) {
    if (memcmp(&first, "RMVS", sizeof(first)) == 0) {
        llama_rwkv_ms_state_fail("state-has-memory", "the state has a memory in it, this model has none: load it with the sidecar that it was saved with");
    }
}

//
// files
//

struct rwkv_ms_file_closer {
    void operator()(FILE * file) { fclose(file); }
};

typedef std::unique_ptr<FILE, rwkv_ms_file_closer> rwkv_ms_file_ptr;

static bool rwkv_ms_file_sync(FILE * file) {
    if (fflush(file) != 0) {
        return false;
    }
#if defined(_WIN32)
    return _commit(_fileno(file)) == 0;
#else
    return fsync(fileno(file)) == 0;
#endif
}

static bool rwkv_ms_file_replace(const std::string & from, const std::string & to) {
#if defined(_WIN32)
    return MoveFileExA(from.c_str(), to.c_str(), MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) != 0;
#else
    if (rename(from.c_str(), to.c_str()) != 0) {
        return false;
    }
    // the new name has to reach the disk too
    const size_t      slash = to.find_last_of('/');
    const std::string dir   = slash == std::string::npos ? "." : to.substr(0, slash + 1);

    const int fd = open(dir.c_str(), O_RDONLY);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    return true;
#endif
}

size_t llama_rwkv_ms_file_write(
        const std::string &          path,
        uint32_t                     magic,
        uint32_t                     version,
        const llama_token *          tokens,
        size_t                       n_tokens,
        const std::vector<uint8_t> & state) {
    const uint32_t head[3] = { magic, version, (uint32_t) n_tokens };

    rwkv_ms_trailer trailer = {};
    memcpy(trailer.magic, "RMVE", sizeof(trailer.magic));
    trailer.version = RWKV_MS_TRAILER_VERSION;
    trailer.n_bytes = sizeof(head) + n_tokens * sizeof(llama_token) + state.size();

    llama_rwkv_ms_sha256 hash;
    hash.update(head, sizeof(head));
    hash.update(tokens, n_tokens * sizeof(llama_token));
    hash.update(state.data(), state.size());

    const auto digest = hash.final();
    memcpy(trailer.hash, digest.data(), sizeof(trailer.hash));

#if defined(_WIN32)
    const std::string part = path + "." + std::to_string(_getpid()) + ".part";
#else
    const std::string part = path + "." + std::to_string(getpid()) + ".part";
#endif

    rwkv_ms_file_ptr file(ggml_fopen(part.c_str(), "wb"));

    const auto write = [&](const void * data, size_t size) {
        return size == 0 || fwrite(data, 1, size, file.get()) == size;
    };

    const bool ok = file && write(head, sizeof(head)) && write(tokens, n_tokens * sizeof(llama_token)) &&
            write(state.data(), state.size()) && write(&trailer, sizeof(trailer)) && rwkv_ms_file_sync(file.get());

    const int err = errno;
    file.reset();

    if (!ok || !rwkv_ms_file_replace(part, path)) {
        const std::string what = strerror(ok ? errno : err);
        remove(part.c_str());
        llama_rwkv_ms_state_fail("state-unwritable", "'%s' cannot be written: %s", path.c_str(), what.c_str());
    }
    return trailer.n_bytes + sizeof(trailer);
}

static std::vector<uint8_t> rwkv_ms_file_load(const std::string & path) {
    rwkv_ms_file_ptr file(ggml_fopen(path.c_str(), "rb"));
    if (!file) {
        llama_rwkv_ms_state_fail("state-unreadable", "'%s' cannot be opened: %s", path.c_str(), strerror(errno));
    }
    std::vector<uint8_t> res;
    std::vector<uint8_t> buf(4u << 20);
    size_t               n;
    while ((n = fread(buf.data(), 1, buf.size(), file.get())) > 0) {
        res.insert(res.end(), buf.begin(), buf.begin() + n);
    }
    if (ferror(file.get())) {
        llama_rwkv_ms_state_fail("state-unreadable", "'%s' cannot be read: %s", path.c_str(), strerror(errno));
    }
    return res;
}

llama_rwkv_ms_file llama_rwkv_ms_file_read(const std::string & path, uint32_t magic, uint32_t version) {
    llama_rwkv_ms_file res;

    res.data = rwkv_ms_file_load(path);

    uint32_t head[3] = {};
    memcpy(head, res.data.data(), std::min(res.data.size(), sizeof(head)));

    if (res.data.size() >= 8 && (head[0] != magic || head[1] != version)) {
        llama_rwkv_ms_state_fail("state-format", "'%s' is not a state file of this kind: it begins with %08x %u, expected %08x %u",
                path.c_str(), head[0], head[1], magic, version);
    }
    if (res.data.size() < sizeof(head) || head[2] > (res.data.size() - sizeof(head)) / sizeof(llama_token)) {
        llama_rwkv_ms_state_fail("state-truncated", "'%s' ends within its tokens: save it again", path.c_str());
    }

    res.i_state = sizeof(head) + head[2] * sizeof(llama_token);
    res.tokens.resize(head[2]);
    memcpy(res.tokens.data(), res.data.data() + sizeof(head), head[2] * sizeof(llama_token));

    rwkv_ms_trailer trailer = {};
    if (res.data.size() >= res.i_state + sizeof(trailer)) {
        memcpy(&trailer, res.data.data() + res.data.size() - sizeof(trailer), sizeof(trailer));
    }
    if (memcmp(trailer.magic, "RMVE", sizeof(trailer.magic)) != 0) {
        // one that was saved without a memory has no trailer; in that of a whole context the architecture comes first
        const std::string text(res.data.begin() + res.i_state, res.data.begin() + std::min(res.data.size(), res.i_state + 64));
        if (text.size() == 64 && text.find("RMVS") == std::string::npos) {
            llama_rwkv_ms_state_fail("state-no-memory", "'%s' has no memory in it: it was saved without a sidecar", path.c_str());
        }
        llama_rwkv_ms_state_fail("state-truncated", "'%s' does not end with its trailer: it is cut, or something was added", path.c_str());
    }
    if (trailer.version != RWKV_MS_TRAILER_VERSION) {
        llama_rwkv_ms_state_fail("state-version", "'%s' has a trailer of version %u, this build reads %u", path.c_str(), trailer.version,
                RWKV_MS_TRAILER_VERSION);
    }
    if (trailer.n_bytes != res.data.size() - sizeof(trailer)) {
        llama_rwkv_ms_state_fail("state-truncated", "'%s' has %zu bytes before its trailer, which says %llu", path.c_str(),
                res.data.size() - sizeof(trailer), (unsigned long long) trailer.n_bytes);
    }

    const auto digest = llama_rwkv_ms_sha256::hash(res.data.data(), trailer.n_bytes);
    if (memcmp(digest.data(), trailer.hash, sizeof(trailer.hash)) != 0) {
        llama_rwkv_ms_state_fail("state-checksum", "'%s' does not have its checksum: the file is damaged", path.c_str());
    }

    res.n_state = trailer.n_bytes - res.i_state;
    return res;
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

size_t llama_rwkv_ms_state_load(
        llama_context &       ctx,
        const char *          path,
        llama_seq_id          seq_id,
        llama_state_seq_flags flags,
        llama_token *         tokens_out,
        size_t                n_capacity,
        size_t *              n_tokens) {
    auto file = seq_id < 0 ? llama_rwkv_ms_file_read(path, LLAMA_SESSION_MAGIC, LLAMA_SESSION_VERSION) : llama_rwkv_ms_file_read(path, LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION);

    if (n_tokens) {
        *n_tokens = file.tokens.size();
    }
    if (!tokens_out && n_tokens) {
        return file.i_state;
    }
    if (tokens_out && file.tokens.size() > n_capacity) {
        llama_rwkv_ms_state_fail("state-kv", "'%s' has %zu tokens, there is room for %zu", path, file.tokens.size(), n_capacity);
    }

    // a sequence is refused for what it is
    llama_rwkv_ms_block_header header = {};
    memcpy(&header, file.data.data() + file.i_state, std::min(file.n_state, sizeof(header)));
    if (header.kind == LLAMA_RWKV_MS_BLOCK_MEMORY && !file.tokens.empty()) {
        llama_rwkv_ms_state_fail("state-shape", "'%s' is a memory alone, and has %zu tokens", path, file.tokens.size());
    }

    uint8_t * data = file.data.data() + file.i_state;
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
        std::copy(file.tokens.begin(), file.tokens.end(), tokens_out);
    }
    return file.data.size();
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
