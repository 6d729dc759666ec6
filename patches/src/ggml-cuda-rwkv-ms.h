#pragma once

// GGML_OP_RWKV_MS on CUDA: what ggml-cuda.cu calls

#include "ggml.h"

struct ggml_backend_cuda_context;

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// they compile ggml-cuda.cu too, and have no kernels of this op
static inline void ggml_cuda_op_rwkv_ms(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("not supported");
}

static inline bool ggml_cuda_rwkv_ms_is_supported(const ggml_tensor *) {
    return false;
}

#else

void ggml_cuda_op_rwkv_ms(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// false: the op runs on the CPU, and the state lies there
bool ggml_cuda_rwkv_ms_is_supported(const ggml_tensor * dst);

#endif
