// Fills tiles of 64 numbers a row with a place for each thread that is computed once. Heads of a multiple of eight.
#pragma once
#include "tiles.cuh"

template <int THREADS>
struct Filler {
    static constexpr int ROWS = THREADS / 8;   // at a time; a multiple of eight, so that all turn alike
    const bf* from;      // this thread's chunk of its first row
    int pitch;
    int count;           // rows from there on, or none where the chunk is beyond the head
    int to;

    __device__ __forceinline__ explicit Filler(const HeadRows& rows) : pitch(rows.pitch) {
        int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
        from = rows.at + static_cast<long long>(row) * pitch + chunk * 8;
        count = chunk * 8 < rows.head_dim ? rows.count - row : -(1 << 30);
        to = Tile<8, 64>::offset(row, chunk);
    }

    template <int TILE_ROWS>
    __device__ __forceinline__ void fill(const Tile<TILE_ROWS, 64>& tile, int first) const {
        static_assert(TILE_ROWS % ROWS == 0, "every thread copies as many chunks");
        const bf* source = from + static_cast<long long>(first) * pitch;
#pragma unroll
        for (int i = 0; i < TILE_ROWS / ROWS; i++) {
            copy_async_16(tile.base + tile.start + to + i * ROWS * 64, source, first + i * ROWS < count);
            source += ROWS * pitch;
        }
    }
};
