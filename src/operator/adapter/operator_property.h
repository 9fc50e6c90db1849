// The base of our operators' properties: their parameters, and how MXNet copies them.
#pragma once

#include <dmlc/parameter.h>
#include <mxnet/operator.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace gluon_syncbn {

// `Self` is the derived class (for Copy), `Param` its dmlc::Parameter.
template <typename Self, typename Param>
class ParameterizedProperty : public mxnet::OperatorProperty {
 public:
  void Init(const std::vector<std::pair<std::string, std::string>>& kwargs) override {
    param_.Init(kwargs);
  }
  std::map<std::string, std::string> GetParams() const override { return param_.__DICT__(); }
  mxnet::OperatorProperty* Copy() const override {
    return new Self(static_cast<const Self&>(*this));
  }
  // MXNet's default infers types again, from outputs of type 0, which is float32.
  mxnet::Operator* CreateOperatorEx(mxnet::Context context, mxnet::ShapeVector*,
                                    std::vector<int>*) const override {
    return this->CreateOperator(context);
  }

 protected:
  Param param_;
};

}  // namespace gluon_syncbn
