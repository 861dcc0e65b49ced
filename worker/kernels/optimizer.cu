// AdamW (Loshchilov and Hutter, 2019) on a shard of the canonical space, in one launch.
//
// The operations and their order are those of the CPU's kernel, each rounded by itself, so the bits are the same; only
// a tensor's run decides whether an element is decayed. The new parameters are rounded to bfloat16 on the way.
//
// Floor: 30 bytes an element: gradient, two moments and master copy in, all but the gradient out, bfloat16 copy out.
//
// Launch: block 256, grid ceil(n / 2048), no dynamic shared memory.
#include "common.cuh"

constexpr int ADAMW_THREADS = 256;
constexpr int ADAMW_VECTORS = 2;
constexpr int ADAMW_ELEMENTS = ADAMW_THREADS * ADAMW_VECTORS * 4;   // of a CTA

// As the worker's AdamwScalars.
struct Scalars {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root_correction2, epsilon, keep, clip;
};

// What an update of four elements reads and writes.
struct Four {
    float gradient[4], first[4], second[4], master[4];
};

// One element: decay, moments, step.
__device__ __forceinline__ void update(const Scalars& s, float keep, float gradient, float& first, float& second,
                                       float& master) {
    float g = __fmul_rn(gradient, s.clip);
    first = __fadd_rn(__fmul_rn(g, s.one_minus_beta1), __fmul_rn(first, s.beta1));
    second = __fadd_rn(__fmul_rn(__fmul_rn(g, g), s.one_minus_beta2), __fmul_rn(second, s.beta2));
    float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(second), s.inverse_root_correction2), s.epsilon);
    float step = __fdiv_rn(__fmul_rn(first, s.step_size), denominator);
    master = __fsub_rn(__fmul_rn(master, keep), step);
}

// The first run that ends after `element`.
__device__ __forceinline__ int run_of(const long long* run_end, int runs, long long element) {
    int low = 0, high = runs - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (run_end[middle] > element) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// master, first, second and gradient hold the shard alone, n elements; `parameters` is the whole canonical space and
// gets elements shard_start .. shard_start + n. Run r ends before element run_end[r] of the space (ascending, the last
// at or after the shard's end) and is decayed if run_decay[r]. `scalars` has the nine values of Scalars in order.
extern "C" __global__ void __launch_bounds__(ADAMW_THREADS)
    adamw(float* master, float* first, float* second, bf* parameters, const float* gradient, const long long* run_end,
          const int* run_decay, int runs, long long shard_start, long long n, const float* scalars) {
    long long base = static_cast<long long>(blockIdx.x) * ADAMW_ELEMENTS;
    bool vector = aligned16(master) && aligned16(first) && aligned16(second) && aligned16(gradient);
    Four four[ADAMW_VECTORS];
#pragma unroll
    for (int v = 0; v < ADAMW_VECTORS; v++) {
        long long at = base + (v * ADAMW_THREADS + threadIdx.x) * 4;
        int left = left_of(n, at, 4);
        load4(gradient + at, left, vector, four[v].gradient);
        load4(first + at, left, vector, four[v].first);
        load4(second + at, left, vector, four[v].second);
        load4(master + at, left, vector, four[v].master);
    }
    Scalars s = {scalars[0], scalars[1], scalars[2], scalars[3], scalars[4],
                 scalars[5], scalars[6], scalars[7], scalars[8]};
    int run = run_of(run_end, runs, shard_start + base);
    bool one_run = run_end[run] >= shard_start + base + ADAMW_ELEMENTS;
#pragma unroll
    for (int v = 0; v < ADAMW_VECTORS; v++) {
        long long at = base + (v * ADAMW_THREADS + threadIdx.x) * 4;
        int left = left_of(n, at, 4), own = run;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!one_run) {
                while (own < runs - 1 && run_end[own] <= shard_start + at + i) own++;
            }
            float keep = run_decay[own] ? s.keep : 1.0f;
            update(s, keep, four[v].gradient[i], four[v].first[i], four[v].second[i], four[v].master[i]);
        }
        store4(first + at, four[v].first, left, vector);
        store4(second + at, four[v].second, left, vector);
        store4(master + at, four[v].master, left, vector);
        bf* to = parameters + shard_start + at;
        const float(&value)[4] = four[v].master;
        if (left == 4 && (reinterpret_cast<size_t>(to) & 7u) == 0) {
            store_pair(to, pack2(value[0], value[1]), pack2(value[2], value[3]));
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i < left) to[i] = to_bf(value[i]);
            }
        }
    }
}
EXPORT(adamw, ADAMW_THREADS)
