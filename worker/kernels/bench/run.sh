#!/bin/bash
# Times kernels on the GPU; results go to $OUT, or out/ here. Or, with --emulate, runs them on the CPU, at small shapes
# and with several orders of threads, and compares them.
#
#     run.sh [--emulate] [GROUP | GROUP-NAME ...]
cd "$(dirname "$0")" || exit 1
c++ -std=c++17 -O2 harness.cpp -o harness -ldl || exit 1
if [ "$1" = --emulate ]; then
    shift
    python3 compile.py --emulator "$@" | grep -v ': built$'
    # The libraries' thread-local variables are of the static kind.
    GLIBC_TUNABLES=glibc.rtld.optional_static_tls=1000000 exec ./harness --emulate "$@"
fi
OUT=${OUT:-$PWD/out}
mkdir -p "$OUT"
python3 compile.py "$@" >"$OUT/compile.txt" 2>&1
grep -A20 FAILED "$OUT/compile.txt"
# Each group by itself: a kernel that breaks the device's context ends only its own group.
for group in ${@:-copy $(awk '!/^#/ && $1 != "dot" {print $1}' variants.txt | uniq)}; do
    timeout 60 ./harness "$group" || echo "$group: failed"
done | awk '!/^GROUP/ || !seen++ {print; fflush()}' | tee "$OUT/table.txt"
