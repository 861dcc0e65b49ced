// Causal attention with grouped queries, for heads of up to HEAD_DIM numbers: compiled with HEAD_DIM 32, 64 and 128,
// which ends the kernels' names. head_dim is even and at most HEAD_DIM; query head h uses key head h / (heads /
// kv_heads). Queries, keys and values are read where the packed rows [q heads | k heads | v heads] have them.
//
// Floor: a product over the causal half of the scores takes batch heads sequence^2 head_dim operations. Forward makes
// two, attention_backward_kv four, attention_backward_q three.
//
// Launch, with N = HEAD_DIM; all: block 128. Dynamic shared memory past 48 KiB must be asked for.
//   attention_forward_N: grid (ceil(sequence / 128), heads, batch), dynamic shared memory 768 N bytes.
//   attention_backward_kv_N: grid (ceil(sequence / K), kv_heads, batch) with K = 128 for N = 32 and 64, and 64 for N =
//     128; dynamic shared memory 4 (K + 128) N + 1024 bytes.
//   attention_backward_q_N: grid (ceil(sequence / 128), heads, batch), dynamic shared memory 4 (128 + 2 K) N bytes with
//     K = 64 for N = 32 and 64, and 32 for N = 128.
#include "attention.cuh"
#include "attention_backward.cuh"

#define ATTENTION_NAMED(name, width) name##_##width
#define ATTENTION_EXPANDED(name, width) ATTENTION_NAMED(name, width)
#define ATTENTION(name) ATTENTION_EXPANDED(name, HEAD_DIM)

// out: [batch * sequence, heads * head_dim]. lse: [batch, heads, sequence], of each row the base-2 logarithm of the sum
// of exponentials of its scaled scores.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    ATTENTION(attention_forward)(bf* out, float* lse, const bf* qkv, int batch, int sequence, int heads, int kv_heads,
                                 int head_dim, float scale) {
    attention_forward<HEAD_DIM>(out, lse, qkv, {batch, sequence, heads, kv_heads, head_dim}, scale);
}
EXPORT(ATTENTION(attention_forward), ATTENTION_THREADS)

// Writes the keys' and values' gradients into their places in d_qkv; dot is attention_dot's.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    ATTENTION(attention_backward_kv)(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot,
                                     int batch, int sequence, int heads, int kv_heads, int head_dim, float scale) {
    attention_backward_kv<HEAD_DIM>(
        {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale});
}
EXPORT(ATTENTION(attention_backward_kv), ATTENTION_THREADS)

// Writes the queries' gradients into their places in d_qkv.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    ATTENTION(attention_backward_q)(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot,
                                    int batch, int sequence, int heads, int kv_heads, int head_dim, float scale) {
    attention_backward_q<HEAD_DIM>(
        {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale});
}
EXPORT(ATTENTION(attention_backward_q), ATTENTION_THREADS)

#undef ATTENTION
#undef ATTENTION_EXPANDED
#undef ATTENTION_NAMED
