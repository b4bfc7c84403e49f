// Which instruction set the CPU kernels use.
#pragma once

#include <string>
#include <vector>

#include "api.h"

namespace zo::cpu {

// The instruction sets that this CPU runs, the best first. Never empty.
const std::vector<const Kernels*>& available();

// The kernels in use: the best available, unless chosen otherwise.
const Kernels& kernels();

// Use the instruction set of this name from now on; an empty name means the best. False if it is not available.
bool choose(const std::string& name);

}  // namespace zo::cpu
