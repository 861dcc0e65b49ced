// Attention on products of warpgroups, for heads of up to 64 numbers, a multiple of eight: compiled for sm_90a, for
// devices of compute capability 9.0 alone. Operands, results and floors as in attention.cu.
//
// A block is one warpgroup and has 64 rows, of queries or of keys, and walks over the others 64 at a time. Scores have
// both operands in shared memory; probabilities and their slopes become, without leaving their registers, left operands
// of the next product. Nothing is read by ldmatrix.
//
// Launch; all: block 128. Dynamic shared memory past 48 KiB must be asked for.
//   attention_forward_group: grid (ceil(sequence / 64), heads, batch), dynamic shared memory 40960 bytes.
//   attention_backward_kv_group: grid (ceil(sequence / 64), kv_heads, batch), dynamic shared memory 50176 bytes.
//   attention_backward_q_group: grid (ceil(sequence / 64), heads, batch), dynamic shared memory 49152 bytes.
#include "attention.cuh"
#include "attention_backward.cuh"
#include "group.cuh"

// The block's own rows, FIXED tiles of them, and after these two stages of two tiles.
template <int FIXED>
struct GroupTiles {
    bf* shared;
    __device__ __forceinline__ Rows64 own(int which) const { return {shared, which * Rows64::NUMBERS}; }
    __device__ __forceinline__ Rows64 stage(int stage, int which) const {
        return {shared, (FIXED + 2 * stage + which) * Rows64::NUMBERS};
    }
    // After all tiles: for each query of a stage, lse, and then dot.
    __device__ __forceinline__ float* statistics(int stage) const {
        return reinterpret_cast<float*>(shared + (FIXED + 4) * Rows64::NUMBERS) + 128 * stage;
    }
};
using GroupFiller = Filler<GROUP_THREADS, 64, false>;

// Waits for the copies of a stage. After this all of them are here, and nobody reads the stage before it any more.
__device__ __forceinline__ void next_stage() {
    copy_wait<0>();
    group_publish();
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 4)
    attention_forward_group(bf* out, float* lse, const bf* qkv, int batch, int sequence, int heads, int kv_heads,
                            int head_dim, float scale) {
    ALIGNED_SHARED(bf, shared);
    GroupTiles<1> tiles = {shared};
    AttentionShape shape = {batch, sequence, heads, kv_heads, head_dim};
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * 64, head = blockIdx.y, b = blockIdx.z;
    GroupFiller keys(shape.rows(qkv, b, heads + shape.kv_of(head)));
    GroupFiller values = keys.further(kv_heads * head_dim);
    int last = min(first + 64, sequence) - 1, count = last / 64 + 1;
    int warp_row = threadIdx.x / LANES * 16, query = first + warp_row;
    float scale2 = scale * LOG2_E;

    Sums<1, 8> sums, s;
    Rows<1> rows;
    sums.clear();
    rows.most[0][0] = rows.most[0][1] = minus_infinity();
    rows.sum[0][0] = rows.sum[0][1] = 0.0f;
    GroupFiller(shape.rows(qkv, b, head)).fill(tiles.own(0), first);
    keys.fill(tiles.stage(0, 0), 0);
    values.fill(tiles.stage(0, 1), 0);
    copy_commit();
    for (int i = 0; i < count; i++) {
        int stage = i % 2, key = i * 64;
        next_stage();
        if (i + 1 < count) {
            keys.fill(tiles.stage(stage ^ 1, 0), key + 64);
            values.fill(tiles.stage(stage ^ 1, 1), key + 64);
            copy_commit();
        }
        group_fence();
        group_scores(s, tiles.own(0), tiles.stage(stage, 0));
        group_commit();
        group_wait<0>();
        hold(s.value[0]);
        if (key + 63 > query) mask(s, query, key);
        softmax(s, rows, sums, scale2);
        unsigned p[4][4];
        as_left(p, s);
        hold(sums.value[0]);
        group_fence();
        group_add_product(sums, p, tiles.stage(stage, 1));
        group_commit();
        group_wait<0>();
        hold(sums.value[0]);
    }
    finish(sums, rows, scale2, lse + shape.statistics(b, head), query, sequence);
    int pitch = heads * head_dim;
    bf* to = out + static_cast<long long>(b) * sequence * pitch + head * head_dim;
    // Other warps' products have read this warp's rows too, for all that is known.
    __syncthreads();
    write_rows(sums, 1.0f, tiles.own(0), warp_row, to, pitch, query, sequence, head_dim);
}
EXPORT(attention_forward_group, GROUP_THREADS)

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 3)
    attention_backward_kv_group(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot,
                                int batch, int sequence, int heads, int kv_heads, int head_dim, float scale) {
    ALIGNED_SHARED(bf, shared);
    GroupTiles<2> tiles = {shared};
    AttentionBackward a = {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale};
    const AttentionShape& shape = a.shape;
    int first = blockIdx.x * 64, kv = blockIdx.y, b = blockIdx.z, members = heads / kv_heads;
    int warp_row = threadIdx.x / LANES * 16, key = first + warp_row;
    float scale2 = scale * LOG2_E;

    // Begins to bring 64 queries of one head, and what belongs to them.
    auto fill_queries = [&](int stage, int head, int from) {
        GroupFiller(shape.rows(qkv, b, head)).fill(tiles.stage(stage, 0), from);
        GroupFiller(a.d_rows(b, head)).fill(tiles.stage(stage, 1), from);
        int query = from + threadIdx.x % 64;
        bool there = query < sequence;
        const float* source = (threadIdx.x < 64 ? lse : dot) + shape.statistics(b, head) + (there ? query : 0);
        copy_async_4(tiles.statistics(stage) + threadIdx.x, source, there);
        copy_commit();
    };

    Sums<1, 8> d_keys, d_values, p, d;
    d_keys.clear();
    d_values.clear();
    GroupFiller(shape.rows(qkv, b, heads + kv)).fill(tiles.own(0), first);
    GroupFiller(shape.rows(qkv, b, heads + kv_heads + kv)).fill(tiles.own(1), first);
    // The queries of one head that see any of these keys, 64 at a time, then those of the group's next head.
    int query = first, head = kv * members, stage = 0;
    fill_queries(0, head, query);
    while (head < (kv + 1) * members) {
        int next_query = query + 64, next_head = head;
        if (next_query >= sequence) {
            next_query = first;
            next_head++;
        }
        next_stage();
        if (next_head < (kv + 1) * members) fill_queries(stage ^ 1, next_head, next_query);
        const float* stats = tiles.statistics(stage);
        unsigned left[4][4], right[4][4];
        group_fence();
        group_scores(p, tiles.own(0), tiles.stage(stage, 0));
        group_commit();
        group_scores(d, tiles.own(1), tiles.stage(stage, 1));
        group_commit();
        group_wait<1>();
        hold(p.value[0]);
        probabilities_down(p, stats, scale2, key, query, key + 15 > query);
        as_left(left, p);
        hold(d_values.value[0]);
        group_fence();
        group_add_product(d_values, left, tiles.stage(stage, 1));
        group_commit();
        group_wait<1>();
        hold(d.value[0]);
        slopes_down(d, p, stats + 64);
        as_left(right, d);
        hold(d_keys.value[0]);
        group_fence();
        group_add_product(d_keys, right, tiles.stage(stage, 0));
        group_commit();
        group_wait<0>();
        hold(d_values.value[0]);
        hold(d_keys.value[0]);
        head = next_head;
        query = next_query;
        stage ^= 1;
    }
    bf* to_keys = d_qkv + shape.offset(b, heads + kv);
    bf* to_values = d_qkv + shape.offset(b, heads + kv_heads + kv);
    // As in the forward.
    __syncthreads();
    write_rows(d_keys, scale, tiles.own(0), warp_row, to_keys, shape.row(), key, sequence, head_dim);
    write_rows(d_values, 1.0f, tiles.own(1), warp_row, to_values, shape.row(), key, sequence,
               head_dim);
}
EXPORT(attention_backward_kv_group, GROUP_THREADS)

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 4)
    attention_backward_q_group(bf* d_qkv, const bf* qkv, const bf* d_out, const float* lse, const float* dot,
                               int batch, int sequence, int heads, int kv_heads, int head_dim, float scale) {
    ALIGNED_SHARED(bf, shared);
    GroupTiles<2> tiles = {shared};
    AttentionBackward a = {d_qkv, qkv, d_out, lse, dot, {batch, sequence, heads, kv_heads, head_dim}, scale};
    const AttentionShape& shape = a.shape;
    // Later queries see more keys: they begin first.
    int first = (gridDim.x - 1 - blockIdx.x) * 64, head = blockIdx.y, b = blockIdx.z;
    GroupFiller keys(shape.rows(qkv, b, heads + shape.kv_of(head)));
    GroupFiller values = keys.further(kv_heads * head_dim);
    int last = min(first + 64, sequence) - 1, count = last / 64 + 1;
    int warp_row = threadIdx.x / LANES * 16, query = first + warp_row;
    float scale2 = scale * LOG2_E;

    Sums<1, 8> d_queries, s, d;
    d_queries.clear();
    GroupFiller(shape.rows(qkv, b, head)).fill(tiles.own(0), first);
    GroupFiller(a.d_rows(b, head)).fill(tiles.own(1), first);
    keys.fill(tiles.stage(0, 0), 0);
    values.fill(tiles.stage(0, 1), 0);
    copy_commit();
    RowValues<1> row_lse(lse + shape.statistics(b, head), query, sequence);
    RowValues<1> row_dot(dot + shape.statistics(b, head), query, sequence);
    for (int i = 0; i < count; i++) {
        int stage = i % 2, key = i * 64;
        next_stage();
        if (i + 1 < count) {
            keys.fill(tiles.stage(stage ^ 1, 0), key + 64);
            values.fill(tiles.stage(stage ^ 1, 1), key + 64);
            copy_commit();
        }
        group_fence();
        group_scores(s, tiles.own(0), tiles.stage(stage, 0));
        group_scores(d, tiles.own(1), tiles.stage(stage, 1));
        group_commit();
        group_wait<0>();
        hold(s.value[0]);
        hold(d.value[0]);
        if (key + 63 > query) mask(s, query, key);
        slopes_across(s, d, row_lse, row_dot, scale2);
        unsigned left[4][4];
        as_left(left, s);
        hold(d_queries.value[0]);
        group_fence();
        group_add_product(d_queries, left, tiles.stage(stage, 0));
        group_commit();
        group_wait<0>();
        hold(d_queries.value[0]);
    }
    bf* to = d_qkv + shape.offset(b, head);
    // As in the forward.
    __syncthreads();
    write_rows(d_queries, scale, tiles.own(0), warp_row, to, shape.row(), query, sequence, head_dim);
}
EXPORT(attention_backward_q_group, GROUP_THREADS)
