#include "llama-adapter-mem.h"

#ifndef LLAMAMEM_BUILD_ID
#error "LLAMAMEM_BUILD_ID is not defined: build with the project's CMakeLists.txt"
#endif

const char * llama_adapter_mem_build_id(void) {
    return LLAMAMEM_BUILD_ID;
}
