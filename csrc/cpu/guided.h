// SPDX-License-Identifier: Apache-2.0
// Weights of cached values, read off the guides: sums over all elements, then a system of one or
// two unknowns. fastcache/ops/reference.py is the specification.
#pragma once

#include <cmath>
#include <limits>

#include "driver.h"

namespace fastcache {

constexpr int MAX_ORDER = 2;
// D_1 and D_2 count as parallel where the determinant is below this share of its upper bound.
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
  double w[MAX_ORDER] = {prior[0], order == 1 ? 0.0 : prior[1]};  // of the differences
  const double qq = sums[sums_of(order) - 1];
  double square;
  if (order == 1) {
    const double a = sums[0], dq = sums[1];
    const double pull = ridge * a, diagonal = a + pull;
    if (diagonal > 0 && a + qq < INFINITE) w[0] = (dq + pull * w[0]) / diagonal;
    square = qq - 2 * (w[0] * dq) + w[0] * w[0] * a;
  } else {
    const double a = sums[0], b = sums[1], c = sums[2], *dq = sums + 3;
    const double pull = ridge * (a + c) / 2, a1 = a + pull, c1 = c + pull;
    const double r1 = dq[0] + pull * w[0], r2 = dq[1] + pull * w[1];
    const double det = a1 * c1 - b * b;
    if (det > a1 * c1 * SINGULAR && a + c + qq < INFINITE) {
      w[0] = (c1 * r1 - b * r2) / det;
      w[1] = (a1 * r2 - b * r1) / det;
    }
    square = qq - 2 * (w[0] * dq[0] + w[1] * dq[1]) + w[0] * w[0] * a + 2 * w[0] * w[1] * b +
             w[1] * w[1] * c;
  }
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
