// See passes.h.
#include "adapter/passes.h"

#include <dmlc/logging.h>
#include <mxnet/base.h>
#include <mxnet/c_api.h>
#include <mxnet/engine.h>
#include <mxnet/ndarray.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "exchange/process_barrier.h"

namespace gluon_syncbn {
namespace {

using Vars = std::vector<mxnet::Engine::VarHandle>;

Vars VarsOf(const Arrays& arrays) {
  Vars vars;
  for (const auto* array : arrays) vars.push_back(array->var());
  std::sort(vars.begin(), vars.end());
  vars.erase(std::unique(vars.begin(), vars.end()), vars.end());
  return vars;
}

// Queues `work`.  It must be short, because it may run in the calling thread.
void Push(const mxnet::Context& context, const Vars& read, const Vars& written,
          std::function<void()> work) {
  using Work = std::function<void()>;
  mxnet::Context where = context;
  auto property = mxnet::FnProperty::kAsync;
  auto owned = std::make_unique<Work>(std::move(work));
  const auto run = [](void*, void* done, void* work) {
    (*static_cast<Work*>(work))();
    (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
  };
  const auto free = [](void* work) { std::unique_ptr<Work>{static_cast<Work*>(work)}; };
  // The engine takes ownership even if this fails.
  const int failed =
      MXEnginePushAsync(run, owned.release(), free, &where, const_cast<Vars&>(read).data(),
                        static_cast<int>(read.size()), const_cast<Vars&>(written).data(),
                        static_cast<int>(written.size()), &property);
  if (failed != 0) throw dmlc::Error(MXGetLastError());
}

}  // namespace

std::uint64_t Participant(const mxnet::Context& context) {
  return (static_cast<std::uint64_t>(context.dev_mask()) << 32) |
         static_cast<std::uint32_t>(context.dev_id);
}

void BeginPass(const std::vector<std::string>& keys, const Arrays& order, const Pass& pass) {
  if (order.empty()) return;
  const auto barrier = ProcessBarrier();
  const mxnet::Context context = order.front()->ctx();
  const std::uint64_t participant = Participant(context);
  if (!barrier->Announce(keys, participant, pass)) return;
  Push(context, {}, VarsOf(order), [=] {
    for (const auto& key : keys) barrier->SetPass(key, participant, pass);
  });
}

void Fence(const Arrays& read, const Arrays& written) {
  if (written.empty()) return;
  const Vars targets = VarsOf(written);
  Vars sources = VarsOf(read);
  const auto is_target = [&](auto var) {
    return std::binary_search(targets.begin(), targets.end(), var);
  };
  sources.erase(std::remove_if(sources.begin(), sources.end(), is_target), sources.end());
  Push(written.front()->ctx(), sources, targets, [] {});
}

CallScope& CurrentCall() {
  static thread_local CallScope scope;
  return scope;
}

}  // namespace gluon_syncbn
