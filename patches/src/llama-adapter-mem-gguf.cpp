#include "llama-adapter-mem-gguf.h"

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <set>
#include <stdexcept>

static const uint64_t ADAPTER_MEM_GGUF_MAX_COUNT = 1 << 16; // of keys, of tensors
static const uint64_t ADAPTER_MEM_GGUF_MAX_NUMEL = 1ull << 48;
static const size_t   ADAPTER_MEM_GGUF_MAX_NAME  = 63; // bytes
static const uint32_t ADAPTER_MEM_GGUF_MAX_DIMS  = 4;
static const uint64_t ADAPTER_MEM_GGUF_ALIGNMENT = 32;

static const char * const ADAPTER_MEM_GGUF_ARCH   = "rwkv_ms_memory"; // versions 1 and 2 of the format
static const char * const ADAPTER_MEM_GGUF_ARCH_3 = "memory_adapter";

//
// messages
//

void llama_adapter_mem_fail(const char * reason, const char * format, ...) {
    va_list args;
    va_start(args, format);
    va_list args_size;
    va_copy(args_size, args);
    const int n = vsnprintf(nullptr, 0, format, args_size);
    va_end(args_size);

    std::vector<char> text(n + 1);
    vsnprintf(text.data(), text.size(), format, args);
    va_end(args);

    throw std::runtime_error("[" + std::string(reason) + "] " + text.data());
}

std::string llama_adapter_mem_quote(std::string_view text) {
    const size_t n_max = 80;

    std::string res = "'";
    for (size_t i = 0; i < text.size() && i < n_max; ++i) {
        const unsigned char c = text[i];
        res += c >= 0x20 && c < 0x7f && c != '\'' ? (char) c : '?';
    }
    return res + (text.size() > n_max ? "...'" : "'");
}

bool llama_adapter_mem_is_utf8(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
        const uint8_t  c   = text[i];
        const size_t   n   = c < 0x80 ? 1 : c >> 5 == 0x06 ? 2
                : c >> 4 == 0x0e                           ? 3
                : c >> 3 == 0x1e                           ? 4
                                                           : 0;
        const uint32_t min = n < 2 ? 0 : n == 2 ? 0x80
                : n == 3                        ? 0x800
                                                : 0x10000;
        if (n == 0 || n > text.size() - i) {
            return false;
        }
        uint32_t cpt = n == 1 ? c : c & (0x7f >> n);
        for (size_t k = 1; k < n; ++k) {
            const uint8_t next = text[i + k];
            if (next >> 6 != 0x02) {
                return false;
            }
            cpt = cpt << 6 | (next & 0x3f);
        }
        if (cpt < min || cpt > 0x10ffff || (cpt >= 0xd800 && cpt < 0xe000)) {
            return false;
        }
        i += n;
    }
    return true;
}

//
// reading
//

struct adapter_mem_cursor {
    const uint8_t * data;
    const size_t    size;

    size_t      at   = 0;
    std::string what = "the header"; // that is being read, for messages

    std::string_view bytes(uint64_t n) {
        if (n > size - at) {
            llama_adapter_mem_fail("truncated", "the file ends inside of %s: copy or export it again", what.c_str());
        }
        at += n;
        return std::string_view((const char *) data + at - n, n);
    }

    template <typename T>
    T num() {
        T res;
        memcpy(&res, bytes(sizeof(T)).data(), sizeof(T));
        return res;
    }

    std::string_view str() {
        const std::string_view res = bytes(num<uint64_t>());
        if (!llama_adapter_mem_is_utf8(res)) {
            llama_adapter_mem_fail("not-utf8", "%s has a text that is not UTF-8: %s", what.c_str(), llama_adapter_mem_quote(res).c_str());
        }
        return res;
    }
};

// bytes of a value, 0 if it is a string, an array or unknown
static size_t adapter_mem_gguf_type_size(uint32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL:
            return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16:
            return 2;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:
        case GGUF_TYPE_FLOAT32:
            return 4;
        case GGUF_TYPE_UINT64:
        case GGUF_TYPE_INT64:
        case GGUF_TYPE_FLOAT64:
            return 8;
        default:
            return 0;
    }
}

static void adapter_mem_gguf_read_array(adapter_mem_cursor & cursor) {
    const uint32_t type      = cursor.num<uint32_t>();
    const size_t   item_size = adapter_mem_gguf_type_size(type);
    if (item_size == 0 && type != GGUF_TYPE_STRING) {
        llama_adapter_mem_fail("gguf-type", "%s has items of type %u, which is none that an array may have", cursor.what.c_str(), type);
    }
    const uint64_t n = cursor.num<uint64_t>();
    if (item_size > 0) {
        // the product may overflow, the quotient does not
        cursor.bytes(n > cursor.size / item_size ? UINT64_MAX : n * item_size);
        return;
    }
    for (uint64_t i = 0; i < n; ++i) {
        cursor.str();
    }
}

static llama_adapter_mem_gguf::kv adapter_mem_gguf_read_kv(adapter_mem_cursor & cursor, std::set<std::string_view> & names) {
    llama_adapter_mem_gguf::kv res = {};

    res.name    = cursor.str();
    cursor.what = "key " + llama_adapter_mem_quote(res.name);
    if (!names.insert(res.name).second) {
        llama_adapter_mem_fail("key-duplicate", "%s is there twice", cursor.what.c_str());
    }

    const uint32_t type = cursor.num<uint32_t>();
    if (type >= GGUF_TYPE_COUNT) {
        llama_adapter_mem_fail("gguf-type", "%s has the unknown type %u", cursor.what.c_str(), type);
    }
    res.type = (gguf_type) type;
    if (type == GGUF_TYPE_STRING) {
        res.value = cursor.str();
    } else if (type == GGUF_TYPE_ARRAY) {
        adapter_mem_gguf_read_array(cursor);
    } else {
        res.value = cursor.bytes(adapter_mem_gguf_type_size(type));
    }
    return res;
}

static void adapter_mem_gguf_check_general(const llama_adapter_mem_gguf & gguf) {
    const auto * arch = gguf.find("general.architecture");
    if (!arch || arch->type != GGUF_TYPE_STRING) {
        llama_adapter_mem_fail("not-a-sidecar", "key 'general.architecture' is missing or not a string, must be '%s' or '%s'",
                ADAPTER_MEM_GGUF_ARCH, ADAPTER_MEM_GGUF_ARCH_3);
    }
    if (arch->value != ADAPTER_MEM_GGUF_ARCH && arch->value != ADAPTER_MEM_GGUF_ARCH_3) {
        llama_adapter_mem_fail("not-a-sidecar", "key 'general.architecture' is %s, must be '%s' or '%s': is it a model instead of a sidecar?",
                llama_adapter_mem_quote(arch->value).c_str(), ADAPTER_MEM_GGUF_ARCH, ADAPTER_MEM_GGUF_ARCH_3);
    }

    if (const auto * alignment = gguf.find("general.alignment")) {
        uint32_t value = 0;
        if (alignment->type == GGUF_TYPE_UINT32) {
            memcpy(&value, alignment->value.data(), sizeof(value));
        }
        if (value != ADAPTER_MEM_GGUF_ALIGNMENT) {
            llama_adapter_mem_fail("alignment", "key 'general.alignment' must be a u32 of %llu", (unsigned long long) ADAPTER_MEM_GGUF_ALIGNMENT);
        }
    }
}

// offset: where the tensor must be, from the start of the data
static llama_adapter_mem_gguf::tensor adapter_mem_gguf_read_tensor(adapter_mem_cursor & cursor, std::set<std::string_view> & names, uint64_t offset) {
    llama_adapter_mem_gguf::tensor res = {};

    res.name = cursor.str();
    if (res.name.empty() || res.name.size() > ADAPTER_MEM_GGUF_MAX_NAME) {
        llama_adapter_mem_fail("tensor-name", "%s has a name of %zu bytes, must be from 1 to %zu: %s", cursor.what.c_str(), res.name.size(),
                ADAPTER_MEM_GGUF_MAX_NAME, llama_adapter_mem_quote(res.name).c_str());
    }
    cursor.what = "tensor " + llama_adapter_mem_quote(res.name);
    if (!names.insert(res.name).second) {
        llama_adapter_mem_fail("tensor-duplicate", "%s is there twice", cursor.what.c_str());
    }

    const uint32_t n_dims = cursor.num<uint32_t>();
    if (n_dims < 1 || n_dims > ADAPTER_MEM_GGUF_MAX_DIMS) {
        llama_adapter_mem_fail("tensor-dims", "%s has %u dimensions, must be from 1 to %u", cursor.what.c_str(), n_dims, ADAPTER_MEM_GGUF_MAX_DIMS);
    }
    res.numel = 1;
    for (uint32_t i = 0; i < n_dims; ++i) {
        const uint64_t ne = cursor.num<uint64_t>();
        if (ne == 0 || ne > ADAPTER_MEM_GGUF_MAX_NUMEL / res.numel) {
            llama_adapter_mem_fail("tensor-dims", "%s has %llu as dimension %u: empty, or more than %llu values", cursor.what.c_str(),
                    (unsigned long long) ne, i, (unsigned long long) ADAPTER_MEM_GGUF_MAX_NUMEL);
        }
        res.numel *= ne;
        res.shape.insert(res.shape.begin(), (int64_t) ne);
    }

    const uint32_t type = cursor.num<uint32_t>();
    if (type != GGML_TYPE_BF16 && type != GGML_TYPE_F16 && type != GGML_TYPE_F32) {
        llama_adapter_mem_fail("tensor-type", "%s has type %u, must be BF16 (%d), F16 (%d) or F32 (%d): export the sidecar again",
                cursor.what.c_str(), type, GGML_TYPE_BF16, GGML_TYPE_F16, GGML_TYPE_F32);
    }
    res.type = (ggml_type) type;
    res.size = res.numel * (type == GGML_TYPE_F32 ? 4 : 2);

    // 2^16 tensors of 2^50 bytes: an end may be beyond 2^64, and then there is no offset for a next one
    const uint64_t is = cursor.num<uint64_t>();
    if (is != offset || offset % ADAPTER_MEM_GGUF_ALIGNMENT != 0) {
        llama_adapter_mem_fail("tensor-offset", "%s has the offset %llu, which is not the padded end of the tensor before it",
                cursor.what.c_str(), (unsigned long long) is);
    }
    return res;
}

static uint64_t adapter_mem_gguf_pad(uint64_t n) {
    return (n + ADAPTER_MEM_GGUF_ALIGNMENT - 1) / ADAPTER_MEM_GGUF_ALIGNMENT * ADAPTER_MEM_GGUF_ALIGNMENT;
}

llama_adapter_mem_gguf llama_adapter_mem_gguf_read(const uint8_t * data, size_t size) {
    llama_adapter_mem_gguf res;

    if (size < 4 || memcmp(data, GGUF_MAGIC, 4) != 0) {
        llama_adapter_mem_fail("not-gguf", "is not a GGUF file");
    }

    adapter_mem_cursor cursor = { data, size };
    cursor.bytes(4);

    const uint32_t version = cursor.num<uint32_t>();
    if (version != GGUF_VERSION) {
        llama_adapter_mem_fail("gguf-version", "is a GGUF file of version %u, a sidecar has version %d", version, GGUF_VERSION);
    }
    const uint64_t n_tensors = cursor.num<uint64_t>();
    const uint64_t n_kv      = cursor.num<uint64_t>();
    if (n_tensors > ADAPTER_MEM_GGUF_MAX_COUNT || n_kv > ADAPTER_MEM_GGUF_MAX_COUNT) {
        llama_adapter_mem_fail("gguf-count", "has %llu tensors and %llu keys, at most %llu of each are read", (unsigned long long) n_tensors,
                (unsigned long long) n_kv, (unsigned long long) ADAPTER_MEM_GGUF_MAX_COUNT);
    }

    std::set<std::string_view> names;
    for (uint64_t i = 0; i < n_kv; ++i) {
        cursor.what = "key " + std::to_string(i + 1);
        res.kvs.push_back(adapter_mem_gguf_read_kv(cursor, names));
    }
    adapter_mem_gguf_check_general(res);

    names.clear();

    uint64_t end = 0;
    for (uint64_t i = 0; i < n_tensors; ++i) {
        cursor.what = "tensor " + std::to_string(i + 1);
        res.tensors.push_back(adapter_mem_gguf_read_tensor(cursor, names, end));

        const uint64_t n = res.tensors.back().size;
        end              = end > UINT64_MAX - (ADAPTER_MEM_GGUF_ALIGNMENT - 1) - n ? UINT64_MAX : adapter_mem_gguf_pad(end + n);
    }

    const uint64_t start = adapter_mem_gguf_pad(cursor.at);

    end = start;
    for (auto & tensor : res.tensors) {
        if (end > size || tensor.size > size - end) {
            llama_adapter_mem_fail("truncated", "tensor %s reaches beyond the end of the file: copy or export it again",
                    llama_adapter_mem_quote(tensor.name).c_str());
        }
        tensor.data = data + end;
        end         = adapter_mem_gguf_pad(end + tensor.size);
    }
    if (size > end) {
        llama_adapter_mem_fail("trailing-bytes", "%llu bytes follow the last tensor: copy or export it again", (unsigned long long) (size - end));
    }
    return res;
}

const llama_adapter_mem_gguf::kv * llama_adapter_mem_gguf::find(std::string_view name) const {
    const auto it = std::find_if(kvs.begin(), kvs.end(), [&](const kv & x) { return x.name == name; });
    return it == kvs.end() ? nullptr : &*it;
}
