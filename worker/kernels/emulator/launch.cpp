// The emulator's C interface: launches kernels by name, on a few OS threads, and says in words what went wrong.
#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <thread>

#include "machine.h"
#include "registry.h"

namespace emulator {
namespace {

constexpr unsigned MOST_OS_THREADS = 4;
constexpr uint64_t THREADS_WORTH_ANOTHER = 4096;   // emulated threads that pay for starting an OS thread

std::mutex memory_lock;
std::map<uintptr_t, uintptr_t> memory;              // first byte and end of each registered range

std::vector<std::pair<uintptr_t, uintptr_t>> registered() {
    std::lock_guard<std::mutex> guard(memory_lock);
    return {memory.begin(), memory.end()};
}

// What is wrong with a launch before it begins; empty if nothing is.
std::string refusal(const Kernel& kernel, const Launch& launch, size_t count) {
    uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    if (count != kernel.arguments) {
        return "takes " + std::to_string(kernel.arguments) + " arguments, was given " + std::to_string(count);
    }
    if (threads != kernel.threads) {
        return "is written for blocks of " + std::to_string(kernel.threads) + " threads, was given " +
               std::to_string(threads);
    }
    if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return "was given an empty grid";
    if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535) {
        return "was given a grid larger than a GPU takes";
    }
    if (launch.shared_bytes > MOST_SHARED) {
        return "was given " + std::to_string(launch.shared_bytes) + " bytes of shared memory, more than a block has";
    }
    return "";
}

// A block number's place in a seeded order of all: an affine walk with a step that shares no factor with the count.
struct Order {
    uint64_t count, step, from;

    Order(uint64_t blocks, uint64_t seed) : count(blocks), step(1), from(0) {
        if (seed == 0) return;
        from = seed * 0x9e3779b97f4a7c15ull % count;
        step = (seed * 0xbf58476d1ce4e5b9ull >> 16) % count + 1;
        while (std::gcd(step, count) != 1) step++;
    }
    uint64_t operator[](uint64_t i) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + from) % count);
    }
};

void run_blocks(Launch& launch, const Order& order, std::atomic<uint64_t>& next) {
    // Kept for the next launch from this OS thread, with its stacks.
    static thread_local Machine kept;
    try {
        for (uint64_t i = next++; i < order.count; i = next++) {
            uint64_t number = order[i];
            unsigned x = launch.grid.x, y = launch.grid.y;
            dim3 index{static_cast<unsigned>(number % x), static_cast<unsigned>(number / x % y),
                       static_cast<unsigned>(number / x / y)};
            if (!kept.run(launch, index, number)) return;
        }
    } catch (const std::exception& exception) {
        launch.fail(std::string("the emulator itself failed: ") + exception.what());
    }
}

void run_all(Launch& launch) {
    uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    Order order(blocks, launch.seed);
    std::atomic<uint64_t> next{0};
    uint64_t threads = blocks * launch.block.x * launch.block.y * launch.block.z;
    uint64_t wanted = std::min({uint64_t{MOST_OS_THREADS}, uint64_t{std::max(1u, std::thread::hardware_concurrency())},
                                blocks, 1 + threads / THREADS_WORTH_ANOTHER});
    std::vector<std::thread> helpers;
    try {
        for (uint64_t i = 1; i < wanted; i++) helpers.emplace_back([&] { run_blocks(launch, order, next); });
    } catch (const std::exception&) {
        // No more OS threads are to be had: those there are do the work.
    }
    run_blocks(launch, order, next);
    for (std::thread& helper : helpers) helper.join();
}

int tell(const std::string& words, char* error, size_t error_bytes) {
    if (error != nullptr && error_bytes > 0) std::snprintf(error, error_bytes, "%s", words.c_str());
    return 1;
}

}  // namespace
}  // namespace emulator

// Runs a kernel to its end. `arguments[i]` points at the value of argument i. Returns 0, or 1 with words in `error`.
// A seed of 0 runs threads and blocks in their natural order; every other seed has an order of its own.
extern "C" int emulator_launch(const char* kernel, const unsigned grid[3], const unsigned block[3], size_t shared_bytes,
                               void** arguments, size_t count, uint64_t seed, char* error, size_t error_bytes) {
    using namespace emulator;
    auto found = kernels().find(kernel);
    if (found == kernels().end()) return tell(std::string("there is no kernel ") + kernel, error, error_bytes);
    Launch launch;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.shared_bytes = shared_bytes;
    launch.seed = seed;
    launch.memory = registered();
    const Kernel& entry = found->second;
    launch.kernel = [&entry, arguments] { entry.call(arguments); };
    std::string wrong = refusal(entry, launch, count);
    if (!wrong.empty()) return tell(std::string(kernel) + " " + wrong, error, error_bytes);
    run_all(launch);
    return launch.failed ? tell(std::string(kernel) + ": " + launch.words, error, error_bytes) : 0;
}

// Makes the bytes known as device memory. Once there is any, 16-byte accesses and asynchronous copies outside all of it
// are errors.
extern "C" void emulator_register(const void* first, size_t bytes) {
    std::lock_guard<std::mutex> guard(emulator::memory_lock);
    auto at = reinterpret_cast<uintptr_t>(first);
    emulator::memory[at] = at + bytes;
}

// Forgets a range that was registered at this first byte.
extern "C" void emulator_unregister(const void* first) {
    std::lock_guard<std::mutex> guard(emulator::memory_lock);
    emulator::memory.erase(reinterpret_cast<uintptr_t>(first));
}

// Whether there is a kernel of this name.
extern "C" int emulator_has(const char* kernel) { return emulator::kernels().count(kernel) != 0; }
