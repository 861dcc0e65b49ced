// Softmax cross-entropy, its gradient written over the logits.
//
// One block has one row: an online softmax (Milakov and Gimelshein, 2018) needs the row once, and the second pass that
// writes the gradient finds it in the second-level cache.
//
// Floor: 4 bytes a logit with gradient, 2 without.
//
// Launch:
//   cross_entropy: block 512, grid rows, no dynamic shared memory.
//   sum_losses: block 256, grid 1, no dynamic shared memory.
#include "common.cuh"

constexpr int LOSS_THREADS = 512;
constexpr int LOSS_WARPS = LOSS_THREADS / LANES;
constexpr int LOSS_VECTORS = 4;                    // loads under way at a time
constexpr int SUM_THREADS = 256;
constexpr float LOWEST = -3.0e38f;

// The largest of the logits met, in units of log2(e), and the sum of 2^(logit - most).
struct Softmax {
    float most = LOWEST, sum = 0.0f;

    __device__ __forceinline__ void add(const Words& words, int left) {
        float x[8], high = most;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] = unpacked(words, i) * LOG2_E;
            high = i < left ? fmaxf(high, x[i]) : high;
        }
        sum *= exp2_fast(most - high);
        most = high;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += i < left ? exp2_fast(x[i] - high) : 0.0f;
    }

    __device__ __forceinline__ void join(float other_most, float other_sum) {
        float high = fmaxf(most, other_most);
        sum = sum * exp2_fast(most - high) + other_sum * exp2_fast(other_most - high);
        most = high;
    }
};

// Joins the block's softmaxes in an order fixed by the block; every thread gets the whole, and all must call.
__device__ __forceinline__ Softmax joined(Softmax mine) {
    SHARED_ARRAY(float, parts, LOSS_WARPS * 2);
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
    for (int w = 0; w < LOSS_WARPS; w++) all.join(parts[2 * w], parts[2 * w + 1]);
    return all;
}

// scale (softmax - one-hot) of eight logits from `column` on; 0 past the vocabulary. log_sum is to base 2.
__device__ __forceinline__ Words slopes(const Words& words, int column, int vocabulary, int target, float scale,
                                        float log_sum) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float value = scale * exp2_fast(unpacked(words, i) * LOG2_E - log_sum);
        if (column + i == target) value -= scale;
        x[i] = column + i < vocabulary ? value : 0.0f;
    }
    return packed(x);
}

// logits: [rows, pitch], of which `vocabulary` columns count. row_losses[i] = log(sum exp(logits)) - logits[target],
// not finite if the target's logit is not, or another is NaN or infinity. With `gradient`, logits become
// scale (softmax - one-hot) and the columns past the vocabulary 0; without, they stay.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS, 2)
    cross_entropy(bf* logits, float* row_losses, const unsigned* targets, int rows, int vocabulary, int pitch,
                  float scale, int gradient) {
    if (static_cast<int>(blockIdx.x) >= rows) return;
    int target = static_cast<int>(targets[blockIdx.x]);
    bf* row = logits + static_cast<long long>(blockIdx.x) * pitch;
    bool vector = pitch % 8 == 0;
    constexpr int STRIDE = LOSS_THREADS * 8;
    float wanted = to_float(row[target]) * LOG2_E;
    Softmax mine;
    for (int base = threadIdx.x * 8; base < vocabulary; base += STRIDE * LOSS_VECTORS) {
        Words words[LOSS_VECTORS];
#pragma unroll
        for (int v = 0; v < LOSS_VECTORS; v++) {
            int column = base + v * STRIDE;
            words[v] = load8(row + column, (vector ? pitch : vocabulary) - column, vector);
        }
#pragma unroll
        for (int v = 0; v < LOSS_VECTORS; v++) {
            int left = vocabulary - (base + v * STRIDE);
            if (left > 0) mine.add(words[v], left);
        }
    }
    // The barrier inside also lets every thread read the target's logit before any writes gradients.
    Softmax all = joined(mine);
    float log_sum = all.most + log2f(all.sum);
    if (threadIdx.x == 0) row_losses[blockIdx.x] = (log_sum - wanted) * LN_2;
    if (!gradient) return;
    for (int base = threadIdx.x * 8; base < pitch; base += STRIDE * LOSS_VECTORS) {
        Words words[LOSS_VECTORS];
#pragma unroll
        for (int v = 0; v < LOSS_VECTORS; v++) {
            int column = base + v * STRIDE;
            words[v] = load8(row + column, pitch - column, vector);
        }
#pragma unroll
        for (int v = 0; v < LOSS_VECTORS; v++) {
            int column = base + v * STRIDE;
            store8(row + column, slopes(words[v], column, vocabulary, target, scale, log_sum), pitch - column, vector);
        }
    }
}
EXPORT(cross_entropy, LOSS_THREADS)

// losses[index] = the sum of the rows' losses, or that much more where `add`; float64, in an order fixed by `rows`.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    sum_losses(double* losses, const float* row_losses, int rows, int index, int add) {
    double sum = 0;
    for (int i = threadIdx.x; i < rows; i += SUM_THREADS) sum += row_losses[i];
    sum = group_sum(sum, SUM_THREADS / LANES);
    if (threadIdx.x == 0) losses[index] = add ? losses[index] + sum : sum;
}
EXPORT(sum_losses, SUM_THREADS)
