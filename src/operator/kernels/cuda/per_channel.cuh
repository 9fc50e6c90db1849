// What the files of CUDA kernels have in common besides reductions and elementwise arithmetic: a
// thread per channel, shapes, copies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/batch_norm_kernels.h"
#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {

__device__ inline int64_t ThisChannel() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

template <typename... Parameters, typename... Arguments>
void PerChannel(const Gpu& gpu, int64_t channels, void (*kernel)(Parameters...),
                const Arguments&... arguments) {
  Launch(gpu, kernel, dim3(static_cast<unsigned>(CeilDiv(channels, kThreads))), dim3(kThreads),
         arguments...);
}

inline Extent ToExtent(const FeatureShape& s) {
  return {static_cast<int64_t>(s.outer), static_cast<int64_t>(s.channels),
          static_cast<int64_t>(s.inner)};
}

// Does nothing if `to` is null or the array itself.
template <typename T>
void Copy(const Gpu& gpu, const Extent& extent, const void* from, void* to) {
  if (extent.size() == 0 || to == nullptr || to == from) return;
  Check(cudaMemcpyAsync(to, from, extent.size() * sizeof(T), cudaMemcpyDeviceToDevice,
                        ToStream(gpu)));
}

}  // namespace gluon_syncbn
