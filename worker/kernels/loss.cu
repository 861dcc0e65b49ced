// Softmax cross-entropy, its gradient written over the logits.
//
// One block has one row: an online softmax (Milakov and Gimelshein, 2018) needs the row once, and the second pass that
// writes the gradient finds it, or as much of it as fits, in shared memory. All of that is on its way at once.
//
// Floor: 4 bytes a logit with gradient, 2 without.
//
// Launch:
//   cross_entropy: block 512, grid rows, dynamic shared memory 2 kept bytes, with `kept`, its last argument, a multiple
//     of eight, at most the pitch. It decides no bits: what is not kept is read twice.
//   sum_losses: block 256, grid 1, no dynamic shared memory.
#include "common.cuh"

constexpr int LOSS_THREADS = 512;
constexpr int LOSS_WARPS = LOSS_THREADS / LANES;
constexpr int LOSS_UNITS = 4;                      // of a thread, summed together
constexpr int LOSS_STRIDE = LOSS_THREADS * 8;      // numbers between a thread's units
constexpr int LOSS_PART = LOSS_STRIDE * LOSS_UNITS;
constexpr int LOSS_PARTS = 65536 / LOSS_PART;      // of a row that are kept, at most
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

    // The same for whole units: one rescaling for all.
    __device__ __forceinline__ void add(const Words (&words)[LOSS_UNITS]) {
        float high = LOWEST / LOG2_E;
#pragma unroll
        for (int u = 0; u < LOSS_UNITS; u++) {
#pragma unroll
            for (int i = 0; i < 8; i++) high = fmaxf(high, unpacked(words[u], i));
        }
        high = fmaxf(most, high * LOG2_E);
        float part[LOSS_UNITS] = {sum * exp2_fast(most - high)};
        most = high;
#pragma unroll
        for (int u = 0; u < LOSS_UNITS; u++) {
#pragma unroll
            for (int i = 0; i < 8; i++) part[u] += exp2_fast(unpacked(words[u], i) * LOG2_E - high);
        }
        sum = part[0] + part[1] + (part[2] + part[3]);
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

// Eight logits that are whole and do not have the target among them, or any.
__device__ __forceinline__ Words slopes_of_any(const Words& words, int column, int vocabulary, int target, float scale,
                                               float log_sum) {
    if (column + 8 > vocabulary || (target >= column && target < column + 8)) {
        return slopes(words, column, vocabulary, target, scale, log_sum);
    }
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = scale * exp2_fast(unpacked(words, i) * LOG2_E - log_sum);
    return packed(x);
}

// A row of logits, of which the first `kept` are, or will be, in shared memory too.
struct LogitRow {
    bf *row, *copy;
    int vocabulary, pitch, kept;
    bool vector;

    // Begins to bring what is kept, in as many groups as there are parts.
    __device__ __forceinline__ void keep() const {
#pragma unroll
        for (int part = 0; part < LOSS_PARTS; part++) {
#pragma unroll
            for (int u = 0; u < LOSS_UNITS; u++) {
                int column = part * LOSS_PART + u * LOSS_STRIDE + threadIdx.x * 8;
                if (column < kept) copy_async_16(copy + column, row + column, true);
            }
            copy_commit();
        }
    }

    // Adds four of this thread's units, from column `base` on. Every thread reads what it brought itself.
    __device__ __forceinline__ void add(Softmax& s, int base, bool from_kept) const {
        Words words[LOSS_UNITS];
#pragma unroll
        for (int u = 0; u < LOSS_UNITS; u++) {
            int column = base + u * LOSS_STRIDE;
            if (from_kept && column < kept) {
                words[u] = load_words(copy + column);
            } else {
                words[u] = load8(row + column, (vector ? pitch : vocabulary) - column, vector);
            }
        }
        if (base + (LOSS_UNITS - 1) * LOSS_STRIDE + 8 <= vocabulary) {
            s.add(words);
            return;
        }
#pragma unroll
        for (int u = 0; u < LOSS_UNITS; u++) {
            int left = vocabulary - (base + u * LOSS_STRIDE);
            if (left > 0) s.add(words[u], left);
        }
    }

    // The same order of sums whatever is kept.
    __device__ __forceinline__ Softmax softmax() const {
        Softmax mine;
#pragma unroll
        for (int part = 0; part < LOSS_PARTS; part++) {
            if (part == 0) copy_wait<LOSS_PARTS - 1>();
            if (part == LOSS_PARTS / 4) copy_wait<LOSS_PARTS - 1 - LOSS_PARTS / 4>();
            if (part == LOSS_PARTS / 2) copy_wait<LOSS_PARTS - 1 - LOSS_PARTS / 2>();
            if (part == LOSS_PARTS * 3 / 4) copy_wait<0>();
            // A part that is kept only to its middle is still summed here.
            int base = part * LOSS_PART + threadIdx.x * 8;
            if (part * LOSS_PART < kept && base < vocabulary) add(mine, base, true);
        }
        int rest = (kept + LOSS_PART - 1) / LOSS_PART * LOSS_PART + threadIdx.x * 8;
        for (int base = rest; base < vocabulary; base += LOSS_PART) add(mine, base, false);
        return mine;
    }
};

// logits: [rows, pitch], of which `vocabulary` columns count. row_losses[i] = log(sum exp(logits)) - logits[target],
// not finite if the target's logit is not, or another is NaN or infinity. With `gradient`, logits become
// scale (softmax - one-hot) and the columns past the vocabulary 0; without, they stay.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS, 2)
    cross_entropy(bf* logits, float* row_losses, const unsigned* targets, int rows, int vocabulary, int pitch,
                  float scale, int gradient, int kept) {
    DYNAMIC_SHARED(bf, copy);
    if (static_cast<int>(blockIdx.x) >= rows) return;
    int target = static_cast<int>(targets[blockIdx.x]);
    bf* row = logits + static_cast<long long>(blockIdx.x) * pitch;
    bool vector = pitch % 8 == 0;
    kept = vector ? min(kept, LOSS_PART * LOSS_PARTS) : 0;
    LogitRow whole = {row, copy, vocabulary, pitch, kept, vector};
    whole.keep();
    float wanted = to_float(row[target]) * LOG2_E;
    // The barrier inside also lets every thread read the target's logit before any writes gradients.
    Softmax all = joined(whole.softmax());
    float log_sum = all.most + log2f(all.sum);
    if (threadIdx.x == 0) row_losses[blockIdx.x] = (log_sum - wanted) * LN_2;
    if (!gradient) return;
#pragma unroll 2
    for (int column = threadIdx.x * 8; column < kept; column += LOSS_STRIDE) {
        Words words = load_words(copy + column);
        store_words(row + column, slopes_of_any(words, column, vocabulary, target, scale, log_sum));
    }
    for (int column = kept + threadIdx.x * 8; column < pitch; column += LOSS_STRIDE) {
        Words words = load8(row + column, pitch - column, vector);
        store8(row + column, slopes(words, column, vocabulary, target, scale, log_sum), pitch - column, vector);
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
