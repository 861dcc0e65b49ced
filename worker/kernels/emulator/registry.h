// The kernels by name. A kernel's file ends with EXPORT(kernel, threads), which enters it here when the library is
// loaded: its name, the block size it is written for, and how to call it with an array of pointers to its arguments.
#pragma once
#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <utility>

namespace emulator {

struct Kernel {
    unsigned threads;
    size_t arguments;
    std::function<void(void**)> call;
};

inline std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

template <class... P, size_t... I>
Kernel described(unsigned threads, void (*kernel)(P...), std::index_sequence<I...>) {
    return {threads, sizeof...(P), [kernel](void** arguments) { kernel(*static_cast<P*>(arguments[I])...); }};
}

template <class... P>
bool enter(const char* name, unsigned threads, void (*kernel)(P...)) {
    kernels().emplace(name, described(threads, kernel, std::index_sequence_for<P...>{}));
    return true;
}

}  // namespace emulator

#define EXPORT(kernel, threads) EXPORT_NAMED(kernel, threads)
#define EXPORT_NAMED(kernel, threads) static const bool kernel##_entered = emulator::enter(#kernel, threads, kernel);
