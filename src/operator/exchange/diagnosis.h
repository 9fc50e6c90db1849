// Why a round is incomplete at its deadline, as far as the exchange can know: who is missing, and
// what they have done instead.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "exchange/round.h"
#include "exchange/round_records.h"

namespace gluon_syncbn {

struct Evidence {
  const Round& round;
  Clock::time_point now;
  const std::vector<const Round*>& open;  // all incomplete rounds, this one among them
  const RoundRecords& past;
  const std::map<std::uint64_t, Call>& calls;  // the latest of this key, by participant
  // The participants that were told of the round's pass; empty outside of one.
  const std::vector<std::uint64_t>& announced;
};

// The likeliest cause, the most certain first.
Diagnosis Diagnose(const Evidence& evidence);

}  // namespace gluon_syncbn
