// libgluon_syncbn_cuda.so, the CUDA side, as libgluon_syncbn.so uses it.
//
// It is a library of its own, opened by the first operator on a GPU, so that machines without a GPU
// need nothing of CUDA and the CPU side is the same with and without it.  cuda_library.cc defines
// the GPU functions of batch_norm_kernels.h as calls into it.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// Throws std::runtime_error, which says what to do, if the library is missing or does not load.
void RequireCudaLibrary();

// See kernels/cuda/functions.h.  `done` gets the numbers, or the reason why there are none.  If it
// throws when it gets the numbers, it is called again with the exception's message.
using ValuesRead = std::function<void(std::vector<double> values, const std::string& error)>;
void ReadValues(int device, DataType type, const void* from, std::size_t count, ValuesRead done);
void WriteValues(const Gpu& gpu, DataType type, WriteMode mode, const std::vector<double>& from,
                 void* to);

}  // namespace gluon_syncbn
