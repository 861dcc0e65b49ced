// Attention for heads of up to 64 numbers, a multiple of eight, on mma.sync (sm_80 and later), as it is with:
//   MMA_WARPS warps of 16 MMA_TILES rows a block, MMA_STEP columns of scores at a time, MMA_BLOCKS blocks on a
//   multiprocessor; places of copies computed once; left operands that do not change kept in registers where
//   MMA_KEPT; the seldom rescaling softmax where LAZY.
//
// Launch, with R = 16 MMA_TILES MMA_WARPS rows: block 32 MMA_WARPS, grid (ceil(sequence / R), heads or kv_heads,
// batch), dynamic shared memory: forward 128 R + 32768, backward_kv 256 R + 33792, backward_q 256 R + 32768 bytes.
#include "attention.cuh"
#include "attention_backward.cuh"
#include "fast_fill.cuh"
#include "lazy.cuh"

#ifndef MMA_WARPS
#define MMA_WARPS 4
#endif
#ifndef MMA_TILES
#define MMA_TILES 2
#endif
#ifndef MMA_STEP
#define MMA_STEP 64
#endif
#ifndef MMA_BLOCKS
#define MMA_BLOCKS 2
#endif
#ifndef MMA_KEPT
#define MMA_KEPT 1
#endif
#ifndef LAZY
#define LAZY 0
#endif

constexpr int MMA_THREADS = 32 * MMA_WARPS;
constexpr int MMA_ROWS = 16 * MMA_TILES * MMA_WARPS;
using Rows64 = Tile<64, 64>;
using RowsAll = Tile<MMA_ROWS, 64>;

// A warp's rows of a tile as left operands: in registers, or loaded when they are used.
struct Left {
    unsigned a[MMA_KEPT ? MMA_TILES : 1][4][4];
    RowsAll tile;
    int row;

    __device__ __forceinline__ void load() {
        if (!MMA_KEPT) return;
#pragma unroll
        for (int t = 0; t < MMA_TILES; t++) {
#pragma unroll
            for (int step = 0; step < 4; step++) tile.load_a(a[MMA_KEPT ? t : 0][step], row + 16 * t, step);
        }
    }
};

template <int BLOCKS>
__device__ __forceinline__ void scores_of(Sums<MMA_TILES, BLOCKS>& sums, const Left& a, const Rows64& b, int b_row) {
    if (!MMA_KEPT) {
        scores(sums, a.tile, a.row, b, b_row);
        return;
    }
    sums.clear();
#pragma unroll
    for (int step = 0; step < 4; step++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block += 2) {
            unsigned one[2], two[2];
            b.load_b(one, two, b_row + 8 * block, step);
#pragma unroll
            for (int t = 0; t < MMA_TILES; t++) {
                multiply_add(sums.value[t][block], a.a[MMA_KEPT ? t : 0][step], one);
                multiply_add(sums.value[t][block + 1], a.a[MMA_KEPT ? t : 0][step], two);
            }
        }
    }
}

#ifdef MMA_FORWARD
extern "C" __global__ void __launch_bounds__(MMA_THREADS, MMA_BLOCKS)
    attention_forward_mma(bf* out, float* lse, const bf* qkv, int batch, int sequence, int heads, int kv_heads,
                          int head_dim, float scale) {
    DYNAMIC_SHARED(bf, shared);
    AttentionShape shape = {batch, sequence, heads, kv_heads, head_dim};
    RowsAll queries = {shared, 0};
    auto keys = [&](int stage) { return Rows64{shared, RowsAll::NUMBERS + 2 * stage * Rows64::NUMBERS}; };
    auto values = [&](int stage) { return Rows64{shared, RowsAll::NUMBERS + (2 * stage + 1) * Rows64::NUMBERS}; };
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * MMA_ROWS, head = blockIdx.y, b = blockIdx.z;
    Filler<MMA_THREADS> key_rows(shape.rows(qkv, b, heads + shape.kv_of(head)));
    Filler<MMA_THREADS> value_rows = key_rows;
    value_rows.from += kv_heads * head_dim;
    int last = min(first + MMA_ROWS, sequence) - 1, count = last / 64 + 1;
    int warp_row = threadIdx.x / LANES * 16 * MMA_TILES, query = first + warp_row;
    float scale2 = scale * LOG2_E;

    Sums<MMA_TILES, 8> sums;
    Rows<MMA_TILES> rows;
    sums.clear();
#pragma unroll
    for (int t = 0; t < MMA_TILES; t++) {
        rows.most[t][0] = rows.most[t][1] = LAZY ? LAZY_LEAST : minus_infinity();
        rows.sum[t][0] = rows.sum[t][1] = 0.0f;
    }
    Filler<MMA_THREADS>(shape.rows(qkv, b, head)).fill(queries, first);
    key_rows.fill(keys(0), 0);
    value_rows.fill(values(0), 0);
    copy_commit();
    Left q;
    q.tile = queries;
    q.row = warp_row;
    for (int i = 0; i < count; i++) {
        int stage = i % 2, key = i * 64;
        copy_wait<0>();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (i == 0) q.load();
        if (i + 1 < count) {
            key_rows.fill(keys(stage ^ 1), key + 64);
            value_rows.fill(values(stage ^ 1), key + 64);
            copy_commit();
        }
#pragma unroll 1
        for (int part = 0; part < 64; part += MMA_STEP) {
            int first_key = key + part;
            if (first_key > query + 16 * MMA_TILES - 1) break;   // all of it comes after all of this warp's queries
            Sums<MMA_TILES, MMA_STEP / 8> s;
            scores_of(s, q, keys(stage), part);
            if (first_key + MMA_STEP - 1 > query) mask(s, query, first_key);
            if (LAZY) {
                lazy_softmax(s, rows, sums, scale2);
            } else {
                softmax(s, rows, sums, scale2);
            }
            add_product(sums, s, values(stage), part);
        }
    }
    finish(sums, rows, scale2, lse + shape.statistics(b, head), query, sequence);
    int pitch = heads * head_dim;
    bf* to = out + static_cast<long long>(b) * sequence * pitch + head * head_dim;
    write_rows(sums, 1.0f, queries, warp_row, to, pitch, query, sequence, head_dim);
}
EXPORT(attention_forward_mma, MMA_THREADS)
#endif

#ifdef MMA_BACKWARD_KV
extern "C" __global__ void __launch_bounds__(MMA_THREADS, MMA_BLOCKS)
    attention_backward_kv_mma(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot, int batch,
                              int sequence, int heads, int kv_heads, int head_dim, float scale) {
    DYNAMIC_SHARED(bf, shared);
    AttentionBackward a = {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale};
    const AttentionShape& shape = a.shape;
    RowsAll keys = {shared, 0}, values = {shared, RowsAll::NUMBERS};
    auto queries = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + 2 * stage * Rows64::NUMBERS}; };
    auto d_outs = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + (2 * stage + 1) * Rows64::NUMBERS}; };
    float* statistics = reinterpret_cast<float*>(shared + 2 * RowsAll::NUMBERS + 4 * Rows64::NUMBERS);
    int first = blockIdx.x * MMA_ROWS, kv = blockIdx.y, b = blockIdx.z, members = heads / kv_heads;
    int warp_row = threadIdx.x / LANES * 16 * MMA_TILES, key = first + warp_row;
    float scale2 = scale * LOG2_E;

    // Begins to bring 64 queries of one head, and what belongs to them.
    auto fill_queries = [&](int stage, int head, int from) {
        Filler<MMA_THREADS>(shape.rows(qkv, b, head)).fill(queries(stage), from);
        Filler<MMA_THREADS>(a.d_rows(b, head)).fill(d_outs(stage), from);
        if (threadIdx.x < 128) {
            int query = from + threadIdx.x % 64;
            bool there = query < sequence;
            const float* source = (threadIdx.x < 64 ? lse : dot) + shape.statistics(b, head) + (there ? query : 0);
            copy_async_4(statistics + 128 * stage + threadIdx.x, source, there);
        }
        copy_commit();
    };

    Sums<MMA_TILES, 8> d_keys, d_values;
    d_keys.clear();
    d_values.clear();
    Filler<MMA_THREADS>(shape.rows(qkv, b, heads + kv)).fill(keys, first);
    Filler<MMA_THREADS>(shape.rows(qkv, b, heads + kv_heads + kv)).fill(values, first);
    int query = first, head = kv * members, stage = 0;
    fill_queries(0, head, query);
    Left k, v;
    k.tile = keys;
    v.tile = values;
    k.row = v.row = warp_row;
    bool begun = false;
    while (head < (kv + 1) * members) {
        int next_query = query + 64, next_head = head;
        if (next_query >= sequence) {
            next_query = first;
            next_head++;
        }
        copy_wait<0>();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (!begun) {
            k.load();
            v.load();
            begun = true;
        }
        if (next_head < (kv + 1) * members) fill_queries(stage ^ 1, next_head, next_query);
#pragma unroll 1
        for (int part = 0; part < 64; part += MMA_STEP) {
            int first_query = query + part;
            if (first_query + MMA_STEP - 1 < key) continue;   // none of these queries sees any of this warp's keys
            const float* stats = statistics + 128 * stage + part;
            Sums<MMA_TILES, MMA_STEP / 8> p, d;
            scores_of(d, v, d_outs(stage), part);
            scores_of(p, k, queries(stage), part);
            probabilities_down(p, stats, scale2, key, first_query, key + 16 * MMA_TILES - 1 > first_query);
            add_product(d_values, p, d_outs(stage), part);
            slopes_down(d, p, stats + 64);
            add_product(d_keys, d, queries(stage), part);
        }
        head = next_head;
        query = next_query;
        stage ^= 1;
    }
    bf* to_keys = d_qkv + shape.offset(b, heads + kv);
    bf* to_values = d_qkv + shape.offset(b, heads + kv_heads + kv);
    write_rows(d_keys, scale, keys, warp_row, to_keys, shape.row(), key, sequence, head_dim);
    write_rows(d_values, 1.0f, values, warp_row, to_values, shape.row(), key, sequence, head_dim);
}
EXPORT(attention_backward_kv_mma, MMA_THREADS)
#endif

#ifdef MMA_BACKWARD_Q
extern "C" __global__ void __launch_bounds__(MMA_THREADS, MMA_BLOCKS)
    attention_backward_q_mma(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot, int batch,
                             int sequence, int heads, int kv_heads, int head_dim, float scale) {
    DYNAMIC_SHARED(bf, shared);
    AttentionBackward a = {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale};
    const AttentionShape& shape = a.shape;
    RowsAll queries = {shared, 0}, d_outs = {shared, RowsAll::NUMBERS};
    auto keys = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + 2 * stage * Rows64::NUMBERS}; };
    auto values = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + (2 * stage + 1) * Rows64::NUMBERS}; };
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * MMA_ROWS, head = blockIdx.y, b = blockIdx.z;
    Filler<MMA_THREADS> key_rows(shape.rows(qkv, b, heads + shape.kv_of(head)));
    Filler<MMA_THREADS> value_rows = key_rows;
    value_rows.from += kv_heads * head_dim;
    int last = min(first + MMA_ROWS, sequence) - 1, count = last / 64 + 1;
    int warp_row = threadIdx.x / LANES * 16 * MMA_TILES, query = first + warp_row;
    float scale2 = scale * LOG2_E;

    Sums<MMA_TILES, 8> d_queries;
    d_queries.clear();
    Filler<MMA_THREADS>(shape.rows(qkv, b, head)).fill(queries, first);
    Filler<MMA_THREADS>(a.d_rows(b, head)).fill(d_outs, first);
    key_rows.fill(keys(0), 0);
    value_rows.fill(values(0), 0);
    copy_commit();
    RowValues<MMA_TILES> row_lse(lse + shape.statistics(b, head), query, sequence);
    RowValues<MMA_TILES> row_dot(dot + shape.statistics(b, head), query, sequence);
    Left q, o;
    q.tile = queries;
    o.tile = d_outs;
    q.row = o.row = warp_row;
    for (int i = 0; i < count; i++) {
        int stage = i % 2;
        copy_wait<0>();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (i == 0) {
            q.load();
            o.load();
        }
        if (i + 1 < count) {
            key_rows.fill(keys(stage ^ 1), (i + 1) * 64);
            value_rows.fill(values(stage ^ 1), (i + 1) * 64);
            copy_commit();
        }
#pragma unroll 1
        for (int part = 0; part < 64; part += MMA_STEP) {
            int key = i * 64 + part;
            if (key > query + 16 * MMA_TILES - 1) break;   // all of it comes after all of this warp's queries
            Sums<MMA_TILES, MMA_STEP / 8> s, d;
            scores_of(s, q, keys(stage), part);
            if (key + MMA_STEP - 1 > query) mask(s, query, key);
            scores_of(d, o, values(stage), part);
            slopes_across(s, d, row_lse, row_dot, scale2);
            add_product(d_queries, s, keys(stage), part);
        }
    }
    bf* to = d_qkv + shape.offset(b, head);
    write_rows(d_queries, scale, queries, warp_row, to, shape.row(), query, sequence, head_dim);
}
EXPORT(attention_backward_q_mma, MMA_THREADS)
#endif
