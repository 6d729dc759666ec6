// Run at configure time, with the tile configuration of the tree that is about to be compiled: a product of two tiles, as
// ggml-cpu/amx/mmq.cpp makes it. Exit status 0: it is right; 1: it is wrong; 2: the kernel gives no permission. A compiler
// that miscompiles the configuration (GCC PR 114098) makes it crash.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <type_traits>

#include "llamamem-amx-config.h"  // tile_config_t and ggml_tile_config_init, cut out of mmq.cpp

#define NOINLINE __attribute__((noinline))

// What the stores that the compiler dropped would have overwritten: a clean stack hides the fault.
NOINLINE static void dirty_stack() {
    volatile unsigned char bytes[4096];
    for (auto & byte : bytes) {
        byte = 0xa5;
    }
}

NOINLINE static void configure() {
    ggml_tile_config_init();
}

int main() {
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) {
        return 2;
    }

    alignas(64) static int8_t  a[16][32];      // rows of A
    alignas(64) static int8_t  b[8][16][4];    // B in groups of four rows
    alignas(64) static int32_t c[16][16];
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 32; k++) {
            a[i][k]            = (int8_t) ((7 * i + 3 * k) % 11 - 5);
            b[k / 4][i][k % 4] = (int8_t) ((5 * k + i) % 13 - 6);
        }
    }

    dirty_stack();
    configure();
    __asm__ volatile("" : : : "memory");
    _tile_zero(4);
    _tile_loadd(2, a, 32);
    _tile_loadd(0, b, 64);
    _tile_dpbssd(4, 2, 0);
    _tile_stored(4, c, 64);
    _tile_release();
    __asm__ volatile("" : : : "memory");

    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) {
            int32_t sum = 0;
            for (int k = 0; k < 32; k++) {
                sum += a[i][k] * b[k / 4][j][k % 4];
            }
            if (sum != c[i][j]) {
                return 1;
            }
        }
    }
    return 0;
}
