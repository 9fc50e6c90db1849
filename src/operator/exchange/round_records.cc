// See round_records.h.
#include "exchange/round_records.h"

#include <algorithm>

namespace gluon_syncbn {
KeyRecord& RoundRecords::Of(const std::string& key) {
  KeyRecord& record = keys_[key];
  if (record.key.empty()) record.key = key;
  return record;
}

DeviceRecord& RoundRecords::DeviceOf(KeyRecord* key, const Arrival& arrival) {
  auto& devices = key->devices;
  const auto device = std::find_if(devices.begin(), devices.end(), [&](const auto& other) {
    return other.first >= arrival.participant;
  });
  if (device != devices.end() && device->first == arrival.participant) return device->second;
  Name(arrival.participant, arrival.name);
  kinds_.try_emplace(arrival.participant, arrival.kind);
  return devices.insert(device, {arrival.participant, {}})->second;
}

void RoundRecords::Add(KeyRecord* key, const Round& round, bool succeeded, Clock::time_point now) {
  if (past_.empty()) past_.resize(kPastArrivals);
  // Of those that came at the same time, the last in the round.
  const Present& latest =
      *std::max_element(round.present.rbegin(), round.present.rend(),
                        [](const Present& a, const Present& b) { return a.came < b.came; });
  const Arrival& last = latest.arrival;
  const Clock::time_point complete = succeeded ? latest.came : now;
  double all_waited = 0;
  for (const Present& p : round.present) {
    DeviceRecord& device = DeviceOf(key, p.arrival);
    if (succeeded) {  // or nobody knows whom they waited for
      const double waited = Seconds(complete - p.came);
      ++device.rounds;
      device.waited += waited;
      device.longest = std::max(device.longest, waited);
      all_waited += waited;
    }
    past_[next_++ % kPastArrivals] = {
        key,      round.id, p.arrival.participant, last.participant, p.came,
        complete, now,      p.arrival.call,        last.backward,    succeeded};
  }
  if (!succeeded) {
    ++key->failures;
    return;
  }
  key->met = true;
  ++key->rounds;
  key->elsewhere += Seconds(now - complete);
  if (round.present.size() > 1) {
    DeviceRecord& device = DeviceOf(key, last);
    ++device.last;
    device.held += all_waited;
  }
}

void RoundRecords::Name(std::uint64_t participant, const std::string& name) {
  names_.try_emplace(participant, name);
}

void RoundRecords::Reset() {
  for (auto& name_and_key : keys_) {
    KeyRecord& key = name_and_key.second;
    key.rounds = key.failures = 0;
    key.elsewhere = 0;
    for (auto& device : key.devices) device.second = {};
  }
  first_ = next_;
}

RoundRecords::Copy RoundRecords::Snapshot() const {
  Copy copy;
  copy.names = names_;
  for (const auto& name_and_key : keys_) {
    const KeyRecord& key = name_and_key.second;
    if (key.rounds + key.failures != 0) copy.keys.push_back(key);
  }
  const std::size_t oldest = std::max(first_, next_ - std::min(next_, kPastArrivals));
  copy.past.reserve(next_ - oldest);
  for (std::size_t i = oldest; i != next_; ++i) copy.past.push_back(past_[i % kPastArrivals]);
  return copy;
}

bool RoundRecords::HasMet(const std::string& key) const {
  const auto record = keys_.find(key);
  return record != keys_.end() && record->second.met;
}

std::vector<std::uint64_t> RoundRecords::CameTo(const std::string& key) const {
  std::vector<std::uint64_t> participants;
  const auto record = keys_.find(key);
  if (record == keys_.end()) return participants;
  for (const auto& device : record->second.devices) participants.push_back(device.first);
  return participants;
}

std::vector<std::uint64_t> RoundRecords::Participants(const std::string& kind) const {
  std::vector<std::uint64_t> participants;
  for (const auto& participant_and_kind : kinds_) {
    if (participant_and_kind.second == kind) participants.push_back(participant_and_kind.first);
  }
  return participants;
}

template <typename Visit>
void RoundRecords::ForEachPast(const Visit& visit) const {
  const std::size_t count = std::min(next_, kPastArrivals);
  for (std::size_t i = 1; i <= count; ++i) {
    if (!visit(past_[(next_ - i) % kPastArrivals])) return;
  }
}

std::vector<std::uint64_t> RoundRecords::ParticipantsOf(std::uint64_t round) const {
  std::vector<std::uint64_t> participants;
  ForEachPast([&](const PastArrival& past) {
    if (past.round == round) participants.push_back(past.participant);
    return true;
  });
  return participants;
}

const PastArrival* RoundRecords::LatestOf(std::uint64_t participant) const {
  const PastArrival* latest = nullptr;
  ForEachPast([&](const PastArrival& past) {
    if (past.participant == participant) latest = &past;
    return latest == nullptr;
  });
  return latest;
}

std::string RoundRecords::NameOf(std::uint64_t participant) const {
  const auto name = names_.find(participant);
  return name == names_.end() ? "participant " + std::to_string(participant) : name->second;
}

}  // namespace gluon_syncbn
