// SPDX-License-Identifier: Apache-2.0
// Counters of the blocks that have arrived, for reductions that end in the launch they began in.
//
// A launch finds its counter at zero and leaves it at zero. Two launches may share one if they never
// overlap: those of one stream share one, and a captured launch, which runs again with its graph
// beside anything, takes one that is never given out again. The memory is this library's, zero when
// it is loaded, and no allocator's: what a capture allocates belongs to its graph.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <unordered_map>

namespace fastcache::cuda {

constexpr int COUNTERS = 65536;

// One array for each device, and for each file that includes this.
static __device__ unsigned counters[COUNTERS];

// A counter of the array, or memory of the launch where all of the array are given out.
struct Counter {
  int index;
  unsigned* own;
  __device__ unsigned* address() const { return own ? own : counters + index; }
};

// The counter of a launch on `stream`; null, or what went wrong. `own` is memory of the launch.
inline const char* counter_for(cudaStream_t stream, unsigned* own, Counter* counter) {
  static std::mutex mutex;
  static std::unordered_map<cudaStream_t, int> of_stream;  // streams of all devices differ, but 0
  static int given = 0;

  cudaStreamCaptureStatus status;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (status != cudaStreamCaptureStatusNone) {
      counter->index = given < COUNTERS ? given++ : COUNTERS;
    } else {
      const auto found = of_stream.try_emplace(stream, COUNTERS).first;
      if (found->second == COUNTERS && given < COUNTERS) found->second = given++;
      counter->index = found->second;
    }
  }
  counter->own = nullptr;
  if (counter->index < COUNTERS) return nullptr;
  counter->own = own;
  error = cudaMemsetAsync(own, 0, sizeof(*own), stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastcache::cuda
