// The transport of a process that may not use its parent's connections.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "exchange/transport.h"

namespace gluon_syncbn {

class RefusingTransport : public Transport {
 public:
  explicit RefusingTransport(std::string why) : why_(std::move(why)) {}
  void AllReduce(Contribution, std::function<void(const Outcome&)> done) override {
    done({nullptr, 0, why_, false});
  }
  void FailedHere(const std::string&, const std::string&) override {}
  void SetTimeout(double) override {}

 private:
  const std::string why_;
};

}  // namespace gluon_syncbn
