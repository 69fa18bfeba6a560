// Enough of CUDA to run these kernels on the host, for tests: blocks one after the other, last
// first, the threads of a block as fibres that switch at barriers and shuffles.
//
// It checks indices, barriers, the reduction tree and the last-block logic. It says nothing about
// memory ordering between blocks, alignment or speed. tests/test_cuda_build.py compiles it together
// with the .cu files, their <<<launches>>> rewritten.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(threads)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
struct uint4 {
  unsigned x, y, z, w;
};

struct __half {
  _Float16 value;
};
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return {f != f ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace emulation {

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  dim3 thread;
  bool done = false;
  static constexpr size_t STACK = 65536;
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Barrier> warps;
  Barrier all;
  double lanes[1024];
  std::function<void()> body;
  ucontext_t scheduler;
  unsigned current = 0;
};

inline Block* block;
inline dim3 grid, block_index;

inline void yield() { swapcontext(&block->fibres[block->current].context, &block->scheduler); }

inline void wait(Barrier& barrier) {
  const unsigned mine = barrier.generation;
  if (++barrier.arrived == barrier.size) barrier.arrived = 0, ++barrier.generation;
  while (barrier.generation == mine) yield();
}

inline double shuffle(double v, unsigned source) {
  Barrier& warp = block->warps[block->current / 32];
  block->lanes[block->current] = v;
  wait(warp);
  const double got =
      block->lanes[block->current / 32 * 32 + (source < 32 ? source : block->current % 32)];
  wait(warp);
  return got;
}

inline void entry() {
  block->body();
  block->fibres[block->current].done = true;
  yield();
}

inline void run(unsigned threads, const std::function<void()>& body) {
  Block here;
  here.fibres = std::vector<Fibre>(threads);
  here.warps.resize(threads / 32);
  for (Barrier& warp : here.warps) warp.size = 32;
  here.all.size = threads;
  here.body = body;
  block = &here;
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = here.fibres[t];
    fibre.thread = dim3(t);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = Fibre::STACK;
    makecontext(&fibre.context, entry, 0);
  }
  unsigned running = threads;
  for (int idle = 0; running; ++idle) {
    // every pass ends at least one barrier or thread; kernels here have far fewer than this
    if (idle > 1000000) throw std::runtime_error("deadlock: a barrier that not all threads reach");
    for (unsigned t = 0; t < threads; ++t) {
      if (here.fibres[t].done) continue;
      here.current = t;
      swapcontext(&here.scheduler, &here.fibres[t].context);
      running -= here.fibres[t].done;
    }
  }
}

template <class Kernel>
struct Launch {
  Kernel kernel;
  dim3 blocks;
  unsigned threads;

  template <class... Args>
  void operator()(Args... args) const {
    grid = blocks;
    for (int64_t i = int64_t(blocks.x) * blocks.y - 1; i >= 0; --i) {
      block_index = dim3(i % blocks.x, i / blocks.x);
      run(threads, [&] { kernel(args...); });
    }
  }
};

template <class Kernel>
Launch<Kernel> launch(Kernel kernel, dim3 blocks, unsigned threads) {
  return {kernel, blocks, threads};
}

}  // namespace emulation

#define threadIdx (emulation::block->fibres[emulation::block->current].thread)
#define blockIdx emulation::block_index
#define gridDim emulation::grid

inline void __syncthreads() { emulation::wait(emulation::block->all); }
inline void __threadfence() {}
inline double __shfl_down_sync(unsigned, double v, unsigned step) {
  return emulation::shuffle(v, emulation::block->current % 32 + step);
}
inline double __shfl_xor_sync(unsigned, double v, unsigned mask) {
  return emulation::shuffle(v, emulation::block->current % 32 ^ mask);
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline unsigned atomicInc(unsigned* counter, unsigned limit) {
  const unsigned old = *counter;
  *counter = old >= limit ? 0 : old + 1;
  return old;
}

typedef void* cudaStream_t;
typedef uint64_t cudaGraphConditionalHandle;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline uint64_t condition[2];
inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  condition[0] = handle, condition[1] = value;
}
