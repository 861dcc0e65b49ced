// Mistakes on purpose, each beside its sound twin: proof that the emulator finds what it is for.
//
// Most take (float* out, const float* in), blocks of 64 threads, any grid, and turn each block's 64 numbers around
// through shared memory: out[i] = in[63 - i]. Those with a product take (float* out), one block of 128 threads, 16 KiB
// of dynamic shared memory, and write 64 from each thread. Compiled only with CAIRN_PLANTED.
#include "../group.cuh"

constexpr int PLANTED_THREADS = 64;

enum class Plant { nothing, no_wait, no_barrier, divergent_barrier };

template <Plant PLANT>
__device__ __forceinline__ void turn_by_copy(float* out, const float* in) {
    SHARED_ARRAY(float, tile, PLANTED_THREADS);
    int i = threadIdx.x, first = blockIdx.x * PLANTED_THREADS;
    copy_async_4(tile + i, in + first + i, true);
    copy_commit();
    if (PLANT != Plant::no_wait) copy_wait<0>();
    __syncthreads();
    out[first + i] = tile[PLANTED_THREADS - 1 - i];
}

template <Plant PLANT>
__device__ __forceinline__ void turn_by_store(float* out, const float* in) {
    SHARED_ARRAY(float, tile, PLANTED_THREADS);
    int i = threadIdx.x, first = blockIdx.x * PLANTED_THREADS;
    tile[i] = in[first + i];
    if (PLANT == Plant::nothing || (PLANT == Plant::divergent_barrier && i < LANES)) __syncthreads();
    out[first + i] = tile[PLANTED_THREADS - 1 - i];
}

template <Plant PLANT>
__device__ __forceinline__ void multiply_ones(float* out) {
    ALIGNED_SHARED(bf, shared);
    Rows64 left = {shared, 0}, right = {shared, Rows64::NUMBERS};
    for (int i = threadIdx.x; i < 2 * Rows64::NUMBERS; i += GROUP_THREADS) shared[i] = {0x3f80};
    group_publish();
    if (PLANT != Plant::no_barrier) __syncthreads();
    Sums<1, 8> sums;
    group_fence();
    group_scores(sums, left, right);
    group_commit();
    if (PLANT != Plant::no_wait) group_wait<0>();
    hold(sums.value[0]);
    out[threadIdx.x] = sums.value[0][7][3];
}

extern "C" __global__ void planted_missing_wait(float* out, const float* in) { turn_by_copy<Plant::no_wait>(out, in); }
extern "C" __global__ void planted_sound_wait(float* out, const float* in) { turn_by_copy<Plant::nothing>(out, in); }
extern "C" __global__ void planted_missing_barrier(float* out, const float* in) {
    turn_by_store<Plant::no_barrier>(out, in);
}
extern "C" __global__ void planted_sound_barrier(float* out, const float* in) {
    turn_by_store<Plant::nothing>(out, in);
}
extern "C" __global__ void planted_divergent_barrier(float* out, const float* in) {
    turn_by_store<Plant::divergent_barrier>(out, in);
}
extern "C" __global__ void planted_sound_product(float* out) { multiply_ones<Plant::nothing>(out); }
extern "C" __global__ void planted_product_without_wait(float* out) { multiply_ones<Plant::no_wait>(out); }
extern "C" __global__ void planted_product_without_barrier(float* out) { multiply_ones<Plant::no_barrier>(out); }

EXPORT(planted_missing_wait, PLANTED_THREADS)
EXPORT(planted_sound_wait, PLANTED_THREADS)
EXPORT(planted_missing_barrier, PLANTED_THREADS)
EXPORT(planted_sound_barrier, PLANTED_THREADS)
EXPORT(planted_divergent_barrier, PLANTED_THREADS)
EXPORT(planted_sound_product, GROUP_THREADS)
EXPORT(planted_product_without_wait, GROUP_THREADS)
EXPORT(planted_product_without_barrier, GROUP_THREADS)
