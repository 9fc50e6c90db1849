// The kernels of moving average batch normalization in CUDA.  moving_average_kernels.h says what
// they compute; the passes over elements are those of batch_norm_kernels.cu.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/per_channel.cuh"
#include "kernels/cuda/reduction.cuh"
#include "kernels/cuda/runtime.cuh"
#include "kernels/element_type.h"
#include "kernels/moving_average_kernels.h"
#include "kernels/moving_average_math.h"

namespace gluon_syncbn {
namespace {

// Sums of dy and dy * x.
template <typename T>
struct UncenteredSums {
  using Acc = AccType<T>;
  static constexpr bool kTwoArrays = true;

  struct Pivot {};
  __device__ Pivot ThreadPivot(int64_t, Acc) const { return {}; }
  __device__ static void Add(const Pivot&, Acc dy, Acc x, Acc* sum, Acc* product) {
    *sum += dy;
    *product += dy * x;
  }
  __device__ void Finish(int64_t, const Pivot&, double, double*, double*) const {}
};

// Each thread reads and updates the states of its own channel only.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    SetMovingAverage(MovingAverageForwardParams p, ChannelEntry<Acc>* table) {
  const int64_t c = ThisChannel();
  if (c < static_cast<int64_t>(p.shape.channels)) table[c] = NormalizeEntry<Acc>(p, c);
}

// One thread, launched after SetMovingAverage, whose blocks have all read the number by then.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) CountThisIteration(MovingAverageForwardParams p) {
  CountIteration<Acc>(p);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    FinishSums(PartialSums partial, MovingAverageSumsParams p) {
  const int64_t c = partial.Channel();
  const ChannelSums sums = partial.Total(c);
  if (sums.is_owner) FinishGradients<Acc>(p, c, sums.first, sums.second);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    SetMovingAverageCombine(MovingAverageBackwardParams p, ChannelEntry<Acc>* table) {
  const int64_t c = ThisChannel();
  if (c < static_cast<int64_t>(p.shape.channels)) table[c] = CombineEntry<Acc>(p, c);
}

template <typename T>
void RunTyped(const Gpu& gpu, const MovingAverageForwardParams& p) {
  using Acc = AccType<T>;
  const Extent extent = ToExtent(p.shape);
  ChannelEntry<Acc>* table = Scratch<ChannelEntry<Acc>>(gpu, Use::kTable, extent.channels);
  PerChannel(gpu, extent.channels, SetMovingAverage<Acc>, p, table);
  Launch(gpu, CountThisIteration<Acc>, dim3(1), dim3(1), p);
  if (p.y_mode == WriteMode::kSkip) return;
  Elementwise(gpu, extent, table, static_cast<const T*>(p.x), static_cast<const T*>(nullptr),
              static_cast<T*>(p.y), p.y_mode == WriteMode::kAdd);
}

template <typename T>
void RunTyped(const Gpu& gpu, const MovingAverageSumsParams& p) {
  const Extent extent = ToExtent(p.shape);
  const PartialSums partial = Reduce(gpu, extent, static_cast<const T*>(p.dy),
                                     static_cast<const T*>(p.x), UncenteredSums<T>{});
  Launch(gpu, FinishSums<AccType<T>>, partial.Grid(), partial.Block(), partial, p);
  Copy<T>(gpu, extent, p.dy, p.dy_copy);
}

template <typename T>
void RunTyped(const Gpu& gpu, const MovingAverageBackwardParams& p) {
  using Acc = AccType<T>;
  const Extent extent = ToExtent(p.shape);
  ChannelEntry<Acc>* table = Scratch<ChannelEntry<Acc>>(gpu, Use::kTable, extent.channels);
  PerChannel(gpu, extent.channels, SetMovingAverageCombine<Acc>, p, table);
  if (p.dx_mode == WriteMode::kSkip) return;
  Elementwise(gpu, extent, table, static_cast<const T*>(p.x), static_cast<const T*>(p.dy),
              static_cast<T*>(p.dx), p.dx_mode == WriteMode::kAdd);
}

template <typename Params>
void Dispatch(const Gpu& gpu, const Params& params) {
  Check(cudaSetDevice(gpu.device));
  if (params.shape.channels == 0) return;
  WithType<__half>(params.type, [&](auto element) { RunTyped<decltype(element)>(gpu, params); });
}

}  // namespace

void Run(const Gpu& gpu, const MovingAverageForwardParams& params) { Dispatch(gpu, params); }
void Run(const Gpu& gpu, const MovingAverageSumsParams& params) { Dispatch(gpu, params); }
void Run(const Gpu& gpu, const MovingAverageBackwardParams& params) { Dispatch(gpu, params); }

}  // namespace gluon_syncbn
