#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define ZO_ISA avx2
#include "avx2.h"
#include "kernels.h"

static constexpr zo::cpu::Kernels kTable = zo::make_kernels<zo::Vector>("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const zo::cpu::Kernels* zo::cpu::avx2_kernels() {
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &kTable : nullptr;
}
#else
const zo::cpu::Kernels* zo::cpu::avx2_kernels() { return nullptr; }
#endif
