// SPDX-License-Identifier: Apache-2.0
// The operators fastcache_C::* for CPU tensors, on torch's stable ABI: argument checks, layout,
// threads.
//
// Outputs come first and are allocated by the caller. fastcache/ops/backends/cpp.py holds the Python side and
// sends empty tensors elsewhere.
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "chosen.h"
#include "guided_ops.h"

namespace fastcache {
namespace {

void op_residual_l1(Tensor sums, Tensor y, Tensor x, Tensor prev, std::optional<Tensor> out,
                    bool per_sample) {
  Call call(y, per_sample);
  const Operand at_y = call.add(y, "y"), at_x = call.add(x, "x"), at_prev = call.add(prev, "prev");
  STD_TORCH_CHECK(at_x.type == at_y.type, "x must have the dtype of y");
  const Operand at_out = call.add_stored(out, at_prev);
  const Shape shape = call.shape();
  float* result = result_of(sums, per_sample ? 2 * shape.samples : 2, "sums");
  std::vector<double> totals(2 * shape.samples);
  residual_l1(kernels(), parallel, shape, at_y, at_x, at_prev, at_out, totals.data());
  if (!per_sample)
    for (int64_t i = 1; i < shape.samples; ++i)
      totals[0] += totals[2 * i], totals[1] += totals[2 * i + 1];
  for (int64_t i = 0; i < sums.numel(); ++i) result[i] = static_cast<float>(totals[i]);
}

void op_residual_magnitude(Tensor mean, Tensor y, Tensor x, Tensor prev, std::optional<Tensor> out,
                           double eps, bool per_sample) {
  Call call(y, per_sample);
  const Operand at_y = call.add(y, "y"), at_x = call.add(x, "x"), at_prev = call.add(prev, "prev");
  STD_TORCH_CHECK(at_x.type == at_y.type, "x must have the dtype of y");
  const Operand at_out = call.add_stored(out, at_prev);
  const Shape shape = call.shape();
  float* result = result_of(mean, per_sample ? shape.samples : 1, "mean");
  std::vector<double> totals(shape.samples);
  residual_magnitude(kernels(), parallel, shape, at_y, at_x, at_prev, at_out, eps, totals.data());
  int64_t rows = shape.length / shape.width;
  if (!per_sample) {
    for (int64_t i = 1; i < shape.samples; ++i) totals[0] += totals[i];
    rows *= shape.samples;
  }
  for (int64_t i = 0; i < mean.numel(); ++i) result[i] = static_cast<float>(totals[i] / rows);
}

// A modulation [B or 1, T or 1, C] of x [B, T, C], dense.
Modulation modulation_of(const Tensor& rows, const Tensor& x, const Operand& like,
                         const char* name) {
  STD_TORCH_CHECK(rows.dim() == 3 && rows.is_contiguous(), name, " must be dense [B, T, C]");
  const Type type = type_of(rows, name);
  STD_TORCH_CHECK(type == like.type || type == Type::f32, name,
                  " must have the dtype of x, or float32");
  for (int64_t d = 0; d < 3; ++d)
    STD_TORCH_CHECK(rows.size(d) == x.size(d) || (d < 2 && rows.size(d) == 1), name,
                    " has another shape");
  const int64_t width = rows.size(2), tokens = rows.size(1);
  return {static_cast<const char*>(rows.data_ptr()), type,
          rows.size(0) == 1 ? 0 : tokens * width, tokens == 1 ? 0 : width};
}

void op_modulated_l1(Tensor sums, Tensor x, Tensor scale, Tensor shift, Tensor prev,
                     std::optional<Tensor> out, double eps) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, T, C]");
  Call call(x);
  const Operand at_x = call.add(x, "x"), at_prev = call.add(prev, "prev");
  const Operand at_out = call.add_stored(out, at_prev);
  const Modulation by = modulation_of(scale, x, at_x, "scale");
  const Modulation plus = modulation_of(shift, x, at_x, "shift");
  STD_TORCH_CHECK(plus.type == by.type, "shift must have the dtype of scale");
  float* result = result_of(sums, 2, "sums");
  double totals[2];
  modulated_l1(kernels(), parallel, call.shape(), at_x, by, plus, at_prev, at_out, x.size(1), eps,
               totals);
  for (int i = 0; i < 2; ++i) result[i] = static_cast<float>(totals[i]);
}

void op_linear_combine(Tensor out, std::vector<Tensor> terms, std::vector<double> weights) {
  const int count = static_cast<int>(terms.size());
  STD_TORCH_CHECK(count >= 1 && count <= MAX_TERMS, "1 to ", MAX_TERMS, " tensors, got ", count);
  STD_TORCH_CHECK(weights.size() == terms.size(), count, " tensors, ", weights.size(), " weights");
  Call call(out);
  Operand at[MAX_TERMS];
  float scale[MAX_TERMS];
  for (int t = 0; t < count; ++t) {
    at[t] = call.add(terms[t], "tensors");
    scale[t] = static_cast<float>(weights[t]);
  }
  const Operand to = call.add(out, "out");
  combine(kernels(), parallel, call.shape(), to, at, scale, count);
}

void op_combine_samples(Tensor out, std::vector<Tensor> terms, Tensor weights) {
  const int count = static_cast<int>(terms.size());
  STD_TORCH_CHECK(count >= 1 && count <= MAX_TERMS, "1 to ", MAX_TERMS, " tensors, got ", count);
  Call call(out, true);
  Operand at[MAX_TERMS];
  for (int t = 0; t < count; ++t) at[t] = call.add(terms[t], "tensors");
  const Operand to = call.add(out, "out");
  const Shape shape = call.shape();
  const float* scale = result_of(weights, shape.samples * count, "weights");
  combine_samples(kernels(), parallel, shape, to, at, scale, count);
}

// out <- x + weight * r, exact for weights 1 and -1: residual_apply and residual_store
void op_add_scaled(Tensor out, Tensor x, Tensor r, double weight) {
  Call call(out);
  const Operand at[] = {call.add(x, "x"), call.add(r, "r")}, to = call.add(out, "out");
  const float scale[] = {1, static_cast<float>(weight)};
  combine(kernels(), parallel, call.shape(), to, at, scale, 2);
}

// out[:B] <- cond + w_low * low + w_high * high, out[B:] <- cond
void op_guidance_combine(Tensor out, Tensor cond, Tensor low, Tensor high, double w_low,
                         double w_high) {
  Call call(cond);
  const Operand terms[] = {call.add(cond, "cond"), call.add(low, "low"), call.add(high, "high")};
  const Operand to = call.add(out, "out", 2);
  const float weights[] = {1, static_cast<float>(w_low), static_cast<float>(w_high)};
  const Operand second = {at(to, cond.size(0), 0), to.type, to.stride};
  guidance_combine(kernels(), parallel, call.shape(), to, second, terms, weights);
}

void op_taylor_update(std::vector<Tensor> factors, Tensor y, double delta) {
  const int count = static_cast<int>(factors.size());
  STD_TORCH_CHECK(count >= 1 && count <= MAX_TERMS, "1 to ", MAX_TERMS, " factors, got ", count);
  Call call(y);
  const Operand at_y = call.add(y, "y");
  Operand at[MAX_TERMS];
  for (int j = 0; j < count; ++j) {
    at[j] = call.add(factors[j], "factors");
    STD_TORCH_CHECK(at[j].type == at[0].type, "factors must have one dtype");
  }
  taylor_update(kernels(), parallel, call.shape(), at, count, at_y, static_cast<float>(delta));
}

std::string op_capability() { return checked_capability(); }

}  // namespace
}  // namespace fastcache

// What a reused step runs, also without torch's dispatcher, which takes several times as long as the kernel of a small
// tensor. Called from Python by address, with contiguous CPU tensors of one shape and dtype: nothing is checked here. What
// does not change from step to step comes in one piece of memory, since each argument of a foreign call is converted.
#define FASTCACHE_BY_ADDRESS extern "C" __attribute__((visibility("default")))

namespace fastcache {
namespace {
Operand dense(const void* data, int64_t type, int64_t length) {
  return {static_cast<char*>(const_cast<void*>(data)), Type(type), length};
}
}  // namespace
}  // namespace fastcache

// held: dtype, elements of a sample, samples, addresses of the sums, [samples, 2] or null, and of prev.
// Returns the first sum over the second, of the first sample.
FASTCACHE_BY_ADDRESS double fastcache_residual_l1(const int64_t* held, const void* y,
                                                  const void* x) noexcept {
  using namespace fastcache;
  const int64_t type = held[0], length = held[1], samples = held[2];
  const auto sums = reinterpret_cast<float*>(held[3]);
  const auto prev = reinterpret_cast<const void*>(held[4]);
  double one[2];
  std::vector<double> more(samples > 1 ? 2 * samples : 0);
  double* totals = samples > 1 ? more.data() : one;
  residual_l1(kernels(), parallel, {samples, length, 1}, dense(y, type, length),
              dense(x, type, length), dense(prev, type, length), dense(nullptr, type, length),
              totals);
  for (int64_t i = 0; sums && i < 2 * samples; ++i) sums[i] = static_cast<float>(totals[i]);
  return double(static_cast<float>(totals[0])) / double(static_cast<float>(totals[1]));
}

// held: dtype, elements, number of terms, and the addresses of all but the first one. weights: of all.
FASTCACHE_BY_ADDRESS void fastcache_linear_combine(const int64_t* held, const double* weights,
                                                   void* out, const void* first) noexcept {
  using namespace fastcache;
  const int64_t type = held[0], length = held[1], count = held[2];
  Operand at[MAX_TERMS];
  float scale[MAX_TERMS];
  for (int64_t t = 0; t < count; ++t) {
    at[t] = dense(t ? reinterpret_cast<const void*>(held[2 + t]) : first, type, length);
    scale[t] = static_cast<float>(weights[t]);
  }
  combine(kernels(), parallel, {1, length, 1}, dense(out, type, length), at, scale,
          static_cast<int>(count));
}

STABLE_TORCH_LIBRARY(fastcache_C, m) {
  m.def(
      "residual_l1(Tensor(a!) sums, Tensor y, Tensor x, Tensor prev, Tensor(b!)? out, bool "
      "per_sample) -> ()");
  m.def(
      "residual_magnitude(Tensor(a!) mean, Tensor y, Tensor x, Tensor prev, Tensor(b!)? out, float "
      "eps, "
      "bool per_sample) -> ()");
  m.def(
      "modulated_l1(Tensor(a!) sums, Tensor x, Tensor scale, Tensor shift, Tensor prev, "
      "Tensor(b!)? out, float eps) -> ()");
  m.def("linear_combine(Tensor(a!) out, Tensor[] terms, float[] weights) -> ()");
  m.def("combine_samples(Tensor(a!) out, Tensor[] terms, Tensor weights) -> ()");
  m.def("add_scaled(Tensor(a!) out, Tensor x, Tensor r, float weight) -> ()");
  m.def(
      "guidance_combine(Tensor(a!) out, Tensor cond, Tensor low, Tensor high, float w_low, float "
      "w_high) "
      "-> ()");
  m.def("taylor_update(Tensor(a!)[] factors, Tensor y, float delta) -> ()");
  m.def("guided_sums(Tensor(a!) sums, Tensor guide, Tensor[] guides, bool per_sample) -> ()");
  m.def(
      "guided_solve(Tensor(a!) weights, Tensor(b!) misfit, Tensor sums, Tensor prior, float ridge) "
      "-> ()");
  m.def(
      "guided_check(Tensor(a!) weights, Tensor(b!) misfit, Tensor sums, Tensor[] values, Tensor "
      "prior, Tensor before, float ridge) -> ()");
  m.def("exponential_solve(Tensor(a!) weights, Tensor[] sums, Tensor reach, float ridge) -> ()");
  m.def("capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastcache_C, CPU, m) {
  m.impl("residual_l1", TORCH_BOX(&fastcache::op_residual_l1));
  m.impl("residual_magnitude", TORCH_BOX(&fastcache::op_residual_magnitude));
  m.impl("modulated_l1", TORCH_BOX(&fastcache::op_modulated_l1));
  m.impl("linear_combine", TORCH_BOX(&fastcache::op_linear_combine));
  m.impl("combine_samples", TORCH_BOX(&fastcache::op_combine_samples));
  m.impl("add_scaled", TORCH_BOX(&fastcache::op_add_scaled));
  m.impl("guidance_combine", TORCH_BOX(&fastcache::op_guidance_combine));
  m.impl("taylor_update", TORCH_BOX(&fastcache::op_taylor_update));
  m.impl("guided_sums", TORCH_BOX(&fastcache::op_guided_sums));
  m.impl("guided_solve", TORCH_BOX(&fastcache::op_guided_solve));
  m.impl("guided_check", TORCH_BOX(&fastcache::op_guided_check));
  m.impl("exponential_solve", TORCH_BOX(&fastcache::op_exponential_solve));
}

STABLE_TORCH_LIBRARY_IMPL(fastcache_C, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&fastcache::op_capability));
}
