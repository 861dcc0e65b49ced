// A softmax that seldom rescales.
#pragma once
#include "attention.cuh"

// Whether any lane says so.
#ifdef CAIRN_EMULATOR
inline bool any_lane(bool mine) { return warp_max(mine ? 1 : 0) != 0; }
#else
__device__ __forceinline__ bool any_lane(bool mine) { return __any_sync(WHOLE_WARP, mine); }
#endif

// As softmax, but the sums are scaled to a larger score only where it is 2^8 times larger: probabilities stay far from
// what bfloat16 and float32 can hold, and the last division makes up for it. Rows::most begins at LAZY_LEAST.
constexpr float LAZY_LEAST = -1.0e30f;

template <int TILES, int BLOCKS, int WIDE>
__device__ __forceinline__ void lazy_softmax(Sums<TILES, BLOCKS>& s, Rows<TILES>& rows, Sums<TILES, WIDE>& out,
                                             float scale2) {
    float most[TILES][2];
    bool larger = false;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float high = rows.most[t][half];
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                high = fmaxf(high, fmaxf(s.value[t][b][2 * half], s.value[t][b][2 * half + 1]));
            }
            high = fmaxf(high, __shfl_xor_sync(WHOLE_WARP, high, 1));
            high = fmaxf(high, __shfl_xor_sync(WHOLE_WARP, high, 2));
            most[t][half] = high;
            larger = larger || (high - rows.most[t][half]) * scale2 > 8.0f;
        }
    }
    if (any_lane(larger)) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float shrink = exp2_fast((rows.most[t][half] - most[t][half]) * scale2);
                rows.most[t][half] = most[t][half];
                rows.sum[t][half] *= shrink;
#pragma unroll
                for (int b = 0; b < WIDE; b++) {
                    out.value[t][b][2 * half] *= shrink;
                    out.value[t][b][2 * half + 1] *= shrink;
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float high = rows.most[t][half] * scale2;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s.value[t][b][i] = exp2_fast(s.value[t][b][i] * scale2 - high);
                    rows.sum[t][half] += s.value[t][b][i];
                }
            }
        }
    }
}
