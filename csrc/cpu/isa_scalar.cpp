// Plain C++ for any CPU; what of it is vectorised is up to the compiler.
#define ZO_ISA scalar
#include "kernels.h"

static constexpr zo::cpu::Kernels kTable = zo::make_kernels<zo::Scalar>("scalar");

const zo::cpu::Kernels* zo::cpu::scalar_kernels() { return &kTable; }
