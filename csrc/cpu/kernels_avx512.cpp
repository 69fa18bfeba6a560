// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX-512. Standard headers come before the pragma: an inline function of theirs
// that is compiled here must stay fit for every machine, for the linker may keep this copy.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace fastcache {
#define WIDTH 16
#include "kernels.inc"

const Kernels* kernels_avx512() { return &TABLE; }
}  // namespace fastcache

#else
namespace fastcache {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace fastcache
#endif
