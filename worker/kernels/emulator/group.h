// The twins of ptx.cuh's products of warpgroups. They run when they are waited for; until then their sums are NaN, and
// what they read in shared memory is looked at only then.
#pragma once
#include <deque>
#include <map>

#include "machine.h"

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
