// The four kernels in CUDA.  See batch_norm_kernels.h for what they compute.
//
// Each is one pass over the data, and a short one over the channels: sums come first to partial
// sums of blocks (gpu_reduction.cuh), which FinishMoments and FinishSums add up in a fixed order;
// what is per element (gpu_elementwise.cuh) reads four numbers per channel from a table that was
// set before.  Memory is what takes the time, so every element is moved as often as it must, in
// accesses of 16 bytes; which thread takes which element is chosen so that in both layouts all
// threads of a warp read one line, whatever the number of channels.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "batch_norm_kernels.h"
#include "gpu_elementwise.cuh"
#include "gpu_reduction.cuh"
#include "gpu_runtime.cuh"
#include "moving_average.h"

namespace gluon_syncbn {
namespace {

// The statistics that a pass uses: over all devices, or the moving ones.
template <typename W>
struct StatisticsInUse {
  int64_t channels;
  const double* statistics;  // null, or with a count of 0: the moving statistics
  const W* moving_mean;
  const W* moving_var;

  __device__ double Count() const { return statistics == nullptr ? 0.0 : statistics[2 * channels]; }
  __device__ double Mean(int64_t c) const {
    const double count = Count();
    return count > 0 ? statistics[c] / count : static_cast<double>(moving_mean[c]);
  }
  __device__ double Variance(int64_t c) const {
    const double count = Count();
    if (!(count > 0)) return moving_var[c];
    const double mean = statistics[c] / count;
    // Rounding can leave a constant channel's variance a little below 0; NaN must stay NaN.
    const double var = statistics[channels + c] / count - mean * mean;
    return var < 0 ? 0.0 : var;
  }
};

template <typename W, typename Kernel>
StatisticsInUse<W> InUse(const Kernel& k) {
  return {static_cast<int64_t>(k.shape.channels), k.statistics,
          static_cast<const W*>(k.moving_mean), static_cast<const W*>(k.moving_var)};
}

// Sums of x and x^2, in the end in float64.  Within a run they are taken from a pivot, an element
// of the run itself: float32 then has nothing to cancel, however far from zero the data lie.
template <typename T>
struct MomentsSums {
  using W = Wide<T>;
  static constexpr bool kTwoArrays = false;

  struct Channel {};
  __device__ Channel For(int64_t) const { return {}; }

  struct Run {
    W pivot, sum = 0, squares = 0;
    __device__ explicit Run(W element = 0) : pivot(element) {}
    __device__ void Add(const Channel&, W x, W) {
      const W d = x - pivot;
      sum += d;
      squares += d * d;
    }
    // Sums of pivot + d and of (pivot + d)^2 over `count` elements.
    __device__ void AddTo(double count, double* first, double* second) const {
      const double p = pivot, s = sum;
      *first += count * p + s;
      *second += squares + p * (2 * s + count * p);
    }
  };
};

// Sums of dy and dy * (x - mean).
template <typename T>
struct GradientSums {
  using W = Wide<T>;
  static constexpr bool kTwoArrays = true;
  StatisticsInUse<W> statistics;

  struct Channel {
    W high, low;  // the mean as two numbers, so that x - mean stays exact
  };
  __device__ Channel For(int64_t c) const {
    const double mean = statistics.Mean(c);
    const W high = static_cast<W>(mean);
    return {high, static_cast<W>(mean - high)};
  }

  struct Run {
    W sum = 0, product = 0;
    __device__ explicit Run(W = 0) {}
    __device__ void Add(const Channel& mean, W dy, W x) {
      sum += dy;
      product += dy * ((x - mean.high) - mean.low);
    }
    __device__ void AddTo(double, double* first, double* second) const {
      *first += sum;
      *second += product;
    }
  };
};

template <typename W>
__device__ void Assign(Request request, W* to, double value) {
  if (request == Request::kWrite) *to = static_cast<W>(value);
  if (request == Request::kAdd) *to = static_cast<W>(*to + value);
}

__global__ void __launch_bounds__(kThreads)
    FinishMoments(PartialSums partial, double count, double* statistics) {
  const int64_t c = partial.Channel();
  const ChannelSums sums = partial.Total(c);
  if (!sums.mine) return;
  statistics[c] = sums.first;
  statistics[partial.channels + c] = sums.second;
  if (c == 0) statistics[2 * partial.channels] = count;
}

template <typename W>
__global__ void __launch_bounds__(kThreads)
    FinishGradients(PartialSums partial, NormalizeBackward k, StatisticsInUse<W> statistics) {
  const int64_t c = partial.Channel();
  const ChannelSums sums = partial.Total(c);
  if (!sums.mine) return;
  const double r = 1.0 / sqrt(statistics.Variance(c) + k.epsilon);
  const double a = k.fix_gamma ? r : r * static_cast<const W*>(k.gamma)[c];
  Assign(k.gamma_request, static_cast<W*>(k.gamma_grad) + c, k.fix_gamma ? 0.0 : sums.second * r);
  Assign(k.beta_request, static_cast<W*>(k.beta_grad) + c, sums.first);
  const double count = statistics.Count();
  const double per_element = count > 0 ? a / count : 0.0;
  if (k.statistics_grad != nullptr) {
    k.statistics_grad[c] = -per_element * sums.first;
    k.statistics_grad[partial.channels + c] = -per_element * r * r * sums.second;
    if (c == 0) k.statistics_grad[2 * partial.channels] = 0.0;
  }
  if (k.coefficients_grad != nullptr) {
    k.coefficients_grad[c] = a;
    k.coefficients_grad[partial.channels + c] = statistics.Mean(c);
  }
}

// y = (x - mean) * scale + shift; moves the moving statistics, which nobody else reads meanwhile.
template <typename W>
__global__ void __launch_bounds__(kThreads)
    SetNormalize(NormalizeForward k, StatisticsInUse<W> statistics, TableEntry<W>* table) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= statistics.channels) return;
  const double mean = statistics.Mean(c), var = statistics.Variance(c);
  const double gamma = k.fix_gamma ? 1.0 : static_cast<double>(static_cast<const W*>(k.gamma)[c]);
  table[c] = Entry<W>(mean, gamma / sqrt(var + k.epsilon), static_cast<const W*>(k.beta)[c], 0.0);
  if (!(statistics.Count() > 0)) return;
  W* moving_mean = static_cast<W*>(k.moving_mean) + c;
  W* moving_var = static_cast<W*>(k.moving_var) + c;
  const double momentum = Momentum<W>(k);
  if (momentum == 1) return;
  *moving_mean = static_cast<W>(momentum * *moving_mean + (1 - momentum) * mean);
  *moving_var = static_cast<W>(momentum * *moving_var + (1 - momentum) * var);
}

// One thread, in a launch of its own: the blocks of SetNormalize have all read the number then.
template <typename W>
__global__ void __launch_bounds__(kThreads)
    CountMeasuredBatch(NormalizeForward k, StatisticsInUse<W> statistics) {
  if (statistics.Count() > 0) CountBatch<W>(k);
}

// dx = A * dy, the gradient where the moving statistics normalized.
template <typename W>
__global__ void __launch_bounds__(kThreads)
    SetScale(NormalizeBackward k, StatisticsInUse<W> statistics, TableEntry<W>* table) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= statistics.channels) return;
  const double r = 1.0 / sqrt(statistics.Variance(c) + k.epsilon);
  table[c] = Entry<W>(0.0, k.fix_gamma ? r : r * static_cast<const W*>(k.gamma)[c], 0.0, 0.0);
}

// dx = A * dy + (x - mean) * B + C
template <typename W>
__global__ void __launch_bounds__(kThreads)
    SetCombine(MomentsBackward k, int64_t channels, TableEntry<W>* table) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  table[c] = Entry<W>(k.coefficients_grad[channels + c], k.statistics_grad[channels + c],
                      k.statistics_grad[c], k.coefficients_grad[c]);
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
  if (k.copy != nullptr && k.copy != k.x) {
    Check(cudaMemcpyAsync(k.copy, k.x, extent.size() * sizeof(T), cudaMemcpyDeviceToDevice,
                          ToStream(gpu)));
  }
  if (!k.measure) {
    Check(cudaMemsetAsync(k.statistics, 0, StatisticsSize(k.shape.channels) * sizeof(double),
                          ToStream(gpu)));
    return;
  }
  const PartialSums partial = Reduce(gpu, extent, static_cast<const T*>(k.x),
                                     static_cast<const T*>(nullptr), MomentsSums<T>{});
  Launch(gpu, FinishMoments, partial.Grid(), partial.Block(), partial,
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
  Launch(gpu, FinishGradients<W>, partial.Grid(), partial.Block(), partial, k, statistics);
  if (k.dx_request == Request::kNull) return;
  if (k.statistics == nullptr) {
    TableEntry<W>* table = Scratch<TableEntry<W>>(gpu, Use::kTable, extent.channels);
    PerChannel(gpu, extent.channels, SetScale<W>, k, statistics, table);
    Elementwise(gpu, extent, table, dy, static_cast<const T*>(nullptr), dx,
                k.dx_request == Request::kAdd);
  } else if (dx != dy) {
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
  PerChannel(gpu, extent.channels, SetCombine<W>, k, extent.channels, table);
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
