// From the type that a call names to that of C++.
#pragma once

#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// Calls visit(an element of the type); `Half` is what float16 is on this kind of device.
template <typename Half, typename Visit>
void WithType(DataType type, const Visit& visit) {
  switch (type) {
    case DataType::kFloat16:
      return visit(Half{});
    case DataType::kFloat32:
      return visit(float{});
    case DataType::kFloat64:
      return visit(double{});
  }
}

}  // namespace gluon_syncbn
