// What kernels and their variants run on: the GPU, by the driver itself, or the emulator's libraries. The driver is
// found when it is wanted: no CUDA header is needed.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

[[noreturn]] inline void fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::fflush(stdout);
    std::_Exit(2);
}

struct Variant {
    std::string group, name, source, architecture, kernel;
    int threads, per, shared, extra;
    std::string label() const { return group + "-" + name; }
};

inline std::vector<Variant> read_variants(const std::string& folder) {
    std::vector<Variant> found;
    std::ifstream file(folder + "/variants.txt");
    std::string line;
    while (std::getline(file, line)) {
        std::istringstream words(line.substr(0, line.find('#')));
        Variant v;
        if (words >> v.group >> v.name >> v.source >> v.architecture >> v.threads >> v.per >> v.shared >> v.extra >>
            v.kernel) {
            found.push_back(v);
        }
    }
    return found;
}

using Address = uint64_t;

struct Launch {
    unsigned grid[3], threads;
    size_t shared;
    std::vector<uint64_t> arguments;
};

inline uint64_t slot(float value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

// What runs kernels.
struct Device {
    virtual ~Device() = default;
    virtual Address allocate(size_t bytes) = 0;
    virtual void release_all() = 0;
    virtual void upload(Address to, const void* from, size_t bytes) = 0;
    virtual void download(void* to, Address from, size_t bytes) = 0;
    virtual void copy(Address to, Address from, size_t bytes) = 0;
    virtual void clear(Address at, size_t bytes) = 0;
    // Whether the variant is there to be run.
    virtual bool load(const Variant& variant) = 0;
    virtual void launch(const Variant& variant, Launch& launch) = 0;
    virtual void begin() {}                                    // of what is timed
    virtual float end() { return 0.0f; }                       // milliseconds since
    virtual std::string describe(const Variant&, size_t) { return ""; }
};

// --- the GPU --------------------------------------------------------------------------------------------------------

struct Driver {
    void* library = nullptr;
    template <class F>
    void find(F& function, const char* name) {
        function = reinterpret_cast<F>(dlsym(library, name));
        if (function == nullptr) fail(std::string("the driver has no ") + name);
    }
    int (*init)(unsigned);
    int (*device_get)(int*, int);
    int (*retain)(void**, int);
    int (*set_current)(void*);
    int (*load_data)(void**, const void*);
    int (*get_function)(void**, void*, const char*);
    int (*set_attribute)(void*, int, int);
    int (*get_attribute)(int*, int, void*);
    int (*active_blocks)(int*, void*, int, size_t);
    int (*allocate)(Address*, size_t);
    int (*release)(Address);
    int (*to_device)(Address, const void*, size_t);
    int (*to_host)(void*, Address, size_t);
    int (*between)(Address, Address, size_t, void*);
    int (*set_bytes)(Address, unsigned char, size_t);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    int (*event_create)(void**, unsigned);
    int (*event_record)(void*, void*);
    int (*event_wait)(void*);
    int (*event_time)(float*, void*, void*);
    int (*synchronize)();
    int (*error_name)(int, const char**);

    Driver() {
        library = dlopen("libcuda.so.1", RTLD_NOW);
        if (library == nullptr) fail("there is no libcuda.so.1");
        find(init, "cuInit");
        find(device_get, "cuDeviceGet");
        find(retain, "cuDevicePrimaryCtxRetain");
        find(set_current, "cuCtxSetCurrent");
        find(load_data, "cuModuleLoadData");
        find(get_function, "cuModuleGetFunction");
        find(set_attribute, "cuFuncSetAttribute");
        find(get_attribute, "cuFuncGetAttribute");
        find(active_blocks, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
        find(allocate, "cuMemAlloc_v2");
        find(release, "cuMemFree_v2");
        find(to_device, "cuMemcpyHtoD_v2");
        find(to_host, "cuMemcpyDtoH_v2");
        find(between, "cuMemcpyDtoDAsync_v2");
        find(set_bytes, "cuMemsetD8_v2");
        find(launch, "cuLaunchKernel");
        find(event_create, "cuEventCreate");
        find(event_record, "cuEventRecord");
        find(event_wait, "cuEventSynchronize");
        find(event_time, "cuEventElapsedTime");
        find(synchronize, "cuCtxSynchronize");
        find(error_name, "cuGetErrorName");
    }
    void check(int status, const std::string& what) const {
        if (status == 0) return;
        const char* name = "";
        error_name(status, &name);
        fail(what + ": " + (name != nullptr ? name : std::to_string(status)));
    }
};

struct Gpu : Device {
    Driver cuda;
    std::string folder;
    std::map<std::string, void*> functions;
    std::vector<Address> allocated;
    void *from = nullptr, *to = nullptr;

    explicit Gpu(std::string where) : folder(std::move(where)) {
        int device;
        void* context;
        cuda.check(cuda.init(0), "cuInit");
        cuda.check(cuda.device_get(&device, 0), "cuDeviceGet");
        cuda.check(cuda.retain(&context, device), "cuDevicePrimaryCtxRetain");
        cuda.check(cuda.set_current(context), "cuCtxSetCurrent");
        cuda.check(cuda.event_create(&from, 0), "cuEventCreate");
        cuda.check(cuda.event_create(&to, 0), "cuEventCreate");
    }
    Address allocate(size_t bytes) override {
        Address at;
        cuda.check(cuda.allocate(&at, bytes), "cuMemAlloc of " + std::to_string(bytes));
        allocated.push_back(at);
        return at;
    }
    void release_all() override {
        for (Address at : allocated) cuda.check(cuda.release(at), "cuMemFree");
        allocated.clear();
    }
    void upload(Address at, const void* data, size_t bytes) override {
        cuda.check(cuda.to_device(at, data, bytes), "cuMemcpyHtoD");
    }
    void download(void* data, Address at, size_t bytes) override {
        cuda.check(cuda.to_host(data, at, bytes), "cuMemcpyDtoH");
    }
    void copy(Address into, Address out, size_t bytes) override {
        cuda.check(cuda.between(into, out, bytes, nullptr), "cuMemcpyDtoD");
    }
    void clear(Address at, size_t bytes) override { cuda.check(cuda.set_bytes(at, 0, bytes), "cuMemsetD8"); }
    bool load(const Variant& variant) override {
        if (functions.count(variant.label())) return true;
        std::ifstream file(folder + "/cubins/" + variant.label() + ".cubin", std::ios::binary);
        std::string image((std::istreambuf_iterator<char>(file)), {});
        if (image.empty()) return false;
        void *module, *function;
        if (int status = cuda.load_data(&module, image.data())) {
            std::printf("%s cannot be loaded: %d\n", variant.label().c_str(), status);
            return false;
        }
        cuda.check(cuda.get_function(&function, module, variant.kernel.c_str()), variant.kernel);
        functions[variant.label()] = function;
        return true;
    }
    void launch(const Variant& variant, Launch& l) override {
        void* function = functions.at(variant.label());
        if (l.shared > 48 * 1024) cuda.check(cuda.set_attribute(function, 8, l.shared), "shared memory");
        std::vector<void*> pointers;
        for (uint64_t& argument : l.arguments) pointers.push_back(&argument);
        cuda.check(cuda.launch(function, l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1, l.shared, nullptr,
                               pointers.data(), nullptr),
                   "launching " + variant.label());
    }
    void begin() override { cuda.check(cuda.event_record(from, nullptr), "cuEventRecord"); }
    float end() override {
        float ms;
        cuda.check(cuda.event_record(to, nullptr), "cuEventRecord");
        cuda.check(cuda.event_wait(to), "what was timed");
        cuda.check(cuda.event_time(&ms, from, to), "cuEventElapsedTime");
        return ms;
    }
    // Registers, local bytes, blocks on a multiprocessor.
    std::string describe(const Variant& variant, size_t shared) override {
        void* function = functions.at(variant.label());
        int registers = 0, local = 0, blocks = 0;
        cuda.get_attribute(&registers, 4, function);
        cuda.get_attribute(&local, 3, function);
        cuda.active_blocks(&blocks, function, variant.threads, shared);
        return std::to_string(registers) + "r " + std::to_string(blocks) + "x" + std::to_string(variant.threads) +
               (local > 0 ? " local " + std::to_string(local) : "");
    }
};

// --- the CPU --------------------------------------------------------------------------------------------------------

struct Emulator : Device {
    using Run = int (*)(const char*, const unsigned*, const unsigned*, size_t, void**, size_t, uint64_t, char*, size_t);
    struct Library {
        Run run;
        void (*known)(const void*, size_t);
        void (*forgotten)(const void*);
    };
    std::string folder;
    std::map<std::string, Library> libraries;
    std::vector<std::pair<void*, size_t>> allocated;
    uint64_t seed = 0;

    explicit Emulator(std::string where) : folder(std::move(where)) {}
    Address allocate(size_t bytes) override {
        size_t size = (bytes + 255) / 256 * 256;
        void* at = aligned_alloc(256, size);
        std::memset(at, 0xff, size);
        allocated.push_back({at, bytes});
        return reinterpret_cast<Address>(at);
    }
    void release_all() override {
        for (auto& [at, bytes] : allocated) std::free(at);
        allocated.clear();
    }
    static void* host(Address at) { return reinterpret_cast<void*>(at); }
    void upload(Address at, const void* data, size_t bytes) override { std::memcpy(host(at), data, bytes); }
    void download(void* data, Address at, size_t bytes) override { std::memcpy(data, host(at), bytes); }
    void copy(Address into, Address out, size_t bytes) override { std::memcpy(host(into), host(out), bytes); }
    void clear(Address at, size_t bytes) override { std::memset(host(at), 0, bytes); }
    bool load(const Variant& variant) override {
        if (libraries.count(variant.label())) return true;
        std::string path = folder + "/emulated/" + variant.label() + ".so";
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            std::printf("%s\n", dlerror());
            return false;
        }
        Library found;
        found.run = reinterpret_cast<Run>(dlsym(library, "emulator_launch"));
        found.known = reinterpret_cast<void (*)(const void*, size_t)>(dlsym(library, "emulator_register"));
        found.forgotten = reinterpret_cast<void (*)(const void*)>(dlsym(library, "emulator_unregister"));
        libraries[variant.label()] = found;
        return true;
    }
    void launch(const Variant& variant, Launch& l) override {
        const Library& library = libraries.at(variant.label());
        for (auto& [at, bytes] : allocated) library.known(at, bytes);
        unsigned block[3] = {l.threads, 1, 1};
        std::vector<void*> pointers;
        for (uint64_t& argument : l.arguments) pointers.push_back(&argument);
        char words[1024] = "";
        int status = library.run(variant.kernel.c_str(), l.grid, block, l.shared, pointers.data(), pointers.size(),
                                 seed, words, sizeof words);
        for (auto& [at, bytes] : allocated) library.forgotten(at);
        if (status != 0) fail(variant.label() + ": " + words);
    }
};
