// Vectors of W numbers, which is defined before this text: fp32 as they lie, and bf16 rounded to nearest even.
typedef float Lanes __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));

static inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
static inline void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
static inline void narrow(Lanes x, float* p) { store(p, x); }
static inline void narrow(Lanes x, uint16_t* p) {
    Whole bits = (Whole)x;
    Whole even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(x == x ? even : Whole{} + 0x7fc0, Halves);
}
