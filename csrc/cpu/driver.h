// SPDX-License-Identifier: Apache-2.0
// Cuts tensors into chunks for the kernels. Chunk boundaries follow from the shape alone and
// partial sums are added in chunk order, so a result does not depend on the number of threads.
//
// `parallel(begin, end, grain, f)` calls f(begin, end) on subranges: torch's in ops.cpp, a
// thread-free one in white_box.cpp.
#pragma once

#include <vector>

#include "kernels.h"

namespace fastcache {

constexpr int64_t CHUNK = 65536;  // elements: a few hundred kilobytes, about one L2

inline char* at(const Operand& operand, int64_t sample, int64_t offset) {
  if (!operand.data) return nullptr;
  return operand.data + (sample * operand.stride + offset) * size_of(operand.type);
}

// f(chunk, sample, offset, count) for all chunks of at most `size` elements, none across samples.
template <class Parallel, class F>
void for_chunks(const Parallel& parallel, const Shape& shape, int64_t size, const F& f) {
  const int64_t per_sample = (shape.length + size - 1) / size;
  const int64_t grain = shape.length < size ? CHUNK / (shape.length + 1) + 1 : 1;
  parallel(0, shape.samples * per_sample, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t offset = chunk % per_sample * size, rest = shape.length - offset;
      f(chunk, chunk / per_sample, offset, rest < size ? rest : size);
    }
  });
}

// sums[groups, count] <- the partial sums of the chunks, added in their order.
inline void add_chunks(const std::vector<double>& partial, int64_t groups, int count,
                       double* sums) {
  const int64_t each = static_cast<int64_t>(partial.size()) / groups;
  for (int64_t i = 0; i < groups * count; ++i) sums[i] = 0;
  for (int64_t i = 0; i < groups * each; ++i) sums[i / each * count + i % count] += partial[i];
}

// Chunks of whole rows, at least one.
inline int64_t rows_size(const Shape& shape) {
  return shape.width < CHUNK ? CHUNK / shape.width * shape.width : shape.width;
}

// sums: [samples, 2]
template <class Parallel>
void residual_l1(const Kernels& kernels, const Parallel& parallel, const Shape& shape, Operand y,
                 Operand x, Operand prev, Operand out, double* sums) {
  const int64_t per_sample = (shape.length + CHUNK - 1) / CHUNK;
  std::vector<double> partial(2 * shape.samples * per_sample);
  for_chunks(parallel, shape, CHUNK, [&](int64_t chunk, int64_t b, int64_t i, int64_t n) {
    kernels.residual_l1(y.type, prev.type, at(y, b, i), at(x, b, i), at(prev, b, i), at(out, b, i),
                        n, &partial[2 * chunk]);
  });
  add_chunks(partial, shape.samples, 2, sums);
}

// ratios: [samples], each a sum over the rows of a sample
template <class Parallel>
void residual_magnitude(const Kernels& kernels, const Parallel& parallel, const Shape& shape,
                        Operand y, Operand x, Operand prev, Operand out, double eps,
                        double* ratios) {
  const int64_t size = rows_size(shape);
  const int64_t per_sample = (shape.length + size - 1) / size;
  std::vector<double> partial(shape.samples * per_sample);
  for_chunks(parallel, shape, size, [&](int64_t chunk, int64_t b, int64_t i, int64_t n) {
    partial[chunk] =
        kernels.residual_magnitude(y.type, prev.type, at(y, b, i), at(x, b, i), at(prev, b, i),
                                   at(out, b, i), n / shape.width, shape.width, eps);
  });
  add_chunks(partial, shape.samples, 1, ratios);
}

// The rows of a modulation of [batch, tokens] rows: element strides, 0 where all share one.
struct Modulation {
  const char* data;
  Type type;
  int64_t sample, token;
};

// sums: [2]. tokens: rows of a sample as the modulations count them.
template <class Parallel>
void modulated_l1(const Kernels& kernels, const Parallel& parallel, const Shape& shape, Operand x,
                  Modulation scale, Modulation shift, Operand prev, Operand out, int64_t tokens,
                  double eps, double* sums) {
  const int64_t size = rows_size(shape);
  const int64_t per_sample = (shape.length + size - 1) / size;
  std::vector<double> partial(2 * shape.samples * per_sample);
  for_chunks(parallel, shape, size, [&](int64_t chunk, int64_t b, int64_t i, int64_t n) {
    for (const int64_t end = i + n; i < end; i += shape.width) {
      const int64_t row = (b * shape.length + i) / shape.width;
      const auto of = [&](const Modulation& m) {
        return m.data + (row / tokens * m.sample + row % tokens * m.token) * size_of(m.type);
      };
      kernels.modulated_l1(x.type, scale.type, prev.type, at(x, b, i), of(scale), of(shift),
                           at(prev, b, i), at(out, b, i), shape.width, eps, &partial[2 * chunk]);
    }
  });
  add_chunks(partial, 1, 2, sums);
}

inline void combine_chunk(const Kernels& kernels, const Operand& out, const Operand* terms,
                          const float* weights, int count, int64_t sample, int64_t offset,
                          int64_t n) {
  Term here[MAX_TERMS];
  for (int t = 0; t < count; ++t)
    here[t] = {at(terms[t], sample, offset), terms[t].type, weights[t]};
  kernels.combine(out.type, at(out, sample, offset), here, count, n);
}

template <class Parallel>
void combine(const Kernels& kernels, const Parallel& parallel, const Shape& shape, Operand out,
             const Operand* terms, const float* weights, int count) {
  for_chunks(parallel, shape, CHUNK, [&](int64_t, int64_t b, int64_t i, int64_t n) {
    combine_chunk(kernels, out, terms, weights, count, b, i, n);
  });
}

// weights: [samples, count]
template <class Parallel>
void combine_samples(const Kernels& kernels, const Parallel& parallel, const Shape& shape,
                     Operand out, const Operand* terms, const float* weights, int count) {
  for_chunks(parallel, shape, CHUNK, [&](int64_t, int64_t b, int64_t i, int64_t n) {
    combine_chunk(kernels, out, terms, weights + b * count, count, b, i, n);
  });
}

// The weighted sum of three terms and, while it is in the cache, a copy of the first.
template <class Parallel>
void guidance_combine(const Kernels& kernels, const Parallel& parallel, const Shape& shape,
                      Operand out, Operand copy, const Operand* terms, const float* weights) {
  for_chunks(parallel, shape, CHUNK, [&](int64_t, int64_t b, int64_t i, int64_t n) {
    combine_chunk(kernels, out, terms, weights, 3, b, i, n);
    combine_chunk(kernels, copy, terms, weights, 1, b, i, n);
  });
}

template <class Parallel>
void taylor_update(const Kernels& kernels, const Parallel& parallel, const Shape& shape,
                   const Operand* factors, int count, Operand y, float delta) {
  for_chunks(parallel, shape, CHUNK, [&](int64_t, int64_t b, int64_t i, int64_t n) {
    void* here[MAX_TERMS];
    for (int j = 0; j < count; ++j) here[j] = at(factors[j], b, i);
    kernels.taylor_update(y.type, factors[0].type, here, count, at(y, b, i), delta, n);
  });
}

}  // namespace fastcache
