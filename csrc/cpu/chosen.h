// SPDX-License-Identifier: Apache-2.0
// What the operators run on: the kernels of this machine, and torch's threads.
#pragma once

#include "../call.h"
#include "driver.h"

namespace fastcache {

inline const char* checked_capability() {
  const char* name = capability();
  STD_TORCH_CHECK(name, "FASTCACHE_CPU_CAPABILITY is ", getenv("FASTCACHE_CPU_CAPABILITY"),
                  ", must be default, avx2 or avx512 and supported by this machine");
  return name;
}

inline const Kernels& kernels() {
  static const Kernels& chosen = *kernels_for(checked_capability());
  return chosen;
}

inline const auto parallel = [](int64_t begin, int64_t end, int64_t grain, const auto& f) {
  if (end - begin == 1)
    f(begin, end);  // torch has nothing to divide
  else
    torch::stable::parallel_for(begin, end, grain, f);
};

}  // namespace fastcache
