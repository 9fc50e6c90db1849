// A line of text for every round, for GLUON_SYNCBN_LOG.
#pragma once

#include <memory>
#include <string>

#include "exchange/round.h"

namespace gluon_syncbn {

class RoundLog {
 public:
  // `path`: of a file to append to, or "stderr".  Null if it cannot be opened.
  static std::shared_ptr<const RoundLog> Open(const std::string& path);
  ~RoundLog();
  RoundLog(const RoundLog&) = delete;
  RoundLog& operator=(const RoundLog&) = delete;

  // `error`: empty if it succeeded.
  void Write(const Round& round, const std::string& error) const;

 private:
  RoundLog(int file, bool owned) : file_(file), owned_(owned) {}

  const int file_;
  const bool owned_;
};

}  // namespace gluon_syncbn
