// The kernels of batch normalization: one interface for every device.
//
// A feature map of any rank and channel axis is viewed as [outer][channels][inner].  Per channel,
// with sums over the channel's elements on all devices (Ioffe and Szegedy, "Batch Normalization",
// ICML 2015, https://arxiv.org/abs/1502.03167):
//
//   n        number of elements ("count" in the code);  C: number of channels
//   mean     sum(x) / n
//   M2       sum((x - mean)^2);  M2 / n is the variance, biased, as in MXNet's BatchNorm
//   invstd   1 / sqrt(M2 / n + epsilon)
//
//   y      = activation(z),  z = gamma * invstd * (x - mean) + beta [+ residual]
//   g      = dy * activation'(z): the gradient of the residual
//   dx     = gamma * invstd * g + b * (x - mean) + c
//     b    = -gamma * invstd^3 / n * sum(g * (x - mean))
//     c    = -gamma * invstd / n * sum(g)
//   dgamma = invstd * sum(g * (x - mean)),  dbeta = sum(g)    (over this device's elements alone)
//
// Precision.  Data far from zero lose nothing, because only differences are multiplied.  One pass
// takes sums of (x - pivot) and (x - pivot)^2, where the pivot is an element of the channel or the
// mean of some, and (n, mean, M2) follow from them; partial results are merged pairwise, in a fixed
// order (Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
// recommendations", The American Statistician 37, 1983; see batch_norm_math.h).  Where x is not
// float64, the mean that is subtracted from it is a pair of numbers, a high and a low part.
//
// Types.  Statistics and sums are float64.  Parameters (gamma, beta, the moving statistics and
// their count of batches) are float32 for float16 and float32 data, and float64 for float64 data.
//
// These functions know nothing of MXNet.  The first argument says which device runs them; all
// pointers are to memory of that device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gluon_syncbn {

enum class DataType { kFloat16, kFloat32, kFloat64 };

// What to do with a result: skip, overwrite or accumulate.
enum class WriteMode { kSkip, kWrite, kAdd };

struct FeatureShape {
  std::size_t outer = 0;
  std::size_t channels = 0;
  std::size_t inner = 0;
  // Elements from one outer index to the next; 0: channels * inner, that is, contiguous.
  std::size_t stride = 0;
  // Blocks of so many adjacent channels, of which `channels` is a multiple: the map is
  // [outer][channels / block][inner][block].  On CPUs only; with 1 it is as above.
  std::size_t block = 1;
  std::size_t count() const { return outer * inner; }  // elements per channel
  std::size_t outer_stride() const { return stride == 0 ? channels * inner : stride; }
};

// activation(z) = z, or slope * z where z < 0: with a slope of 0, relu, otherwise leaky relu.  Its
// derivative at 0 is the slope, as in MXNet.
struct Activation {
  bool present = false;
  double slope = 0.0;  // 0 or greater
};

struct Cpu {};

// Kernels are queued on the stream and may not have run when the call returns: what they read and
// write must stay valid until then.  The functions throw std::runtime_error if CUDA fails.
struct Gpu {
  int device;
  void* stream;  // a cudaStream_t
};

// The statistics, as the devices exchange them: [mean: C] [M2: C] [n].
inline std::size_t StatisticsSize(std::size_t channels) { return 2 * channels + 1; }

// What stands for n where no statistics were computed, as in inference: the moving statistics are
// used, and nothing is exchanged.  (A count of 0 is that of a shard without elements, which takes
// part in the exchange.)
constexpr double kNoStatistics = -1.0;
inline bool HasStatistics(double count) { return count >= 0; }

// The backward sums, as the devices exchange them: [c: C] [b: C] [0].  They have the size of the
// statistics, whose gradient they are for MXNet.
inline std::size_t BackwardSumsSize(std::size_t channels) { return StatisticsSize(channels); }

// What MomentsBackward needs besides the sums: [gamma * invstd: C] [mean: C].
inline std::size_t BackwardContextSize(std::size_t channels) { return 2 * channels; }

// Step 1 of forward: the statistics of this device's shard.
struct MomentsForwardParams {
  DataType type;
  FeatureShape shape;
  const void* x;
  void* copy;               // gets a copy of x; x itself or null: no copy
  bool compute_statistics;  // false: the count is set to kNoStatistics, and the rest to 0
  double* statistics;
};

// Batch renormalization (Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275,
// algorithm 1): the normalized x is multiplied by r, and d is added, before gamma and beta;
//   stddev = sqrt(variance + epsilon)
//   r = stddev / renorm_stddev,           at least r_min and at most r_max
//   d = (mean - renorm_mean) / renorm_stddev,    from -d_max to d_max
// by averages over the batches before this one, which is then added to them:
//   renorm = momentum * renorm + (1 - momentum) * batch
// r and d are constants in backward.  As in TensorFlow, renorm_stddev counts as sqrt(epsilon) at
// least.
struct Renormalization {
  double momentum = 1.0;
  double r_min = kNoLimit, r_max = kNoLimit, d_max = kNoLimit;
  void* mean = nullptr;  // null: no renormalization
  void* stddev = nullptr;
  double* correction = nullptr;  // gets [r d] of each channel, for backward; 1 and 0 where x is not
                                 // normalized by the batch's statistics

  static constexpr double kNoLimit = -1.0;
};
inline std::size_t CorrectionSize(std::size_t channels) { return 2 * channels; }

// Step 2 of forward: y, from the statistics of all devices.
//
// Then the moving statistics are updated, unless they were used or no device had an element:
//   moving = momentum * moving + (1 - momentum) * batch
// With `batches`, the number of batches so far, they become the average over all batches instead,
// and the number is increased.  A momentum of 1 leaves them alone, even if x is not finite.
struct NormalizeForwardParams {
  DataType type;
  FeatureShape shape;
  double epsilon;
  double momentum;
  bool fix_gamma;  // gamma is taken to be 1
  const void* x;
  const double* statistics;  // null: use the moving statistics
  const void* gamma;
  const void* beta;
  void* moving_mean;
  void* moving_var;
  WriteMode y_mode;
  void* y;  // may be x or the residual
  void* batches = nullptr;
  Activation activation = {};
  const void* residual = nullptr;  // null: none
  Renormalization renorm = {};
};

// What the backward kernels need to know of what came after normalization, and the gradient that
// they compute for it.
struct EpilogueBackward {
  Activation activation = {};
  const void* beta = nullptr;  // with an activation, to compute z anew if there is no residual
  const void* y = nullptr;     // with an activation and a residual: it has the sign of z
  WriteMode residual_grad_mode = WriteMode::kSkip;
  void* residual_grad = nullptr;
};

// Step 1 of backward: this device's part of the backward sums, and the gradients of gamma, beta and
// the residual.  Where forward used the moving statistics, the sums are 0.
struct NormalizeBackwardParams {
  DataType type;
  FeatureShape shape;
  double epsilon;
  bool fix_gamma;  // the gradient of gamma is 0
  const void* dy;
  const void* x;
  const double* statistics;  // as in forward; not null
  const void* gamma;
  const void* moving_mean;
  const void* moving_var;
  void* g;                   // gets g, which without activation is dy; may be dy; null: not needed
  double* backward_sums;     // null: not needed
  double* backward_context;  // null: not needed
  WriteMode gamma_grad_mode;
  void* gamma_grad;
  WriteMode beta_grad_mode;
  void* beta_grad;
  EpilogueBackward epilogue = {};
  const double* correction = nullptr;  // from forward; null: there was no renormalization
};

// Step 2 of backward: dx, from the backward sums of all devices.
struct MomentsBackwardParams {
  DataType type;
  FeatureShape shape;
  const void* g;
  const void* x;
  const double* backward_sums;
  const double* backward_context;
  WriteMode dx_mode;
  void* dx;  // may be g
};

// Both steps of backward, on one device.
struct LocalBackwardParams {
  DataType type;
  FeatureShape shape;
  double epsilon;
  bool fix_gamma;
  const void* dy;
  const void* x;
  const double* statistics;  // from RunLocal's forward; null: it used the moving statistics
  const void* gamma;
  const void* moving_mean;
  const void* moving_var;
  WriteMode dx_mode;
  void* dx;  // may be dy
  WriteMode gamma_grad_mode;
  void* gamma_grad;
  WriteMode beta_grad_mode;
  void* beta_grad;
  EpilogueBackward epilogue = {};
  const double* correction = nullptr;
};

// The four kernels of a synchronized layer.  The statistics are exchanged between the two of
// forward, the backward sums between the two of backward.
void Run(Cpu, const MomentsForwardParams& params);
void Run(Cpu, const NormalizeForwardParams& params);
void Run(Cpu, const NormalizeBackwardParams& params);
void Run(Cpu, const MomentsBackwardParams& params);
void Run(const Gpu&, const MomentsForwardParams& params);
void Run(const Gpu&, const NormalizeForwardParams& params);
void Run(const Gpu&, const NormalizeBackwardParams& params);
void Run(const Gpu&, const MomentsBackwardParams& params);

// The unsynchronized layer: both steps of forward, and both of backward, without an exchange.
// Forward computes the batch's statistics (those of `params` are ignored) and leaves them in
// `statistics`, LocalStatisticsSize numbers in an order that only backward of the same device
// knows.  If `statistics` is null, it uses the moving statistics.
inline std::size_t LocalStatisticsSize(std::size_t channels) { return 3 * channels; }
void RunLocal(Cpu, const NormalizeForwardParams& params, double* statistics);
void RunLocal(Cpu, const LocalBackwardParams& params);
void RunLocal(const Gpu&, const NormalizeForwardParams& params, double* statistics);
void RunLocal(const Gpu&, const LocalBackwardParams& params);

}  // namespace gluon_syncbn
