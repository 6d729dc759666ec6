#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

// SHA-256 (FIPS 180-4) of a stream.
// vendor/hash has one too, but it is not linked into libllama and has no hardware path: a base of 8 GB, hashed at each
// start, would take longer than the model takes to load.
struct llama_adapter_mem_sha256 {
    using digest = std::array<uint8_t, 32>;

    void   update(const void * data, size_t size);
    digest final();

    static digest      hash(const void * data, size_t size);
    static std::string hex(const digest & d); // lower case

private:
    std::array<uint32_t, 8> state = {
        0x6a09e667,
        0xbb67ae85,
        0x3c6ef372,
        0xa54ff53a,
        0x510e527f,
        0x9b05688c,
        0x1f83d9ab,
        0x5be0cd19,
    };

    uint64_t n_bytes = 0;
    size_t   n_block = 0; // bytes waiting in block

    std::array<uint8_t, 64> block = {};
};
