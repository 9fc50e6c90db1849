// The loops for what every CPU of the architecture has.  CMakeLists.txt has the compiler options.
#define GLUON_SYNCBN_LOOPS kBaselineLoops
#include "kernels/cpu/loops.inc"
