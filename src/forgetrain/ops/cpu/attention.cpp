// Causal attention with grouped queries on a CPU: R query heads share a key head, so the R rows of one position meet the
// same keys and form one small product. Scores never leave the caches; the backward pass forms them again from the
// logarithm of their sum (FlashAttention-2, arXiv 2307.08691). Sums are fp32. bf16 numbers are multiplied in pairs where
// the processor can (AVX-512-BF16), for which probabilities and their gradients are rounded to bf16; else in fp32.
//
// The engine's file defines G key heads a token, R query heads of each, K numbers a head, SCALE of the scores, Number, and
// whether these sizes allow for pairs (PAIRS) before this text. Columns of qkv are [Q, K, V]; RoPE turns Q and K on the way in and their
// gradients on the way out, by the cosines and sines of [positions, K], the same in both halves. first[position] is the
// first key that a position sees.
#pragma GCC optimize("fp-contract=fast")
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if PAIRS && defined(__AVX512BF16__)
#include <immintrin.h>
#define PAIRED
#endif

#ifdef __AVX512F__
constexpr int WIDEST = 16;
#else
constexpr int WIDEST = 8;  // of two registers, vectors are 3.6 times as slow
#endif
constexpr int W = K % WIDEST == 0 ? WIDEST : K % 8 == 0 ? 8 : K % 4 == 0 ? 4 : 2;  // numbers a vector
constexpr int TILE = 2 * W, C = K / W, Q_WIDTH = G * R * K, STRIDE = Q_WIDTH + 2 * G * K;
constexpr int64_t SPAN = 16;  // positions whose share of dK and dV is summed apart, for the digits' sake
// Sums of RS rows and CS vectors of each stay in registers, beside what is multiplied: in 24 of 32, or in 8 of 16.
constexpr int part(int count, int most) { return most >= count ? count : count % most ? part(count, most - 1) : most; }
constexpr int SUMS = W == 16 ? 24 : 8, RS = part(R, SUMS / 2), CS = part(C, SUMS / RS);
#include "numbers.h"
#include "vectors.h"

static inline Lanes wide(const float* p) { return load(p); }
static inline Lanes wide(const uint16_t* p) {
    return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Whole) << 16);
}

static const Whole COUNT = [] { Whole x; for (int l = 0; l < W; l++) x[l] = l; return x; }();

// Which of the keys from j on a position sees: all bits of a lane, or none.
static inline Whole seen(int64_t j, int64_t from, int64_t position) {
    Whole key = COUNT + int32_t(j);
    return (key >= int32_t(from)) & (key <= int32_t(position));
}

static inline void rows_of(const Number* x, int64_t count, int64_t stride, float* out) {
    for (int64_t i = 0; i < count; i++) for (int c = 0; c < C; c++) store(out + i * K + c * W, wide(x + i * stride + c * W));
}

// A head x_K turned by the angles of one position, times scale; sign -1 turns back.
static inline void rope(float* __restrict x, const float* __restrict cos, const float* __restrict sin, float sign,
                        float scale) {
    for (int d = 0; d < K / 2; d++) {
        float a = x[d], b = x[d + K / 2], c = cos[d] * scale, w = sin[d] * sign * scale;
        x[d] = a * c - b * w;
        x[d + K / 2] = b * c + a * w;
    }
}

static inline void narrow_rows(const float* x, int64_t count, Number* out) {
    for (int64_t i = 0; i < count * K; i += W) narrow(load(x + i), out + i);
}

#ifdef PAIRED
typedef uint32_t Cell;  // two bf16, which one instruction multiplies and adds
constexpr int PER = 2;

static inline Lanes times(Lanes sum, Cell a, __m512i b) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int32_t(a)), (__m512bh)b);
}
static inline __m512i rounded(const float* low, const float* high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(high), (__m512)load(low));
}
static inline __m512i braided(const float* low, const float* high) {  // the cells of two rows
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rounded(low, high));
}
#else
typedef float Cell;
constexpr int PER = 1;
#endif
typedef std::vector<Cell> Cells;

// x_K, an even count of rows, as cells: of neighbours in a row.
static inline void along(const float* x, int64_t count, Cell* out) {
#ifdef PAIRED
    for (int64_t i = 0; i < count * K; i += 2 * W) _mm512_storeu_si512(out + i / 2, rounded(x + i, x + i + W));
#else
    std::copy_n(x, count * K, out);
#endif
}

// ... of neighbours in a column.
static inline void down(const float* x, int64_t count, Cell* out) {
#ifdef PAIRED
    for (int64_t i = 0; i < count; i += 2)
        for (int d = 0; d < K; d += W)
            _mm512_storeu_si512(out + i / 2 * K + d, braided(x + i * K + d, x + (i + 1) * K + d));
#else
    std::copy_n(x, count * K, out);
#endif
}

// ... of neighbours in a row, transposed to [width / TILE, K / PER, TILE]: in [K / PER, width] a tile's numbers would lie
// whole pages apart, and all of them in the same few sets of L1.
static void turned(const float* x, int64_t count, int64_t width, Cell* out) {
    Cells flat((count + 1) * K / PER);
    along(x, count + count % PER, flat.data());
    for (int d = 0; d < K / PER; d++)
        for (int64_t j = 0; j < width; j++)
            out[j / TILE * TILE * (K / PER) + d * TILE + j % TILE] = j < count ? flat[j * (K / PER) + d] : Cell{};
}

// R rows of a (along) · TILE columns of bt (turned).
static inline void tile(const Cell* a, const Cell* bt, Lanes (&out)[R][2]) {
#ifdef PAIRED
    for (int r = 0; r < R; r++) out[r][0] = out[r][1] = Lanes{};
    for (int d = 0; d < K / PER; d++)
        for (int h = 0; h < 2; h++) {
            __m512i x = _mm512_loadu_si512(bt + d * TILE + h * W);
            for (int r = 0; r < R; r++) out[r][h] = times(out[r][h], a[r * (K / 2) + d], x);
        }
#else
    for (int top = 0; top < R; top += RS) {
        Lanes sum[RS][2];
        for (int r = 0; r < RS; r++) sum[r][0] = sum[r][1] = Lanes{};
        for (int d = 0; d < K; d++) {
            Lanes x = load(bt + d * TILE), y = load(bt + d * TILE + W);
            for (int r = 0; r < RS; r++) sum[r][0] += a[(top + r) * K + d] * x, sum[r][1] += a[(top + r) * K + d] * y;
        }
        for (int r = 0; r < RS; r++) out[top + r][0] = sum[r][0], out[top + r][1] = sum[r][1];
    }
#endif
}

// R rows of p · the rows [from, to) of b_K (down). Outside of that range p is zero up to whole tiles.
static inline void gather(const float* p, int64_t width, const Cell* b, int64_t from, int64_t to, Cell* scratch,
                          Lanes (&out)[R][C]) {
#ifdef PAIRED
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) out[r][c] = Lanes{};
    for (int r = 0; r < R; r++)
        for (int64_t j = from / TILE * TILE; j < to; j += TILE)
            _mm512_storeu_si512(scratch + (r * width + j) / 2, rounded(p + r * width + j, p + r * width + j + W));
    for (int64_t j = from / 2; j < (to + 1) / 2; j++)
        for (int c = 0; c < C; c++) {
            __m512i x = _mm512_loadu_si512(b + j * K + c * W);
            for (int r = 0; r < R; r++) out[r][c] = times(out[r][c], scratch[r * width / 2 + j], x);
        }
#else
    for (int top = 0; top < R; top += RS)
        for (int left = 0; left < C; left += CS) {
            Lanes sum[RS][CS];
            for (int r = 0; r < RS; r++) for (int c = 0; c < CS; c++) sum[r][c] = Lanes{};
            for (int64_t j = from; j < to; j++)
                for (int c = 0; c < CS; c++) {
                    Lanes x = load(b + j * K + (left + c) * W);
                    for (int r = 0; r < RS; r++) sum[r][c] += p[(top + r) * width + j] * x;
                }
            for (int r = 0; r < RS; r++) for (int c = 0; c < CS; c++) out[top + r][left + c] = sum[r][c];
        }
#endif
}

// The rows [from, to) of sum_K += pᵀ · a, R rows (down).
static inline void scatter(const float* p, int64_t width, const Cell* a, int64_t from, int64_t to, Cell* scratch,
                           float* sum) {
#ifdef PAIRED
    for (int r = 0; r < R; r += 2)
        for (int64_t j = from / W * W; j < to; j += W)
            _mm512_storeu_si512(scratch + r / 2 * width + j, braided(p + r * width + j, p + (r + 1) * width + j));
    const Cell* weights = scratch;
    __m512i rows[R / 2][C];
    for (int r = 0; r < R / 2; r++) for (int c = 0; c < C; c++) rows[r][c] = _mm512_loadu_si512(a + r * K + c * W);
#else
    const Cell* weights = p;
    Lanes rows[R][C];
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) rows[r][c] = load(a + r * K + c * W);
#endif
    for (int64_t j = from; j < to; j++)
        for (int c = 0; c < C; c++) {
            Lanes x = load(sum + j * K + c * W);
            for (int r = 0; r < R / PER; r++)
#ifdef PAIRED
                x = times(x, weights[r * width + j], rows[r][c]);
#else
                x += weights[r * width + j] * rows[r][c];
#endif
            store(sum + j * K + c * W, x);
        }
}

static void forward(const Number* qkv, const float* cos, const float* sin, const int64_t* first, Number* out,
                    float* log_sum, int64_t n, int64_t s) {
    int64_t width = (s + TILE - 1) / TILE * TILE;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < n * G; task++) {
        int64_t row = task / G, g = task % G;
        const Number* base = qkv + row * s * STRIDE;
        std::vector<float> k((s + 1) * K), v((s + 1) * K), p(R * width);  // a row more: pairs need an even count
        Cells kt(K * width / PER), v_rows((s + 1) * K), q_row(R * K), scratch(R * width);
        rows_of(base + Q_WIDTH + g * K, s, STRIDE, k.data());
        rows_of(base + Q_WIDTH + (G + g) * K, s, STRIDE, v.data());
        for (int64_t i = 0; i < s; i++) rope(&k[i * K], cos + (row * s + i) * K, sin + (row * s + i) * K, 1, 1);
        turned(k.data(), s, width, kt.data());
        down(v.data(), s + s % PER, v_rows.data());
        for (int64_t i = 0; i < s; i++) {
            float q[R * K];
            rows_of(base + i * STRIDE + g * R * K, R, K, q);
            for (int r = 0; r < R; r++) rope(q + r * K, cos + (row * s + i) * K, sin + (row * s + i) * K, 1, SCALE);
            along(q, R, q_row.data());
            int64_t from = first[row * s + i], start = from / TILE * TILE, end = i / TILE * TILE + TILE;
            Lanes most[R], total[R];
            for (int r = 0; r < R; r++) most[r] = Lanes{} - INFINITY;
            for (int64_t j = start; j < end; j += TILE) {
                Lanes t[R][2];
                tile(q_row.data(), kt.data() + j * (K / PER), t);
                for (int h = 0; h < 2; h++) {
                    Whole open = seen(j + h * W, from, i);
                    for (int r = 0; r < R; r++) {
                        t[r][h] = open ? t[r][h] : Lanes{} - INFINITY;
                        most[r] = most[r] > t[r][h] ? most[r] : t[r][h];
                        store(p.data() + r * width + j + h * W, t[r][h]);
                    }
                }
            }
            for (int r = 0; r < R; r++) {
                float top = most[r][0];
                for (int l = 1; l < W; l++) top = std::max(top, most[r][l]);
                total[r] = Lanes{};
                for (int64_t j = start; j < end; j += W) {
                    Lanes s0 = load(p.data() + r * width + j);
                    Lanes e = s0 == -INFINITY ? Lanes{} : exponential<Whole>(s0 - top);
                    total[r] += e;
                    store(p.data() + r * width + j, e);
                }
                float sum = 0;
                for (int l = 0; l < W; l++) sum += total[r][l];
                total[r] = Lanes{} + 1.0f / sum;
                log_sum[((row * s + i) * G + g) * R + r] = top + std::log(sum);
            }
            Lanes o[R][C];
            gather(p.data(), width, v_rows.data(), from, i + 1, scratch.data(), o);
            float context[R * K];
            for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) store(context + r * K + c * W, o[r][c] * total[r]);
            narrow_rows(context, R, out + (row * s + i) * Q_WIDTH + g * R * K);
        }
    }
}

static void backward(const Number* qkv, const float* cos, const float* sin, const int64_t* first, const Number* out,
                     const float* log_sum, const Number* d_out, Number* d_qkv, int64_t n, int64_t s) {
    int64_t width = (s + TILE - 1) / TILE * TILE;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < n * G; task++) {
        int64_t row = task / G, g = task % G;
        const Number* base = qkv + row * s * STRIDE;
        std::vector<float> k((s + 1) * K), v((s + 1) * K), p(R * width), ds(R * width);
        Cells kt(K * width / PER), vt(K * width / PER), k_rows((s + 1) * K), scratch(R * width);
        Cells q_row(R * K), q_down(R * K), go_row(R * K), go_down(R * K);
        std::vector<float> dk(s * K), dv(s * K), dk_part(s * K), dv_part(s * K);
        rows_of(base + Q_WIDTH + g * K, s, STRIDE, k.data());
        rows_of(base + Q_WIDTH + (G + g) * K, s, STRIDE, v.data());
        for (int64_t i = 0; i < s; i++) rope(&k[i * K], cos + (row * s + i) * K, sin + (row * s + i) * K, 1, 1);
        turned(k.data(), s, width, kt.data());
        turned(v.data(), s, width, vt.data());
        down(k.data(), s + s % PER, k_rows.data());
        for (int64_t i = 0; i < s; i++) {
            float q[R * K], o[R * K], go[R * K], delta[R];
            int64_t at = (row * s + i) * Q_WIDTH + g * R * K;
            rows_of(base + i * STRIDE + g * R * K, R, K, q);
            rows_of(out + at, R, K, o);
            rows_of(d_out + at, R, K, go);
            for (int r = 0; r < R; r++) rope(q + r * K, cos + (row * s + i) * K, sin + (row * s + i) * K, 1, SCALE);
            along(q, R, q_row.data()), down(q, R, q_down.data());
            along(go, R, go_row.data()), down(go, R, go_down.data());
            for (int r = 0; r < R; r++) {
                Lanes x{};
                for (int c = 0; c < C; c++) x += load(o + r * K + c * W) * load(go + r * K + c * W);
                delta[r] = 0;
                for (int l = 0; l < W; l++) delta[r] += x[l];
            }
            const float* lse = log_sum + ((row * s + i) * G + g) * R;
            int64_t from = first[row * s + i], end = i / TILE * TILE + TILE;
            for (int64_t j = from / TILE * TILE; j < end; j += TILE) {
                Lanes t[R][2];
                tile(q_row.data(), kt.data() + j * (K / PER), t);
                for (int h = 0; h < 2; h++) {
                    Whole open = seen(j + h * W, from, i);
                    for (int r = 0; r < R; r++)
                        store(p.data() + r * width + j + h * W, open ? exponential<Whole>(t[r][h] - lse[r]) : Lanes{});
                }
                tile(go_row.data(), vt.data() + j * (K / PER), t);
                for (int h = 0; h < 2; h++)
                    for (int r = 0; r < R; r++) {
                        int64_t to = r * width + j + h * W;
                        store(ds.data() + to, load(p.data() + to) * (t[r][h] - delta[r]));
                    }
            }
            Lanes dq[R][C];
            gather(ds.data(), width, k_rows.data(), from, i + 1, scratch.data(), dq);
            float back[R * K];
            for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) store(back + r * K + c * W, dq[r][c]);
            for (int r = 0; r < R; r++) rope(back + r * K, cos + (row * s + i) * K, sin + (row * s + i) * K, -1, SCALE);
            narrow_rows(back, R, d_qkv + (row * s + i) * STRIDE + g * R * K);
            scatter(p.data(), width, go_down.data(), from, i + 1, scratch.data(), dv_part.data());
            scatter(ds.data(), width, q_down.data(), from, i + 1, scratch.data(), dk_part.data());
            if ((i + 1) % SPAN == 0 || i + 1 == s)
                for (int64_t x = 0; x < (i + 1) * K; x += W) {
                    store(&dk[x], load(&dk[x]) + load(&dk_part[x])), store(&dk_part[x], Lanes{});
                    store(&dv[x], load(&dv[x]) + load(&dv_part[x])), store(&dv_part[x], Lanes{});
                }
        }
        for (int64_t i = 0; i < s; i++) {
            Number* to = d_qkv + (row * s + i) * STRIDE + Q_WIDTH + g * K;
            rope(&dk[i * K], cos + (row * s + i) * K, sin + (row * s + i) * K, -1, 1);
            narrow_rows(&dk[i * K], 1, to);
            narrow_rows(&dv[i * K], 1, to + G * K);
        }
    }
}

extern "C" void kernel(const Number* qkv, const float* cos, const float* sin, const int64_t* first, Number* out,
                       float* log_sum, const Number* d_out, Number* d_qkv, int64_t n, int64_t s, int64_t back) {
    if (back) backward(qkv, cos, sin, first, out, log_sum, d_out, d_qkv, n, s);
    else forward(qkv, cos, sin, first, out, log_sum, n, s);
}
