// See process_all_reduce.h.
#include "processes/process_all_reduce.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <sstream>
#include <utility>

namespace gluon_syncbn {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// While exchanges are incomplete, the thread looks for messages without a pause for this long after
// the last one, and then with growing pauses: whoever computes meanwhile needs the core.
constexpr microseconds kSpin{100};
constexpr microseconds kLongestPause{1000};
// How long who brings something looks for messages, if it may.
constexpr microseconds kSpinOnArrival{50};
// While there are none, it still has to answer.
constexpr milliseconds kIdlePause{10};
// How long another process has to answer, and an exchange to complete after one has left.
constexpr milliseconds kPatience{2000};
// Exchanges that are remembered, to answer whether this process has come to them.
constexpr std::size_t kRemembered = 4096;

constexpr int kNumberBits = 48;
constexpr std::uint64_t kNumberMask = (std::uint64_t{1} << kNumberBits) - 1;

std::uint64_t NewInstance() {
  static std::atomic<std::uint64_t> count{0};
  return (++count & 0x7fff) << kNumberBits | Transport::kElsewhere;
}

}  // namespace

ProcessAllReduce::ProcessAllReduce(std::unique_ptr<Mail> mail, std::vector<std::string> keys,
                                   std::vector<std::string> names, double timeout_seconds)
    : rank_(mail->rank()),
      size_(mail->size()),
      keys_(std::move(keys)),
      names_(std::move(names)),
      steps_(RecursiveDoubling(rank_, size_)),
      instance_(NewInstance()),
      timeout_(timeout_seconds),
      mail_(std::move(mail)) {
  for (std::size_t i = 0; i < keys_.size(); ++i) {
    places_[keys_[i]] = static_cast<std::uint32_t>(i);
  }
  thread_ = std::thread(&ProcessAllReduce::Run, this);
}

ProcessAllReduce::~ProcessAllReduce() { Stop("the network was detached"); }

void ProcessAllReduce::AllReduce(Contribution contribution,
                                 std::function<void(const Outcome&)> done) {
  const bool spin = contribution.spin;
  Id id;
  Exchange exchange;
  std::string error;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    id.key = places_.at(contribution.key);
    const auto use = uses_.find({id.key, contribution.call});
    id.use = use == uses_.end() ? contribution.call : use->second;
    id.backward = contribution.backward ? 1 : 0;
    id.merge = static_cast<std::uint32_t>(contribution.merge);
    if (!stopping_.empty()) {
      error = stopping_;
    } else if (!failed_.empty()) {
      error =
          "an earlier exchange with other processes failed, so that they may no longer agree on "
          "which is next; attach the network again on every process to go on. The failure was: " +
          failed_;
    } else if (contribution.backward && (contribution.forward_round & ~kNumberMask) != instance_) {
      error =
          "its forward belongs to an earlier attachment of the network; run forward and backward "
          "between the same calls of attach";
    } else {
      id.number = contribution.backward ? contribution.forward_round & kNumberMask
                                        : ++numbers_[{id.key, id.use}];
      exchange.values = std::move(contribution.values);
      if (silent_) std::fill(exchange.values.begin(), exchange.values.end(), 0.0);
      exchange.round = instance_ | id.number;
      exchange.done = std::move(done);
      exchange.since = Clock::now();
      new_.emplace_back(id, std::move(exchange));
    }
  }
  if (!error.empty()) return done({nullptr, 0, error, false});
  const Clock::time_point until = Clock::now() + (spin ? kSpinOnArrival : microseconds(0));
  for (;;) {
    std::vector<Finished> finished;
    const bool all_done = WorkIfNobodyDoes(&finished);
    Deliver(std::move(finished));
    if (all_done) return;
    if (Clock::now() >= until) return Call();
    std::this_thread::yield();
  }
}

void ProcessAllReduce::FailedHere(const std::string& key, const std::string& why) {
  if (places_.count(key) == 0) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failed_.empty() || !failed_here_.empty()) return;
    failed_here_ = why;
  }
  Call();
}

void ProcessAllReduce::SetTimeout(double seconds) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    timeout_ = seconds;
  }
  Call();
}

void ProcessAllReduce::NumberCall(const std::string& key, int call, int use) {
  std::lock_guard<std::mutex> lock(mutex_);
  uses_[{places_.at(key), call}] = use;
}

void ProcessAllReduce::SetSilent(bool silent) {
  std::lock_guard<std::mutex> lock(mutex_);
  silent_ = silent;
}

void ProcessAllReduce::Stop(const std::string& why) {
  std::lock_guard<std::mutex> stop_lock(stop_mutex_);
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = why;
  }
  Call();
  thread_.join();
}

void ProcessAllReduce::End(const std::string& why) {
  Stop(why);
  std::lock_guard<std::mutex> work(work_mutex_);
  ended_ = true;
}

// Works unless another thread does; returns whether nothing is left to do.
bool ProcessAllReduce::WorkIfNobodyDoes(std::vector<Finished>* finished) {
  std::unique_lock<std::mutex> work(work_mutex_, std::try_to_lock);
  if (!work.owns_lock()) return false;
  if (ended_) return true;  // what was new then has failed; there has been nothing since
  Work();
  finished->swap(finished_);
  return open_.empty();
}

void ProcessAllReduce::Call() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    called_ = true;
  }
  wake_.notify_one();
}

void ProcessAllReduce::Run() {
  Clock::time_point last_active = Clock::now();
  for (;;) {
    bool active = false, waits = false;
    std::vector<Finished> finished;
    {
      std::lock_guard<std::mutex> work(work_mutex_);
      active = Work();
      waits = !open_.empty();
      finished.swap(finished_);
    }
    active |= !finished.empty();
    Deliver(std::move(finished));
    const Clock::time_point now = Clock::now();
    if (active) last_active = now;
    const auto idle = now - last_active;
    std::unique_lock<std::mutex> lock(mutex_);
    if (!stopping_.empty()) break;
    if (waits && idle < kSpin) {
      lock.unlock();
      std::this_thread::yield();
      continue;
    }
    const Clock::duration pause =
        waits ? std::min<Clock::duration>(idle / 8, kLongestPause) : Clock::duration(kIdlePause);
    if (wake_.wait_for(lock, pause, [this] { return called_; })) last_active = Clock::now();
    called_ = false;
  }
  std::vector<Finished> finished;
  {
    std::lock_guard<std::mutex> work(work_mutex_);
    SayGoodbye();
    finished.swap(finished_);
  }
  Deliver(std::move(finished));
}

// Does what there is to do; returns whether there was anything.
bool ProcessAllReduce::Work() {
  bool active = false;
  try {
    active = TakeNew();
    int from = 0;
    std::string message;
    while (mail_->Receive(&from, &message)) {
      Handle(from, message);
      active = true;
    }
    const Clock::time_point now = Clock::now();
    if (now >= next_look_) {
      LookForLateOnes();
      next_look_ = now + kIdlePause;
    }
  } catch (const std::exception& e) {
    FailAll(std::string("the connection to other processes broke: ") + e.what(), false, false);
  }
  return active;
}

bool ProcessAllReduce::TakeNew() {
  std::vector<std::pair<Id, Exchange>> taken;
  std::string failed_here, failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    taken.swap(new_);
    failed_here.swap(failed_here_);
    failed = failed_;
  }
  // All of them first: what fails, fails everything that is open.
  for (auto& id_and_exchange : taken) {
    Begin(id_and_exchange.first, std::move(id_and_exchange.second));
  }
  if (!failed.empty()) {
    FailAll(failed, false, false);
  } else if (!failed_here.empty()) {
    FailAll(failed_here, false, true);
  } else {
    for (const auto& id_and_exchange : taken) Advance(id_and_exchange.first);
  }
  return !taken.empty() || !failed_here.empty();
}

void ProcessAllReduce::Begin(const Id& id, Exchange exchange) {
  if (++begun_[id] == 1) {
    begun_in_order_.push_back(id);
    if (begun_in_order_.size() > kRemembered) {
      begun_.erase(begun_in_order_.front());
      begun_in_order_.pop_front();
    }
  }
  last_ = NameOf(id);
  open_[id].push_back(std::move(exchange));
}

void ProcessAllReduce::Handle(int from, const std::string& message) {
  Header header;
  if (message.size() < sizeof header) return;
  std::memcpy(&header, message.data(), sizeof header);
  const char* const body = message.data() + sizeof header;
  const std::size_t bytes = message.size() - sizeof header;
  switch (header.kind) {
    case Kind::kPart: {
      Part part{from, header.step, std::vector<double>(bytes / sizeof(double))};
      std::memcpy(part.values.data(), body, part.values.size() * sizeof(double));
      parts_[header.id].push_back(std::move(part));
      return Advance(header.id);
    }
    case Kind::kAsk: {
      Header answer;
      answer.kind = Kind::kAnswer;
      answer.id = header.id;
      const auto begun = begun_.find(header.id);
      answer.times = begun != begun_.end() && begun->second >= header.times ? header.times : 0;
      return Send(from, answer, last_.data(), last_.size());
    }
    case Kind::kAnswer: {
      const auto inquiry = inquiries_.find(header.id);
      if (inquiry == inquiries_.end()) return;
      inquiry->second.answered.insert(from);
      if (header.times == 0) inquiry->second.missing[from].assign(body, bytes);
      return;
    }
    case Kind::kFailed:
      return FailAll(names_[from] + " reports: " + std::string(body, bytes), false, false);
    case Kind::kLeft:
      left_[from] = Clock::now();
      return;
  }
}

// Takes an exchange as far as the messages that have come allow.
void ProcessAllReduce::Advance(const Id& id) {
  const auto exchanges = open_.find(id);
  if (exchanges == open_.end()) return;
  auto& queue = exchanges->second;
  while (!queue.empty()) {
    Exchange& exchange = queue.front();
    while (exchange.step < steps_.size()) {
      if (!DoStep(id, &exchange)) return;  // everything may be gone
    }
    finished_.push_back({std::move(exchange), ""});
    queue.pop_front();
  }
  open_.erase(exchanges);
  inquiries_.erase(id);
}

bool ProcessAllReduce::DoStep(const Id& id, Exchange* exchange) {
  const Step& step = steps_[exchange->step];
  if (step.sends() && !exchange->sent) {
    Header header;
    header.step = step.number;
    header.id = id;
    Send(step.peer, header, exchange->values.data(), exchange->values.size() * sizeof(double));
    exchange->sent = true;
  }
  if (step.receives() && !Receive(id, step, exchange)) return false;
  ++exchange->step;
  exchange->sent = false;
  return true;
}

bool ProcessAllReduce::Receive(const Id& id, const Step& step, Exchange* exchange) {
  const auto parts = parts_.find(id);
  if (parts == parts_.end()) return false;
  auto& queue = parts->second;
  const auto found = std::find_if(queue.begin(), queue.end(), [&](const Part& part) {
    return part.from == step.peer && part.step == step.number;
  });
  if (found == queue.end()) return false;
  std::vector<double> theirs = std::move(found->values);
  queue.erase(found);
  if (queue.empty()) parts_.erase(parts);
  std::vector<double>& ours = exchange->values;
  if (theirs.size() != ours.size()) {
    std::ostringstream os;
    os << names_[step.peer] << " brings " << theirs.size() << " values to " << NameOf(id)
       << ", but " << names_[rank_] << " brings " << ours.size()
       << "; the layer must have the same number of channels on every process";
    FailAll(os.str(), false, true);
    return false;
  }
  if (step.kind == Step::Kind::kTakeTotal) {
    ours = std::move(theirs);
    return true;
  }
  const auto merge = static_cast<Merge>(id.merge);
  if (step.peer > rank_) {
    MergeInto(merge, theirs, &ours);
  } else {
    MergeInto(merge, ours, &theirs);
    ours = std::move(theirs);
  }
  return true;
}

// Asks about exchanges that are late, and ends those whose inquiry is over.
void ProcessAllReduce::LookForLateOnes() {
  const Clock::time_point now = Clock::now();
  double seconds;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    seconds = timeout_;
  }
  const auto timeout = std::chrono::duration<double>(seconds);
  for (const auto& id_and_exchanges : open_) {
    const Id& id = id_and_exchanges.first;
    const Clock::time_point since = id_and_exchanges.second.front().since;
    const bool late = now - since >= timeout;
    const bool abandoned = std::any_of(left_.begin(), left_.end(), [&](const auto& rank_and_time) {
      return now - std::max(rank_and_time.second, since) >= kPatience;
    });
    if (!late && !abandoned) continue;
    const auto known = inquiries_.find(id);
    if (known == inquiries_.end()) {
      inquiries_[id].until = now + kPatience;
      Header ask;
      ask.kind = Kind::kAsk;
      ask.id = id;
      ask.times = begun_[id];
      SendToOthers(ask, "");
      continue;
    }
    const Inquiry& inquiry = known->second;
    if (now < inquiry.until && !AllAnswered(inquiry)) continue;
    std::ostringstream why;
    why << "not every process came to " << NameOf(id);
    if (late) why << " within " << seconds << " s";
    why << ": " << WhoIsMissing(inquiry);
    return FailAll(why.str(), late, true);
  }
}

bool ProcessAllReduce::AllAnswered(const Inquiry& inquiry) const {
  for (int rank = 0; rank < size_; ++rank) {
    if (rank != rank_ && inquiry.answered.count(rank) == 0 && left_.count(rank) == 0) return false;
  }
  return true;
}

std::string ProcessAllReduce::WhoIsMissing(const Inquiry& inquiry) const {
  std::ostringstream os;
  const char* separator = "";
  for (int rank = 0; rank < size_; ++rank) {
    const auto missing = inquiry.missing.find(rank);
    if (missing != inquiry.missing.end()) {
      os << separator << names_[rank];
      if (missing->second.empty()) {
        os << " has not come to any exchange yet";
      } else {
        os << " has not; it came last to " << missing->second;
      }
    } else if (left_.count(rank) != 0) {
      os << separator << names_[rank] << " has ended, or detached its network";
    } else if (rank != rank_ && inquiry.answered.count(rank) == 0) {
      os << separator << names_[rank]
         << " does not answer: its process was killed or stopped, or cannot be reached";
    } else {
      continue;
    }
    separator = "; ";
  }
  return *separator == 0 ? "all did, but their messages did not arrive" : os.str();
}

// Ends all exchanges, and every later one, for this reason unless there was one before.
void ProcessAllReduce::FailAll(const std::string& why, bool deadline, bool tell) {
  std::string first;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tell = tell && failed_.empty();
    if (failed_.empty()) failed_ = why;
    first = failed_;
  }
  for (auto& id_and_exchanges : open_) {
    for (auto& exchange : id_and_exchanges.second) {
      finished_.push_back({std::move(exchange), first, deadline});
    }
  }
  open_.clear();
  parts_.clear();
  inquiries_.clear();
  if (!tell) return;
  Header header;
  header.kind = Kind::kFailed;
  SendToOthers(header, why);
}

void ProcessAllReduce::Send(int to, const Header& header, const void* body, std::size_t bytes) {
  std::string message(sizeof header + bytes, '\0');
  std::memcpy(&message[0], &header, sizeof header);
  if (bytes != 0) std::memcpy(&message[sizeof header], body, bytes);
  mail_->Send(to, std::move(message));
}

void ProcessAllReduce::SendToOthers(const Header& header, const std::string& text) {
  for (int rank = 0; rank < size_; ++rank) {
    const bool wants = left_.count(rank) == 0 || header.kind == Kind::kLeft;
    if (rank != rank_ && wants) Send(rank, header, text.data(), text.size());
  }
}

std::string ProcessAllReduce::NameOf(const Id& id) const {
  std::ostringstream os;
  os << "the " << (id.backward ? "backward" : "forward") << " exchange of '"
     << (id.key < keys_.size() ? keys_[id.key] : "?") << "' (number " << id.number;
  if (id.use != 0) os << " of its use " << id.use;
  os << ')';
  return os.str();
}

void ProcessAllReduce::Deliver(std::vector<Finished> finished) {
  for (auto& f : finished) {
    const bool succeeded = f.error.empty();
    f.exchange.done(
        {succeeded ? &f.exchange.values : nullptr, f.exchange.round, f.error, f.deadline});
  }
}

void ProcessAllReduce::SayGoodbye() {
  std::string why;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    why = stopping_;
  }
  try {
    TakeNew();
    if (!open_.empty()) FailAll(why, false, true);
    Header header;
    header.kind = Kind::kLeft;
    SendToOthers(header, "");
    const Clock::time_point end = Clock::now() + kPatience;
    while (!mail_->Sent() && Clock::now() < end) std::this_thread::yield();
  } catch (const std::exception&) {
    FailAll(why, false, false);
  }
}

bool ProcessAllReduce::failed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return !failed_.empty();
}

bool ProcessAllReduce::WaitForGoodbyes(double seconds) {
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  for (;;) {
    {
      std::lock_guard<std::mutex> work(work_mutex_);
      if (ended_ || static_cast<int>(left_.size()) == size_ - 1) return true;
      try {
        int from = 0;
        std::string message;
        if (mail_->Receive(&from, &message)) {
          Handle(from, message);
          continue;
        }
      } catch (const std::exception&) {
        return false;
      }
    }
    if (Clock::now() >= end) return false;
    std::this_thread::sleep_for(kIdlePause);
  }
}

}  // namespace gluon_syncbn
