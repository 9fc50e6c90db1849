// The device that an operator runs on, from MXNet's terms to ours.
#pragma once

#include <mxnet/operator.h>

#include "adapter/cuda_library.h"
#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

inline bool OnGpu(const mxnet::Context& context) {
  return context.dev_mask() == mxnet::gpu::kDevMask;
}

// Throws, when the operator is created, where this build or this machine has no GPU side.
inline void RequireDevice(const mxnet::Context& context) {
  if (OnGpu(context)) RequireCudaLibrary();
}

// The stream on which MXNet runs a call.  (mshadow::Stream<gpu> is empty in a build without CUDA,
// as ours is; in MXNet's own it starts with its cudaStream_t.)
inline Gpu ToGpu(const mxnet::RunContext& run) {
  return {run.ctx.dev_id, *static_cast<void**>(run.stream)};
}

// Calls `kernels` with the device of this call.
template <typename Kernels>
void OnDevice(const mxnet::OpContext& ctx, const Kernels& kernels) {
  if (OnGpu(ctx.run_ctx.ctx)) {
    kernels(ToGpu(ctx.run_ctx));
  } else {
    kernels(Cpu());
  }
}

}  // namespace gluon_syncbn
