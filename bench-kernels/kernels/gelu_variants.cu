// gelu_backward with GELU_UNITS units of eight numbers a thread.
#include "activation.cu"

__device__ __forceinline__ void gelu_unit(Words& pre, Words& act) {
    float x[8], d[8];
    unpack(pre, x);
    unpack(act, d);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float value = x[i], share = gelu_share(value);
        float slope = 2.0f * GELU_SLOPE * (1.0f + 3.0f * GELU_CUBE * value * value);
        x[i] = d[i] * (share + value * share * (1.0f - share) * slope);
        d[i] = value * share;
    }
    pre = packed(x);
    act = packed(d);
}

extern "C" __global__ void __launch_bounds__(ACTIVATION_THREADS)
    gelu_backward_more(bf* pre, bf* d_act, long long n) {
    constexpr int EACH = ACTIVATION_THREADS * 8;
    long long first = static_cast<long long>(blockIdx.x) * EACH * GELU_UNITS + threadIdx.x * 8;
    Words x[GELU_UNITS], d[GELU_UNITS];
    if ((blockIdx.x + 1ll) * EACH * GELU_UNITS <= n) {
#pragma unroll
        for (int u = 0; u < GELU_UNITS; u++) {
            x[u] = load_words(pre + first + u * EACH);
            d[u] = load_words(d_act + first + u * EACH);
        }
#pragma unroll
        for (int u = 0; u < GELU_UNITS; u++) {
            gelu_unit(x[u], d[u]);
            store_words(pre + first + u * EACH, x[u]);
            store_words(d_act + first + u * EACH, d[u]);
        }
        return;
    }
#pragma unroll 1
    for (int u = 0; u < GELU_UNITS; u++) {
        int left = left_of(n, first + u * EACH, 8);
        x[0] = load8(pre + first + u * EACH, left, left == 8);
        d[0] = load8(d_act + first + u * EACH, left, left == 8);
        gelu_unit(x[0], d[0]);
        store8(pre + first + u * EACH, x[0], left, left == 8);
        store8(d_act + first + u * EACH, d[0], left, left == 8);
    }
}
EXPORT(gelu_backward_more, ACTIVATION_THREADS)
