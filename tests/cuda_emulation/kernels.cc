// The CUDA side, compiled for the CPU; see cuda_runtime.h in this folder.
#include "kernels/cuda/batch_norm_kernels.cu"
#include "kernels/cuda/functions.cu"
#include "kernels/cuda/pinned_copy.cu"
#include "kernels/cuda/runtime.cu"

// The positions of a thread's accesses, to test planes that do not fit into memory.
extern "C" __attribute__((visibility("default"))) int EmulatedPlaneCursor(
    int64_t outer, int64_t channels, int64_t inner, int64_t chunk, int64_t split, int thread,
    int64_t channel, int count, int64_t* at) {
  blockDim = dim3(gluon_syncbn::kThreads);
  blockIdx = dim3(0, static_cast<unsigned>(split));
  threadIdx = dim3(static_cast<unsigned>(thread));
  gluon_syncbn::PlaneCursor cursor({{outer, channels, inner}, inner, chunk}, channel);
  int visited = 0;
  for (; visited < count && cursor.Left() > 0; ++visited, cursor.Next()) {
    at[visited] = cursor.Start() + cursor.Access();
  }
  return visited;
}
