// The twins of ptx.cuh's products of warpgroups. They run when they are waited for; until then their sums are NaN, and
// what they read in shared memory is looked at only then.
#pragma once
#include <cmath>
#include <cstring>

#include "machine.h"

namespace emulator {
constexpr size_t NOWHERE = ~size_t{0};

// A number of a tile, in bytes from the start of dynamic shared memory.
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
    for (unsigned n = 0; n < 32; n++) {
        float sum = product.first ? product.before[n] : product.sums[n];
        if (!product.add) sum = 0.0f;
        size_t column = n / 4 * 8 + lane % 4 * 2 + n % 2;
        for (unsigned k = 0; k < 16; k++) {
            size_t at = product.transposed ? 128 * k + 2 * column : 128 * column + 2 * k;
            sum += left[n % 4 / 2][k] * shared_number(product.right + at);
        }
        product.sums[n] = sum;
    }
}

inline void start_product(float* sums, const unsigned (&a)[4], size_t left, size_t right, bool add, bool transposed) {
    Fibre& mine = *machine->fibre;
    Product product = {sums, {a[0], a[1], a[2], a[3]}, left, right, add, transposed, true, {}};
    for (const Product& other : mine.open) product.first &= other.sums != sums;
    for (const auto& group : mine.products) {
        for (const Product& other : group) product.first &= other.sums != sums;
    }
    for (int n = 0; n < 32; n++) {
        product.before[n] = sums[n];
        sums[n] = std::nanf("");
    }
    mine.open.push_back(product);
}
}  // namespace emulator

#define ALIGNED_SHARED(type, name) DYNAMIC_SHARED(type, name)

struct Matrix {
    size_t at;
    Matrix plus(int bytes) const { return {at + bytes}; }
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
    emulator::Fibre& mine = *emulator::machine->fibre;
    mine.products.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int LEFT>
inline void group_wait() {
    auto& groups = emulator::machine->fibre->products;
    while (groups.size() > LEFT) {
        for (emulator::Product& product : groups.front()) emulator::run_product(product);
        groups.erase(groups.begin());
    }
}
template <bool TRANSPOSED, bool ADD>
inline void group_product(float (&sums)[8][4], const unsigned (&a)[4], Matrix b) {
    emulator::start_product(&sums[0][0], a, emulator::NOWHERE, b.at, ADD, TRANSPOSED);
}
template <bool TRANSPOSED, bool ADD>
inline void group_product(float (&sums)[8][4], Matrix a, Matrix b) {
    emulator::start_product(&sums[0][0], {0, 0, 0, 0}, a.at, b.at, ADD, TRANSPOSED);
}
inline void hold(float (&)[8][4]) {}
inline void hold(unsigned (&)[4][4]) {}
