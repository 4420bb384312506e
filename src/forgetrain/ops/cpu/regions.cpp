// The element-wise regions of the production schedule on a CPU: the formulas of ops/regions.py, where each is told. A row
// is read from memory once, and again from the caches. Arithmetic is fp32, rounded once at the end. Sums over rows are of
// spans of rows, then of those: another number of threads gives the same bits.
//
// The engine's file defines Number before this text. Matrices are contiguous.
#pragma GCC optimize("fp-contract=fast")
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include "numbers.h"

constexpr int64_t FEW = 1 << 14;  // numbers for which other threads are not worth waking

static inline float sigmoid(float x) {
    float e = exponential<int32_t>(-std::fabs(x));
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// What each of ``count`` rows of ``width`` numbers wants done.
template <typename Function> static inline void each(int64_t count, int64_t width, Function function) {
#pragma omp parallel for schedule(static) if (count * width > FEW)
    for (int64_t row = 0; row < count; row++) function(row);
}

extern "C" void norm(const Number* x, const Number* branch, const Number* weight, Number* total, Number* out,
                     float* inverse, int64_t rows, int64_t width, double eps, double scale) {
    each(rows, width, [=](int64_t row) {
        const Number* from = x + row * width;
        if (branch) {
            const Number* other = branch + row * width;
            Number* sum = total + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) narrow(wide(from[i]) + wide(other[i]) * float(scale), sum + i);
            from = sum;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += wide(from[i]) * wide(from[i]);
        float root = 1.0f / std::sqrt(squares / width + float(eps));
        inverse[row] = root;
        Number* to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) narrow(wide(from[i]) * root * wide(weight[i]), to + i);
    });
}

// sums: room for [rows / span, rounded up, width]. d_residual may be null.
extern "C" void norm_backward(const Number* x, const float* inverse, const Number* weight, const Number* d_out,
                              const Number* d_residual, Number* d_x, float* d_weight, float* sums, int64_t rows,
                              int64_t width, int64_t span) {
    int64_t spans = (rows + span - 1) / span;
    each(spans, span * width, [=](int64_t which) {
        float* sum = sums + which * width;
        std::fill_n(sum, width, 0.0f);
        for (int64_t row = which * span; row < std::min(rows, (which + 1) * span); row++) {
            const Number *from = x + row * width, *d = d_out + row * width, *past = d_residual ? d_residual + row * width : d;
            Number* to = d_x + row * width;
            float root = inverse[row], mean = 0;
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < width; i++) mean += wide(d[i]) * wide(weight[i]) * (wide(from[i]) * root);
            mean /= width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float normed = wide(from[i]) * root, passed = d_residual ? wide(past[i]) : 0.0f;
                sum[i] += wide(d[i]) * normed;
                narrow(passed + root * (wide(d[i]) * wide(weight[i]) - normed * mean), to + i);
            }
        }
    });
    std::fill_n(d_weight, width, 0.0f);
    for (int64_t which = 0; which < spans; which++)
#pragma omp simd
        for (int64_t i = 0; i < width; i++) d_weight[i] += sums[which * width + i];
}

extern "C" void swiglu(const Number* gate_up, Number* out, int64_t rows, int64_t width) {
    each(rows, width, [=](int64_t row) {
        const Number *gate = gate_up + 2 * row * width, *up = gate + width;
        Number* to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) narrow(wide(gate[i]) * sigmoid(wide(gate[i])) * wide(up[i]), to + i);
    });
}

extern "C" void swiglu_backward(const Number* gate_up, const Number* d_out, Number* d_gate_up, int64_t rows,
                                int64_t width) {
    each(rows, width, [=](int64_t row) {
        const Number *gate = gate_up + 2 * row * width, *up = gate + width, *d = d_out + row * width;
        Number *d_gate = d_gate_up + 2 * row * width, *d_up = d_gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = wide(gate[i]), s = sigmoid(g), back = wide(d[i]);
            narrow(back * wide(up[i]) * s * (1.0f + g * (1.0f - s)), d_gate + i);
            narrow(back * g * s, d_up + i);
        }
    });
}

// Sums of this many exponentials each are added up, for the digits' sake.
constexpr int64_t PIECE = 1024;
static inline float exponentials(const Number* x, int64_t count, float top) {
    float total = 0;
    for (int64_t from = 0; from < count; from += PIECE) {
        int64_t to = std::min(count, from + PIECE);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = from; i < to; i++) sum += exponential<int32_t>(wide(x[i]) - top);
        total += sum;
    }
    return total;
}

// Whether a label is among these logits; it is -1 where it is in another part of the vocabulary.
static inline bool among(int64_t label, int64_t vocab) { return label >= 0 && label < vocab; }

// A row of logits becomes cross-entropy's gradient.
static inline void gradient(Number* x, int64_t vocab, int64_t label, float log_sum, float d_nll) {
    float own = among(label, vocab) ? exponential<int32_t>(wide(x[label]) - log_sum) - 1.0f : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < vocab; i++) narrow(exponential<int32_t>(wide(x[i]) - log_sum) * d_nll, x + i);
    if (among(label, vocab)) narrow(own * d_nll, x + label);
}

extern "C" void entropy(Number* logits, const int64_t* labels, const float* d_nll, float* nll, int64_t rows,
                        int64_t vocab) {
    each(rows, vocab, [=](int64_t row) {
        Number* x = logits + row * vocab;
        float top = wide(x[0]);
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < vocab; i++) top = std::max(top, wide(x[i]));
        float log_sum = top + std::log(exponentials(x, vocab, top));
        nll[row] = log_sum - (among(labels[row], vocab) ? wide(x[labels[row]]) : 0.0f);
        gradient(x, vocab, labels[row], log_sum, d_nll[row]);
    });
}

extern "C" void vocabulary_sums(const Number* logits, const int64_t* labels, const float* top, float* sums,
                                int64_t rows, int64_t vocab) {
    each(rows, vocab, [=](int64_t row) {
        const Number* x = logits + row * vocab;
        sums[row] = exponentials(x, vocab, top[row]);
        sums[rows + row] = among(labels[row], vocab) ? wide(x[labels[row]]) - top[row] : 0.0f;
    });
}

extern "C" void vocabulary_gradient(Number* logits, const int64_t* labels, const float* log_sum, const float* d_nll,
                                    int64_t rows, int64_t vocab) {
    each(rows, vocab, [=](int64_t row) {
        gradient(logits + row * vocab, vocab, labels[row], log_sum[row], d_nll[row]);
    });
}

// rates: lr / (1 - beta1^t), sqrt(1 - beta2^t) and 1 - lr · decay. rounded may be null.
extern "C" void adamw(float* p, const float* g, float* m, float* v, Number* rounded, const float* factor,
                      const float* rates, int64_t count, double beta1, double beta2, double eps) {
    constexpr int64_t PART = 4096;
    float clip = *factor, step = rates[0], root = rates[1], kept = rates[2];
    float first = 1 - beta1, second = beta2, rest = 1 - beta2, small = eps;
    each((count + PART - 1) / PART, PART, [=](int64_t part) {
        int64_t to = std::min(count, (part + 1) * PART);
#pragma omp simd
        for (int64_t i = part * PART; i < to; i++) {
            float grad = g[i] * clip;
            m[i] += (grad - m[i]) * first;
            v[i] = v[i] * second + grad * grad * rest;
            p[i] = p[i] * kept - step * m[i] / (std::sqrt(v[i]) / root + small);
        }
        if (rounded)
#pragma omp simd
            for (int64_t i = part * PART; i < to; i++) narrow(p[i], rounded + i);
    });
}
