// The loops for AVX2, FMA and F16C.  CMakeLists.txt has the compiler options.
#define GLUON_SYNCBN_LOOPS kAvx2Loops
#include "kernels/cpu/loops.inc"
