// libgluon_syncbn_cuda.so, the CUDA side, as libgluon_syncbn.so sees it.
//
// It is a library of its own, opened by the first operator on a GPU: nothing of CUDA is needed, or
// touched, where there is no GPU, and the CPU side is the same with it and without it.  The kernels
// of batch_norm_kernels.h for Gpu are defined here, as calls into it.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// Throws where the library is missing, was built without CUDA, or does not load.
void NeedCudaLibrary();

// See kernels/cuda/functions.h.  `done` gets the numbers, or why there are none.  What it throws when it
// gets numbers, it gets as an error then.
using ValuesRead = std::function<void(std::vector<double> values, const std::string& error)>;
void ReadValues(int device, DataType type, const void* from, std::size_t count, ValuesRead done);
void WriteValues(const Gpu& gpu, DataType type, Request request, const std::vector<double>& from,
                 void* to);

}  // namespace gluon_syncbn
