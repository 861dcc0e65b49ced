// What is timed: each group's shapes in a training step of GPT-2 124M, or small ones for the emulator.
#pragma once
#include <functional>

#include "numbers.h"

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

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

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
                Address x = halves(device, n, 1.0f, 0.2f), delta = halves(device, n, 0.5f, 0.0f, 1234);
                Address weight = halves(device, width, 0.1f, 1.0f), bias = halves(device, width, 0.1f);
                Address normed = device.allocate(n * 2), sum = device.allocate(n * 2);
                Address statistics = device.allocate(8 * static_cast<size_t>(rows));
                Case c;
                c.what = std::to_string(rows) + "x" + std::to_string(width) + (fused ? " residual" : " alone");
                c.calls = fused ? 24 : 1;
                c.bytes = n * (fused ? 8.0 : 4.0);
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

    // Kernels whose name ends in a width take rows of up to that, a multiple of eight.
    static bool takes(const Variant& v, int width) {
        int most = std::atoi(v.kernel.substr(v.kernel.rfind('_') + 1).c_str());
        return most == 0 || (width <= most && width % 8 == 0);
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
                c.fits = [=](const Variant& v) { return takes(v, width); };
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
