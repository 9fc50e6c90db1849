// The loops for AVX-512 F, BW, DQ and VL.  CMakeLists.txt has the compiler options.
#define GLUON_SYNCBN_LOOPS kAvx512Loops
#include "kernels/cpu/loops.inc"
