#include "llama-rwkv-ms-state.h"

#include "llama-rwkv-ms-fs.h"
#include "llama-rwkv-ms-sha256.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

static const uint32_t RWKV_MS_TRAILER_VERSION = 1;

// what ends a file
struct rwkv_ms_trailer {
    char     magic[4]; // RMVE
    uint32_t version;
    uint64_t n_bytes; // before the trailer
    uint8_t  hash[32];
};

static_assert(sizeof(rwkv_ms_trailer) == 48, "the layout is documented");

// llama.cpp's head of a file
struct rwkv_ms_head {
    uint32_t magic;
    uint32_t version;
    uint32_t n_tokens;
};

size_t llama_rwkv_ms_file_write(
        const std::string &          path,
        uint32_t                     magic,
        uint32_t                     version,
        const llama_token *          tokens,
        size_t                       n_tokens,
        const std::vector<uint8_t> & state) {
    const rwkv_ms_head head = { magic, version, (uint32_t) n_tokens };

    rwkv_ms_trailer trailer = {};
    memcpy(trailer.magic, "RMVE", sizeof(trailer.magic));
    trailer.version = RWKV_MS_TRAILER_VERSION;
    trailer.n_bytes = sizeof(head) + n_tokens * sizeof(llama_token) + state.size();

    llama_rwkv_ms_sha256 hash;
    hash.update(&head, sizeof(head));
    hash.update(tokens, n_tokens * sizeof(llama_token));
    hash.update(state.data(), state.size());

    const auto digest = hash.final();
    memcpy(trailer.hash, digest.data(), sizeof(trailer.hash));

    const std::string err = llama_rwkv_ms_fs_write(path, {
                                                                 { &head, sizeof(head) },
                                                                 { tokens, n_tokens * sizeof(llama_token) },
                                                                 { state.data(), state.size() },
                                                                 { &trailer, sizeof(trailer) },
                                                         });
    if (!err.empty()) {
        llama_rwkv_ms_state_fail("state-unwritable", "'%s' cannot be written: %s", path.c_str(), err.c_str());
    }
    return trailer.n_bytes + sizeof(trailer);
}

//
// reading
//

llama_rwkv_ms_file::llama_rwkv_ms_file(const std::string & path, uint32_t magic, uint32_t version) : name("'" + path + "'") {
    uint64_t    n = 0;
    std::string err;

    file = llama_rwkv_ms_fs_open(path, n, err);
    if (!file) {
        llama_rwkv_ms_state_fail("state-unreadable", "%s %s", name.c_str(), err.c_str());
    }
    size = n;
    check(magic, version);
}

llama_rwkv_ms_file::llama_rwkv_ms_file(const uint8_t * data, size_t size, uint32_t magic, uint32_t version) :
    name("the state"), size(size), ram(data) {
    check(magic, version);
}

void llama_rwkv_ms_file::read_at(size_t at, void * dst, size_t n) const {
    if (ram) {
        memcpy(dst, ram + at, n);
    } else if (!llama_rwkv_ms_fs_read(file.get(), at, dst, n)) {
        if (ferror(file.get())) {
            llama_rwkv_ms_state_fail("state-unreadable", "%s cannot be read: %s", name.c_str(), strerror(errno));
        }
        llama_rwkv_ms_state_fail("state-truncated", "%s became shorter while it was read", name.c_str());
    }
}

// what there is of it, then zeros
template <typename T>
static T rwkv_ms_file_peek(const llama_rwkv_ms_file & file, size_t at, size_t end) {
    T res = {};
    if (at < end) {
        file.read_at(at, &res, std::min(sizeof(res), end - at));
    }
    return res;
}

void llama_rwkv_ms_file::check(uint32_t magic, uint32_t version) {
    const auto head = rwkv_ms_file_peek<rwkv_ms_head>(*this, 0, size);

    if (size >= 8 && (head.magic != magic || head.version != version)) {
        llama_rwkv_ms_state_fail("state-format", "%s is not a state file of this kind: it begins with %08x %u, expected %08x %u",
                name.c_str(), head.magic, head.version, magic, version);
    }
    if (size < sizeof(head) || head.n_tokens > (size - sizeof(head)) / sizeof(llama_token)) {
        llama_rwkv_ms_state_fail("state-truncated", "%s ends within its tokens: save it again", name.c_str());
    }
    n_tokens = head.n_tokens;
    i_state  = sizeof(head) + n_tokens * sizeof(llama_token);

    rwkv_ms_trailer trailer = {};
    if (size >= i_state + sizeof(trailer)) {
        trailer = rwkv_ms_file_peek<rwkv_ms_trailer>(*this, size - sizeof(trailer), size);
    }
    if (memcmp(trailer.magic, "RMVE", sizeof(trailer.magic)) != 0) {
        // one that was saved without a memory has no trailer; in that of a whole context the architecture comes first
        std::string text(std::min<size_t>(size - i_state, 64), '\0');
        read_at(i_state, &text[0], text.size());
        if (text.size() == 64 && text.find("RMVS") == std::string::npos) {
            llama_rwkv_ms_state_fail("state-no-memory", "%s has no memory in it: it was saved without a sidecar", name.c_str());
        }
        llama_rwkv_ms_state_fail("state-truncated", "%s does not end with its trailer: it is cut, or something was added", name.c_str());
    }
    if (trailer.version != RWKV_MS_TRAILER_VERSION) {
        llama_rwkv_ms_state_fail("state-version", "%s has a trailer of version %u, this build reads %u", name.c_str(), trailer.version,
                RWKV_MS_TRAILER_VERSION);
    }
    if (trailer.n_bytes != size - sizeof(trailer)) {
        llama_rwkv_ms_state_fail("state-truncated", "%s has %zu bytes before its trailer, which says %llu", name.c_str(),
                size - sizeof(trailer), (unsigned long long) trailer.n_bytes);
    }
    n_state = trailer.n_bytes - i_state;
    memcpy(digest.data(), trailer.hash, sizeof(trailer.hash));
}

llama_rwkv_ms_block_header llama_rwkv_ms_file::header(size_t i_block) const {
    return rwkv_ms_file_peek<llama_rwkv_ms_block_header>(*this, i_state + i_block, i_state + n_state);
}

std::vector<uint8_t> llama_rwkv_ms_file::read() const {
    std::vector<uint8_t> res(size);
    read_at(0, res.data(), size);

    if (llama_rwkv_ms_sha256::hash(res.data(), i_state + n_state) != digest) {
        llama_rwkv_ms_state_fail("state-checksum", "%s does not have its checksum: the file is damaged", name.c_str());
    }
    return res;
}
