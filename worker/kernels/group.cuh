// Products of a warpgroup with tiles of 64 rows of 64 numbers; see ptx.cuh for what may be done when.
#pragma once
#include "tiles.cuh"

constexpr int GROUP_THREADS = 128;

using Rows64 = Tile<64, 64>;

// sums = a b: a's rows are those of a tile, and b's columns the rows of another.
__device__ __forceinline__ void group_scores(Sums<1, 8>& sums, const Rows64& a, const Rows64& b) {
    Matrix left = matrix_of(a.base + a.start), right = matrix_of(b.base + b.start);
    group_product<false, false>(sums.value[0], left, right);
#pragma unroll
    for (int step = 1; step < 4; step++) {
        group_product<false, true>(sums.value[0], left.plus(32 * step), right.plus(32 * step));
    }
}

// sums += a b, where `left` are sums of an earlier product, and the tile has a row for each of their columns.
__device__ __forceinline__ void group_add_product(Sums<1, 8>& sums, const unsigned (&left)[4][4], const Rows64& b) {
    Matrix right = matrix_of(b.base + b.start);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        group_product<true, true>(sums.value[0], left[step], right.plus(2048 * step));
    }
}

// Sums as left operands of the next product, ready for its group_fence.
__device__ __forceinline__ void as_left(unsigned (&left)[4][4], const Sums<1, 8>& sums) {
#pragma unroll
    for (int step = 0; step < 4; step++) sums.as_a(left[step], 0, step);
    hold(left);
}
