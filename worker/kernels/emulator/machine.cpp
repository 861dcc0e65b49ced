// Fibres and their scheduler; machine.h says what they stand for.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <exception>

namespace emulator {

thread_local Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr unsigned char POISON = 0xff;     // every float and bfloat16 made of it is NaN
constexpr unsigned char GUARD = 0xa5;      // what follows shared memory and must stay
constexpr size_t GUARD_BYTES = 256;
constexpr size_t STACK_GUARD_BYTES = 16;   // the far end of a fibre's stack

bool whole(const unsigned char* guard, size_t bytes) {
    return std::all_of(guard, guard + bytes, [](unsigned char byte) { return byte == GUARD; });
}

const char* name(Wait wait) {
    switch (wait) {
        case Wait::nothing: return "nothing";
        case Wait::block_barrier: return "__syncthreads";
        case Wait::warp_barrier: return "__syncwarp";
        case Wait::shuffle: return "a shuffle";
        case Wait::ldmatrix: return "ldmatrix";
        case Wait::mma: return "mma";
    }
    return "?";
}

std::string words(dim3 index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

// Mixes seed and block number, so that blocks have different orders (splitmix64's finisher).
uint64_t mixed(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

}  // namespace

void Launch::fail(const std::string& what) {
    std::lock_guard<std::mutex> guard(lock);
    if (!failed.exchange(true)) words = what;
}

// --- switching stacks -------------------------------------------------------------------------------------------
#if defined(__x86_64__)
// Saves the registers a function must keep on the running stack, stores its pointer, and takes up the other.
extern "C" void cairn_emulator_switch(void** save, void* to);
asm(R"(.text
.globl cairn_emulator_switch
.hidden cairn_emulator_switch
.type cairn_emulator_switch, @function
cairn_emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size cairn_emulator_switch, .-cairn_emulator_switch
)");

void Machine::start(Fibre& fibre) {
    uintptr_t top = (reinterpret_cast<uintptr_t>(fibre.stack.get()) + STACK) & ~uintptr_t{15};
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;                                    // where entry would return to: it never does
    *--at = reinterpret_cast<void*>(&Machine::entry);
    for (int i = 0; i < 6; i++) *--at = nullptr;        // the six saved registers
    fibre.stack_pointer = at;
}

void Machine::resume(Fibre& next) {
    fibre = &next;
    cairn_emulator_switch(&scheduler_, next.stack_pointer);
}

void Machine::leave() { cairn_emulator_switch(&fibre->stack_pointer, scheduler_); }
#else
void Machine::start(Fibre& fibre) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = STACK;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &Machine::entry, 0);
}

void Machine::resume(Fibre& next) {
    fibre = &next;
    swapcontext(&scheduler_, &next.context);
}

void Machine::leave() { swapcontext(&fibre->context, &scheduler_); }
#endif

void Machine::entry() {
    Machine& here = *machine;
    try {
        here.launch->kernel();
    } catch (const std::exception& exception) {
        here.fail(std::string("met ") + exception.what());
    }
    if (!here.fibre->copies.empty()) here.fail("ended with asynchronous copies that it never waited for");
    if (!here.fibre->open.empty() || !here.fibre->products.empty()) here.fail("ended with products never waited for");
    here.fibre->done = true;
    here.leave();
    __builtin_unreachable();
}

// --- what kernels call --------------------------------------------------------------------------------------------
void Machine::wait(Wait what) {
    fibre->wait = what;
    leave();
}

const Hand* Machine::exchange(Wait what, const void* mine, size_t bytes) {
    // Two hands by turns: a lane can be one operation ahead of its slowest sister, not two, so one barrier is enough.
    Hand* hands = &hands_[(fibre->id / WARP * 2 + fibre->parity) * WARP];
    fibre->parity ^= 1;
    std::memcpy(hands[fibre->id % WARP].bytes, mine, bytes);
    wait(what);
    return hands;
}

void Machine::copy_async(void* to, const void* from, unsigned bytes, unsigned from_bytes) {
    check_shared(to, bytes, "an asynchronous copy's target");
    if (from_bytes > 0) check(from, from_bytes, bytes, "an asynchronous copy's source");
    std::memset(to, POISON, bytes);
    fibre->copies.push_back(
        {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, from_bytes});
}

void Machine::copy_commit() { fibre->groups.push_back(fibre->copies.size()); }

void Machine::copy_wait(size_t groups_left) {
    auto& groups = fibre->groups;
    if (groups.size() <= groups_left) return;
    size_t finished = groups.size() - groups_left, count = groups[finished - 1];
    for (size_t i = 0; i < count; i++) {
        const Copy& copy = fibre->copies[i];
        if (copy.from_bytes > 0) std::memcpy(copy.to, copy.from, copy.from_bytes);
        std::memset(copy.to + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
    }
    fibre->copies.erase(fibre->copies.begin(), fibre->copies.begin() + static_cast<std::ptrdiff_t>(count));
    groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(finished));
    for (size_t& end : groups) end -= count;
}

void* Machine::shared_array(const void* tag, size_t bytes) {
    for (const auto& [known, at] : arrays_) {
        if (known == tag) return at;
    }
    size_t start = (shared_used_ + 15) & ~size_t{15};
    if (start + bytes > MOST_SHARED) fail("needs more shared memory than a block has");
    shared_used_ = start + bytes;
    arrays_.emplace_back(tag, shared_ + start);
    // The array moves the guard on; what was guard becomes poison.
    std::memset(shared_ + start, POISON, bytes);
    std::memset(shared_ + shared_used_, GUARD, GUARD_BYTES);
    return shared_ + start;
}

void Machine::check(const void* at, size_t bytes, size_t alignment, const char* what) {
    auto first = reinterpret_cast<uintptr_t>(at);
    if (first % alignment != 0) fail(std::string(what) + " is not aligned to " + std::to_string(alignment) + " bytes");
    const auto& ranges = launch->memory;
    auto shared = reinterpret_cast<uintptr_t>(shared_);
    if (ranges.empty() || (first >= shared && first + bytes <= shared + shared_used_)) return;
    auto after = std::upper_bound(ranges.begin(), ranges.end(), std::make_pair(first, ~uintptr_t{0}));
    if (after == ranges.begin() || first + bytes > std::prev(after)->second) {
        fail(std::string(what) + " is outside all registered memory");
    }
}

void Machine::check_shared(const void* at, size_t bytes, const char* what) {
    auto first = reinterpret_cast<uintptr_t>(at), shared = reinterpret_cast<uintptr_t>(shared_);
    if (first % bytes != 0) fail(std::string(what) + " is not aligned to " + std::to_string(bytes) + " bytes");
    if (first < shared || first + bytes > shared + shared_used_) fail(std::string(what) + " is outside shared memory");
}

void Machine::fail(const std::string& what) {
    launch->fail(place(*fibre) + " " + what);
    leave();
    __builtin_unreachable();
}

// --- the scheduler --------------------------------------------------------------------------------------------------
uint64_t Machine::random() {
    random_ += 0x9e3779b97f4a7c15ull;
    return mixed(random_);
}

void Machine::prepare() {
    threads_ = launch->block.x * launch->block.y * launch->block.z;
    warps_ = threads_ / WARP;
    alive_ = threads_;
    if (fibres_.size() < threads_) fibres_.resize(threads_);
    hands_.resize(size_t{warps_} * 2 * WARP);
    ready_.assign(warps_, ~uint32_t{0});
    if (!shared_memory_) {
        shared_memory_.reset(new unsigned char[MOST_SHARED + GUARD_BYTES + 1024]);
        shared_ = shared_memory_.get();
        shared_ += (1024 - reinterpret_cast<uintptr_t>(shared_) % 1024) % 1024;
    }
    shared_used_ = launch->shared_bytes;
    arrays_.clear();
    std::memset(shared_, POISON, shared_used_);
    std::memset(shared_ + shared_used_, GUARD, GUARD_BYTES);
    for (unsigned i = 0; i < threads_; i++) {
        Fibre& fibre = fibres_[i];
        // Not zeroed: the operating system gives the pages when they are touched.
        if (!fibre.stack) fibre.stack.reset(new unsigned char[STACK]);
        std::memset(fibre.stack.get(), GUARD, STACK_GUARD_BYTES);
        const dim3& size = launch->block;
        fibre.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        fibre.id = i;
        fibre.wait = Wait::nothing;
        fibre.done = false;
        fibre.parity = 0;
        fibre.copies.clear();
        fibre.groups.clear();
        fibre.open.clear();
        fibre.products.clear();
        start(fibre);
    }
}

// A warp that can go on: mostly the last one or mostly another, as the seed's stickiness has it.
bool Machine::pick_warp(unsigned& warp) {
    bool ordered = launch->seed == 0;
    if (!ordered && ready_[last_warp_] != 0 && random() % 8 < stickiness_) {
        warp = last_warp_;
        return true;
    }
    unsigned first = ordered ? last_warp_ : static_cast<unsigned>(random() % warps_);
    for (unsigned i = 0; i < warps_; i++) {
        warp = (first + i) % warps_;
        if (ready_[warp] != 0) {
            last_warp_ = warp;
            return true;
        }
    }
    return false;
}

// Runs the warp's ready lanes, each until it waits, and releases the warp if all its lanes then wait for it alike.
void Machine::run_warp(unsigned warp) {
    // An odd step walks through all lanes.
    unsigned from = 0, step = 1;
    if (launch->seed != 0) {
        uint64_t drawn = random();
        from = drawn % WARP;
        step = (drawn >> 8) % WARP | 1;
    }
    uint32_t ready = ready_[warp];
    for (unsigned i = 0; i < WARP; i++) {
        unsigned lane = (from + i * step) % WARP;
        if ((ready >> lane & 1) == 0) continue;
        Fibre& next = fibres_[warp * WARP + lane];
        resume(next);
        if (launch->failed.load(std::memory_order_relaxed)) return;
        alive_ -= next.done;
    }
    ready_[warp] = 0;
    Fibre* lanes = &fibres_[warp * WARP];
    Wait what = lanes[0].wait;
    if (what == Wait::nothing || what == Wait::block_barrier) return;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (lanes[lane].done || lanes[lane].wait != what) return;
    }
    for (unsigned lane = 0; lane < WARP; lane++) lanes[lane].wait = Wait::nothing;
    ready_[warp] = ~uint32_t{0};
}

// Releases the block if every thread is at the block barrier.
bool Machine::release_block() {
    for (unsigned i = 0; i < threads_; i++) {
        if (fibres_[i].done || fibres_[i].wait != Wait::block_barrier) return false;
    }
    for (unsigned i = 0; i < threads_; i++) fibres_[i].wait = Wait::nothing;
    ready_.assign(warps_, ~uint32_t{0});
    return true;
}

std::string Machine::place(const Fibre& fibre) const {
    return "block " + words(block_index) + " thread " + words(fibre.thread);
}

// Names one thread that waits and one that does not wait with it.
std::string Machine::deadlock() const {
    const Fibre* waits = nullptr;
    for (unsigned i = 0; i < threads_ && waits == nullptr; i++) {
        if (!fibres_[i].done) waits = &fibres_[i];
    }
    bool whole_block = waits->wait == Wait::block_barrier;
    unsigned first = whole_block ? 0 : waits->id / WARP * WARP, count = whole_block ? threads_ : WARP;
    std::string text = place(*waits) + " waits at " + name(waits->wait) + " for ever";
    for (unsigned i = first; i < first + count; i++) {
        const Fibre& other = fibres_[i];
        if (other.done) return text + ": thread " + words(other.thread) + " has ended";
        if (other.wait != waits->wait) return text + ": thread " + words(other.thread) + " is at " + name(other.wait);
    }
    return text;
}

bool Machine::finish() {
    if (!whole(shared_ + shared_used_, GUARD_BYTES)) {
        launch->fail("block " + words(block_index) + " wrote past its shared memory");
    }
    for (unsigned i = 0; i < threads_; i++) {
        if (!whole(fibres_[i].stack.get(), STACK_GUARD_BYTES)) launch->fail(place(fibres_[i]) + " overran its stack");
    }
    return !launch->failed.load();
}

bool Machine::run(Launch& what, dim3 index, uint64_t block_number) {
    launch = &what;
    block_index = index;
    random_ = mixed(what.seed * 0x9e3779b97f4a7c15ull + block_number);
    prepare();
    stickiness_ = static_cast<unsigned>(random() % 8);
    last_warp_ = 0;
    machine = this;
    while (alive_ > 0 && !what.failed.load(std::memory_order_relaxed)) {
        unsigned warp = 0;
        if (pick_warp(warp)) {
            run_warp(warp);
        } else if (!release_block()) {
            what.fail(deadlock());
        }
    }
    machine = nullptr;
    return !what.failed.load() && finish();
}

}  // namespace emulator
