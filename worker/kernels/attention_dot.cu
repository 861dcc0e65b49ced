// rowsum(dO O) for each row and head, which both kernels of attention's backward need.
//
// Floor: 4 bytes a number of the output.
//
// Launch: block 256, grid ceil(rows * heads * L / 256), no dynamic shared memory; L, the lanes of one head, is 8 for
// head_dim up to 64 and 16 beyond.
#include "common.cuh"

constexpr int DOT_THREADS = 256;

// d_out and out: [rows, heads * head_dim], rows = batch * sequence; dot: [batch, heads, sequence].
extern "C" __global__ void __launch_bounds__(DOT_THREADS)
    attention_dot(float* dot, const bf* d_out, const bf* out, int rows, int sequence, int heads, int head_dim) {
    int lanes = head_dim <= 64 ? 8 : 16;
    long long item = (static_cast<long long>(blockIdx.x) * DOT_THREADS + threadIdx.x) / lanes;
    int row = item / heads, head = item % heads, column = threadIdx.x % lanes * 8;
    int left = row < rows ? head_dim - column : 0;
    long long at = (static_cast<long long>(row) * heads + head) * head_dim + column;
    bool vector = head_dim % 8 == 0;
    Words a = load8(d_out + at, left, vector), b = load8(out + at, left, vector);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += unpacked(a, i) * unpacked(b, i);
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, distance);
    if (row < rows && column == 0) {
        dot[(static_cast<long long>(row / sequence) * heads + head) * sequence + row % sequence] = sum;
    }
}
EXPORT(attention_dot, DOT_THREADS)
