// Causal attention, forward: one block has 128 queries of one head and walks over the keys up to its diagonal
// (FlashAttention-2; Dao, 2023).
//
// Each of the four warps has 32 queries. Scores of 64 keys are made on the tensor cores, turned into probabilities
// against the largest score so far, and become, without leaving the registers, the left operand of the product with the
// values. While a tile of keys and values is worked on, the next is on its way (cp.async, two buffers). Exponentials
// are powers of two with the scale folded into one multiplication.
#pragma once
#include "tiles.cuh"

// Where the heads are in the packed rows [q heads | k heads | v heads].
struct AttentionShape {
    int batch, sequence, heads, kv_heads, head_dim;

    __device__ __forceinline__ int row() const { return (heads + 2 * kv_heads) * head_dim; }
    __device__ __forceinline__ int kv_of(int head) const { return head / (heads / kv_heads); }
    // The first number of sequence `b`'s head number `head`, counted over q, k and v heads alike.
    __device__ __forceinline__ long long offset(int b, int head) const {
        return static_cast<long long>(b) * sequence * row() + head * head_dim;
    }
    __device__ __forceinline__ HeadRows rows(const bf* qkv, int b, int head) const {
        return {qkv + offset(b, head), row(), sequence, head_dim};
    }
    // The first row of one head's numbers in [batch, heads, sequence].
    __device__ __forceinline__ long long statistics(int b, int head) const {
        return (static_cast<long long>(b) * heads + head) * sequence;
    }
};

constexpr int ATTENTION_THREADS = 128;
constexpr int ATTENTION_WARPS = ATTENTION_THREADS / LANES;

template <int WIDTH>
struct ForwardTiles {
    static constexpr int QUERIES = 128, KEYS = 64;
    static constexpr int TILES = QUERIES / ATTENTION_WARPS / 16;   // of 16 queries, of a warp
    static constexpr int STEP = WIDTH > 64 ? 32 : 64;              // keys at a time: what the registers hold
    static constexpr bool KEPT = WIDTH <= 64;                      // the queries stay in registers
    using Queries = Tile<QUERIES, WIDTH>;
    using Keys = Tile<KEYS, WIDTH>;

    bf* shared;
    __device__ __forceinline__ Queries queries() const { return {shared, 0}; }
    __device__ __forceinline__ Keys keys(int stage) const {
        return {shared, Queries::NUMBERS + 2 * stage * Keys::NUMBERS};
    }
    __device__ __forceinline__ Keys values(int stage) const {
        return {shared, Queries::NUMBERS + (2 * stage + 1) * Keys::NUMBERS};
    }
};

// The softmax of a warp's rows so far: a lane has rows lane / 4 and that plus 8 of each tile.
template <int TILES>
struct Rows {
    float most[TILES][2], sum[TILES][2];
};

// sums = a b, over a whole head: the tile `b` has one row a column of the sums.
template <int TILES, int BLOCKS, int A_ROWS, int B_ROWS, int WIDTH, bool KEPT>
__device__ __forceinline__ void scores(Sums<TILES, BLOCKS>& sums, const LeftRows<TILES, A_ROWS, WIDTH, KEPT>& a,
                                       const Tile<B_ROWS, WIDTH>& b, int b_row) {
    sums.clear();
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) {
        unsigned left[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; t++) a.load(left[t], t, step);
#pragma unroll
        for (int block = 0; block < BLOCKS; block += 2) {
            unsigned one[2], two[2];
            b.load_b(one, two, b_row + 8 * block, step);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                multiply_add(sums.value[t][block], left[t], one);
                multiply_add(sums.value[t][block + 1], left[t], two);
            }
        }
    }
}

// sums += a b, where `a` are sums of an earlier product and the tile `b` has one row for each column of a.
template <int TILES, int INNER, int BLOCKS, int ROWS, int WIDTH>
__device__ __forceinline__ void add_product(Sums<TILES, BLOCKS>& sums, const Sums<TILES, INNER>& a,
                                            const Tile<ROWS, WIDTH>& b, int b_row) {
#pragma unroll
    for (int step = 0; step < INNER / 2; step++) {
        unsigned left[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; t++) a.as_a(left[t], t, step);
#pragma unroll
        for (int block = 0; block < BLOCKS; block += 2) {
            unsigned one[2], two[2];
            b.load_b_rows(one, two, b_row + 16 * step, block / 2);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                multiply_add(sums.value[t][block], left[t], one);
                multiply_add(sums.value[t][block + 1], left[t], two);
            }
        }
    }
}

// Lowers scores of keys after their query to minus infinity.
template <int TILES, int BLOCKS>
__device__ __forceinline__ void mask(Sums<TILES, BLOCKS>& s, int first_query, int first_key) {
    int lane = threadIdx.x % LANES, ahead = first_query + lane / 4 - first_key - lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // In this form the constants fold and one register is compared with all of them.
                if (8 * b + i % 2 - 16 * t - i / 2 * 8 > ahead) s.value[t][b][i] = minus_infinity();
            }
        }
    }
}

// Scores become probabilities against the largest so far; what was summed before is scaled to it.
template <int TILES, int BLOCKS, int WIDE>
__device__ __forceinline__ void softmax(Sums<TILES, BLOCKS>& s, Rows<TILES>& rows, Sums<TILES, WIDE>& out,
                                        float scale2) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = rows.most[t][half];
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                most = fmaxf(most, fmaxf(s.value[t][b][2 * half], s.value[t][b][2 * half + 1]));
            }
            // The four lanes of a row agree. Its own key is never masked, so the largest is a number from tile to tile.
            most = fmaxf(most, __shfl_xor_sync(WHOLE_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(WHOLE_WARP, most, 2));
            float shrink = exp2_fast((rows.most[t][half] - most) * scale2), high = most * scale2;
            rows.most[t][half] = most;
            float sum = 0.0f;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s.value[t][b][i] = exp2_fast(s.value[t][b][i] * scale2 - high);
                    sum += s.value[t][b][i];
                }
            }
            rows.sum[t][half] = rows.sum[t][half] * shrink + sum;
#pragma unroll
            for (int b = 0; b < WIDE; b++) {
                out.value[t][b][2 * half] *= shrink;
                out.value[t][b][2 * half + 1] *= shrink;
            }
        }
    }
}

// Divides by the rows' sums and writes each row's logarithm of its sum of exponentials, to base 2.
template <int TILES, int WIDE>
__device__ __forceinline__ void finish(Sums<TILES, WIDE>& out, Rows<TILES>& rows, float scale2, float* lse,
                                       int first_query, int sequence) {
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = rows.sum[t][half];
            sum += __shfl_xor_sync(WHOLE_WARP, sum, 1);
            sum += __shfl_xor_sync(WHOLE_WARP, sum, 2);
            float inverse = 1.0f / sum;
#pragma unroll
            for (int b = 0; b < WIDE; b++) {
                out.value[t][b][2 * half] *= inverse;
                out.value[t][b][2 * half + 1] *= inverse;
            }
            int query = first_query + 16 * t + 8 * half + lane / 4;
            if (lane % 4 == 0 && query < sequence) lse[query] = rows.most[t][half] * scale2 + log2f(sum);
        }
    }
}

template <int WIDTH>
__device__ __forceinline__ void attention_forward(bf* out, float* lse, const bf* qkv, const AttentionShape& shape,
                                                  float scale) {
    using T = ForwardTiles<WIDTH>;
    DYNAMIC_SHARED(bf, shared);
    T tiles = {shared};
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * T::QUERIES, head = blockIdx.y, b = blockIdx.z;
    Filler<ATTENTION_THREADS, WIDTH, true> keys(shape.rows(qkv, b, shape.heads + shape.kv_of(head)));
    Filler<ATTENTION_THREADS, WIDTH, true> values = keys.further(shape.kv_heads * shape.head_dim);
    int last = min(first + T::QUERIES, shape.sequence) - 1, count = last / T::KEYS + 1;
    int warp_row = threadIdx.x / LANES * 16 * T::TILES, query = first + warp_row;
    float scale2 = scale * LOG2_E;

    Sums<T::TILES, WIDTH / 8> sums;
    Rows<T::TILES> rows;
    sums.clear();
#pragma unroll
    for (int t = 0; t < T::TILES; t++) {
        rows.most[t][0] = rows.most[t][1] = minus_infinity();
        rows.sum[t][0] = rows.sum[t][1] = 0.0f;
    }
    Filler<ATTENTION_THREADS, WIDTH, true>(shape.rows(qkv, b, head)).fill(tiles.queries(), first);
    keys.fill(tiles.keys(0), 0);
    values.fill(tiles.values(0), 0);
    copy_commit();
    LeftRows<T::TILES, T::QUERIES, WIDTH, T::KEPT> queries = {tiles.queries(), warp_row};
    for (int i = 0; i < count; i++) {
        int stage = i % 2, key = i * T::KEYS;
        copy_wait<0>();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (i == 0) queries.keep();
        if (i + 1 < count) {
            keys.fill(tiles.keys(stage ^ 1), key + T::KEYS);
            values.fill(tiles.values(stage ^ 1), key + T::KEYS);
            copy_commit();
        }
#pragma unroll 1
        for (int part = 0; part < T::KEYS; part += T::STEP) {
            int first_key = key + part;
            if (first_key > query + 16 * T::TILES - 1) break;   // all of it comes after all of this warp's queries
            Sums<T::TILES, T::STEP / 8> s;
            scores(s, queries, tiles.keys(stage), part);
            if (first_key + T::STEP - 1 > query) mask(s, query, first_key);
            softmax(s, rows, sums, scale2);
            add_product(sums, s, tiles.values(stage), part);
        }
    }
    finish(sums, rows, scale2, lse + shape.statistics(b, head), query, shape.sequence);
    int pitch = shape.heads * shape.head_dim;
    bf* to = out + static_cast<long long>(b) * shape.sequence * pitch + head * shape.head_dim;
    write_rows(sums, 1.0f, tiles.queries(), warp_row, to, pitch, query, shape.sequence, shape.head_dim);
}
