// The four kernels of batch normalization, said once for every device.
//
// A feature map of any rank and channel axis is outer x channels x inner.  Statistics are
// float64 per channel; parameters (gamma, beta, moving statistics) are float32 beside float16 and
// float32 data and float64 beside float64 data.  The notation is that of Ioffe and Szegedy, "Batch
// Normalization", ICML 2015 (https://arxiv.org/abs/1502.03167), with r = 1 / sqrt(var + epsilon):
//
//   y     = gamma * (x - mean) * r + beta
//   dx    = A * dy + B * (x - mean) + C,   A = gamma * r
//   B     = -A * r^2 / count * sum(dy * (x - mean)),   C = -A / count * sum(dy)
//
// where mean, var, count and both sums run over all devices.
//
// Nothing is lost when the data lie far from zero, since products are only ever taken of distances.
// The variance comes from sums of (x - pivot) and (x - pivot)^2, where the pivot is one of the
// channel's own elements or a mean of some, in one pass; the devices' results (count, mean,
// M2 = sum((x - mean)^2)) are merged pairwise, in a fixed order:
//
//   d = mean_b - mean_a,  mean = mean_a + d * count_b / count,
//   M2 = M2_a + M2_b + d^2 * count_a * count_b / count
//
// (Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
// recommendations", The American Statistician 37, 1983; batch_norm_math.h.)  (x - mean) is taken
// first, too, with the mean as a pair of numbers where x is not float64.
//
// These functions know no MXNet.  Each takes the device that it runs on, and all pointers are to
// that device's memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gluon_syncbn {

enum class DataType { kFloat16, kFloat32, kFloat64 };

// What to do with a result: leave it away, write it, or add it to what is there.
enum class Request { kNull, kWrite, kAdd };

struct FeatureShape {
  std::size_t outer = 0;
  std::size_t channels = 0;
  std::size_t inner = 0;
  // Elements from one outer index to the next; 0: they follow each other.
  std::size_t stride = 0;
  std::size_t count() const { return outer * inner; }  // elements per channel
  std::size_t outer_stride() const { return stride == 0 ? channels * inner : stride; }
};

struct Cpu {};

// The kernels are queued on the stream and have not run yet when the call returns.  What they read
// and write must stay until then.  The functions throw std::runtime_error where CUDA fails.
struct Gpu {
  int device;
  void* stream;  // a cudaStream_t
};

// The statistics that travel: the mean and sum((x - mean)^2) per channel, then the count.
inline std::size_t StatisticsSize(std::size_t channels) { return 2 * channels + 1; }
// The count where nobody measured, outside of training: the moving statistics are used, and there
// is nothing to exchange.  (A count of 0 is that of a share without elements, which is exchanged.)
constexpr double kNotMeasured = -1.0;
inline bool IsMeasured(double count) { return count >= 0; }
// What the backward pass needs beside the exchanged sums: A and the mean, per channel.
inline std::size_t CoefficientsSize(std::size_t channels) { return 2 * channels; }

// Moments, forward: statistics of this device's share.
struct MomentsForward {
  DataType type;
  FeatureShape shape;
  const void* x;
  void* copy;    // x handed through; x itself or null: nothing is written
  bool measure;  // false: the statistics say kNotMeasured
  double* statistics;
};

// Normalize, forward.  In training it also moves the moving statistics, with the biased variance,
// as MXNet's BatchNorm does; but where no device had an element, they stay.  With `batches`, how
// many batches there were before, they become the average over all of them, whatever the momentum,
// and the number grows.  A momentum of 1 moves nothing, not even for data that are not finite.
struct NormalizeForward {
  DataType type;
  FeatureShape shape;
  double epsilon;
  double momentum;
  bool fix_gamma;
  const void* x;
  const double* statistics;  // over all devices; null: use the moving statistics
  const void* gamma;
  const void* beta;
  void* moving_mean;
  void* moving_var;
  Request y_request;
  void* y;
  void* batches = nullptr;
};

// Normalize, backward: the sums over dy.
// With statistics: dy is handed through, `statistics_grad` gets this device's part of C and B
// (they are summed over the devices), `coefficients_grad` gets A and the mean.
// Without: `dx` is the gradient of x.
struct NormalizeBackward {
  DataType type;
  FeatureShape shape;
  double epsilon;
  bool fix_gamma;
  const void* dy;
  const void* x;
  const double* statistics;
  const void* gamma;
  const void* moving_mean;
  const void* moving_var;
  Request dx_request;
  void* dx;  // may be dy itself
  double* statistics_grad;
  double* coefficients_grad;
  Request gamma_request;
  void* gamma_grad;
  Request beta_request;
  void* beta_grad;
};

// Moments, backward: dx from dy, x and the exchanged sums.
struct MomentsBackward {
  DataType type;
  FeatureShape shape;
  const void* dy;
  const void* x;
  const double* statistics_grad;
  const double* coefficients_grad;
  Request dx_request;
  void* dx;  // may be dy itself
};

void Run(Cpu, const MomentsForward& kernel);
void Run(Cpu, const NormalizeForward& kernel);
void Run(Cpu, const NormalizeBackward& kernel);
void Run(Cpu, const MomentsBackward& kernel);
void Run(const Gpu&, const MomentsForward& kernel);
void Run(const Gpu&, const NormalizeForward& kernel);
void Run(const Gpu&, const NormalizeBackward& kernel);
void Run(const Gpu&, const MomentsBackward& kernel);

// Both forward kernels and both backward kernels, for a device that has nobody to wait for between
// them.  The forward leaves its statistics in `statistics`, of LocalStatisticsSize and in an order
// of the device's own, and the backward takes them from its kernel; null: the moving statistics.
inline std::size_t LocalStatisticsSize(std::size_t channels) { return 3 * channels; }
void RunAlone(Cpu, const NormalizeForward& kernel, double* statistics);
void RunAlone(Cpu, const NormalizeBackward& kernel);
void RunAlone(const Gpu&, const NormalizeForward& kernel, double* statistics);
void RunAlone(const Gpu&, const NormalizeBackward& kernel);

}  // namespace gluon_syncbn
