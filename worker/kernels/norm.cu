// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016), with the residual addition before them.
//
// A block has R rows at a time, R = 8, 4, 2, 1 for widths up to 1024, 2048, 4096, 8192, which is the widest. Its warps
// share them out, so that a thread has at most four units of eight numbers (two in layernorm_backward, which keeps more
// beside them). A row stays in registers between the sum and its use: one pass over memory. Statistics are sums in an
// order fixed by the width.
//
// Floors, bytes a number: forward 4 (8 with the residual), backward 6 (8 with add).
//
// Launch:
//   rmsnorm_forward, layernorm_forward: block 256, grid ceil(rows / R), no dynamic shared memory.
//   rmsnorm_backward: block 256, grid G, dynamic shared memory 4 * width bytes.
//   layernorm_backward: block 512, grid G, dynamic shared memory 8 * width bytes (past 48 KiB from width 6145 on).
//     G = min(ceil(rows / R), 264) by custom; any G is right, but it decides bits, so it may depend on the shape only.
//   The same with _768 or _1024 at the end, for widths up to that, a multiple of eight: block 128, grid
//     min(ceil(rows / 4), 396) by custom, dynamic shared memory 4 * width (rmsnorm) or 8 * width bytes (layernorm).
#include "common.cuh"

constexpr int NORM_THREADS = 256;
constexpr int CENTRED_BACKWARD_THREADS = 512;
constexpr int NARROW_THREADS = 128;
constexpr int NARROW_WARPS = NARROW_THREADS / LANES;

// Which row and which part of it a thread of a block of THREADS has.
template <int THREADS>
struct Share {
    static constexpr int VECTORS = 1024 / THREADS;   // units of a thread, at most
    int rows;                                        // of a block at a time
    int warps;                                       // that share a row
    int row;                                         // of those, this thread's
    int first;                                       // column of this thread's first unit
    int stride;                                      // columns between its units

    __device__ __forceinline__ explicit Share(int width) {
        rows = width <= 1024 ? 8 : width <= 2048 ? 4 : width <= 4096 ? 2 : 1;
        warps = THREADS / LANES / rows;
        int threads = warps * LANES;
        row = threadIdx.x / threads;
        first = threadIdx.x % threads * 8;
        stride = threads * 8;
    }
};
using ForwardShare = Share<NORM_THREADS>;
template <bool CENTRED>
using BackwardShare = Share<CENTRED ? CENTRED_BACKWARD_THREADS : NORM_THREADS>;

// The operands of a forward pass; `bias` only where the norm is centred.
struct Forward {
    bf *normed, *sum;
    float* statistics;
    const bf *x, *delta, *weight, *bias;
    int rows, width;
    float epsilon;
};

// This thread's part of sum = x + delta, stored too, or of x itself.
__device__ __forceinline__ void load_row(const Forward& f, const ForwardShare& share, int row, bool vector,
                                         Words (&kept)[ForwardShare::VECTORS]) {
    long long start = static_cast<long long>(row) * f.width;
    bool there = row < f.rows;
#pragma unroll
    for (int v = 0; v < ForwardShare::VECTORS; v++) {
        int column = share.first + v * share.stride;
        kept[v] = load8(f.x + start + column, there ? f.width - column : 0, vector);
    }
    if (f.delta == nullptr) return;
    Words added[ForwardShare::VECTORS];
#pragma unroll
    for (int v = 0; v < ForwardShare::VECTORS; v++) {
        int column = share.first + v * share.stride;
        added[v] = load8(f.delta + start + column, there ? f.width - column : 0, vector);
    }
#pragma unroll
    for (int v = 0; v < ForwardShare::VECTORS; v++) {
        int column = share.first + v * share.stride;
        float a[8], b[8];
        unpack(kept[v], a);
        unpack(added[v], b);
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] += b[i];
        // What is normalised is what the backward will read: the rounded sum.
        kept[v] = packed(a);
        store8(f.sum + start + column, kept[v], there ? f.width - column : 0, vector);
    }
}

// Both norms: a centred one takes the mean off and has a bias. Statistics are the scale, or mean and scale.
template <bool CENTRED>
__device__ __forceinline__ void norm_forward(const Forward& f) {
    ForwardShare share(f.width);
    int row = blockIdx.x * share.rows + share.row;
    bool there = row < f.rows, vector = f.width % 8 == 0;
    Words kept[ForwardShare::VECTORS];
    load_row(f, share, row, vector, kept);
    float mean = 0.0f, squares = 0.0f;
    if (CENTRED) {
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < ForwardShare::VECTORS; v++) {
#pragma unroll
            for (int i = 0; i < 8; i++) total += unpacked(kept[v], i);
        }
        mean = group_sum(total, share.warps) / f.width;
    }
#pragma unroll
    for (int v = 0; v < ForwardShare::VECTORS; v++) {
        int left = f.width - (share.first + v * share.stride);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float off = unpacked(kept[v], i) - mean;
            squares += i < left ? off * off : 0.0f;
        }
    }
    float scale = rsqrtf(group_sum(squares, share.warps) / f.width + f.epsilon);
    if (there && share.first == 0) {
        if (CENTRED) f.statistics[2 * static_cast<long long>(row)] = mean;
        f.statistics[CENTRED ? 2 * static_cast<long long>(row) + 1 : row] = scale;
    }
    bool weight_vector = vector && aligned16(f.weight), bias_vector = vector && aligned16(f.bias);
#pragma unroll
    for (int v = 0; v < ForwardShare::VECTORS; v++) {
        int column = share.first + v * share.stride, left = there ? f.width - column : 0;
        if (left <= 0) break;
        float value[8], weight[8], bias[8] = {};
        unpack(kept[v], value);
        unpack(load8(f.weight + column, left, weight_vector), weight);
        if (CENTRED) unpack(load8(f.bias + column, left, bias_vector), bias);
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = (value[i] - mean) * scale * weight[i] + bias[i];
        store8(f.normed + static_cast<long long>(row) * f.width + column, packed(value), left, vector);
    }
}

// normed = sum scale weight, scale = 1 / sqrt(mean(sum^2) + epsilon), sum = x + delta; without delta (null, and sum
// too) x itself is normalised. scale: [rows].
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    rmsnorm_forward(bf* normed, bf* sum, float* scale, const bf* x, const bf* delta, const bf* weight, int rows,
                    int width, float epsilon) {
    norm_forward<false>({normed, sum, scale, x, delta, weight, nullptr, rows, width, epsilon});
}
EXPORT(rmsnorm_forward, NORM_THREADS)

// normed = (sum - mean) scale weight + bias; statistics: [rows, 2], mean and scale = 1 / sqrt(variance + epsilon).
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    layernorm_forward(bf* normed, bf* sum, float* statistics, const bf* x, const bf* delta, const bf* weight,
                      const bf* bias, int rows, int width, float epsilon) {
    norm_forward<true>({normed, sum, statistics, x, delta, weight, bias, rows, width, epsilon});
}
EXPORT(layernorm_forward, NORM_THREADS)

// The operands of a backward pass.
struct Backward {
    bf* d_x;
    float* partial;
    const bf* x;
    const float* statistics;
    const bf *weight, *d_normed;
    int rows, width, add;
};

// A thread's part of the gains' gradients: of its columns, over its rows.
template <bool CENTRED>
struct Gains {
    static constexpr int VECTORS = BackwardShare<CENTRED>::VECTORS;
    float weight[VECTORS][8] = {};
    float bias[CENTRED ? VECTORS : 1][8] = {};
};

// One row: with g = weight d_normed and h = (x - mean) scale, d_x = scale (g - h mean(g h)), less scale mean(g) where
// centred; the row's h d_normed and d_normed are added to the gains.
template <bool CENTRED>
__device__ __forceinline__ void row_backward(const Backward& b, const BackwardShare<CENTRED>& share, int row,
                                             bool there, Gains<CENTRED>& gains) {
    long long start = static_cast<long long>(row) * b.width;
    bool vector = b.width % 8 == 0, weight_vector = vector && aligned16(b.weight);
    constexpr int VECTORS = BackwardShare<CENTRED>::VECTORS;
    Words x[VECTORS], d[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int column = share.first + v * share.stride, left = there ? b.width - column : 0;
        x[v] = load8(b.x + start + column, left, vector);
        d[v] = load8(b.d_normed + start + column, left, vector);
    }
    float mean = 0.0f, scale = 0.0f;
    if (there) {
        mean = CENTRED ? b.statistics[2 * static_cast<long long>(row)] : 0.0f;
        scale = b.statistics[CENTRED ? 2 * static_cast<long long>(row) + 1 : row];
    }
    float along = 0.0f, total = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int column = share.first + v * share.stride;
        Words weight = load8(b.weight + column, there ? b.width - column : 0, weight_vector);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // Beyond the row's end d is 0, and so is all that is added.
            float h = (unpacked(x[v], i) - mean) * scale, dy = unpacked(d[v], i), g = dy * unpacked(weight, i);
            along += g * h;
            gains.weight[v][i] += dy * h;
            if (CENTRED) {
                total += g;
                gains.bias[CENTRED ? v : 0][i] += dy;
            }
        }
    }
    along = group_sum(along, share.warps) / b.width;
    if (CENTRED) total = group_sum(total, share.warps) / b.width;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int column = share.first + v * share.stride, left = there ? b.width - column : 0;
        if (left <= 0) break;
        Words weight = load8(b.weight + column, left, weight_vector), old = {{0, 0, 0, 0}};
        if (b.add) old = load8(b.d_x + start + column, left, vector);
        float result[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float h = (unpacked(x[v], i) - mean) * scale, g = unpacked(d[v], i) * unpacked(weight, i);
            result[i] = scale * (g - h * along - total) + unpacked(old, i);
        }
        store8(b.d_x + start + column, packed(result), left, vector);
    }
}

// The block's rows one after another, then its gains: groups of warps add theirs in order, through shared memory.
template <bool CENTRED>
__device__ __forceinline__ void norm_backward(const Backward& b) {
    DYNAMIC_SHARED(float, sums);
    BackwardShare<CENTRED> share(b.width);
    int run = (b.rows + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * run, end = min(begin + run, b.rows);
    Gains<CENTRED> gains;
    for (int first = begin; first < end; first += share.rows) {
        int row = first + share.row;
        row_backward<CENTRED>(b, share, row, row < end, gains);
    }
    for (int group = 0; group < share.rows; group++) {
        if (group == share.row) {
#pragma unroll
            for (int v = 0; v < Gains<CENTRED>::VECTORS; v++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int column = share.first + v * share.stride + i;
                    if (column >= b.width) continue;
                    sums[column] = gains.weight[v][i] + (group == 0 ? 0.0f : sums[column]);
                    if (!CENTRED) continue;
                    int second = b.width + column;
                    sums[second] = gains.bias[CENTRED ? v : 0][i] + (group == 0 ? 0.0f : sums[second]);
                }
            }
        }
        __syncthreads();
    }
    int values = CENTRED ? 2 * b.width : b.width;
    for (int i = threadIdx.x; i < values; i += blockDim.x) {
        b.partial[static_cast<long long>(blockIdx.x) * values + i] = sums[i];
    }
}

// d_x is replaced, or added to where `add`. partial: [gridDim.x, width], for column_sums; block i has the i-th run of
// ceil(rows / gridDim.x) rows.
extern "C" __global__ void __launch_bounds__(NORM_THREADS, 2)
    rmsnorm_backward(bf* d_x, float* partial, const bf* x, const float* scale, const bf* weight, const bf* d_normed,
                     int rows, int width, int add) {
    norm_backward<false>({d_x, partial, x, scale, weight, d_normed, rows, width, add});
}
EXPORT(rmsnorm_backward, NORM_THREADS)

// The same; partial: [gridDim.x, 2 width], the weight's part and then the bias's.
extern "C" __global__ void __launch_bounds__(CENTRED_BACKWARD_THREADS)
    layernorm_backward(bf* d_x, float* partial, const bf* x, const float* statistics, const bf* weight,
                       const bf* d_normed, int rows, int width, int add) {
    norm_backward<true>({d_x, partial, x, statistics, weight, d_normed, rows, width, add});
}
EXPORT(layernorm_backward, CENTRED_BACKWARD_THREADS)

// --- backward of rows of up to 256 UNITS numbers, a multiple of eight: one warp a row, no barriers ------------------

// A lane's units of such a row.
template <int UNITS>
struct Row {
    Words unit[UNITS];

    __device__ __forceinline__ void load(const bf* from, int width, bool there, bool vector) {
#pragma unroll
        for (int v = 0; v < UNITS; v++) {
            int column = threadIdx.x % LANES * 8 + v * LANES * 8;
            unit[v] = load8(from + column, there ? width - column : 0, vector);
        }
    }
    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int v = 0; v < UNITS; v++) keep_packed(unit[v]);
    }
    __device__ __forceinline__ void store(bf* to, int width) const {
#pragma unroll
        for (int v = 0; v < UNITS; v++) {
            int column = threadIdx.x % LANES * 8 + v * LANES * 8;
            store8(to + column, unit[v], width - column, true);
        }
    }
};

// What is read of a row.
template <bool CENTRED, int UNITS>
struct RowRead {
    Row<UNITS> x, d, old;
    float mean, scale;

    __device__ __forceinline__ void load(const Backward& b, int row, bool there) {
        long long at = static_cast<long long>(row) * b.width;
        x.load(b.x + at, b.width, there, true);
        d.load(b.d_normed + at, b.width, there, true);
        old.load(b.d_x + at, b.width, there && b.add, true);
        mean = CENTRED && there ? b.statistics[2 * static_cast<long long>(row)] : 0.0f;
        scale = there ? b.statistics[CENTRED ? 2 * static_cast<long long>(row) + 1 : row] : 0.0f;
    }
};

template <bool CENTRED, int UNITS>
struct NarrowGains {
    float weight[UNITS][8] = {}, bias[CENTRED ? UNITS : 1][8] = {};
};

// As row_backward.
template <bool CENTRED, int UNITS>
__device__ __forceinline__ void narrow_row(const Backward& b, RowRead<CENTRED, UNITS>& r, Row<UNITS>& weight,
                                           NarrowGains<CENTRED, UNITS>& gains, int row) {
    float along = 0.0f, total = 0.0f;
    weight.keep();
#pragma unroll
    for (int v = 0; v < UNITS; v++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // Beyond the row's end d is 0, and so is all that is added.
            float h = (unpacked(r.x.unit[v], i) - r.mean) * r.scale, dy = unpacked(r.d.unit[v], i);
            float g = dy * unpacked(weight.unit[v], i);
            along += g * h;
            gains.weight[v][i] += dy * h;
            if (CENTRED) {
                total += g;
                gains.bias[CENTRED ? v : 0][i] += dy;
            }
        }
    }
    along = warp_sum(along) / b.width;
    if (CENTRED) total = warp_sum(total) / b.width;
    r.x.keep();
    r.d.keep();
    weight.keep();
    Row<UNITS> result;
#pragma unroll
    for (int v = 0; v < UNITS; v++) {
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float h = (unpacked(r.x.unit[v], i) - r.mean) * r.scale;
            float g = unpacked(r.d.unit[v], i) * unpacked(weight.unit[v], i);
            value[i] = r.scale * (g - h * along - total) + unpacked(r.old.unit[v], i);
        }
        result.unit[v] = packed(value);
    }
    result.store(b.d_x + static_cast<long long>(row) * b.width, b.width);
}

// A block has a run of rows, its warps one after another; while a row is worked on, the next is on its way where
// AHEAD, which takes registers.
template <bool CENTRED, int UNITS, bool AHEAD>
__device__ __forceinline__ void narrow_backward(const Backward& b) {
    DYNAMIC_SHARED(float, sums);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int run = (b.rows + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * run, end = min(begin + run, b.rows);
    NarrowGains<CENTRED, UNITS> gains;
    Row<UNITS> weight;
    weight.load(b.weight, b.width, true, aligned16(b.weight));
    RowRead<CENTRED, UNITS> next;
    if (AHEAD) next.load(b, begin + warp, begin + warp < end);
    for (int row = begin + warp; row < end; row += NARROW_WARPS) {
        if (!AHEAD) next.load(b, row, true);
        RowRead<CENTRED, UNITS> here = next;
        if (AHEAD) next.load(b, row + NARROW_WARPS, row + NARROW_WARPS < end);
        narrow_row(b, here, weight, gains, row);
    }
    // The warps add theirs in order.
    for (int turn = 0; turn < NARROW_WARPS; turn++) {
        if (turn == warp) {
#pragma unroll
            for (int v = 0; v < UNITS; v++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int column = lane * 8 + v * LANES * 8 + i, second = b.width + column;
                    if (column >= b.width) continue;
                    sums[column] = gains.weight[v][i] + (turn == 0 ? 0.0f : sums[column]);
                    if (!CENTRED) continue;
                    sums[second] = gains.bias[CENTRED ? v : 0][i] + (turn == 0 ? 0.0f : sums[second]);
                }
            }
        }
        __syncthreads();
    }
    int values = CENTRED ? 2 * b.width : b.width;
    for (int i = threadIdx.x; i < values; i += NARROW_THREADS) {
        b.partial[static_cast<long long>(blockIdx.x) * values + i] = sums[i];
    }
}

// As rmsnorm_backward and layernorm_backward.
#define NARROW(name, centred, units, ahead)                                                                       \
    extern "C" __global__ void __launch_bounds__(NARROW_THREADS, 3)                                               \
        name(bf* d_x, float* partial, const bf* x, const float* statistics, const bf* weight, const bf* d_normed, \
             int rows, int width, int add) {                                                                      \
        narrow_backward<centred, units, ahead>({d_x, partial, x, statistics, weight, d_normed, rows, width, add}); \
    }                                                                                                             \
    EXPORT(name, NARROW_THREADS)
NARROW(rmsnorm_backward_768, false, 3, true)
NARROW(rmsnorm_backward_1024, false, 4, true)
NARROW(layernorm_backward_768, true, 3, true)
NARROW(layernorm_backward_1024, true, 4, false)
#undef NARROW
