// The machine of csrc/noise.h on AVX-512 (F, BW, DQ, VL): sixteen elements.
#pragma once

#include "memory.h"

namespace zo {
inline namespace ZO_ISA {

struct Vector {
  using F = __m512;
  using U = __m512i;
  using W = __m512i;  // 64-bit lanes whose low halves hold 32-bit words
  static constexpr int kLanes = 16;
  static constexpr bool kXor3 = true;

  static ZO_HD F splat(float value) { return _mm512_set1_ps(value); }
  static ZO_HD U splat(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static ZO_HD U bits(F a) { return _mm512_castps_si512(a); }
  static ZO_HD F floats(U a) { return _mm512_castsi512_ps(a); }
  static ZO_HD F to_float(U a) { return _mm512_cvtepi32_ps(a); }
  static ZO_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static ZO_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static ZO_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
  static ZO_HD F div(F a, F b) { return _mm512_div_ps(a, b); }
  static ZO_HD F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static ZO_HD F max(F a, F b) {  // the instruction gives b where either is NaN
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static ZO_HD F sign(F a) {
    F positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, splat(0.0f), _CMP_GT_OQ), splat(1.0f));
    return _mm512_mask_mov_ps(positive, _mm512_cmp_ps_mask(a, splat(0.0f), _CMP_LT_OQ), splat(-1.0f));
  }
  static ZO_HD U add(U a, U b) { return _mm512_add_epi32(a, b); }
  static ZO_HD U sub(U a, U b) { return _mm512_sub_epi32(a, b); }
  static ZO_HD U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
  static ZO_HD U bit_xor(U a, U b) { return _mm512_xor_si512(a, b); }
  static ZO_HD U xor_and(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x78); }
  template <int n>
  static ZO_HD U shl(U a) {
    return _mm512_slli_epi32(a, n);
  }
  template <int n>
  static ZO_HD U shr(U a) {
    return _mm512_srli_epi32(a, n);
  }
  template <int bit>
  static ZO_HD F select(U word, F clear, F set) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(word, splat(1u << bit)), clear, set);
  }
  static ZO_HD U shl_by(U a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  // Element j: `set` where bit j * step + first of `word` is 1, else `clear`.
  template <int step, int first>
  static ZO_HD F pick(uint32_t word, F clear, F set) {
    const U places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const U bit = _mm512_slli_epi32(_mm512_sllv_epi32(splat(1u), _mm512_slli_epi32(places, step / 2)), first);
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(splat(word), bit), clear, set);
  }
  // Bit j: whether |a_j| <= b_j.
  static ZO_HD uint32_t below(F a, F b) {
    return static_cast<uint32_t>(_mm512_cmp_ps_mask(_mm512_andnot_ps(splat(-0.0f), a), b, _CMP_LE_OQ));
  }

  static ZO_HD F load(const float* p) { return _mm512_loadu_ps(p); }
  static ZO_HD U load(const uint32_t* p) { return _mm512_load_si512(p); }
  static ZO_HD void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static ZO_HD void store(uint32_t* p, U a) { _mm512_store_si512(p, a); }

  // Philox: even and odd calls in separate 64-bit lanes.
  static ZO_HD W multiply(W a, W b) { return _mm512_mul_epu32(a, b); }  // of the low halves
  static ZO_HD W high(W a) { return _mm512_srli_epi64(a, 32); }
  static ZO_HD W add64(W a, W b) { return _mm512_add_epi64(a, b); }
  static ZO_HD W splat64(uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); }
  // Lane j holds (first + j * step) * factor.
  static ZO_HD W ramp(uint64_t factor, uint64_t first, uint64_t step) {
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_add_epi64(splat64(factor * first), _mm512_mullo_epi64(lanes, splat64(factor * step)));
  }
  static ZO_HD W xor3(W a, W b, W c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static ZO_HD U interleave_high(W even, W odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB); }
  static ZO_HD U interleave_low(W even, W odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }
};

template <>
struct Memory<Vector, float> {
  static constexpr int kHalves = 1;
  static ZO_HD void load(const float* p, __m512 (&a)[1]) { a[0] = _mm512_loadu_ps(p); }
  static ZO_HD void store(float* p, const __m512 (&a)[1]) { _mm512_storeu_ps(p, a[0]); }
};

template <>
struct Memory<Vector, BFloat16> {
  static constexpr int kHalves = 2;
  static ZO_HD void load(const BFloat16* p, __m512 (&a)[2]) {
    __m512i v = _mm512_loadu_si512(p);
    a[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    a[1] = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static ZO_HD void store(BFloat16* p, const __m512 (&a)[2]) {
    store_bits(p, a, nearest(_mm512_castps_si512(a[0])), nearest(_mm512_castps_si512(a[1])));
  }
  static ZO_HD void store(BFloat16* p, const __m512 (&a)[2], const __m512i (&random16)[2]) {
    store_bits(p, a, _mm512_add_epi32(_mm512_castps_si512(a[0]), random16[0]),
               _mm512_add_epi32(_mm512_castps_si512(a[1]), random16[1]));
  }

 private:
  static ZO_HD __m512i nearest(__m512i bits) {
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  }
  // The upper halves of the sums; all ones, a NaN, where the value is NaN and the sum may have carried away.
  static ZO_HD void store_bits(BFloat16* p, const __m512 (&a)[2], __m512i even, __m512i odd) {
    const __m512i nan = _mm512_set1_epi32(-1);
    even = _mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(a[0], a[0], _CMP_UNORD_Q), nan);
    odd = _mm512_mask_mov_epi32(odd, _mm512_cmp_ps_mask(a[1], a[1], _CMP_UNORD_Q), nan);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(even, 16), odd));
  }
};

template <>
struct InOrder<Vector, BFloat16> {
  static ZO_HD __m512 load(const BFloat16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static ZO_HD void store(BFloat16* p, __m512 a) {
    __m512i bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    store_bits(p, a, _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd));
  }
  static ZO_HD void store(BFloat16* p, __m512 a, __m512i random16) {
    store_bits(p, a, _mm512_add_epi32(_mm512_castps_si512(a), random16));
  }

 private:
  static ZO_HD void store_bits(BFloat16* p, __m512 a, __m512i bits) {
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(-1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
};

template <>
struct Memory<Vector, Float16> {
  static constexpr int kHalves = 1;
  static ZO_HD void load(const Float16* p, __m512 (&a)[1]) {
    a[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static ZO_HD void store(Float16* p, const __m512 (&a)[1]) {
    store_bits(p, _mm512_cvtps_ph(a[0], _MM_FROUND_TO_NEAREST_INT));
  }
  static ZO_HD void store(Float16* p, const __m512 (&a)[1], const __m512i (&random16)[1]) {
    __m512i bits = _mm512_castps_si512(a[0]), magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    __m512i fixed = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(0x1p37f)));
    __m512i normal = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(0x38000000));
    __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x38800000));
    __m512i kept = _mm512_mask_mov_epi32(normal, small, fixed);
    __m512i half = _mm512_srli_epi32(_mm512_add_epi32(kept, _mm512_srli_epi32(random16[0], 3)), 13);
    half = _mm512_min_epi32(half, _mm512_set1_epi32(0x7C00));
    half = _mm512_mask_mov_epi32(half, _mm512_cmp_ps_mask(a[0], a[0], _CMP_UNORD_Q), _mm512_set1_epi32(0x7E00));
    half = _mm512_or_si512(half, _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x8000)));
    store_bits(p, _mm512_cvtepi32_epi16(half));
  }

 private:
  static ZO_HD void store_bits(Float16* p, __m256i halves) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
};

static ZO_HD void load_halves(const float* p, __m512 (&a)[1]) { a[0] = _mm512_loadu_ps(p); }
static ZO_HD void load_halves(const float* p, __m512 (&a)[2]) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
  a[0] = _mm512_permutex2var_ps(low, even, high);
  a[1] = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

}  // namespace ZO_ISA
}  // namespace zo
