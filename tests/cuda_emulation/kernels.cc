// The CUDA side, compiled for the CPU; see cuda_runtime.h beside this file.
#include "../../src/operator/batch_norm_kernels_gpu.cu"
#include "../../src/operator/cuda_functions.cu"
#include "../../src/operator/gpu_runtime.cu"
#include "../../src/operator/gpu_values.cu"
