// CUDA's words on the CPU: enough of them for the kernels of this directory, which see this file instead of a GPU.
//
// Qualifiers vanish; thread and block indices come from the running fibre; barriers and warp-wide operations hand over
// to the scheduler (machine.h); arithmetic intrinsics become the C++ operations with the same rounding. The tensor-core
// and copy instructions of ptx.cuh have their twins at the end: their register layouts are those of the PTX manual.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"
#include "registry.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (emulator::machine->fibre->thread)
#define blockIdx (emulator::machine->block_index)
#define blockDim (emulator::machine->launch->block)
#define gridDim (emulator::machine->launch->grid)

// Shared memory: the launch's dynamic part, and arrays of a size known when compiling.
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulator::machine->dynamic_shared())
#define SHARED_ARRAY(type, name, count)  \
    static const char name##_tag = 0;    \
    type* const name = static_cast<type*>(emulator::machine->shared_array(&name##_tag, sizeof(type) * (count)))

inline void __syncthreads() { emulator::machine->wait(emulator::Wait::block_barrier); }
inline void __syncwarp() { emulator::machine->wait(emulator::Wait::warp_barrier); }

constexpr unsigned WHOLE_WARP = 0xffffffffu;

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from) {
    if (mask != WHOLE_WARP) emulator::machine->fail("shuffles within a part of a warp");
    const emulator::Hand* hands = emulator::machine->exchange(emulator::Wait::shuffle, &value, sizeof value);
    std::memcpy(&value, hands[from & 31].bytes, sizeof value);
    return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return __shfl_sync(mask, value, static_cast<int>(emulator::machine->fibre->id % emulator::WARP) ^ distance);
}

// Blocks of one launch may run on several OS threads, so these are atomic in earnest.
inline unsigned atomicMax(unsigned* at, unsigned value) {
    unsigned old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The functions with _rn round once and are never joined into a fused multiply-add.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }

// Nearest, ties to even; out of range becomes the nearest end, NaN becomes 0.
inline int __float2int_rn(float value) {
    if (std::isnan(value)) return 0;
    if (value >= 2147483648.0f) return std::numeric_limits<int>::max();
    if (value < -2147483648.0f) return std::numeric_limits<int>::min();
    return static_cast<int>(std::nearbyint(value));
}

template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }

// --- the twins of ptx.cuh -------------------------------------------------------------------------------------------
inline float exp2_fast(float x) { return std::exp2(x); }

inline unsigned bf_bits(float value) {
    unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
// Two floats rounded to bfloat16, `low` in the low half.
inline unsigned pack2(float low, float high) { return bf_bits(low) | bf_bits(high) << 16; }

struct alignas(16) Words {
    unsigned word[4];
};
inline Words load_words(const void* from) {
    emulator::machine->check(from, sizeof(Words), sizeof(Words), "a 16-byte load");
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
}
inline void store_words(void* to, const Words& words) {
    emulator::machine->check(to, sizeof(Words), sizeof(Words), "a 16-byte store");
    std::memcpy(to, &words, sizeof words);
}

inline void keep_packed(Words&) {}

inline void store_pair(void* to, unsigned low, unsigned high) {
    emulator::machine->check(to, 8, 8, "an 8-byte store");
    unsigned both[2] = {low, high};
    std::memcpy(to, both, sizeof both);
}

inline void copy_async_16(void* to, const void* from, bool there) {
    emulator::machine->copy_async(to, from, 16, there ? 16 : 0);
}
inline void copy_async_4(void* to, const void* from, bool there) {
    emulator::machine->copy_async(to, from, 4, there ? 4 : 0);
}
inline void copy_commit() { emulator::machine->copy_commit(); }
template <int LEFT>
inline void copy_wait() { emulator::machine->copy_wait(LEFT); }

// Lane l brings the place of row l % 8 of matrix l / 8. Of each 8 x 8 matrix it gets, in one register, elements
// 2 (l % 4) and the next of row l / 4; transposed, those of column l / 4.
template <bool TRANSPOSED>
inline void load_matrices(unsigned (&to)[4], const void* base, int offset) {
    const void* row = static_cast<const unsigned char*>(base) + 2 * offset;
    emulator::Machine& here = *emulator::machine;
    here.check_shared(row, 16, "a row of ldmatrix");
    const emulator::Hand* hands = here.exchange(emulator::Wait::ldmatrix, &row, sizeof row);
    unsigned lane = here.fibre->id % emulator::WARP;
    for (unsigned matrix = 0; matrix < 4; matrix++) {
        for (unsigned half = 0; half < 2; half++) {
            unsigned at = lane / 4, along = lane % 4 * 2 + half;
            unsigned i = TRANSPOSED ? along : at, j = TRANSPOSED ? at : along;
            const unsigned char* from;
            std::memcpy(&from, hands[matrix * 8 + i].bytes, sizeof from);
            uint16_t element;
            std::memcpy(&element, from + 2 * j, sizeof element);
            to[matrix] = half == 0 ? element : to[matrix] | static_cast<unsigned>(element) << 16;
        }
    }
    // Nobody may overwrite the rows before all lanes have read them; the instruction is one step for the whole warp.
    here.exchange(emulator::Wait::ldmatrix, &row, 0);
}

// sums[16 x 8] += a[16 x 16] b[16 x 8], both bfloat16: m16n8k16, a by rows, b by columns.
inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulator::Machine& here = *emulator::machine;
    const emulator::Hand* hands = here.exchange(emulator::Wait::mma, mine, sizeof mine);
    unsigned lane = here.fibre->id % emulator::WARP;
    auto word = [hands](unsigned from, unsigned index) {
        unsigned value;
        std::memcpy(&value, hands[from].bytes + 4 * index, sizeof value);
        return value;
    };
    float left[2][16], right[2][16];
    for (unsigned k = 0; k < 16; k += 2) {
        unsigned quad = k % 8 / 2, part = k / 8;
        for (unsigned i = 0; i < 2; i++) {
            unsigned x = word(lane / 4 * 4 + quad, 2 * part + i), y = word((lane % 4 * 2 + i) * 4 + quad, 4 + part);
            left[i][k] = __uint_as_float(x << 16);
            left[i][k + 1] = __uint_as_float(x & 0xffff0000u);
            right[i][k] = __uint_as_float(y << 16);
            right[i][k + 1] = __uint_as_float(y & 0xffff0000u);
        }
    }
    for (unsigned i = 0; i < 4; i++) {
        for (unsigned k = 0; k < 16; k++) sums[i] += left[i / 2][k] * right[i % 2][k];
    }
}

#include "group.h"
