// SPDX-License-Identifier: Apache-2.0
// How a kernel sees a tensor; shared by the CPU and the CUDA side, free of torch.
#pragma once

#include <cstdint>

namespace fastcache {

enum class Type : int { f32, f16, bf16 };

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// The tensors of one call: `samples` runs of `length` dense elements, the last dimension `width`.
struct Shape {
  int64_t samples, length, width;
};

// One of them: sample i starts `stride * i` elements after data. Null data: an absent output.
struct Operand {
  char* data;
  Type type;
  int64_t stride;
};

}  // namespace fastcache
