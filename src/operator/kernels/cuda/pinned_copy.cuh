// Small arrays on their way between a GPU and the exchange, through pinned memory.
#pragma once

#include "kernels/cuda/functions.h"

namespace gluon_syncbn {

// See functions.h.
void ReadDeviceValues(int device, DataType type, const void* from, std::size_t count,
                      GluonSyncBNValuesRead done, void* data);
void WriteDeviceValues(const Gpu& gpu, DataType type, WriteMode mode, const double* from,
                       std::size_t count, void* to);

}  // namespace gluon_syncbn
