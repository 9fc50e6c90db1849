// Translates the device that MXNet runs an operator on into the device of our kernels.
#pragma once

#include <mxnet/operator.h>

#include "adapter/cuda_library.h"
#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

inline bool OnGpu(const mxnet::Context& context) {
  return context.dev_mask() == mxnet::gpu::kDevMask;
}

// Throws if the operator is for a GPU and there is no CUDA side.  Call it when it is created.
inline void RequireDevice(const mxnet::Context& context) {
  if (OnGpu(context)) RequireCudaLibrary();
}

// The stream on which MXNet runs a call.  (In a build without CUDA, such as ours,
// mshadow::Stream<gpu> is an empty class; in MXNet's own build its first member is the
// cudaStream_t.)
inline Gpu ToGpu(const mxnet::RunContext& run) {
  return {run.ctx.dev_id, *static_cast<void**>(run.stream)};
}

// Calls kernels(device) with the device of this call, a Cpu or a Gpu.
template <typename Kernels>
void OnDevice(const mxnet::OpContext& ctx, const Kernels& kernels) {
  if (OnGpu(ctx.run_ctx.ctx)) {
    kernels(ToGpu(ctx.run_ctx));
  } else {
    kernels(Cpu());
  }
}

}  // namespace gluon_syncbn
