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
  if (arrival.kind != first.kind) {
    os << first.name << " and " << arrival.name << " cannot meet: all devices of a key must be of "
       << "one kind, " << first.kind << " or " << arrival.kind;
  } else if (arrival.num_devices != round_devices) {
    os << arrival.name << " says num_devices=" << arrival.num_devices << ", but " << first.name
       << " says " << round_devices << "; give every device the same num_devices";
  } else if (arrival.merge != first.merge) {
    os << first.name << " and " << arrival.name << " bring different things under one key: a "
       << "KeyBarrierSum and a SyncBatchNorm layer must have different ones";
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
  Ended ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back({Clock::now(), {std::move(arrival), std::move(done)}});
    Advance(&ended);
  }
  Tell(std::move(ended));
}

std::uint64_t KeyBarrier::Reserve(const std::string& key, int call, std::uint64_t participant) {
  std::lock_guard<std::mutex> lock(mutex_);
  turns_[{key, call, participant}].insert(next_turn_);
  return next_turn_++;
}

void KeyBarrier::Release(const std::string& key, int call, std::uint64_t participant,
                         std::uint64_t turn) {
  Ended ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    DropTurn({key, call, participant}, turn);
    Advance(&ended);
  }
  Tell(std::move(ended));
}

// The lock is held.
void KeyBarrier::DropTurn(const Queue& queue, std::uint64_t turn) {
  const auto turns = turns_.find(queue);
  if (turns == turns_.end()) return;
  turns->second.erase(turn);
  if (turns->second.empty()) turns_.erase(turns);
}

bool KeyBarrier::HasTurn(const Arrival& arrival) const {
  if (arrival.turn == 0) return true;
  const auto queue = turns_.find({arrival.key, arrival.call, arrival.participant});
  return queue == turns_.end() || *queue->second.begin() >= arrival.turn;
}

// Lets everybody join who has the turn, until nobody is left who has.  The lock is held.
void KeyBarrier::Advance(Ended* ended) {
  for (;;) {
    const auto next = std::find_if(waiting_.begin(), waiting_.end(),
                                   [this](const Waiting& w) { return HasTurn(w.present.arrival); });
    if (next == waiting_.end()) break;
    Present present = std::move(next->present);
    waiting_.erase(next);
    const Arrival& arrival = present.arrival;
    DropTurn({arrival.key, arrival.call, arrival.participant}, arrival.turn);
    Join(std::move(present), ended);
  }
  if (!waiting_.empty() || !open_.empty()) StartWatch();
}

// The lock is held.
void KeyBarrier::Join(Present present, Ended* ended) {
  Arrival& arrival = present.arrival;
  const auto aborted = aborted_.find(aborted_.count("") != 0 ? "" : arrival.key);
  if (!closed_.empty() || aborted != aborted_.end()) {
    Round refused{0, arrival.num_devices, Clock::now(), {}};
    refused.present.push_back(std::move(present));
    ++failures_;
    ended->failed.push_back({std::move(refused), closed_.empty() ? aborted->second : closed_});
    return;
  }
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
  round->present.push_back(std::move(present));
  if (!contradiction.empty()) {
    std::string error = Describe(round->present.front().arrival) + contradiction + ".";
    ended->failed.push_back({std::move(*round), std::move(error)});
    ++failures_;
    rounds.erase(round);
  } else if (static_cast<int>(round->present.size()) >= round->num_devices) {
    ended->complete.push_back(std::move(*round));
    rounds.erase(round);
  }
  if (rounds.empty()) open_.erase(lane);
}

void KeyBarrier::Tell(Ended ended) {
  Fail(std::move(ended.failed), std::chrono::milliseconds(0));
  for (auto& round : ended.complete) Complete(std::move(round));
}

void KeyBarrier::SortByParticipant(std::vector<Present>* present) {
  std::sort(present->begin(), present->end(), [](const Present& a, const Present& b) {
    return a.arrival.participant < b.arrival.participant;
  });
}

void KeyBarrier::Complete(Round round) {
  auto& present = round.present;
  SortByParticipant(&present);
  Arrival& first = present.front().arrival;
  std::vector<double>& total = first.values;
  for (std::size_t i = 1; i < present.size(); ++i) {
    MergeInto(first.merge, present[i].arrival.values, &total);
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

std::string KeyBarrier::Describe(const Arrival& first) {
  std::ostringstream os;
  os << "KeyBarrierSum: the " << (first.lane == 0 ? "forward" : "backward") << " exchange of key '"
     << first.key << "' failed: ";
  return os.str();
}

// Takes what the predicate(key, since) picks out of the books: open rounds, and arrivals that wait
// for their turn.  The lock is held.
template <typename Predicate>
std::vector<KeyBarrier::FailedRound> KeyBarrier::TakeRounds(Predicate predicate,
                                                            const std::string& why) {
  std::vector<FailedRound> taken;
  for (auto lane = open_.begin(); lane != open_.end();) {
    auto& rounds = lane->second;
    for (auto round = rounds.begin(); round != rounds.end();) {
      if (predicate(round->present.front().arrival.key, round->opened)) {
        SortByParticipant(&round->present);
        std::ostringstream os;
        os << Describe(round->present.front().arrival) << why << " Arrived:";
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
  for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
    if (!predicate(waiting->present.arrival.key, waiting->since)) {
      ++waiting;
      continue;
    }
    const std::string error = Describe(waiting->present.arrival) + why +
                              " An earlier call with this key on " + waiting->present.arrival.name +
                              " has not run yet.";
    const Arrival& arrival = waiting->present.arrival;
    DropTurn({arrival.key, arrival.call, arrival.participant}, arrival.turn);
    Round round{0, waiting->present.arrival.num_devices, waiting->since, {}};
    round.present.push_back(std::move(waiting->present));
    taken.push_back({std::move(round), error});
    ++failures_;
    waiting = waiting_.erase(waiting);
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
        [&](const std::string& key, Clock::time_point) { return all || aborted_.count(key) != 0; },
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
    failed = TakeRounds([](const std::string&, Clock::time_point) { return true; }, why + ".");
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
        << " s. A network that was trained through ModelDataParallel waits for all its devices "
           "when it is called by itself: call it through ModelDataParallel(net, [context]). "
           "Otherwise "
           "check that every device runs this layer equally often in every step and that "
           "num_devices is the number of devices that do. A longer deadline: GLUON_SYNCBN_TIMEOUT "
           "or gluon_syncbn.set_timeout.";
    std::vector<FailedRound> failed = TakeRounds(
        [&](const std::string&, Clock::time_point since) { return now - since >= timeout_; },
        why.str());
    Ended ended;
    Advance(&ended);  // who waited for the turn of what has just failed
    next_look_ = now + timeout_;
    for (const auto& lane : open_) {
      for (const auto& round : lane.second) {
        next_look_ = std::min(next_look_, round.opened + timeout_);
      }
    }
    for (const auto& w : waiting_) next_look_ = std::min(next_look_, w.since + timeout_);
    lock.unlock();
    Fail(std::move(failed), std::chrono::milliseconds(10));
    Tell(std::move(ended));
    lock.lock();
  }
}

}  // namespace gluon_syncbn
