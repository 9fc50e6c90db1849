// A file of its own, as for nvcc: both files of kernels have a Dispatch, for example.
#include "kernels/cuda/moving_average_kernels.cu"
