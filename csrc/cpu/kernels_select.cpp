// SPDX-License-Identifier: Apache-2.0
// Which table of kernels this machine runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastcache {

namespace {

struct Capability {
  const char* name;
  const Kernels* (*table)();
  bool (*runs)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif
bool always() { return true; }

// best first
const Capability CAPABILITIES[] = {
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, has_avx2},
    {"default", kernels_default, always},
};

}  // namespace

const Kernels* kernels_for(const char* name) {
  for (const Capability& c : CAPABILITIES)
    if (!strcmp(c.name, name) && c.runs()) return c.table();
  return nullptr;
}

const char* capability() {
  const char* wish = getenv("FASTCACHE_CPU_CAPABILITY");
  for (const Capability& c : CAPABILITIES) {
    if (wish && *wish && strcmp(wish, c.name)) continue;
    if (kernels_for(c.name)) return c.name;
  }
  return nullptr;
}

}  // namespace fastcache
