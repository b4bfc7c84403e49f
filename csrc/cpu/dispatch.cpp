#include "dispatch.h"

#include <atomic>

namespace zo::cpu {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> found;
    for (const Kernels* candidate : {avx512_kernels(), avx2_kernels(), scalar_kernels()}) {
      if (candidate) found.push_back(candidate);
    }
    return found;
  }();
  return list;
}

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_relaxed);
  return current ? *current : *available().front();
}

bool choose(const std::string& name) {
  if (name.empty()) {
    chosen = nullptr;
    return true;
  }
  for (const Kernels* candidate : available()) {
    if (name == candidate->name) {
      chosen = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace zo::cpu
