// SPDX-License-Identifier: Apache-2.0
// Calibration of MagCache: the mean ratio of token norms in one launch, a warp per token.
#include "counters.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace fastcache::cuda {
namespace {

struct Squares {
  double now = 0, before = 0;  // a float overflows at 1.8e19, well inside bfloat16
};

template <class Packed, class T>
__device__ void add(Squares& squares, const T* y, const T* x, const T* prev, T* out) {
  Packed a, b, old;
  a.load(y), b.load(x), old.load(prev);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(a.v) / sizeof(T)); ++i) {
    a.v[i] = narrow<T>(widen(a.v[i]) - widen(b.v[i]));
    const double now = widen(a.v[i]), before = widen(old.v[i]);
    squares.now += now * now, squares.before += before * before;
  }
  if (out) a.store(out);
}

__device__ double warp_sum(double v) {
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffff, v, step);
  return v;
}

// Grid: x blocks per sample, y samples.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    kernel(Shape shape, Operand y, Operand x, Operand prev, Operand out, double eps,
           bool per_sample, float* result, double* partial, Counter counter) {
  const int64_t b = blockIdx.y, rows = shape.length / shape.width;
  const int lane = threadIdx.x % 32;
  constexpr int W = ALIGNED ? WIDE<T> : 1;
  double ratios = 0;
  for (int64_t row = blockIdx.x * int64_t(THREADS / 32) + threadIdx.x / 32; row < rows;
       row += gridDim.x * int64_t(THREADS / 32)) {
    const int64_t start = row * shape.width;
    const T *p_y = sample<T>(y, b) + start, *p_x = sample<T>(x, b) + start;
    const T* p_prev = sample<T>(prev, b) + start;
    T* p_out = out.data ? sample<T>(out, b) + start : nullptr;
    Squares squares;
    for (int64_t i = lane * W; i < shape.width; i += 32 * W) {
      if constexpr (ALIGNED)
        add<Wide<T>>(squares, p_y + i, p_x + i, p_prev + i, p_out ? p_out + i : nullptr);
      else add<Single<T>>(squares, p_y + i, p_x + i, p_prev + i, p_out ? p_out + i : nullptr);
    }
    const double now = warp_sum(squares.now), before = warp_sum(squares.before);
    if (lane == 0) ratios += sqrt(now) / (sqrt(before) + eps);
  }

  const double mine = block_sum(ratios);
  if (threadIdx.x == 0) __stcg(partial + b * gridDim.x + blockIdx.x, mine);
  if (!last_block(counter.address())) return;
  const int64_t groups = per_sample ? gridDim.y : 1,
                count = gridDim.x * int64_t(gridDim.y) / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const double total = sum_partials(partial + g * count, count, 1);
    if (threadIdx.x == 0) result[g] = static_cast<float>(total / (rows * (gridDim.y / groups)));
  }
}

}  // namespace

const char* residual_magnitude(Type type, Shape shape, Operand y, Operand x, Operand prev,
                               Operand out, double eps, bool per_sample, float* mean,
                               double* scratch, void* stream) {
  const dim3 grid(blocks_for(shape.length / shape.width * 32, shape.samples), shape.samples);
  if (shape.samples > 65535) return "too many samples";
  // a row that is not a multiple of 16 bytes moves the next one off its alignment
  const bool wide =
      aligned(type, shape, {y, x, prev, out}) && shape.width * size_of(type) % 16 == 0;
  const auto s = static_cast<cudaStream_t>(stream);
  Counter counter;
  if (const char* error = counter_for(s, reinterpret_cast<unsigned*>(scratch), &counter))
    return error;
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const auto launched = wide ? kernel<T, true> : kernel<T, false>;
    launched<<<grid, THREADS, 0, s>>>(shape, y, x, prev, out, eps, per_sample, mean, scratch + 1,
                                      counter);
  });
}

}  // namespace fastcache::cuda
