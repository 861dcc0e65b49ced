// Rotary positions (Su et al., 2021) on queries and keys in place, in the half-split layout: element i of a head pairs
// with element i + head_dim / 2.
//
// Floor: 4 bytes a number of the queries and keys; the table stays in the caches.
//
// Launch: block 256, grid ceil(rows / 8), no dynamic shared memory.
#include "common.cuh"

constexpr int ROPE_THREADS = 256;
constexpr int ROPE_ROWS = 8;

// Turns the pairs (low[i], high[i]) by the angles whose cosines and sines are given.
__device__ __forceinline__ void turn(float (&low)[8], float (&high)[8], const float* cosines, const float* sines,
                                     int left, bool vector, float sign) {
#pragma unroll
    for (int part = 0; part < 8; part += 4) {
        float cosine[4], sine[4];
        load4(cosines + part, left - part, vector, cosine);
        load4(sines + part, left - part, vector, sine);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float a = low[part + i], b = high[part + i], s = sine[i] * sign;
            low[part + i] = a * cosine[i] - b * s;
            high[part + i] = b * cosine[i] + a * s;
        }
    }
}

// Rows are [q heads | k heads | v heads]; the values stay. table: for each position of the sequence head_dim / 2
// cosines, then as many sines. `inverse` turns back, which is the backward.
extern "C" __global__ void __launch_bounds__(ROPE_THREADS)
    rope(bf* qkv, const float* table, int rows, int sequence, int heads, int kv_heads, int head_dim, int inverse) {
    int half = head_dim / 2, units = (half + 7) / 8, turned = heads + kv_heads, each = turned * units;
    bool vector = half % 8 == 0;
    long long width = static_cast<long long>(heads + 2 * kv_heads) * head_dim;
    int begin = blockIdx.x * ROPE_ROWS, count = min(ROPE_ROWS, rows - begin);
    for (int item = threadIdx.x; item < count * each; item += ROPE_THREADS) {
        int row = begin + item / each, rest = item % each, head = rest / units, column = rest % units * 8;
        int left = half - column;
        bf* low_at = qkv + row * width + head * head_dim + column;
        bf* high_at = low_at + half;
        const float* angles = table + static_cast<long long>(row % sequence) * head_dim + column;
        float low[8], high[8];
        unpack(load8(low_at, left, vector), low);
        unpack(load8(high_at, left, vector), high);
        turn(low, high, angles, angles + half, left, vector, inverse ? -1.0f : 1.0f);
        store8(low_at, packed(low), left, vector);
        store8(high_at, packed(high), left, vector);
    }
}
EXPORT(rope, ROPE_THREADS)
