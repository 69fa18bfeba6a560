// SPDX-License-Identifier: Apache-2.0
// What the launchers share, on the host.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "device.cuh"

namespace fastcache::cuda {

// Blocks per sample for `work` threads' worth of it; depends on the shape alone.
inline unsigned blocks_for(int64_t work, int64_t samples) {
  const int64_t wanted = (work + THREADS - 1) / THREADS, most = BLOCKS / samples;
  const int64_t blocks = wanted < most ? wanted : most;
  return static_cast<unsigned>(blocks > 0 ? blocks : 1);
}

// Whether every sample of every tensor starts on 16 bytes.
inline bool aligned(Type type, const Shape& shape, std::initializer_list<Operand> operands) {
  for (const Operand& a : operands) {
    if (reinterpret_cast<uintptr_t>(a.data) % 16) return false;
    if (a.data && shape.samples > 1 && a.stride * size_of(type) % 16) return false;
  }
  return true;
}

// Calls launch(tag) with a value of the C++ type; the text of the launch's error, or null.
template <class Launch>
const char* with_type(Type type, const Launch& launch) {
  if (type == Type::f32) launch(float());
  else if (type == Type::f16) launch(__half());
  else launch(__nv_bfloat16());
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastcache::cuda
