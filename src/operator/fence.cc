// A fence in the engine's order, for writes that MXNet does not tell its engine of.
#include <dmlc/logging.h>
#include <mxnet/c_api.h>
#include <mxnet/engine.h>
#include <mxnet/ndarray.h>

#include <algorithm>
#include <iterator>
#include <vector>

#define GLUON_SYNCBN_API extern "C" __attribute__((visibility("default")))

namespace {

using Vars = std::vector<mxnet::Engine::VarHandle>;

const mxnet::NDArray& ToArray(void* handle) { return *static_cast<const mxnet::NDArray*>(handle); }

Vars VarsOf(void* const* arrays, int count) {
  Vars vars;
  for (int i = 0; i < count; ++i) vars.push_back(ToArray(arrays[i]).var());
  std::sort(vars.begin(), vars.end());
  vars.erase(std::unique(vars.begin(), vars.end()), vars.end());
  return vars;
}

void Nothing(void*, void* done, void*) {
  (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
}

}  // namespace

// Lets everybody who uses `written` from now on wait for `read`.  Fails as MXNet's C API does.
GLUON_SYNCBN_API int GluonSyncBNFence(void* const* read, int num_read, void* const* written,
                                      int num_written) {
  if (num_written == 0) return 0;
  Vars targets = VarsOf(written, num_written), sources;
  const Vars all = VarsOf(read, num_read);
  std::set_difference(all.begin(), all.end(), targets.begin(), targets.end(),
                      std::back_inserter(sources));
  mxnet::Context where = ToArray(written[0]).ctx();
  auto property = mxnet::FnProperty::kAsync;
  return MXEnginePushAsync(Nothing, nullptr, nullptr, &where, sources.data(),
                           static_cast<int>(sources.size()), targets.data(),
                           static_cast<int>(targets.size()), &property);
}
