// See round_log.h.
#include "exchange/round_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <sstream>

#include "exchange/transport.h"

namespace gluon_syncbn {
namespace {

std::string Now() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  tm local{};
  localtime_r(&now.tv_sec, &local);
  char text[32], microseconds[24];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &local);
  std::snprintf(microseconds, sizeof microseconds, ".%06ld", now.tv_nsec / 1000);
  return std::string(text) + microseconds;
}

Clock::time_point LastCame(const Round& round) {
  Clock::time_point last = round.opened;
  for (const Present& p : round.present) last = std::max(last, p.came);
  return last;
}

// A key may have any characters; a round has one line.
std::string OneLine(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < ' ' || c == '\x7f') c = '?';
  }
  return text;
}

}  // namespace

std::shared_ptr<const RoundLog> RoundLog::Open(const std::string& path) {
  if (path == "stderr") return std::shared_ptr<const RoundLog>(new RoundLog(STDERR_FILENO, false));
  // O_NONBLOCK: for a pipe that nobody reads.
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0666);
  if (file < 0) return nullptr;
  return std::shared_ptr<const RoundLog>(new RoundLog(file, true));
}

RoundLog::~RoundLog() {
  if (owned_) close(file_);
}

void RoundLog::Write(const Round& round, const std::string& error) const {
  const Clock::time_point complete = error.empty() ? LastCame(round) : Clock::now();
  const Arrival& first = round.present.front().arrival;
  std::ostringstream os;
  os.setf(std::ios::fixed);
  os.precision(3);
  os << Now() << " gluon_syncbn[" << getpid() << "]: " << (first.backward ? "backward" : "forward")
     << " '" << OneLine(first.key) << "' call " << first.call << " pass " << first.pass << " round "
     << round.id << (error.empty() ? ":" : " FAILED:");
  const char* separator = " ";
  for (const Present& p : round.present) {
    os << separator << p.arrival.name << " waited " << 1e3 * Seconds(complete - p.came) << " ms";
    separator = ", ";
  }
  if (error.empty() && (round.id & Transport::kElsewhere) != 0) {
    os << ", " << 1e3 * Seconds(Clock::now() - complete) << " ms in other processes";
  }
  if (!error.empty()) os << "; " << OneLine(error);
  os << '\n';
  // One call, so that lines of several threads and processes do not mix, and no lock, which a fork
  // could copy in use.
  const std::string line = os.str();
  if (write(file_, line.data(), line.size()) < 0) return;  // a full disk stops no training
}

}  // namespace gluon_syncbn
