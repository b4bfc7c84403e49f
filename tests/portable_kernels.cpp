// The portable CPU kernels without torch, for a processor that is not at hand: reads x as bytes from standard input and
// writes what add_noise makes of it. Arguments: dtype (0, 1, 2), gaussian, stochastic, first unit, units.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/api.h"
#include "noise_table.h"

using namespace zo::cpu;

static Key key_of(uint64_t seed) {
  Key key;
  for (uint32_t r = 0; r < kRounds; ++r) {
    key.k0[r] = static_cast<uint32_t>(seed) + r * zo::table::PHILOX_W0;
    key.k1[r] = static_cast<uint32_t>(seed >> 32) + r * zo::table::PHILOX_W1;
  }
  return key;
}

int main(int count, char** values) {
  if (count != 6) return 2;
  const int dtype = std::atoi(values[1]);
  const int64_t units = std::atoll(values[5]);
  const Term terms[2] = {{key_of(0x0123456789ABCDEF), 0, 0.5f}, {key_of(42), 0, -0.001f}};
  const Key rounding = key_of(7);
  for (int64_t term_count = 1; term_count <= 2; ++term_count) {
    AddNoise args{};
    args.terms = terms;
    args.term_count = term_count;
    args.gaussian = std::atoi(values[2]) != 0;
    args.rounding = std::atoi(values[3]) ? &rounding : nullptr;
    const size_t bytes = static_cast<size_t>(units) * kUnit * (dtype == kFloat32 ? 4 : 2);
    static std::vector<char> x(bytes);
    if (term_count == 1 && std::fread(x.data(), 1, bytes, stdin) != bytes) return 3;
    std::vector<char> out(bytes);
    std::vector<uint32_t> words(2 * kWordsPerTile);
    const Span span{x.data(), out.data(), nullptr, std::strtoull(values[4], nullptr, 10), units, nullptr};
    scalar_kernels()->add_noise[dtype](args, span, words.data());
    std::fwrite(out.data(), 1, bytes, stdout);
  }
  return 0;
}
