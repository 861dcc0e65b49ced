// Exact gradient sums in 32 bits, the way back from them, and what clipping needs.
//
// The canonical space is cut into blocks of `block_elements`; a block's exponent e gives it a grid of cells 2^e. A
// gradient is rounded once to a whole number of cells and whole numbers are added, which no order can change. The host
// learns from the largest magnitudes, kept as the bits of |g| (which order as whole numbers do, with NaN above infinity
// above all numbers), whether a block's values fitted, and chooses the next exponents.
//
// Floors, bytes an element: accumulate_blocks 12 (8 without add), gradient_from_blocks 8, square_sums 4.
#include "common.cuh"

constexpr int EXACT_THREADS = 256;
constexpr int EXACT_VECTORS = 4;                                            // of four elements, for each thread
constexpr int EXACT_ELEMENTS = EXACT_THREADS * EXACT_VECTORS * 4;           // of a CTA
constexpr int SQUARE_THREADS = 256;

// 2^exponent for -127 <= exponent <= 127, made of its bits; 2^-127 is the one below the normal numbers.
__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(exponent > -127 ? static_cast<unsigned>(exponent + 127) << 23 : 1u << 22);
}

// One gradient in cells of the grid, with saturation; NaN becomes 0. The product is exact unless it overflows, which
// saturates too, or is far below half a cell, which becomes 0 as it should.
__device__ __forceinline__ int on_grid(float gradient, float cells, int limit) {
    int q = __float2int_rn(__fmul_rn(gradient, cells));
    return max(-limit, min(limit, q));
}

// Raises the maxima by the magnitudes of four elements from `first` on. A warp whose 128 elements lie in one block
// raises once.
__device__ __forceinline__ void raise(unsigned* maxima, const float (&g)[4], long long first, int left, long long block,
                                      int block_elements, bool one_block) {
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned bits = __float_as_uint(g[i]) & 0x7fffffffu;
        if (one_block) {
            most = bits > most ? bits : most;
        } else if (i < left) {
            atomicMax(maxima + (first + i) / block_elements, bits);
        }
    }
    if (one_block) {
        most = warp_max(most);
        if (threadIdx.x % LANES == 0) atomicMax(maxima + block, most);
    }
}

// sums = q, or sums + q where `add`; maxima[block] = max(maxima[block], bits of |g|). `maxima` must begin a step at 0.
// Exponents are -127..127. limit is at most 2^31 - 1 over the count of additions.
//
// Launch: block 256, grid ceil(n / 4096), no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(EXACT_THREADS)
    accumulate_blocks(int* sums, unsigned* maxima, const float* gradient, const signed char* exponents, long long n,
                      int block_elements, int limit, int add) {
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    long long base = static_cast<long long>(blockIdx.x) * EXACT_ELEMENTS + warp * (EXACT_VECTORS * 4 * LANES);
    bool vector = aligned16(gradient) && aligned16(sums);
    // Divisions of 64 bits are slow: one a warp where all that it has lies in one block.
    long long base_block = base / block_elements;
    bool whole = base - base_block * block_elements + EXACT_VECTORS * 4 * LANES <= block_elements;
    float g[EXACT_VECTORS][4];
#pragma unroll
    for (int v = 0; v < EXACT_VECTORS; v++) {
        long long first = base + (v * LANES + lane) * 4;
        load4(gradient + first, left_of(n, first, 4), vector, g[v]);
    }
#pragma unroll
    for (int v = 0; v < EXACT_VECTORS; v++) {
        long long start = base + v * LANES * 4, first = start + lane * 4;
        int left = left_of(n, first, 4);
        if (start >= n) break;
        long long block = whole ? base_block : start / block_elements;
        bool one_block = whole || start - block * block_elements + LANES * 4 <= block_elements;
        float cells = power_of_two(-exponents[block]);
        float old[4] = {0, 0, 0, 0}, sum[4];
        if (add) load4(reinterpret_cast<const float*>(sums) + first, left, vector, old);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!one_block && i < left) cells = power_of_two(-exponents[(first + i) / block_elements]);
            // The bits of whole numbers travel through float registers; nothing computes with them as floats.
            int q = on_grid(g[v][i], cells, limit) + static_cast<int>(__float_as_uint(old[i]));
            sum[i] = __uint_as_float(static_cast<unsigned>(q));
        }
        store4(reinterpret_cast<float*>(sums) + first, sum, left, vector);
        raise(maxima, g[v], first, left, block, block_elements, one_block);
    }
}
EXPORT(accumulate_blocks, EXACT_THREADS)

// gradient[i] = float(double(sums[first + i]) 2^exponent scale): two roundings, to double by scale and to float.
//
// Launch: block 256, grid ceil(n / 1024), no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(EXACT_THREADS)
    gradient_from_blocks(float* gradient, const int* sums, const signed char* exponents, long long first, long long n,
                         int block_elements, double scale) {
    long long at = (static_cast<long long>(blockIdx.x) * EXACT_THREADS + threadIdx.x) * 4;
    int left = left_of(n, at, 4);
    if (left == 0) return;
    const float* from = reinterpret_cast<const float*>(sums) + first + at;
    float bits[4], result[4];
    load4(from, left, aligned16(from), bits);
    long long block = (first + at) / block_elements;
    bool one_block = first + at - block * block_elements + 4 <= block_elements;
    double cell = power_of_two(exponents[block]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (!one_block && i < left) cell = power_of_two(exponents[(first + at + i) / block_elements]);
        double sum = static_cast<double>(static_cast<int>(__float_as_uint(bits[i])));
        result[i] = static_cast<float>(__dmul_rn(__dmul_rn(sum, cell), scale));
    }
    store4(gradient + at, result, left, aligned16(gradient));
}
EXPORT(gradient_from_blocks, EXACT_THREADS)

// out[b] = the sum of squares of elements b * block .. (b + 1) * block, the last block may be short, in float64.
//
// Launch: block 256, grid ceil(n / block), no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    square_sums(double* out, const float* gradient, long long n, int block) {
    long long start = static_cast<long long>(blockIdx.x) * block;
    int count = left_of(n, start, block);
    const float* from = gradient + start;
    bool vector = aligned16(from);
    double sums[2] = {0, 0};
    for (int i = threadIdx.x * 4; i < count; i += SQUARE_THREADS * 8) {
        // Two accesses under way at a time; squares of floats are exact in double.
        float g[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = i + half * SQUARE_THREADS * 4;
            load4(from + at, count - at, vector, g[half]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            double value = g[j / 4][j % 4];
            sums[j / 4] += value * value;
        }
    }
    double sum = group_sum(sums[0] + sums[1], SQUARE_THREADS / LANES);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
EXPORT(square_sums, SQUARE_THREADS)

// out[0] = the smallest index of an element of the block that is not finite, or -1: launched only after a fault.
// `first_bad_block` is the block's number, its elements begin at first_bad_block * block_elements.
//
// Launch: block 256, grid 1, no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(EXACT_THREADS)
    find_fault(long long* out, const float* gradient, long long n, long long first_bad_block, int block_elements) {
    SHARED_ARRAY(unsigned, nearest, EXACT_THREADS / LANES);
    long long start = first_bad_block * block_elements;
    int count = left_of(n, start, block_elements);
    // The complement of the index, so that the largest is the first; 0 means none.
    unsigned found = 0;
    for (int i = threadIdx.x; i < count && found == 0; i += EXACT_THREADS) {
        unsigned bits = __float_as_uint(gradient[start + i]) & 0x7fffffffu;
        if (bits >= 0x7f800000u) found = ~static_cast<unsigned>(i);
    }
    found = warp_max(found);
    if (threadIdx.x % LANES == 0) nearest[threadIdx.x / LANES] = found;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < EXACT_THREADS / LANES; i++) found = max(found, nearest[i]);
    out[0] = found == 0 ? -1 : start + static_cast<int>(~found);
}
EXPORT(find_fault, EXACT_THREADS)
