#include "ggml-cuda-rwkv-ms.h"

#include "ggml-cuda-rwkv-ms-kernels.cuh"

static ggml_rwkv_ms_params rwkv_ms_params_of(const ggml_tensor * dst) {
    ggml_rwkv_ms_params res;
    memcpy(&res, dst->op_params, sizeof(res));
    return res;
}

bool ggml_cuda_rwkv_ms_is_supported(const ggml_tensor * dst) {
    for (const ggml_tensor * src : { dst->src[0], dst->src[1], dst->src[3] }) {
        if (src && (src->type != GGML_TYPE_F32 || src->nb[0] != sizeof(float))) {
            return false;
        }
    }
    return rwkv_ms_is_supported(rwkv_ms_params_of(dst));
}

void ggml_cuda_op_rwkv_ms(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * x     = dst->src[0];
    const ggml_tensor * state = dst->src[1];
    const ggml_tensor * ids   = dst->src[2];
    const ggml_tensor * w     = dst->src[3];

    rwkv_ms_args a = {};

    a.p            = rwkv_ms_params_of(dst);
    a.x            = (const float *) x->data;
    a.stride_x     = x->nb[1] / sizeof(float);
    a.ids          = (const int32_t *) ids->data;
    a.n_tokens     = x->ne[1];
    a.weights      = w ? (const float *) w->data : nullptr;
    a.state        = (float *) state->data;
    a.stride_state = state->nb[1] / sizeof(float);
    a.n_cells      = state->ne[1];
    a.dst          = (float *) dst->data;
    a.stride_dst   = dst->nb[1] / sizeof(float);

    ggml_cuda_pool_alloc<float> work(ctx.pool());
    if (!rwkv_ms_is_fused(a.n_tokens)) {
        a.stride_work = rwkv_ms_n_work(a.p);
        a.work        = work.alloc(rwkv_ms_n_piece(a.p, a.n_tokens) * a.stride_work);
    }

    cudaStream_t stream = ctx.stream();

    rwkv_ms_run(a, [&](rwkv_ms_kernel kernel, int64_t n_blocks, int n_warps, int n_shared) {
        kernel<<<n_blocks, dim3(RWKV_MS_WARP, n_warps), n_shared * sizeof(float), stream>>>(a);
        CUDA_CHECK(cudaGetLastError());
    });
}
