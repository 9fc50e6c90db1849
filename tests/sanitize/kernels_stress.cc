// A stress of the CPU's kernels for the sanitizers: random shapes, types, requests and places of
// the arrays, by several threads at once as with several devices, each array exactly as long as it
// is said to be.  The results of float64 are compared with plain loops.
//
//   kernels_stress [seed] [shapes]
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "kernels/batch_norm_kernels.h"

namespace {

using namespace gluon_syncbn;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "kernels_stress: %s\n", what);
  std::abort();
}

// An array in memory of its own, `shift` elements from where that begins.
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

struct Bits16 {  // what a float16 is made of
  std::uint16_t bits = 0;
};
void Set(double value, double* to) { *to = value; }
void Set(double value, float* to) { *to = static_cast<float>(value); }
void Set(double value, Bits16* to) {  // powers of 2 from 2^-3 to 2^4, and their negatives
  const int exponent = static_cast<int>(std::fabs(value) * 2) % 8;
  to->bits = static_cast<std::uint16_t>((value < 0 ? 0x8000 : 0) | ((12 + exponent) << 10));
}

Request AnyRequest(std::mt19937* random) { return static_cast<Request>((*random)() % 3); }

void Near(double got, double wanted, const char* what) {
  if (!(std::fabs(got - wanted) <= 1e-9 * (1 + std::fabs(wanted)))) Fail(what);
}

template <typename T, typename Parameter>
void Step(DataType type, const FeatureShape& shape, std::mt19937* random) {
  const std::size_t channels = shape.channels, size = channels * shape.count();
  std::normal_distribution<double> normal(0.5, 2.0);
  const auto shift = [&] { return (*random)() % 5; };
  Array<T> x(size, shift()), handed(size, shift()), y(size, shift());
  Array<T> dy(size, shift()), du(size, shift()), dx(size, shift());
  Array<Parameter> gamma(channels, shift()), beta(channels, shift()), mean(channels, shift());
  Array<Parameter> var(channels, shift()), dgamma(channels, shift()), dbeta(channels, shift());
  Array<double> statistics(StatisticsSize(channels), 0), sums(StatisticsSize(channels), 0);
  Array<double> coefficients(CoefficientsSize(channels), 0);
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
  const bool in_place = (*random)() % 2 == 0, measure = (*random)() % 4 != 0;
  T* u = in_place ? x.data() : handed.data();
  T* g = in_place ? dy.data() : du.data();
  std::vector<T> dy_before(dy.data(), dy.data() + size);
  const Cpu cpu;
  Run(cpu, MomentsForward{type, shape, x.data(), u, measure, statistics.data()});
  Run(cpu,
      NormalizeForward{type, shape, epsilon, momentum, false, u, statistics.data(), gamma.data(),
                       beta.data(), mean.data(), var.data(), Request::kWrite, y.data()});
  Run(cpu, NormalizeBackward{type, shape, epsilon, false, dy.data(), u, statistics.data(),
                             gamma.data(), mean.data(), var.data(), Request::kWrite, g, sums.data(),
                             coefficients.data(), AnyRequest(random), dgamma.data(),
                             AnyRequest(random), dbeta.data()});
  Run(cpu, MomentsBackward{type, shape, g, u, sums.data(), coefficients.data(), Request::kWrite,
                           dx.data()});
  if constexpr (std::is_same_v<T, double>) {
    for (std::size_t c = 0; measure && size > 0 && c < channels; ++c) {
      const double n = static_cast<double>(shape.count());
      const auto at = [&](std::size_t i) {
        return (i / shape.inner * channels + c) * shape.inner + i % shape.inner;
      };
      double m = 0, v = 0, b = 0, s = 0;
      for (std::size_t i = 0; i < shape.count(); ++i) m += u[at(i)] / n;
      for (std::size_t i = 0; i < shape.count(); ++i) v += (u[at(i)] - m) * (u[at(i)] - m) / n;
      const double r = 1 / std::sqrt(v + epsilon);
      for (std::size_t i = 0; i < shape.count(); ++i) {
        b += dy_before[at(i)] / n;
        s += dy_before[at(i)] * (u[at(i)] - m) * r / n;
      }
      for (std::size_t i = 0; i < shape.count(); ++i) {
        const double hat = (u[at(i)] - m) * r;
        Near(y[at(i)], hat * gamma[c] + beta[c], "y");
        Near(dx[at(i)], gamma[c] * r * (dy_before[at(i)] - b - hat * s), "dx");
      }
    }
  }
  // The layer that exchanges nothing, added to what is there.
  RunAlone(cpu,
           {type, shape, epsilon, momentum, true, u, nullptr, gamma.data(), beta.data(),
            mean.data(), var.data(), AnyRequest(random), y.data()},
           measure ? local.data() : nullptr);
  RunAlone(cpu, {type, shape, epsilon, true, g, u, measure ? local.data() : nullptr, gamma.data(),
                 mean.data(), var.data(), AnyRequest(random), dx.data(), nullptr, nullptr,
                 AnyRequest(random), dgamma.data(), AnyRequest(random), dbeta.data()});
}

void Device(unsigned seed, int shapes) {
  std::mt19937 random(seed);
  const std::size_t inners[] = {1, 2, 3, 7, 16, 49, 64, 196, 1000};
  for (int i = 0; i < shapes; ++i) {
    FeatureShape shape;
    shape.inner = inners[random() % 9];
    shape.outer = random() % 8;  // 0: an array without elements
    shape.channels = 1 + random() % 70;
    if (i % 50 == 0) shape = {4, 300, 4000};  // large enough to be cut into slices
    if (i % 50 == 25) shape = {3000, 33, 1};
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
