// Embedding tables: rows looked up, and their gradients summed without atomics.
//
// The host sorts the rows of a micro-batch by token, keeping their order, and cuts each token's run into pieces of at
// most 64 rows. The first kernel sums each piece, the second adds each run's pieces in order: a frequent token does not
// keep one block busy alone, and the order of additions depends on the tokens only.
//
// Floors: embedding_forward 4 bytes a number (6 with positions), embedding_backward 2 bytes a number and the touched
// rows of the table twice, position_backward 2 bytes a number.
//
// Launch, all: block 128 (a thread has eight columns), no dynamic shared memory. Grids:
//   embedding_forward: ceil(rows * ceil(width / 8) / 128).
//   embedding_backward_pieces: (pieces, ceil(width / 1024)).
//   embedding_backward_join: (runs, ceil(width / 1024)).
//   position_backward: ceil(sequence * ceil(width / 8) / 128).
#include "common.cuh"

constexpr int EMBEDDING_THREADS = 128;
constexpr int EMBEDDING_LOADS = 4;   // under way at a time

__device__ __forceinline__ void add8(float (&sum)[8], const Words& words) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += unpacked(words, i);
}

// Eight floats, or as many as are left of a row.
__device__ __forceinline__ void store8_floats(float* to, const float (&from)[8], int left, bool vector) {
#pragma unroll
    for (int part = 0; part < 8; part += 4) {
        const float four[4] = {from[part], from[part + 1], from[part + 2], from[part + 3]};
        store4(to + part, four, left - part, vector);
    }
}

// out[i] = table[tokens[i]], plus positions[i % sequence] where positions are given.
extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_forward(bf* out, const bf* table, const bf* positions, const unsigned* tokens, int rows, int width,
                      int sequence) {
    unsigned units = (width + 7) / 8, item = blockIdx.x * EMBEDDING_THREADS + threadIdx.x;
    int row = item / units, column = item % units * 8, left = width - column;
    if (row >= rows) return;
    bool vector = width % 8 == 0;
    Words value = load8(table + static_cast<long long>(tokens[row]) * width + column, left, vector && aligned16(table));
    if (positions != nullptr) {
        float sum[8];
        unpack(value, sum);
        add8(sum, load8(positions + static_cast<long long>(row % sequence) * width + column, left,
                        vector && aligned16(positions)));
        value = packed(sum);
    }
    store8(out + static_cast<long long>(row) * width + column, value, left, vector);
}
EXPORT(embedding_forward, EMBEDDING_THREADS)

// partial[p] = the sum of d_out[order[i]] over piece_start[p] <= i < piece_start[p + 1], in order; partial: [pieces,
// width].
extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_backward_pieces(float* partial, const bf* d_out, const int* order, const int* piece_start, int pieces,
                              int width) {
    int piece = blockIdx.x, column = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * 8, left = width - column;
    if (piece >= pieces || left <= 0) return;
    bool vector = width % 8 == 0;
    int end = piece_start[piece + 1];
    float sum[8] = {};
    for (int first = piece_start[piece]; first < end; first += EMBEDDING_LOADS) {
        Words words[EMBEDDING_LOADS];
#pragma unroll
        for (int l = 0; l < EMBEDDING_LOADS; l++) {
            bool there = first + l < end;
            long long row = there ? order[first + l] : 0;
            words[l] = load8(d_out + row * width + column, there ? left : 0, vector);
        }
#pragma unroll
        for (int l = 0; l < EMBEDDING_LOADS; l++) add8(sum, words[l]);
    }
    store8_floats(partial + static_cast<long long>(piece) * width + column, sum, left, vector);
}
EXPORT(embedding_backward_pieces, EMBEDDING_THREADS)

// d_table[run_token[r]] += the sum of partial[p] over run_piece[r] <= p < run_piece[r + 1], in order.
extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_backward_join(float* d_table, const float* partial, const int* run_piece, const unsigned* run_token,
                            int runs, int width) {
    int run = blockIdx.x, column = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * 8;
    if (run >= runs) return;
    bool vector = width % 8 == 0;
    int end = run_piece[run + 1];
#pragma unroll
    for (int part = 0; part < 8; part += 4) {
        int left = width - column - part;
        if (left <= 0) break;
        float sum[4] = {0, 0, 0, 0}, old[4];
        for (int p = run_piece[run]; p < end; p++) {
            float added[4];
            load4(partial + static_cast<long long>(p) * width + column + part, left, vector, added);
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += added[i];
        }
        float* to = d_table + static_cast<long long>(run_token[run]) * width + column + part;
        load4(to, left, vector && aligned16(d_table), old);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += old[i];
        store4(to, sum, left, vector && aligned16(d_table));
    }
}
EXPORT(embedding_backward_join, EMBEDDING_THREADS)

// d_positions[t] = the sum of d_out[b * sequence + t] over the batch, in order: rows 0 .. sequence are replaced.
extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)
    position_backward(float* d_positions, const bf* d_out, int batch, int sequence, int width) {
    unsigned units = (width + 7) / 8, item = blockIdx.x * EMBEDDING_THREADS + threadIdx.x;
    int position = item / units, column = item % units * 8, left = width - column;
    if (position >= sequence) return;
    bool vector = width % 8 == 0;
    float sum[8] = {};
    for (int first = 0; first < batch; first += EMBEDDING_LOADS) {
        Words words[EMBEDDING_LOADS];
#pragma unroll
        for (int l = 0; l < EMBEDDING_LOADS; l++) {
            long long row = static_cast<long long>(first + l) * sequence + position;
            words[l] = load8(d_out + row * width + column, first + l < batch ? left : 0, vector);
        }
#pragma unroll
        for (int l = 0; l < EMBEDDING_LOADS; l++) add8(sum, words[l]);
    }
    store8_floats(d_positions + static_cast<long long>(position) * width + column, sum, left,
                  vector && aligned16(d_positions));
}
EXPORT(position_backward, EMBEDDING_THREADS)
