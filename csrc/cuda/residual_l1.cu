// First-block decision: both L1 sums in one launch, the residual stored on the way.
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
__device__ void add(Sums& sums, const T* y, const T* x, const T* prev, T* out) {
  Packed a, b, old;
  a.load(y), b.load(x), old.load(prev);
  float change = 0, norm = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(a.v) / sizeof(T)); ++i) {
    a.v[i] = narrow<T>(widen(a.v[i]) - widen(b.v[i]));
    change += fabsf(widen(a.v[i]) - widen(old.v[i]));
    norm += fabsf(widen(old.v[i]));
  }
  if (out) a.store(out);
  sums.change += change, sums.norm += norm;
}

// Grid: x blocks per sample, y samples.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    kernel(Shape shape, Operand y, Operand x, Operand prev, Operand out, bool per_sample,
           float* result, Workspace workspace) {
  const int64_t b = blockIdx.y;
  const T *p_y = sample<T>(y, b), *p_x = sample<T>(x, b), *p_prev = sample<T>(prev, b);
  T* p_out = sample<T>(out, b);
  const int64_t first = blockIdx.x * int64_t(THREADS) + threadIdx.x,
                step = gridDim.x * int64_t(THREADS);
  constexpr int W = ALIGNED ? WIDE<T> : 1;
  Sums sums;
  for (int64_t v = first; v < shape.length / W; v += step) {
    const int64_t i = v * W;
    if constexpr (ALIGNED)
      add<Wide<T>>(sums, p_y + i, p_x + i, p_prev + i, p_out ? p_out + i : nullptr);
    else add<Single<T>>(sums, p_y + i, p_x + i, p_prev + i, p_out ? p_out + i : nullptr);
  }
  const int64_t rest = shape.length / W * W + first;
  if (rest < shape.length)
    add<Single<T>>(sums, p_y + rest, p_x + rest, p_prev + rest, p_out ? p_out + rest : nullptr);

  const double change = block_sum(sums.change), norm = block_sum(sums.norm);
  double* mine = workspace.partial + 2 * (b * gridDim.x + blockIdx.x);
  if (threadIdx.x == 0) mine[0] = change, mine[1] = norm;
  if (!last_block(workspace.counter)) return;
  const int64_t groups = per_sample ? gridDim.y : 1,
                count = gridDim.x * int64_t(gridDim.y) / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int k = 0; k < 2; ++k) {
      const double total = sum_partials(workspace.partial + 2 * g * count + k, count, 2);
      if (threadIdx.x == 0) result[2 * g + k] = static_cast<float>(total);
    }
}

}  // namespace

const char* residual_l1(Type type, Shape shape, Operand y, Operand x, Operand prev, Operand out,
                        bool per_sample, float* sums, Workspace workspace, void* stream) {
  const int64_t packs = (shape.length + 3) / 4;
  const dim3 grid(blocks_for(packs, shape.samples), shape.samples);
  if (grid.x * int64_t(grid.y) > MAX_PARTIALS || shape.samples > 65535) return "too many samples";
  const bool wide = aligned(type, shape, {y, x, prev, out});
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const auto launched = wide ? kernel<T, true> : kernel<T, false>;
    launched<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(shape, y, x, prev, out,
                                                                      per_sample, sums, workspace);
  });
}

}  // namespace fastcache::cuda
