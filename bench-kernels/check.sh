#!/bin/bash
# Runs all variants on the CPU, at small shapes and with several orders of threads, and compares them.
#
#     check.sh [GROUP ...]
cd "$(dirname "$0")" || exit 1
g++ -std=c++17 -O2 harness.cpp -o harness -ldl || exit 1
python3 compile.py --emulator | grep -v ': built$'
# The libraries' thread-local variables are of the static kind.
export GLIBC_TUNABLES=glibc.rtld.optional_static_tls=1000000
status=0
for group in ${@:-$(awk '!/^#/ && $1 != "dot" {print $1}' variants.txt | uniq)}; do
    ./harness --emulate "$group" || status=1
done
exit $status
