// The one place that knows what the kernels run on.
//
// Compiled by NVRTC, the words below are inline PTX for sm_80 and later, but for those at the end;
// no other file holds any. Compiled for the CPU
// (CAIRN_EMULATOR), the emulator gives the same words. No CUDA header is needed: bfloat16 is kept as bits, so that
// libnvrtc alone is enough to build the kernels on a user's machine.
#pragma once

#ifdef CAIRN_EMULATOR
#include "emulator/emulator.h"
#else

#define EXPORT(kernel, threads)

// Shared memory: the launch's dynamic part, and arrays of a size known when compiling.
#define DYNAMIC_SHARED(type, name)                              \
    extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)
// The dynamic part at a multiple of 1024 bytes, as products of warpgroups want it.
#define ALIGNED_SHARED(type, name)                                            \
    extern __shared__ __align__(1024) unsigned char aligned_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(aligned_shared_bytes)
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]

constexpr unsigned WHOLE_WARP = 0xffffffffu;

// 2^x; results below the normal numbers become 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to bfloat16, `low` in the low half.
__device__ __forceinline__ unsigned pack2(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// One float rounded to bfloat16.
__device__ __forceinline__ unsigned bf_bits(float value) { return pack2(value, 0.0f) & 0xffffu; }

// 16 bytes: one access of a thread.
struct __align__(16) Words {
    unsigned word[4];
};
__device__ __forceinline__ Words load_words(const void* from) {
    uint4 got = *reinterpret_cast<const uint4*>(from);
    return {{got.x, got.y, got.z, got.w}};
}
__device__ __forceinline__ void store_words(void* to, const Words& words) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
}

// Words that the compiler may not keep unpacked, in twice the registers, from one use to the next.
__device__ __forceinline__ void keep_packed(Words& words) {
    asm volatile("" : "+r"(words.word[0]), "+r"(words.word[1]), "+r"(words.word[2]), "+r"(words.word[3]));
}

// 8 bytes, aligned to 8.
__device__ __forceinline__ void store_pair(void* to, unsigned low, unsigned high) {
    *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
}

__device__ __forceinline__ unsigned shared_address(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Copies 16 (or 4) bytes from global to shared memory without waiting; writes zeros, and reads nothing, if not `there`.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 4 : 0)
                 : "memory");
}
// Closes a group of copies; waits until all but the newest LEFT groups of this thread have arrived.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices of bfloat16 from shared memory; lane l brings the place of row l % 8 of matrix l / 8, in numbers
// from `base`: addresses in shared memory are of 32 bits, so the kernels compute with no more.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* base, int offset) {
    unsigned row = shared_address(base) + 2 * offset;
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row)
                     : "memory");
    }
}

// sums[16 x 8] += a[16 x 16] b[16 x 8] on the tensor cores, float32 sums of bfloat16 products.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- products of warpgroups, four warps in one (wgmma): sm_90a alone ------------------------------------------------
//
// A product is 64 rows by 64 columns by 16. Operands in shared memory lie in tiles of 64 numbers a row, whose turned
// chunks are what the hardware calls its 128-byte swizzle, if the tile begins at a multiple of 1024 bytes. A left
// operand in registers has 16 rows a warp, laid out as for mma.m16n8k16. Products run behind the program: what they read
// and write may not be touched before group_wait.
//
// Order: writes to shared memory, group_publish, a barrier; hold() what products read and write in registers,
// group_fence, products, group_commit; group_wait, hold() the sums.
//
// No left operand may stay in registers from one round of a loop to the next: ptxas of CUDA 13.0 gives it and another
// product's left operand one place and forgets that it is still wanted. It comes from shared memory.

// An operand's place in shared memory, as the instruction takes it: address, 1024 bytes from eight rows to the next,
// 128-byte swizzle. It is moved on by bytes, along a row or by eight rows.
struct Matrix {
    unsigned long long bits;
    __device__ __forceinline__ Matrix plus(int bytes) const { return {bits + (bytes >> 4)}; }
};
__device__ __forceinline__ Matrix matrix_of(const void* at) {
    unsigned long long row = (shared_address(at) & 0x3ffffu) >> 4;
    return {row | 64ull << 16 | 64ull << 32 | 1ull << 62};
}

// Makes this thread's writes to shared memory visible to the products of those who meet it at the next barrier.
__device__ __forceinline__ void group_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the newest LEFT groups are done.
template <int LEFT>
__device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The compiler may not move the registers' uses across this.
__device__ __forceinline__ void hold(float (&sums)[8][4]) {
#pragma unroll
    for (int b = 0; b < 8; b++) {
        asm volatile("" : "+f"(sums[b][0]), "+f"(sums[b][1]), "+f"(sums[b][2]), "+f"(sums[b][3])::"memory");
    }
}
__device__ __forceinline__ void hold(unsigned (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    }
}

// sums = a b, or sums += a b if ADD, 64 x 64 over 16: b's rows in the tile are its columns, or its rows if TRANSPOSED.
// The left operand is in registers, or rows of a tile. Operands of the text: 32 sums, b, ADD, TRANSPOSED, a.
#define GROUP_PRODUCT(left)                                                                       \
    "{\n.reg .pred more;\nsetp.ne.b32 more, %33, 0;\n"                                            \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " left ", %34;\n}"
#define FOUR_SUMS(how, b) how(d[b][0]), how(d[b][1]), how(d[b][2]), how(d[b][3])
#define EACH_SUM(how)                                                                                         \
    FOUR_SUMS(how, 0), FOUR_SUMS(how, 1), FOUR_SUMS(how, 2), FOUR_SUMS(how, 3), FOUR_SUMS(how, 4),            \
        FOUR_SUMS(how, 5), FOUR_SUMS(how, 6), FOUR_SUMS(how, 7)
template <bool TRANSPOSED, bool ADD>
__device__ __forceinline__ void group_product(float (&d)[8][4], const unsigned (&a)[4], Matrix b) {
    if constexpr (ADD) {
        asm volatile(GROUP_PRODUCT("{%35, %36, %37, %38}, %32, more, 1, 1")
                     : EACH_SUM("+f")
                     : "l"(b.bits), "n"(1), "n"(TRANSPOSED ? 1 : 0), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    } else {
        asm volatile(GROUP_PRODUCT("{%35, %36, %37, %38}, %32, more, 1, 1")
                     : EACH_SUM("=f")
                     : "l"(b.bits), "n"(0), "n"(TRANSPOSED ? 1 : 0), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    }
}
template <bool TRANSPOSED, bool ADD>
__device__ __forceinline__ void group_product(float (&d)[8][4], Matrix a, Matrix b) {
    if constexpr (ADD) {
        asm volatile(GROUP_PRODUCT("%35, %32, more, 1, 1, 0")
                     : EACH_SUM("+f")
                     : "l"(b.bits), "n"(1), "n"(TRANSPOSED ? 1 : 0), "l"(a.bits)
                     : "memory");
    } else {
        asm volatile(GROUP_PRODUCT("%35, %32, more, 1, 1, 0")
                     : EACH_SUM("=f")
                     : "l"(b.bits), "n"(0), "n"(TRANSPOSED ? 1 : 0), "l"(a.bits)
                     : "memory");
    }
}
#undef GROUP_PRODUCT
#undef FOUR_SUMS
#undef EACH_SUM

#endif

// A bfloat16 number: the upper half of a float32.
struct bf {
    unsigned short bits;
};
