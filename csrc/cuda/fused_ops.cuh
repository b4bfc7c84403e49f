// What the fused ops do with one element; the order of operations is that of zoengine/ops/reference/elementwise.py.
//
// begin: the element is loaded. term: its normal z of term k. end: all terms were seen. again, if kAgain: every term once
// more. `e.acc` is then rounded to the weights' type, and the states are stored.
#pragma once

#include "fused.cuh"

namespace zo::cuda {

// T: type of the weights.
template <class T>
struct OpBase {
  using Type = T;
  static constexpr bool kWeights = true;  // reads and writes weights
  static constexpr int kStates = 0;       // fp32 arrays beside them
  static constexpr bool kDiag = false;    // `state[0]` is p.diag, which is not written
  static constexpr bool kScale = false;   // z is multiplied by the tile's factor
  static constexpr bool kCopies = false;  // elements whose bit is 0 stay
  static constexpr bool kAdds = false;    // p.added is added to the weights
  static constexpr bool kAgain = false;
  static constexpr bool kSquares = false;
  // Blocks that a multiprocessor must hold together, which caps the registers: as many as spill nothing.
  static constexpr int kResident = 4;

  float s[8];

  template <int count>
  ZO_HD void read(const Fused& p) {
    ZO_UNROLL
    for (int i = 0; i < count; ++i) s[i] = p.numbers[i];
  }
  ZO_HD Coefficients coefficients(const Fused& p, int k) const { return {p.coeffs[k], 0.0f}; }
  ZO_HD void begin(Element& e) const { e.sum = 0.0f; }
  // sum_k coeffs[k] z_k
  ZO_HD void term(Coefficients c, int, float z, Element& e) const { e.sum = fma32(c.first, z, e.sum); }
  ZO_HD void end(Element&) const {}
};

template <class T, Transform transform>
struct AddTransformed : OpBase<T> {
  static constexpr int kStates = transform == Transform::kDiag ? 1 : 0;
  static constexpr bool kDiag = transform == Transform::kDiag;
  static constexpr bool kScale = transform == Transform::kScale;
  static constexpr bool kCopies = transform == Transform::kMask;
  static constexpr bool kAdds = true;
  static constexpr int kResident = kDiag ? 3 : 4;

  ZO_HD explicit AddTransformed(const Fused&) {}
  ZO_HD void begin(Element& e) const {
    if constexpr (kDiag) e.state[0] = root32(e.state[0]);
  }
  ZO_HD void term(Coefficients c, int, float z, Element& e) const {
    e.acc = fma32(c.first, kDiag ? divide32(z, e.state[0]) : z, e.acc);
  }
};

// state = keep state + sum_k coeffs[k] z_k, and with weights: sum_k numbers[k] z_k + numbers[K] old + numbers[K + 1] new.
template <class T, bool weights>
struct Fold : OpBase<T> {
  static constexpr bool kWeights = weights;
  static constexpr int kStates = 1;
  static constexpr bool kSquares = true;
  static constexpr int kResident = 3;

  float keep, of_old, of_new;

  ZO_HD explicit Fold(const Fused& p) : keep(p.state_keep == nullptr ? 1.0f : *p.state_keep) {
    of_old = weights ? p.numbers[p.terms] : 0.0f;
    of_new = weights ? p.numbers[p.terms + 1] : 0.0f;
  }
  ZO_HD Coefficients coefficients(const Fused& p, int k) const {
    return {p.coeffs[k], weights ? p.numbers[k] : 0.0f};
  }
  ZO_HD void begin(Element& e) const {
    e.other = e.state[0];
    e.state[0] = Scalar::mul(e.state[0], keep);
  }
  ZO_HD void term(Coefficients c, int, float z, Element& e) const {
    e.state[0] = fma32(c.first, z, e.state[0]);
    if constexpr (weights) e.acc = fma32(c.second, z, e.acc);
  }
  ZO_HD void end(Element& e) const {
    if constexpr (weights) e.acc = fma32(of_new, e.state[0], fma32(of_old, e.other, e.acc));
  }
};

template <class T, Rule rule>
struct RuleOp;

template <class T>
struct RuleOp<T, Rule::kSign> : OpBase<T> {
  ZO_HD explicit RuleOp(const Fused& p) { this->template read<1>(p); }
  ZO_HD void end(Element& e) const {
    float sign = e.sum > 0.0f ? 1.0f : e.sum < 0.0f ? -1.0f : 0.0f;
    e.acc = fma32(this->s[0], sign, e.acc);
  }
};

// Exponential averages of g and g^2; numbers: beta1, 1 - beta1, beta2, 1 - beta2, root correction, eps, step.
template <class T, bool largest>
struct AdamOp : OpBase<T> {
  static constexpr int kStates = largest ? 3 : 2;
  static constexpr int kResident = largest ? 2 : 3;

  ZO_HD explicit AdamOp(const Fused& p) { this->template read<7>(p); }
  ZO_HD void end(Element& e) const {
    const float* s = this->s;
    e.state[0] = fma32(s[1], e.sum, Scalar::mul(s[0], e.state[0]));
    e.state[1] = fma32(Scalar::mul(s[3], e.sum), e.sum, Scalar::mul(s[2], e.state[1]));
    if constexpr (largest) e.state[2] = max_nan(e.state[2], e.state[1]);
    float root = root32(e.state[kStates - 1]);
    e.acc = fma32(s[6], divide32(e.state[0], fma32(root, s[4], s[5])), e.acc);
  }
};

template <class T>
struct RuleOp<T, Rule::kAdam> : AdamOp<T, false> {
  using AdamOp<T, false>::AdamOp;
};

template <class T>
struct RuleOp<T, Rule::kAmsgrad> : AdamOp<T, true> {
  using AdamOp<T, true>::AdamOp;
};

// numbers: state, first, second, beta2, 1 - beta2, eps, step, sign. `other` is the first perturbation, then v.
template <class T>
struct RuleOp<T, Rule::kAdamu> : OpBase<T> {
  static constexpr int kStates = 1;
  static constexpr int kResident = 3;

  ZO_HD explicit RuleOp(const Fused& p) { this->template read<8>(p); }
  ZO_HD void term(Coefficients c, int k, float z, Element& e) const {
    const float* s = this->s;
    e.sum = fma32(c.first, z, e.sum);
    if (k == 0) {
      e.other = Scalar::mul(s[1], z);
    } else {
      float second = fma32(s[2], z, e.state[0]);
      float part = Scalar::mul(Scalar::mul(s[4], second), second);
      e.other = fma32(Scalar::mul(s[3], e.other), e.other, part);
    }
  }
  ZO_HD void end(Element& e) const {
    const float* s = this->s;
    float m = fma32(s[0], e.state[0], e.sum);
    e.acc = fma32(s[6], divide32(m, root32(Scalar::add(e.other, s[5]))), e.acc);
    e.state[0] = Scalar::mul(s[7], m);
  }
};

// numbers: keep, centre, floor, hessian first. The root may be that of the new h, which all terms make.
template <class T>
struct RuleOp<T, Rule::kHizoo> : OpBase<T> {
  static constexpr int kStates = 1;
  static constexpr bool kAgain = true;
  static constexpr int kResident = 3;

  ZO_HD explicit RuleOp(const Fused& p) { this->template read<4>(p); }
  ZO_HD Coefficients coefficients(const Fused& p, int k) const { return {p.coeffs[k], p.coeffs[p.terms + k]}; }
  ZO_HD void term(Coefficients c, int, float z, Element& e) const {
    e.sum = fma32(c.second, fma32(z, z, -this->s[1]), e.sum);
  }
  ZO_HD void end(Element& e) const {
    float h = e.state[0];
    e.state[0] = max_nan(fma32(e.sum, h, Scalar::mul(this->s[0], h)), this->s[2]);
    e.other = root32(this->s[3] != 0.0f ? e.state[0] : h);
  }
  ZO_HD void again(Coefficients c, float z, Element& e) const {
    e.acc = fma32(c.first, divide32(z, e.other), e.acc);
  }
};

// numbers: root correction, eps, step.
template <class T>
struct RuleOp<T, Rule::kAdamReplay> : OpBase<T> {
  static constexpr int kResident = 3;

  ZO_HD explicit RuleOp(const Fused& p) { this->template read<3>(p); }
  ZO_HD Coefficients coefficients(const Fused& p, int k) const { return {p.coeffs[k], p.coeffs[p.terms + k]}; }
  ZO_HD void begin(Element& e) const { e.sum = e.other = 0.0f; }
  ZO_HD void term(Coefficients c, int, float z, Element& e) const {
    e.sum = fma32(c.first, z, e.sum);
    e.other = fma32(Scalar::mul(c.second, z), z, e.other);
  }
  ZO_HD void end(Element& e) const {
    const float* s = this->s;
    e.acc = fma32(s[2], divide32(e.sum, fma32(root32(e.other), s[0], s[1])), e.acc);
  }
};

}  // namespace zo::cuda
