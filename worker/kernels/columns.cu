// Sums down the columns: gradients of gains and biases, in two steps. Each part of the rows is summed by itself, by the
// norms' backward or bias_gradient, and column_sums adds the parts.
//
// Floors, bytes a number read: column_sums 4, bias_gradient 2.
//
// Launch:
//   column_sums: block 256, grid ceil(width / 32), no dynamic shared memory.
//   bias_gradient: block 256, grid (ceil(width / 256), Y), no dynamic shared memory; Y = min(ceil(rows / 64), 128) by
//     custom. Any Y is right, but it decides bits, so it may depend on the shape only.
#include "common.cuh"

constexpr int COLUMN_THREADS = 256;
constexpr int COLUMN_WARPS = COLUMN_THREADS / LANES;
constexpr int COLUMN_LOADS = 4;   // under way at a time

// Adds what the eight warps have for the same column, in order; all threads must call.
template <int EACH>
__device__ __forceinline__ void add_warps(float (&mine)[EACH], float* shared) {
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < EACH; i++) shared[(warp * EACH + i) * LANES + lane] = mine[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        mine[i] = 0.0f;
        for (int w = 0; w < COLUMN_WARPS; w++) mine[i] += shared[(w * EACH + i) * LANES + lane];
    }
}

// out[j] = the sum over i of partial[i, j]; partial: [parts, width].
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS)
    column_sums(float* out, const float* partial, int parts, int width) {
    SHARED_ARRAY(float, shared, COLUMN_THREADS);
    int warp = threadIdx.x / LANES, column = blockIdx.x * LANES + threadIdx.x % LANES;
    float sum[1] = {0.0f};
    for (int first = warp; first < parts && column < width; first += COLUMN_WARPS * COLUMN_LOADS) {
        float part[COLUMN_LOADS];
#pragma unroll
        for (int l = 0; l < COLUMN_LOADS; l++) {
            int i = first + l * COLUMN_WARPS;
            part[l] = i < parts ? partial[static_cast<long long>(i) * width + column] : 0.0f;
        }
#pragma unroll
        for (int l = 0; l < COLUMN_LOADS; l++) sum[0] += part[l];
    }
    add_warps(sum, shared);
    if (warp == 0 && column < width) out[column] = sum[0];
}
EXPORT(column_sums, COLUMN_THREADS)

// partial[y, j] = the sum of d_out[i, j] over the y-th run of ceil(rows / gridDim.y) rows; partial: [gridDim.y, width].
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS)
    bias_gradient(float* partial, const bf* d_out, int rows, int width) {
    SHARED_ARRAY(float, shared, COLUMN_THREADS * 8);
    int warp = threadIdx.x / LANES, column = (blockIdx.x * LANES + threadIdx.x % LANES) * 8, left = width - column;
    int run = (rows + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * run, end = min(begin + run, rows);
    float sum[8] = {};
    for (int first = begin + warp; first < end; first += COLUMN_WARPS * COLUMN_LOADS) {
        Words words[COLUMN_LOADS];
#pragma unroll
        for (int l = 0; l < COLUMN_LOADS; l++) {
            int row = first + l * COLUMN_WARPS;
            const bf* from = d_out + static_cast<long long>(row) * width + column;
            words[l] = load8(from, row < end ? left : 0, width % 8 == 0);
        }
#pragma unroll
        for (int l = 0; l < COLUMN_LOADS; l++) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += unpacked(words[l], i);
        }
    }
    add_warps(sum, shared);
    if (warp != 0) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < left) partial[static_cast<long long>(blockIdx.y) * width + column + i] = sum[i];
    }
}
EXPORT(bias_gradient, COLUMN_THREADS)
