// Times kernels and their variants on the GPU, at the shapes of a 124M GPT-2 training step, and compares what they
// compute with what the kernels compute as they are (the variant whose name begins with 0); or, with --emulate, runs
// them on the CPU at small shapes and compares.
//
//     harness [--emulate] [--once] [--runs N] [GROUP | GROUP-NAME ...]
//
// variants.txt tells what there is. The driver is called directly and found when it runs: no CUDA header is needed.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::fflush(stdout);
    std::_Exit(2);
}

struct Variant {
    std::string group, name, source, architecture, kernel;
    int threads, per, shared, extra;
    std::string label() const { return group + "-" + name; }
};

std::vector<Variant> read_variants(const std::string& folder) {
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

uint64_t slot(float value) {
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

// --- numbers --------------------------------------------------------------------------------------------------------

uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
float widened(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Normal numbers, by the million: a pool of a prime length, repeated.
const std::vector<float>& pool() {
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

Address halves(Device& device, size_t count, float scale, float offset = 0.0f, size_t from = 0) {
    Address at = device.allocate(count * 2);
    repeat<uint16_t>(device, at, count,
                     [&](size_t i) { return rounded(offset + scale * pool()[(i + from) % pool().size()]); });
    return at;
}
Address floats(Device& device, size_t count, float scale, float offset = 0.0f) {
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

std::vector<float> fetch(Device& device, const Output& output) {
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

std::vector<float> added(const std::vector<float>& parts, size_t count) {
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

// --- what is run ----------------------------------------------------------------------------------------------------

// One kernel at one shape: how to launch a variant, what to set up before it, what it writes.
struct Case {
    std::string what;
    double calls = 1.0;               // of this shape in a step
    double bytes = 0.0, operations = 0.0;
    std::function<Launch(const Variant&)> launch;
    std::function<void()> prepare = [] {};
    std::function<std::vector<Output>(const Variant&)> outputs;
    std::function<bool(const Variant&)> fits = [](const Variant&) { return true; };
};

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct Shape {
    int batch, sequence, heads, kv_heads, head_dim;
    int rows() const { return batch * sequence; }
    int row() const { return (heads + 2 * kv_heads) * head_dim; }
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
};

struct Bench {
    Device& device;
    std::vector<Variant> variants;
    bool small;
    const Variant& first_of(const std::string& group) const {
        for (const Variant& v : variants) {
            if (v.group == group) return v;
        }
        fail("variants.txt has no " + group);
    }
    void run_first(const std::string& group, Launch launch) {
        const Variant& v = first_of(group);
        if (!device.load(v)) fail(v.label() + " is not compiled");
        device.launch(v, launch);
    }

    static Launch attention(const Variant& v, const Shape& s, int heads, std::vector<uint64_t> pointers) {
        for (int x : {s.batch, s.sequence, s.heads, s.kv_heads, s.head_dim}) pointers.push_back(x);
        pointers.push_back(slot(s.scale()));
        unsigned blocks = ceil_div(s.sequence, v.per), high = heads, deep = s.batch;
        return {{blocks, high, deep}, static_cast<unsigned>(v.threads), static_cast<size_t>(v.shared), pointers};
    }

    std::vector<Shape> shapes() const {
        if (!small) return {{64, 1024, 12, 12, 64}};
        return {{2, 150, 2, 2, 64}, {1, 300, 4, 2, 64}, {1, 70, 3, 1, 40}, {1, 64, 2, 1, 64}, {1, 1, 1, 1, 64}};
    }
    std::string name(const Shape& s) const {
        return std::to_string(s.batch) + "x" + std::to_string(s.sequence) + " " + std::to_string(s.heads) + "/" +
               std::to_string(s.kv_heads) + "x" + std::to_string(s.head_dim);
    }
    double product(const Shape& s) const {
        return 1.0 * s.batch * s.heads * s.sequence * s.sequence * s.head_dim;
    }

    std::vector<Case> forward() {
        std::vector<Case> cases;
        for (Shape s : shapes()) {
            size_t n = static_cast<size_t>(s.rows()) * s.heads;
            Address qkv = halves(device, static_cast<size_t>(s.rows()) * s.row(), 1.0f);
            Address out = device.allocate(n * s.head_dim * 2), lse = device.allocate(n * 4);
            Case c;
            c.what = name(s);
            c.calls = 12;
            c.operations = 2 * product(s);
            c.launch = [=](const Variant& v) { return attention(v, s, s.heads, {out, lse, qkv}); };
            c.outputs = [=](const Variant&) {
                return std::vector<Output>{{out, n * s.head_dim, true}, {lse, n, false}};
            };
            cases.push_back(c);
        }
        return cases;
    }

    std::vector<Case> backward(bool keys) {
        std::vector<Case> cases;
        for (Shape s : shapes()) {
            size_t n = static_cast<size_t>(s.rows()) * s.heads, all = static_cast<size_t>(s.rows()) * s.row();
            Address qkv = halves(device, all, 1.0f), d_out = halves(device, n * s.head_dim, 1.0f, 0.0f, 77777);
            Address out = device.allocate(n * s.head_dim * 2), lse = device.allocate(n * 4);
            Address dot = device.allocate(n * 4), d_qkv = device.allocate(all * 2);
            run_first("forward", attention(first_of("forward"), s, s.heads, {out, lse, qkv}));
            unsigned lanes = s.head_dim <= 64 ? 8 : 16;
            auto number = [](int x) { return static_cast<uint64_t>(x); };
            run_first("dot", {{static_cast<unsigned>(ceil_div(n * lanes, 256)), 1, 1},
                              256,
                              0,
                              {dot, d_out, out, number(s.rows()), number(s.sequence), number(s.heads),
                               number(s.head_dim)}});
            Case c;
            c.what = name(s);
            c.calls = 12;
            c.operations = (keys ? 4 : 3) * product(s);
            c.launch = [=](const Variant& v) {
                return attention(v, s, keys ? s.kv_heads : s.heads, {d_qkv, qkv, d_out, lse, dot});
            };
            c.prepare = [=, this] { device.clear(d_qkv, all * 2); };
            c.outputs = [=](const Variant&) { return std::vector<Output>{{d_qkv, all, true}}; };
            cases.push_back(c);
        }
        return cases;
    }

    std::vector<std::pair<int, int>> norm_shapes() const {
        if (!small) return {{65536, 768}};
        return {{37, 768}, {3, 40}, {19, 770}, {9, 1024}, {7, 2056}, {21, 8}, {600, 256}};
    }

    std::vector<Case> norm_forward() {
        std::vector<Case> cases;
        for (auto [rows, width] : norm_shapes()) {
            for (bool fused : {true, false}) {
                size_t n = static_cast<size_t>(rows) * width;
                bool narrow_fits = width % 8 == 0 && width <= 768;
                Address x = halves(device, n, 1.0f, 0.2f), delta = halves(device, n, 0.5f, 0.0f, 1234);
                Address weight = halves(device, width, 0.1f, 1.0f), bias = halves(device, width, 0.1f);
                Address normed = device.allocate(n * 2), sum = device.allocate(n * 2);
                Address statistics = device.allocate(8 * static_cast<size_t>(rows));
                Case c;
                c.what = std::to_string(rows) + "x" + std::to_string(width) + (fused ? " residual" : " alone");
                c.calls = fused ? 24 : 1;
                c.bytes = n * (fused ? 8.0 : 4.0);
                c.fits = [=](const Variant& v) { return v.kernel != "layernorm_forward_narrow" || narrow_fits; };
                int r = rows, w = width;
                c.launch = [=](const Variant& v) {
                    int each = w <= 1024 ? v.per : w <= 2048 ? v.per / 2 : w <= 4096 ? v.per / 4 : v.per / 8;
                    unsigned blocks = ceil_div(r, each);
                    if (v.extra > 0) blocks = std::min(blocks, static_cast<unsigned>(v.extra));
                    return Launch{{blocks, 1, 1},
                                  static_cast<unsigned>(v.threads),
                                  static_cast<size_t>(v.shared),
                                  {normed, fused ? sum : 0, statistics, x, fused ? delta : 0, weight, bias,
                                   static_cast<uint64_t>(r), static_cast<uint64_t>(w), slot(1e-5f)}};
                };
                c.outputs = [=](const Variant&) {
                    std::vector<Output> all = {{normed, n, true}, {statistics, 2 * static_cast<size_t>(r), false}};
                    if (fused) all.push_back({sum, n, true});
                    return all;
                };
                cases.push_back(c);
            }
        }
        return cases;
    }

    static unsigned norm_blocks(const Variant& v, int rows, int width) {
        int each = width <= 1024 ? v.per : width <= 2048 ? v.per / 2 : width <= 4096 ? v.per / 4 : v.per / 8;
        return std::min(ceil_div(rows, std::max(each, 1)), v.extra);
    }

    std::vector<Case> norm_backward() {
        std::vector<Case> cases;
        for (auto [rows, width] : norm_shapes()) {
            for (bool add : {true, false}) {
                size_t n = static_cast<size_t>(rows) * width;
                bool narrow_fits = width % 8 == 0 && width <= 768;
                Address x = halves(device, n, 1.0f, 0.2f), d_normed = halves(device, n, 1.0f, 0.0f, 4321);
                Address weight = halves(device, 2 * width, 0.1f, 1.0f), d_x = device.allocate(n * 2);
                Address before = halves(device, n, 1.0f, 0.0f, 99);
                Address statistics = device.allocate(8 * static_cast<size_t>(rows));
                repeat<float>(device, statistics, 2 * static_cast<size_t>(rows),
                              [](size_t i) { return i % 2 == 0 ? 0.2f + 0.1f * pool()[i] : 1.0f + 0.1f * pool()[i]; });
                Address partial = device.allocate(size_t{4} * 2 * width * 2048);
                Case c;
                c.what = std::to_string(rows) + "x" + std::to_string(width) + (add ? " add" : " replace");
                c.calls = add ? 24 : 1;
                c.bytes = n * (add ? 8.0 : 6.0);
                c.fits = [=](const Variant& v) { return v.kernel != "layernorm_backward_narrow" || narrow_fits; };
                int r = rows, w = width;
                c.launch = [=](const Variant& v) {
                    return Launch{{norm_blocks(v, r, w), 1, 1},
                                  static_cast<unsigned>(v.threads),
                                  static_cast<size_t>(v.shared) * w,
                                  {d_x, partial, x, statistics, weight, d_normed, static_cast<uint64_t>(r),
                                   static_cast<uint64_t>(w), add ? 1u : 0u}};
                };
                c.prepare = [=, this] { device.copy(d_x, before, n * 2); };
                c.outputs = [=](const Variant& v) {
                    size_t blocks = norm_blocks(v, r, w);
                    return std::vector<Output>{{d_x, n, true}, {partial, blocks * 2 * w, false, blocks}};
                };
                cases.push_back(c);
            }
        }
        return cases;
    }

    std::vector<Case> bias() {
        std::vector<Case> cases;
        std::vector<std::pair<int, int>> all = {{65536, 2304}, {65536, 768}, {65536, 3072}};
        if (small) all = {{131, 768}, {1000, 70}, {64, 8}, {9000, 520}, {3, 24}};
        for (auto [rows, width] : all) {
            size_t n = static_cast<size_t>(rows) * width;
            Address d_out = halves(device, n, 1.0f), partial = device.allocate(size_t{4} * width * 1024);
            Case c;
            c.what = std::to_string(rows) + "x" + std::to_string(width);
            c.calls = width == 768 ? 24 : 12;
            c.bytes = n * 2.0;
            int r = rows, w = width;
            // At most EXTRA parts; or so many that the blocks are -EXTRA in all.
            auto parts = [r, w](const Variant& v) {
                int most = v.extra > 0 ? v.extra : std::max(1, -v.extra / ceil_div(w, v.per));
                return std::min(ceil_div(r, 64), most);
            };
            c.launch = [=](const Variant& v) {
                return Launch{{static_cast<unsigned>(ceil_div(w, v.per)), static_cast<unsigned>(parts(v)), 1},
                              static_cast<unsigned>(v.threads),
                              static_cast<size_t>(v.shared),
                              {partial, d_out, static_cast<uint64_t>(r), static_cast<uint64_t>(w)}};
            };
            c.outputs = [=](const Variant& v) {
                size_t count = parts(v);
                return std::vector<Output>{{partial, count * w, false, count}};
            };
            cases.push_back(c);
        }
        return cases;
    }

    std::vector<Case> gelu() {
        std::vector<Case> cases;
        std::vector<size_t> all = {size_t{65536} * 3072};
        if (small) all = {4096, 5003, 7};
        for (size_t n : all) {
            Address before = halves(device, n, 1.5f), d_before = halves(device, n, 1.0f, 0.0f, 555);
            Address pre = device.allocate(n * 2), d_act = device.allocate(n * 2);
            Case c;
            c.what = std::to_string(n);
            c.calls = 12;
            c.bytes = n * 8.0;
            c.launch = [=](const Variant& v) {
                return Launch{{static_cast<unsigned>(ceil_div(n, v.per)), 1, 1},
                              static_cast<unsigned>(v.threads),
                              0,
                              {pre, d_act, static_cast<uint64_t>(n)}};
            };
            c.prepare = [=, this] {
                device.copy(pre, before, n * 2);
                device.copy(d_act, d_before, n * 2);
            };
            c.outputs = [=](const Variant&) { return std::vector<Output>{{pre, n, true}, {d_act, n, true}}; };
            cases.push_back(c);
        }
        return cases;
    }

    std::vector<Case> loss() {
        struct Size {
            int rows, vocabulary, pitch;
        };
        std::vector<Case> cases;
        std::vector<Size> all = {{10624, 50257, 50304}};
        if (small) all = {{5, 1003, 1024}, {3, 257, 384}, {4, 61, 61}, {2, 20011, 20096}, {2, 5, 128}, {2, 8192, 8192}};
        for (Size s : all) {
            for (bool gradient : {true, false}) {
                if (!small && !gradient) continue;
                size_t n = static_cast<size_t>(s.rows) * s.pitch;
                Address before = halves(device, n, 3.0f), logits = device.allocate(n * 2);
                Address losses = device.allocate(size_t{4} * s.rows), targets = device.allocate(size_t{4} * s.rows);
                std::vector<unsigned> wanted(s.rows);
                for (int i = 0; i < s.rows; i++) wanted[i] = static_cast<unsigned>(i * 7919ll % s.vocabulary);
                device.upload(targets, wanted.data(), wanted.size() * 4);
                Case c;
                c.what = std::to_string(s.rows) + "x" + std::to_string(s.vocabulary);
                c.calls = 65536.0 / s.rows;
                c.bytes = n * (gradient ? 4.0 : 2.0);
                c.launch = [=](const Variant& v) {
                    size_t shared = std::min(static_cast<size_t>(v.shared), static_cast<size_t>(s.pitch) * 2 / 16 * 16);
                    Launch l{{static_cast<unsigned>(v.extra > 0 ? std::min(v.extra, s.rows) : s.rows), 1, 1},
                             static_cast<unsigned>(v.threads),
                             shared,
                             {logits, losses, targets, static_cast<uint64_t>(s.rows),
                              static_cast<uint64_t>(s.vocabulary), static_cast<uint64_t>(s.pitch), slot(0.125f),
                              gradient ? 1u : 0u}};
                    // How many numbers of a row the shared memory keeps.
                    if (v.shared > 0) l.arguments.push_back(shared / 2);
                    return l;
                };
                c.prepare = [=, this] { device.copy(logits, before, n * 2); };
                c.outputs = [=](const Variant&) {
                    return std::vector<Output>{{logits, n, true}, {losses, static_cast<size_t>(s.rows), false}};
                };
                cases.push_back(c);
            }
        }
        return cases;
    }

    std::vector<Case> vectors() {
        size_t n = small ? 5000 : size_t{1} << 28;
        Address x = floats(device, n, 1.0f), y = floats(device, n, 1.0f);
        Case c;
        c.what = std::to_string(n);
        c.bytes = 12.0 * n;
        c.launch = [=](const Variant& v) {
            return Launch{{static_cast<unsigned>(ceil_div(n, v.per)), 1, 1},
                          static_cast<unsigned>(v.threads),
                          0,
                          {y, x, slot(1e-3f), static_cast<uint64_t>(n)}};
        };
        c.prepare = [=, this] { device.copy(y, x, n * 4); };
        c.outputs = [=](const Variant&) { return std::vector<Output>{{y, small ? n : 1 << 20, false}}; };
        return {c};
    }

    std::vector<Case> cases(const std::string& group) {
        if (group == "forward") return forward();
        if (group == "backward_kv") return backward(true);
        if (group == "backward_q") return backward(false);
        if (group == "norm_forward") return norm_forward();
        if (group == "norm_backward") return norm_backward();
        if (group == "bias") return bias();
        if (group == "gelu") return gelu();
        if (group == "loss") return loss();
        if (group == "axpy") return vectors();
        return {};
    }
};

std::vector<std::vector<float>> fetch_all(Device& device, const std::vector<Output>& outputs) {
    std::vector<std::vector<float>> all;
    for (const Output& output : outputs) all.push_back(fetch(device, output));
    return all;
}

bool same_bits(const std::vector<std::vector<float>>& a, const std::vector<std::vector<float>>& b) {
    for (size_t i = 0; i < a.size(); i++) {
        if (std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) return false;
    }
    return true;
}

void launch_times(Device& device, const Variant& variant, Launch launch, int runs, std::vector<float>& times) {
    for (int run = -2; run < runs; run++) {
        device.begin();
        device.launch(variant, launch);
        float ms = device.end();
        if (run >= 0) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
}

}  // namespace

int main(int count, char** words) {
    bool emulate = false, once = false;
    int runs = 15;
    std::set<std::string> wanted;
    for (int i = 1; i < count; i++) {
        std::string word = words[i];
        if (word == "--emulate") {
            emulate = true;
        } else if (word == "--once") {
            once = true;
        } else if (word == "--runs") {
            runs = std::atoi(words[++i]);
        } else {
            wanted.insert(word);
        }
    }
    std::string folder = words[0];
    folder = folder.find('/') == std::string::npos ? "." : folder.substr(0, folder.rfind('/'));
    std::unique_ptr<Device> device;
    Emulator* emulator = nullptr;
    if (emulate) {
        device.reset(emulator = new Emulator(folder));
    } else {
        device.reset(new Gpu(folder));
    }
    Bench bench{*device, read_variants(folder), emulate};
    if (!emulate && !once && (wanted.empty() || wanted.count("copy"))) {
        // What a plain copy reaches.
        size_t bytes = size_t{1} << 32;
        Address a = device->allocate(bytes), b = device->allocate(bytes);
        device->clear(a, bytes);
        std::vector<float> times;
        for (int run = -2; run < runs; run++) {
            device->begin();
            device->copy(b, a, bytes);
            float ms = device->end();
            if (run >= 0) times.push_back(ms);
        }
        std::sort(times.begin(), times.end());
        std::printf("copy of 4 GiB: %.3f ms, %.0f GB/s read and written\n", times[times.size() / 2],
                    2.0 * bytes / times[times.size() / 2] / 1e6);
        device->release_all();
    }
    if (!emulate && !once) {
        std::printf("%-14s %-24s %-22s %8s %8s %8s %7s %9s %-5s %s\n", "GROUP", "VARIANT", "SHAPE", "MS", "BEST",
                    "A STEP", "RATE", "OFF", "SAME", "REGISTERS, BLOCKS x THREADS");
    }
    std::vector<std::string> groups;
    for (const Variant& v : bench.variants) {
        if (std::find(groups.begin(), groups.end(), v.group) == groups.end()) groups.push_back(v.group);
    }
    bool good = true;
    for (const std::string& group : groups) {
        std::vector<Variant> chosen;
        for (const Variant& v : bench.variants) {
            if (v.group != group) continue;
            if (wanted.empty() || wanted.count(group) || wanted.count(v.label()) || (v.name[0] == '0' && !once)) {
                chosen.push_back(v);
            }
        }
        bool any = wanted.empty() || wanted.count(group);
        for (const Variant& v : chosen) any |= wanted.count(v.label()) != 0;
        if (!any || group == "dot") continue;
        std::vector<Case> cases = bench.cases(group);
        std::map<std::string, double> step;
        for (Case& c : cases) {
            std::vector<std::vector<float>> reference;
            for (const Variant& v : chosen) {
                if (!device->load(v)) {
                    std::printf("%-14s %-24s is not there\n", group.c_str(), v.name.c_str());
                    good = false;
                    continue;
                }
                if (!c.fits(v)) continue;
                Launch launch = c.launch(v);
                std::vector<Output> outputs = c.outputs(v);
                auto prepare = [&] {
                    // Nothing is taken for this variant's that another wrote.
                    for (const Output& output : outputs) device->clear(output.at, output.count * (output.half ? 2 : 4));
                    c.prepare();
                };
                prepare();
                device->launch(v, launch);
                if (once) {
                    std::vector<char> one(1);
                    device->download(one.data(), outputs[0].at, 1);
                    continue;
                }
                auto got = fetch_all(*device, outputs);
                bool same = true;
                for (int again = 1; again <= (emulate ? 3 : 1); again++) {
                    if (emulator != nullptr) emulator->seed = again;
                    prepare();
                    device->launch(v, launch);
                    same = same && same_bits(got, fetch_all(*device, outputs));
                }
                if (emulator != nullptr) emulator->seed = 0;
                for (size_t i = 0; i < got.size(); i++) {
                    if (outputs[i].parts > 1) got[i] = added(got[i], outputs[i].parts);
                }
                if (v.name[0] == '0') reference = got;
                Difference off;
                std::string apart;
                for (size_t i = 0; i < got.size(); i++) {
                    Difference one;
                    one.add(got[i], reference[i]);
                    if (one.relative() >= off.relative()) off = one;
                    char text[32];
                    std::snprintf(text, sizeof text, " %.1e", one.relative());
                    apart += text;
                }
                bool close = off.relative() < 0.01;
                good = good && close && same;
                if (emulate) {
                    std::printf("%-14s %-24s %-20s off%s %s%s\n", group.c_str(), v.name.c_str(), c.what.c_str(),
                                apart.c_str(), close ? "" : "WRONG ", same ? "" : "SEEDS DIFFER");
                    std::fflush(stdout);
                    continue;
                }
                c.prepare();
                std::vector<float> times;
                launch_times(*device, v, launch, runs, times);
                double ms = times[times.size() / 2];
                step[v.name] += ms * c.calls;
                // TFLOP/s or GB/s.
                double rate = c.operations > 0.0 ? c.operations / ms / 1e9 : c.bytes / ms / 1e6;
                std::printf("%-14s %-24s %-22s %8.4f %8.4f %8.3f %7.0f %9.1e %-5s %s%s\n", group.c_str(),
                            v.name.c_str(), c.what.c_str(), ms, times[0], ms * c.calls, rate, off.relative(),
                            same ? "yes" : "NO",
                            device->describe(v, launch.shared).c_str(),
                            close ? "" : " WRONG");
                std::fflush(stdout);
            }
        }
        if (cases.size() > 1 && !emulate && !once) {
            for (const Variant& v : chosen) {
                std::printf("%-14s %-24s %-22s %8s %8s %8.3f\n", group.c_str(), v.name.c_str(), "all", "", "",
                            step[v.name]);
            }
        }
        device->release_all();
    }
    std::printf(good ? "all agree\n" : "NOT ALL AGREE\n");
    return good ? 0 : 1;
}
