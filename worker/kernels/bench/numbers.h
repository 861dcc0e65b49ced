// Operands made of pseudo-random numbers, and results brought back and compared.
#pragma once
#include <cmath>
#include <random>

#include "device.h"

inline uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline float widened(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Normal numbers, by the million: a pool of a prime length, repeated.
inline const std::vector<float>& pool() {
    static std::vector<float> numbers;
    if (numbers.empty()) {
        std::mt19937 random(7);
        numbers.resize(1000003);
        for (float& x : numbers) {
            float sum = 0.0f;
            for (int i = 0; i < 4; i++) sum += static_cast<float>(random() >> 8) / (1 << 24) - 0.5f;
            x = sum * 1.7320508f;
        }
    }
    return numbers;
}

template <class T, class F>
void repeat(Device& device, Address at, size_t count, F made) {
    size_t period = std::min(count, pool().size());
    std::vector<T> data(period);
    for (size_t i = 0; i < period; i++) data[i] = made(i);
    device.upload(at, data.data(), period * sizeof(T));
    for (size_t have = period; have < count; have *= 2) {
        device.copy(at + have * sizeof(T), at, std::min(have, count - have) * sizeof(T));
    }
}

inline Address halves(Device& device, size_t count, float scale, float offset = 0.0f, size_t from = 0) {
    Address at = device.allocate(count * 2);
    repeat<uint16_t>(device, at, count,
                     [&](size_t i) { return rounded(offset + scale * pool()[(i + from) % pool().size()]); });
    return at;
}
inline Address floats(Device& device, size_t count, float scale, float offset = 0.0f) {
    Address at = device.allocate(count * 4);
    repeat<float>(device, at, count, [&](size_t i) { return offset + scale * pool()[i]; });
    return at;
}

// What a kernel wrote: brought back in part, if it is much.
struct Output {
    Address at;
    size_t count;
    bool half;
    size_t parts = 1;   // rows of partial sums, compared added up
};

inline std::vector<float> fetch(Device& device, const Output& output) {
    constexpr size_t MOST = 1 << 22;
    std::vector<float> numbers;
    auto bring = [&](size_t first, size_t count) {
        if (output.half) {
            std::vector<uint16_t> bits(count);
            device.download(bits.data(), output.at + 2 * first, 2 * count);
            for (uint16_t x : bits) numbers.push_back(widened(x));
        } else {
            size_t start = numbers.size();
            numbers.resize(start + count);
            device.download(numbers.data() + start, output.at + 4 * first, 4 * count);
        }
    };
    if (output.count <= 2 * MOST) {
        bring(0, output.count);
    } else {
        bring(0, MOST);
        bring(output.count - MOST, MOST);
    }
    return numbers;
}

inline std::vector<float> added(const std::vector<float>& parts, size_t count) {
    std::vector<double> sums(parts.size() / count);
    for (size_t i = 0; i < parts.size(); i++) sums[i % sums.size()] += parts[i];
    return {sums.begin(), sums.end()};
}

struct Difference {
    double most = 0.0, of = 0.0;
    void add(const std::vector<float>& a, const std::vector<float>& b) {
        for (size_t i = 0; i < a.size(); i++) {
            double off = std::fabs(static_cast<double>(a[i]) - b[i]);
            if (std::isnan(a[i]) && std::isnan(b[i])) off = 0.0;
            if (!(off <= 1e30)) off = 1e30;
            most = std::max(most, off);
            of = std::max(of, std::fabs(static_cast<double>(b[i])));
        }
    }
    double relative() const { return of > 0.0 ? most / of : most; }
};
