// A stress test of the all-reduce between processes for the sanitizers: several of them in this
// one, connected by a post office that delays letters at random.  Every rank comes to the exchanges
// of all keys in an order of its own, several threads a rank, forward and backward, with values
// whose total depends on the order in which they are merged.  Then ranks fail: one does not come,
// one brings another number of values, one ends.  Every completion must be called once, with the
// same bits on all ranks, or with an error.
//
//   processes_stress [seed] [rounds]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "processes/mail.h"
#include "processes/process_all_reduce.h"

namespace {

using gluon_syncbn::Contribution;
using gluon_syncbn::Merge;
using gluon_syncbn::Outcome;
using gluon_syncbn::ProcessAllReduce;
using Clock = std::chrono::steady_clock;

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "processes_stress: %s\n", what.c_str());
  std::abort();
}

// Letters between ranks; those from one rank to another keep their order.
class PostOffice {
 public:
  PostOffice(int size, unsigned seed) : size_(size), random_(seed), boxes_(size * size) {}

  int size() const { return size_; }

  void Send(int from, int to, std::string letter) {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::chrono::microseconds delay(random_() % 4 == 0 ? random_() % 300 : 0);
    auto& box = boxes_[to * size_ + from];
    auto when = Clock::now() + delay;
    if (!box.empty()) when = std::max(when, box.back().first);
    box.emplace_back(when, std::move(letter));
  }

  bool Receive(int to, int* from, std::string* letter) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int first = static_cast<int>(random_() % size_);
    for (int i = 0; i < size_; ++i) {
      const int sender = (first + i) % size_;
      auto& box = boxes_[to * size_ + sender];
      if (box.empty() || box.front().first > Clock::now()) continue;
      *from = sender;
      *letter = std::move(box.front().second);
      box.pop_front();
      return true;
    }
    return false;
  }

 private:
  const int size_;
  std::mutex mutex_;
  std::mt19937 random_;
  std::vector<std::deque<std::pair<Clock::time_point, std::string>>> boxes_;
};

class LocalMail : public gluon_syncbn::Mail {
 public:
  LocalMail(std::shared_ptr<PostOffice> office, int rank)
      : office_(std::move(office)), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return office_->size(); }
  void Send(int to, std::string message) override { office_->Send(rank_, to, std::move(message)); }
  bool Receive(int* from, std::string* message) override {
    return office_->Receive(rank_, from, message);
  }
  bool Sent() override { return true; }

 private:
  const std::shared_ptr<PostOffice> office_;
  const int rank_;
};

constexpr int kKeys = 6;

using Ranks = std::vector<std::unique_ptr<ProcessAllReduce>>;

Ranks NewRanks(int size, unsigned seed, double timeout) {
  const auto office = std::make_shared<PostOffice>(size, seed);
  std::vector<std::string> keys, names;
  for (int k = 0; k < kKeys; ++k) keys.push_back("key" + std::to_string(k));
  for (int r = 0; r < size; ++r) names.push_back("rank " + std::to_string(r));
  Ranks ranks;
  for (int r = 0; r < size; ++r) {
    ranks.push_back(std::make_unique<ProcessAllReduce>(std::make_unique<LocalMail>(office, r), keys,
                                                       names, timeout));
  }
  return ranks;
}

struct Answer {
  std::atomic<int> times{0};
  std::atomic<bool> failed{false};
  std::vector<double> total;
  std::string error;
  std::atomic<std::uint64_t> round{0};
};

void Arrive(ProcessAllReduce* rank, int key, std::uint64_t forward_round,
            std::vector<double> values, Answer* answer) {
  Contribution contribution;
  contribution.key = "key" + std::to_string(key);
  contribution.backward = forward_round != 0;
  contribution.forward_round = forward_round;
  contribution.merge = forward_round != 0 ? Merge::kSum : Merge::kMoments;
  contribution.values = std::move(values);
  rank->AllReduce(std::move(contribution), [answer](const Outcome& outcome) {
    if (outcome.total != nullptr) {
      answer->total = *outcome.total;
      answer->round = outcome.round;
    } else {
      answer->error = outcome.error;
      answer->failed = true;
    }
    ++answer->times;
  });
}

void Wait(const Answer& answer) {
  const auto end = Clock::now() + std::chrono::seconds(60);
  while (answer.times == 0) {
    if (Clock::now() > end) Fail("a completion was never called");
    std::this_thread::yield();
  }
}

std::vector<double> Values(int rank, int round, int key) {
  std::mt19937 random(static_cast<unsigned>((rank * 1000 + round) * 100 + key));
  std::vector<double> values(7 + 2 * key);
  for (auto& v : values)
    v = std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 60) - 30);
  values.back() = static_cast<double>(random() % 5);
  return values;
}

void AllArrive(int size, unsigned seed, int rounds) {
  Ranks ranks = NewRanks(size, seed, 60.0);
  std::vector<std::vector<Answer>> forward(size), backward(size);
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    forward[r] = std::vector<Answer>(rounds * kKeys);
    backward[r] = std::vector<Answer>(rounds * kKeys);
    // One thread has the even keys and one the odd ones.
    for (int half = 0; half < 2; ++half) {
      threads.emplace_back([&, r, half] {
        std::mt19937 random(seed + static_cast<unsigned>(2 * r + half));
        std::vector<int> keys;
        for (int k = half; k < kKeys; k += 2) keys.push_back(k);
        for (int round = 0; round < rounds; ++round) {
          std::shuffle(keys.begin(), keys.end(), random);
          for (const int k : keys) {
            Arrive(ranks[r].get(), k, 0, Values(r, round, k), &forward[r][round * kKeys + k]);
          }
          if (round % 3 != 2) continue;  // several rounds are on their way
          for (int before = round - 2; before <= round; ++before) {
            for (const int k : keys) Wait(forward[r][before * kKeys + k]);
          }
          std::shuffle(keys.begin(), keys.end(), random);
          for (const int k : keys) {
            for (int before = round; before >= round - 2; --before) {
              const Answer& f = forward[r][before * kKeys + k];
              Arrive(ranks[r].get(), k, f.round, Values(r, before, k),
                     &backward[r][before * kKeys + k]);
            }
          }
        }
      });
    }
  }
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < rounds * kKeys; ++i) {
    for (const auto* answers : {&forward, &backward}) {
      for (int r = 0; r < size; ++r) {
        const Answer& answer = (*answers)[r][i];
        Wait(answer);
        if (answer.failed) Fail(answer.error);
        if (answer.times != 1) Fail("a completion was called twice");
        if (answer.total != (*answers)[0][i].total) Fail("ranks have different totals");
      }
      double count = 0;
      for (int r = 0; r < size; ++r) count += Values(r, i / kKeys, i % kKeys).back();
      if ((*answers)[0][i].total.back() != count) Fail("a total is wrong");
    }
  }
}

// One rank does not do what the others do; all get an error that names it, and fail from then on.
void OneFails(int size, unsigned seed, int fault) {
  Ranks ranks = NewRanks(size, seed, fault == 0 ? 0.05 : 60.0);
  const int bad = static_cast<int>(seed % static_cast<unsigned>(size));
  std::vector<Answer> first(size), second(size), third(size);
  for (int r = 0; r < size; ++r) Arrive(ranks[r].get(), 0, 0, Values(r, 0, 0), &first[r]);
  for (const auto& answer : first) Wait(answer);
  for (int r = 0; r < size; ++r) {
    if (r != bad) Arrive(ranks[r].get(), 1, 0, Values(r, 1, 1), &second[r]);
  }
  if (fault == 1) Arrive(ranks[bad].get(), 1, 0, Values(bad, 1, 2), &second[bad]);
  if (fault == 2) ranks[bad]->FailedHere("key1", "a device raised");
  if (fault == 3) ranks[bad]->Stop("it ends");
  const std::string name = "rank " + std::to_string(bad);
  for (int r = 0; r < size; ++r) {
    if (r == bad) continue;
    Wait(second[r]);
    if (!second[r].failed) Fail("an exchange succeeded without a rank");
    if (second[r].error.find(name) == std::string::npos) Fail("not named: " + second[r].error);
    Arrive(ranks[r].get(), 0, 0, Values(r, 2, 0), &third[r]);
    Wait(third[r]);
    if (!third[r].failed) Fail("an exchange succeeded after a failure");
  }
  if (fault == 1) Wait(second[bad]);
}

// A mail that breaks, and lets letters wait while several exchanges come.
class FakeMail : public gluon_syncbn::Mail {
 public:
  explicit FakeMail(std::atomic<bool>* hold, std::atomic<bool>* broken)
      : hold_(hold), broken_(broken) {}
  int rank() const override { return 0; }
  int size() const override { return 2; }
  void Send(int, std::string) override {
    if (*broken_) throw std::runtime_error("broken");
  }
  bool Receive(int*, std::string*) override {
    while (*hold_) std::this_thread::yield();
    return false;
  }
  bool Sent() override { return true; }

 private:
  std::atomic<bool>* const hold_;
  std::atomic<bool>* const broken_;
};

// Several exchanges come at once, and the first of them fails.
void SeveralFail() {
  std::atomic<bool> hold{true}, broken{true};
  std::vector<Answer> answers(kKeys);
  {
    ProcessAllReduce rank(std::make_unique<FakeMail>(&hold, &broken),
                          {"key0", "key1", "key2", "key3", "key4", "key5"}, {"rank 0", "rank 1"},
                          60.0);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // its thread holds the lock
    for (int k = 0; k < kKeys; ++k) Arrive(&rank, k, 0, Values(0, 0, k), &answers[k]);
    hold = false;
    for (const auto& answer : answers) Wait(answer);
  }
  for (const auto& answer : answers) {
    if (!answer.failed || answer.times != 1) Fail("an exchange did not fail once");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed =
      argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device{}();
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 60;
  std::printf("processes_stress: seed %u\n", seed);
  for (int size = 2; size <= 7; ++size) AllArrive(size, seed + static_cast<unsigned>(size), rounds);
  for (int fault = 0; fault < 4; ++fault) {
    for (unsigned i = 0; i < 3; ++i) OneFails(3 + static_cast<int>(i), seed + i, fault);
  }
  SeveralFail();
  std::printf("processes_stress: passed\n");
}
