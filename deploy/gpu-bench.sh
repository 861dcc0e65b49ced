#!/usr/bin/env bash
# Everything that is measured on a GPU, with one command: tests, kernels' registers, training speed, and PyTorch beside it.
#
#   deploy/gpu-bench.sh                 builds with cargo, then runs all
#   deploy/gpu-bench.sh BINARIES        takes `cairn` and `worker-tests` from that folder instead
#
# `worker-tests` is the worker's test binary with the feature gpu-tests: `deploy/gpu-bench.sh --carry FOLDER` builds both
# into FOLDER on a machine without a GPU. NVRTC and cuBLASLt are looked for as `cairn doctor` does; to name their folders,
# set CAIRN_CUDA_LIBRARIES. SECONDS_EACH is the length of each measurement, PARTS names the parts to run (all by default).
# Where python3 has no PyTorch that part says so. Results go to $OUT (here by default): a text file for each part. Parts
# that fail do not stop the others; the exit code is the number of those that failed.
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
    [ -n "$binary" ] && strip -o "$folder/worker-tests" "$binary" && strip -o "$folder/cairn" target/release/cairn
}

if [ "${1:-}" = "--carry" ]; then
    build "${2:?the folder to build into}"
    exit
fi
BINARIES="${1:-$OUT/bin}"
mkdir -p "$OUT"
[ -n "${1:-}" ] || build "$BINARIES" || { echo "gpu-bench: the build failed" >&2; exit 1; }

# The libraries of PyTorch's wheels serve as well as a toolkit's.
if [ -z "${CAIRN_CUDA_LIBRARIES:-}" ]; then
    CAIRN_CUDA_LIBRARIES="$(python3 -c 'import glob, nvidia
print(":".join(path for root in nvidia.__path__ for path in glob.glob(root + "/*/lib")))' 2>/dev/null)"
    export CAIRN_CUDA_LIBRARIES
fi

failed=0
# Runs a part for at most so many seconds.
part() {
    local name="$1" seconds="$2" began="$SECONDS"
    shift 2
    case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
    printf '== %s\n' "$name"
    if limited "$seconds" "$@" >"$OUT/$name.txt" 2>&1; then
        tail -n 40 "$OUT/$name.txt"
    else
        printf 'failed (%s):\n' "$?"
        tail -n 30 "$OUT/$name.txt"
        failed=$((failed + 1))
    fi
    printf '   (%s s)\n' "$((SECONDS - began))"
}

limited() {
    local seconds="$1"
    shift
    if [ "$(type -t "$1")" = function ]; then "$@"; else timeout "$seconds" "$@"; fi
}

# Trains one job on the card again and again: by one worker, by four that share it, and by two of which one is killed.
# Every time the weights must have the same digest.
digests() {
    local folder first="" digest way workers
    folder="$(mktemp -d)"
    for way in one one-again four killed; do
        case "$way" in one*) workers=1 ;; four) workers=4 ;; killed) workers=2 ;; esac
        "$BINARIES/cairn" train examples/gpt2-tiny.toml --fresh --workers "$workers" --store "$folder/$way" \
            --set resources.device=cuda --set model.hidden_size=256 --output json >"$folder/$way.log" 2>&1 &
        local run=$!
        if [ "$way" = killed ]; then
            until grep -q '"step":40,' "$folder/$way.log" || ! kill -0 "$run" 2>/dev/null; do sleep 0.05; done
            pkill -9 -n -f "$BINARIES/cairn worker" && echo "killed a worker"
        fi
        wait "$run" || { tail -n 5 "$folder/$way.log"; return 1; }
        digest="$(grep -o '"digest":"[0-9a-f]*"' "$folder/$way.log" | tail -n 1)"
        printf '%-10s %s  %s generations\n' "$way" "$digest" "$(grep -c '"event":"generation"' "$folder/$way.log")"
        [ "$digest" = "${first:=$digest}" ] && [ -n "$digest" ] || { echo "the digest differs"; return 1; }
    done
    rm -r "$folder"
}

part card 30 nvidia-smi
part doctor 60 "$BINARIES/cairn" doctor
part tests 300 "$BINARIES/worker-tests" --test-threads 1 gpu
part kernels 300 "$BINARIES/worker-tests" --nocapture every_kernel_compiles
part digests 120 digests
# 124M parameters, 64 sequences of 1,024 tokens a step, in one micro-batch.
train() {
    timeout 180 "$BINARIES/cairn" bench train --device cuda --preset gpt2-124m --sequence-length 1024 --global-batch 64 \
        --micro-batch 64 --seconds "${SECONDS_EACH:-10}" "$@"
}
part train 0 train --table --snapshots
part train-fast 0 train --set training.reduction=fast
small() {
    timeout 60 "$BINARIES/cairn" bench train --device cuda --preset small --seconds "${SECONDS_EACH:-10}" "$@"
}
part small 0 small --table
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    part torch 400 python3 tests/peers/torch_gpu.py --batch 64 --sequence 1024 --seconds "$((3 * ${SECONDS_EACH:-10}))"
else
    echo "== torch: python3 has no PyTorch that sees a GPU"
fi
exit "$failed"
