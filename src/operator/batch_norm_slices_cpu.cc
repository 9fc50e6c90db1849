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

#include "batch_norm_kernels.h"
#include "cpu_threads.h"
#include "feature_tiles.h"

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

void Run(Cpu cpu, const BatchNormForward& k) {
  const Slices slices(k.type, k.shape);
  ParallelFor(slices.count(), [&](std::size_t i) {
    const FeatureShape shape = slices.shape(i);
    const void* x = slices.Map(k.x, i);
    double* statistics = slices.Statistics(k.statistics, i);
    if (statistics != nullptr) Run(cpu, MomentsForward{k.type, shape, x, nullptr, statistics});
    Run(cpu, NormalizeForward{k.type, shape, k.epsilon, k.momentum, k.fix_gamma, x, statistics,
                              slices.PerChannel(k.gamma, i), slices.PerChannel(k.beta, i),
                              slices.PerChannel(k.moving_mean, i),
                              slices.PerChannel(k.moving_var, i), k.y_request, slices.Map(k.y, i)});
  });
}

void Run(Cpu cpu, const BatchNormBackward& k) {
  const Slices slices(k.type, k.shape);
  ParallelFor(slices.count(), [&](std::size_t i) {
    const FeatureShape shape = slices.shape(i);
    const double* statistics = slices.Statistics(k.statistics, i);
    const bool alone = statistics == nullptr;
    static thread_local std::vector<double> sums, coefficients;
    sums.resize(std::max(sums.size(), StatisticsSize(shape.channels)));
    coefficients.resize(std::max(coefficients.size(), CoefficientsSize(shape.channels)));
    const void* dy = slices.Map(k.dy, i);
    const void* x = slices.Map(k.x, i);
    void* dx = slices.Map(k.dx, i);
    Run(cpu,
        NormalizeBackward{k.type, shape, k.epsilon, k.fix_gamma, dy, x, statistics,
                          slices.PerChannel(k.gamma, i), slices.PerChannel(k.moving_mean, i),
                          slices.PerChannel(k.moving_var, i), alone ? k.dx_request : Request::kNull,
                          dx, sums.data(), coefficients.data(), k.gamma_request,
                          slices.PerChannel(k.gamma_grad, i), k.beta_request,
                          slices.PerChannel(k.beta_grad, i)});
    if (alone) return;
    Run(cpu,
        MomentsBackward{k.type, shape, dy, x, sums.data(), coefficients.data(), k.dx_request, dx});
  });
}

}  // namespace gluon_syncbn
