// Chaos for the exchange: many keys with 2 to 16 participants each, several rounds of a key on
// their way at a time, vectors of random sizes, random orders and delays.  Every completion is
// called once, with the right sum for its participant's own round.
//
//   chaos SEED [ROUNDS]
//
// A participant is driven by one thread at a time, but not always by the same one.  It comes to the
// rounds of a key in their order, and is up to `ahead` rounds before the slowest.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "exchange/key_barrier.h"

namespace {

using gluon_syncbn::Arrival;
using gluon_syncbn::KeyBarrier;
using gluon_syncbn::Result;

constexpr int kThreads = 4;
constexpr int kKeys = 40;

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "chaos: %s\n", what.c_str());
  std::abort();
}

// A whole number, so that sums are exact in any order.
double Value(int key, int round, int participant, std::size_t i) {
  return static_cast<double>((key * 7919 + round * 104729 + participant * 1299709) % 1000003) +
         static_cast<double>(i);
}

// One key: its participants, and how far each has come.
struct Key {
  std::string name;
  int number, participants, rounds, ahead;
  std::vector<std::size_t> sizes;           // by round
  std::vector<std::atomic<int>> begun;      // rounds, by participant
  std::vector<std::atomic<int>> completed;  // by participant

  Key(int number, int participants, int rounds, int ahead, std::vector<std::size_t> sizes)
      : name("key" + std::to_string(number)),
        number(number),
        participants(participants),
        rounds(rounds),
        ahead(ahead),
        sizes(std::move(sizes)),
        begun(static_cast<std::size_t>(participants)),
        completed(static_cast<std::size_t>(participants)) {}
};

void Check(const Key& key, int round, const Result& result) {
  if (result.total == nullptr) Fail(key.name + " failed: " + result.error);
  const auto& total = *result.total;
  if (total.size() != key.sizes[static_cast<std::size_t>(round)]) Fail("a sum of another round");
  for (std::size_t i = 0; i < total.size(); ++i) {
    double wanted = 0;
    for (int p = 0; p < key.participants; ++p) wanted += Value(key.number, round, p, i);
    if (total[i] != wanted) Fail("a wrong sum of " + key.name);
  }
}

// Lets a participant come to its next round, unless it is too far ahead.
void Arrive(KeyBarrier* barrier, Key* key, int participant,
            std::atomic<std::int64_t>* completions) {
  auto& begun = key->begun[static_cast<std::size_t>(participant)];
  const int round = begun;
  if (round - key->completed[static_cast<std::size_t>(participant)] >= key->ahead) return;
  begun = round + 1;
  Arrival arrival;
  arrival.key = key->name;
  arrival.participant = static_cast<std::uint64_t>(participant);
  arrival.kind = "cpu";
  arrival.name = "device " + std::to_string(participant);
  arrival.num_devices = key->participants;
  arrival.values.resize(key->sizes[static_cast<std::size_t>(round)]);
  for (std::size_t i = 0; i < arrival.values.size(); ++i) {
    arrival.values[i] = Value(key->number, round, participant, i);
  }
  const auto called = std::make_shared<std::atomic<bool>>(false);
  barrier->Arrive(std::move(arrival), [=](const Result& result) {
    if (called->exchange(true)) Fail("a completion was called twice");
    Check(*key, round, result);
    ++key->completed[static_cast<std::size_t>(participant)];
    ++*completions;
  });
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed =
      argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device{}();
  const int all_rounds = argc > 2 ? std::atoi(argv[2]) : 100000;
  std::printf("chaos: seed %u\n", seed);
  std::fflush(stdout);
  std::mt19937 random(seed);
  std::vector<std::unique_ptr<Key>> keys;
  std::vector<std::pair<Key*, int>>
      participants;  // each with a lock: one thread drives it at a time
  std::int64_t arrivals = 0, rounds = 0;
  for (int k = 0; k < kKeys; ++k) {
    const int count = 2 + static_cast<int>(random() % 15);
    const int of_key = k + 1 == kKeys ? all_rounds - static_cast<int>(rounds) : all_rounds / kKeys;
    std::vector<std::size_t> sizes(static_cast<std::size_t>(of_key));
    for (auto& size : sizes) size = 1 + random() % (random() % 10 == 0 ? 600 : 8);
    keys.push_back(std::make_unique<Key>(k, count, of_key, 1 + static_cast<int>(random() % 6),
                                         std::move(sizes)));
    for (int p = 0; p < count; ++p) participants.emplace_back(keys.back().get(), p);
    arrivals += static_cast<std::int64_t>(count) * of_key;
    rounds += of_key;
  }
  std::vector<std::mutex> driven(participants.size());
  std::atomic<std::int64_t> completions{0};
  KeyBarrier barrier(60.0);
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 mine(seed + 1000u * static_cast<unsigned>(t + 1));
      while (completions < arrivals) {
        const std::size_t which = mine() % participants.size();
        std::unique_lock<std::mutex> lock(driven[which], std::try_to_lock);
        if (!lock.owns_lock()) continue;
        auto [key, participant] = participants[which];
        const int at_once = 1 + static_cast<int>(mine() % 4);
        for (int i = 0; i < at_once; ++i) {
          if (key->begun[static_cast<std::size_t>(participant)] == key->rounds) break;
          Arrive(&barrier, key, participant, &completions);
        }
        if (mine() % 2000 == 0) {
          std::this_thread::sleep_for(std::chrono::microseconds(mine() % 500));
        } else if (mine() % 10 == 0) {
          std::this_thread::yield();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  for (const auto& key : keys) {
    for (int p = 0; p < key->participants; ++p) {
      if (key->completed[static_cast<std::size_t>(p)] != key->rounds) Fail("rounds are missing");
    }
  }
  if (barrier.Failures() != 0) Fail("rounds failed");
  std::printf("chaos: %lld rounds with %lld arrivals, all right, in %.1f s\n",
              static_cast<long long>(rounds), static_cast<long long>(arrivals), took.count());
}
