// SPDX-License-Identifier: Apache-2.0
// Vectors of WIDTH floats, the widest the instruction set has; GCC and Clang lower them to single
// instructions. (Wider ones would be portable too, but GCC 12 takes them apart element by element.)
//
// Included once per instruction set inside a namespace of its own, hence no include guard.
// WIDTH comes from the including file: target pragmas do not update macros.

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef float HalfFloats __attribute__((vector_size(2 * WIDTH)));
typedef double Doubles __attribute__((vector_size(4 * WIDTH)));  // WIDTH / 2 of them

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

#if defined(__x86_64__)
#define X86 1
#endif
#define INLINE inline __attribute__((always_inline))

template <class To, class From>
INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector>
INLINE Vector read(const void* from) {
  Vector v;
  memcpy(&v, from, sizeof v);  // any alignment
  return v;
}

// --- 16 and 32 bit words ---------------------------------------------------------------------

// GCC 12 needs up to five instructions for __builtin_convertvector where AVX has one. The zeroing
// masks cost nothing and keep GCC from warning about the undefined operand of the plain intrinsics.
INLINE Words to_words(Halves v) {
#if X86 && WIDTH == 16
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(v)));
#elif X86 && WIDTH == 8
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, Words);
#endif
}

INLINE Halves to_halves(Words v) {
#if X86 && WIDTH == 16
  return bit_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, Halves);
#endif
}

// --- bfloat16: the upper half of a float -----------------------------------------------------

// To the nearest even in the upper half, rubbish in the lower; NaN stays NaN.
INLINE Words round_bf16(Floats v) {
  const Words bits = bit_cast<Words>(v);
  return v != v ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}

INLINE Floats widen(Halves v, bf16) { return bit_cast<Floats>(to_words(v) << 16); }
INLINE Halves narrow(Floats v, bf16) { return to_halves(round_bf16(v) >> 16); }
INLINE Floats rounded(Floats v, bf16) { return bit_cast<Floats>(round_bf16(v) & 0xffff0000); }

// --- float16 ---------------------------------------------------------------------------------

INLINE Floats widen(Halves v, f16) {
#if X86 && WIDTH == 16
  return bit_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v)));
#elif X86 && WIDTH == 8
  return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#else
  // exponent and mantissa move up; the exponent is rebiased, twice for infinity and NaN, and
  // subnormals are normalised by a float subtraction
  const Words word = to_words(v);
  const Words magnitude = (word & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const Words rebiased = magnitude + 0x38000000;
  const Floats small = bit_cast<Floats>(rebiased + 0x00800000) - 6.103515625e-05f;  // 2^-14
  Words bits = exponent == 0x0f800000 ? rebiased + 0x38000000 : rebiased;
  bits = exponent == 0 ? bit_cast<Words>(small) : bits;
  return bit_cast<Floats>(bits | (word & 0x8000) << 16);
#endif
}

// To the nearest even; NaN stays NaN.
INLINE Halves narrow(Floats v, f16) {
#if X86 && WIDTH == 16
  return bit_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), 0));
#elif X86 && WIDTH == 8
  return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(v), 0));
#else
  const Words word = bit_cast<Words>(v), magnitude = word & 0x7fffffff;
  const Words normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // below 2^-14: adding 0.5 aligns the mantissa as that of a subnormal, and rounds it
  const Words small = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  Words bits = magnitude < 0x38800000 ? small : normal;
  bits = magnitude >= 0x47800000 ? Words{} + 0x7c00 : bits;  // 2^16 and above
  bits = v != v ? Words{} + 0x7e00 : bits;
  return to_halves(bits | (word >> 16 & 0x8000));
#endif
}

INLINE Floats rounded(Floats v, f16) { return widen(narrow(v, f16()), f16()); }

// --- float -----------------------------------------------------------------------------------

INLINE Floats widen(Floats v, float) { return v; }
INLINE Floats narrow(Floats v, float) { return v; }
INLINE Floats rounded(Floats v, float) { return v; }

// --- memory ----------------------------------------------------------------------------------

template <class T>
struct Raw {
  using Vector = Halves;
};
template <>
struct Raw<float> {
  using Vector = Floats;
};

template <class T>
INLINE Floats load(const T* from) {
  return widen(read<typename Raw<T>::Vector>(from), T());
}

template <class T>
INLINE void store(T* to, Floats v) {
  const auto raw = narrow(v, T());
  memcpy(to, &raw, sizeof raw);
}

INLINE Floats absolute(Floats v) { return bit_cast<Floats>(bit_cast<Words>(v) & 0x7fffffff); }

// As above: GCC 12 converts a wide vector in two parts.
INLINE Doubles half(Floats v, int which) {
  const auto floats = read<HalfFloats>((const char*)&v + which * sizeof(HalfFloats));
#if X86 && WIDTH == 16
  return bit_cast<Doubles>(_mm512_maskz_cvtps_pd(0xff, bit_cast<__m256>(floats)));
#elif X86 && WIDTH == 8
  return bit_cast<Doubles>(_mm256_cvtps_pd(bit_cast<__m128>(floats)));
#else
  return __builtin_convertvector(floats, Doubles);
#endif
}
