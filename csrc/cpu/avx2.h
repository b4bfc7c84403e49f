// The machine of csrc/noise.h on AVX2, FMA and F16C: eight elements.
#pragma once

#include "memory.h"

namespace zo {
inline namespace ZO_ISA {

struct Vector {
  using F = __m256;
  using U = __m256i;
  using W = __m256i;  // 64-bit lanes whose low halves hold 32-bit words
  static constexpr int kLanes = 8;
  static constexpr bool kXor3 = false;  // no single instruction for it

  static ZO_HD F splat(float value) { return _mm256_set1_ps(value); }
  static ZO_HD U splat(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static ZO_HD U bits(F a) { return _mm256_castps_si256(a); }
  static ZO_HD F floats(U a) { return _mm256_castsi256_ps(a); }
  static ZO_HD F to_float(U a) { return _mm256_cvtepi32_ps(a); }
  static ZO_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static ZO_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static ZO_HD F add(F a, F b) { return _mm256_add_ps(a, b); }
  static ZO_HD F div(F a, F b) { return _mm256_div_ps(a, b); }
  static ZO_HD F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static ZO_HD F max(F a, F b) {  // the instruction gives b where either is NaN
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static ZO_HD F sign(F a) {
    F positive = _mm256_and_ps(_mm256_cmp_ps(a, splat(0.0f), _CMP_GT_OQ), splat(1.0f));
    return _mm256_or_ps(positive, _mm256_and_ps(_mm256_cmp_ps(a, splat(0.0f), _CMP_LT_OQ), splat(-1.0f)));
  }
  static ZO_HD U add(U a, U b) { return _mm256_add_epi32(a, b); }
  static ZO_HD U sub(U a, U b) { return _mm256_sub_epi32(a, b); }
  static ZO_HD U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
  static ZO_HD U bit_xor(U a, U b) { return _mm256_xor_si256(a, b); }
  static ZO_HD U xor_and(U a, U b, U c) { return bit_xor(a, bit_and(b, c)); }
  template <int n>
  static ZO_HD U shl(U a) {
    return _mm256_slli_epi32(a, n);
  }
  template <int n>
  static ZO_HD U shr(U a) {
    return _mm256_srli_epi32(a, n);
  }
  template <int bit>
  static ZO_HD F select(U word, F clear, F set) {
    U mask = bit == 30 ? add(word, word) : shl<31 - bit>(word);
    F result;  // GCC 12 puts a comparison before the intrinsic's blend, though the blend looks at the top bit alone
    asm("vblendvps %3, %2, %1, %0" : "=x"(result) : "x"(clear), "x"(set), "x"(mask));
    return result;
  }
  static ZO_HD U shl_by(U a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  // Element j: `set` where bit j * step + first of `word` is 1, else `clear`.
  template <int step, int first>
  static ZO_HD F pick(uint32_t word, F clear, F set) {
    const U bit = _mm256_slli_epi32(_mm256_sllv_epi32(splat(1u), _mm256_setr_epi32(
        0, step, 2 * step, 3 * step, 4 * step, 5 * step, 6 * step, 7 * step)), first);
    const U chosen = _mm256_cmpeq_epi32(bit_and(splat(word), bit), bit);
    return _mm256_blendv_ps(clear, set, floats(chosen));
  }
  // Bit j: whether |a_j| <= b_j.
  static ZO_HD uint32_t below(F a, F b) {
    const F magnitude = _mm256_andnot_ps(splat(-0.0f), a);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(magnitude, b, _CMP_LE_OQ)));
  }

  static ZO_HD F load(const float* p) { return _mm256_loadu_ps(p); }
  static ZO_HD U load(const uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static ZO_HD void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static ZO_HD void store(uint32_t* p, U a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }

  // Philox: even and odd calls in separate 64-bit lanes.
  static ZO_HD W multiply(W a, W b) { return _mm256_mul_epu32(a, b); }  // of the low halves
  static ZO_HD W high(W a) { return _mm256_srli_epi64(a, 32); }
  static ZO_HD W add64(W a, W b) { return _mm256_add_epi64(a, b); }
  static ZO_HD W splat64(uint64_t value) { return _mm256_set1_epi64x(static_cast<int64_t>(value)); }
  // Lane j holds (first + j * step) * factor.
  static ZO_HD W ramp(uint64_t factor, uint64_t first, uint64_t step) {
    return _mm256_set_epi64x(static_cast<int64_t>(factor * (first + 3 * step)),
                             static_cast<int64_t>(factor * (first + 2 * step)),
                             static_cast<int64_t>(factor * (first + step)), static_cast<int64_t>(factor * first));
  }
  static ZO_HD U interleave_high(W even, W odd) { return _mm256_blend_epi32(high(even), odd, 0xAA); }
  static ZO_HD U interleave_low(W even, W odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
};

template <>
struct Memory<Vector, float> {
  static constexpr int kHalves = 1;
  static ZO_HD void load(const float* p, __m256 (&a)[1]) { a[0] = _mm256_loadu_ps(p); }
  static ZO_HD void store(float* p, const __m256 (&a)[1]) { _mm256_storeu_ps(p, a[0]); }
};

template <>
struct Memory<Vector, BFloat16> {
  static constexpr int kHalves = 2;
  static ZO_HD void load(const BFloat16* p, __m256 (&a)[2]) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    a[1] = _mm256_castsi256_ps(_mm256_and_si256(v, high16()));
  }
  static ZO_HD void store(BFloat16* p, const __m256 (&a)[2]) {
    store_bits(p, a, nearest(_mm256_castps_si256(a[0])), nearest(_mm256_castps_si256(a[1])));
  }
  static ZO_HD void store(BFloat16* p, const __m256 (&a)[2], const __m256i (&random16)[2]) {
    store_bits(p, a, _mm256_add_epi32(_mm256_castps_si256(a[0]), random16[0]),
               _mm256_add_epi32(_mm256_castps_si256(a[1]), random16[1]));
  }

 private:
  static ZO_HD __m256i high16() { return _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)); }
  static ZO_HD __m256i nearest(__m256i bits) {
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  }
  // The upper halves of the sums; all ones, a NaN, where the value is NaN and the sum may have carried away.
  static ZO_HD void store_bits(BFloat16* p, const __m256 (&a)[2], __m256i even, __m256i odd) {
    even = _mm256_or_si256(even, _mm256_castps_si256(_mm256_cmp_ps(a[0], a[0], _CMP_UNORD_Q)));
    odd = _mm256_or_si256(odd, _mm256_castps_si256(_mm256_cmp_ps(a[1], a[1], _CMP_UNORD_Q)));
    __m256i both = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
  }
};

template <>
struct InOrder<Vector, BFloat16> {
  static ZO_HD __m256 load(const BFloat16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static ZO_HD void store(BFloat16* p, __m256 a) {
    __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    store_bits(p, a, _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd));
  }
  static ZO_HD void store(BFloat16* p, __m256 a, __m256i random16) {
    store_bits(p, a, _mm256_add_epi32(_mm256_castps_si256(a), random16));
  }

 private:
  static ZO_HD void store_bits(BFloat16* p, __m256 a, __m256i bits) {
    bits = _mm256_or_si256(bits, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    bits = _mm256_srli_epi32(bits, 16);
    __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
};

template <>
struct Memory<Vector, Float16> {
  static constexpr int kHalves = 1;
  static ZO_HD void load(const Float16* p, __m256 (&a)[1]) {
    a[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static ZO_HD void store(Float16* p, const __m256 (&a)[1]) {
    store_bits(p, _mm256_cvtps_ph(a[0], _MM_FROUND_TO_NEAREST_INT));
  }
  static ZO_HD void store(Float16* p, const __m256 (&a)[1], const __m256i (&random16)[1]) {
    const __m256i infinity = _mm256_set1_epi32(0x7C00);
    __m256i bits = _mm256_castps_si256(a[0]), magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    __m256i fixed = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p37f)));
    __m256i normal = _mm256_sub_epi32(magnitude, _mm256_set1_epi32(0x38000000));
    __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x38800000), magnitude);
    __m256i kept = _mm256_blendv_epi8(normal, fixed, small);
    __m256i half = _mm256_srli_epi32(_mm256_add_epi32(kept, _mm256_srli_epi32(random16[0], 3)), 13);
    half = _mm256_min_epi32(half, infinity);
    half = _mm256_or_si256(half, _mm256_castps_si256(_mm256_cmp_ps(a[0], a[0], _CMP_UNORD_Q)));
    // The sign above 15 bits of magnitude, sign-extended so that the signed pack keeps every bit.
    half = _mm256_or_si256(half, _mm256_slli_epi32(_mm256_srai_epi32(bits, 31), 15));
    store_bits(p, _mm_packs_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }

 private:
  static ZO_HD void store_bits(Float16* p, __m128i halves) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
};

static ZO_HD void load_halves(const float* p, __m256 (&a)[1]) { a[0] = _mm256_loadu_ps(p); }
static ZO_HD void load_halves(const float* p, __m256 (&a)[2]) {
  __m256 low = _mm256_loadu_ps(p), high = _mm256_loadu_ps(p + 8);
  __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
  a[0] = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0x88), order);
  a[1] = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0xDD), order);
}

}  // namespace ZO_ISA
}  // namespace zo
