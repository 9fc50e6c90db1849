// Weighted moments on a GPU: a block for each channel, whose threads' sums are merged in a fixed
// order.  Simple rather than fast: weights are rare.
#include <cuda_runtime.h>

#include "kernels/cuda/per_channel.cuh"
#include "kernels/cuda/runtime.cuh"
#include "kernels/element_type.h"
#include "kernels/weighted_moments.h"
#include "kernels/weighted_moments_math.h"

namespace gluon_syncbn {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    WeightedMomentsKernel(MomentsForwardParams p, Weights<AccType<T>> weights) {
  const Extent extent{static_cast<int64_t>(p.shape.outer), static_cast<int64_t>(p.shape.channels),
                      static_cast<int64_t>(p.shape.inner)};
  const int64_t c = blockIdx.x, count = extent.outer * extent.inner;
  const T* x = static_cast<const T*>(p.x);
  WeightedSums mine;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t outer = i / extent.inner, inner = i % extent.inner;
    const int64_t at = (outer * extent.channels + c) * extent.inner + inner;
    mine.Add(weights.At(outer, inner), ToAcc(x[at]));
  }
  __shared__ double counts[kThreads], means[kThreads], m2s[kThreads];
  const int me = threadIdx.x;
  const Moments of_thread = mine.ToMoments();
  counts[me] = of_thread.count;
  means[me] = of_thread.mean;
  m2s[me] = of_thread.m2;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (me < half) {
      const Moments both = Merged({counts[me], means[me], m2s[me]},
                                  {counts[me + half], means[me + half], m2s[me + half]});
      counts[me] = both.count;
      means[me] = both.mean;
      m2s[me] = both.m2;
    }
    __syncthreads();
  }
  if (me != 0) return;
  p.statistics[c] = means[0];
  p.statistics[extent.channels + c] = m2s[0];
  if (c == 0) p.statistics[2 * extent.channels] = counts[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    WeightedDxKernel(MomentsBackwardParams p, Weights<AccType<T>> weights) {
  const int64_t channels = p.shape.channels, inner = p.shape.inner;
  const int64_t size = int64_t(p.shape.outer) * channels * inner;
  const T* g = static_cast<const T*>(p.g);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < size; at += step) {
    const int64_t c = at / inner % channels, outer = at / inner / channels;
    const double before = p.dx_mode == WriteMode::kAdd ? double(ToAcc(dx[at])) : 0.0;
    const double value =
        WeightedDx(p, c, weights.At(outer, at % inner), ToAcc(g[at]), ToAcc(x[at]), before);
    FromAcc(static_cast<AccType<T>>(value), dx + at);
  }
}

template <typename T>
void RunTyped(const Gpu& gpu, const MomentsForwardParams& p, const PositionWeights& given) {
  if (!p.compute_statistics) return Run(gpu, p);
  Copy<T>(gpu, ToExtent(p.shape), p.x, p.copy);
  Launch(gpu, WeightedMomentsKernel<T>, dim3(static_cast<unsigned>(p.shape.channels)),
         dim3(kThreads), p, ToWeights<AccType<T>>(given, p.shape));
}

template <typename T>
void RunTyped(const Gpu& gpu, const MomentsBackwardParams& p, const PositionWeights& given) {
  const int64_t size = ToExtent(p.shape).size();
  if (p.dx_mode == WriteMode::kSkip || size == 0) return;
  const int64_t most = ResidentBlocks(gpu, WeightedDxKernel<T>);
  const int64_t blocks = std::min(CeilDiv(size, kThreads), most);
  Launch(gpu, WeightedDxKernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), p,
         ToWeights<AccType<T>>(given, p.shape));
}

template <typename Params>
void Dispatch(const Gpu& gpu, const Params& params, const PositionWeights& weights) {
  Check(cudaSetDevice(gpu.device));
  if (params.shape.channels == 0) return;
  WithType<__half>(params.type,
                   [&](auto element) { RunTyped<decltype(element)>(gpu, params, weights); });
}

}  // namespace

void RunWeighted(const Gpu& gpu, const MomentsForwardParams& params,
                 const PositionWeights& weights) {
  Dispatch(gpu, params, weights);
}
void RunWeighted(const Gpu& gpu, const MomentsBackwardParams& params,
                 const PositionWeights& weights) {
  Dispatch(gpu, params, weights);
}

}  // namespace gluon_syncbn
