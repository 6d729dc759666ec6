#include "llama-adapter-mem-sha256.h"

#include <cstring>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define LLAMA_ADAPTER_MEM_SHA_NI
#include <cpuid.h>
#include <immintrin.h>
#endif

alignas(16) static const uint32_t adapter_mem_sha256_k[64] = {
    0x428a2f98,
    0x71374491,
    0xb5c0fbcf,
    0xe9b5dba5,
    0x3956c25b,
    0x59f111f1,
    0x923f82a4,
    0xab1c5ed5,
    0xd807aa98,
    0x12835b01,
    0x243185be,
    0x550c7dc3,
    0x72be5d74,
    0x80deb1fe,
    0x9bdc06a7,
    0xc19bf174,
    0xe49b69c1,
    0xefbe4786,
    0x0fc19dc6,
    0x240ca1cc,
    0x2de92c6f,
    0x4a7484aa,
    0x5cb0a9dc,
    0x76f988da,
    0x983e5152,
    0xa831c66d,
    0xb00327c8,
    0xbf597fc7,
    0xc6e00bf3,
    0xd5a79147,
    0x06ca6351,
    0x14292967,
    0x27b70a85,
    0x2e1b2138,
    0x4d2c6dfc,
    0x53380d13,
    0x650a7354,
    0x766a0abb,
    0x81c2c92e,
    0x92722c85,
    0xa2bfe8a1,
    0xa81a664b,
    0xc24b8b70,
    0xc76c51a3,
    0xd192e819,
    0xd6990624,
    0xf40e3585,
    0x106aa070,
    0x19a4c116,
    0x1e376c08,
    0x2748774c,
    0x34b0bcb5,
    0x391c0cb3,
    0x4ed8aa4a,
    0x5b9cca4f,
    0x682e6ff3,
    0x748f82ee,
    0x78a5636f,
    0x84c87814,
    0x8cc70208,
    0x90befffa,
    0xa4506ceb,
    0xbef9a3f7,
    0xc67178f2,
};

static uint32_t adapter_mem_rotr(uint32_t x, int n) {
    return (x >> n) | (x << (32 - n));
}

static void adapter_mem_sha256_blocks(uint32_t * state, const uint8_t * data, size_t n_blocks) {
    for (; n_blocks > 0; --n_blocks, data += 64) {
        uint32_t w[64];
        for (int i = 0; i < 16; ++i) {
            w[i] = (uint32_t) data[4 * i] << 24 | (uint32_t) data[4 * i + 1] << 16 | (uint32_t) data[4 * i + 2] << 8 | data[4 * i + 3];
        }
        for (int i = 16; i < 64; ++i) {
            const uint32_t s0 = adapter_mem_rotr(w[i - 15], 7) ^ adapter_mem_rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
            const uint32_t s1 = adapter_mem_rotr(w[i - 2], 17) ^ adapter_mem_rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
            w[i]              = w[i - 16] + s0 + w[i - 7] + s1;
        }

        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int i = 0; i < 64; ++i) {
            const uint32_t s1 = adapter_mem_rotr(e, 6) ^ adapter_mem_rotr(e, 11) ^ adapter_mem_rotr(e, 25);
            const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + adapter_mem_sha256_k[i] + w[i];
            const uint32_t s0 = adapter_mem_rotr(a, 2) ^ adapter_mem_rotr(a, 13) ^ adapter_mem_rotr(a, 22);
            const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
            h                 = g;
            g                 = f;
            f                 = e;
            e                 = d + t1;
            d                 = c;
            c                 = b;
            b                 = a;
            a                 = t1 + t2;
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

#ifdef LLAMA_ADAPTER_MEM_SHA_NI
static bool adapter_mem_has_sha_ni() {
    unsigned int a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 9)) || !(c & (1u << 19))) { // SSSE3, SSE4.1
        return false;
    }
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));             // SHA
}

__attribute__((target("sha,ssse3,sse4.1"))) static void adapter_mem_sha256_blocks_ni(uint32_t * state, const uint8_t * data, size_t n_blocks) {
    const __m128i bswap = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);

    // the instructions want the state as (A B E F) and (C D G H)
    const __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *) state), 0xb1);
    const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *) (state + 4)), 0x1b);

    __m128i abef = _mm_alignr_epi8(dcba, hgfe, 8);
    __m128i cdgh = _mm_blend_epi16(hgfe, dcba, 0xf0);

    for (; n_blocks > 0; --n_blocks, data += 64) {
        const __m128i abef_prev = abef;
        const __m128i cdgh_prev = cdgh;

        __m128i w[4];
        for (int i = 0; i < 4; ++i) {
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) (data + 16 * i)), bswap);
        }
        for (int i = 0; i < 16; ++i) { // four rounds each
            const __m128i wk = _mm_add_epi32(w[i & 3], _mm_load_si128((const __m128i *) (adapter_mem_sha256_k + 4 * i)));

            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0e));

            if (i < 12) {
                const __m128i w1 = w[(i + 1) & 3];
                const __m128i w2 = w[(i + 2) & 3];
                const __m128i w3 = w[(i + 3) & 3];

                w[i & 3] = _mm_sha256msg2_epu32(
                        _mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w1), _mm_alignr_epi8(w3, w2, 4)), w3);
            }
        }
        abef = _mm_add_epi32(abef, abef_prev);
        cdgh = _mm_add_epi32(cdgh, cdgh_prev);
    }

    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);

    _mm_storeu_si128((__m128i *) state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *) (state + 4), _mm_alignr_epi8(dchg, feba, 8));
}
#endif

static void adapter_mem_sha256_compress(uint32_t * state, const uint8_t * data, size_t n_blocks) {
#ifdef LLAMA_ADAPTER_MEM_SHA_NI
    static const bool has_sha_ni = adapter_mem_has_sha_ni();
    if (has_sha_ni) {
        adapter_mem_sha256_blocks_ni(state, data, n_blocks);
        return;
    }
#endif
    adapter_mem_sha256_blocks(state, data, n_blocks);
}

void llama_adapter_mem_sha256::update(const void * data, size_t size) {
    const uint8_t * p = (const uint8_t *) data;

    n_bytes += size;

    if (n_block > 0) {
        const size_t n = size < block.size() - n_block ? size : block.size() - n_block;
        if (n > 0) {
            memcpy(block.data() + n_block, p, n);
        }
        n_block += n;
        p += n;
        size -= n;
        if (n_block < block.size()) {
            return;
        }
        adapter_mem_sha256_compress(state.data(), block.data(), 1);
        n_block = 0;
    }

    adapter_mem_sha256_compress(state.data(), p, size / 64);

    n_block = size % 64;
    if (n_block > 0) {
        memcpy(block.data(), p + (size - n_block), n_block);
    }
}

llama_adapter_mem_sha256::digest llama_adapter_mem_sha256::final() {
    const uint64_t n_bits = 8 * n_bytes;

    // one set bit, zeros up to 8 bytes before the end of a block, the length in bits, big-endian
    uint8_t      pad[72] = { 0x80 };
    const size_t n_pad   = (n_block < 56 ? 56 : 120) - n_block;
    for (int i = 0; i < 8; ++i) {
        pad[n_pad + i] = (uint8_t) (n_bits >> (56 - 8 * i));
    }
    update(pad, n_pad + 8);

    digest res;
    for (int i = 0; i < 32; ++i) {
        res[i] = (uint8_t) (state[i / 4] >> (24 - 8 * (i % 4)));
    }
    return res;
}

llama_adapter_mem_sha256::digest llama_adapter_mem_sha256::hash(const void * data, size_t size) {
    llama_adapter_mem_sha256 sha;
    sha.update(data, size);
    return sha.final();
}

std::string llama_adapter_mem_sha256::hex(const digest & d) {
    static const char * digits = "0123456789abcdef";

    std::string res;
    for (const uint8_t b : d) {
        res += digits[b >> 4];
        res += digits[b & 15];
    }
    return res;
}
