// SPDX-License-Identifier: Apache-2.0
// From torch tensors to operands, on the stable ABI: checks that the Python side does not make.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "layout.h"

namespace fastcache {

using torch::stable::Tensor;

// By the shim's own codes: torch::stable::Tensor::scalar_type asks for a dozen of them per call.
inline Type type_of(const Tensor& tensor, const char* name) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  if (code == aoti_torch_dtype_float32()) return Type::f32;
  if (code == aoti_torch_dtype_float16()) return Type::f16;
  STD_TORCH_CHECK(code == aoti_torch_dtype_bfloat16(), name,
                  " must be float32, float16 or bfloat16");
  return Type::bf16;
}

// Collects the tensors of one call: they share a shape, and their samples (the slices along
// dimension 0) are dense. When all are contiguous the whole batch counts as one sample, unless
// `per_sample`.
class Call {
 public:
  explicit Call(const Tensor& first, bool per_sample = false)
      : dim_(first.dim()), sizes_(first.sizes().data()), whole_(!per_sample) {
    shape_ = {1, 1, dim_ ? sizes_[dim_ - 1] : 1};
    for (int64_t d = 1; d < dim_; ++d) shape_.length *= sizes_[d];
    if (dim_) shape_.samples = sizes_[0];
  }

  // `copies` times as many samples as the others have.
  Operand add(const Tensor& tensor, const char* name, int64_t copies = 1) {
    STD_TORCH_CHECK(tensor.dim() == dim_, name, " has another number of dimensions");
    const int64_t *sizes = tensor.sizes().data(), *strides = tensor.strides().data();
    int64_t dense = 1;
    for (int64_t d = dim_ - 1; d >= 0; --d) {
      STD_TORCH_CHECK(sizes[d] == sizes_[d] * (d ? 1 : copies), name, " has another shape");
      if (d && sizes[d] != 1)
        STD_TORCH_CHECK(strides[d] == dense, name, " must be dense within a sample");
      if (d) dense *= sizes[d];
    }
    const int64_t stride = dim_ && sizes[0] != 1 ? strides[0] : dense;
    whole_ = whole_ && stride == dense;
    return {static_cast<char*>(tensor.data_ptr()), type_of(tensor, name), stride};
  }

  // The optional copy of the residual: like the stored tensor it is compared with.
  Operand add_stored(const std::optional<Tensor>& out, const Operand& prev) {
    if (!out) return {nullptr, prev.type, 0};
    const Operand operand = add(*out, "out");
    STD_TORCH_CHECK(operand.type == prev.type, "out must have the dtype of prev");
    return operand;
  }

  // After the last add.
  Shape shape() const {
    return whole_ ? Shape{1, shape_.samples * shape_.length, shape_.width} : shape_;
  }

 private:
  int64_t dim_;
  const int64_t* sizes_;
  bool whole_;
  Shape shape_;
};

inline float* result_of(const Tensor& result, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      type_of(result, name) == Type::f32 && result.is_contiguous() && result.numel() == count, name,
      " must be contiguous float32 with ", count, " elements");
  return static_cast<float*>(result.data_ptr());
}

}  // namespace fastcache
