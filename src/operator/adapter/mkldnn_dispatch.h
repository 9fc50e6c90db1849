// Our operators take and give feature maps in MKL-DNN's layouts, where MXNet has them.
#pragma once

#include <string>

namespace gluon_syncbn {

// Empty if they do; otherwise why not: MXNet then reorders maps before and after them.  The first
// call, after MXNet has made operators of our properties, decides and tells MXNet.
const std::string& WhyNoMkldnnLayouts();

}  // namespace gluon_syncbn
