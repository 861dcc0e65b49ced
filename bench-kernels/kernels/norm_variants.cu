// LayerNorm with one warp a row of up to 1024 numbers: no barriers. Wider rows, and rows that are not whole vectors, go
// the old way.
//
// NORM_FORWARD 1: as now, but the choice between vectors and single numbers is made once, outside. 2: that, and three
// units a lane where the row has no more. 3: that, and a warp has several rows, the next on its way while one is
// worked on, gain and bias in registers; the grid is at most what fits.
// NORM_BACKWARD 1: one warp a row, what d_x was is read with the rest, the gain in registers. 2: that, and the next row
// on its way.
#include "norm.cu"

#ifndef NARROW_THREADS
#define NARROW_THREADS 256
#endif
#ifndef NARROW_BLOCKS
#define NARROW_BLOCKS 2
#endif
constexpr int NARROW_WARPS = NARROW_THREADS / LANES;

// Words the compiler may not keep unpacked, in twice the registers, from one use to the next.
#ifdef CAIRN_EMULATOR
inline void keep_packed(Words&) {}
#else
__device__ __forceinline__ void keep_packed(Words& words) {
    asm volatile("" : "+r"(words.word[0]), "+r"(words.word[1]), "+r"(words.word[2]), "+r"(words.word[3]));
}
#endif

// A lane's units of a row of whole vectors.
template <int UNITS>
struct Row {
    Words unit[UNITS];

    __device__ __forceinline__ void load(const bf* from, int width, bool there) {
#pragma unroll
        for (int v = 0; v < UNITS; v++) {
            int column = threadIdx.x % LANES * 8 + v * LANES * 8;
            unit[v] = load8(from + column, there ? width - column : 0, true);
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

template <int UNITS>
__device__ __forceinline__ void write_normed(const Forward& f, Row<UNITS>& kept, Row<UNITS>& weight,
                                             Row<UNITS>& bias, int row) {
    float total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int v = 0; v < UNITS; v++) {
#pragma unroll
        for (int i = 0; i < 8; i++) total += unpacked(kept.unit[v], i);
    }
    float mean = warp_sum(total) / f.width;
    kept.keep();
#pragma unroll
    for (int v = 0; v < UNITS; v++) {
        bool there = static_cast<int>(threadIdx.x % LANES * 8 + v * LANES * 8) < f.width;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float off = unpacked(kept.unit[v], i) - mean;
            squares += there ? off * off : 0.0f;
        }
    }
    float scale = rsqrtf(warp_sum(squares) / f.width + f.epsilon);
    kept.keep();
    weight.keep();
    bias.keep();
    if (threadIdx.x % LANES == 0) {
        f.statistics[2 * static_cast<long long>(row)] = mean;
        f.statistics[2 * static_cast<long long>(row) + 1] = scale;
    }
    Row<UNITS> normed;
#pragma unroll
    for (int v = 0; v < UNITS; v++) {
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            value[i] = (unpacked(kept.unit[v], i) - mean) * scale * unpacked(weight.unit[v], i);
            value[i] += unpacked(bias.unit[v], i);
        }
        normed.unit[v] = packed(value);
    }
    normed.store(f.normed + static_cast<long long>(row) * f.width, f.width);
}

template <int UNITS>
__device__ __forceinline__ void add_row(Row<UNITS>& to, const Row<UNITS>& added) {
#pragma unroll
    for (int v = 0; v < UNITS; v++) {
        float sum[8];
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] = unpacked(to.unit[v], i) + unpacked(added.unit[v], i);
        to.unit[v] = packed(sum);
    }
}

template <int UNITS>
__device__ __forceinline__ void narrow_forward(const Forward& f) {
    int row = blockIdx.x * NARROW_WARPS + threadIdx.x / LANES, stride = gridDim.x * NARROW_WARPS;
    Row<UNITS> weight, bias, x, delta;
    long long step = static_cast<long long>(stride) * f.width, at = static_cast<long long>(row) * f.width;
    bool fused = f.delta != nullptr;
    x.load(f.x + at, f.width, row < f.rows);
    if (fused) delta.load(f.delta + at, f.width, row < f.rows);
    weight.load(f.weight, f.width, true);
    bias.load(f.bias, f.width, true);
    for (; row < f.rows; row += stride, at += step) {
        Row<UNITS> kept = x;
        if (fused) {
            add_row(kept, delta);
            kept.store(f.sum + at, f.width);
        }
        bool more = row + stride < f.rows;
        x.load(f.x + at + step, f.width, more);
        if (fused) delta.load(f.delta + at + step, f.width, more);
        write_normed(f, kept, weight, bias, row);
    }
}

template <int UNITS>
__device__ __forceinline__ void single_forward(const Forward& f) {
    int row = blockIdx.x * NARROW_WARPS + threadIdx.x / LANES;
    if (row >= f.rows) return;
    Row<UNITS> weight, bias, x, delta;
    long long at = static_cast<long long>(row) * f.width;
    x.load(f.x + at, f.width, true);
    if (f.delta != nullptr) {
        delta.load(f.delta + at, f.width, true);
        add_row(x, delta);
        x.store(f.sum + at, f.width);
    }
    weight.load(f.weight, f.width, true);
    bias.load(f.bias, f.width, true);
    write_normed(f, x, weight, bias, row);
}

#ifdef NORM_FORWARD
extern "C" __global__ void __launch_bounds__(NARROW_THREADS, NARROW_BLOCKS)
    layernorm_forward_narrow(bf* normed, bf* sum, float* statistics, const bf* x, const bf* delta, const bf* weight,
                             const bf* bias, int rows, int width, float epsilon) {
    Forward f = {normed, sum, statistics, x, delta, weight, bias, rows, width, epsilon};
    bool vector = width % 8 == 0 && aligned16(weight) && aligned16(bias) && width <= 1024;
    if (vector && width <= 768 && NORM_FORWARD >= 2) {
        if (NORM_FORWARD == 2) single_forward<3>(f);
        if (NORM_FORWARD == 3) narrow_forward<3>(f);
    } else if (vector) {
        if (NORM_FORWARD < 3) single_forward<4>(f);
        if (NORM_FORWARD == 3) narrow_forward<4>(f);
    } else if (NARROW_THREADS == NORM_THREADS && NORM_FORWARD < 3) {
        norm_forward<true>(f);
    }
}
EXPORT(layernorm_forward_narrow, NARROW_THREADS)
#endif

#ifdef NORM_BACKWARD
template <int UNITS>
struct BackwardRow {
    Row<UNITS> x, d, old;
    float mean, scale;

    __device__ __forceinline__ void load(const Backward& b, int row, bool there) {
        long long at = static_cast<long long>(row) * b.width;
        x.load(b.x + at, b.width, there);
        d.load(b.d_normed + at, b.width, there);
        old.load(b.d_x + at, b.width, there && b.add);
        mean = there ? b.statistics[2 * static_cast<long long>(row)] : 0.0f;
        scale = there ? b.statistics[2 * static_cast<long long>(row) + 1] : 0.0f;
    }
};

template <int UNITS>
struct NarrowGains {
    float weight[UNITS][8] = {}, bias[UNITS][8] = {};
};

template <int UNITS>
__device__ __forceinline__ void narrow_row(const Backward& b, BackwardRow<UNITS>& r, Row<UNITS>& weight,
                                           NarrowGains<UNITS>& gains, int row) {
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
            total += g;
            gains.weight[v][i] += dy * h;
            gains.bias[v][i] += dy;
        }
    }
    along = warp_sum(along) / b.width;
    total = warp_sum(total) / b.width;
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

template <int UNITS>
__device__ __forceinline__ void narrow_backward(const Backward& b) {
    DYNAMIC_SHARED(float, sums);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int run = (b.rows + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * run, end = min(begin + run, b.rows);
    NarrowGains<UNITS> gains;
    Row<UNITS> weight;
    weight.load(b.weight, b.width, true);
    if (NORM_BACKWARD == 1) {
        for (int row = begin + warp; row < end; row += NARROW_WARPS) {
            BackwardRow<UNITS> here;
            here.load(b, row, true);
            narrow_row(b, here, weight, gains, row);
        }
    } else {
        BackwardRow<UNITS> next;
        next.load(b, begin + warp, begin + warp < end);
        for (int row = begin + warp; row < end; row += NARROW_WARPS) {
            BackwardRow<UNITS> here = next;
            next.load(b, row + NARROW_WARPS, row + NARROW_WARPS < end);
            narrow_row(b, here, weight, gains, row);
        }
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
                    sums[second] = gains.bias[v][i] + (turn == 0 ? 0.0f : sums[second]);
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 2 * b.width; i += NARROW_THREADS) {
        b.partial[static_cast<long long>(blockIdx.x) * 2 * b.width + i] = sums[i];
    }
}

// For widths of up to 256 UNITS numbers, a multiple of eight.
extern "C" __global__ void __launch_bounds__(NARROW_THREADS, NARROW_BLOCKS)
    layernorm_backward_narrow(bf* d_x, float* partial, const bf* x, const float* statistics, const bf* weight,
                              const bf* d_normed, int rows, int width, int add) {
    narrow_backward<NARROW_UNITS>({d_x, partial, x, statistics, weight, d_normed, rows, width, add});
}
EXPORT(layernorm_backward_narrow, NARROW_THREADS)
#endif
