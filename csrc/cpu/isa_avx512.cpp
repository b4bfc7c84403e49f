#include "api.h"

const zo::cpu::Kernels* zo::cpu::avx512_kernels() { return nullptr; }
