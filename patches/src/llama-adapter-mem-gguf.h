#pragma once

// A GGUF file in memory, from someone who may be hostile. gguf.h reads more, but returns neither what is wrong nor where,
// and its getters abort; docs/sidecar.md has the rules that this one holds a file to.

#include "llama-impl.h"

#include "gguf.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// throws std::runtime_error with "[reason] ..." in one line; the reasons are those of docs/sidecar.md
[[noreturn]] LLAMA_ATTRIBUTE_FORMAT(2, 3) void llama_adapter_mem_fail(const char * reason, const char * format, ...);

// untrusted text for a message: printable, short, in quotes
std::string llama_adapter_mem_quote(std::string_view text);

bool llama_adapter_mem_is_utf8(std::string_view text);

// keys and tensors in file order, all of it in the bytes that were read
struct llama_adapter_mem_gguf {
    struct kv {
        std::string_view name;
        gguf_type        type;
        std::string_view value; // the bytes of a scalar or a string, nothing of an array
    };

    struct tensor {
        std::string_view     name;
        std::vector<int64_t> shape; // torch order
        ggml_type            type;  // BF16, F16 or F32
        uint64_t             numel;
        size_t               size;  // bytes
        const uint8_t *      data;  // not aligned
    };

    std::vector<kv>     kvs;
    std::vector<tensor> tensors;

    // nullptr if there is no such key
    const kv * find(std::string_view name) const;
};

// throws what llama_adapter_mem_fail throws
llama_adapter_mem_gguf llama_adapter_mem_gguf_read(const uint8_t * data, size_t size);
