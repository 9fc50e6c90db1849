// See key_barrier.h.
#include "exchange/key_barrier.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <sstream>
#include <system_error>

#include "exchange/diagnosis.h"

namespace gluon_syncbn {
namespace {

// A timeout, limited to what keeps the watching thread from spinning and fits the clock.
Clock::duration ToTimeout(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(std::min(1e9, std::max(1e-3, seconds))));
}

// No arrival of an earlier pass is still to come.
constexpr std::size_t kRemembered = 4096;

struct Contradiction {
  Failure failure = Failure::kNone;
  std::string message;
};

// In what `arrival` contradicts the first arrival of its round, if in anything.
Contradiction FindContradiction(const Arrival& first, int round_devices, const Arrival& arrival) {
  std::ostringstream os;
  Failure failure = Failure::kOther;
  if (arrival.kind != first.kind) {
    os << first.name << " and " << arrival.name << " cannot meet: all devices of a key must be of "
       << "one kind, " << first.kind << " or " << arrival.kind;
  } else if (arrival.num_devices != round_devices) {
    os << arrival.name << " says num_devices=" << arrival.num_devices << ", but " << first.name
       << " says " << round_devices << "; give every device the same num_devices";
  } else if (arrival.merge != first.merge) {
    failure = Failure::kDifferentMerge;
    os << first.name << " and " << arrival.name
       << " bring different things under one key, a vector to sum and statistics to merge";
  } else if (arrival.values.size() != first.values.size()) {
    failure = Failure::kDifferentLength;
    os << arrival.name << " brings " << arrival.values.size() << " values, but " << first.name
       << " brings " << first.values.size() << "; every device must bring the same shape";
  } else {
    return {};
  }
  return {failure, os.str() + "."};
}

}  // namespace

KeyBarrier::KeyBarrier(double timeout_seconds, std::shared_ptr<const RoundLog> log)
    : timeout_(ToTimeout(timeout_seconds)), log_(std::move(log)) {}

KeyBarrier::~KeyBarrier() {
  Close("the process is ending");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (watch_.joinable()) watch_.join();
}

void KeyBarrier::RestartInChild(double timeout_seconds) {
  const std::uint64_t next_ticket = next_ticket_, next_id = next_id_, failures = failures_;
  const std::shared_ptr<const RoundLog> log = log_;  // never changed, so it is known
  // The old object is not destroyed, because its state is unknown.
  KeyBarrier* const restarted = new (this) KeyBarrier(timeout_seconds, log);
  restarted->next_ticket_ = next_ticket;  // tickets and passes from before the fork remain unique
  restarted->next_id_ = next_id;
  restarted->failures_ = failures;
}

void KeyBarrier::Arrive(Arrival arrival, Completion done) {
  Ended ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const Clock::time_point now = Clock::now();
    waiting_.push_back({now, {std::move(arrival), std::move(done), {}}, ""});
    Advance(now, &ended);
  }
  Notify(std::move(ended));
}

std::uint64_t KeyBarrier::TakeTicket(const std::string& key, int call, std::uint64_t participant,
                                     std::uint64_t pass) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (aborted_.count(pass) == 0) tickets_[{key, call, participant}][next_ticket_] = pass;
  return next_ticket_++;
}

void KeyBarrier::ReturnTicket(const std::string& key, int call, std::uint64_t participant,
                              std::uint64_t ticket) {
  Ended ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    DropTicket({key, call, participant}, ticket);
    Advance(Clock::now(), &ended);
  }
  Notify(std::move(ended));
}

// The lock is held.
void KeyBarrier::DropTicket(const Queue& queue, std::uint64_t ticket) {
  const auto tickets = tickets_.find(queue);
  if (tickets == tickets_.end()) return;
  tickets->second.erase(ticket);
  if (tickets->second.empty()) tickets_.erase(tickets);
}

// The engine does not run a call whose input has failed, so its ticket may never be used, and is
// not returned before the program forgets the call's result.  The lock is held.
void KeyBarrier::DropTicketsOfEndedPasses() {
  for (auto queue = tickets_.begin(); queue != tickets_.end();) {
    auto& tickets = queue->second;
    for (auto ticket = tickets.begin(); ticket != tickets.end();) {
      ticket = aborted_.count(ticket->second) != 0 ? tickets.erase(ticket) : std::next(ticket);
    }
    queue = tickets.empty() ? tickets_.erase(queue) : std::next(queue);
  }
}

bool KeyBarrier::IsNext(const Arrival& arrival) const {
  if (arrival.ticket == 0) return true;
  const auto queue = tickets_.find({arrival.key, arrival.call, arrival.participant});
  return queue == tickets_.end() || queue->second.begin()->first >= arrival.ticket;
}

// Lets waiting arrivals join, as long as there is one that is next.  The lock is held.
void KeyBarrier::Advance(Clock::time_point now, Ended* ended) {
  for (;;) {
    const auto next = std::find_if(waiting_.begin(), waiting_.end(),
                                   [this](const Waiting& w) { return IsNext(w.present.arrival); });
    if (next == waiting_.end()) {
      if (EndPasses(&ended->failed)) continue;
      break;
    }
    Waiting waiting = std::move(*next);
    waiting.present.came = now;
    waiting_.erase(next);
    const Arrival& arrival = waiting.present.arrival;
    DropTicket({arrival.key, arrival.call, arrival.participant}, arrival.ticket);
    Join(std::move(waiting.present), waiting.failed, ended);
  }
  if (waiting_.empty() && open_.empty()) return;
  try {
    StartWatch(now);
  } catch (const std::system_error& e) {
    // Without the thread, arrivals that wait would have no deadline.
    std::ostringstream why;
    why << "no thread could be started to watch over the deadline (" << e.what()
        << "). Allow this process more threads (\"ulimit -u\", or a container's limit of "
           "processes), or use fewer.";
    for (auto& failed :
         TakeRounds([](const Arrival&, Clock::time_point) { return true; }, why.str())) {
      ended->failed.push_back(std::move(failed));
    }
  }
}

// `failed`: why the arrival has failed, if it has: its round will not be complete.  The lock is
// held.
void KeyBarrier::Join(Present present, const std::string& failed, Ended* ended) {
  Arrival& arrival = present.arrival;
  const Phase phase{arrival.key, arrival.call, arrival.phase};
  auto& rounds = open_[phase];
  auto round = std::find_if(rounds.begin(), rounds.end(), [&](const Round& r) {
    return std::none_of(r.present.begin(), r.present.end(), [&](const Present& p) {
      return p.arrival.participant == arrival.participant;
    });
  });
  std::string refusal;
  if (!arrival.backward && arrival.phase == 0) {
    const auto id = round == rounds.end() ? next_id_ : round->id;
    refusal = missed_.Refusal({arrival.key, arrival.call}, arrival, id);
    if (!refusal.empty()) refusal = Describe(arrival) + refusal;
  }
  const auto aborted = aborted_.find(arrival.pass);
  if (aborted != aborted_.end()) refusal = Describe(arrival) + aborted->second;
  if (!closed_.empty()) refusal = closed_;
  if (!refusal.empty()) {
    if (rounds.empty()) open_.erase(phase);
    Round refused{0, arrival.num_devices, present.came, {}};
    refused.present.push_back(std::move(present));
    ended->failed.push_back(CountedFailure(std::move(refused), std::move(refusal)));
    return;
  }
  if (round == rounds.end()) {
    rounds.push_back({next_id_++, arrival.num_devices, present.came, {}});
    round = std::prev(rounds.end());
  }
  const Contradiction contradiction =
      round->present.empty()
          ? Contradiction()
          : FindContradiction(round->present.front().arrival, round->num_devices, arrival);
  round->present.push_back(std::move(present));
  if (!failed.empty() && round->present.size() == 1) {  // counted before
    NoteMissed(*round, failed, round->present.front().came);
    rounds.erase(round);
  } else if (!failed.empty() || contradiction.failure != Failure::kNone) {
    std::string error =
        failed.empty() ? Describe(round->present.front().arrival) + contradiction.message : failed;
    ended->failed.push_back(
        CountedFailure(std::move(*round), std::move(error), contradiction.failure));
    rounds.erase(round);
  } else if (static_cast<int>(round->present.size()) >= round->num_devices) {
    KeyNotes& notes = notes_[std::get<0>(phase)];
    CompleteRound complete{std::move(*round), notes.transport, false};
    rounds.erase(round);
    // Backward, it takes the way of its forward.
    const Arrival& last = complete.round.present.back().arrival;
    complete.goes_on =
        last.backward ? (last.phase & Transport::kElsewhere) != 0 : complete.transport != nullptr;
    if (!complete.goes_on) {
      records_.Add(RecordOf(std::get<0>(phase), &notes), complete.round, true,
                   complete.round.present.back().came);
    }
    ended->complete.push_back(std::move(complete));
  }
  if (rounds.empty()) open_.erase(phase);
}

KeyRecord* KeyBarrier::RecordOf(const std::string& key, KeyNotes* notes) {
  if (notes->record == nullptr) notes->record = &records_.Of(key);
  return notes->record;
}

// Ends the passes of rounds that have failed.  Returns whether any did.  The lock is held.
bool KeyBarrier::EndPasses(std::vector<FailedRound>* failed) {
  bool any = false;
  for (std::size_t i = 0; i < failed->size(); ++i) {
    const FailedRound& first = (*failed)[i];
    const Failure failure = first.failure;
    const Diagnosis diagnosis = first.diagnosis;
    const std::string why = "its pass had failed before: ", error = first.error;
    const std::string for_later =
        why + diagnosis.text + (diagnosis.text.empty() ? "" : " ") + error;
    std::set<std::uint64_t> passes;
    for (const auto& p : first.round.present) {
      const std::uint64_t pass = p.arrival.pass;
      if (pass != 0 && aborted_.emplace(pass, for_later).second) passes.insert(pass);
    }
    if (passes.empty()) continue;
    any = true;
    for (auto& also : TakeRounds([&](const Arrival& arrival,
                                     Clock::time_point) { return passes.count(arrival.pass) != 0; },
                                 why + error)) {
      also.failure = failure;
      also.diagnosis = diagnosis;
      failed->push_back(std::move(also));
    }
  }
  if (any) DropTicketsOfEndedPasses();
  while (aborted_.size() > kRemembered) aborted_.erase(aborted_.begin());
  return any;
}

void KeyBarrier::Notify(Ended ended) {
  Fail(std::move(ended.failed));
  for (auto& complete : ended.complete) Complete(std::move(complete));
}

void KeyBarrier::SortByParticipant(std::vector<Present>* present) {
  std::sort(present->begin(), present->end(), [](const Present& a, const Present& b) {
    return a.arrival.participant < b.arrival.participant;
  });
}

void KeyBarrier::Complete(CompleteRound complete) {
  auto& present = complete.round.present;
  SortByParticipant(&present);
  Arrival& first = present.front().arrival;
  std::vector<double> total = std::move(first.values);
  for (std::size_t i = 1; i < present.size(); ++i) {
    MergeInto(first.merge, present[i].arrival.values, &total);
  }
  if (!complete.goes_on) return Succeed(complete.round, total);
  if (complete.transport == nullptr) {
    return FailFrom(
        std::move(complete.round),
        {nullptr, 0,
         "its forward went through other processes, and it was detached from them since; run "
         "forward and backward with the same processes",
         false});
  }
  Contribution contribution{
      first.key,   first.call,       first.backward, first.backward ? first.phase : 0,
      first.merge, std::move(total), first.spin};
  // Shared, because a std::function is copied.
  const auto round = std::make_shared<Round>(std::move(complete.round));
  complete.transport->AllReduce(std::move(contribution), [this, round](const Outcome& outcome) {
    if (outcome.total == nullptr) return FailFrom(std::move(*round), outcome);
    round->id = outcome.round;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const std::string& key = round->present.front().arrival.key;
      records_.Add(RecordOf(key, &notes_[key]), *round, true, Clock::now());
    }
    Succeed(*round, *outcome.total);
  });
}

void KeyBarrier::Succeed(const Round& round, const std::vector<double>& total) const {
  if (log_ != nullptr) log_->Write(round, "");
  Result result;
  result.total = &total;
  result.round = round.id;
  result.num_devices = static_cast<int>(round.present.size());
  for (const auto& p : round.present) p.done(result);
}

// Fails a round that was complete in this process.
void KeyBarrier::FailFrom(Round round, const Outcome& outcome) {
  const Arrival& first = round.present.front().arrival;
  std::string error = Describe(first) + outcome.error;
  if (error.back() != '.') error += '.';
  std::vector<FailedRound> failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failed.push_back(
        CountedFailure(std::move(round), std::move(error),
                       outcome.deadline ? Failure::kProcessDeadline : Failure::kOther));
  }
  failed.front().transport = nullptr;  // it knows
  Fail(std::move(failed));
}

void KeyBarrier::Fail(std::vector<FailedRound> failed) const {
  for (auto& f : failed) {
    if (log_ != nullptr) log_->Write(f.round, f.error);
    if (f.transport != nullptr)
      f.transport->FailedHere(f.round.present.front().arrival.key, f.error);
    for (auto& p : f.round.present) {
      p.done(Result{nullptr, 0, 0, f.error, f.failure, f.diagnosis});
    }
  }
}

std::string KeyBarrier::Describe(const Arrival& first) {
  std::ostringstream os;
  os << "KeyBarrierSum: the " << (first.backward ? "backward" : "forward") << " exchange of key '"
     << first.key << "' failed: ";
  return os.str();
}

// Removes and returns what predicate(arrival, since) selects: open rounds, and arrivals that wait
// for earlier tickets.  The lock is held.
template <typename Predicate>
std::vector<KeyBarrier::FailedRound> KeyBarrier::TakeRounds(Predicate predicate,
                                                            const std::string& why) {
  std::vector<FailedRound> taken;
  for (auto phase = open_.begin(); phase != open_.end();) {
    auto& rounds = phase->second;
    for (auto round = rounds.begin(); round != rounds.end();) {
      if (predicate(round->present.front().arrival, round->opened)) {
        SortByParticipant(&round->present);
        std::ostringstream os;
        os << Describe(round->present.front().arrival) << why << " Arrived:";
        for (const auto& p : round->present) os << ' ' << p.arrival.name;
        os << "; missing: " << round->num_devices - static_cast<int>(round->present.size())
           << " of " << round->num_devices << ".";
        taken.push_back(CountedFailure(std::move(*round), os.str()));
        round = rounds.erase(round);
      } else {
        ++round;
      }
    }
    phase = rounds.empty() ? open_.erase(phase) : std::next(phase);
  }
  for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
    if (!waiting->failed.empty() || !predicate(waiting->present.arrival, waiting->since)) {
      ++waiting;
      continue;
    }
    const std::string error = Describe(waiting->present.arrival) + why;
    Round round{0, waiting->present.arrival.num_devices, waiting->since, {}};
    waiting->present.came = waiting->since;
    round.present.push_back(waiting->present);
    waiting->failed = error;
    waiting->present.arrival.values.clear();
    waiting->present.done = [](const Result&) {};
    taken.push_back(CountedFailure(std::move(round), error));
    taken.back().diagnosis = {
        Cause::kEarlierCall,
        "An earlier call with this key on " + waiting->present.arrival.name + " has not run yet."};
    ++waiting;
  }
  return taken;
}

std::uint64_t KeyBarrier::NewPass() {
  std::lock_guard<std::mutex> lock(mutex_);
  return next_id_++;
}

bool KeyBarrier::Announce(const std::vector<std::string>& keys, std::uint64_t participant,
                          const Pass& pass) {
  std::lock_guard<std::mutex> lock(mutex_);
  bool told = pass.id != 0;
  for (const auto& key : keys) {
    auto& announced = notes_[key].announced;
    if (pass.id != 0) {
      announced.insert(participant);
    } else if (announced.erase(participant) != 0) {
      told = true;
    }
  }
  return told;
}

void KeyBarrier::SetPass(const std::string& key, std::uint64_t participant, const Pass& pass) {
  std::lock_guard<std::mutex> lock(mutex_);
  notes_[key].passes[participant] = pass;
}

Pass KeyBarrier::PassOf(const std::string& key, std::uint64_t participant) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto notes = notes_.find(key);
  if (notes == notes_.end()) return {};
  const auto pass = notes->second.passes.find(participant);
  return pass == notes->second.passes.end() ? Pass() : pass->second;
}

void KeyBarrier::Abort(const std::vector<std::uint64_t>& passes, const std::string& why) {
  Ended ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto pass : passes) {
      if (pass != 0) aborted_[pass] = why;
    }
    while (aborted_.size() > kRemembered) aborted_.erase(aborted_.begin());
    ended.failed = TakeRounds([&](const Arrival& arrival,
                                  Clock::time_point) { return aborted_.count(arrival.pass) != 0; },
                              why);
    DropTicketsOfEndedPasses();
    Advance(Clock::now(),
            &ended);  // arrivals that waited for the tickets of those that have just failed
  }
  Notify(std::move(ended));
}

Clock::time_point KeyBarrier::NoteCall(const std::string& key, std::uint64_t participant,
                                       const std::string& name, std::uint64_t sender) {
  const Clock::time_point now = Clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  notes_[key].calls[participant] = {sender, now};
  records_.Name(participant, name);
  return now;
}

// Of the rounds whose deadline has passed, by id.  Rounds of one use have one cause.  The lock is
// held, so there are not very many.
std::map<std::uint64_t, Diagnosis> KeyBarrier::DiagnosesOfLate(Clock::time_point now) const {
  constexpr std::size_t kUses = 64;
  std::vector<const Round*> open;
  for (const auto& phase_and_rounds : open_) {
    for (const Round& round : phase_and_rounds.second) open.push_back(&round);
  }
  std::map<std::uint64_t, Diagnosis> diagnoses;
  std::map<std::tuple<std::string, int, bool, std::uint64_t>, Diagnosis> by_use;
  for (const Round* round : open) {
    if (now - round->opened < timeout_) continue;
    const Arrival& first = round->present.front().arrival;
    const auto use = std::make_tuple(first.key, first.call, first.backward, first.pass);
    auto known = by_use.find(use);
    if (known == by_use.end()) {
      if (by_use.size() == kUses) continue;
      known = by_use.emplace(use, DiagnosisOf(*round, open, now)).first;
    }
    diagnoses[round->id] = known->second;
  }
  return diagnoses;
}

// The lock is held.
Diagnosis KeyBarrier::DiagnosisOf(const Round& round, const std::vector<const Round*>& open,
                                  Clock::time_point now) const {
  const Arrival& first = round.present.front().arrival;
  std::vector<std::uint64_t> announced;
  for (const auto& key_and_notes : notes_) {
    for (const auto& participant_and_pass : key_and_notes.second.passes) {
      if (first.pass != 0 && participant_and_pass.second.id == first.pass) {
        announced.push_back(participant_and_pass.first);
      }
    }
  }
  static const std::map<std::uint64_t, Call> kNone;
  const auto notes = notes_.find(first.key);
  return Diagnose(
      {round, now, open, records_, notes == notes_.end() ? kNone : notes->second.calls, announced});
}

// The lock is held.
void KeyBarrier::NoteMissed(const Round& round, const std::string& error, Clock::time_point now) {
  const Arrival& first = round.present.front().arrival;
  if (round.id == 0 || first.backward || first.phase != 0) return;
  if (static_cast<int>(round.present.size()) >= round.num_devices) return;
  missed_.Add({first.key, first.call}, round, error, now);
}

// The lock is held.
KeyBarrier::FailedRound KeyBarrier::CountedFailure(Round round, std::string error,
                                                   Failure failure) {
  const Clock::time_point now = Clock::now();
  NoteMissed(round, error, now);
  const Arrival& first = round.present.front().arrival;
  KeyNotes& notes = notes_[first.key];
  ++failures_;
  ++notes.failures;
  records_.Add(RecordOf(first.key, &notes), round, false, now);
  return {std::move(round), std::move(error), failure, {}, notes.transport};
}

void KeyBarrier::SetTransport(const std::string& key, std::shared_ptr<Transport> transport) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    notes_[key].transport.swap(transport);
  }
  // The one before is freed here, without the lock.
}

bool KeyBarrier::HasTransport(const std::string& key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return TransportOf(key) != nullptr;
}

// The lock is held.
std::shared_ptr<Transport> KeyBarrier::TransportOf(const std::string& key) const {
  const auto notes = notes_.find(key);
  return notes == notes_.end() ? nullptr : notes->second.transport;
}

void KeyBarrier::Close(const std::string& why) {
  std::vector<FailedRound> failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_.empty()) closed_ = why;
    failed = TakeRounds([](const Arrival&, Clock::time_point) { return true; }, why + ".");
  }
  Fail(std::move(failed));
}

void KeyBarrier::SetTimeout(double seconds) {
  std::set<std::shared_ptr<Transport>> transports;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    timeout_ = ToTimeout(seconds);
    next_look_ = Clock::now();  // the new deadline applies to open rounds as well
    for (const auto& key_and_notes : notes_) {
      if (key_and_notes.second.transport) transports.insert(key_and_notes.second.transport);
    }
  }
  wake_.notify_all();
  for (const auto& transport : transports) transport->SetTimeout(seconds);
}

double KeyBarrier::Timeout() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return Seconds(timeout_);
}

std::uint64_t KeyBarrier::Failures(const std::string& key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto notes = notes_.find(key);
  return notes == notes_.end() ? 0 : notes->second.failures;
}

std::uint64_t KeyBarrier::Failures() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failures_;
}

RoundRecords::Copy KeyBarrier::Records(bool reset) {
  std::lock_guard<std::mutex> lock(mutex_);
  RoundRecords::Copy copy = records_.Snapshot();
  if (reset) records_.Reset();
  return copy;
}

// Deadlines pass in the order in which rounds are opened, so the thread need not be woken if it is
// going to look before now + timeout: in the steady state an arrival costs no system call.
void KeyBarrier::StartWatch(Clock::time_point now) {
  const Clock::time_point deadline = now + timeout_;
  if (!watch_.joinable()) {
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
    why << "not every device came within " << Seconds(timeout_) << " s.";
    const auto diagnoses = DiagnosesOfLate(now);
    Ended ended;
    ended.failed =
        TakeRounds([&](const Arrival&, Clock::time_point since) { return now - since >= timeout_; },
                   why.str());
    for (auto& f : ended.failed) {
      f.failure = Failure::kDeadline;
      const auto diagnosis = diagnoses.find(f.round.id);
      if (diagnosis != diagnoses.end()) f.diagnosis = diagnosis->second;
    }
    Advance(Clock::now(),
            &ended);  // arrivals that waited for the tickets of those that have just failed
    next_look_ = now + timeout_;
    for (const auto& phase_and_rounds : open_) {
      for (const auto& round : phase_and_rounds.second) {
        next_look_ = std::min(next_look_, round.opened + timeout_);
      }
    }
    for (const auto& w : waiting_) {
      if (w.failed.empty()) next_look_ = std::min(next_look_, w.since + timeout_);
    }
    lock.unlock();
    Notify(std::move(ended));
    lock.lock();
  }
}

}  // namespace gluon_syncbn
