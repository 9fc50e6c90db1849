// See key_barrier.h.
#include "key_barrier.h"

#include <unistd.h>

#include <algorithm>
#include <sstream>

namespace gluon_syncbn {
namespace {

std::chrono::steady_clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(seconds));
}

// What would otherwise go into a round that it contradicts; empty when it fits.
std::string Contradiction(const Arrival& first, int round_devices, const Arrival& arrival) {
  std::ostringstream os;
  if (arrival.num_devices != round_devices) {
    os << arrival.name << " says num_devices=" << arrival.num_devices << ", but " << first.name
       << " says " << round_devices << "; give every device the same num_devices";
  } else if (arrival.values.size() != first.values.size()) {
    os << arrival.name << " brings " << arrival.values.size() << " values, but " << first.name
       << " brings " << first.values.size()
       << "; every device must bring the same shape (for a SyncBatchNorm layer: the same number "
          "of channels)";
  }
  return os.str();
}

}  // namespace

KeyBarrier::KeyBarrier(double timeout_seconds) : timeout_(Seconds(timeout_seconds)) {}

KeyBarrier::~KeyBarrier() {
  Close("the process is ending");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (!watch_.joinable()) return;
  // After a fork the thread exists in the parent only.
  if (watch_pid_ == getpid()) {
    watch_.join();
  } else {
    watch_.detach();
  }
}

void KeyBarrier::Arrive(Arrival arrival, Completion done) {
  Round complete{};
  std::vector<FailedRound> failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto aborted = aborted_.find(aborted_.count("") != 0 ? "" : arrival.key);
    if (!closed_.empty() || aborted != aborted_.end()) {
      Round refused{0, arrival.num_devices, Clock::now(), {}};
      refused.present.push_back({std::move(arrival), std::move(done)});
      ++failures_;
      failed.push_back({std::move(refused), closed_.empty() ? aborted->second : closed_});
    } else {
      const int members = arrival.lane == 0 ? MembersOf(arrival.key) : 0;
      if (members > 0) arrival.num_devices = members;
      const Lane lane{arrival.key, arrival.call, arrival.lane};
      auto& rounds = open_[lane];
      auto round = std::find_if(rounds.begin(), rounds.end(), [&](const Round& r) {
        return std::none_of(r.present.begin(), r.present.end(), [&](const Present& p) {
          return p.arrival.participant == arrival.participant;
        });
      });
      if (round == rounds.end()) {
        rounds.push_back({next_round_++, arrival.num_devices, Clock::now(), {}});
        round = std::prev(rounds.end());
      }
      const std::string contradiction =
          round->present.empty()
              ? std::string()
              : Contradiction(round->present.front().arrival, round->num_devices, arrival);
      round->present.push_back({std::move(arrival), std::move(done)});
      if (!contradiction.empty()) {
        std::string error = Describe(*round) + contradiction + ".";
        failed.push_back({std::move(*round), std::move(error)});
        ++failures_;
        rounds.erase(round);
      } else if (static_cast<int>(round->present.size()) >= round->num_devices) {
        complete = std::move(*round);
        rounds.erase(round);
      } else {
        StartWatch();
      }
      if (rounds.empty()) open_.erase(lane);
    }
  }
  if (!failed.empty()) Fail(std::move(failed), std::chrono::milliseconds(0));
  if (!complete.present.empty()) Complete(std::move(complete));
}

void KeyBarrier::Complete(Round round) {
  auto& present = round.present;
  std::sort(present.begin(), present.end(), [](const Present& a, const Present& b) {
    return a.arrival.participant < b.arrival.participant;
  });
  std::vector<double>& total = present.front().arrival.values;
  for (std::size_t i = 1; i < present.size(); ++i) {
    const std::vector<double>& values = present[i].arrival.values;
    for (std::size_t j = 0; j < total.size(); ++j) total[j] += values[j];
  }
  const Outcome outcome{&total, round.id, static_cast<int>(present.size()), ""};
  for (auto& p : present) p.done(outcome);
}

// The engine that MXNet 1.9.1 runs on keeps a list of failed operators without a lock around it
// (ThreadedEngine::AddToGlobalExceptions).  Two devices that fail at the same moment would both
// write to it, so the barrier's own thread leaves each a moment to pass its failure on.
void KeyBarrier::Fail(std::vector<FailedRound> failed, std::chrono::milliseconds pause) {
  bool first = true;
  for (auto& f : failed) {
    for (auto& p : f.round.present) {
      if (!first) std::this_thread::sleep_for(pause);
      first = false;
      p.done(Outcome{nullptr, 0, 0, f.error});
    }
  }
}

std::string KeyBarrier::Describe(const Round& round) const {
  const Arrival& first = round.present.front().arrival;
  std::ostringstream os;
  os << "KeyBarrierSum: the " << (first.lane == 0 ? "forward" : "backward") << " exchange of key '"
     << first.key << "' failed: ";
  return os.str();
}

// Takes the open rounds that the predicate picks out of the books.  The lock is held.
template <typename Predicate>
std::vector<KeyBarrier::FailedRound> KeyBarrier::TakeRounds(Predicate predicate,
                                                            const std::string& why) {
  std::vector<FailedRound> taken;
  for (auto lane = open_.begin(); lane != open_.end();) {
    auto& rounds = lane->second;
    for (auto round = rounds.begin(); round != rounds.end();) {
      if (predicate(*round)) {
        std::ostringstream os;
        os << Describe(*round) << why << " Arrived:";
        for (const auto& p : round->present) os << ' ' << p.arrival.name;
        os << "; missing: " << round->num_devices - static_cast<int>(round->present.size())
           << " of " << round->num_devices << ".";
        taken.push_back({std::move(*round), os.str()});
        ++failures_;
        round = rounds.erase(round);
      } else {
        ++round;
      }
    }
    lane = rounds.empty() ? open_.erase(lane) : std::next(lane);
  }
  return taken;
}

void KeyBarrier::SetMembers(const std::string& key, int num_devices) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (num_devices > 0) {
    members_[key] = num_devices;
  } else {
    members_.erase(key);
  }
}

int KeyBarrier::Members(const std::string& key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return MembersOf(key);
}

// The lock is held.
int KeyBarrier::MembersOf(const std::string& key) const {
  auto members = members_.find("");
  if (members == members_.end()) members = members_.find(key);
  return members == members_.end() ? 0 : members->second;
}

void KeyBarrier::Abort(const std::vector<std::string>& keys, const std::string& why) {
  std::vector<FailedRound> failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& key : keys) aborted_[key] = why;
    const bool all = aborted_.count("") != 0;
    failed = TakeRounds(
        [&](const Round& r) { return all || aborted_.count(r.present.front().arrival.key) != 0; },
        why);
  }
  Fail(std::move(failed), std::chrono::milliseconds(10));
}

void KeyBarrier::Resume(const std::vector<std::string>& keys) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& key : keys) aborted_.erase(key);
}

void KeyBarrier::Close(const std::string& why) {
  std::vector<FailedRound> failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_.empty()) closed_ = why;
    failed = TakeRounds([](const Round&) { return true; }, why + ".");
  }
  Fail(std::move(failed), std::chrono::milliseconds(10));
}

void KeyBarrier::SetTimeout(double seconds) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    timeout_ = Seconds(seconds);
    next_look_ = Clock::now();  // rounds that wait already fall under the new deadline
  }
  wake_.notify_all();
}

double KeyBarrier::Timeout() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::chrono::duration<double>(timeout_).count();
}

std::uint64_t KeyBarrier::Failures() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failures_;
}

// Deadlines come in the order in which rounds open, so a thread that already looks at some time
// before now + timeout need not be woken: in the steady state an arrival costs no system call.
void KeyBarrier::StartWatch() {
  const Clock::time_point deadline = Clock::now() + timeout_;
  const int pid = getpid();
  if (watch_pid_ != pid) {
    if (watch_.joinable()) watch_.detach();  // it stayed in the parent of a fork
    watch_pid_ = pid;
    next_look_ = deadline;
    watch_ = std::thread(&KeyBarrier::Watch, this);
  } else if (deadline < next_look_) {
    next_look_ = deadline;
    wake_.notify_all();
  }
}

void KeyBarrier::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    if (Clock::now() < next_look_) {
      wake_.wait_until(lock, next_look_);
      continue;
    }
    const Clock::time_point now = Clock::now();
    std::ostringstream why;
    why << "not every device came within " << std::chrono::duration<double>(timeout_).count()
        << " s. Check that every device runs this layer equally often in every step and that "
           "num_devices is the number of devices that do; a longer deadline: "
           "GLUON_SYNCBN_TIMEOUT or gluon_syncbn.set_timeout.";
    std::vector<FailedRound> failed =
        TakeRounds([&](const Round& r) { return now - r.opened >= timeout_; }, why.str());
    next_look_ = now + timeout_;
    for (const auto& lane : open_) {
      for (const auto& round : lane.second) {
        next_look_ = std::min(next_look_, round.opened + timeout_);
      }
    }
    if (!failed.empty()) {
      lock.unlock();
      Fail(std::move(failed), std::chrono::milliseconds(10));
      lock.lock();
    }
  }
}

}  // namespace gluon_syncbn
