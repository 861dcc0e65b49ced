// Sums down the columns: gradients of gains and biases, in two steps. Each part of the rows is summed by itself, by the
// norms' backward or bias_gradient, and column_sums adds the parts.
//
// Floors, bytes a number read: column_sums 4, bias_gradient 2.
//
// Launch:
//   column_sums: block 256, grid ceil(width / 32), no dynamic shared memory.
//   bias_gradient: block 256, grid (C, Y), no dynamic shared memory, with C = ceil(width / 256) and Y =
//     min(ceil(rows / 64), max(1, 528 / C)) by custom, which fills an H100 once. Any Y is right, but it decides bits,
//     so it may depend on the shape only.
#include "common.cuh"

constexpr int COLUMN_THREADS = 256;
constexpr int COLUMN_WARPS = COLUMN_THREADS / LANES;
constexpr int COLUMN_LOADS = 4;   // under way at a time
constexpr int BIAS_LOADS = 8;     // the same, of a bias's gradient

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

// Adds a warp's rows, eight of them under way at a time; the choice between vectors and single numbers is made once.
template <bool VECTOR>
__device__ __forceinline__ void sum_rows(float (&sum)[8], const bf* from, int width, int left, int begin, int end) {
    const bf* at = from + static_cast<long long>(begin) * width;
    long long step = static_cast<long long>(COLUMN_WARPS) * width;
    int row = begin;
    for (; row + (BIAS_LOADS - 1) * COLUMN_WARPS < end; row += COLUMN_WARPS * BIAS_LOADS) {
        Words words[BIAS_LOADS];
#pragma unroll
        for (int l = 0; l < BIAS_LOADS; l++) words[l] = load8(at + l * step, left, VECTOR);
        at += BIAS_LOADS * step;
#pragma unroll
        for (int l = 0; l < BIAS_LOADS; l++) {
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

// partial[y, j] = the sum of d_out[i, j] over the y-th run of ceil(rows / gridDim.y) rows; partial: [gridDim.y, width].
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, 4)
    bias_gradient(float* partial, const bf* d_out, int rows, int width) {
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
EXPORT(bias_gradient, COLUMN_THREADS)
