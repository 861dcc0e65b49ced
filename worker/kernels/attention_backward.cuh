// Causal attention, backward: probabilities are computed again from the scores and each row's logarithm of its sum.
//
// With P the probabilities, dP = dO V^T and D = rowsum(dO O): dV = P^T dO, dS = P (dP - D), dQ = dS K and dK = dS^T Q,
// the last two times the scale. Two kernels share this out so that every sum is made by one block in one order, without
// atomics: one block of the first has some keys of one key head and walks over all queries that see them, of all query
// heads of the group; one block of the second has some queries and walks over the keys they see. In the first the
// scores are computed transposed, keys down and queries across, so that P^T and dS^T are left operands where they are.
#pragma once
#include "attention.cuh"

// The operands of both kernels.
struct AttentionBackward {
    bf* d_qkv;
    const bf *qkv, *d_out;
    const float *lse, *dot;
    AttentionShape shape;
    float scale;

    __device__ __forceinline__ HeadRows d_rows(int b, int head) const {
        int pitch = shape.heads * shape.head_dim;
        const bf* at = d_out + static_cast<long long>(b) * shape.sequence * pitch + head * shape.head_dim;
        return {at, pitch, shape.sequence, shape.head_dim};
    }
};

template <int WIDTH>
struct KeyValueTiles {
    static constexpr int KEYS = WIDTH > 64 ? 64 : 128, QUERIES = 64;
    static constexpr int TILES = KEYS / ATTENTION_WARPS / 16;   // of 16 keys, of a warp
    static constexpr int STEP = 32;                             // queries at a time: what the registers hold
    using Keys = Tile<KEYS, WIDTH>;
    using Queries = Tile<QUERIES, WIDTH>;

    bf* shared;
    __device__ __forceinline__ Keys keys() const { return {shared, 0}; }
    __device__ __forceinline__ Keys values() const { return {shared, Keys::NUMBERS}; }
    __device__ __forceinline__ Queries queries(int stage) const {
        return {shared, 2 * Keys::NUMBERS + 2 * stage * Queries::NUMBERS};
    }
    __device__ __forceinline__ Queries d_out(int stage) const {
        return {shared, 2 * Keys::NUMBERS + (2 * stage + 1) * Queries::NUMBERS};
    }
    // For each query of the stage, lse; after them, dot.
    __device__ __forceinline__ float* statistics(int stage) const {
        bf* after = shared + 2 * Keys::NUMBERS + 4 * Queries::NUMBERS;
        return reinterpret_cast<float*>(after) + 2 * stage * QUERIES;
    }
};

// Begins to bring 64 queries of one head, and what belongs to them.
template <int WIDTH>
__device__ __forceinline__ void fill_queries(const AttentionBackward& a, const KeyValueTiles<WIDTH>& tiles, int stage,
                                             int b, int head, int first) {
    constexpr int QUERIES = KeyValueTiles<WIDTH>::QUERIES;
    static_assert(2 * QUERIES == ATTENTION_THREADS, "every thread copies one number");
    fill<ATTENTION_THREADS>(tiles.queries(stage), a.shape.rows(a.qkv, b, head), first);
    fill<ATTENTION_THREADS>(tiles.d_out(stage), a.d_rows(b, head), first);
    int query = first + threadIdx.x % QUERIES;
    bool there = query < a.shape.sequence;
    const float* from = (threadIdx.x < QUERIES ? a.lse : a.dot) + a.shape.statistics(b, head) + (there ? query : 0);
    copy_async_4(tiles.statistics(stage) + threadIdx.x, from, there);
    copy_commit();
}

// Scores, keys down and queries across, become probabilities; those of keys after their query 0.
template <int TILES, int BLOCKS>
__device__ __forceinline__ void probabilities_down(Sums<TILES, BLOCKS>& s, const float* lse, float scale2, int key,
                                                   int query, bool masked) {
    int lane = threadIdx.x % LANES, ahead = query + lane % 4 * 2 - key - lane / 4;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = lse[8 * block + lane % 4 * 2 + i];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& value = s.value[t][block][2 * half + i];
                    value = exp2_fast(value * scale2 - sum);
                    if (masked && 16 * t + 8 * half - 8 * block - i > ahead) value = 0.0f;
                }
            }
        }
    }
}

// dP becomes dS = P (dP - dot), keys down and queries across.
template <int TILES, int BLOCKS>
__device__ __forceinline__ void slopes_down(Sums<TILES, BLOCKS>& d, const Sums<TILES, BLOCKS>& p, const float* dot) {
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float off = dot[8 * block + lane % 4 * 2 + i];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
#pragma unroll
                for (int j = i; j < 4; j += 2) {
                    d.value[t][block][j] = p.value[t][block][j] * (d.value[t][block][j] - off);
                }
            }
        }
    }
}

template <int WIDTH>
__device__ __forceinline__ void attention_backward_kv(const AttentionBackward& a) {
    using T = KeyValueTiles<WIDTH>;
    DYNAMIC_SHARED(bf, shared);
    T tiles = {shared};
    const AttentionShape& shape = a.shape;
    int first = blockIdx.x * T::KEYS, kv = blockIdx.y, b = blockIdx.z, group = shape.heads / shape.kv_heads;
    int warp_row = threadIdx.x / LANES * 16 * T::TILES, key = first + warp_row;
    float scale2 = a.scale * LOG2_E;

    Sums<T::TILES, WIDTH / 8> d_keys, d_values;
    d_keys.clear();
    d_values.clear();
    fill<ATTENTION_THREADS>(tiles.keys(), shape.rows(a.qkv, b, shape.heads + kv), first);
    fill<ATTENTION_THREADS>(tiles.values(), shape.rows(a.qkv, b, shape.heads + shape.kv_heads + kv), first);
    fill_queries(a, tiles, 0, b, kv * group, first);
    LeftRows<T::TILES, T::KEYS, WIDTH, false> keys = {tiles.keys(), warp_row}, values = {tiles.values(), warp_row};
    // The queries of one head that see any of these keys, 64 at a time, then those of the group's next head.
    int head = kv * group, query = first, stage = 0;
    while (head < (kv + 1) * group) {
        int next_query = query + T::QUERIES, next_head = head;
        if (next_query >= shape.sequence) {
            next_query = first;
            next_head++;
        }
        copy_wait<0>();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (next_head < (kv + 1) * group) fill_queries(a, tiles, stage ^ 1, b, next_head, next_query);
#pragma unroll 1
        for (int part = 0; part < T::QUERIES; part += T::STEP) {
            int first_query = query + part;
            if (first_query + T::STEP - 1 < key) continue;   // none of these queries sees any of this warp's keys
            const float* lse = tiles.statistics(stage) + part;
            Sums<T::TILES, T::STEP / 8> p, d;
            scores(d, values, tiles.d_out(stage), part);
            scores(p, keys, tiles.queries(stage), part);
            probabilities_down(p, lse, scale2, key, first_query, key + 16 * T::TILES - 1 > first_query);
            add_product(d_values, p, tiles.d_out(stage), part);
            slopes_down(d, p, lse + T::QUERIES);
            add_product(d_keys, d, tiles.queries(stage), part);
        }
        head = next_head;
        query = next_query;
        stage ^= 1;
    }
    // The tiles' rows of this warp were read by this warp alone.
    bf* to_keys = a.d_qkv + shape.offset(b, shape.heads + kv);
    bf* to_values = a.d_qkv + shape.offset(b, shape.heads + shape.kv_heads + kv);
    write_rows(d_keys, a.scale, tiles.keys(), warp_row, to_keys, shape.row(), key, shape.sequence, shape.head_dim);
    write_rows(d_values, 1.0f, tiles.values(), warp_row, to_values, shape.row(), key, shape.sequence, shape.head_dim);
}

template <int WIDTH>
struct QueryTiles {
    static constexpr int QUERIES = 128, KEYS = WIDTH > 64 ? 32 : 64;
    static constexpr int TILES = QUERIES / ATTENTION_WARPS / 16;   // of 16 queries, of a warp
    static constexpr int STEP = 32;                                // keys at a time: what the registers hold
    static constexpr bool KEPT = WIDTH <= 64;                      // queries and d_out stay in registers
    using Queries = Tile<QUERIES, WIDTH>;
    using Keys = Tile<KEYS, WIDTH>;

    bf* shared;
    __device__ __forceinline__ Queries queries() const { return {shared, 0}; }
    __device__ __forceinline__ Queries d_out() const { return {shared, Queries::NUMBERS}; }
    __device__ __forceinline__ Keys keys(int stage) const {
        return {shared, 2 * Queries::NUMBERS + 2 * stage * Keys::NUMBERS};
    }
    __device__ __forceinline__ Keys values(int stage) const {
        return {shared, 2 * Queries::NUMBERS + (2 * stage + 1) * Keys::NUMBERS};
    }
};

// What belongs to a lane's rows: row lane / 4 and that plus 8 of each tile. Rows beyond the sequence have 0.
template <int TILES>
struct RowValues {
    float value[TILES][2];

    __device__ __forceinline__ RowValues(const float* from, int first, int sequence) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = first + 16 * t + 8 * half + threadIdx.x % LANES / 4;
                value[t][half] = row < sequence ? from[row] : 0.0f;
            }
        }
    }
};

// Scores and dP, queries down and keys across, become dS.
template <int TILES, int BLOCKS>
__device__ __forceinline__ void slopes_across(Sums<TILES, BLOCKS>& s, const Sums<TILES, BLOCKS>& d,
                                              const RowValues<TILES>& lse, const RowValues<TILES>& dot, float scale2) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = exp2_fast(s.value[t][block][i] * scale2 - lse.value[t][i / 2]);
                s.value[t][block][i] = p * (d.value[t][block][i] - dot.value[t][i / 2]);
            }
        }
    }
}

template <int WIDTH>
__device__ __forceinline__ void attention_backward_q(const AttentionBackward& a) {
    using T = QueryTiles<WIDTH>;
    DYNAMIC_SHARED(bf, shared);
    T tiles = {shared};
    const AttentionShape& shape = a.shape;
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * T::QUERIES, head = blockIdx.y, b = blockIdx.z;
    Filler<ATTENTION_THREADS, WIDTH, true> keys(shape.rows(a.qkv, b, shape.heads + shape.kv_of(head)));
    Filler<ATTENTION_THREADS, WIDTH, true> values = keys.further(shape.kv_heads * shape.head_dim);
    int last = min(first + T::QUERIES, shape.sequence) - 1, count = last / T::KEYS + 1;
    int warp_row = threadIdx.x / LANES * 16 * T::TILES, query = first + warp_row;
    float scale2 = a.scale * LOG2_E;

    Sums<T::TILES, WIDTH / 8> d_queries;
    d_queries.clear();
    Filler<ATTENTION_THREADS, WIDTH, true>(shape.rows(a.qkv, b, head)).fill(tiles.queries(), first);
    Filler<ATTENTION_THREADS, WIDTH, true>(a.d_rows(b, head)).fill(tiles.d_out(), first);
    keys.fill(tiles.keys(0), 0);
    values.fill(tiles.values(0), 0);
    copy_commit();
    RowValues<T::TILES> lse(a.lse + shape.statistics(b, head), query, shape.sequence);
    RowValues<T::TILES> dot(a.dot + shape.statistics(b, head), query, shape.sequence);
    LeftRows<T::TILES, T::QUERIES, WIDTH, T::KEPT> queries = {tiles.queries(), warp_row};
    LeftRows<T::TILES, T::QUERIES, WIDTH, T::KEPT> d_out = {tiles.d_out(), warp_row};
    for (int i = 0; i < count; i++) {
        int stage = i % 2;
        copy_wait<0>();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (i == 0) {
            queries.keep();
            d_out.keep();
        }
        if (i + 1 < count) {
            keys.fill(tiles.keys(stage ^ 1), (i + 1) * T::KEYS);
            values.fill(tiles.values(stage ^ 1), (i + 1) * T::KEYS);
            copy_commit();
        }
#pragma unroll 1
        for (int part = 0; part < T::KEYS; part += T::STEP) {
            int key = i * T::KEYS + part;
            if (key > query + 16 * T::TILES - 1) break;   // all of it comes after all of this warp's queries
            Sums<T::TILES, T::STEP / 8> s, d;
            scores(s, queries, tiles.keys(stage), part);
            if (key + T::STEP - 1 > query) mask(s, query, key);
            scores(d, d_out, tiles.values(stage), part);
            slopes_across(s, d, lse, dot, scale2);
            add_product(d_queries, s, tiles.keys(stage), part);
        }
    }
    bf* to = a.d_qkv + shape.offset(b, head);
    write_rows(d_queries, a.scale, tiles.queries(), warp_row, to, shape.row(), query, shape.sequence, shape.head_dim);
}
