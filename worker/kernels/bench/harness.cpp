// Times kernels and variants of them on the GPU, at the shapes of a training step of GPT-2 124M, and compares what they
// compute with a group's first one; or, with --emulate, runs them on the CPU at small shapes and compares.
//
//     harness [--emulate] [--once] [--runs N] [GROUP | GROUP-NAME ...]
//
// variants.txt tells what there is.
#include <memory>
#include <set>

#include "cases.h"

inline std::vector<std::vector<float>> fetch_all(Device& device, const std::vector<Output>& outputs) {
    std::vector<std::vector<float>> all;
    for (const Output& output : outputs) all.push_back(fetch(device, output));
    return all;
}

inline bool same_bits(const std::vector<std::vector<float>>& a, const std::vector<std::vector<float>>& b) {
    for (size_t i = 0; i < a.size(); i++) {
        if (std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) return false;
    }
    return true;
}

struct Run {
    std::unique_ptr<Device> device;
    Emulator* emulator = nullptr;   // the device, if it is one
    bool once = false;
    int runs = 15;
    std::set<std::string> wanted;
    bool good = true;
    std::map<std::string, double> step;   // of a group: milliseconds by variant

    template <class F>
    std::vector<float> times(F work) {
        std::vector<float> all;
        for (int run = -2; run < runs; run++) {
            device->begin();
            work();
            float ms = device->end();
            if (run >= 0) all.push_back(ms);
        }
        std::sort(all.begin(), all.end());
        return all;
    }

    // What a plain copy reaches.
    void copy() {
        size_t bytes = size_t{1} << 32;
        Address a = device->allocate(bytes), b = device->allocate(bytes);
        device->clear(a, bytes);
        double ms = times([&] { device->copy(b, a, bytes); })[runs / 2];
        std::printf("copy of 4 GiB: %.3f ms, %.0f GB/s read and written\n", ms, 2.0 * bytes / ms / 1e6);
        device->release_all();
    }

    // Variants of a group that are asked for, with the first to compare with.
    std::vector<Variant> chosen(const Bench& bench, const std::string& group) const {
        std::vector<Variant> found;
        bool any = wanted.empty() || wanted.count(group);
        for (const Variant& v : bench.variants) {
            if (v.group != group) continue;
            bool named = wanted.count(v.label()) != 0;
            any |= named;
            if (wanted.empty() || wanted.count(group) || named || (v.name[0] == '0' && !once)) found.push_back(v);
        }
        return any ? found : std::vector<Variant>{};
    }

    void prepare(const Case& c, const std::vector<Output>& outputs) {
        // Nothing is taken for this variant's that another wrote.
        for (const Output& output : outputs) device->clear(output.at, output.count * (output.half ? 2 : 4));
        c.prepare();
    }

    void run(const Case& c, const Variant& v, std::vector<std::vector<float>>& reference) {
        if (!device->load(v)) {
            std::printf("%-14s %-24s is not there\n", v.group.c_str(), v.name.c_str());
            good = false;
            return;
        }
        if (!c.fits(v)) return;
        Launch launch = c.launch(v);
        std::vector<Output> outputs = c.outputs(v);
        prepare(c, outputs);
        device->launch(v, launch);
        if (once) {
            char one;
            device->download(&one, outputs[0].at, 1);
            return;
        }
        auto got = fetch_all(*device, outputs);
        bool same = true;
        for (int again = 1; again <= (emulator != nullptr ? 3 : 1); again++) {
            if (emulator != nullptr) emulator->seed = again;
            prepare(c, outputs);
            device->launch(v, launch);
            same = same && same_bits(got, fetch_all(*device, outputs));
        }
        if (emulator != nullptr) emulator->seed = 0;
        for (size_t i = 0; i < got.size(); i++) {
            if (outputs[i].parts > 1) got[i] = added(got[i], outputs[i].parts);
        }
        if (reference.empty()) reference = got;
        Difference off;
        for (size_t i = 0; i < got.size(); i++) {
            Difference one;
            one.add(got[i], reference[i]);
            if (one.relative() >= off.relative()) off = one;
        }
        bool close = off.relative() < 0.01;
        good = good && close && same;
        report(c, v, launch, off.relative(), same, close);
    }

    void report(const Case& c, const Variant& v, Launch& launch, double off, bool same, bool close) {
        const char* wrong = close ? "" : " WRONG";
        if (emulator != nullptr) {
            std::printf("%-14s %-24s %-22s %9.1e %-5s%s\n", v.group.c_str(), v.name.c_str(), c.what.c_str(), off,
                        same ? "yes" : "NO", wrong);
            return;
        }
        c.prepare();
        std::vector<float> all = times([&] { device->launch(v, launch); });
        double ms = all[all.size() / 2];
        step[v.name] += ms * c.calls;
        // TFLOP/s or GB/s.
        double rate = c.operations > 0.0 ? c.operations / ms / 1e9 : c.bytes / ms / 1e6;
        std::printf("%-14s %-24s %-22s %9.1e %-5s %8.4f %8.4f %8.3f %7.0f %s%s\n", v.group.c_str(), v.name.c_str(),
                    c.what.c_str(), off, same ? "yes" : "NO", ms, all[0], ms * c.calls, rate,
                    device->describe(v, launch.shared).c_str(), wrong);
        std::fflush(stdout);
    }

    void group(Bench& bench, const std::string& name) {
        std::vector<Variant> variants = chosen(bench, name);
        if (variants.empty() || name == "dot") return;
        std::vector<Case> cases = bench.cases(name);
        step.clear();
        for (const Case& c : cases) {
            std::vector<std::vector<float>> reference;
            for (const Variant& v : variants) run(c, v, reference);
        }
        if (cases.size() > 1 && !step.empty()) {
            for (const Variant& v : variants) {
                std::printf("%-14s %-24s %-22s %33.3f\n", name.c_str(), v.name.c_str(), "all", step[v.name]);
            }
        }
        device->release_all();
    }
};

int main(int count, char** words) {
    Run run;
    bool emulate = false;
    for (int i = 1; i < count; i++) {
        std::string word = words[i];
        if (word == "--emulate") {
            emulate = true;
        } else if (word == "--once") {
            run.once = true;
        } else if (word == "--runs" && i + 1 < count) {
            run.runs = std::atoi(words[++i]);
        } else {
            run.wanted.insert(word);
        }
    }
    std::string folder = words[0];
    folder = folder.find('/') == std::string::npos ? "." : folder.substr(0, folder.rfind('/'));
    if (emulate) {
        run.device.reset(run.emulator = new Emulator(folder));
    } else {
        run.device.reset(new Gpu(folder));
    }
    Bench bench{*run.device, read_variants(folder), emulate};
    if (!emulate && !run.once && (run.wanted.empty() || run.wanted.count("copy"))) run.copy();
    std::printf("%-14s %-24s %-22s %9s %-5s%s\n", "GROUP", "VARIANT", "SHAPE", "OFF", "SAME",
                emulate ? "" : "       MS     BEST   A STEP    RATE REGISTERS, BLOCKS x THREADS");
    std::vector<std::string> groups;
    for (const Variant& v : bench.variants) {
        if (std::find(groups.begin(), groups.end(), v.group) == groups.end()) groups.push_back(v.group);
    }
    for (const std::string& name : groups) run.group(bench, name);
    std::printf(run.good ? "all agree\n" : "NOT ALL AGREE\n");
    return run.good ? 0 : 1;
}
