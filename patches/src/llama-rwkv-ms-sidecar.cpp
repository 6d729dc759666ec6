#include "llama-rwkv-ms-sidecar.h"

#include "llama-rwkv-ms-config.h"
#include "llama-rwkv-ms-sha256.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>

static const size_t RWKV_MS_MAX_FILE = 1u << 30; // bytes

//
// files
//

struct rwkv_ms_file_deleter {
    void operator()(FILE * file) { fclose(file); }
};

typedef std::unique_ptr<FILE, rwkv_ms_file_deleter> rwkv_ms_file_ptr;

static rwkv_ms_file_ptr rwkv_ms_file_open(const std::string & path) {
    rwkv_ms_file_ptr file(ggml_fopen(path.c_str(), "rb"));
    if (!file) {
        llama_rwkv_ms_fail("cannot be opened: %s", strerror(errno));
    }
    return file;
}

// calls func(data, size) for each piece until it returns false
template <typename F>
static void rwkv_ms_file_read(FILE * file, const F & func) {
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
        llama_rwkv_ms_fail("cannot be read: %s", strerror(errno));
    }
}

// the whole file at once: what is hashed is then what is parsed
static std::vector<uint8_t> rwkv_ms_file_load(const std::string & path) {
    std::vector<uint8_t> res;
    const auto           file = rwkv_ms_file_open(path);
    rwkv_ms_file_read(file.get(), [&](const uint8_t * data, size_t size) {
        if (res.size() + size > RWKV_MS_MAX_FILE) {
            llama_rwkv_ms_fail("is larger than %zu MiB, which no sidecar is: is it the base model?", RWKV_MS_MAX_FILE >> 20);
        }
        res.insert(res.end(), data, data + size);
        return true;
    });
    return res;
}

//
// the sidecar
//

static void rwkv_ms_sidecar_read(const std::vector<uint8_t> & file, llama_rwkv_ms_sidecar & res) {
    uint32_t version = 0;
    if (file.size() < 8 || memcmp(file.data(), GGUF_MAGIC, 4) != 0) {
        llama_rwkv_ms_fail("is not a GGUF file");
    }
    memcpy(&version, file.data() + 4, 4);
    if (version != 3) {
        llama_rwkv_ms_fail("is a GGUF file of version %u, a sidecar has version 3", version);
    }

    gguf_context_ptr gguf(gguf_init_from_buffer(file.data(), file.size(), { /*no_alloc =*/true, /*ctx =*/nullptr }));
    if (!gguf) {
        // what exactly is only in the log: gguf.h does not return it
        llama_rwkv_ms_fail("is a truncated or malformed GGUF file, or has a key or tensor twice (see the log): copy or export it again");
    }

    const int64_t id_arch = gguf_find_key(gguf.get(), "general.architecture");
    if (id_arch < 0 || gguf_get_kv_type(gguf.get(), id_arch) != GGUF_TYPE_STRING) {
        llama_rwkv_ms_fail("key 'general.architecture' is missing or not a string, must be 'rwkv_ms_memory'");
    }
    const std::string arch = gguf_get_val_str(gguf.get(), id_arch);
    if (arch != "rwkv_ms_memory") {
        llama_rwkv_ms_fail("key 'general.architecture' is %s, must be 'rwkv_ms_memory': is it a model instead of a sidecar?",
                llama_rwkv_ms_quote(arch).c_str());
    }
    if (gguf_get_alignment(gguf.get()) != 32) {
        llama_rwkv_ms_fail("key 'general.alignment' is %zu, must be 32", gguf_get_alignment(gguf.get()));
    }

    const auto manifest = llama_rwkv_ms_sidecar_read_keys(gguf.get(), res);

    llama_rwkv_ms_sidecar_read_tensors(gguf.get(), file, manifest, res);
}

std::unique_ptr<llama_rwkv_ms_sidecar> llama_rwkv_ms_sidecar_load(const char * path) {
    auto res  = std::make_unique<llama_rwkv_ms_sidecar>();
    res->path = path;

    try {
        const auto file   = rwkv_ms_file_load(path);
        const auto digest = llama_rwkv_ms_sha256::hash(file.data(), file.size());

        res->sha256 = llama_rwkv_ms_sha256::hex(digest);
        rwkv_ms_sidecar_read(file, *res);

        llama_rwkv_ms_sha256 both;
        both.update(digest.data(), digest.size());
        for (size_t i = 0; i < digest.size(); ++i) {
            const uint8_t byte = (uint8_t) std::stoi(res->base_sha256.substr(2 * i, 2), nullptr, 16);
            both.update(&byte, 1);
        }
        res->fingerprint = llama_rwkv_ms_sha256::hex(both.final());
    } catch (const std::exception & e) {
        throw std::runtime_error("sidecar '" + res->path + "': " + e.what());
    }
    return res;
}

llama_rwkv_ms_sidecar::~llama_rwkv_ms_sidecar() {
    base_hash_cancel = true;
    if (base_hash.valid()) {
        base_hash.wait();
    }
}

void llama_rwkv_ms_sidecar::base_hash_start(const char * path) {
    path_base = path;
    base_hash = std::async(std::launch::async, [this]() {
        llama_rwkv_ms_sha256 sha;
        const auto           file = rwkv_ms_file_open(path_base);
        rwkv_ms_file_read(file.get(), [&](const uint8_t * data, size_t size) {
            sha.update(data, size);
            return !base_hash_cancel;
        });
        return llama_rwkv_ms_sha256::hex(sha.final());
    }).share();
}

void llama_rwkv_ms_sidecar::base_hash_check() const {
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
        throw std::runtime_error("base '" + path_base + "' has SHA-256 " + sha + ", but sidecar '" + path +
                "' is bound to " + base_sha256 + ": load the base that the sidecar was made for");
    }
}
