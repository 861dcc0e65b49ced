// All kernels and the emulator as one shared library for the CPU:
//
//     c++ -std=c++17 -O2 -shared -fPIC -pthread -DCAIRN_EMULATOR [-DCAIRN_PLANTED] library.cpp -o libcairn_kernels.so
//
// On machines whose compiler fuses multiplications and additions unasked (not x86-64), add -ffp-contract=off: AdamW
// promises the bits of separate roundings.
#include "launch.cpp"
#include "machine.cpp"

#include "../activation.cu"
#define HEAD_DIM 32
#include "../attention.cu"
#undef HEAD_DIM
#define HEAD_DIM 64
#include "../attention.cu"
#undef HEAD_DIM
#define HEAD_DIM 128
#include "../attention.cu"
#undef HEAD_DIM
#include "../attention_dot.cu"
#include "../attention_group.cu"
#include "../cast.cu"
#include "../columns.cu"
#include "../embedding.cu"
#include "../exact.cu"
#include "../loss.cu"
#include "../norm.cu"
#include "../optimizer.cu"
#include "../rope.cu"
#ifdef CAIRN_PLANTED
#include "planted.cu"
#endif
