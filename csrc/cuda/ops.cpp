// SPDX-License-Identifier: Apache-2.0
// The operators fastcache_cuda::* on torch's stable ABI. The only file here that knows torch, and
// it knows no CUDA header; scratch memory of the reductions comes from fastcache/ops/backends/cuda.py.
//
// Compiled without a GPU; nothing here has run on one yet.
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../call.h"
#include "kernels.h"

namespace fastcache::cuda {
namespace {

// Makes the device of `tensor` current and gives the stream that torch is using on it.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  operator void*() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// The kernels know one type per call.
class UniformCall : public Call {
 public:
  UniformCall(const Tensor& first, bool per_sample = false)
      : Call(first, per_sample), type(type_of(first, "the first tensor")) {}

  Operand add(const Tensor& tensor, const char* name) {
    const Operand operand = Call::add(tensor, name);
    STD_TORCH_CHECK(operand.type == type, name, " has another dtype");
    return operand;
  }

  const Type type;
};

void check(const char* op, const char* error) { STD_TORCH_CHECK(!error, op, ": ", error); }

double* scratch_in(const Tensor& memory, const Shape& shape) {
  const int64_t wanted = scratch_of(shape.samples);
  STD_TORCH_CHECK(memory.is_contiguous() && memory.element_size() == 8 && memory.numel() >= wanted,
                  "scratch must be 64-bit with ", wanted, " elements");
  return static_cast<double*>(memory.data_ptr());
}

void op_residual_l1(Tensor sums, Tensor scratch, Tensor y, Tensor x, Tensor prev,
                    std::optional<Tensor> out, bool per_sample) {
  UniformCall call(y, per_sample);
  const Operand at_y = call.add(y, "y"), at_x = call.add(x, "x"), at_prev = call.add(prev, "prev");
  const Operand at_out = call.add_stored(out, at_prev);
  const Shape shape = call.shape();
  float* result = result_of(sums, per_sample ? 2 * shape.samples : 2, "sums");
  check("residual_l1", residual_l1(call.type, shape, at_y, at_x, at_prev, at_out, per_sample,
                                   result, scratch_in(scratch, shape), Stream(y)));
}

void op_residual_magnitude(Tensor mean, Tensor scratch, Tensor y, Tensor x, Tensor prev,
                           std::optional<Tensor> out, double eps, bool per_sample) {
  UniformCall call(y, per_sample);
  const Operand at_y = call.add(y, "y"), at_x = call.add(x, "x"), at_prev = call.add(prev, "prev");
  const Operand at_out = call.add_stored(out, at_prev);
  const Shape shape = call.shape();
  float* result = result_of(mean, per_sample ? shape.samples : 1, "mean");
  check("residual_magnitude",
        residual_magnitude(call.type, shape, at_y, at_x, at_prev, at_out, eps, per_sample, result,
                           scratch_in(scratch, shape), Stream(y)));
}

void combine(const Tensor& out, const std::vector<Tensor>& tensors, Terms terms) {
  terms.count = static_cast<int>(tensors.size());
  STD_TORCH_CHECK(terms.count >= 1 && terms.count <= MAX_TERMS, "1 to ", MAX_TERMS,
                  " tensors, got ", terms.count);
  UniformCall call(out);
  const Operand to = call.add(out, "out");
  for (int t = 0; t < terms.count; ++t) terms.tensor[t] = call.add(tensors[t], "tensors");
  check("linear_combine", linear_combine(call.type, call.shape(), to, terms, Stream(out)));
}

void op_linear_combine(Tensor out, std::vector<Tensor> tensors, std::vector<double> weights) {
  STD_TORCH_CHECK(weights.size() == tensors.size(), tensors.size(), " tensors, ", weights.size(),
                  " weights");
  Terms terms = {};
  for (size_t t = 0; t < weights.size() && t < MAX_TERMS; ++t)
    terms.weight[t] = static_cast<float>(weights[t]);
  combine(out, tensors, terms);
}

void op_linear_combine_device(Tensor out, std::vector<Tensor> tensors, Tensor weights) {
  Terms terms = {};
  terms.device_weight = result_of(weights, static_cast<int64_t>(tensors.size()), "weights");
  combine(out, tensors, terms);
}

}  // namespace
}  // namespace fastcache::cuda

STABLE_TORCH_LIBRARY(fastcache_cuda, m) {
  m.def(
      "residual_l1(Tensor(a!) sums, Tensor(b!) scratch, Tensor y, Tensor x, Tensor prev, "
      "Tensor(c!)? out, bool per_sample) -> ()");
  m.def(
      "residual_magnitude(Tensor(a!) mean, Tensor(b!) scratch, Tensor y, Tensor x, Tensor prev, "
      "Tensor(c!)? out, float eps, bool per_sample) -> ()");
  m.def("linear_combine(Tensor(a!) out, Tensor[] tensors, float[] weights) -> ()");
  m.def("linear_combine_device(Tensor(a!) out, Tensor[] tensors, Tensor weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastcache_cuda, CUDA, m) {
  m.impl("residual_l1", TORCH_BOX(&fastcache::cuda::op_residual_l1));
  m.impl("residual_magnitude", TORCH_BOX(&fastcache::cuda::op_residual_magnitude));
  m.impl("linear_combine", TORCH_BOX(&fastcache::cuda::op_linear_combine));
  m.impl("linear_combine_device", TORCH_BOX(&fastcache::cuda::op_linear_combine_device));
}
