// SPDX-License-Identifier: Apache-2.0
// The operators that find weights of cached values.
#pragma once

#include <vector>

#include "chosen.h"
#include "guided.h"
#include "solve.h"

namespace fastcache {

// Contiguous, or [B, T, C] with dense rows at any distance; the others have the shape of the first.
class GuideCall {
 public:
  GuideCall(const Tensor& first, bool per_sample)
      : sizes_(first.sizes()), rows_apart_(sizes_.size() == 3) {
    const size_t dim = sizes_.size();
    const int64_t samples = dim && (per_sample || rows_apart_) ? sizes_[0] : 1;
    const int64_t length = first.numel() / samples;
    shape = {samples, length, dim < 2 ? length : sizes_[dim - 1]};
  }

  Guide add(const Tensor& tensor, const char* name) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    STD_TORCH_CHECK(sizes.equals(sizes_), name, " has another shape");
    STD_TORCH_CHECK(rows_apart_ ? strides[2] == 1 || sizes[2] == 1 : tensor.is_contiguous(), name,
                    " must have dense rows");
    const Operand all{static_cast<char*>(tensor.data_ptr()), type_of(tensor, name),
                      rows_apart_ ? strides[0] : shape.length};
    return {all, rows_apart_ ? strides[1] : shape.width};
  }

  Shape shape;

 private:
  torch::headeronly::IntHeaderOnlyArrayRef sizes_;
  bool rows_apart_;
};

inline double* doubles_of(const Tensor& tensor, int64_t count, const char* name) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  STD_TORCH_CHECK(
      code == aoti_torch_dtype_float64() && tensor.is_contiguous() && tensor.numel() == count, name,
      " must be contiguous float64 with ", count, " elements");
  return static_cast<double*>(tensor.data_ptr());
}

inline int checked_order(int64_t order) {
  STD_TORCH_CHECK(order >= 1 && order <= MAX_ORDER, "order 1 to ", MAX_ORDER, ", got ", order);
  return static_cast<int>(order);
}

inline void op_guided_sums(Tensor sums, Tensor guide, std::vector<Tensor> guides, bool per_sample) {
  const int order = checked_order(static_cast<int64_t>(guides.size()) - 1);
  const GuideCall call(guide, per_sample);
  Guide at[MAX_ORDER + 2] = {call.add(guide, "guide")};
  for (int j = 0; j <= order; ++j) {
    at[j + 1] = call.add(guides[j], "guides");
    STD_TORCH_CHECK(at[j + 1].all.type == at[1].all.type, "guides must have one dtype");
  }
  const int64_t groups = per_sample ? call.shape.samples : 1;
  guided_sums(kernels(), parallel, call.shape, at, order, groups,
              doubles_of(sums, groups * sums_of(order), "sums"));
}

inline void op_guided_solve(Tensor weights, Tensor misfit, Tensor sums, Tensor prior,
                            double ridge) {
  const int order = checked_order(prior.numel());
  const int64_t groups = misfit.numel(), terms = weights.size(1);
  const int64_t base = terms - (order + 1);  // ones in front
  STD_TORCH_CHECK(base == 0 || base == 1, "weights must have ", order + 1, " or ", order + 2,
                  " columns");
  const double* from = doubles_of(sums, groups * sums_of(order), "sums");
  const float* want = result_of(prior, order, "prior");
  float* to = result_of(weights, groups * terms, "weights");
  float* left = result_of(misfit, groups, "misfit");
  for (int64_t i = 0; i < groups; ++i, to += terms, from += sums_of(order)) {
    if (base) to[0] = 1;
    left[i] = static_cast<float>(guided_solve(from, want, order, ridge, to + base));
  }
}

// The sums of all, which have one size.
inline std::vector<double> total_of(const std::vector<Tensor>& sums, int64_t count) {
  std::vector<double> total(count);
  for (const Tensor& each : sums)
    for (int64_t i = 0; i < count; ++i) total[i] += doubles_of(each, count, "sums")[i];
  return total;
}

inline void op_guided_check(Tensor weights, Tensor misfit, Tensor sums, std::vector<Tensor> values,
                            Tensor prior, Tensor before, double ridge) {
  const int order = checked_order(prior.numel());
  STD_TORCH_CHECK(order > 1, "order 2 to ", MAX_ORDER, ", got 1");
  const std::vector<double> known = total_of(values, sums_of(order - 1));
  const double* from = doubles_of(sums, sums_of(order), "sums");
  float* to = result_of(weights, order + 2, "weights");
  to[0] = 1;
  *result_of(misfit, 1, "misfit") = static_cast<float>(
      guided_check(from, known.data(), result_of(prior, order, "prior"),
                   result_of(before, order - 1, "before"), order, ridge, to + 1));
}

inline void op_exponential_solve(Tensor weights, std::vector<Tensor> sums, Tensor reach,
                                 double ridge) {
  const std::vector<double> total = total_of(sums, sums_of(2));
  exponential_solve(total.data(), *result_of(reach, 1, "reach"), ridge,
                    result_of(weights, 4, "weights"));
}

}  // namespace fastcache
