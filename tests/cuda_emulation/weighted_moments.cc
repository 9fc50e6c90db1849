// A file of its own, as for nvcc: all files of kernels have a Dispatch, for example.
#include "kernels/cuda/weighted_moments.cu"
