#!/bin/bash
# Times all variants on the GPU and looks at some with ncu. Results go to $OUT, or out/ here.
#
#     run.sh [GROUP | GROUP-NAME ...]
cd "$(dirname "$0")" || exit 1
OUT=${OUT:-$PWD/out}
mkdir -p "$OUT"
(g++ -std=c++17 -O2 harness.cpp -o harness -ldl || nvcc -std=c++17 -O2 -x c++ harness.cpp -o harness -ldl) &
python3 compile.py >"$OUT/compile.txt" 2>&1
grep -A20 FAILED "$OUT/compile.txt" | head -60
wait
# Each group by itself, and each variant where one breaks the device's context or does not end.
table() {
    for group in "$@"; do
        timeout 40 ./harness "$group"
        [ $? -lt 2 ] && continue
        echo "$group: broken off; one by one"
        for variant in $(awk -v group="$group" '$1 == group && $2 !~ /^0/ {print group "-" $2}' variants.txt); do
            timeout 15 ./harness "$variant" || echo "$variant: failed"
        done
    done
}
groups="copy $(awk '!/^#/ && $1 != "dot" {print $1}' variants.txt | uniq)"
table ${@:-$groups} | grep --line-buffered -v '^all agree' | awk '!/^GROUP/ || !seen++ {print; fflush()}' |
    tee "$OUT/table.txt"
[ $# -gt 0 ] && exit
profile() {
    local file=$1 limit=$2
    shift 2
    timeout "$limit" ncu --clock-control none --section SpeedOfLight --section Occupancy --section WarpStateStats \
        --section MemoryWorkloadAnalysis --kernel-name "regex:attention_(forward|backward)|layernorm" \
        ./harness --once "$@" >"$OUT/$file" 2>&1 || echo "ncu: $file is not whole"
}
profile ncu-attention.txt 30 forward-0-now forward-w1-group backward_kv-0-now backward_kv-w1-group backward_q-0-now \
    backward_q-w1-one-group
profile ncu-norms.txt 15 norm_forward-0-now norm_forward-2-three-units norm_backward-0-now norm_backward-1-warp-a-row
