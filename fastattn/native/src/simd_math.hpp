// Elementary functions on vectors; the coefficients are minimax fits of relative error.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

constexpr float INF = __builtin_inff();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

template <int N>
FA_INLINE vf polynomial(vf x, const float (&c)[N]) {
    vf r = set1(c[N - 1]);
    for (int i = N - 2; i >= 0; i--) r = fma(r, x, set1(c[i]));
    return r;
}

// 2^x; 0 below -150, infinity from 128, NaN for NaN.
FA_INLINE vf exp2(vf x) {
    static constexpr float c[] = {1.0f,           0.69314718247f, 0.240226477385f, 0.055503323674f,
                                  0.00961843692f, 0.00133988739f, 0.000153533620f};
    x = min(set1(129.0f), max(set1(-151.0f), x));
    const vf n = round(x);
    return ldexp(polynomial(x - n, c), n);
}

// e^x, the reduction by ln 2 in two parts.
FA_INLINE vf exp(vf x) {
    static constexpr float c[] = {1.0f,           1.0f,           0.49999994040f, 0.16666521132f,
                                  0.04166838899f, 0.00836871006f, 0.00138146128f};
    x = min(set1(89.0f), max(set1(-104.5f), x));
    const vf n = round(x * set1(LOG2E));
    const vf r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
    return ldexp(polynomial(r, c), n);
}

// tanh: an odd polynomial near 0, where the quotient of exponentials would cancel.
FA_INLINE vf tanh(vf x) {
    const vf a = abs(x);
    const vf e = exp(a * set1(-2.0f));
    const vf far = copysign((set1(1.0f) - e) / (set1(1.0f) + e), x);
    static constexpr float c[] = {-0.333332819422f, 0.133314422036f, -0.0537397155531f, 0.0206390887954f,
                                  -0.00570498872745f};
    const vf z = x * x;
    const vf near = fma(polynomial(z, c) * z, x, x);
    return select(lt(a, set1(0.625f)), near, far);
}

// 1 / (1 + e^-x)
FA_INLINE vf sigmoid(vf x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
