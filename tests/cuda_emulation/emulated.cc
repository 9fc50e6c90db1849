// The CUDA side, compiled for the CPU; see cuda_runtime.h beside this file.
#include "../../src/operator/batch_norm_kernels_gpu.cu"
#include "../../src/operator/cuda_functions.cu"
#include "../../src/operator/gpu_runtime.cu"
#include "../../src/operator/gpu_values.cu"

extern "C" __attribute__((visibility("default"))) void Emulate(int multiprocessors, int backwards) {
  emulation::multiprocessors = multiprocessors;
  emulation::backwards = backwards != 0;
}
extern "C" __attribute__((visibility("default"))) long EmulatedAllocations() {
  return emulation::allocations;
}
extern "C" __attribute__((visibility("default"))) void EmulateFailure(int failed) {
  emulation::stream_status = failed != 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}
