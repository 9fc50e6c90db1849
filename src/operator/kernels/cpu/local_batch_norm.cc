// Batch normalization of a device that has nobody to wait for, slice by slice on the CPU.
//
// Between its two passes over the data, a synchronized layer waits for the other devices, so the
// second pass fetches from memory again what the first one fetched.  A device on its own can finish
// a few channels, a slice, before it starts on the next, and finds them in the cache the second
// time.  From memory come x, and dy and x again: the array moves 2 times forward and 3 times back.
#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "kernels/batch_norm_kernels.h"
#include "kernels/batch_norm_math.h"
#include "kernels/cpu/threads.h"
#include "kernels/cpu/feature_tiles.h"

namespace gluon_syncbn {
namespace {

std::size_t SizeOf(DataType type) {
  return type == DataType::kFloat16 ? 2 : type == DataType::kFloat32 ? 4 : 8;
}

// A pointer to elements of a known size, from some channel on.
template <typename Pointer>
Pointer Advance(Pointer pointer, std::size_t elements, std::size_t size) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + elements * size;
}

// The cut depends on the shape alone, so results are the same with any number of threads.
class Slices {
 public:
  Slices(DataType type, const FeatureShape& shape)
      : type_(type), shape_(shape), channels_(shape.channels) {
    // Channels last, a slice of a row would be less than a page of memory wide: too little.
    if (shape.inner < kShortestRun || shape.count() == 0) return;
    const std::size_t channel_bytes = shape.count() * SizeOf(type);
    if (channel_bytes * shape.channels < kBeyondCaches) return;  // all of it is in a cache
    const std::size_t channels = std::max<std::size_t>(1, kSliceBytes / channel_bytes);
    if (shape.channels / channels >= kFewest) channels_ = channels;
  }

  std::size_t count() const {
    return channels_ == 0 ? 0 : (shape_.channels + channels_ - 1) / channels_;
  }
  std::size_t first(std::size_t slice) const { return slice * channels_; }

  FeatureShape shape(std::size_t slice) const {
    FeatureShape s = shape_;
    s.channels = std::min(channels_, shape_.channels - first(slice));
    s.stride = shape_.outer_stride();
    return s;
  }
  // What belongs to a slice of a feature map, and of an array with a number per channel.
  template <typename Pointer>
  Pointer Map(Pointer map, std::size_t slice) const {
    return Advance(map, first(slice) * shape_.inner, SizeOf(type_));
  }
  template <typename Pointer>
  Pointer PerChannel(Pointer values, std::size_t slice) const {
    return Advance(values, first(slice), type_ == DataType::kFloat64 ? 8 : 4);
  }
  template <typename Pointer>
  Pointer Statistics(Pointer statistics, std::size_t slice) const {
    return statistics == nullptr ? nullptr : statistics + LocalStatisticsSize(first(slice));
  }

 private:
  static constexpr std::size_t kShortestRun = 16;
  // x, dy and dx of a slice fit the second-level cache.
  static constexpr std::size_t kSliceBytes = 128 << 10;
  static constexpr std::size_t kFewest = 16;  // else whole kernels share the work out better

  DataType type_;
  FeatureShape shape_;
  std::size_t channels_;  // of a slice
};

}  // namespace

void RunAlone(Cpu cpu, const NormalizeForward& whole, double* statistics) {
  const bool wide = whole.type == DataType::kFloat64;
  const double momentum = wide ? Momentum<double>(whole) : Momentum<float>(whole);
  const Slices slices(whole.type, whole.shape);
  ParallelFor(slices.count(), [&](std::size_t i) {
    NormalizeForward k = whole;
    k.shape = slices.shape(i);
    k.x = slices.Map(whole.x, i);
    k.gamma = slices.PerChannel(whole.gamma, i);
    k.beta = slices.PerChannel(whole.beta, i);
    k.moving_mean = slices.PerChannel(whole.moving_mean, i);
    k.moving_var = slices.PerChannel(whole.moving_var, i);
    k.y = slices.Map(whole.y, i);
    k.momentum = momentum;
    k.batches = nullptr;  // counted once, below
    double* measured = slices.Statistics(statistics, i);
    k.statistics = measured;
    if (measured != nullptr) {
      Run(cpu, MomentsForward{k.type, k.shape, k.x, nullptr, true, measured});
    }
    Run(cpu, k);
  });
  if (statistics == nullptr || whole.shape.count() == 0) return;
  wide ? CountBatch<double>(whole) : CountBatch<float>(whole);
}

void RunAlone(Cpu cpu, const NormalizeBackward& whole) {
  const Slices slices(whole.type, whole.shape);
  ParallelFor(slices.count(), [&](std::size_t i) {
    NormalizeBackward k = whole;
    k.shape = slices.shape(i);
    k.dy = slices.Map(whole.dy, i);
    k.x = slices.Map(whole.x, i);
    k.statistics = slices.Statistics(whole.statistics, i);
    k.gamma = slices.PerChannel(whole.gamma, i);
    k.moving_mean = slices.PerChannel(whole.moving_mean, i);
    k.moving_var = slices.PerChannel(whole.moving_var, i);
    k.dx = slices.Map(whole.dx, i);
    k.gamma_grad = slices.PerChannel(whole.gamma_grad, i);
    k.beta_grad = slices.PerChannel(whole.beta_grad, i);
    if (k.statistics == nullptr) return Run(cpu, k);

    static thread_local std::vector<double> sums, coefficients;
    sums.resize(std::max(sums.size(), StatisticsSize(k.shape.channels)));
    coefficients.resize(std::max(coefficients.size(), CoefficientsSize(k.shape.channels)));
    k.dx_request = Request::kNull;
    k.statistics_grad = sums.data();
    k.coefficients_grad = coefficients.data();
    Run(cpu, k);
    Run(cpu, MomentsBackward{k.type, k.shape, k.dy, k.x, k.statistics_grad, k.coefficients_grad,
                             whole.dx_request, k.dx});
  });
}

}  // namespace gluon_syncbn
