#include "llama-adapter-mem-sidecar.h"

#include "llama-adapter-mem-config.h"
#include "llama-adapter-mem-fs.h"
#include "llama-adapter-mem-sha256.h"

#include "ggml.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

static const size_t ADAPTER_MEM_MAX_FILE = 1u << 30; // bytes

//
// files
//

static llama_adapter_mem_fs_ptr adapter_mem_file_open(const std::string & path, uint64_t & size) {
    std::string err;
    auto        file = llama_adapter_mem_fs_open(path, size, err);
    if (!file) {
        llama_adapter_mem_fail("unreadable", "%s", err.c_str());
    }
    return file;
}

// calls func(data, size) for each piece until it returns false
template <typename F>
static void adapter_mem_file_read(FILE * file, const F & func) {
    std::vector<uint8_t> buf(4u << 20);
    while (true) {
        const size_t n = fread(buf.data(), 1, buf.size(), file);
        if (n > 0 && !func(buf.data(), n)) {
            return;
        }
        if (n < buf.size()) {
            break;
        }
    }
    if (ferror(file)) {
        llama_adapter_mem_fail("unreadable", "cannot be read: %s", strerror(errno));
    }
}

static void adapter_mem_file_check_size(uint64_t size) {
    if (size > ADAPTER_MEM_MAX_FILE) {
        llama_adapter_mem_fail("too-large", "is larger than %zu MiB, which no sidecar is: is it the base model?", ADAPTER_MEM_MAX_FILE >> 20);
    }
}

// the whole file at once: what is hashed is then what is parsed
static std::vector<uint8_t> adapter_mem_file_load(const std::string & path) {
    std::vector<uint8_t> res;
    uint64_t             size = 0;
    const auto           file = adapter_mem_file_open(path, size);

    adapter_mem_file_check_size(size);
    res.reserve(size);
    adapter_mem_file_read(file.get(), [&](const uint8_t * data, size_t n) {
        adapter_mem_file_check_size(res.size() + n);
        res.insert(res.end(), data, data + n);
        return true;
    });
    return res;
}

//
// the sidecar
//

std::unique_ptr<llama_adapter_mem_sidecar> llama_adapter_mem_sidecar_read(const char * path, const uint8_t * data, size_t size) {
    auto res  = std::make_unique<llama_adapter_mem_sidecar>();
    res->path = path;

    try {
        const auto gguf     = llama_adapter_mem_gguf_read(data, size);
        const auto manifest = llama_adapter_mem_sidecar_read_keys(gguf, *res);

        llama_adapter_mem_sidecar_read_tensors(gguf, manifest, *res);
    } catch (const std::exception & e) {
        throw std::runtime_error("sidecar '" + res->path + "': " + e.what());
    }

    const auto digest = llama_adapter_mem_sha256::hash(data, size);

    llama_adapter_mem_sha256 both;
    both.update(digest.data(), digest.size());
    for (size_t i = 0; i < digest.size(); ++i) {
        const uint8_t byte = (uint8_t) std::stoi(res->base_sha256.substr(2 * i, 2), nullptr, 16);
        both.update(&byte, 1);
    }
    res->sha256      = llama_adapter_mem_sha256::hex(digest);
    res->fingerprint = llama_adapter_mem_sha256::hex(both.final());
    return res;
}

std::unique_ptr<llama_adapter_mem_sidecar> llama_adapter_mem_sidecar_load(const char * path) {
    std::vector<uint8_t> file;
    try {
        file = adapter_mem_file_load(path);
    } catch (const std::exception & e) {
        throw std::runtime_error(std::string("sidecar '") + path + "': " + e.what());
    }
    return llama_adapter_mem_sidecar_read(path, file.data(), file.size());
}

llama_adapter_mem_sidecar::~llama_adapter_mem_sidecar() {
    base_hash_cancel = true;
    if (base_hash.valid()) {
        base_hash.wait();
    }
}

static std::string adapter_mem_base_postfix(int i, int count) {
    char res[64];
    snprintf(res, sizeof(res), "-%05d-of-%05d.gguf", i, count);
    return res;
}

// The files of a base: one, or all from NAME-00001-of-0000N.gguf on, which are hashed one after the other.
static std::vector<std::string> adapter_mem_base_parts(const std::string & path) {
    const size_t      of    = path.rfind("-of-");
    const int         count = of == std::string::npos ? 0 : std::atoi(path.c_str() + of + 4);
    const std::string first = adapter_mem_base_postfix(1, count);
    if (count < 2 || path.size() <= first.size() || path.compare(path.size() - first.size(), std::string::npos, first) != 0) {
        return { path };
    }
    std::vector<std::string> res;
    for (int i = 1; i <= count; ++i) {
        res.push_back(path.substr(0, path.size() - first.size()) + adapter_mem_base_postfix(i, count));
    }
    return res;
}

void llama_adapter_mem_sidecar::base_hash_start(const char * path) {
    path_base = path;
    base_hash = std::async(std::launch::async, [this]() {
        llama_adapter_mem_sha256 sha;
        for (const std::string & part : adapter_mem_base_parts(path_base)) {
            uint64_t   size = 0;
            const auto file = adapter_mem_file_open(part, size);
            adapter_mem_file_read(file.get(), [&](const uint8_t * data, size_t n) {
                sha.update(data, n);
                return !base_hash_cancel;
            });
        }
        return llama_adapter_mem_sha256::hex(sha.final());
    }).share();
}

void llama_adapter_mem_sidecar::base_hash_check() const {
    if (!base_hash.valid()) {
        return;
    }
    std::string sha;
    try {
        sha = base_hash.get();
    } catch (const std::exception & e) {
        throw std::runtime_error("base '" + path_base + "': " + e.what());
    }
    if (sha != base_sha256) {
        try {
            llama_adapter_mem_fail("base-hash", "base '%s' has SHA-256 %s, but the sidecar is bound to %s: load the base that it was made for, or, for "
                                                "another quantisation of that model, a sidecar that `llamamem sidecar rebind` bound to it",
                    path_base.c_str(), sha.c_str(), base_sha256.c_str());
        } catch (const std::exception & e) {
            throw std::runtime_error("sidecar '" + path + "': " + e.what());
        }
    }
}
