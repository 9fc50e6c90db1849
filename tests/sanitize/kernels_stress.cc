// A stress test of the CPU kernels for the sanitizers: random shapes, types, write modes and
// alignments, in several threads at once as with several devices, on arrays without slack at the
// end.  Results of float64 are compared with plain loops.
//
//   kernels_stress [seed] [shapes]
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "kernels/batch_norm_kernels.h"
#include "kernels/moving_average_kernels.h"
#include "kernels/weighted_moments.h"

namespace {

using namespace gluon_syncbn;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "kernels_stress: %s\n", what);
  std::abort();
}

// An array that starts `shift` elements after the start of its own memory block, and ends with it.
template <typename T>
class Array {
 public:
  Array(std::size_t size, std::size_t shift) : memory_(size + shift), shift_(shift) {}
  T* data() { return memory_.data() + shift_; }
  T& operator[](std::size_t i) { return data()[i]; }

 private:
  std::vector<T> memory_;
  std::size_t shift_;
};

struct Bits16 {  // a float16
  std::uint16_t bits = 0;
};
void Set(double value, double* to) { *to = value; }
void Set(double value, float* to) { *to = static_cast<float>(value); }
void Set(double value, Bits16* to) {  // powers of 2 from 2^-3 to 2^4, and their negatives
  const int exponent = static_cast<int>(std::fabs(value) * 2) % 8;
  to->bits = static_cast<std::uint16_t>((value < 0 ? 0x8000 : 0) | ((12 + exponent) << 10));
}

WriteMode AnyMode(std::mt19937* random) { return static_cast<WriteMode>((*random)() % 3); }

void Near(double got, double wanted, const char* what) {
  if (!(std::fabs(got - wanted) <= 1e-9 * (1 + std::fabs(wanted)))) Fail(what);
}

// Where the i-th element of a channel is.
std::size_t At(const FeatureShape& shape, std::size_t c, std::size_t i) {
  const std::size_t first = i / shape.inner * shape.channels + c - c % shape.block;
  return first * shape.inner + i % shape.inner * shape.block + c % shape.block;
}

// An activation and a residual in the unsynchronized layer and in the synchronized one's kernels,
// in all write modes.
template <typename T, typename Parameter>
void Epilogues(DataType type, const FeatureShape& shape, std::mt19937* random, double* of_batch,
               const T* x, const T* given_dy, const Parameter* gamma, const Parameter* beta,
               Parameter* mean, Parameter* var, double* sums, double* context) {
  const std::size_t size = shape.channels * shape.count();
  Array<T> residual(size, 1), y(size, 2), dy(size, 3), dx(size, 0), dr(size, 1), g(size, 2);
  Array<Parameter> dgamma(shape.channels, 1), dbeta(shape.channels, 0);
  Array<double> statistics(StatisticsSize(shape.channels), 0);
  std::copy_n(given_dy, size, dy.data());
  std::copy_n(x, size, residual.data());
  const Cpu cpu;
  const Activation activation{(*random)() % 3 != 0, (*random)() % 2 * 0.25};
  const bool add = (*random)() % 2 == 0;
  NormalizeForwardParams forward{type,    shape, 1e-3, 0.9,  false, x,
                                 nullptr, gamma, beta, mean, var,   WriteMode::kWrite,
                                 y.data()};
  forward.activation = activation;
  forward.residual = add ? residual.data() : nullptr;
  RunLocal(cpu, forward, of_batch);
  EpilogueBackward epilogue{activation, beta, add ? y.data() : nullptr};
  if (add) epilogue.residual_grad_mode = AnyMode(random);
  epilogue.residual_grad = dr.data();
  const bool in_place = (*random)() % 2 == 0;
  RunLocal(cpu,
           LocalBackwardParams{type, shape, 1e-3, false, dy.data(), x, of_batch, gamma, mean, var,
                               AnyMode(random), in_place ? dy.data() : dx.data(), AnyMode(random),
                               dgamma.data(), AnyMode(random), dbeta.data(), epilogue});
  Run(cpu, MomentsForwardParams{type, shape, x, nullptr, true, statistics.data()});
  void* const place = (*random)() % 3 == 0 ? nullptr : in_place ? dy.data() : g.data();
  Run(cpu, NormalizeBackwardParams{type, shape, 1e-3, false, dy.data(), x, statistics.data(), gamma,
                                   mean, var, place, sums, context, AnyMode(random), dgamma.data(),
                                   AnyMode(random), dbeta.data(), epilogue});
}

template <typename T, typename Parameter>
void Weighted(DataType type, const FeatureShape& shape, std::mt19937* random, const T* x,
              const T* g) {
  const std::size_t channels = shape.channels, size = channels * shape.count();
  const bool per_sample = (*random)() % 2 == 0;
  Array<Parameter> weights(per_sample ? shape.outer : shape.count(), 1);
  for (std::size_t i = 0; i < (per_sample ? shape.outer : shape.count()); ++i) {
    weights[i] = static_cast<Parameter>((*random)() % 3);
  }
  const PositionWeights how{weights.data(), per_sample ? std::size_t{1} : std::size_t{0}};
  Array<double> statistics(StatisticsSize(channels), 0), sums(StatisticsSize(channels), 1);
  Array<double> context(BackwardContextSize(channels), 0);
  Array<T> copy(size, 1), dx(size, 2);
  const Cpu cpu;
  RunWeighted(cpu, MomentsForwardParams{type, shape, x, copy.data(), true, statistics.data()}, how);
  RunWeighted(cpu,
              MomentsBackwardParams{type, shape, g, x, sums.data(), context.data(), AnyMode(random),
                                    dx.data()},
              how);
}

// Batch renormalization in the synchronized layer's kernels and in the unsynchronized layer, with
// limits or without: y is what it is by the correction that forward reports.
template <typename T, typename Parameter>
void Renormalized(DataType type, const FeatureShape& shape, std::mt19937* random, const T* x,
                  const T* given_dy, const Parameter* gamma, const Parameter* beta) {
  const std::size_t channels = shape.channels, size = channels * shape.count();
  Array<T> y(size, 1), dy(size, 2), dx(size, 3);
  Array<Parameter> mean(channels, 0), var(channels, 1), renorm_mean(channels, 2);
  Array<Parameter> renorm_stddev(channels, 0), dgamma(channels, 1), dbeta(channels, 2),
      batches(1, 0);
  Array<double> statistics(StatisticsSize(channels), 0), sums(StatisticsSize(channels), 0);
  Array<double> context(BackwardContextSize(channels), 0), local(LocalStatisticsSize(channels), 0);
  Array<double> correction(CorrectionSize(channels), 0);
  std::copy_n(given_dy, size, dy.data());
  std::fill_n(renorm_stddev.data(), channels, Parameter(2));
  const Cpu cpu;
  const double epsilon = 1e-3;
  NormalizeForwardParams forward{
      type,        shape,      epsilon,           0.9,     false, x, statistics.data(), gamma, beta,
      mean.data(), var.data(), WriteMode::kWrite, y.data()};
  forward.batches = (*random)() % 2 == 0 ? batches.data() : nullptr;
  const bool limited = (*random)() % 2 == 0;
  const double none = Renormalization::kNoLimit;
  forward.renorm = {0.99,
                    limited ? 0.5 : none,
                    limited ? 2.0 : none,
                    limited ? 0.1 : none,
                    renorm_mean.data(),
                    renorm_stddev.data(),
                    correction.data()};
  for (int steps = 0; steps < 2; ++steps) {
    Run(cpu, MomentsForwardParams{type, shape, x, nullptr, true, statistics.data()});
    Run(cpu, forward);
    if constexpr (std::is_same_v<T, double>) {
      for (std::size_t c = 0; size > 0 && c < channels; ++c) {
        const double n = statistics[2 * channels], variance = statistics[channels + c] / n;
        const double r = correction[2 * c], d = correction[2 * c + 1];
        if (limited && (r < 0.5 || r > 2.0 || std::fabs(d) > 0.1)) Fail("a limit");
        for (std::size_t i = 0; i < shape.count(); ++i) {
          const double hat = (x[At(shape, c, i)] - statistics[c]) / std::sqrt(variance + epsilon);
          Near(y[At(shape, c, i)], (hat * r + d) * gamma[c] + beta[c], "renormalized y");
        }
      }
    }
    Run(cpu, NormalizeBackwardParams{type,
                                     shape,
                                     epsilon,
                                     false,
                                     dy.data(),
                                     x,
                                     statistics.data(),
                                     gamma,
                                     mean.data(),
                                     var.data(),
                                     dy.data(),
                                     sums.data(),
                                     context.data(),
                                     AnyMode(random),
                                     dgamma.data(),
                                     AnyMode(random),
                                     dbeta.data(),
                                     {},
                                     correction.data()});
    Run(cpu, MomentsBackwardParams{type, shape, dy.data(), x, sums.data(), context.data(),
                                   AnyMode(random), dx.data()});
  }
  forward.statistics = nullptr;
  RunLocal(cpu, forward, local.data());
  RunLocal(cpu, LocalBackwardParams{type,
                                    shape,
                                    epsilon,
                                    false,
                                    dy.data(),
                                    x,
                                    local.data(),
                                    gamma,
                                    mean.data(),
                                    var.data(),
                                    AnyMode(random),
                                    dx.data(),
                                    AnyMode(random),
                                    dgamma.data(),
                                    AnyMode(random),
                                    dbeta.data(),
                                    {},
                                    correction.data()});
}

// Moving average batch normalization over several iterations: from the first, or from where r is
// used, or where the count of iterations goes back.
template <typename T, typename Parameter>
void MovingAverage(DataType type, const FeatureShape& shape, std::mt19937* random, const T* x,
                   const T* given_dy, const Parameter* gamma, const Parameter* beta) {
  const std::size_t channels = shape.channels, size = channels * shape.count();
  const MovingAverages averages{1 + (*random)() % 4, (*random)() % 4};
  Array<T> y(size, 1), dy(size, 2), copy(size, 0), dx(size, 3);
  Array<Parameter> running_var(channels, 1), dgamma(channels, 2), dbeta(channels, 0);
  Array<Parameter> buffer_x2(averages.buffer_size * channels, 0);
  Array<Parameter> buffer_gz(averages.buffer_size * channels, 1), iters(1, 0);
  Array<double> statistics(StatisticsSize(channels), 0), sums(BackwardSumsSize(channels), 0);
  Array<double> scales(MovingAverageScalesSize(channels), 0);
  Array<double> context(MovingAverageContextSize(channels), 0);
  std::copy_n(given_dy, size, dy.data());
  std::fill_n(running_var.data(), channels, Parameter(1));
  std::fill_n(buffer_x2.data(), averages.buffer_size * channels, Parameter(1));
  const double starts[] = {0, 998, 4194302};
  const double start = starts[(*random)() % 3];
  iters[0] = static_cast<Parameter>(start);
  const double epsilon = 1e-3;
  const Cpu cpu;
  for (int step = 0; step < 4; ++step) {
    const bool training = step != 2;  // or without statistics, as in inference
    const bool in_place = (*random)() % 2 == 0;
    T* const g = in_place ? dy.data() : copy.data();
    const WriteMode dx_mode = step == 0 ? WriteMode::kWrite : AnyMode(random);
    Run(cpu, MomentsForwardParams{type, shape, x, nullptr, training, statistics.data()});
    Run(cpu,
        MovingAverageForwardParams{type, shape, averages, epsilon, 0.9, false, x, statistics.data(),
                                   gamma, beta, running_var.data(), buffer_x2.data(), iters.data(),
                                   scales.data(), WriteMode::kWrite, y.data()});
    Run(cpu, MovingAverageSumsParams{type, shape, false, dy.data(), x, statistics.data(), gamma,
                                     scales.data(), g, sums.data(), context.data(), AnyMode(random),
                                     dgamma.data(), AnyMode(random), dbeta.data()});
    Run(cpu, MovingAverageBackwardParams{type, shape, averages, g, x, sums.data(), context.data(),
                                         buffer_gz.data(), dx_mode, dx.data()});
    if constexpr (std::is_same_v<T, double>) {
      for (std::size_t c = 0; step == 0 && start == 0 && size > 0 && c < channels; ++c) {
        const double n = static_cast<double>(shape.count());
        double x2 = 0, gz = 0;
        for (std::size_t i = 0; i < shape.count(); ++i) {
          x2 += x[At(shape, c, i)] * x[At(shape, c, i)] / n;
        }
        const double s = 1 / std::sqrt(x2 + epsilon);
        for (std::size_t i = 0; i < shape.count(); ++i) {
          gz += gamma[c] * dy[At(shape, c, i)] * s * x[At(shape, c, i)] / n;
        }
        for (std::size_t i = 0; i < shape.count(); ++i) {
          const double at = x[At(shape, c, i)], grad = gamma[c] * dy[At(shape, c, i)];
          Near(y[At(shape, c, i)], gamma[c] * s * at + beta[c], "y of a moving average");
          Near(dx[At(shape, c, i)], s * (grad - s * at * gz), "dx of a moving average");
        }
      }
    }
  }
}

template <typename T, typename Parameter>
void Step(DataType type, const FeatureShape& shape, std::mt19937* random) {
  const std::size_t channels = shape.channels, size = channels * shape.count();
  std::normal_distribution<double> normal(0.5, 2.0);
  const auto shift = [&] { return (*random)() % 5; };
  Array<T> x(size, shift()), copy(size, shift()), y(size, shift());
  Array<T> dy(size, shift()), dy_copy(size, shift()), dx(size, shift());
  Array<Parameter> gamma(channels, shift()), beta(channels, shift()), mean(channels, shift());
  Array<Parameter> var(channels, shift()), dgamma(channels, shift()), dbeta(channels, shift());
  Array<double> statistics(StatisticsSize(channels), 0), sums(StatisticsSize(channels), 0);
  Array<double> context(BackwardContextSize(channels), 0);
  Array<double> local(LocalStatisticsSize(channels), 0);
  for (std::size_t i = 0; i < size; ++i) {
    Set(normal(*random), &x[i]);
    Set(normal(*random), &dy[i]);
  }
  for (std::size_t c = 0; c < channels; ++c) {
    gamma[c] = static_cast<Parameter>(normal(*random));
    beta[c] = static_cast<Parameter>(normal(*random));
    var[c] = 1;
  }
  const double epsilon = 1e-3, momentum = 0.9;
  const bool in_place = (*random)() % 2 == 0, compute = (*random)() % 4 != 0;
  T* u = in_place ? x.data() : copy.data();
  T* g = in_place ? dy.data() : dy_copy.data();
  std::vector<T> dy_before(dy.data(), dy.data() + size);
  const Cpu cpu;
  Run(cpu, MomentsForwardParams{type, shape, x.data(), u, compute, statistics.data()});
  Run(cpu, NormalizeForwardParams{type, shape, epsilon, momentum, false, u, statistics.data(),
                                  gamma.data(), beta.data(), mean.data(), var.data(),
                                  WriteMode::kWrite, y.data()});
  Run(cpu,
      NormalizeBackwardParams{type, shape, epsilon, false, dy.data(), u, statistics.data(),
                              gamma.data(), mean.data(), var.data(), g, sums.data(), context.data(),
                              AnyMode(random), dgamma.data(), AnyMode(random), dbeta.data()});
  Run(cpu, MomentsBackwardParams{type, shape, g, u, sums.data(), context.data(), WriteMode::kWrite,
                                 dx.data()});
  if constexpr (std::is_same_v<T, double>) {
    for (std::size_t c = 0; compute && size > 0 && c < channels; ++c) {
      const double n = static_cast<double>(shape.count());
      const auto at = [&](std::size_t i) { return At(shape, c, i); };
      double m = 0, v = 0, b = 0, s = 0;
      for (std::size_t i = 0; i < shape.count(); ++i) m += u[at(i)] / n;
      for (std::size_t i = 0; i < shape.count(); ++i) v += (u[at(i)] - m) * (u[at(i)] - m) / n;
      const double invstd = 1 / std::sqrt(v + epsilon);
      for (std::size_t i = 0; i < shape.count(); ++i) {
        b += dy_before[at(i)] / n;
        s += dy_before[at(i)] * (u[at(i)] - m) * invstd / n;
      }
      for (std::size_t i = 0; i < shape.count(); ++i) {
        const double hat = (u[at(i)] - m) * invstd;
        Near(y[at(i)], hat * gamma[c] + beta[c], "y");
        Near(dx[at(i)], gamma[c] * invstd * (dy_before[at(i)] - b - hat * s), "dx");
      }
    }
  }
  // The unsynchronized layer, in all write modes.
  double* of_batch = compute ? local.data() : nullptr;
  RunLocal(cpu,
           {type, shape, epsilon, momentum, true, u, nullptr, gamma.data(), beta.data(),
            mean.data(), var.data(), AnyMode(random), y.data()},
           of_batch);
  RunLocal(cpu, LocalBackwardParams{type, shape, epsilon, true, g, u, of_batch, gamma.data(),
                                    mean.data(), var.data(), AnyMode(random), dx.data(),
                                    AnyMode(random), dgamma.data(), AnyMode(random), dbeta.data()});
  Epilogues<T, Parameter>(type, shape, random, of_batch, x.data(), dy.data(), gamma.data(),
                          beta.data(), mean.data(), var.data(), sums.data(), context.data());
  if (size < 1000000) {  // larger ones add nothing but time
    const bool moving = (*random)() % 2 == 0;
    (moving ? MovingAverage<T, Parameter> : Renormalized<T, Parameter>)(type, shape, random,
                                                                        x.data(), dy.data(),
                                                                        gamma.data(), beta.data());
  }
  if (shape.block == 1) Weighted<T, Parameter>(type, shape, random, x.data(), dy.data());
}

void Device(unsigned seed, int shapes) {
  std::mt19937 random(seed);
  const std::size_t inners[] = {1, 2, 3, 7, 16, 49, 64, 196, 1000};
  for (int i = 0; i < shapes; ++i) {
    FeatureShape shape;
    shape.inner = inners[random() % 9];
    shape.outer = random() % 8;  // 0: an array without elements
    shape.channels = 1 + random() % 70;
    if (random() % 2 == 0) {  // blocks of channels
      shape.block = 2 << (random() % 4);
      shape.channels = shape.block * (1 + random() % 4);
    }
    if (i % 50 == 0) shape = {4, 300, 4000};  // large enough for several blocks of channels
    if (i % 50 == 25) shape = {3000, 33, 1};
    if (i % 50 == 10) shape = {2, 288, 9000, 0, 16};
    if (i % 50 == 35) shape = {1, 16, 9000, 0, 8};
    switch (random() % 3) {
      case 0:
        Step<Bits16, float>(DataType::kFloat16, shape, &random);
        break;
      case 1:
        Step<float, float>(DataType::kFloat32, shape, &random);
        break;
      default:
        Step<double, double>(DataType::kFloat64, shape, &random);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed =
      argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device()();
  const int shapes = argc > 2 ? std::atoi(argv[2]) : 100;
  std::printf("kernels_stress: seed %u, %d shapes on each of 3 devices\n", seed, shapes);
  std::vector<std::thread> devices;
  for (unsigned i = 0; i < 3; ++i) devices.emplace_back(Device, seed + i, shapes);
  for (auto& device : devices) device.join();
  std::printf("kernels_stress: done\n");
}
