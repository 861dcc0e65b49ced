// bias_gradient with COLUMN_AT_ONCE rows a thread under way, the choice between vectors and single numbers made once.
#include "columns.cu"

#ifndef COLUMN_AT_ONCE
#define COLUMN_AT_ONCE 8
#endif
#ifndef COLUMN_BLOCKS
#define COLUMN_BLOCKS 4
#endif

template <bool VECTOR>
__device__ __forceinline__ void sum_rows(float (&sum)[8], const bf* from, int width, int left, int begin, int end) {
    const bf* at = from + static_cast<long long>(begin) * width;
    long long step = static_cast<long long>(COLUMN_WARPS) * width;
    int row = begin;
    for (; row + (COLUMN_AT_ONCE - 1) * COLUMN_WARPS < end; row += COLUMN_WARPS * COLUMN_AT_ONCE) {
        Words words[COLUMN_AT_ONCE];
#pragma unroll
        for (int l = 0; l < COLUMN_AT_ONCE; l++) words[l] = load8(at + l * step, left, VECTOR);
        at += COLUMN_AT_ONCE * step;
#pragma unroll
        for (int l = 0; l < COLUMN_AT_ONCE; l++) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += unpacked(words[l], i);
        }
    }
    for (; row < end; row += COLUMN_WARPS) {
        Words words = load8(at, left, VECTOR);
        at += step;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += unpacked(words, i);
    }
}

extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, COLUMN_BLOCKS)
    bias_gradient_more(float* partial, const bf* d_out, int rows, int width) {
    SHARED_ARRAY(float, shared, COLUMN_THREADS * 8);
    int warp = threadIdx.x / LANES, column = (blockIdx.x * LANES + threadIdx.x % LANES) * 8, left = width - column;
    int run = (rows + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * run, end = min(begin + run, rows);
    float sum[8] = {};
    if (width % 8 == 0) {
        sum_rows<true>(sum, d_out + column, width, left, begin + warp, end);
    } else {
        sum_rows<false>(sum, d_out + column, width, left, begin + warp, end);
    }
    add_warps(sum, shared);
    if (warp != 0) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < left) partial[static_cast<long long>(blockIdx.y) * width + column + i] = sum[i];
    }
}
EXPORT(bias_gradient_more, COLUMN_THREADS)
