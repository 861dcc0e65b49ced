// Attention on warpgroups' products (wgmma), for heads of up to 64 numbers, a multiple of eight: sm_90a alone.
//
// ROW_GROUPS warpgroups a block, 64 rows each; SCORE_STEP columns of scores at a time in the backward; BLOCKS_EACH
// blocks on a multiprocessor; STAGE_COUNT tiles of keys and values at a time in the forward.
// Launch, with G = ROW_GROUPS: block 128 G, grid (ceil(sequence / (64 G)), heads or kv_heads, batch), dynamic shared
// memory: forward 8192 G + 16384 STAGE_COUNT, backward_kv 16384 G + 33792, backward_q 16384 G + 32768.
#include "attention.cuh"
#include "attention_backward.cuh"
#include "fast_fill.cuh"
#include "lazy.cuh"
#include "wgmma.cuh"

#ifndef ROW_GROUPS
#define ROW_GROUPS 2
#endif
#ifndef SCORE_STEP
#define SCORE_STEP 64
#endif
#ifndef BLOCKS_EACH
#define BLOCKS_EACH 2
#endif
#ifndef STAGE_COUNT
#define STAGE_COUNT 2
#endif
// Where left operands that stay are: registers (0), their tile (1), registers, loaded again for each tile (2), or copied
// for each tile (3).
#ifndef LEFT_IN
#define LEFT_IN 1
#endif
#ifndef LAZY
#define LAZY 0
#endif

constexpr int GROUP_THREADS = 128 * ROW_GROUPS;
constexpr int GROUP_ROWS = 64 * ROW_GROUPS;
using Rows64 = Tile<64, 64>;
using RowsAll = Tile<GROUP_ROWS, 64>;

// A warp's 16 rows of a tile, as left operands of four products.
template <int ROWS>
__device__ __forceinline__ void load_rows(unsigned (&a)[4][4], const Tile<ROWS, 64>& tile, int row) {
#pragma unroll
    for (int step = 0; step < 4; step++) tile.load_a(a[step], row, step);
}

template <int COUNT>
__device__ __forceinline__ void as_rows(unsigned (&a)[COUNT][4], const Sums<1, 2 * COUNT>& sums) {
#pragma unroll
    for (int step = 0; step < COUNT; step++) sums.as_a(a[step], 0, step);
}

struct Left {
    unsigned kept[4][4];
    const RowsAll tile;
    const int warp_row, group_row, nothing;
    __device__ __forceinline__ Left(const RowsAll& tile, int nothing)
        : tile(tile), warp_row(threadIdx.x / LANES * 16), group_row(threadIdx.x / 128 * 64), nothing(nothing) {
        if (LEFT_IN == 0 || LEFT_IN == 3) load_rows(kept, tile, warp_row);
    }
    template <int BLOCKS>
    __device__ __forceinline__ void scores(Sums<1, BLOCKS>& sums, const Rows64& right, int row, unsigned (&own)[4][4]) {
        if (LEFT_IN == 1) {
            group_scores(sums, tile, group_row, right, row);
        } else if (LEFT_IN == 0) {
            group_scores(sums, kept, right, row);
        } else {
            group_scores(sums, own, right, row);
        }
    }
    __device__ __forceinline__ void prepare(unsigned (&own)[4][4]) {
        if (LEFT_IN == 2) load_rows(own, tile, warp_row);
        if (LEFT_IN == 3) {
#pragma unroll
            for (int i = 0; i < 16; i++) own[i / 4][i % 4] = kept[i / 4][i % 4] ^ nothing;
        }
        if (LEFT_IN >= 2) hold(own);
    }
};

#ifdef GROUP_FORWARD
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, BLOCKS_EACH)
    attention_forward_group(bf* out, float* lse, const bf* qkv, int batch, int sequence, int heads, int kv_heads,
                            int head_dim, float scale) {
    ALIGNED_SHARED(bf, shared);
    AttentionShape shape = {batch, sequence, heads, kv_heads, head_dim};
    RowsAll queries = {shared, 0};
    auto keys = [&](int stage) { return Rows64{shared, RowsAll::NUMBERS + 2 * stage * Rows64::NUMBERS}; };
    auto values = [&](int stage) { return Rows64{shared, RowsAll::NUMBERS + (2 * stage + 1) * Rows64::NUMBERS}; };
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * GROUP_ROWS, head = blockIdx.y, b = blockIdx.z;
    int kv = heads + shape.kv_of(head);
    Filler<GROUP_THREADS> key_rows(shape.rows(qkv, b, kv));
    int to_values = kv_heads * head_dim;
    Filler<GROUP_THREADS> value_rows = key_rows;
    value_rows.from += to_values;
    int last = min(first + GROUP_ROWS, sequence) - 1, count = last / 64 + 1;
    int warp_row = threadIdx.x / LANES * 16, query = first + warp_row;
    int group_last = first + threadIdx.x / 128 * 64 + 63;   // the last query of this warpgroup
    float scale2 = scale * LOG2_E;

    Sums<1, 8> sums, s;
    Rows<1> rows;
    sums.clear();
    rows.most[0][0] = rows.most[0][1] = LAZY ? LAZY_LEAST : minus_infinity();
    rows.sum[0][0] = rows.sum[0][1] = 0.0f;
    Filler<GROUP_THREADS>(shape.rows(qkv, b, head)).fill(queries, first);
    key_rows.fill(keys(0), 0);
    value_rows.fill(values(0), 0);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    Left q(queries, head_dim >> 30);
    // Waits for tile i, and begins to bring the next.
    auto arrive = [&](int i) {
        copy_wait<0>();
        group_publish();
        // All copies of this tile are here, and nobody reads the tile any more that the next replaces.
        __syncthreads();
        if (i + 1 < count) {
            key_rows.fill(keys((i + 1) % STAGE_COUNT), i * 64 + 64);
            value_rows.fill(values((i + 1) % STAGE_COUNT), i * 64 + 64);
            copy_commit();
        }
    };
    // Tiles that come after all of this warpgroup's queries are waited for with the others and not used.
    int own = min(count, group_last / 64 + 1);
    for (int i = 0; i < own; i++) {
        int stage = i % STAGE_COUNT, key = i * 64;
        arrive(i);
        unsigned left[4][4];
        q.prepare(left);
        group_fence();
        q.scores(s, keys(stage), 0, left);
        group_commit();
        // With a third stage the product with the values before it is waited for only now.
        group_wait<0>();
        hold(s.value[0]);
        if (STAGE_COUNT > 2) hold(sums.value[0]);
        if (key + 63 > query) mask(s, query, key);
        if (LAZY) {
            lazy_softmax(s, rows, sums, scale2);
        } else {
            softmax(s, rows, sums, scale2);
        }
        unsigned p[4][4];
        as_rows(p, s);
        hold(p);
        hold(sums.value[0]);
        group_fence();
        group_add_product(sums, p, values(stage), 0);
        group_commit();
        if (STAGE_COUNT == 2) {
            group_wait<0>();
            hold(sums.value[0]);
        }
    }
    group_wait<0>();
    hold(sums.value[0]);
    for (int i = own; i < count; i++) arrive(i);
    __syncthreads();
    finish(sums, rows, scale2, lse + shape.statistics(b, head), query, sequence);
    int pitch = heads * head_dim;
    bf* to = out + static_cast<long long>(b) * sequence * pitch + head * head_dim;
    write_rows(sums, 1.0f, queries, warp_row, to, pitch, query, sequence, head_dim);
}
EXPORT(attention_forward_group, GROUP_THREADS)
#endif

#ifdef GROUP_BACKWARD_KV
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, BLOCKS_EACH)
    attention_backward_kv_group(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot,
                                int batch, int sequence, int heads, int kv_heads, int head_dim, float scale) {
    ALIGNED_SHARED(bf, shared);
    AttentionBackward a = {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale};
    const AttentionShape& shape = a.shape;
    RowsAll keys = {shared, 0}, values = {shared, RowsAll::NUMBERS};
    auto queries = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + 2 * stage * Rows64::NUMBERS}; };
    auto d_outs = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + (2 * stage + 1) * Rows64::NUMBERS}; };
    float* statistics = reinterpret_cast<float*>(shared + 2 * RowsAll::NUMBERS + 4 * Rows64::NUMBERS);
    int first = blockIdx.x * GROUP_ROWS, kv = blockIdx.y, b = blockIdx.z, members = heads / kv_heads;
    int warp_row = threadIdx.x / LANES * 16, key = first + warp_row, group_key = first + threadIdx.x / 128 * 64;
    float scale2 = scale * LOG2_E;

    // Begins to bring 64 queries of one head, and what belongs to them.
    auto fill_queries = [&](int stage, int head, int from) {
        Filler<GROUP_THREADS>(shape.rows(qkv, b, head)).fill(queries(stage), from);
        Filler<GROUP_THREADS>(a.d_rows(b, head)).fill(d_outs(stage), from);
        if (threadIdx.x < 128) {
            int query = from + threadIdx.x % 64;
            bool there = query < sequence;
            const float* source = (threadIdx.x < 64 ? lse : dot) + shape.statistics(b, head) + (there ? query : 0);
            copy_async_4(statistics + 128 * stage + threadIdx.x, source, there);
        }
        copy_commit();
    };

    Sums<1, 8> d_keys, d_values;
    Sums<1, SCORE_STEP / 8> p, d;
    d_keys.clear();
    d_values.clear();
    Filler<GROUP_THREADS>(shape.rows(qkv, b, heads + kv)).fill(keys, first);
    Filler<GROUP_THREADS>(shape.rows(qkv, b, heads + kv_heads + kv)).fill(values, first);
    int query = first / 64 * 64, head = kv * members, stage = 0;
    fill_queries(0, head, query);
    unsigned left[SCORE_STEP / 16][4], right[SCORE_STEP / 16][4];
    copy_wait<0>();
    __syncthreads();
    Left k(keys, head_dim >> 30), v(values, head_dim >> 30);
    while (head < (kv + 1) * members) {
        int next_query = query + 64, next_head = head;
        if (next_query >= sequence) {
            next_query = first / 64 * 64;
            next_head++;
        }
        copy_wait<0>();
        group_publish();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (next_head < (kv + 1) * members) fill_queries(stage ^ 1, next_head, next_query);
#pragma unroll 1
        for (int part = 0; part < 64; part += SCORE_STEP) {
            int first_query = query + part;
            if (first_query + SCORE_STEP - 1 < group_key) continue;   // none of these queries sees any of these keys
            const float* stats = statistics + 128 * stage + part;
            unsigned own[4][4], other[4][4];
            k.prepare(own);
            v.prepare(other);
            group_fence();
            k.scores(p, queries(stage), part, own);
            group_commit();
            v.scores(d, d_outs(stage), part, other);
            group_commit();
            group_wait<1>();
            hold(p.value[0]);
            probabilities_down(p, stats, scale2, key, first_query, key + 15 > first_query);
            as_rows(left, p);
            hold(left);
            hold(d_values.value[0]);
            group_fence();
            group_add_product(d_values, left, d_outs(stage), part);
            group_commit();
            group_wait<1>();
            hold(d.value[0]);
            slopes_down(d, p, stats + 64);
            as_rows(right, d);
            hold(right);
            hold(d_keys.value[0]);
            group_fence();
            group_add_product(d_keys, right, queries(stage), part);
            group_commit();
            group_wait<0>();
            hold(d_values.value[0]);
            hold(d_keys.value[0]);
        }
        head = next_head;
        query = next_query;
        stage ^= 1;
    }
    __syncthreads();
    bf* to_keys = d_qkv + shape.offset(b, heads + kv);
    bf* to_values = d_qkv + shape.offset(b, heads + kv_heads + kv);
    write_rows(d_keys, scale, keys, warp_row, to_keys, shape.row(), key, sequence, head_dim);
    write_rows(d_values, 1.0f, values, warp_row, to_values, shape.row(), key, sequence, head_dim);
}
EXPORT(attention_backward_kv_group, GROUP_THREADS)
#endif

#ifdef GROUP_BACKWARD_Q
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, BLOCKS_EACH)
    attention_backward_q_group(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot,
                               int batch, int sequence, int heads, int kv_heads, int head_dim, float scale) {
    ALIGNED_SHARED(bf, shared);
    AttentionBackward a = {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale};
    const AttentionShape& shape = a.shape;
    RowsAll queries = {shared, 0}, d_outs = {shared, RowsAll::NUMBERS};
    auto keys = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + 2 * stage * Rows64::NUMBERS}; };
    auto values = [&](int stage) { return Rows64{shared, 2 * RowsAll::NUMBERS + (2 * stage + 1) * Rows64::NUMBERS}; };
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * GROUP_ROWS, head = blockIdx.y, b = blockIdx.z;
    Filler<GROUP_THREADS> key_rows(shape.rows(qkv, b, heads + shape.kv_of(head)));
    Filler<GROUP_THREADS> value_rows = key_rows;
    value_rows.from += kv_heads * head_dim;
    int last = min(first + GROUP_ROWS, sequence) - 1, count = last / 64 + 1;
    int warp_row = threadIdx.x / LANES * 16, query = first + warp_row;
    int group_last = first + threadIdx.x / 128 * 64 + 63;
    float scale2 = scale * LOG2_E;

    Sums<1, 8> d_queries;
    Sums<1, SCORE_STEP / 8> s, d;
    d_queries.clear();
    Filler<GROUP_THREADS>(shape.rows(qkv, b, head)).fill(queries, first);
    Filler<GROUP_THREADS>(a.d_rows(b, head)).fill(d_outs, first);
    key_rows.fill(keys(0), 0);
    value_rows.fill(values(0), 0);
    copy_commit();
    RowValues<1> row_lse(lse + shape.statistics(b, head), query, sequence);
    RowValues<1> row_dot(dot + shape.statistics(b, head), query, sequence);
    copy_wait<0>();
    __syncthreads();
    Left q(queries, head_dim >> 30), o(d_outs, head_dim >> 30);
    for (int i = 0; i < count; i++) {
        int stage = i % 2;
        copy_wait<0>();
        group_publish();
        // All copies of this tile are here, and nobody reads the tile before it any more.
        __syncthreads();
        if (i + 1 < count) {
            key_rows.fill(keys(stage ^ 1), (i + 1) * 64);
            value_rows.fill(values(stage ^ 1), (i + 1) * 64);
            copy_commit();
        }
#pragma unroll 1
        for (int part = 0; part < 64; part += SCORE_STEP) {
            int key = i * 64 + part;
            if (key > group_last) break;   // all of it comes after all of this warpgroup's queries
            unsigned own[4][4], other[4][4];
            q.prepare(own);
            o.prepare(other);
            group_fence();
            q.scores(s, keys(stage), part, own);
            o.scores(d, values(stage), part, other);
            group_commit();
            group_wait<0>();
            hold(s.value[0]);
            hold(d.value[0]);
            if (key + SCORE_STEP - 1 > query) mask(s, query, key);
            slopes_across(s, d, row_lse, row_dot, scale2);
            unsigned left[SCORE_STEP / 16][4];
            as_rows(left, s);
            hold(left);
            hold(d_queries.value[0]);
            group_fence();
            group_add_product(d_queries, left, keys(stage), part);
            group_commit();
            group_wait<0>();
            hold(d_queries.value[0]);
        }
    }
    __syncthreads();
    bf* to = d_qkv + shape.offset(b, head);
    write_rows(d_queries, scale, queries, warp_row, to, shape.row(), query, sequence, head_dim);
}
EXPORT(attention_backward_q_group, GROUP_THREADS)
#endif
