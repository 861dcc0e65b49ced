// What most kernels share: bfloat16 numbers eight at a time, and sums over a warp or a block.
//
// A thread's unit of work is eight neighbouring bfloat16 numbers, 16 bytes, one vector access. Where a row's width is
// not a multiple of eight or a tensor begins off a 16-byte boundary, the same unit is moved number by number, so each
// kernel is written once. All sums have an order fixed by the shape.
#pragma once
#include "ptx.cuh"

constexpr int LANES = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ bool aligned16(const void* at) { return (reinterpret_cast<size_t>(at) & 15u) == 0; }

__device__ __forceinline__ float to_float(bf value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ __forceinline__ bf to_bf(float value) { return {static_cast<unsigned short>(bf_bits(value))}; }

// Number i of eight packed ones; i must be known when compiling, or the words go to local memory.
__device__ __forceinline__ float unpacked(const Words& words, int i) {
    unsigned word = words.word[i / 2];
    return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

__device__ __forceinline__ void unpack(const Words& words, float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = unpacked(words, i);
}

__device__ __forceinline__ Words packed(const float (&from)[8]) {
    Words words;
#pragma unroll
    for (int i = 0; i < 4; i++) words.word[i] = pack2(from[2 * i], from[2 * i + 1]);
    return words;
}

// Eight numbers moved on by one: the first falls out, `next` comes in at the end.
__device__ __forceinline__ void shift_in(Words& words, unsigned next) {
#pragma unroll
    for (int i = 0; i < 3; i++) words.word[i] = words.word[i] >> 16 | words.word[i + 1] << 16;
    words.word[3] = words.word[3] >> 16 | next << 16;
}

// The next eight numbers of a row that has `left` (which may be less, or none): zeros beyond its end. `vector` says
// that the address is aligned and all eight are there whenever any is. The slow way is kept small, not fast: unrolled,
// it would take registers from the fast one.
__device__ __forceinline__ Words load8(const bf* from, int left, bool vector) {
    Words words = {{0, 0, 0, 0}};
    if (vector) {
        if (left > 0) words = load_words(from);
    } else if (left > 0) {
#pragma unroll 1
        for (int i = 0; i < 8; i++) shift_in(words, i < left ? from[i].bits : 0u);
    }
    return words;
}

// Stores eight numbers, or as many as are `left`.
__device__ __forceinline__ void store8(bf* to, Words words, int left, bool vector) {
    if (vector) {
        if (left > 0) store_words(to, words);
    } else {
#pragma unroll 1
        for (int i = 0; i < min(left, 8); i++) {
            to[i].bits = static_cast<unsigned short>(words.word[0]);
            shift_in(words, 0u);
        }
    }
}

// Four floats in one access, or as many as are `left`; zeros beyond.
__device__ __forceinline__ void load4(const float* from, int left, bool vector, float (&to)[4]) {
    if (vector && left >= 4) {
        Words words = load_words(from);
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = __uint_as_float(words.word[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = i < left ? from[i] : 0.0f;
    }
}

__device__ __forceinline__ void store4(float* to, const float (&from)[4], int left, bool vector) {
    if (vector && left >= 4) {
        Words words;
#pragma unroll
        for (int i = 0; i < 4; i++) words.word[i] = __float_as_uint(from[i]);
        store_words(to, words);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i < left) to[i] = from[i];
        }
    }
}

// How many of `n` elements there are from `first` on, at most `most`, at least none.
__device__ __forceinline__ int left_of(long long n, long long first, int most) {
    long long left = n - first;
    return left <= 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// The sum over the warp's lanes, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(WHOLE_WARP, value, distance);
    }
    return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        T other = __shfl_xor_sync(WHOLE_WARP, value, distance);
        value = other > value ? other : value;
    }
    return value;
}

// The sum over each run of `warps` warps of a block of at most 16, in every thread of the run. All threads must call.
template <class T>
__device__ __forceinline__ T group_sum(T value, int warps) {
    SHARED_ARRAY(T, parts, 16);
    value = warp_sum(value);
    if (warps == 1) return value;
    int warp = threadIdx.x / LANES;
    __syncthreads();   // the parts of an earlier call have been read
    if (threadIdx.x % LANES == 0) parts[warp] = value;
    __syncthreads();
    int first = warp / warps * warps;
    value = parts[first];
    for (int i = 1; i < warps; i++) value += parts[first + i];
    return value;
}
