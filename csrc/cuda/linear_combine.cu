// SPDX-License-Identifier: Apache-2.0
// Weighted sums of one to five tensors: prediction, extrapolation, apply and store.
#include "device.cuh"
#include "launch.cuh"

namespace fastcache::cuda {
namespace {

// Each product and each sum is rounded by itself, in the order of the terms (-fmad=false): the bits
// of the eager chain. All loads come before the arithmetic, to keep COUNT of them in flight.
template <class Packed, int COUNT, class T>
__device__ void combine(T* out, const Terms& terms, int64_t b, int64_t i) {
  Packed in[COUNT];
#pragma unroll
  for (int t = 0; t < COUNT; ++t) in[t].load(sample<T>(terms.tensor[t], b) + i);
  constexpr int N = sizeof(in[0].v) / sizeof(T);
  float sum[N];
#pragma unroll
  for (int t = 0; t < COUNT; ++t) {
    const float weight = terms.device_weight ? __ldg(terms.device_weight + t) : terms.weight[t];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float product = widen(in[t].v[k]) * weight;
      sum[k] = t ? sum[k] + product : product;
    }
  }
  Packed result;
#pragma unroll
  for (int k = 0; k < N; ++k) result.v[k] = narrow<T>(sum[k]);
  result.store(out + i);
}

// Grid: x one thread per pack, y samples.
template <class T, bool ALIGNED, int COUNT>
__global__ void __launch_bounds__(THREADS)
    kernel(int64_t length, Operand out, const __grid_constant__ Terms terms) {
  constexpr int W = ALIGNED ? WIDE<T> : 1;
  const int64_t v = blockIdx.x * int64_t(THREADS) + threadIdx.x, packs = length / W;
  T* p_out = sample<T>(out, blockIdx.y);
  if (v < packs) {
    if constexpr (ALIGNED) combine<Wide<T>, COUNT>(p_out, terms, blockIdx.y, v * W);
    else combine<Single<T>, COUNT>(p_out, terms, blockIdx.y, v);
  }
  // the first threads also take the few elements behind the last pack
  if (v < length - packs * W) combine<Single<T>, COUNT>(p_out, terms, blockIdx.y, packs * W + v);
}

template <class T, int COUNT>
void launch(bool wide, dim3 grid, int64_t length, Operand out, const Terms& terms,
            cudaStream_t stream) {
  const auto launched = wide ? kernel<T, true, COUNT> : kernel<T, false, COUNT>;
  launched<<<grid, THREADS, 0, stream>>>(length, out, terms);
}

}  // namespace

const char* linear_combine(Type type, Shape shape, Operand out, const Terms& terms, void* stream) {
  if (shape.samples > 65535) return "too many samples";
  bool wide = aligned(type, shape, {out});
  for (int t = 0; t < terms.count; ++t) wide = wide && aligned(type, shape, {terms.tensor[t]});
  const int64_t pack = wide ? 16 / size_of(type) : 1, packs = shape.length / pack;
  const int64_t work =
      packs > pack ? packs : pack;  // the elements behind the packs need threads too
  const dim3 grid(static_cast<unsigned>((work + THREADS - 1) / THREADS), shape.samples);
  return with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const auto s = static_cast<cudaStream_t>(stream);
    switch (terms.count) {
      case 1:
        return launch<T, 1>(wide, grid, shape.length, out, terms, s);
      case 2:
        return launch<T, 2>(wide, grid, shape.length, out, terms, s);
      case 3:
        return launch<T, 3>(wide, grid, shape.length, out, terms, s);
      case 4:
        return launch<T, 4>(wide, grid, shape.length, out, terms, s);
      case 5:
        return launch<T, 5>(wide, grid, shape.length, out, terms, s);
    }
  });
}

}  // namespace fastcache::cuda
