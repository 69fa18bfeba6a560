// SPDX-License-Identifier: Apache-2.0
// Weights of cached values, read off the guides: sums over all elements, then a system of one to
// three unknowns. fastcache/ops/reference.py is the specification.
#pragma once

#include <cmath>
#include <limits>

#include "driver.h"

namespace fastcache {

constexpr int MAX_ORDER = 3;
// An unknown counts as told by those before it where less than this share of its diagonal is left.
constexpr double SINGULAR = 1e-12;

// Sample i starts all.stride * i elements after its data, and its rows are `row` elements apart.
struct Guide {
  Operand all;
  int64_t row;
};

// guides: of this step, then order + 1 of one type. sums: [groups, sums_of(order)], 1 group or one
// per sample. Rows are taken one by one, so a strided guide gives the bits of a contiguous one.
template <class Parallel>
void guided_sums(const Kernels& kernels, const Parallel& parallel, const Shape& shape,
                 const Guide* guides, int order, int64_t groups, double* sums) {
  const int count = sums_of(order);
  const int64_t size = rows_size(shape), per_sample = (shape.length + size - 1) / size;
  std::vector<double> partial(count * shape.samples * per_sample);
  for_chunks(parallel, shape, size, [&](int64_t chunk, int64_t b, int64_t i, int64_t n) {
    Rows here[MAX_ORDER + 2];
    for (int g = 0; g < order + 2; ++g)
      here[g] = {at(guides[g].all, b, i / shape.width * guides[g].row), guides[g].row};
    kernels.guided_sums(guides[0].all.type, guides[1].all.type, here, order, n / shape.width,
                        shape.width, &partial[count * chunk]);
  });
  add_chunks(partial, groups, count, sums);
}

// weights: [order + 1], of the cached values; returns the misfit. The operations are those of the
// reference, in its order.
inline double guided_solve(const double* sums, const float* prior, int order, double ridge,
                           float* weights) {
  constexpr double INFINITE = std::numeric_limits<double>::infinity();
  const double *dq = sums + order * (order + 1) / 2, qq = dq[order];
  double gram[MAX_ORDER][MAX_ORDER], a[MAX_ORDER][MAX_ORDER], r[MAX_ORDER], trace = 0;
  for (int i = 0, m = 0; i < order; ++i)
    for (int j = i; j < order; ++j) gram[i][j] = a[i][j] = sums[m++];
  for (int i = 0; i < order; ++i) trace += gram[i][i];
  const double pull = ridge * trace / order;
  for (int i = 0; i < order; ++i) {
    a[i][i] += pull;
    r[i] = dq[i] + pull * prior[i];
  }
  bool usable = trace + qq < INFINITE;
  for (int p = 0; p < order; ++p) {  // what unknown p says is taken from the rows behind it
    usable = usable && a[p][p] > (gram[p][p] + pull) * SINGULAR;
    for (int i = p + 1; i < order; ++i) {
      const double share = a[p][i] / a[p][p];
      r[i] -= share * r[p];
      for (int j = i; j < order; ++j) a[i][j] -= share * a[p][j];
    }
  }
  for (int p = order - 1; p >= 0; --p) {  // r becomes the solution
    for (int j = p + 1; j < order; ++j) r[p] -= a[p][j] * r[j];
    r[p] /= a[p][p];
  }
  double w[MAX_ORDER], said = 0;  // weights of the differences
  for (int j = 0; j < order; ++j) {
    w[j] = usable ? r[j] : prior[j];
    said += w[j] * dq[j];
  }
  double square = qq - 2 * said;
  for (int i = 0; i < order; ++i)
    for (int j = i; j < order; ++j) square += (i == j ? 1 : 2) * w[i] * w[j] * gram[i][j];
  // R_1 + sum_j w_j (R_j - R_(j+1)), by R
  double before = -1;
  for (int j = 0; j < order; ++j) {
    weights[j] = static_cast<float>(w[j] - before);
    before = w[j];
  }
  weights[order] = static_cast<float>(0 - before);
  return std::sqrt((square < 0 ? 0 : square) / qq);  // rounding may leave less than 0; NaN stays
}

}  // namespace fastcache
