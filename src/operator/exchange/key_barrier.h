// An asynchronous all-reduce between the devices of one process: the key-barrier sum exchange.  A
// key with a transport (transport.h) goes on to the same key in other processes.
//
// Every participant contributes a vector under a key; when all have arrived, each gets the sum of
// all vectors, or whatever else they are merged to (merge.h).  No thread ever waits: an arrival
// registers a completion and returns, so no order of arrivals can deadlock.  The class knows of no
// framework and no device.  To it, a participant is a number, which determines its place in the
// sum, and a name for messages.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "exchange/missed_rounds.h"
#include "exchange/round.h"
#include "exchange/round_log.h"
#include "exchange/round_records.h"
#include "exchange/transport.h"

namespace gluon_syncbn {

// A pass is one run of a program, forward and backward, on several participants.  Their arrivals
// join rounds of this pass only.
struct Pass {
  std::uint64_t id = 0;  // from NewPass; 0: none
  int expected = 0;      // the number of participants
};

// All functions may be called from any thread.
class KeyBarrier {
 public:
  // A round fails if it is not complete `timeout_seconds` after its first arrival.
  // Every round gets a line in the log, if there is one.
  explicit KeyBarrier(double timeout_seconds, std::shared_ptr<const RoundLog> log = nullptr);
  ~KeyBarrier();
  KeyBarrier(const KeyBarrier&) = delete;
  KeyBarrier& operator=(const KeyBarrier&) = delete;

  // Joins the oldest open round of the arrival's key, call and phase in which its participant is
  // not present, or opens one.  Values are merged in the order of the participants' numbers, not of
  // their arrival: the result is the same, bit for bit, on every run.  An arrival that contradicts
  // its round in kind, num_devices, merge or length fails the round.
  //
  // A round that fails ends its pass (Abort).  Outside of a pass, an arrival that comes late to a
  // round that has failed gets an error, and joins no later round, if it was called before that.
  // If it was called after that, the program has begun anew.
  void Arrive(Arrival arrival, Completion done);

  // Takes a ticket for a later arrival.  The arrivals of a participant under this key and call join
  // rounds in the order of their tickets, even if they come in a different order.  A ticket of a
  // pass (0: of none) holds up nothing once that has ended.
  std::uint64_t TakeTicket(const std::string& key, int call, std::uint64_t participant,
                           std::uint64_t pass = 0);
  // Returns a ticket that no arrival will use.
  void ReturnTicket(const std::string& key, int call, std::uint64_t participant,
                    std::uint64_t ticket);

  // An id that no other pass or round has.
  std::uint64_t NewPass();
  // Records that `pass` is announced to a participant.  Returns whether SetPass has to be called
  // for these keys: always in a pass; outside of one (id 0) if a pass was announced before.
  bool Announce(const std::vector<std::string>& keys, std::uint64_t participant, const Pass& pass);
  // Sets the pass of the participant's next forward arrivals under this key.
  void SetPass(const std::string& key, std::uint64_t participant, const Pass& pass);
  Pass PassOf(const std::string& key, std::uint64_t participant) const;
  // Fails all open rounds of these passes, and every later arrival in them.
  void Abort(const std::vector<std::uint64_t>& passes, const std::string& why);

  // Says that a participant has been called and is going to arrive, and what called it, as any
  // number.  Participants that share a sender may be unable to arrive at the same time; if a
  // deadline passes, Result says that they do.  Returns the time, for Arrival::called.
  Clock::time_point NoteCall(const std::string& key, std::uint64_t participant,
                             const std::string& name, std::uint64_t sender);

  // Sets what carries this key's rounds on to other processes; null: nothing, they end here.
  void SetTransport(const std::string& key, std::shared_ptr<Transport> transport);
  bool HasTransport(const std::string& key) const;

  // Fails all open rounds and every later arrival: the process is ending.
  void Close(const std::string& why);

  // Makes the barrier usable in the child after a fork, with no open round, pass or transport.  A
  // fork copies it in whatever state it is, perhaps locked and half changed by a thread that the
  // child does not have, so nothing but counters is read.  Read the timeout before the fork.
  void RestartInChild(double timeout_seconds);

  // Applies to open rounds as well.
  void SetTimeout(double seconds);
  double Timeout() const;

  // The number of rounds that have failed so far: of one key, and of all.
  std::uint64_t Failures(const std::string& key) const;
  std::uint64_t Failures() const;

  // What happened so far, or since the last time with `reset`.
  RoundRecords::Copy Records(bool reset);

 private:
  struct Waiting {
    Clock::time_point since;
    Present present;
    std::string failed;  // why, if its deadline has passed: it keeps its place among the tickets
  };
  struct CompleteRound {
    Round round;
    std::shared_ptr<Transport> transport;
    bool goes_on;  // through the transport
  };
  struct FailedRound {
    Round round;
    std::string error;
    Failure failure = Failure::kOther;
    Diagnosis diagnosis;
    std::shared_ptr<Transport> transport;  // that does not know yet
  };
  // What is known of a key besides its rounds.
  struct KeyNotes {
    std::map<std::uint64_t, Pass> passes;  // by participant
    std::set<std::uint64_t> announced;     // participants whose last pass is not 0
    std::map<std::uint64_t, Call> calls;   // the latest, by participant
    std::uint64_t failures = 0;
    std::shared_ptr<Transport> transport;
    KeyRecord* record = nullptr;  // from RecordOf
  };
  using Phase = std::tuple<std::string, int, std::uint64_t>;  // key, call, phase
  using Queue = std::tuple<std::string, int, std::uint64_t>;  // key, call, participant
  // Rounds that end while the lock is held; their participants are notified after that.
  struct Ended {
    std::vector<CompleteRound> complete;
    std::vector<FailedRound> failed;
  };

  bool IsNext(const Arrival& arrival) const;
  void DropTicket(const Queue& queue, std::uint64_t ticket);
  void DropTicketsOfEndedPasses();
  void Advance(Clock::time_point now, Ended* ended);
  void Join(Present present, const std::string& failed, Ended* ended);
  KeyRecord* RecordOf(const std::string& key, KeyNotes* notes);
  bool EndPasses(std::vector<FailedRound>* failed);
  void Notify(Ended ended);
  static void SortByParticipant(std::vector<Present>* present);
  void Complete(CompleteRound complete);
  void Succeed(const Round& round, const std::vector<double>& total) const;
  void FailFrom(Round round, const Outcome& outcome);
  void Fail(std::vector<FailedRound> failed) const;
  FailedRound CountedFailure(Round round, std::string error, Failure failure = Failure::kOther);
  std::shared_ptr<Transport> TransportOf(const std::string& key) const;
  void NoteMissed(const Round& round, const std::string& error, Clock::time_point now);
  std::map<std::uint64_t, Diagnosis> DiagnosesOfLate(Clock::time_point now) const;
  Diagnosis DiagnosisOf(const Round& round, const std::vector<const Round*>& open,
                        Clock::time_point now) const;
  static std::string Describe(const Arrival& first);
  template <typename Predicate>
  std::vector<FailedRound> TakeRounds(Predicate predicate, const std::string& why);
  void StartWatch(Clock::time_point now);
  void Watch();

  mutable std::mutex mutex_;
  std::map<Phase, std::vector<Round>> open_;  // oldest first
  // Taken and not yet used, with their passes.
  std::map<Queue, std::map<std::uint64_t, std::uint64_t>> tickets_;
  MissedRounds missed_;
  std::vector<Waiting> waiting_;  // arrivals with earlier tickets before them
  std::uint64_t next_ticket_ = 1;
  std::map<std::string, KeyNotes> notes_;
  std::map<std::uint64_t, std::string> aborted_;  // pass -> why; the latest ones
  std::string closed_;                            // why; empty while open
  std::uint64_t next_id_ = 1;                     // of rounds and passes
  std::uint64_t failures_ = 0;
  RoundRecords records_;
  Clock::duration timeout_;
  const std::shared_ptr<const RoundLog> log_;

  std::thread watch_;  // started by the first round that has to wait
  std::condition_variable wake_;
  Clock::time_point next_look_ = Clock::time_point::max();
  bool stop_ = false;
};

}  // namespace gluon_syncbn
