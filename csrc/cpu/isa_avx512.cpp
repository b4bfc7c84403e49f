#include "api.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12's own header leaves unused operands uninitialised
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

#define ZO_ISA avx512
#include "avx512.h"
#include "kernels.h"

static constexpr zo::cpu::Kernels kTable = zo::make_kernels<zo::Vector>("avx512");

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const zo::cpu::Kernels* zo::cpu::avx512_kernels() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return runs ? &kTable : nullptr;
}
#else
const zo::cpu::Kernels* zo::cpu::avx512_kernels() { return nullptr; }
#endif
