// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels compute, one table of functions per instruction set. Free of torch and of
// Python.
//
// A kernel works on one dense run of elements on the calling thread. Cutting tensors into runs,
// threads and argument checks are the caller's (driver.h, ops.cpp). Offsets and counts are
// elements.
#pragma once

#include "../layout.h"

namespace fastcache {

struct Term {
  const void* data;
  Type type;
  float weight;
};

constexpr int MAX_TERMS = 8;

// Dense rows, `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride;
};

// The sums of guided prediction of order K, 1 to 3: a K x K triangle, K and 1.
constexpr int sums_of(int order) { return order * (order + 3) / 2 + 1; }

struct Kernels {
  // r = round(y - x); sums += { sum |r - prev|, sum |prev| }; out <- r unless null.
  // y and x are `value`, prev and out `stored`.
  void (*residual_l1)(Type value, Type stored, const void* y, const void* x, const void* prev,
                      void* out, int64_t n, double* sums);
  // The same r; returns the sum over rows of |r|_2 / (|prev|_2 + eps). out may be prev.
  double (*residual_magnitude)(Type value, Type stored, const void* y, const void* x,
                               const void* prev, void* out, int64_t rows, int64_t width,
                               double eps);
  // out <- sum_i weight_i * term_i, added in order, each step rounded to float. out may be a term.
  void (*combine)(Type type, void* out, const Term* terms, int count, int64_t n);
  // f0 <- y, f[j+1] <- (new f[j] - old f[j]) / delta for j < count - 1.
  void (*taylor_update)(Type value, Type stored, void* const* factors, int count, const void* y,
                        float delta, int64_t n);
  // With the guides g_0 (of this step, `value`), g_1 .. g_(order + 1) (`stored`), q = g_0 - g_1 and
  // D_j = g_j - g_(j+1): sums += the upper triangle of D D^T, D q, q.q.
  void (*guided_sums)(Type value, Type stored, const Rows* guides, int order, int64_t rows,
                      int64_t width, double* sums);
  // One row: m = LN(x) * (1 + scale) + shift, rounded; sums += { sum |m - prev|, sum |prev| };
  // out <- m unless null, and may be prev. x is `value`, scale and shift are `by`, which is `value`
  // or f32, prev and out `stored`.
  void (*modulated_l1)(Type value, Type by, Type stored, const void* x, const void* scale,
                       const void* shift, const void* prev, void* out, int64_t width, double eps,
                       double* sums);
};

// A table, or null where the compiler or the machine lacks the instruction set.
const Kernels* kernels_default();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

// The name of the best table that this machine runs, or of the one FASTCACHE_CPU_CAPABILITY asks
// for; null if that one is unknown or impossible here.
const char* capability();
const Kernels* kernels_for(const char* capability);

}  // namespace fastcache
