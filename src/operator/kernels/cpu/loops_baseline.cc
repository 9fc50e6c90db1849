// The loops for any CPU of the architecture.  CMakeLists.txt has the compiler options.
#define GLUON_SYNCBN_LOOPS kBaselineLoops
#include "kernels/cpu/loops.inc"
