// SwiGLU (Shazeer, 2020), GELU in its tanh form, and the addition of a bias: elementwise, in float32 between one load
// and one store.
//
// Floors, bytes a number of the activation: swiglu_forward 6, swiglu_backward 12, gelu_forward 4, gelu_backward 8,
// bias_add 4.
//
// Launch, all: block 256, no dynamic shared memory; a thread has eight numbers. Grids:
//   swiglu_forward, swiglu_backward, bias_add: ceil(rows * ceil(width / 8) / 256).
//   gelu_forward, gelu_backward: ceil(n / 2048).
#include "common.cuh"

constexpr int ACTIVATION_THREADS = 256;

// This thread's eight numbers of a matrix.
struct Place {
    long long row;
    int column, left;   // none are left for a thread past the end

    __device__ __forceinline__ Place(int rows, int width) {
        unsigned units = (width + 7) / 8, item = blockIdx.x * ACTIVATION_THREADS + threadIdx.x;
        row = item / units;
        column = item % units * 8;
        left = row < rows ? width - column : 0;
    }
};

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-LOG2_E * x)); }

// act = silu(gate) up; rows of gate_up are [gate | up], each of `width`.
extern "C" __global__ void __launch_bounds__(ACTIVATION_THREADS)
    swiglu_forward(bf* act, const bf* gate_up, int rows, int width) {
    Place place(rows, width);
    bool vector = width % 8 == 0;
    const bf* from = gate_up + place.row * 2 * width + place.column;
    Words gate = load8(from, place.left, vector), up = load8(from + width, place.left, vector);
    float result[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float g = unpacked(gate, i);
        result[i] = g * sigmoid(g) * unpacked(up, i);
    }
    store8(act + place.row * width + place.column, packed(result), place.left, vector);
}
EXPORT(swiglu_forward, ACTIVATION_THREADS)

// The backward, in place: gate_up becomes its own gradient and d_act becomes act again.
extern "C" __global__ void __launch_bounds__(ACTIVATION_THREADS)
    swiglu_backward(bf* gate_up, bf* d_act, int rows, int width) {
    Place place(rows, width);
    bool vector = width % 8 == 0;
    bf* gate_at = gate_up + place.row * 2 * width + place.column;
    bf* act_at = d_act + place.row * width + place.column;
    Words gate = load8(gate_at, place.left, vector), up = load8(gate_at + width, place.left, vector);
    Words d = load8(act_at, place.left, vector);
    float d_gate[8], d_up[8], act[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float g = unpacked(gate, i), u = unpacked(up, i), dy = unpacked(d, i), s = sigmoid(g);
        d_gate[i] = dy * u * s * (1.0f + g * (1.0f - s));
        d_up[i] = dy * g * s;
        act[i] = g * s * u;
    }
    store8(gate_at, packed(d_gate), place.left, vector);
    store8(gate_at + width, packed(d_up), place.left, vector);
    store8(act_at, packed(act), place.left, vector);
}
EXPORT(swiglu_backward, ACTIVATION_THREADS)

constexpr float GELU_SLOPE = 0.7978845608028654f;   // sqrt(2 / pi)
constexpr float GELU_CUBE = 0.044715f;

// (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3): the sigmoid of 2 u, which keeps its precision where tanh
// is near -1.
__device__ __forceinline__ float gelu_share(float x) {
    return sigmoid(2.0f * GELU_SLOPE * (x + GELU_CUBE * x * x * x));
}

// act = pre (1 + tanh(u)) / 2.
extern "C" __global__ void __launch_bounds__(ACTIVATION_THREADS) gelu_forward(bf* act, const bf* pre, long long n) {
    long long first = (static_cast<long long>(blockIdx.x) * ACTIVATION_THREADS + threadIdx.x) * 8;
    int left = left_of(n, first, 8);
    float x[8];
    unpack(load8(pre + first, left, left == 8), x);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= gelu_share(x[i]);
    store8(act + first, packed(x), left, left == 8);
}
EXPORT(gelu_forward, ACTIVATION_THREADS)

// The backward, in place: pre becomes its own gradient and d_act becomes act again.
extern "C" __global__ void __launch_bounds__(ACTIVATION_THREADS) gelu_backward(bf* pre, bf* d_act, long long n) {
    long long first = (static_cast<long long>(blockIdx.x) * ACTIVATION_THREADS + threadIdx.x) * 8;
    int left = left_of(n, first, 8);
    bool vector = left == 8;
    float x[8], d[8];
    unpack(load8(pre + first, left, vector), x);
    unpack(load8(d_act + first, left, vector), d);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float value = x[i], share = gelu_share(value);
        float slope = 2.0f * GELU_SLOPE * (1.0f + 3.0f * GELU_CUBE * value * value);
        x[i] = d[i] * (share + value * share * (1.0f - share) * slope);
        d[i] = value * share;
    }
    store8(pre + first, packed(x), left, vector);
    store8(d_act + first, packed(d), left, vector);
}
EXPORT(gelu_backward, ACTIVATION_THREADS)

// out = out + bias, the same bias for every row.
extern "C" __global__ void __launch_bounds__(ACTIVATION_THREADS)
    bias_add(bf* out, const bf* bias, int rows, int width) {
    Place place(rows, width);
    bool vector = width % 8 == 0;
    bf* at = out + place.row * width + place.column;
    Words value = load8(at, place.left, vector);
    Words added = load8(bias + place.column, place.left, vector && aligned16(bias));
    float result[8];
#pragma unroll
    for (int i = 0; i < 8; i++) result[i] = unpacked(value, i) + unpacked(added, i);
    store8(at, packed(result), place.left, vector);
}
EXPORT(bias_add, ACTIVATION_THREADS)
