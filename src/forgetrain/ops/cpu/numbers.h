// Single numbers: bf16 widened to fp32, and fp32 rounded to nearest even on the way back. Loops over them are vectors.
static inline float wide(float x) { return x; }
static inline float wide(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
static inline void narrow(float x, float* p) { *p = x; }
static inline void narrow(float x, uint16_t* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = x == x ? bits : 0x7fc0;
}

// exp of x <= 0, to about 1e-7: 2^n · e^r with |r| <= ln 2 / 2; e^-87, or 1.6e-38, for all below, and NaN for NaN. Of a
// number or of a vector of them, Int being as many whole numbers.
template <typename To, typename From> static inline To converted(From x) {
    if constexpr (std::is_arithmetic_v<From>) return To(x);
    else return __builtin_convertvector(x, To);
}
template <typename Int, typename Real> static inline Real exponential(Real x) {
    x = x < -87.0f ? Real{} - 87.0f : x;
    Real n = converted<Real>(converted<Int>(x * 1.44269504f - 0.5f));
    Real r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Real p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Int bits = (converted<Int>(n) + 127) << 23;
    Real power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}
