#!/usr/bin/env python3
"""Compiles the variants that variants.txt lists: cubins by NVRTC, or libraries for the CPU with --emulator.

    compile.py [--emulator] [--force] [NAME ...]

A cubin goes to cubins/GROUP-NAME.cubin and what ptxas says about it to cubins/GROUP-NAME.log; a library goes to
emulated/GROUP-NAME.so. What was made from the same texts is kept: a hash of them lies beside it.
"""
import ctypes
import glob
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = os.path.dirname(HERE)


def variants():
    """Group, name, source, architecture, numbers, kernel and definitions of each line."""
    found = []
    for line in open(os.path.join(HERE, "variants.txt")):
        words = line.split("#")[0].split()
        if words:
            group, name, source, arch = words[:4]
            found.append((group, name, source, arch, words[9:]))
    return found


def path_of(source):
    own = os.path.join(HERE, source)
    return own if os.path.exists(own) else os.path.join(KERNELS, source)


def headers():
    """All files by the names they are included by; this folder's own win."""
    names = {}
    for folder in (KERNELS, HERE):
        for path in glob.glob(os.path.join(folder, "*.cu*")):
            names[os.path.basename(path)] = open(path).read()
    return names


def library():
    here = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
    places = [os.environ["NVRTC"]] if "NVRTC" in os.environ else []
    places += glob.glob(os.path.join(here, "lib/python3*/site-packages/nvidia/*/lib/libnvrtc.so.1[3-9]"))
    for path in sys.path:
        places += glob.glob(os.path.join(path, "nvidia/*/lib/libnvrtc.so.1[3-9]"))
    places += sorted(glob.glob("/usr/local/cuda*/lib64/libnvrtc.so.1[3-9]"))
    for place in places + ["libnvrtc.so.13", "libnvrtc.so"]:
        try:
            # NVRTC opens this one by its name alone: it has to be there already.
            for builtins in glob.glob(os.path.join(os.path.dirname(place) or "/nowhere", "libnvrtc-builtins.so.1*")):
                ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise SystemExit("libnvrtc is nowhere to be found: name it in NVRTC")


def cubin(job):
    group, name, source, arch, defines = job
    nvrtc = library()
    texts = headers()
    names = list(texts)
    strings = lambda list: (ctypes.c_char_p * len(list))(*[text.encode() for text in list])
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
    options += ["--define-macro=" + d for d in defines]
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), open(path_of(source)).read().encode(), source.encode(),
                                      len(names), strings([texts[n] for n in names]), strings(names))
    status = status or nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    base = os.path.join(HERE, "cubins", f"{group}-{name}")
    open(base + ".log", "w").write(text)
    if status:
        return False, f"{group} {name}: FAILED with {status}\n{text[:1500]}"
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, image)
    open(base + ".cubin", "wb").write(image.raw[:size.value])
    return True, f"{group} {name}: " + "; ".join(summary(text))


def summary(log):
    """Registers, spills and static shared memory of each kernel, from what ptxas said."""
    found = []
    for part in log.split("Compiling entry function")[1:]:
        kernel = re.search(r"'(\w+)'", part).group(1)
        registers = re.search(r"Used (\d+) registers", part)
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()
        spilled = f" STACK {stack} SPILLS {stores}/{loads}" if stack != "0" or stores != "0" else ""
        smem = re.search(r"(\d+) bytes smem", part)
        found.append(f"{kernel} {registers.group(1)} regs{' static ' + smem.group(1) if smem else ''}{spilled}")
    if "C75" in log:
        found.append("WGMMA SERIALISED: " + " ".join(line for line in log.splitlines() if "C75" in line))
    return found


def emulated(job):
    group, name, source, _, defines = job
    out = os.path.join(HERE, "emulated", f"{group}-{name}.so")
    text = f'#include "launch.cpp"\n#include "machine.cpp"\n#include "{path_of(source)}"\n'
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-gnu-unique",
             "-Wl,-Bsymbolic", "-w", "-DCAIRN_EMULATOR", "-I" + HERE, "-I" + KERNELS,
             "-I" + os.path.join(KERNELS, "emulator")]
    made = subprocess.run(["c++", *flags, *["-D" + d for d in defines], "-x", "c++", "-", "-o", out], input=text,
                          text=True, capture_output=True)
    good = made.returncode == 0
    return good, f"{group} {name}: " + ("built" if good else "FAILED\n" + made.stderr[:4000])


def key(job, emulator):
    """A hash of what a variant is made from."""
    texts = [repr(job), open(path_of(job[2])).read(), *(f"{name} {text}" for name, text in sorted(headers().items()))]
    if emulator:
        texts += [open(path).read() for path in sorted(glob.glob(os.path.join(KERNELS, "emulator/*")))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def build(work):
    job, stamp, emulator = work
    good, said = (emulated if emulator else cubin)(job)
    if good:
        open(stamp, "w").write(key(job, emulator))
    return said


def main():
    words = sys.argv[1:]
    emulator, force = "--emulator" in words, "--force" in words
    wanted = [word for word in words if not word.startswith("--")]
    folder = os.path.join(HERE, "emulated" if emulator else "cubins")
    os.makedirs(folder, exist_ok=True)
    jobs = []
    for job in variants():
        made = os.path.join(folder, f"{job[0]}-{job[1]}" + (".so" if emulator else ".cubin"))
        stamp = made + ".stamp"
        known = os.path.exists(made) and os.path.exists(stamp) and open(stamp).read() == key(job, emulator)
        chosen = not wanted or job[0] in wanted or f"{job[0]}-{job[1]}" in wanted
        if chosen and (force or not known):
            jobs.append((job, stamp, emulator))
    with ProcessPoolExecutor(int(os.environ.get("JOBS", os.cpu_count()))) as pool:
        for said in pool.map(build, jobs):
            print(said, flush=True)


main()
