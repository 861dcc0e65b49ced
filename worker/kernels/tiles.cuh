// Tiles of bfloat16 rows in shared memory, as the attention kernels use them.
//
// A tile has ROWS rows of WIDTH numbers, cut into chunks of 16 bytes. ldmatrix reads one chunk of eight rows at a time;
// so that these eight lie in different banks, chunk c of row r is kept at place c ^ r (the low bits of r; rows of 64
// bytes, two of which span the banks, use r / 2). The same holds for the copies that fill the tile.
//
// Fragments are what mma.m16n8k16 takes: A is 16 rows by 16, B is 16 by 8 columns, and one load_matrices gives one A,
// or two B. A row of a tile can be a row of A, a column of B (as it lies) or a row of B (transposed).
#pragma once
#include "common.cuh"

// Heads narrower than the tile are padded with zeros in it.
template <int ROWS, int WIDTH>
struct Tile {
    static constexpr int CHUNKS = WIDTH / 8;   // of a row
    static constexpr int NUMBERS = ROWS * WIDTH;

    bf* base;    // of the block's shared memory
    int start;   // of the tile, in numbers from there

    // Where chunk `chunk` of row `row` is, in numbers from the tile's start.
    static __device__ __forceinline__ int offset(int row, int chunk) {
        int turn = CHUNKS >= 8 ? row & 7 : row >> 1 & 3;
        return row * WIDTH + (chunk ^ turn) * 8;
    }
    __device__ __forceinline__ bf* place(int row, int chunk) const { return base + start + offset(row, chunk); }

    // A: rows from `row`, columns from 16 `step`.
    __device__ __forceinline__ void load_a(unsigned (&a)[4], int row, int step) const {
        int lane = threadIdx.x % LANES;
        load_matrices<false>(a, base, start + offset(row + lane % 16, 2 * step + lane / 16));
    }

    // Two B side by side: their 16 columns are the tile's rows from `row`, their rows its columns from 16 `step`.
    __device__ __forceinline__ void load_b(unsigned (&left)[2], unsigned (&right)[2], int row, int step) const {
        int lane = threadIdx.x % LANES;
        unsigned both[4];
        load_matrices<false>(both, base, start + offset(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
        split(both, left, right);
    }

    // Two B side by side: their rows are the tile's rows from `row`, their 16 columns its columns from 16 `step`.
    __device__ __forceinline__ void load_b_rows(unsigned (&left)[2], unsigned (&right)[2], int row, int step) const {
        int lane = threadIdx.x % LANES;
        unsigned both[4];
        load_matrices<true>(both, base, start + offset(row + lane % 16, 2 * step + lane / 16));
        split(both, left, right);
    }

    static __device__ __forceinline__ void split(const unsigned (&both)[4], unsigned (&left)[2], unsigned (&right)[2]) {
        left[0] = both[0];
        left[1] = both[1];
        right[0] = both[2];
        right[1] = both[3];
    }
};

// One head's rows in a row-major matrix.
struct HeadRows {
    const bf* at;     // the head's first number in the sequence's first row
    int pitch;        // numbers from row to row
    int count;        // rows of the sequence
    int head_dim;     // numbers of the head
};

// Begins to fill a tile with rows from `first` on; zeros beyond the sequence and the head. Heads whose width is no
// multiple of eight are moved number by number, and are there at once.
template <int THREADS, int ROWS, int WIDTH>
__device__ __forceinline__ void fill(const Tile<ROWS, WIDTH>& tile, const HeadRows& from, int first) {
    constexpr int CHUNKS = Tile<ROWS, WIDTH>::CHUNKS;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies as many chunks");
    bool vector = from.head_dim % 8 == 0;
#pragma unroll 2
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int item = threadIdx.x + i * THREADS, row = item / CHUNKS, chunk = item % CHUNKS;
        bool there = first + row < from.count && chunk * 8 < from.head_dim;
        const bf* source = there ? from.at + static_cast<long long>(first + row) * from.pitch + chunk * 8 : from.at;
        if (vector) {
            copy_async_16(tile.place(row, chunk), source, there);
        } else {
            store_words(tile.place(row, chunk), load8(source, there ? from.head_dim - chunk * 8 : 0, false));
        }
    }
}

// Fills tiles with one head's rows, as `fill` does, from a place for each thread that is computed once. Heads of a
// multiple of eight numbers; others go the way of `fill` where ANY says that there may be some, and so do tiles of 128
// numbers a row, whose kernels have no registers to spare.
template <int THREADS, int WIDTH, bool ANY>
struct Filler {
    static constexpr int CHUNKS = WIDTH / 8;
    static constexpr int ROWS = THREADS / CHUNKS;   // at a time
    static_assert(ROWS % 8 == 0, "all rows of a thread have their chunks turned alike");
    const bf* from;      // this thread's chunk of its first row
    int pitch;
    int count;           // rows from there on, or none where the chunk is beyond the head
    int to;
    HeadRows rows;

    __device__ __forceinline__ explicit Filler(const HeadRows& rows) : pitch(rows.pitch), rows(rows) {
        int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        from = rows.at + static_cast<long long>(row) * pitch + chunk * 8;
        count = chunk * 8 < rows.head_dim ? rows.count - row : -(1 << 30);
        to = Tile<8, WIDTH>::offset(row, chunk);
    }

    // The same rows of the matrix, `numbers` further on.
    __device__ __forceinline__ Filler further(int numbers) const {
        Filler other = *this;
        other.from += numbers;
        other.rows.at += numbers;
        return other;
    }

    template <int TILE_ROWS>
    __device__ __forceinline__ void fill(const Tile<TILE_ROWS, WIDTH>& tile, int first) const {
        static_assert(TILE_ROWS % ROWS == 0, "every thread copies as many chunks");
        if (WIDTH > 64 || (ANY && rows.head_dim % 8 != 0)) {
            ::fill<THREADS>(tile, rows, first);
            return;
        }
        const bf* source = from + static_cast<long long>(first) * pitch;
#pragma unroll
        for (int i = 0; i < TILE_ROWS / ROWS; i++) {
            copy_async_16(tile.base + tile.start + to + i * ROWS * WIDTH, source, first + i * ROWS < count);
            source += ROWS * pitch;
        }
    }
};

// A warp's TILES x 16 rows of a tile, from `row` on, as left operands: kept in registers where KEPT, or loaded when
// they are used.
template <int TILES, int ROWS, int WIDTH, bool KEPT>
struct LeftRows {
    Tile<ROWS, WIDTH> tile;
    int row;
    unsigned kept[KEPT ? TILES : 1][KEPT ? WIDTH / 16 : 1][4];

    // Once the tile is filled, and before it is used.
    __device__ __forceinline__ void keep() {
        if (!KEPT) return;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int step = 0; step < WIDTH / 16; step++) {
                tile.load_a(kept[KEPT ? t : 0][KEPT ? step : 0], row + 16 * t, step);
            }
        }
    }

    __device__ __forceinline__ void load(unsigned (&a)[4], int t, int step) const {
        if (KEPT) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = kept[KEPT ? t : 0][KEPT ? step : 0][i];
        } else {
            tile.load_a(a, row + 16 * t, step);
        }
    }
};

// Sums of a warp: TILES tiles of 16 rows (eight fragments' worth of rows by lanes) and 8 BLOCKS columns. Element
// [tile][block][i] of a lane is row 16 tile + lane / 4 + 8 (i / 2), column 8 block + 2 (lane % 4) + i % 2.
template <int TILES, int BLOCKS>
struct Sums {
    float value[TILES][BLOCKS][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                for (int i = 0; i < 4; i++) value[t][b][i] = 0.0f;
            }
        }
    }

    // Columns from 16 `step` as an A fragment, rounded to bfloat16: sums of one product become the left operand of the
    // next without leaving their registers.
    __device__ __forceinline__ void as_a(unsigned (&a)[4], int tile, int step) const {
        const float(&low)[4] = value[tile][2 * step];
        const float(&high)[4] = value[tile][2 * step + 1];
        a[0] = pack2(low[0], low[1]);
        a[1] = pack2(low[2], low[3]);
        a[2] = pack2(high[0], high[1]);
        a[3] = pack2(high[2], high[3]);
    }
};

// Writes a warp's sums, times `factor`, to 16 TILES rows of `to` from row `first` on, by way of the warp's own rows of
// a tile, so that memory is written 16 bytes at a time. Nobody else may use those rows of the tile any more.
template <int TILES, int BLOCKS, int ROWS, int WIDTH>
__device__ __forceinline__ void write_rows(const Sums<TILES, BLOCKS>& sums, float factor,
                                           const Tile<ROWS, WIDTH>& tile, int warp_row, bf* to, int pitch, int first,
                                           int count, int head_dim) {
    static_assert(BLOCKS * 8 == WIDTH, "the sums are as wide as the tile");
    // The warp's last reads of its rows were warp-wide operations: no lane is still at them.
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                bf* at = tile.place(warp_row + 16 * t + 8 * half + lane / 4, b) + lane % 4 * 2;
                const float* pair = &sums.value[t][b][2 * half];
                *reinterpret_cast<unsigned*>(at) = pack2(pair[0] * factor, pair[1] * factor);
            }
        }
    }
    __syncwarp();
    constexpr int CHUNKS = WIDTH / 8;
    bool vector = head_dim % 8 == 0;
#pragma unroll 4
    for (int i = 0; i < TILES * 16 * CHUNKS / LANES; i++) {
        int item = lane + i * LANES, row = item / CHUNKS, chunk = item % CHUNKS;
        int left = first + row < count ? head_dim - chunk * 8 : 0;
        Words words = load_words(tile.place(warp_row + row, chunk));
        store8(to + static_cast<long long>(first + row) * pitch + chunk * 8, words, left, vector);
    }
}
