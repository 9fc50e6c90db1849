// The kernels in CUDA.  batch_norm_kernels.h says what they compute.
//
// Each takes one pass over the data and a short one over the channels.  Sums: every block stores
// partial sums (reduction.cuh), which FinishMoments and FinishGradientSums add up in a fixed order.
// Elements: a table with four numbers per channel is set first, which elementwise.cuh reads.
// Memory bandwidth is the limit, so elements are read and written as seldom as possible, 16 bytes
// at a time, by threads chosen such that a warp reads consecutive memory in both layouts, whatever
// the number of channels.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/batch_norm_kernels.h"
#include "kernels/batch_norm_math.h"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/per_channel.cuh"
#include "kernels/cuda/reduction.cuh"
#include "kernels/cuda/runtime.cuh"
#include "kernels/element_type.h"

namespace gluon_syncbn {
namespace {

// Sums of x - pivot and of its square.  A thread's pivot is its first element, so that float32
// loses no digits however far from zero the data are.  A channel's pivot, to which Finish converts
// the thread's sums, is the channel's first element.
template <typename T>
struct MomentsSums {
  using Acc = AccType<T>;
  static constexpr bool kTwoArrays = false;
  const T* x;
  int64_t inner;

  __device__ Acc ChannelPivot(int64_t c) const { return OrZero(ToAcc(x[c * inner])); }

  struct Pivot {
    Acc value;
  };
  __device__ Pivot ThreadPivot(int64_t, Acc element) const { return {OrZero(element)}; }
  __device__ static void Add(const Pivot& pivot, Acc x, Acc, Acc* sum, Acc* squares) {
    const Acc d = x - pivot.value;
    *sum += d;
    *squares += d * d;
  }
  __device__ void Finish(int64_t c, const Pivot& pivot, double count, double* sum,
                         double* squares) const {
    ShiftedSums sums;
    sums.Add(double(pivot.value) - double(ChannelPivot(c)), count, *sum, *squares);
    *sum = sums.sum;
    *squares = sums.squares;
  }
};

// Sums of g and g * (x - mean).
template <typename T>
struct GradientSums {
  using Acc = AccType<T>;
  static constexpr bool kTwoArrays = true;
  StatisticsInUse<Acc> statistics;

  struct Pivot {
    Acc high, low;  // the sum of both is the mean, so that x - mean stays exact
  };
  __device__ Pivot ThreadPivot(int64_t c, Acc) const {
    const double mean = statistics.Mean(c);
    const Acc high = static_cast<Acc>(mean);
    return {high, static_cast<Acc>(OrZero(mean - high))};
  }
  __device__ static void Add(const Pivot& mean, Acc g, Acc x, Acc* sum, Acc* product) {
    *sum += g;
    *product += g * ((x - mean.high) - mean.low);
  }
  __device__ void Finish(int64_t, const Pivot&, double, double*, double*) const {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    FinishMoments(PartialSums partial, MomentsSums<T> moments, double count, double* statistics) {
  const int64_t c = partial.Channel();
  const ChannelSums sums = partial.Total(c);
  if (!sums.is_owner) return;
  const double pivot = count > 0 ? double(moments.ChannelPivot(c)) : 0.0;
  const Moments total = ShiftedSums{sums.first, sums.second}.ToMoments(pivot, count);
  statistics[c] = total.mean;
  statistics[partial.channels + c] = total.m2;
  if (c == 0) statistics[2 * partial.channels] = count;
}

template <typename Acc, typename BackwardParams>
__global__ void __launch_bounds__(kThreads)
    FinishGradientSums(PartialSums partial, BackwardParams p, StatisticsInUse<Acc> statistics) {
  const int64_t c = partial.Channel();
  const ChannelSums sums = partial.Total(c);
  if (sums.is_owner) FinishGradients(p, statistics, c, sums.first, sums.second);
}

__global__ void __launch_bounds__(kThreads) SetNoStatistics(int64_t channels, double* statistics) {
  const int64_t c = ThisChannel();
  if (c >= channels) return;
  statistics[c] = statistics[channels + c] = 0.0;
  if (c == 0) statistics[2 * channels] = kNoStatistics;
}

// Each thread reads and updates the moving statistics of its own channel only.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    SetNormalize(NormalizeForwardParams p, StatisticsInUse<Acc> statistics,
                 ChannelEntry<Acc>* table) {
  const int64_t c = ThisChannel();
  if (c >= static_cast<int64_t>(statistics.channels)) return;
  table[c] = NormalizeEntry(p, p.beta, statistics, c);
  if (p.residual != nullptr) table[c].factor = 1;
  UpdateMovingStatistics(p, statistics, c);
}

// One thread, launched after SetNormalize, whose blocks have all read the number by then.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    CountThisBatch(NormalizeForwardParams p, StatisticsInUse<Acc> statistics) {
  if (statistics.AreOfBatch()) CountBatch<Acc>(p);
}

template <typename Acc, typename BackwardParams>
__global__ void __launch_bounds__(kThreads)
    SetGate(BackwardParams p, StatisticsInUse<Acc> statistics, ChannelEntry<Acc>* table) {
  const int64_t c = ThisChannel();
  if (c < static_cast<int64_t>(statistics.channels)) table[c] = GateEntry(p, statistics, c);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    SetScale(LocalBackwardParams p, StatisticsInUse<Acc> statistics, ChannelEntry<Acc>* table) {
  const int64_t c = ThisChannel();
  if (c < static_cast<int64_t>(statistics.channels)) table[c] = ScaleEntry(p, statistics, c);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    SetCombine(MomentsBackwardParams p, ChannelEntry<Acc>* table) {
  const int64_t c = ThisChannel();
  if (c < static_cast<int64_t>(p.shape.channels)) table[c] = CombineEntry<Acc>(p, c);
}

template <typename T>
void RunTyped(const Gpu& gpu, const MomentsForwardParams& p) {
  const Extent extent = ToExtent(p.shape);
  Copy<T>(gpu, extent, p.x, p.copy);
  if (!p.compute_statistics) {
    PerChannel(gpu, extent.channels, SetNoStatistics, extent.channels, p.statistics);
    return;
  }
  const T* x = static_cast<const T*>(p.x);
  const MomentsSums<T> moments{x, extent.inner};
  const PartialSums partial = Reduce(gpu, extent, x, static_cast<const T*>(nullptr), moments);
  Launch(gpu, FinishMoments<T>, partial.Grid(), partial.Block(), partial, moments,
         static_cast<double>(p.shape.count()), p.statistics);
}

template <typename T>
void RunTyped(const Gpu& gpu, const NormalizeForwardParams& p) {
  using Acc = AccType<T>;
  const Extent extent = ToExtent(p.shape);
  const auto statistics = InUse<Acc>(p);
  ChannelEntry<Acc>* table = Scratch<ChannelEntry<Acc>>(gpu, Use::kTable, extent.channels);
  PerChannel(gpu, extent.channels, SetNormalize<Acc>, p, statistics, table);
  if (p.batches != nullptr) Launch(gpu, CountThisBatch<Acc>, dim3(1), dim3(1), p, statistics);
  if (p.y_mode == WriteMode::kSkip) return;
  Elementwise(gpu, extent, table, static_cast<const T*>(p.x), static_cast<const T*>(p.residual),
              static_cast<T*>(p.y), p.y_mode == WriteMode::kAdd,
              p.activation.present ? Epilogue::kActivate : Epilogue::kNone, p.activation.slope);
}

// Where g is while it is needed: in `to` if it is not null, in the residual's gradient, or in
// scratch memory.  Without an activation it is dy, which the caller has.
template <typename T, typename BackwardParams>
void* PlaceOfGradient(const Gpu& gpu, const BackwardParams& p, const Extent& extent, void* to) {
  if (to != nullptr || !p.epilogue.activation.present) return to;
  if (p.epilogue.residual_grad_mode == WriteMode::kWrite) return p.epilogue.residual_grad;
  return Scratch<T>(gpu, Use::kGradient, extent.size());
}

// Computes g and the residual's gradient; returns g, which is also stored in `to` if that is not
// null.
template <typename T, typename BackwardParams>
const T* ComputeGradient(const Gpu& gpu, const BackwardParams& p, const Extent& extent,
                         const StatisticsInUse<AccType<T>>& statistics, void* to) {
  using Acc = AccType<T>;
  const auto& epilogue = p.epilogue;
  const bool residual_added = epilogue.residual_grad_mode == WriteMode::kAdd;
  ChannelEntry<Acc>* table = nullptr;
  if (epilogue.activation.present || residual_added) {
    table = Scratch<ChannelEntry<Acc>>(gpu, Use::kTable, extent.channels);
    PerChannel(gpu, extent.channels, SetGate<Acc, BackwardParams>, p, statistics, table);
  }
  const T* dy = static_cast<const T*>(p.dy);
  const T* g = dy;
  if (epilogue.activation.present) {
    T* place = static_cast<T*>(PlaceOfGradient<T>(gpu, p, extent, to));
    const void* sign = epilogue.y != nullptr ? epilogue.y : p.x;
    Elementwise(gpu, extent, table, static_cast<const T*>(sign), dy, place, false, Epilogue::kGate,
                epilogue.activation.slope);
    g = place;
  } else {
    Copy<T>(gpu, extent, dy, to);
  }
  T* residual = static_cast<T*>(epilogue.residual_grad);
  if (epilogue.residual_grad_mode == WriteMode::kWrite) Copy<T>(gpu, extent, g, residual);
  if (residual_added) {  // with a residual, the gate's table is the identity
    Elementwise(gpu, extent, table, g, static_cast<const T*>(nullptr), residual, true);
  }
  return g;
}

// The sums of g and g * (x - mean) over this device's elements, and what FinishGradients makes of
// them.
template <typename T, typename BackwardParams>
void SumGradients(const Gpu& gpu, const BackwardParams& p, const Extent& extent,
                  const StatisticsInUse<AccType<T>>& statistics, const T* g) {
  const PartialSums partial =
      Reduce(gpu, extent, g, static_cast<const T*>(p.x), GradientSums<T>{statistics});
  Launch(gpu, FinishGradientSums<AccType<T>, BackwardParams>, partial.Grid(), partial.Block(),
         partial, p, statistics);
}

template <typename T>
void RunTyped(const Gpu& gpu, const NormalizeBackwardParams& p) {
  const Extent extent = ToExtent(p.shape);
  const auto statistics = InUse<AccType<T>>(p);
  SumGradients<T>(gpu, p, extent, statistics, ComputeGradient<T>(gpu, p, extent, statistics, p.g));
}

// For the moving statistics alone; RunLocal has the other case.
template <typename T>
void RunTyped(const Gpu& gpu, const LocalBackwardParams& p) {
  using Acc = AccType<T>;
  const Extent extent = ToExtent(p.shape);
  const auto statistics = InUse<Acc>(p);
  const bool through_dx = p.epilogue.activation.present && p.dx_mode == WriteMode::kWrite;
  const T* g = ComputeGradient<T>(gpu, p, extent, statistics, through_dx ? p.dx : nullptr);
  SumGradients<T>(gpu, p, extent, statistics, g);
  if (p.dx_mode == WriteMode::kSkip) return;
  ChannelEntry<Acc>* table = Scratch<ChannelEntry<Acc>>(gpu, Use::kTable, extent.channels);
  PerChannel(gpu, extent.channels, SetScale<Acc>, p, statistics, table);
  Elementwise(gpu, extent, table, g, static_cast<const T*>(nullptr), static_cast<T*>(p.dx),
              p.dx_mode == WriteMode::kAdd);
}

template <typename T>
void RunTyped(const Gpu& gpu, const MomentsBackwardParams& p) {
  using Acc = AccType<T>;
  if (p.dx_mode == WriteMode::kSkip) return;
  const Extent extent = ToExtent(p.shape);
  ChannelEntry<Acc>* table = Scratch<ChannelEntry<Acc>>(gpu, Use::kTable, extent.channels);
  PerChannel(gpu, extent.channels, SetCombine<Acc>, p, table);
  Elementwise(gpu, extent, table, static_cast<const T*>(p.x), static_cast<const T*>(p.g),
              static_cast<T*>(p.dx), p.dx_mode == WriteMode::kAdd);
}

template <typename Params>
void Dispatch(const Gpu& gpu, const Params& params) {
  Check(cudaSetDevice(gpu.device));
  if (params.shape.channels == 0) return;
  WithType<__half>(params.type, [&](auto element) { RunTyped<decltype(element)>(gpu, params); });
}

}  // namespace

void Run(const Gpu& gpu, const MomentsForwardParams& params) { Dispatch(gpu, params); }
void Run(const Gpu& gpu, const NormalizeForwardParams& params) { Dispatch(gpu, params); }
void Run(const Gpu& gpu, const NormalizeBackwardParams& params) { Dispatch(gpu, params); }
void Run(const Gpu& gpu, const MomentsBackwardParams& params) { Dispatch(gpu, params); }

void RunLocal(const Gpu& gpu, const NormalizeForwardParams& params, double* statistics) {
  NormalizeForwardParams p = params;
  p.statistics = statistics;
  if (statistics != nullptr) {
    Run(gpu, MomentsForwardParams{p.type, p.shape, p.x, nullptr, true, statistics});
  }
  Run(gpu, p);
}

namespace {

void* PlaceOfGradient(const Gpu& gpu, const LocalBackwardParams& p) {
  if (!p.epilogue.activation.present || p.dx_mode == WriteMode::kSkip) return nullptr;
  void* const to = p.dx_mode == WriteMode::kWrite ? p.dx : nullptr;
  const Extent extent = ToExtent(p.shape);
  void* place = nullptr;
  WithType<__half>(p.type, [&](auto element) {
    place = PlaceOfGradient<decltype(element)>(gpu, p, extent, to);
  });
  return place;
}

}  // namespace

void RunLocal(const Gpu& gpu, const LocalBackwardParams& p) {
  if (p.statistics == nullptr) return Dispatch(gpu, p);
  Check(cudaSetDevice(gpu.device));
  const std::size_t channels = p.shape.channels;
  double* sums = Scratch<double>(gpu, Use::kBackwardSums, BackwardSumsSize(channels));
  double* context = Scratch<double>(gpu, Use::kBackwardContext, BackwardContextSize(channels));
  void* g = PlaceOfGradient(gpu, p);
  Run(gpu, NormalizeBackwardParams{p.type, p.shape, p.epsilon, p.fix_gamma, p.dy, p.x, p.statistics,
                                   p.gamma, p.moving_mean, p.moving_var, g, sums, context,
                                   p.gamma_grad_mode, p.gamma_grad, p.beta_grad_mode, p.beta_grad,
                                   p.epilogue, p.correction});
  Run(gpu, MomentsBackwardParams{p.type, p.shape, g == nullptr ? p.dy : g, p.x, sums, context,
                                 p.dx_mode, p.dx});
}

}  // namespace gluon_syncbn
