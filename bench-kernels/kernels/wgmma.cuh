// Matrix products of a warpgroup, four warps in one (wgmma): sm_90a alone.
//
// A product is 64 rows by 8 BLOCKS columns by 16. Its left operand comes from registers, 16 rows a warp, laid out as
// for mma.m16n8k16; its right operand from a tile of 64 numbers a row, whose turned chunks are what the hardware calls
// its 128-byte swizzle, if the tile begins at a multiple of 1024 bytes. Products run behind the program: what they
// read and write may not be touched before group_wait.
//
// Order: writes to shared memory, group_publish, a barrier; hold() what products read and write in registers,
// group_fence, products, group_commit; group_wait, hold() the sums.
#pragma once
#include "tiles.cuh"

#ifdef CAIRN_EMULATOR
#include <deque>
#include <map>

namespace emulator {
// A product that was asked for and not yet waited for.
struct Product {
    float* sums;
    int blocks;
    unsigned a[4];
    size_t left;       // of a left operand in shared memory: bytes from its start; in registers: none
    size_t b;          // bytes from the start of dynamic shared memory
    bool add, transposed, first;
    std::vector<float> before;
};
constexpr size_t NOWHERE = ~size_t{0};
struct Products {
    std::deque<std::vector<Product>> groups;
    std::vector<Product> open;
};
// Of this fibre; a block's fibres stay on one OS thread.
inline Products& products() {
    static thread_local std::map<Fibre*, Products> all;
    return all[machine->fibre];
}

inline float shared_number(size_t at) {
    // The 128-byte swizzle: bits 4 to 6 of an address are turned by bits 7 to 9.
    at ^= at >> 3 & 0x70;
    const unsigned char* from = static_cast<const unsigned char*>(machine->dynamic_shared()) + at;
    machine->check_shared(from, 2, "an operand of wgmma");
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

inline void run_product(Product& product) {
    Machine& here = *machine;
    const Hand* hands = here.exchange(Wait::mma, product.a, sizeof product.a);
    unsigned lane = here.fibre->id % WARP;
    float left[2][16];
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned i = 0; i < 2; i++) {
            unsigned word;
            std::memcpy(&word, hands[lane / 4 * 4 + k % 8 / 2].bytes + 4 * (2 * (k / 8) + i), sizeof word);
            left[i][k] = __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
            size_t row = here.fibre->id % 128 / WARP * 16 + lane / 4 + 8 * i;
            if (product.left != NOWHERE) left[i][k] = shared_number(product.left + 128 * row + 2 * k);
        }
    }
    for (int n = 0; n < 4 * product.blocks; n++) {
        float sum = product.first ? product.before[n] : product.sums[n];
        if (!product.add) sum = 0.0f;
        size_t column = n / 4 * 8 + lane % 4 * 2 + n % 2;
        for (unsigned k = 0; k < 16; k++) {
            size_t at = product.b + (product.transposed ? 128 * k + 2 * column : 128 * column + 2 * k);
            sum += left[n % 4 / 2][k] * shared_number(at);
        }
        product.sums[n] = sum;
    }
}

inline void start_product(float* sums, int blocks, const unsigned (&a)[4], size_t left, size_t b, bool add,
                          bool transposed) {
    Products& mine = products();
    Product product = {sums, blocks, {a[0], a[1], a[2], a[3]}, left, b, add, transposed, true, {}};
    for (const Product& other : mine.open) product.first &= other.sums != sums;
    for (const auto& group : mine.groups) {
        for (const Product& other : group) product.first &= other.sums != sums;
    }
    if (product.first) product.before.assign(sums, sums + 4 * blocks);
    for (int n = 0; n < 4 * blocks; n++) sums[n] = std::nanf("");
    mine.open.push_back(std::move(product));
}
}  // namespace emulator

#define ALIGNED_SHARED(type, name) DYNAMIC_SHARED(type, name)

struct Matrix {
    size_t at;
    __device__ __forceinline__ Matrix plus(int bytes) const { return {at + bytes}; }
};
inline Matrix matrix_of(const void* at) {
    auto* start = static_cast<const unsigned char*>(emulator::machine->dynamic_shared());
    size_t offset = static_cast<const unsigned char*>(at) - start;
    if (offset % 1024 != 0) emulator::machine->fail("an operand of wgmma begins off a multiple of 1024 bytes");
    return {offset};
}
inline void group_publish() {}
inline void group_fence() {}
inline void group_commit() {
    emulator::Products& mine = emulator::products();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int LEFT>
inline void group_wait() {
    emulator::Products& mine = emulator::products();
    while (mine.groups.size() > LEFT) {
        for (emulator::Product& product : mine.groups.front()) emulator::run_product(product);
        mine.groups.pop_front();
    }
}
template <bool TRANSPOSED, bool ADD, int BLOCKS>
inline void group_product(float (&sums)[BLOCKS][4], const unsigned (&a)[4], Matrix b) {
    emulator::start_product(&sums[0][0], BLOCKS, a, emulator::NOWHERE, b.at, ADD, TRANSPOSED);
}
template <bool TRANSPOSED, bool ADD, int BLOCKS>
inline void group_product(float (&sums)[BLOCKS][4], Matrix a, Matrix b) {
    emulator::start_product(&sums[0][0], BLOCKS, {0, 0, 0, 0}, a.at, b.at, ADD, TRANSPOSED);
}
template <int BLOCKS>
inline void hold(float (&)[BLOCKS][4]) {}
template <int COUNT>
inline void hold(unsigned (&)[COUNT][4]) {}

#else

#define ALIGNED_SHARED(type, name)                                                \
    extern __shared__ __align__(1024) unsigned char aligned_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(aligned_shared_bytes)

// A right operand's place, as the instruction takes it: address, 1024 bytes from eight rows to the next, 128-byte
// swizzle. It is moved on by bytes, along a row or by eight rows.
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
template <int BLOCKS>
__device__ __forceinline__ void hold(float (&sums)[BLOCKS][4]) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        asm volatile("" : "+f"(sums[b][0]), "+f"(sums[b][1]), "+f"(sums[b][2]), "+f"(sums[b][3])::"memory");
    }
}
template <int COUNT>
__device__ __forceinline__ void hold(unsigned (&a)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    }
}

// sums = a b, or sums += a b if ADD, over 16: b's rows in the tile are its columns, or its rows if TRANSPOSED. The left
// operand is in registers, or rows of a tile as b's are.
#define SUMS_4 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
#define SUMS_8                                                                                    \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define ONE_SUM(how, b) how(d[b][0]), how(d[b][1]), how(d[b][2]), how(d[b][3])
#define EACH_4(how) ONE_SUM(how, 0), ONE_SUM(how, 1), ONE_SUM(how, 2), ONE_SUM(how, 3)
#define EACH_8(how) EACH_4(how), ONE_SUM(how, 4), ONE_SUM(how, 5), ONE_SUM(how, 6), ONE_SUM(how, 7)
template <bool TRANSPOSED, bool ADD>
__device__ __forceinline__ void group_product(float (&d)[4][4], const unsigned (&a)[4], Matrix b) {
#define TEXT                                                                       \
    "{\n.reg .pred more;\nsetp.ne.b32 more, %17, 0;\n"                             \
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " SUMS_4 \
    "{%19, %20, %21, %22}, %16, more, 1, 1, %18;\n}"
    if constexpr (ADD) {
        asm volatile(TEXT
                     : EACH_4("+f")
                     : "l"(b.bits), "n"(1), "n"(TRANSPOSED ? 1 : 0), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    } else {
        asm volatile(TEXT
                     : EACH_4("=f")
                     : "l"(b.bits), "n"(0), "n"(TRANSPOSED ? 1 : 0), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    }
#undef TEXT
}
template <bool TRANSPOSED, bool ADD>
__device__ __forceinline__ void group_product(float (&d)[4][4], Matrix a, Matrix b) {
#define TEXT                                                                       \
    "{\n.reg .pred more;\nsetp.ne.b32 more, %17, 0;\n"                             \
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " SUMS_4 \
    "%19, %16, more, 1, 1, 0, %18;\n}"
    if constexpr (ADD) {
        asm volatile(TEXT
                     : EACH_4("+f")
                     : "l"(b.bits), "n"(1), "n"(TRANSPOSED ? 1 : 0), "l"(a.bits)
                     : "memory");
    } else {
        asm volatile(TEXT
                     : EACH_4("=f")
                     : "l"(b.bits), "n"(0), "n"(TRANSPOSED ? 1 : 0), "l"(a.bits)
                     : "memory");
    }
#undef TEXT
}
template <bool TRANSPOSED, bool ADD>
__device__ __forceinline__ void group_product(float (&d)[8][4], const unsigned (&a)[4], Matrix b) {
#define TEXT                                                                       \
    "{\n.reg .pred more;\nsetp.ne.b32 more, %33, 0;\n"                             \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_8 \
    "{%35, %36, %37, %38}, %32, more, 1, 1, %34;\n}"
    if constexpr (ADD) {
        asm volatile(TEXT
                     : EACH_8("+f")
                     : "l"(b.bits), "n"(1), "n"(TRANSPOSED ? 1 : 0), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    } else {
        asm volatile(TEXT
                     : EACH_8("=f")
                     : "l"(b.bits), "n"(0), "n"(TRANSPOSED ? 1 : 0), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    }
#undef TEXT
}
template <bool TRANSPOSED, bool ADD>
__device__ __forceinline__ void group_product(float (&d)[8][4], Matrix a, Matrix b) {
#define TEXT                                                                       \
    "{\n.reg .pred more;\nsetp.ne.b32 more, %33, 0;\n"                             \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_8 \
    "%35, %32, more, 1, 1, 0, %34;\n}"
    if constexpr (ADD) {
        asm volatile(TEXT
                     : EACH_8("+f")
                     : "l"(b.bits), "n"(1), "n"(TRANSPOSED ? 1 : 0), "l"(a.bits)
                     : "memory");
    } else {
        asm volatile(TEXT
                     : EACH_8("=f")
                     : "l"(b.bits), "n"(0), "n"(TRANSPOSED ? 1 : 0), "l"(a.bits)
                     : "memory");
    }
#undef TEXT
}
#undef SUMS_4
#undef SUMS_8
#undef ONE_SUM
#undef EACH_4
#undef EACH_8

#endif

// sums = a b over 64: the tile's rows from `row` are the product's columns.
template <int BLOCKS, int ROWS>
__device__ __forceinline__ void group_scores(Sums<1, BLOCKS>& sums, const unsigned (&a)[4][4], const Tile<ROWS, 64>& b,
                                             int row) {
    Matrix from = matrix_of(b.base + b.start + row * 64);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        if (step == 0) {
            group_product<false, false>(sums.value[0], a[step], from);
        } else {
            group_product<false, true>(sums.value[0], a[step], from.plus(32 * step));
        }
    }
}

// sums += a b, where the tile has a row for each column of `a`.
template <int STEPS, int ROWS>
__device__ __forceinline__ void group_add_product(Sums<1, 8>& sums, const unsigned (&a)[STEPS][4],
                                                  const Tile<ROWS, 64>& b, int row) {
    Matrix from = matrix_of(b.base + b.start + row * 64);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        group_product<true, true>(sums.value[0], a[step], from.plus(2048 * step));
    }
}

// As group_scores, with the left operand's 64 rows of a tile from `a_row`.
template <int BLOCKS, int A_ROWS, int ROWS>
__device__ __forceinline__ void group_scores(Sums<1, BLOCKS>& sums, const Tile<A_ROWS, 64>& a, int a_row,
                                             const Tile<ROWS, 64>& b, int row) {
    Matrix left = matrix_of(a.base + a.start + a_row * 64), from = matrix_of(b.base + b.start + row * 64);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        if (step == 0) {
            group_product<false, false>(sums.value[0], left, from);
        } else {
            group_product<false, true>(sums.value[0], left.plus(32 * step), from.plus(32 * step));
        }
    }
}
