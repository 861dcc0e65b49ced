// cross_entropy with the row, or as much of it as fits, kept in shared memory between its two uses: global memory is
// read once and written once. All of the row is on its way at once (cp.async), in four parts; a thread reads what it
// brought itself, so that no barrier is needed between.
//
// Launch: block KEPT_THREADS, grid rows, dynamic shared memory 2 kept bytes, kept = min(pitch, what fits), a multiple
// of eight.
#include "loss.cu"

#ifndef KEPT_THREADS
#define KEPT_THREADS 512
#endif
#ifndef KEPT_BLOCKS
#define KEPT_BLOCKS 2
#endif
constexpr int KEPT_WARPS = KEPT_THREADS / LANES;
constexpr int KEPT_STRIDE = KEPT_THREADS * 8;   // numbers between a thread's units
constexpr int KEPT_UNITS = 4;                   // that are summed together
constexpr int KEPT_PART = KEPT_STRIDE * KEPT_UNITS;
constexpr int KEPT_PARTS = 65536 / KEPT_PART;   // of a row that are kept, at most

// As Softmax::add for four whole units: one rescaling for all.
__device__ __forceinline__ void add_units(Softmax& s, const Words (&words)[KEPT_UNITS]) {
    float high = LOWEST / LOG2_E;
#pragma unroll
    for (int u = 0; u < KEPT_UNITS; u++) {
#pragma unroll
        for (int i = 0; i < 8; i++) high = fmaxf(high, unpacked(words[u], i));
    }
    high = fmaxf(s.most, high * LOG2_E);
    float sum[4] = {s.sum * exp2_fast(s.most - high), 0.0f, 0.0f, 0.0f};
    s.most = high;
#pragma unroll
    for (int u = 0; u < KEPT_UNITS; u++) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum[u] += exp2_fast(unpacked(words[u], i) * LOG2_E - high);
    }
    s.sum = sum[0] + sum[1] + (sum[2] + sum[3]);
}

// As joined, for blocks of another size.
__device__ __forceinline__ Softmax joined_kept(Softmax mine) {
    SHARED_ARRAY(float, parts, KEPT_WARPS * 2);
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        float most = __shfl_xor_sync(WHOLE_WARP, mine.most, distance);
        mine.join(most, __shfl_xor_sync(WHOLE_WARP, mine.sum, distance));
    }
    if (threadIdx.x % LANES == 0) {
        parts[threadIdx.x / LANES * 2] = mine.most;
        parts[threadIdx.x / LANES * 2 + 1] = mine.sum;
    }
    __syncthreads();
    Softmax all;
    for (int w = 0; w < KEPT_WARPS; w++) all.join(parts[2 * w], parts[2 * w + 1]);
    return all;
}

// Eight logits that are whole and do not have the target among them, or any.
__device__ __forceinline__ Words slopes_fast(const Words& words, int column, int vocabulary, int target, float scale,
                                             float log_sum) {
    if (column + 8 > vocabulary || (target >= column && target < column + 8)) {
        return slopes(words, column, vocabulary, target, scale, log_sum);
    }
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = scale * exp2_fast(unpacked(words, i) * LOG2_E - log_sum);
    return packed(x);
}

extern "C" __global__ void __launch_bounds__(KEPT_THREADS, KEPT_BLOCKS)
    cross_entropy_kept(bf* logits, float* row_losses, const unsigned* targets, int rows, int vocabulary, int pitch,
                       float scale, int gradient, int kept) {
    DYNAMIC_SHARED(bf, row_kept);
    if (static_cast<int>(blockIdx.x) >= rows) return;
    int target = static_cast<int>(targets[blockIdx.x]);
    bf* row = logits + static_cast<long long>(blockIdx.x) * pitch;
    bool vector = pitch % 8 == 0;
    kept = vector ? min(kept, KEPT_PART * KEPT_PARTS) : 0;
#pragma unroll
    for (int part = 0; part < KEPT_PARTS; part++) {
#pragma unroll
        for (int u = 0; u < KEPT_UNITS; u++) {
            int column = part * KEPT_PART + u * KEPT_STRIDE + threadIdx.x * 8;
            if (column < kept) copy_async_16(row_kept + column, row + column, true);
        }
        copy_commit();
    }
    float wanted = to_float(row[target]) * LOG2_E;
    Softmax mine;
    auto add = [&](int base, bool from_kept) {
        Words words[KEPT_UNITS];
#pragma unroll
        for (int u = 0; u < KEPT_UNITS; u++) {
            int column = base + u * KEPT_STRIDE;
            if (from_kept && column < kept) {
                words[u] = load_words(row_kept + column);
            } else {
                words[u] = load8(row + column, (vector ? pitch : vocabulary) - column, vector);
            }
        }
        if (base + 3 * KEPT_STRIDE + 8 <= vocabulary) {
            add_units(mine, words);
        } else {
#pragma unroll
            for (int u = 0; u < KEPT_UNITS; u++) {
                int left = vocabulary - (base + u * KEPT_STRIDE);
                if (left > 0) mine.add(words[u], left);
            }
        }
    };
#pragma unroll
    for (int part = 0; part < KEPT_PARTS; part++) {
        if (part == 0) copy_wait<KEPT_PARTS - 1>();
        if (part == KEPT_PARTS / 4) copy_wait<KEPT_PARTS - 1 - KEPT_PARTS / 4>();
        if (part == KEPT_PARTS / 2) copy_wait<KEPT_PARTS - 1 - KEPT_PARTS / 2>();
        if (part == KEPT_PARTS * 3 / 4) copy_wait<0>();
        // A part that is kept only to its middle is still summed here.
        int base = part * KEPT_PART + threadIdx.x * 8;
        if (part * KEPT_PART < kept && base < vocabulary) add(base, true);
    }
    int rest = (kept + KEPT_PART - 1) / KEPT_PART * KEPT_PART + threadIdx.x * 8;
    for (int base = rest; base < vocabulary; base += KEPT_PART) add(base, false);
    // The barrier inside also lets every thread read the target's logit before any writes gradients.
    Softmax all = joined_kept(mine);
    float log_sum = all.most + log2f(all.sum);
    if (threadIdx.x == 0) row_losses[blockIdx.x] = (log_sum - wanted) * LN_2;
    if (!gradient) return;
#pragma unroll 2
    for (int column = threadIdx.x * 8; column < kept; column += KEPT_STRIDE) {
        Words words = load_words(row_kept + column);
        store_words(row + column, slopes_fast(words, column, vocabulary, target, scale, log_sum));
    }
    for (int column = kept + threadIdx.x * 8; column < pitch; column += KEPT_STRIDE) {
        Words words = load8(row + column, pitch - column, vector);
        store8(row + column, slopes(words, column, vocabulary, target, scale, log_sum), pitch - column, vector);
    }
}
EXPORT(cross_entropy_kept, KEPT_THREADS)
