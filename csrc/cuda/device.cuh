// SPDX-License-Identifier: Apache-2.0
// What the kernels share: conversions, 16-byte vectors, and the single-launch reduction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace fastcache::cuda {

constexpr int THREADS = 256;

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ T narrow(float v);
template <>
__device__ inline float narrow<float>(float v) {
  return v;
}
template <>
__device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Neighbours moved as one access of 16 bytes. (An aligned struct alone became scalar loads in loops
// with a remainder; the union with uint4 is what keeps them whole.)
template <class T>
constexpr int WIDE = 16 / sizeof(T);

template <class T>
union Wide {
  uint4 raw;
  T v[WIDE<T>];
  __device__ Wide() {}
  __device__ void load(const T* from) { raw = *reinterpret_cast<const uint4*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = raw; }
};

// For tensors that are not aligned, and for what is left of the others.
template <class T>
struct Single {
  T v[1];
  __device__ void load(const T* from) { v[0] = *from; }
  __device__ void store(T* to) const { *to = v[0]; }
};

template <class T>
__device__ T* sample(const Operand& operand, int64_t index) {
  return operand.data ? reinterpret_cast<T*>(operand.data) + index * operand.stride : nullptr;
}

// The sum over a block in a fixed tree, in thread 0.
__device__ inline double block_sum(double v) {
  __shared__ double warps[THREADS / 32];
  for (int step = 16; step; step /= 2) v += __shfl_down_sync(0xffffffff, v, step);
  __syncthreads();  // an earlier call may still be reading
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (double w : warps) sum += w;
  return sum;
}

// True in every thread of the last block of the grid to get here; all blocks' writes to global
// memory are then visible. The counter wraps to zero, ready for the next launch.
__device__ inline bool last_block(unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned blocks = gridDim.x * gridDim.y;
    last = atomicInc(counter, blocks - 1) == blocks - 1;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// Partials go between blocks, hence past L1: written with __stcg, and added up in a fixed order.
__device__ inline double sum_partials(const double* partial, int64_t count, int stride) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) sum += __ldcg(partial + i * stride);
  return block_sum(sum);
}

}  // namespace fastcache::cuda
