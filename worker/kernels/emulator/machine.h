// The emulated multiprocessor: one thread block at a time, one fibre (a stack of its own) for each CUDA thread.
//
// A fibre runs until it ends or reaches something that waits: a block barrier, a warp barrier, or a warp-wide operation
// (shuffle, ldmatrix, mma), which is a warp barrier with values handed over. The scheduler then runs another. Between
// two waits CUDA promises no order of threads, so the seed chooses one: which warp goes on, how long a warp may run
// ahead of its sisters, and the order of lanes in it. A kernel that is right gives the same bits for every seed; one
// that lacks a barrier reads, under some seed, what is not there yet.
//
// What is not there yet is visible: shared memory is filled with NaN before each block, and an asynchronous copy
// poisons its target at once but moves its bytes only when it is waited for. Mistakes never end the process: the first
// one is kept as words, the block's fibres are left where they are, and the launch returns the words.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x, y, z;
};

namespace emulator {

constexpr unsigned WARP = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t MOST_SHARED = 227 * 1024;   // what an H100 gives one block, static and dynamic together
constexpr size_t STACK = 64 * 1024;

// What a fibre waits for. The warp-wide operations are told apart so that lanes that disagree are found out.
enum class Wait : uint8_t { nothing, block_barrier, warp_barrier, shuffle, ldmatrix, mma };

// What a lane hands to its warp in a warp-wide operation.
struct alignas(16) Hand {
    unsigned char bytes[32];
};

// An asynchronous copy not yet made. Bytes that have no source are zeros.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned bytes, from_bytes;
};

// A product of a warpgroup that was asked for and not yet waited for; see group.h.
struct Product {
    float* sums;
    unsigned a[4];                        // a left operand in registers
    size_t left, right;                   // operands in shared memory: bytes from its start; or nowhere
    bool add, transposed, first;          // first: `before` is what the sums were
    float before[32];
};

struct Fibre {
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    std::unique_ptr<unsigned char[]> stack;
    dim3 thread;
    unsigned id;
    Wait wait;
    bool done;
    uint8_t parity;                       // which of the two hands is written next
    std::vector<Copy> copies;             // in order of issue
    std::vector<size_t> groups;           // for each committed group, the count of copies up to its end
    std::vector<Product> open;            // products of no group yet
    std::vector<std::vector<Product>> products;   // those of committed groups
};

// What all blocks of one launch share.
struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    uint64_t seed;
    std::function<void()> kernel;
    std::vector<std::pair<uintptr_t, uintptr_t>> memory;   // registered ranges, sorted; empty: not checked
    std::atomic<bool> failed{false};
    std::mutex lock;
    std::string words;

    void fail(const std::string& what);
};

// Runs blocks on one OS thread.
class Machine {
public:
    // Runs one block to its end; false if the launch failed, here or elsewhere.
    bool run(Launch& launch, dim3 block_index, uint64_t block_number);

    // --- called by the kernel, from inside a fibre ---
    void wait(Wait what);
    // Gives `bytes` to the warp and returns what its 32 lanes gave in the same operation.
    const Hand* exchange(Wait what, const void* mine, size_t bytes);
    void copy_async(void* to, const void* from, unsigned bytes, unsigned from_bytes);
    void copy_commit();
    void copy_wait(size_t groups_left);
    void* shared_array(const void* tag, size_t bytes);
    void* dynamic_shared() { return shared_; }
    // Fails the launch if the bytes are not aligned to `alignment`, or in neither shared nor registered memory.
    void check(const void* at, size_t bytes, size_t alignment, const char* what);
    // The same for an operand that must be in shared memory.
    void check_shared(const void* at, size_t bytes, const char* what);
    [[noreturn]] void fail(const std::string& what);

    Fibre* fibre = nullptr;
    dim3 block_index{};
    Launch* launch = nullptr;

private:
    void prepare();
    void start(Fibre& fibre);
    void resume(Fibre& fibre);
    void leave();
    static void entry();
    uint64_t random();
    bool pick_warp(unsigned& warp);
    void run_warp(unsigned warp);
    bool release_block();
    std::string deadlock() const;
    std::string place(const Fibre& fibre) const;
    bool finish();

    std::vector<Fibre> fibres_;
    unsigned threads_ = 0, warps_ = 0, alive_ = 0;
    std::vector<uint32_t> ready_;          // for each warp, the lanes that may run
    std::vector<Hand> hands_;              // [warp][parity][lane]
    std::unique_ptr<unsigned char[]> shared_memory_;
    unsigned char* shared_ = nullptr;
    size_t shared_used_ = 0;
    std::vector<std::pair<const void*, void*>> arrays_;
    uint64_t random_ = 0;
    unsigned stickiness_ = 0, last_warp_ = 0;
#if defined(__x86_64__)
    void* scheduler_ = nullptr;
#else
    ucontext_t scheduler_{};
#endif
};

// The machine of this OS thread, while it runs a block.
extern thread_local Machine* machine __attribute__((tls_model("initial-exec")));

}  // namespace emulator
