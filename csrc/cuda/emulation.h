// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to run these kernels on the host, for tests. The threads of a block are fibres that
// switch at barriers and shuffles. Blocks run one after the other in random order: those of the
// launches at the head of all streams mixed, each stream in the order of its launches. What a block
// writes with __stcg reaches memory with a fence, or, where none comes before the next atomic, with
// the end of the launch: other blocks may all run in between.
//
// It checks indices, barriers, the reduction tree, the last-block logic, what is fenced and which
// launches share memory. It says nothing about blocks that run at once, alignment or speed.
// tests/ops/test_cuda_emulation.py compiles it together with the .cu files, their <<<launches>>> rewritten.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
struct alignas(16) uint4 {
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

// A write that other blocks do not see yet.
struct Write {
  double* to;
  double value;
  unsigned thread, generation;
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Barrier> warps;
  std::vector<Write> writes, late;
  Barrier all;
  double lanes[1024];
  std::function<void()> body;
  ucontext_t scheduler;
  unsigned current = 0;
};

inline Block* block;
inline dim3 grid, block_index;

// The calling thread's writes become visible, and those that a barrier put before its fence.
inline void fence() {
  std::vector<Write> held;
  for (const Write& write : block->writes) {
    if (write.thread == block->current || write.generation < block->all.generation)
      *write.to = write.value;
    else held.push_back(write);
  }
  block->writes = held;
}

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

// Runs one block; returns the writes that no fence made visible in time.
inline std::vector<Write> run_block(unsigned threads, const std::function<void()>& body) {
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
  here.late.insert(here.late.end(), here.writes.begin(), here.writes.end());
  return here.late;
}

// What a stream has been given to do: a kernel, or one block that is no kernel's (a memset).
struct Job {
  dim3 blocks;
  unsigned threads;
  std::function<void()> body;
  std::vector<int64_t> left;
  std::vector<Write> writes;
};

inline std::map<void*, std::deque<Job>> streams;
inline std::mt19937 dice;
inline bool held = false;  // jobs wait until they are let go
inline std::map<void*, bool> capturing;

inline int64_t any(int64_t count) { return static_cast<int64_t>(dice() % count); }

inline void run_all() {
  while (!streams.empty()) {
    const auto at = std::next(streams.begin(), any(streams.size()));
    Job& job = at->second.front();
    if (job.left.empty()) {
      for (const Write& write : job.writes) *write.to = write.value;
      at->second.pop_front();
      if (at->second.empty()) streams.erase(at);
      continue;
    }
    std::swap(job.left[any(job.left.size())], job.left.back());
    const int64_t i = job.left.back();
    job.left.pop_back();
    grid = job.blocks;
    block_index = dim3(i % grid.x, i / grid.x);
    if (!job.threads) {
      job.body();
      continue;
    }
    const std::vector<Write> writes = run_block(job.threads, job.body);
    job.writes.insert(job.writes.end(), writes.begin(), writes.end());
  }
}

inline void enqueue(void* stream, dim3 blocks, unsigned threads, std::function<void()> body) {
  std::vector<int64_t> left(int64_t(blocks.x) * blocks.y);
  for (size_t i = 0; i < left.size(); ++i) left[i] = static_cast<int64_t>(i);
  streams[stream].push_back({blocks, threads, std::move(body), std::move(left), {}});
  if (!held) run_all();
}

template <class Kernel>
struct Launch {
  Kernel kernel;
  dim3 blocks;
  unsigned threads;
  void* stream;

  template <class... Args>
  void operator()(Args... args) const {
    enqueue(stream, blocks, threads, [=, kernel = kernel] { kernel(args...); });
  }
};

template <class Kernel>
Launch<Kernel> launch(Kernel kernel, dim3 blocks, unsigned threads, void* stream) {
  return {kernel, blocks, threads, stream};
}

}  // namespace emulation

#define threadIdx (emulation::block->fibres[emulation::block->current].thread)
#define blockIdx emulation::block_index
#define gridDim emulation::grid

inline void __syncthreads() { emulation::wait(emulation::block->all); }
inline void __threadfence() { emulation::fence(); }
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
inline void __stcg(double* to, double value) {
  const auto& block = *emulation::block;
  emulation::block->writes.push_back({to, value, block.current, block.all.generation});
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline unsigned atomicInc(unsigned* counter, unsigned limit) {
  auto &writes = emulation::block->writes, &late = emulation::block->late;
  late.insert(late.end(), writes.begin(), writes.end());
  writes.clear();
  const unsigned old = *counter;
  *counter = old >= limit ? 0 : old + 1;
  return old;
}

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing[stream] ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  emulation::enqueue(stream, dim3(1), 0, [=] { memset(to, value, bytes); });
  return cudaSuccess;
}
