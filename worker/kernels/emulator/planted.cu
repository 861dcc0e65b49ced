// Mistakes on purpose, each beside its sound twin: proof that the emulator finds what it is for.
//
// All take (float* out, const float* in), blocks of 64 threads, any grid, and turn each block's 64 numbers around
// through shared memory: out[i] = in[63 - i]. Compiled only with CAIRN_PLANTED.
#include "../common.cuh"

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

EXPORT(planted_missing_wait, PLANTED_THREADS)
EXPORT(planted_sound_wait, PLANTED_THREADS)
EXPORT(planted_missing_barrier, PLANTED_THREADS)
EXPORT(planted_sound_barrier, PLANTED_THREADS)
EXPORT(planted_divergent_barrier, PLANTED_THREADS)
