#include "exchange/process_barrier.h"

#include <cstdlib>
#include <memory>

namespace gluon_syncbn {

namespace {

double FirstTimeout() {
  const char* value = std::getenv("GLUON_SYNCBN_TIMEOUT");
  const double seconds = value == nullptr ? 0.0 : std::atof(value);
  return seconds > 0 ? seconds : 120.0;  // Python has rejected anything but positive numbers
}

// Python has checked that it can be opened.
std::shared_ptr<const RoundLog> Log() {
  const char* path = std::getenv("GLUON_SYNCBN_LOG");
  return path == nullptr || *path == '\0' ? nullptr : RoundLog::Open(path);
}

}  // namespace

std::shared_ptr<KeyBarrier> ProcessBarrier() {
  static const auto barrier = std::make_shared<KeyBarrier>(FirstTimeout(), Log());
  return barrier;
}

}  // namespace gluon_syncbn
