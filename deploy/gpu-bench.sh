#!/usr/bin/env bash
# Everything that is measured on a GPU, with one command: tests, kernels' registers, training speed, and PyTorch beside it.
#
#   deploy/gpu-bench.sh                 builds with cargo, then runs all
#   deploy/gpu-bench.sh BINARIES        takes `cairn` and `worker-tests` from that folder instead
#
# `worker-tests` is the worker's test binary with the feature gpu-tests: `deploy/gpu-bench.sh --carry FOLDER` builds both
# into FOLDER on a machine without a GPU. NVRTC and cuBLASLt are looked for as `cairn doctor` does; to name their folders,
# set CAIRN_CUDA_LIBRARIES. Where python3 has no PyTorch that part says so. Results go to $OUT (here by default): a text
# file for each part. Parts that fail do not stop the others; the exit code is the number of those that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-$PWD/gpu-bench-$(date +%Y%m%d-%H%M%S)}"

build() {
    local folder="$1" binary
    mkdir -p "$folder"
    cargo build --release --quiet -p cli || return 1
    binary="$(cargo test --release --quiet -p worker --lib --features gpu-tests --no-run --message-format=json |
        python3 -c 'import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] == "worker":
        print(made["executable"])')"
    [ -n "$binary" ] && cp "$binary" "$folder/worker-tests" && cp target/release/cairn "$folder/cairn"
}

if [ "${1:-}" = "--carry" ]; then
    build "${2:?the folder to build into}"
    exit
fi
BINARIES="${1:-$OUT/bin}"
mkdir -p "$OUT"
[ -n "${1:-}" ] || build "$BINARIES" || { echo "gpu-bench: the build failed" >&2; exit 1; }

failed=0
part() {
    local name="$1"
    shift
    printf '== %s\n' "$name"
    if "$@" >"$OUT/$name.txt" 2>&1; then
        tail -n 40 "$OUT/$name.txt"
    else
        printf 'failed (%s):\n' "$?"
        tail -n 30 "$OUT/$name.txt"
        failed=$((failed + 1))
    fi
}

part card nvidia-smi
part doctor "$BINARIES/cairn" doctor
part tests "$BINARIES/worker-tests" --test-threads 1 gpu::
part kernels "$BINARIES/worker-tests" --nocapture every_kernel_compiles
# 124M parameters, 64 sequences of 1,024 tokens a step, in one micro-batch.
part train "$BINARIES/cairn" bench train --device cuda --preset gpt2-124m --sequence-length 1024 --global-batch 64 \
    --micro-batch 64 --seconds 20 --table
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    part torch python3 tests/peers/torch_gpu.py --batch 64 --sequence 1024 --seconds 30
else
    echo "== torch: python3 has no PyTorch that sees a GPU"
fi
exit "$failed"
