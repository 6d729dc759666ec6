#pragma once

// GGML_OP_RWKV_MS on CUDA: what ggml-cuda.cu calls

struct ggml_backend_cuda_context;
struct ggml_tensor;

void ggml_cuda_op_rwkv_ms(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// false: the op runs on the CPU, and the state lies there
bool ggml_cuda_rwkv_ms_is_supported(const ggml_tensor * dst);
