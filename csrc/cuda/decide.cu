// The first-block decision without the host: a flag, and if wanted the condition of a graph node.
#include <cuda_runtime.h>

#include "kernels.h"

namespace fastcache::cuda {
namespace {

__global__ void kernel(const float* sums, double threshold, int32_t* flag, uint64_t conditional) {
  // in double, as the host divides; "not <=" so that NaN computes
  const int32_t compute = !(double(sums[0]) / double(sums[1]) <= threshold);
  *flag = compute;
  if (conditional)
    cudaGraphSetConditional(static_cast<cudaGraphConditionalHandle>(conditional), compute);
}

}  // namespace

const char* decide(const float* sums, double threshold, int32_t* flag, uint64_t conditional,
                   void* stream) {
  kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(sums, threshold, flag, conditional);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastcache::cuda
