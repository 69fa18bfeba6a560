// SPDX-License-Identifier: Apache-2.0
// First-block decision: both L1 sums in one launch, the residual stored on the way.
#include <type_traits>

#include "counters.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace fastcache::cuda {
namespace {

struct Sums {
  double change = 0, norm = 0;
};

// Floats within a pack, doubles across: 2e-6 needs no more, and a GPU with few double units loses
// nothing at two additions per pack.
template <class Packed, class T>
struct Pack {
  Packed y, x, prev;

  __device__ void load(const T* from_y, const T* from_x, const T* from_prev) {
    y.load(from_y), x.load(from_x), prev.load(from_prev);
  }

  // Stores the residual, unless `out` is null.
  __device__ void add_to(Sums& sums, T* out) {
    float change = 0, norm = 0;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(y.v) / sizeof(T)); ++i) {
      y.v[i] = narrow<T>(widen(y.v[i]) - widen(x.v[i]));
      change += fabsf(widen(y.v[i]) - widen(prev.v[i]));
      norm += fabsf(widen(prev.v[i]));
    }
    if (out) y.store(out);
    sums.change += change, sums.norm += norm;
  }
};

// Grid: x blocks per sample, y samples.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, 4)
    kernel(Shape shape, Operand y, Operand x, Operand prev, Operand out, bool per_sample,
           float* result, double* partial, Counter counter) {
  const int64_t b = blockIdx.y;
  const T *p_y = sample<T>(y, b), *p_x = sample<T>(x, b), *p_prev = sample<T>(prev, b);
  T* p_out = sample<T>(out, b);
  const auto out_at = [&](int64_t i) { return p_out ? p_out + i : nullptr; };
  const int64_t first = blockIdx.x * int64_t(THREADS) + threadIdx.x,
                step = gridDim.x * int64_t(THREADS);
  using Packed = std::conditional_t<ALIGNED, Wide<T>, Single<T>>;
  constexpr int W = ALIGNED ? WIDE<T> : 1;
  Sums sums;
  Pack<Packed, T> one, two;  // the loads of both come first, to keep six in flight
  int64_t i = first * W;
  const int64_t end = shape.length / W * W;
  for (; i + step * W < end; i += 2 * step * W) {
    const int64_t j = i + step * W;
    one.load(p_y + i, p_x + i, p_prev + i);
    two.load(p_y + j, p_x + j, p_prev + j);
    one.add_to(sums, out_at(i));
    two.add_to(sums, out_at(j));
  }
  if (i < end) {
    one.load(p_y + i, p_x + i, p_prev + i);
    one.add_to(sums, out_at(i));
  }
  const int64_t rest = end + first;
  if (rest < shape.length) {
    Pack<Single<T>, T> last;
    last.load(p_y + rest, p_x + rest, p_prev + rest);
    last.add_to(sums, out_at(rest));
  }

  const double change = block_sum(sums.change), norm = block_sum(sums.norm);
  double* mine = partial + 2 * (b * gridDim.x + blockIdx.x);
  if (threadIdx.x == 0) __stcg(mine, change), __stcg(mine + 1, norm);
  if (!last_block(counter.address())) return;
  const int64_t groups = per_sample ? gridDim.y : 1,
                count = gridDim.x * int64_t(gridDim.y) / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int k = 0; k < 2; ++k) {
      const double total = sum_partials(partial + 2 * g * count + k, count, 2);
      if (threadIdx.x == 0) result[2 * g + k] = static_cast<float>(total);
    }
}

}  // namespace

const char* residual_l1(Type type, Shape shape, Operand y, Operand x, Operand prev, Operand out,
                        bool per_sample, float* sums, double* scratch, void* stream) {
  const int64_t packs = (shape.length + 3) / 4;
  const dim3 grid(blocks_for(packs, shape.samples), shape.samples);
  if (shape.samples > 65535) return "too many samples";
  const bool wide = aligned(type, shape, {y, x, prev, out});
  const auto s = static_cast<cudaStream_t>(stream);
  Counter counter;
  if (const char* error = counter_for(s, reinterpret_cast<unsigned*>(scratch), &counter))
    return error;
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const auto launched = wide ? kernel<T, true> : kernel<T, false>;
    launched<<<grid, THREADS, 0, s>>>(shape, y, x, prev, out, per_sample, sums, scratch + 1,
                                      counter);
  });
}

}  // namespace fastcache::cuda
