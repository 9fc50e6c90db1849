// The four kernels in CUDA.  See batch_norm_kernels.h for what they compute.
//
// Each is one pass over the data, and a short one over the channels: sums come first to partial
// sums of blocks (kernels/cuda/reduction.cuh), which FinishMoments and FinishGradientSums add up in a fixed
// order; what is per element (kernels/cuda/elementwise.cuh) reads four numbers per channel from a table that
// was set before.  Memory is what takes the time, so every element is moved as often as it must, in
// accesses of 16 bytes; which thread takes which element is chosen so that in both layouts all
// threads of a warp read one line, whatever the number of channels.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/batch_norm_kernels.h"
#include "kernels/batch_norm_math.h"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/reduction.cuh"
#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {
namespace {

// Sums of x - pivot and of its square.  A thread's are about its first element: float32 then has
// nothing to cancel, however far from zero the data lie.  A channel's are about its first one.
template <typename T>
struct MomentsSums {
  using W = Wide<T>;
  static constexpr bool kTwoArrays = false;
  const T* x;
  int64_t inner;

  __device__ W Pivot(int64_t c) const { return ToWide(x[c * inner]); }

  struct About {
    W pivot;
  };
  __device__ About For(int64_t, W element) const { return {element}; }
  __device__ static void Add(const About& about, W x, W, W* sum, W* squares) {
    const W d = x - about.pivot;
    *sum += d;
    *squares += d * d;
  }
  __device__ void Finish(int64_t c, const About& about, double count, double* sum,
                         double* squares) const {
    ShiftedSums sums;
    sums.Add(double(about.pivot) - double(Pivot(c)), count, *sum, *squares);
    *sum = sums.sum;
    *squares = sums.squares;
  }
};

// Sums of dy and dy * (x - mean).
template <typename T>
struct GradientSums {
  using W = Wide<T>;
  static constexpr bool kTwoArrays = true;
  StatisticsInUse<W> statistics;

  struct About {
    W high, low;  // the mean as two numbers, so that x - mean stays exact
  };
  __device__ About For(int64_t c, W) const {
    const double mean = statistics.Mean(c);
    const W high = static_cast<W>(mean);
    return {high, static_cast<W>(mean - high)};
  }
  __device__ static void Add(const About& mean, W dy, W x, W* sum, W* product) {
    *sum += dy;
    *product += dy * ((x - mean.high) - mean.low);
  }
  __device__ void Finish(int64_t, const About&, double, double*, double*) const {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    FinishMoments(PartialSums partial, MomentsSums<T> moments, double count, double* statistics) {
  const int64_t c = partial.Channel();
  const ChannelSums sums = partial.Total(c);
  if (!sums.mine) return;
  const double pivot = count > 0 ? double(moments.Pivot(c)) : 0.0;
  const Moments total = ShiftedSums{sums.first, sums.second}.About(pivot, count);
  statistics[c] = total.mean;
  statistics[partial.channels + c] = total.m2;
  if (c == 0) statistics[2 * partial.channels] = count;
}

template <typename W>
__global__ void __launch_bounds__(kThreads)
    FinishGradientSums(PartialSums partial, NormalizeBackward k, StatisticsInUse<W> statistics) {
  const int64_t c = partial.Channel();
  const ChannelSums sums = partial.Total(c);
  if (sums.mine) FinishGradients(k, statistics, c, sums.first, sums.second);
}

__device__ inline int64_t ThisChannel() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) SetNotMeasured(int64_t channels, double* statistics) {
  const int64_t c = ThisChannel();
  if (c >= channels) return;
  statistics[c] = statistics[channels + c] = 0.0;
  if (c == 0) statistics[2 * channels] = kNotMeasured;
}

// Nobody else reads the moving statistics meanwhile.
template <typename W>
__global__ void __launch_bounds__(kThreads)
    SetNormalize(NormalizeForward k, StatisticsInUse<W> statistics, TableEntry<W>* table) {
  const int64_t c = ThisChannel();
  if (c >= static_cast<int64_t>(statistics.channels)) return;
  table[c] = NormalizeEntry(k, statistics, c);
  MoveStatistics(k, statistics, c);
}

// One thread, in a launch of its own: the blocks of SetNormalize have all read the number then.
template <typename W>
__global__ void __launch_bounds__(kThreads)
    CountMeasuredBatch(NormalizeForward k, StatisticsInUse<W> statistics) {
  if (statistics.Count() > 0) CountBatch<W>(k);
}

template <typename W>
__global__ void __launch_bounds__(kThreads)
    SetScale(NormalizeBackward k, StatisticsInUse<W> statistics, TableEntry<W>* table) {
  const int64_t c = ThisChannel();
  if (c < static_cast<int64_t>(statistics.channels)) table[c] = ScaleEntry(k, statistics, c);
}

template <typename W>
__global__ void __launch_bounds__(kThreads) SetCombine(MomentsBackward k, TableEntry<W>* table) {
  const int64_t c = ThisChannel();
  if (c < static_cast<int64_t>(k.shape.channels)) table[c] = CombineEntry<W>(k, c);
}

template <typename... Parameters, typename... Arguments>
void PerChannel(const Gpu& gpu, int64_t channels, void (*kernel)(Parameters...),
                const Arguments&... arguments) {
  Launch(gpu, kernel, dim3(static_cast<unsigned>(Ceil(channels, kThreads))), dim3(kThreads),
         arguments...);
}

Extent ToExtent(const FeatureShape& s) {
  return {static_cast<int64_t>(s.outer), static_cast<int64_t>(s.channels),
          static_cast<int64_t>(s.inner)};
}

template <typename T>
void RunTyped(const Gpu& gpu, const MomentsForward& k) {
  const Extent extent = ToExtent(k.shape);
  if (extent.size() > 0 && k.copy != nullptr && k.copy != k.x) {
    Check(cudaMemcpyAsync(k.copy, k.x, extent.size() * sizeof(T), cudaMemcpyDeviceToDevice,
                          ToStream(gpu)));
  }
  if (!k.measure) {
    PerChannel(gpu, extent.channels, SetNotMeasured, extent.channels, k.statistics);
    return;
  }
  const T* x = static_cast<const T*>(k.x);
  const MomentsSums<T> moments{x, extent.inner};
  const PartialSums partial = Reduce(gpu, extent, x, static_cast<const T*>(nullptr), moments);
  Launch(gpu, FinishMoments<T>, partial.Grid(), partial.Block(), partial, moments,
         static_cast<double>(k.shape.count()), k.statistics);
}

template <typename T>
void RunTyped(const Gpu& gpu, const NormalizeForward& k) {
  using W = Wide<T>;
  const Extent extent = ToExtent(k.shape);
  const auto statistics = InUse<W>(k);
  TableEntry<W>* table = Scratch<TableEntry<W>>(gpu, Use::kTable, extent.channels);
  PerChannel(gpu, extent.channels, SetNormalize<W>, k, statistics, table);
  if (k.batches != nullptr) Launch(gpu, CountMeasuredBatch<W>, dim3(1), dim3(1), k, statistics);
  if (k.y_request == Request::kNull) return;
  Elementwise(gpu, extent, table, static_cast<const T*>(k.x), static_cast<const T*>(nullptr),
              static_cast<T*>(k.y), k.y_request == Request::kAdd);
}

template <typename T>
void RunTyped(const Gpu& gpu, const NormalizeBackward& k) {
  using W = Wide<T>;
  const Extent extent = ToExtent(k.shape);
  const auto statistics = InUse<W>(k);
  const T* dy = static_cast<const T*>(k.dy);
  T* dx = static_cast<T*>(k.dx);
  const PartialSums partial =
      Reduce(gpu, extent, dy, static_cast<const T*>(k.x), GradientSums<T>{statistics});
  Launch(gpu, FinishGradientSums<W>, partial.Grid(), partial.Block(), partial, k, statistics);
  if (k.dx_request == Request::kNull) return;
  if (k.statistics == nullptr) {
    TableEntry<W>* table = Scratch<TableEntry<W>>(gpu, Use::kTable, extent.channels);
    PerChannel(gpu, extent.channels, SetScale<W>, k, statistics, table);
    Elementwise(gpu, extent, table, dy, static_cast<const T*>(nullptr), dx,
                k.dx_request == Request::kAdd);
  } else if (dx != dy && extent.size() > 0) {
    Check(cudaMemcpyAsync(dx, dy, extent.size() * sizeof(T), cudaMemcpyDeviceToDevice,
                          ToStream(gpu)));
  }
}

template <typename T>
void RunTyped(const Gpu& gpu, const MomentsBackward& k) {
  using W = Wide<T>;
  if (k.dx_request == Request::kNull) return;
  const Extent extent = ToExtent(k.shape);
  TableEntry<W>* table = Scratch<TableEntry<W>>(gpu, Use::kTable, extent.channels);
  PerChannel(gpu, extent.channels, SetCombine<W>, k, table);
  Elementwise(gpu, extent, table, static_cast<const T*>(k.x), static_cast<const T*>(k.dy),
              static_cast<T*>(k.dx), k.dx_request == Request::kAdd);
}

template <typename Kernel>
void Dispatch(const Gpu& gpu, const Kernel& kernel) {
  Check(cudaSetDevice(gpu.device));
  if (kernel.shape.channels == 0) return;
  switch (kernel.type) {
    case DataType::kFloat16:
      return RunTyped<__half>(gpu, kernel);
    case DataType::kFloat32:
      return RunTyped<float>(gpu, kernel);
    case DataType::kFloat64:
      return RunTyped<double>(gpu, kernel);
  }
}

}  // namespace

void Run(const Gpu& gpu, const MomentsForward& kernel) { Dispatch(gpu, kernel); }
void Run(const Gpu& gpu, const NormalizeForward& kernel) { Dispatch(gpu, kernel); }
void Run(const Gpu& gpu, const NormalizeBackward& kernel) { Dispatch(gpu, kernel); }
void Run(const Gpu& gpu, const MomentsBackward& kernel) { Dispatch(gpu, kernel); }

void RunAlone(const Gpu& gpu, const NormalizeForward& kernel, double* statistics) {
  NormalizeForward k = kernel;
  k.statistics = statistics;
  if (statistics != nullptr) {
    Run(gpu, MomentsForward{k.type, k.shape, k.x, nullptr, true, statistics});
  }
  Run(gpu, k);
}

void RunAlone(const Gpu& gpu, const NormalizeBackward& kernel) {
  if (kernel.statistics == nullptr) return Run(gpu, kernel);
  Check(cudaSetDevice(gpu.device));
  const std::size_t channels = kernel.shape.channels;
  NormalizeBackward k = kernel;
  k.dx_request = Request::kNull;
  k.statistics_grad = Scratch<double>(gpu, Use::kSums, StatisticsSize(channels));
  k.coefficients_grad = Scratch<double>(gpu, Use::kCoefficients, CoefficientsSize(channels));
  Run(gpu, k);
  Run(gpu, MomentsBackward{k.type, k.shape, k.dy, k.x, k.statistics_grad, k.coefficients_grad,
                           kernel.dx_request, k.dx});
}

}  // namespace gluon_syncbn
