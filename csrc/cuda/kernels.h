// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' launchers: raw pointers and a stream, no torch and no CUDA headers.
//
// Compiled and inspected without a GPU; nothing here has run on one yet.
//
// All tensors of a call have one type. A launcher returns null, or what went wrong.
#pragma once

#include "../layout.h"

namespace fastcache::cuda {

constexpr int MAX_TERMS = 5;

struct Terms {
  Operand tensor[MAX_TERMS];
  float weight[MAX_TERMS];
  const float* device_weight;  // used instead of `weight` unless null
  int count;
};

// Blocks per launch of a reduction, fixed so that the bits do not depend on the GPU: with 256
// threads and at most 64 registers four blocks fit on an SM, and 512 is one wave on 132 of them.
constexpr int64_t BLOCKS = 512;

// Doubles that a reduction of `samples` samples wants as scratch memory of its own, unset: a counter
// that it may need, and two partial sums per block.
inline int64_t scratch_of(int64_t samples) { return 1 + 2 * (samples > BLOCKS ? samples : BLOCKS); }

// sums: float [2], or [samples, 2] if per_sample; out <- r unless absent
const char* residual_l1(Type type, Shape shape, Operand y, Operand x, Operand prev, Operand out,
                        bool per_sample, float* sums, double* scratch, void* stream);

// mean: float [1], or [samples, 1] if per_sample; out may be prev
const char* residual_magnitude(Type type, Shape shape, Operand y, Operand x, Operand prev,
                               Operand out, double eps, bool per_sample, float* mean,
                               double* scratch, void* stream);

const char* linear_combine(Type type, Shape shape, Operand out, const Terms& terms, void* stream);

}  // namespace fastcache::cuda
