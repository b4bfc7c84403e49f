// The portable CPU kernels without torch, for a processor that is not at hand: reads x as bytes from standard input and
// writes what add_noise makes of it with one term and with two, then rule_step (adam) with one and kron_rows with two.
// Arguments: dtype (0, 1, 2), gaussian, stochastic, first unit, units.
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
  std::vector<char> x;
  for (int64_t term_count = 1; term_count <= 2; ++term_count) {
    AddNoise args{};
    args.terms = terms;
    args.term_count = term_count;
    args.gaussian = std::atoi(values[2]) != 0;
    args.rounding = std::atoi(values[3]) ? &rounding : nullptr;
    const size_t bytes = static_cast<size_t>(units) * kUnit * (dtype == kFloat32 ? 4 : 2);
    if (term_count == 1) x.resize(bytes);
    if (term_count == 1 && std::fread(x.data(), 1, bytes, stdin) != bytes) return 3;
    std::vector<char> out(bytes);
    std::vector<uint32_t> words(2 * kWordsPerTile);
    const Span span{x.data(), out.data(), nullptr, std::strtoull(values[4], nullptr, 10), units, nullptr};
    scalar_kernels()->add_noise[dtype](args, span, words.data());
    std::fwrite(out.data(), 1, bytes, stdout);
  }
  std::vector<char> out = x;
  std::vector<uint32_t> words(2 * kWordsPerTile);
  const size_t elements = static_cast<size_t>(units) * kUnit;
  const Noise noise{terms, 1, std::atoi(values[2]) != 0};
  const float coefficient = 0.5f, scalars[7] = {0.9f, 0.1f, 0.99f, 0.01f, 1.5f, 1e-3f, -0.01f};
  std::vector<float> m(elements, 0.25f), v(elements, 0.125f), z(20 * kUnit);
  const Key* random = std::atoi(values[3]) && dtype != kFloat32 ? &rounding : nullptr;
  const RuleStep step{noise, &coefficient, scalars, nullptr, random, kAdam};
  const uint64_t first = std::strtoull(values[4], nullptr, 10);
  scalar_kernels()->rule_step[dtype](step, {out.data(), {m.data(), v.data()}, first, units, nullptr, nullptr},
                                     {words.data(), z.data()});
  std::fwrite(out.data(), 1, out.size(), stdout);

  out = x;
  const int64_t columns = 500;  // rows end anywhere in a tile, and some elements belong to none
  const std::vector<float> a(columns, 0.0625f);
  const Kron kron{{terms, 2, noise.gaussian}, nullptr, random, 4 * kUnit};
  const MatrixRows rows{x.data(), out.data(), first * kUnit, static_cast<int64_t>(elements) / columns, columns};
  scalar_kernels()->kron_rows[dtype](kron, {rows, a.data(), 0.5f, nullptr}, {words.data(), z.data()});
  std::fwrite(out.data(), 1, out.size(), stdout);
  return 0;
}
