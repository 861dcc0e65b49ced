// Between float32 and bfloat16, and the two vector operations on float32.
//
// Floors, bytes an element: cast_to_bf16 and cast_to_float 6, axpy 12, scale 8.
//
// Launch, all four: block 256, grid ceil(n / 2048), no dynamic shared memory. A thread has eight elements. Pointers
// need the alignment of their elements only; 16-byte accesses are used where both are aligned to 16 bytes.
#include "common.cuh"

constexpr int CAST_THREADS = 256;

__device__ __forceinline__ long long first_of_thread() {
    return (static_cast<long long>(blockIdx.x) * CAST_THREADS + threadIdx.x) * 8;
}

extern "C" __global__ void __launch_bounds__(CAST_THREADS) cast_to_bf16(bf* out, const float* in, long long n) {
    long long first = first_of_thread();
    int left = left_of(n, first, 8);
    bool vector = aligned16(in), whole = left == 8 && aligned16(out);
    float half[2][4], all[8];
    load4(in + first, left, vector, half[0]);
    load4(in + first + 4, left - 4, vector, half[1]);
#pragma unroll
    for (int i = 0; i < 8; i++) all[i] = half[i / 4][i % 4];
    store8(out + first, packed(all), left, whole);
}
EXPORT(cast_to_bf16, CAST_THREADS)

extern "C" __global__ void __launch_bounds__(CAST_THREADS) cast_to_float(float* out, const bf* in, long long n) {
    long long first = first_of_thread();
    int left = left_of(n, first, 8);
    bool vector = aligned16(out), whole = left == 8 && aligned16(in);
    float half[2][4], all[8];
    unpack(load8(in + first, left, whole), all);
#pragma unroll
    for (int i = 0; i < 8; i++) half[i / 4][i % 4] = all[i];
    store4(out + first, half[0], left, vector);
    store4(out + first + 4, half[1], left - 4, vector);
}
EXPORT(cast_to_float, CAST_THREADS)

// y = y + alpha x with two roundings, as the CPU computes it.
extern "C" __global__ void __launch_bounds__(CAST_THREADS) axpy(float* y, const float* x, float alpha, long long n) {
    long long first = first_of_thread();
    bool vector = aligned16(x) && aligned16(y);
#pragma unroll
    for (int part = 0; part < 8; part += 4) {
        int left = left_of(n, first + part, 4);
        float a[4], b[4];
        load4(x + first + part, left, vector, a);
        load4(y + first + part, left, vector, b);
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = __fadd_rn(b[i], __fmul_rn(alpha, a[i]));
        store4(y + first + part, b, left, vector);
    }
}
EXPORT(axpy, CAST_THREADS)

// y = alpha x; y may be x.
extern "C" __global__ void __launch_bounds__(CAST_THREADS) scale(float* y, const float* x, float alpha, long long n) {
    long long first = first_of_thread();
    bool vector = aligned16(x) && aligned16(y);
#pragma unroll
    for (int part = 0; part < 8; part += 4) {
        int left = left_of(n, first + part, 4);
        float a[4];
        load4(x + first + part, left, vector, a);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = __fmul_rn(alpha, a[i]);
        store4(y + first + part, a, left, vector);
    }
}
EXPORT(scale, CAST_THREADS)
