// The transport between processes: each brings what its devices have merged, and gets the total.
//
// Messages say which exchange they belong to, so layers may come in different orders on different
// processes.  A thread sends and receives, and so does whoever brings something, if the thread is
// not just doing it: what the others have sent already needs no other thread.  Nothing waits.
// Vectors are merged as recursive_doubling.h says, so the total is the same, bit for bit, on every
// process and every run.
//
// An exchange that is incomplete at the deadline fails, with a message that names who is missing,
// for which the processes ask each other.  After a failure they may no longer agree on which
// exchange is next, so all later ones fail as well, here and on the other processes, until the
// program makes a new transport on all of them.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "exchange/transport.h"
#include "processes/mail.h"
#include "processes/recursive_doubling.h"

namespace gluon_syncbn {

class ProcessAllReduce : public Transport {
 public:
  // `keys`: of this process; the i-th belongs to the i-th of every other process.  `names`: of the
  // processes by rank, for messages.
  ProcessAllReduce(std::unique_ptr<Mail> mail, std::vector<std::string> keys,
                   std::vector<std::string> names, double timeout_seconds);
  ~ProcessAllReduce() override;
  ProcessAllReduce(const ProcessAllReduce&) = delete;
  ProcessAllReduce& operator=(const ProcessAllReduce&) = delete;

  void AllReduce(Contribution contribution, std::function<void(const Outcome&)> done) override;
  void FailedHere(const std::string& key, const std::string& why) override;
  void SetTimeout(double seconds) override;

  // The uses of a key in a graph are numbered process by process (Arrival::call); `use` is what all
  // processes call this one.
  void NumberCall(const std::string& key, int call, int use);
  // Whether this process contributes nothing: zeros, which change neither sums nor moments.
  void SetSilent(bool silent);
  // Says goodbye and stops the thread.  What is incomplete fails.
  void Stop(const std::string& why);
  bool failed() const;
  // Stops, and does not touch the mail any more.  A program may end what carries the mail in one
  // thread while another one still works with this.
  void End(const std::string& why);
  // After Stop: waits until the others have said goodbye, too, and returns whether they have, or
  // there is no mail any more.
  bool WaitForGoodbyes(double seconds);

 private:
  using Clock = std::chrono::steady_clock;

  // An exchange's name, which is the same on all processes.
  struct Id {
    std::uint32_t key = 0;
    std::int32_t use = 0;
    std::uint32_t backward = 0;
    std::uint32_t merge = 0;
    std::uint64_t number = 0;  // of the forward exchanges of this key and use, from 1

    bool operator<(const Id& o) const {
      return std::tie(number, key, use, backward, merge) <
             std::tie(o.number, o.key, o.use, o.backward, o.merge);
    }
  };
  enum class Kind : std::uint32_t { kPart, kAsk, kAnswer, kFailed, kLeft };
  struct Header {
    Kind kind = Kind::kPart;
    std::uint32_t step = 0;
    Id id;
    // kAsk: how often the sender has come to the exchange, which is more than once where backward
    // runs again.  kAnswer: the same if the sender has come as often, else 0.
    std::uint64_t times = 0;
  };
  struct Part {
    int from = 0;
    std::uint32_t step = 0;
    std::vector<double> values;
  };
  struct Exchange {
    std::vector<double> values;
    std::uint64_t round = 0;
    std::function<void(const Outcome&)> done;
    Clock::time_point since;
    std::size_t step = 0;
    bool sent = false;  // in this step
  };
  struct Inquiry {  // into an exchange that is late
    Clock::time_point until;
    std::map<int, std::string> missing;  // rank -> what it came to last
    std::set<int> answered;
  };
  struct Finished {
    Exchange exchange;
    std::string error;  // empty if it succeeded
    bool deadline = false;
  };

  void Run();
  void Call();
  bool Work();
  bool WorkIfNobodyDoes(std::vector<Finished>* finished);
  bool TakeNew();
  void Begin(const Id& id, Exchange exchange);
  void Handle(int from, const std::string& message);
  void Advance(const Id& id);
  bool DoStep(const Id& id, Exchange* exchange);
  bool Receive(const Id& id, const Step& step, Exchange* exchange);
  void LookForLateOnes();
  bool AllAnswered(const Inquiry& inquiry) const;
  std::string WhoIsMissing(const Inquiry& inquiry) const;
  void FailAll(const std::string& why, bool deadline, bool tell);
  void Send(int to, const Header& header, const void* body, std::size_t bytes);
  void SendToOthers(const Header& header, const std::string& text);
  std::string NameOf(const Id& id) const;
  static void Deliver(std::vector<Finished> finished);
  void SayGoodbye();

  const int rank_, size_;
  const std::vector<std::string> keys_, names_;
  const std::vector<Step> steps_;
  const std::uint64_t instance_;
  std::map<std::string, std::uint32_t> places_;  // of the keys

  // What other threads bring, under the lock.
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::pair<Id, Exchange>> new_;
  std::map<std::pair<std::uint32_t, int>, int> uses_;               // (key, call) -> use
  std::map<std::pair<std::uint32_t, int>, std::uint64_t> numbers_;  // (key, use) -> the last number
  std::string failed_;       // why nothing works any more; empty while it does
  std::string failed_here_;  // not yet told to the others
  std::string stopping_;     // why the thread should stop
  double timeout_;
  bool silent_ = false;
  bool called_ = false;  // the thread is to work

  // Of whoever works.
  std::mutex work_mutex_;  // taken before mutex_
  const std::unique_ptr<Mail> mail_;
  bool ended_ = false;
  std::map<Id, std::deque<Exchange>> open_;  // those with one id run one after the other
  std::map<Id, std::deque<Part>> parts_;     // received, and not merged yet
  std::map<Id, Inquiry> inquiries_;
  std::map<Id, std::uint64_t> begun_;  // how often; of the latest ones
  std::deque<Id> begun_in_order_;
  std::string last_;                       // the exchange that this process came to last
  std::map<int, Clock::time_point> left_;  // ranks that have said goodbye
  std::vector<Finished> finished_;         // to be told
  Clock::time_point next_look_{};          // for late ones

  std::mutex stop_mutex_;  // around joining the thread
  std::thread thread_;
};

}  // namespace gluon_syncbn
