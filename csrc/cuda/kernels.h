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

// Scratch memory of the reductions: one counter, zero before and after each launch, and the partial
// sums. Launches that may overlap, that is those of different streams, need one each.
struct Workspace {
  unsigned* counter;
  double* partial;  // MAX_PARTIALS pairs
};

constexpr int64_t MAX_PARTIALS = 65536;

// sums: float [2], or [samples, 2] if per_sample; out <- r unless absent
const char* residual_l1(Type type, Shape shape, Operand y, Operand x, Operand prev, Operand out,
                        bool per_sample, float* sums, Workspace workspace, void* stream);

// mean: float [1], or [samples, 1] if per_sample; out may be prev
const char* residual_magnitude(Type type, Shape shape, Operand y, Operand x, Operand prev,
                               Operand out, double eps, bool per_sample, float* mean,
                               Workspace workspace, void* stream);

const char* linear_combine(Type type, Shape shape, Operand out, const Terms& terms, void* stream);

// flag <- 0 if sums[0] / sums[1] <= threshold, else 1, also for NaN: 1 means compute.
// `conditional`, unless 0, is the cudaGraphConditionalHandle of a node that runs while the flag is
// set.
const char* decide(const float* sums, double threshold, int32_t* flag, uint64_t conditional,
                   void* stream);

}  // namespace fastcache::cuda
