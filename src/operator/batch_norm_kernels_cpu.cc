// The four kernels on the CPU.  See batch_norm_kernels.h for what they compute.
//
// Each pass over a feature map is one of two loops: rows of one channel (inner > 1) or rows of all
// channels (inner == 1, channels last).  What a pass does to an element is a small struct; the
// two loops are written once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "batch_norm_kernels.h"
#include "float16.h"

namespace gluon_syncbn {
namespace {

// What arithmetic on T is done in, and what its parameters are stored in.
template <typename T>
using Wide = std::conditional_t<std::is_same<T, double>::value, double, float>;

// A float64 number as the sum of two, so that x - mean stays exact in the narrower type.
template <typename W>
struct Pair {
  explicit Pair(double value) : high(static_cast<W>(value)), low(static_cast<W>(value - high)) {}
  W high;
  W low;
};

// y = scale * (x - mean) + shift in two operations: the low part of the mean goes into the shift.
template <typename W>
struct Affine {
  std::vector<W> mean, scale, shift;

  explicit Affine(std::size_t channels) : mean(channels), scale(channels), shift(channels) {}
  void Set(std::size_t c, double mean_c, double scale_c, double shift_c) {
    const Pair<W> pair(mean_c);
    mean[c] = pair.high;
    scale[c] = static_cast<W>(scale_c);
    shift[c] = static_cast<W>(shift_c - scale_c * pair.low);
  }
};

// Calls `row(offset, channel, length)` for every contiguous run of one channel.
template <typename Row>
void ForEachChannelRow(const FeatureShape& s, Row row) {
  for (std::size_t o = 0; o < s.outer; ++o) {
    for (std::size_t c = 0; c < s.channels; ++c) {
      row((o * s.channels + c) * s.inner, c, s.inner);
    }
  }
}

// Calls `element(index, channel)` for every element, in an order that vectorizes.
template <typename Element>
void ForEachElement(const FeatureShape& s, Element element) {
  if (s.inner == 1) {
    for (std::size_t o = 0; o < s.outer; ++o) {
      const std::size_t row = o * s.channels;
#pragma omp simd
      for (std::size_t c = 0; c < s.channels; ++c) element(row + c, c);
    }
  } else {
    ForEachChannelRow(s, [&](std::size_t offset, std::size_t c, std::size_t length) {
#pragma omp simd
      for (std::size_t i = 0; i < length; ++i) element(offset + i, c);
    });
  }
}

// Two sums per channel in float64; `term(index, channel, &first, &second)` gives one element's.
template <typename Term>
void SumPairs(const FeatureShape& s, Term term, double* first, double* second) {
  std::fill_n(first, s.channels, 0.0);
  std::fill_n(second, s.channels, 0.0);
  if (s.inner == 1) {
    for (std::size_t o = 0; o < s.outer; ++o) {
      const std::size_t row = o * s.channels;
#pragma omp simd
      for (std::size_t c = 0; c < s.channels; ++c) {
        double a, b;
        term(row + c, c, &a, &b);
        first[c] += a;
        second[c] += b;
      }
    }
  } else {
    ForEachChannelRow(s, [&](std::size_t offset, std::size_t c, std::size_t length) {
      double sum_a = 0.0, sum_b = 0.0;
#pragma omp simd reduction(+ : sum_a, sum_b)
      for (std::size_t i = 0; i < length; ++i) {
        double a, b;
        term(offset + i, c, &a, &b);
        sum_a += a;
        sum_b += b;
      }
      first[c] += sum_a;
      second[c] += sum_b;
    });
  }
}

template <typename T>
void Copy(const FeatureShape& s, const T* from, T* to) {
  if (from != to) std::memcpy(to, from, s.outer * s.channels * s.inner * sizeof(T));
}

template <typename W>
void Assign(Request request, W* to, double value) {
  if (request == Request::kWrite) *to = static_cast<W>(value);
  if (request == Request::kAdd) *to = static_cast<W>(*to + value);
}

template <typename T, typename W>
void Store(bool add, T* to, W value) {
  *to = static_cast<T>(add ? static_cast<W>(*to) + value : value);
}

// The statistics that a pass uses: over all devices, or the moving ones.
struct ChannelStatistics {
  double mean;
  double var;
};

template <typename W>
class StatisticsInUse {
 public:
  StatisticsInUse(std::size_t channels, const double* statistics, const void* moving_mean,
                  const void* moving_var)
      : channels_(channels),
        statistics_(statistics),
        moving_mean_(static_cast<const W*>(moving_mean)),
        moving_var_(static_cast<const W*>(moving_var)) {}

  double count() const { return statistics_ == nullptr ? 0.0 : statistics_[2 * channels_]; }
  bool measured() const { return count() > 0; }

  ChannelStatistics operator[](std::size_t c) const {
    if (!measured()) return {static_cast<double>(moving_mean_[c]), moving_var_[c]};
    const double mean = statistics_[c] / count();
    // Rounding can leave a constant channel's variance a little below 0; NaN must stay NaN.
    const double var = statistics_[channels_ + c] / count() - mean * mean;
    return {mean, var < 0 ? 0.0 : var};
  }

 private:
  std::size_t channels_;
  const double* statistics_;
  const W* moving_mean_;
  const W* moving_var_;
};

template <typename T>
void RunTyped(const MomentsForward& k) {
  using W = Wide<T>;
  const T* x = static_cast<const T*>(k.x);
  const std::size_t channels = k.shape.channels;
  Copy(k.shape, x, static_cast<T*>(k.copy));
  // Summed around the channel's first element, so that rounding does not grow with the number of
  // elements when the data lie far from zero; the result is moved back to zero once, at the end.
  std::vector<double> pivot(channels);
  for (std::size_t c = 0; c < channels; ++c) pivot[c] = static_cast<W>(x[c * k.shape.inner]);
  const double* origin = pivot.data();
  double* sum = k.statistics;
  double* square = k.statistics + channels;
  SumPairs(
      k.shape,
      [=](std::size_t i, std::size_t c, double* first, double* second) {
        *first = static_cast<W>(x[i]) - origin[c];
        *second = *first * *first;
      },
      sum, square);
  const double count = static_cast<double>(k.shape.count());
  for (std::size_t c = 0; c < channels; ++c) {
    square[c] += pivot[c] * (2 * sum[c] + count * pivot[c]);
    sum[c] += count * pivot[c];
  }
  k.statistics[2 * channels] = count;
}

template <typename T>
void RunTyped(const NormalizeForward& k) {
  using W = Wide<T>;
  const std::size_t channels = k.shape.channels;
  const W* gamma = static_cast<const W*>(k.gamma);
  const W* beta = static_cast<const W*>(k.beta);
  W* moving_mean = static_cast<W*>(k.moving_mean);
  W* moving_var = static_cast<W*>(k.moving_var);
  const StatisticsInUse<W> statistics(channels, k.statistics, moving_mean, moving_var);
  Affine<W> affine(channels);
  for (std::size_t c = 0; c < channels; ++c) {
    const ChannelStatistics s = statistics[c];
    const double gamma_c = k.fix_gamma ? 1.0 : static_cast<double>(gamma[c]);
    affine.Set(c, s.mean, gamma_c / std::sqrt(s.var + k.epsilon), static_cast<double>(beta[c]));
    if (statistics.measured()) {
      moving_mean[c] = static_cast<W>(k.momentum * moving_mean[c] + (1 - k.momentum) * s.mean);
      moving_var[c] = static_cast<W>(k.momentum * moving_var[c] + (1 - k.momentum) * s.var);
    }
  }
  if (k.y_request == Request::kNull) return;
  const bool add = k.y_request == Request::kAdd;
  const T* x = static_cast<const T*>(k.x);
  T* y = static_cast<T*>(k.y);
  const W* mean = affine.mean.data();
  const W* scale = affine.scale.data();
  const W* shift = affine.shift.data();
  ForEachElement(k.shape, [=](std::size_t i, std::size_t c) {
    Store(add, y + i, (static_cast<W>(x[i]) - mean[c]) * scale[c] + shift[c]);
  });
}

template <typename T>
void RunTyped(const NormalizeBackward& k) {
  using W = Wide<T>;
  const std::size_t channels = k.shape.channels;
  const T* dy = static_cast<const T*>(k.dy);
  const T* x = static_cast<const T*>(k.x);
  const W* gamma = static_cast<const W*>(k.gamma);
  const StatisticsInUse<W> statistics(channels, k.statistics, k.moving_mean, k.moving_var);

  Affine<W> affine(channels);  // its mean, then what dx needs
  for (std::size_t c = 0; c < channels; ++c) affine.Set(c, statistics[c].mean, 0.0, 0.0);
  const W* mean = affine.mean.data();
  std::vector<double> sum_dy(channels), sum_dy_centred(channels);
  SumPairs(
      k.shape,
      [=](std::size_t i, std::size_t c, double* first, double* second) {
        *first = static_cast<W>(dy[i]);
        *second = *first * static_cast<double>(static_cast<W>(x[i]) - mean[c]);
      },
      sum_dy.data(), sum_dy_centred.data());

  for (std::size_t c = 0; c < channels; ++c) {
    const ChannelStatistics s = statistics[c];
    const double r = 1.0 / std::sqrt(s.var + k.epsilon);
    const double a = k.fix_gamma ? r : r * gamma[c];
    const double sum = sum_dy[c];
    const double centred = sum_dy_centred[c] - Pair<W>(s.mean).low * sum;
    Assign(k.gamma_request, static_cast<W*>(k.gamma_grad) + c, k.fix_gamma ? 0.0 : centred * r);
    Assign(k.beta_request, static_cast<W*>(k.beta_grad) + c, sum);
    if (k.statistics == nullptr) {
      affine.scale[c] = static_cast<W>(a);
      continue;
    }
    const double per_element = statistics.measured() ? a / statistics.count() : 0.0;
    if (k.statistics_grad != nullptr) {
      k.statistics_grad[c] = -per_element * sum;
      k.statistics_grad[channels + c] = -per_element * r * r * centred;
    }
    if (k.coefficients_grad != nullptr) {
      k.coefficients_grad[c] = a;
      k.coefficients_grad[channels + c] = s.mean;
    }
  }
  if (k.statistics != nullptr) {
    if (k.statistics_grad != nullptr) k.statistics_grad[2 * channels] = 0.0;
    if (k.dx_request != Request::kNull) Copy(k.shape, dy, static_cast<T*>(k.dx));
    return;
  }
  if (k.dx_request == Request::kNull) return;
  const bool add = k.dx_request == Request::kAdd;
  T* dx = static_cast<T*>(k.dx);
  const W* scale = affine.scale.data();
  ForEachElement(k.shape, [=](std::size_t i, std::size_t c) {
    Store(add, dx + i, static_cast<W>(dy[i]) * scale[c]);
  });
}

template <typename T>
void RunTyped(const MomentsBackward& k) {
  using W = Wide<T>;
  if (k.dx_request == Request::kNull) return;
  const std::size_t channels = k.shape.channels;
  std::vector<W> coefficient(channels);
  Affine<W> affine(channels);
  for (std::size_t c = 0; c < channels; ++c) {
    coefficient[c] = static_cast<W>(k.coefficients_grad[c]);
    affine.Set(c, k.coefficients_grad[channels + c], k.statistics_grad[channels + c],
               k.statistics_grad[c]);
  }
  const bool add = k.dx_request == Request::kAdd;
  const T* dy = static_cast<const T*>(k.dy);
  const T* x = static_cast<const T*>(k.x);
  T* dx = static_cast<T*>(k.dx);
  const W* a = coefficient.data();
  const W* mean = affine.mean.data();
  const W* scale = affine.scale.data();
  const W* shift = affine.shift.data();
  ForEachElement(k.shape, [=](std::size_t i, std::size_t c) {
    const W centred = (static_cast<W>(x[i]) - mean[c]) * scale[c] + shift[c];
    Store(add, dx + i, static_cast<W>(dy[i]) * a[c] + centred);
  });
}

template <typename Kernel>
void Dispatch(const Kernel& kernel) {
  switch (kernel.type) {
    case DataType::kFloat16:
      return RunTyped<Float16>(kernel);
    case DataType::kFloat32:
      return RunTyped<float>(kernel);
    case DataType::kFloat64:
      return RunTyped<double>(kernel);
  }
}

}  // namespace

void Run(Cpu, const MomentsForward& kernel) { Dispatch(kernel); }
void Run(Cpu, const NormalizeForward& kernel) { Dispatch(kernel); }
void Run(Cpu, const NormalizeBackward& kernel) { Dispatch(kernel); }
void Run(Cpu, const MomentsBackward& kernel) { Dispatch(kernel); }

}  // namespace gluon_syncbn
