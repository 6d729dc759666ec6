#pragma once

// GGML_OP_RWKV_MS on CUDA: what ggml-cuda.cu calls

#include "ggml-cuda/common.cuh"

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

//
// F32 products whose result must not depend on the number of tokens, as those do that round their sources to TF32
//

// whether a product asks for that: ggml_prec_set_src
static inline bool ggml_cuda_rwkv_ms_is_f32(const ggml_tensor * dst) {
    return dst->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(dst, 3) == GGML_PREC_F32;
}

// keeps cuBLAS from TF32 while it lives
struct ggml_cuda_rwkv_ms_f32_math {
    cublasHandle_t handle; // nullptr: does nothing

    ggml_cuda_rwkv_ms_f32_math(cublasHandle_t handle, bool is_f32) : handle(is_f32 ? handle : nullptr) { set(CUBLAS_DEFAULT_MATH); }

    ~ggml_cuda_rwkv_ms_f32_math() { set(CUBLAS_TF32_TENSOR_OP_MATH); } // as common.cuh has it

    ggml_cuda_rwkv_ms_f32_math(const ggml_cuda_rwkv_ms_f32_math &) = delete;

    void set(cublasMath_t mode) {
        if (handle) {
            CUBLAS_CHECK(cublasSetMathMode(handle, mode));
        }
    }
};
