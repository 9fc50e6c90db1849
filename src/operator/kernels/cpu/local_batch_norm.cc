// The unsynchronized layer on the CPU, one block of channels at a time.
//
// Between its two passes over the data a synchronized layer waits for the other devices, so the
// second pass reads from memory again what the first one read.  Without an exchange both passes can
// run on a few channels before the next ones start, and the second pass finds the data in the
// cache.  What is read from and written to memory is x and y forward, and dy, x and dx backward:
// 2 and 3 passes over an array, instead of 3 and 5.
#include "kernels/cpu/local_batch_norm.h"

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "kernels/batch_norm_kernels.h"
#include "kernels/batch_norm_math.h"
#include "kernels/cpu/feature_tiles.h"
#include "kernels/cpu/threads.h"

namespace gluon_syncbn {
namespace {

std::size_t SizeOf(DataType type) {
  return type == DataType::kFloat16 ? 2 : type == DataType::kFloat32 ? 4 : 8;
}

// `pointer` + `elements` elements of `size` bytes; null stays null.
template <typename Pointer>
Pointer Advance(Pointer pointer, std::size_t elements, std::size_t size) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + elements * size;
}

// Blocks of channels.  They depend on the shape alone, so results are the same with any number of
// threads.
class ChannelBlocks {
 public:
  ChannelBlocks(DataType type, const FeatureShape& shape)
      : type_(type), shape_(shape), channels_(shape.channels) {
    // With channels last, a block of a row would be narrower than a page of memory: too little.
    if (shape.inner * shape.block < kMinInner || shape.count() == 0) return;
    const std::size_t channel_bytes = shape.count() * SizeOf(type);
    if (channel_bytes * shape.channels < kBeyondCaches) return;  // the cache holds all of it
    const std::size_t channels =
        std::max(shape.block, kBlockBytes / channel_bytes / shape.block * shape.block);
    if (shape.channels / channels >= kMinBlocks) channels_ = channels;
  }

  std::size_t count() const {
    return channels_ == 0 ? 0 : (shape_.channels + channels_ - 1) / channels_;
  }
  std::size_t first(std::size_t block) const { return block * channels_; }

  FeatureShape shape(std::size_t block) const {
    FeatureShape s = shape_;
    s.channels = std::min(channels_, shape_.channels - first(block));
    s.stride = shape_.outer_stride();
    return s;
  }
  // A block's part of a feature map, of an array with a number per channel, of the statistics.
  template <typename Pointer>
  Pointer OfFeatureMap(Pointer map, std::size_t block) const {
    return Advance(map, first(block) * shape_.inner, SizeOf(type_));
  }
  template <typename Pointer>
  Pointer OfParameter(Pointer values, std::size_t block) const {
    return Advance(values, first(block), type_ == DataType::kFloat64 ? 8 : 4);
  }
  template <typename Pointer>
  Pointer OfStatistics(Pointer statistics, std::size_t block) const {
    return statistics == nullptr ? nullptr : statistics + LocalStatisticsSize(first(block));
  }
  template <typename Pointer>
  Pointer OfCorrection(Pointer correction, std::size_t block) const {
    return correction == nullptr ? nullptr : correction + CorrectionSize(first(block));
  }

 private:
  static constexpr std::size_t kMinInner = 16;
  // x, dy and dx of a block fit the second-level cache.
  static constexpr std::size_t kBlockBytes = 128 << 10;
  static constexpr std::size_t kMinBlocks = 16;  // with fewer, kernels divide the whole map better

  DataType type_;
  FeatureShape shape_;
  std::size_t channels_;  // per block
};

}  // namespace

void RunLocal(Cpu cpu, const NormalizeForwardParams& whole, double* statistics) {
  const bool is_float64 = whole.type == DataType::kFloat64;
  const double momentum = is_float64 ? Momentum<double>(whole) : Momentum<float>(whole);
  const ChannelBlocks blocks(whole.type, whole.shape);
  ParallelFor(blocks.count(), whole.shape.channels * whole.shape.count(), [&](std::size_t i) {
    NormalizeForwardParams p = whole;
    p.shape = blocks.shape(i);
    p.x = blocks.OfFeatureMap(whole.x, i);
    p.gamma = blocks.OfParameter(whole.gamma, i);
    p.beta = blocks.OfParameter(whole.beta, i);
    p.moving_mean = blocks.OfParameter(whole.moving_mean, i);
    p.moving_var = blocks.OfParameter(whole.moving_var, i);
    p.y = blocks.OfFeatureMap(whole.y, i);
    p.residual = blocks.OfFeatureMap(whole.residual, i);
    p.renorm.mean = blocks.OfParameter(whole.renorm.mean, i);
    p.renorm.stddev = blocks.OfParameter(whole.renorm.stddev, i);
    p.renorm.correction = blocks.OfCorrection(whole.renorm.correction, i);
    p.momentum = momentum;
    p.batches = nullptr;  // counted once, below
    double* const of_block = blocks.OfStatistics(statistics, i);
    p.statistics = of_block;
    if (of_block != nullptr) {
      Run(cpu, MomentsForwardParams{p.type, p.shape, p.x, nullptr, true, of_block});
    }
    Run(cpu, p);
  });
  if (statistics == nullptr || whole.shape.count() == 0) return;  // the moving ones were used
  is_float64 ? CountBatch<double>(whole) : CountBatch<float>(whole);
}

void RunLocal(Cpu cpu, const LocalBackwardParams& whole) {
  const ChannelBlocks blocks(whole.type, whole.shape);
  ParallelFor(blocks.count(), whole.shape.channels * whole.shape.count(), [&](std::size_t i) {
    LocalBackwardParams p = whole;
    p.shape = blocks.shape(i);
    p.dy = blocks.OfFeatureMap(whole.dy, i);
    p.x = blocks.OfFeatureMap(whole.x, i);
    p.statistics = blocks.OfStatistics(whole.statistics, i);
    p.gamma = blocks.OfParameter(whole.gamma, i);
    p.moving_mean = blocks.OfParameter(whole.moving_mean, i);
    p.moving_var = blocks.OfParameter(whole.moving_var, i);
    p.dx = blocks.OfFeatureMap(whole.dx, i);
    p.gamma_grad = blocks.OfParameter(whole.gamma_grad, i);
    p.beta_grad = blocks.OfParameter(whole.beta_grad, i);
    p.correction = blocks.OfCorrection(whole.correction, i);
    p.epilogue.beta = blocks.OfParameter(whole.epilogue.beta, i);
    p.epilogue.y = blocks.OfFeatureMap(whole.epilogue.y, i);
    p.epilogue.residual_grad = blocks.OfFeatureMap(whole.epilogue.residual_grad, i);
    if (p.statistics == nullptr) return BackwardByMovingStatistics(p);

    // Where g is from the first kernel to the second.
    std::vector<char> spare;
    const void* g = p.dy;
    void* place = nullptr;
    if (p.epilogue.activation.present && p.dx_mode != WriteMode::kSkip) {
      if (p.dx_mode == WriteMode::kWrite) {
        place = p.dx;
      } else if (p.epilogue.residual_grad_mode == WriteMode::kWrite) {
        place = p.epilogue.residual_grad;
      } else {
        spare.resize(p.shape.outer * p.shape.outer_stride() * SizeOf(p.type));
        place = spare.data();
      }
      g = place;
    }
    static thread_local std::vector<double> sums, context;
    sums.resize(std::max(sums.size(), BackwardSumsSize(p.shape.channels)));
    context.resize(std::max(context.size(), BackwardContextSize(p.shape.channels)));
    Run(cpu, NormalizeBackwardParams{p.type, p.shape, p.epsilon, p.fix_gamma, p.dy, p.x,
                                     p.statistics, p.gamma, p.moving_mean, p.moving_var, place,
                                     sums.data(), context.data(), p.gamma_grad_mode, p.gamma_grad,
                                     p.beta_grad_mode, p.beta_grad, p.epilogue, p.correction});
    Run(cpu, MomentsBackwardParams{p.type, p.shape, g, p.x, sums.data(), context.data(), p.dx_mode,
                                   p.dx});
  });
}

}  // namespace gluon_syncbn
