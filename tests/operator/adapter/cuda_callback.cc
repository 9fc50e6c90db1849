// Reads numbers from a GPU in a callback through which no exception may pass; see
// test_cuda_library.py.  Compiled twice: as a stand-in for libgluon_syncbn_cuda.so, and as the
// program that calls it.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "adapter/cuda_library.h"
#include "kernels/cuda/functions.h"

#ifdef CUDA_SIDE

// Calls `done` as a C library would: an exception cannot pass.
GLUON_SYNCBN_CUDA(ReadValues, int, gluon_syncbn::DataType, const void* from, std::size_t count,
                  GluonSyncBNValuesRead done, void* data) {
  [&]() noexcept { done(data, static_cast<const double*>(from), count, nullptr); }();
  return nullptr;
}

#else

int main() {
  const double value = 5;
  std::string told;
  gluon_syncbn::ReadValues(0, gluon_syncbn::DataType::kFloat64, &value, 1,
                           [&](std::vector<double> values, const std::string& error) {
                             told += error.empty() ? std::to_string(values.at(0)) : error;
                             if (error.empty()) throw std::runtime_error(" then it broke");
                           });
  std::puts(told.c_str());
}

#endif
