// SPDX-License-Identifier: Apache-2.0
// The kernels for whatever the compiler targets by itself: SSE2 on x86, NEON on ARM.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace fastcache {
#define WIDTH 4
#include "kernels.inc"

const Kernels* kernels_default() { return &TABLE; }
}  // namespace fastcache
