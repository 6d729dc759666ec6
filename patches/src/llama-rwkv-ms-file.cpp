#include "llama-rwkv-ms-state.h"

#include "llama-rwkv-ms-sha256.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#include <windows.h>
#else
#include <fcntl.h>
#include <unistd.h>
#endif

static const uint32_t RWKV_MS_TRAILER_VERSION = 1;

// what ends a file
struct rwkv_ms_trailer {
    char     magic[4]; // RMVE
    uint32_t version;
    uint64_t n_bytes; // before the trailer
    uint8_t  hash[32];
};

static_assert(sizeof(rwkv_ms_trailer) == 48, "the layout is documented");

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

std::vector<uint8_t> llama_rwkv_ms_file_pack(uint32_t magic, uint32_t version, const llama_token * tokens, size_t n_tokens, const std::vector<uint8_t> & state) {
    const uint32_t head[3] = { magic, version, (uint32_t) n_tokens };

    std::vector<uint8_t> res;

    const auto write = [&](const void * data, size_t size) {
        res.insert(res.end(), (const uint8_t *) data, (const uint8_t *) data + size);
    };

    write(head, sizeof(head));
    write(tokens, n_tokens * sizeof(llama_token));
    write(state.data(), state.size());

    rwkv_ms_trailer trailer = {};
    memcpy(trailer.magic, "RMVE", sizeof(trailer.magic));
    trailer.version = RWKV_MS_TRAILER_VERSION;
    trailer.n_bytes = res.size();

    const auto digest = llama_rwkv_ms_sha256::hash(res.data(), res.size());
    memcpy(trailer.hash, digest.data(), sizeof(trailer.hash));

    write(&trailer, sizeof(trailer));
    return res;
}

size_t llama_rwkv_ms_file_write(
        const std::string &          path,
        uint32_t                     magic,
        uint32_t                     version,
        const llama_token *          tokens,
        size_t                       n_tokens,
        const std::vector<uint8_t> & state) {
    const auto data = llama_rwkv_ms_file_pack(magic, version, tokens, n_tokens, state);

#if defined(_WIN32)
    const std::string part = path + "." + std::to_string(_getpid()) + ".part";
#else
    const std::string part = path + "." + std::to_string(getpid()) + ".part";
#endif

    rwkv_ms_file_ptr file(ggml_fopen(part.c_str(), "wb"));

    const bool ok = file && fwrite(data.data(), 1, data.size(), file.get()) == data.size() && rwkv_ms_file_sync(file.get());

    const int err = errno;
    file.reset();

    if (!ok || !rwkv_ms_file_replace(part, path)) {
        const std::string what = strerror(ok ? errno : err);
        remove(part.c_str());
        llama_rwkv_ms_state_fail("state-unwritable", "'%s' cannot be written: %s", path.c_str(), what.c_str());
    }
    return data.size();
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
    return llama_rwkv_ms_file_parse(rwkv_ms_file_load(path), "'" + path + "'", magic, version);
}

llama_rwkv_ms_file llama_rwkv_ms_file_parse(std::vector<uint8_t> data, const std::string & name, uint32_t magic, uint32_t version) {
    llama_rwkv_ms_file res;

    res.data = std::move(data);

    uint32_t head[3] = {};
    memcpy(head, res.data.data(), std::min(res.data.size(), sizeof(head)));

    if (res.data.size() >= 8 && (head[0] != magic || head[1] != version)) {
        llama_rwkv_ms_state_fail("state-format", "%s is not a state file of this kind: it begins with %08x %u, expected %08x %u",
                name.c_str(), head[0], head[1], magic, version);
    }
    if (res.data.size() < sizeof(head) || head[2] > (res.data.size() - sizeof(head)) / sizeof(llama_token)) {
        llama_rwkv_ms_state_fail("state-truncated", "%s ends within its tokens: save it again", name.c_str());
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
            llama_rwkv_ms_state_fail("state-no-memory", "%s has no memory in it: it was saved without a sidecar", name.c_str());
        }
        llama_rwkv_ms_state_fail("state-truncated", "%s does not end with its trailer: it is cut, or something was added", name.c_str());
    }
    if (trailer.version != RWKV_MS_TRAILER_VERSION) {
        llama_rwkv_ms_state_fail("state-version", "%s has a trailer of version %u, this build reads %u", name.c_str(), trailer.version,
                RWKV_MS_TRAILER_VERSION);
    }
    if (trailer.n_bytes != res.data.size() - sizeof(trailer)) {
        llama_rwkv_ms_state_fail("state-truncated", "%s has %zu bytes before its trailer, which says %llu", name.c_str(),
                res.data.size() - sizeof(trailer), (unsigned long long) trailer.n_bytes);
    }

    const auto digest = llama_rwkv_ms_sha256::hash(res.data.data(), trailer.n_bytes);
    if (memcmp(digest.data(), trailer.hash, sizeof(trailer.hash)) != 0) {
        llama_rwkv_ms_state_fail("state-checksum", "%s does not have its checksum: the file is damaged", name.c_str());
    }

    res.n_state = trailer.n_bytes - res.i_state;
    return res;
}
