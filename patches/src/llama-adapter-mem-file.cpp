#include "llama-adapter-mem-state.h"

#include "llama-adapter-mem-fs.h"
#include "llama-adapter-mem-sha256.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

static const uint32_t ADAPTER_MEM_TRAILER_VERSION = 1;

static const size_t ADAPTER_MEM_LARGE_FILE = 64u << 20; // bytes
static const size_t ADAPTER_MEM_FILE_PEEK  = 4096;      // bytes of the state that are looked at before the rest

// llama.cpp's, of a file
struct adapter_mem_head {
    uint32_t magic;
    uint32_t version;
    uint32_t n_tokens;
};

// what ends a file
struct adapter_mem_trailer {
    char     magic[4]; // RMVE
    uint32_t version;
    uint64_t n_bytes; // before the trailer
    uint8_t  hash[32];
};

static_assert(sizeof(adapter_mem_trailer) == 48, "the layout is documented");

std::vector<uint8_t> llama_adapter_mem_file_pack(uint32_t magic, uint32_t version, const llama_token * tokens, size_t n_tokens, const std::vector<uint8_t> & state) {
    const adapter_mem_head head = { magic, version, (uint32_t) n_tokens };

    std::vector<uint8_t> res;

    const auto write = [&](const void * data, size_t size) {
        res.insert(res.end(), (const uint8_t *) data, (const uint8_t *) data + size);
    };

    write(&head, sizeof(head));
    write(tokens, n_tokens * sizeof(llama_token));
    write(state.data(), state.size());

    adapter_mem_trailer trailer = {};
    memcpy(trailer.magic, "RMVE", sizeof(trailer.magic));
    trailer.version = ADAPTER_MEM_TRAILER_VERSION;
    trailer.n_bytes = res.size();

    const auto digest = llama_adapter_mem_sha256::hash(res.data(), res.size());
    memcpy(trailer.hash, digest.data(), sizeof(trailer.hash));

    write(&trailer, sizeof(trailer));
    return res;
}

size_t llama_adapter_mem_file_write(
        const std::string &          path,
        uint32_t                     magic,
        uint32_t                     version,
        const llama_token *          tokens,
        size_t                       n_tokens,
        const std::vector<uint8_t> & state) {
    const auto data = llama_adapter_mem_file_pack(magic, version, tokens, n_tokens, state);

    const std::string err = llama_adapter_mem_fs_write(path, data.data(), data.size());
    if (!err.empty()) {
        llama_adapter_mem_state_fail("state-unwritable", "'%s' cannot be written: %s", path.c_str(), err.c_str());
    }
    return data.size();
}

//
// reading
//

// what surrounds the state in a file
struct adapter_mem_frame {
    size_t n_tokens = 0;
    size_t i_state  = 0;
    size_t n_state  = 0;

    uint8_t hash[32] = {}; // of all before the trailer
};

// read_at(at, dst, n): n bytes of the size that there are
template <typename F>
static adapter_mem_frame adapter_mem_frame_read(const char * name, size_t size, uint32_t magic, uint32_t version, const F & read_at) {
    adapter_mem_frame res;

    adapter_mem_head head = {};
    read_at(0, &head, std::min(size, sizeof(head)));

    if (size >= 8 && (head.magic != magic || head.version != version)) {
        llama_adapter_mem_state_fail("state-format", "%s is not a state file of this kind: it begins with %08x %u, expected %08x %u",
                name, head.magic, head.version, magic, version);
    }
    if (size < sizeof(head) || head.n_tokens > (size - sizeof(head)) / sizeof(llama_token)) {
        llama_adapter_mem_state_fail("state-truncated", "%s ends within its tokens: save it again", name);
    }
    res.n_tokens = head.n_tokens;
    res.i_state  = sizeof(head) + res.n_tokens * sizeof(llama_token);

    adapter_mem_trailer trailer = {};
    if (size >= res.i_state + sizeof(trailer)) {
        read_at(size - sizeof(trailer), &trailer, sizeof(trailer));
    }
    if (memcmp(trailer.magic, "RMVE", sizeof(trailer.magic)) != 0) {
        // one that was saved without a memory has no trailer; in that of a whole context the architecture comes first
        std::string text(std::min<size_t>(size - res.i_state, 64), '\0');
        read_at(res.i_state, &text[0], text.size());
        if (text.size() == 64 && text.find("RMVS") == std::string::npos) {
            llama_adapter_mem_state_fail("state-no-memory", "%s has no memory in it: it was saved without a sidecar", name);
        }
        llama_adapter_mem_state_fail("state-truncated", "%s does not end with its trailer: it is cut, or something was added", name);
    }
    if (trailer.version != ADAPTER_MEM_TRAILER_VERSION) {
        llama_adapter_mem_state_fail("state-version", "%s has a trailer of version %u, this build reads %u", name, trailer.version,
                ADAPTER_MEM_TRAILER_VERSION);
    }
    if (trailer.n_bytes != size - sizeof(trailer)) {
        llama_adapter_mem_state_fail("state-truncated", "%s has %zu bytes before its trailer, which says %llu", name,
                size - sizeof(trailer), (unsigned long long) trailer.n_bytes);
    }
    res.n_state = trailer.n_bytes - res.i_state;
    memcpy(res.hash, trailer.hash, sizeof(res.hash));
    return res;
}

llama_adapter_mem_file llama_adapter_mem_file_read(const std::string & path, uint32_t magic, uint32_t version, const llama_adapter_mem_file_check & check) {
    const std::string name = "'" + path + "'";

    uint64_t    size = 0;
    std::string err;
    const auto  file = llama_adapter_mem_fs_open(path, size, err);
    if (!file) {
        llama_adapter_mem_state_fail("state-unreadable", "%s %s", name.c_str(), err.c_str());
    }

    const auto read_at = [&](size_t at, void * dst, size_t n) {
        if (llama_adapter_mem_fs_read(file.get(), at, dst, n)) {
            return;
        }
        if (ferror(file.get())) {
            llama_adapter_mem_state_fail("state-unreadable", "%s cannot be read: %s", name.c_str(), strerror(errno));
        }
        llama_adapter_mem_state_fail("state-truncated", "%s became shorter while it was read", name.c_str());
    };
    const auto frame = adapter_mem_frame_read(name.c_str(), size, magic, version, read_at);

    if (size > ADAPTER_MEM_LARGE_FILE) {
        std::vector<uint8_t> begin(std::min(frame.n_state, ADAPTER_MEM_FILE_PEEK));
        read_at(frame.i_state, begin.data(), begin.size());
        check(begin.data(), begin.size(), frame.n_state, frame.n_tokens);
    }

    std::vector<uint8_t> data(size);
    read_at(0, data.data(), data.size());
    return llama_adapter_mem_file_parse(std::move(data), name, magic, version);
}

llama_adapter_mem_file llama_adapter_mem_file_parse(std::vector<uint8_t> data, const std::string & name, uint32_t magic, uint32_t version) {
    const auto frame = adapter_mem_frame_read(name.c_str(), data.size(), magic, version, [&](size_t at, void * dst, size_t n) {
        std::copy_n(data.begin() + at, n, (uint8_t *) dst);
    });

    const auto digest = llama_adapter_mem_sha256::hash(data.data(), frame.i_state + frame.n_state);
    if (memcmp(digest.data(), frame.hash, sizeof(frame.hash)) != 0) {
        llama_adapter_mem_state_fail("state-checksum", "%s does not have its checksum: the file is damaged", name.c_str());
    }

    llama_adapter_mem_file res;

    res.i_state = frame.i_state;
    res.n_state = frame.n_state;
    res.tokens.resize(frame.n_tokens);
    std::copy_n(data.begin() + sizeof(adapter_mem_head), frame.n_tokens * sizeof(llama_token), (uint8_t *) res.tokens.data());
    res.data = std::move(data);
    return res;
}
