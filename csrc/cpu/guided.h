// SPDX-License-Identifier: Apache-2.0
// Sums over all elements of guides, or of cached values themselves, from which weights of cached values
// follow. fastcache/ops/reference.py is the specification.
#pragma once

#include "driver.h"

namespace fastcache {

constexpr int MAX_ORDER = 3;

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

}  // namespace fastcache
