// Products of two matrices on a CPU, sums in fp32: C_MN = A_MK · B_KN, or C + A · B. Operands lie either way; bf16 is
// widened as it is packed, so that processors without bf16 instructions multiply it as fast as fp32.
//
// As in GotoBLAS (Goto and van de Geijn, ACM TOMS 34(3), 2008): DEPTH rows of B lie in strips of NR columns, packed by
// all threads together; each thread takes its share of C's rows, a block of them at a time, which stays in L2 while the
// strips go through L1, and MR x NR sums stay in registers. What a sum is made of, and in which order, depends on K alone:
// another number of threads gives the same bits.
//
// The engine's file defines Number before this text.
#pragma GCC optimize("fp-contract=fast")
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
constexpr int W = 16, MR = 12;  // numbers a vector; rows of C, whose sums take 24 of 32 registers, or 12 of 16
constexpr int64_t DEPTH = 192;  // a strip takes 24 KiB of L1, or 16
#else
constexpr int W = 8, MR = 6;
constexpr int64_t DEPTH = 256;
#endif
constexpr int NR = 2 * W;
constexpr int64_t BLOCK = 72, WIDTH = 4096;  // rows of A in L2, columns of B in L3
static_assert(BLOCK % MR == 0, "a thread's room holds whole panels");
#include "numbers.h"
#include "vectors.h"
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Order __attribute__((vector_size(32)));
typedef uint16_t EightHalves __attribute__((vector_size(16), aligned(2), may_alias));

static inline Eight eight(const float* p) { return *reinterpret_cast<const Eight*>(p); }
static inline Eight eight(const uint16_t* p) {
    return (Eight)(__builtin_convertvector(*reinterpret_cast<const EightHalves*>(p), Order) << 16);
}

// Memory that a thread keeps from call to call, in whole cache lines.
struct Room {
    float* at = nullptr;
    int64_t size = 0;
    ~Room() { std::free(at); }
    float* of(int64_t count) {
        if (count > size) {
            std::free(at);
            size = (count + 15) / 16 * 16;
            at = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
        }
        return at;
    }
};

// Eight rows of eight numbers, transposed.
static inline void turn(const Number* x, int64_t stride, float* out, int64_t out_stride) {
    Eight r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = eight(x + i * stride);
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shuffle(r[i], r[i + 1], Order{0, 8, 1, 9, 4, 12, 5, 13});
        s[i + 1] = __builtin_shuffle(r[i], r[i + 1], Order{2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; h++) {
            r[i + 2 * h] = __builtin_shuffle(s[i + h], s[i + h + 2], Order{0, 1, 8, 9, 4, 5, 12, 13});
            r[i + 2 * h + 1] = __builtin_shuffle(s[i + h], s[i + h + 2], Order{2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < 4; i++) {
        Eight low = __builtin_shuffle(r[i], r[i + 4], Order{0, 1, 2, 3, 8, 9, 10, 11});
        Eight high = __builtin_shuffle(r[i], r[i + 4], Order{4, 5, 6, 7, 12, 13, 14, 15});
        *reinterpret_cast<Eight*>(out + i * out_stride) = low;
        *reinterpret_cast<Eight*>(out + (i + 4) * out_stride) = high;
    }
}

// `count` vectors of `depth` numbers, `across` apart, whose numbers lie `along` apart -> [count / SIDE, depth, SIDE],
// zeros where the last has fewer than SIDE.
template <int SIDE>
static void pack(const Number* x, int64_t across, int64_t along, int64_t count, int64_t depth, float* out) {
    int64_t whole = count / SIDE * SIDE;
    if (across == 1) {
        for (int64_t k = 0; k < depth; k += 4)  // a few rows at a time, read to their ends: columns lie in other pages
            for (int64_t i = 0; i < whole; i += SIDE)
                for (int64_t l = k; l < std::min(depth, k + 4); l++)
                    for (int h = 0; h < SIDE; h++) out[i * depth + l * SIDE + h] = wide(x[l * along + i + h]);
    } else
        for (int64_t i = 0; i < whole; i += SIDE) {
            int64_t k = 0;
            if (SIDE % 8 == 0 && along == 1)
                for (; k + 8 <= depth; k += 8)
                    for (int h = 0; h < SIDE; h += 8)
                        turn(x + (i + h) * across + k, across, out + i * depth + k * SIDE + h, SIDE);
            for (; k < depth; k++)
                for (int h = 0; h < SIDE; h++) out[i * depth + k * SIDE + h] = wide(x[(i + h) * across + k * along]);
        }
    if (whole < count)
        for (int64_t k = 0; k < depth; k++)
            for (int h = 0; h < SIDE; h++)
                out[whole * depth + k * SIDE + h] = whole + h < count ? wide(x[(whole + h) * across + k * along]) : 0;
}

// Rows of C, at most MR, and columns, at most NR, from its element `at` on: sums += A · B, or sums = A · B; with `out`,
// there instead. A's rows are `row` apart, and `step` from one number to the next.
static inline __attribute__((always_inline)) void tile(
    int64_t depth, const float* __restrict a, int64_t row, int64_t step, const float* __restrict b, float* sums,
    Number* out, int64_t at, int64_t stride, int64_t rows, int64_t columns, bool add) {
    Lanes s[MR][2];
    sums += at;
    for (int64_t r = 0; r < rows; r++) {  // what is written arrives while the product is computed
        if (out) __builtin_prefetch(out + at + r * stride, 1), __builtin_prefetch(out + at + r * stride + columns - 1, 1);
        if (add || !out) __builtin_prefetch(sums + r * stride, 1), __builtin_prefetch(sums + r * stride + columns - 1, 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) s[r][0] = s[r][1] = Lanes{};
    for (int64_t k = 0; k < depth; k++, a += step, b += NR) {
        Lanes b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) s[r][0] += a[r * row] * b0, s[r][1] += a[r * row] * b1;
    }
    if (rows == MR && columns == NR) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++)
            for (int h = 0; h < 2; h++) {
                int64_t to = r * stride + h * W;
                if (add) s[r][h] += load(sums + to);
                if (out) narrow(s[r][h], out + at + to);
                else store(sums + to, s[r][h]);
            }
        return;
    }
    float part[MR * NR];
    Number narrowed[MR * NR];
    for (int r = 0; r < MR; r++)
        for (int h = 0; h < 2; h++) store(part + r * NR + h * W, s[r][h]);
    if (add)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < columns; j++) part[r * NR + j] += sums[r * stride + j];
    for (int i = 0; i < MR * NR; i += W) narrow(load(part + i), narrowed + i);
    for (int64_t r = 0; r < rows; r++)
        if (out) std::copy_n(narrowed + r * NR, columns, out + at + r * stride);
        else std::copy_n(part + r * NR, columns, sums + r * stride);
}

static int64_t share(int64_t count, int64_t of, int64_t parts) { return count * of / parts; }

// sums: fp32 [M, N], contiguous as out. With `gradient` they are the result, added to unless `replace`; else out is, and
// they are where it is summed up: of fp32, out itself.
extern "C" void kernel(const Number* a, const Number* b, Number* out, float* sums, int64_t m, int64_t n, int64_t k,
                       int64_t a_row, int64_t a_step, int64_t b_step, int64_t b_column, int64_t gradient,
                       int64_t replace) {
    static thread_local Room strips;
    if (k == 0) {
        if (!gradient) std::fill_n(out, m * n, Number{});
        else if (replace) std::fill_n(sums, m * n, 0.0f);
        return;
    }
    const int64_t chunks = (k + DEPTH - 1) / DEPTH, most = ((k + chunks - 1) / chunks + 7) / 8 * 8;  // at most DEPTH
    const int64_t panels = (m + MR - 1) / MR;
    float* packed = strips.of(most * ((std::min(n, WIDTH) + NR - 1) / NR * NR));
    const bool direct = std::is_same_v<Number, float> && a_step == 1;  // rows of fp32 are read as they lie
    constexpr bool narrowing = !std::is_same_v<Number, float>;
#pragma omp parallel
    {
        static thread_local Room rows;
        float* own = rows.of(BLOCK * most);
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        int64_t across = threads;  // threads that share C's rows; the others share its columns
        while (across > 1 && (threads % across || panels / across < 8)) across--;
        const int64_t down = threads / across;
        const int64_t from = share(panels, me % across, across) * MR;
        const int64_t to = std::min(share(panels, me % across + 1, across) * MR, m);
        for (int64_t left = 0; left < n; left += WIDTH) {
            const int64_t width = std::min(WIDTH, n - left), count = (width + NR - 1) / NR;
            const int64_t first = share(count, me / across, down) * NR;
            const int64_t last = std::min(share(count, me / across + 1, down) * NR, width);
            for (int64_t top = 0; top < k; top += most) {
                const int64_t depth = std::min(most, k - top);
                const bool add = top || (gradient && !replace);
                Number* narrowed = narrowing && !gradient && top + depth == k ? out : nullptr;
#pragma omp barrier  // all have read what is packed anew
                const int64_t mine = share(count, me, threads) * NR;
                const int64_t others = std::min(share(count, me + 1, threads) * NR, width);
                pack<NR>(b + top * b_step + (left + mine) * b_column, b_column, b_step, others - mine, depth,
                         packed + mine * depth);
#pragma omp barrier
                for (int64_t i = from; i < to; i += BLOCK) {
                    const int64_t high = std::min(BLOCK, to - i), ready = direct ? high / MR * MR : 0;
                    const Number* block = a + i * a_row + top * a_step;
                    if (ready < high)
                        pack<MR>(block + ready * a_row, a_row, a_step, high - ready, depth, own + ready * depth);
                    for (int64_t j = first; j < last; j += NR) {
                        const int64_t columns = std::min<int64_t>(NR, last - j), at = i * n + left + j;
                        const float* strip = packed + j * depth;
                        for (int64_t r = 0; r < ready; r += MR)
                            tile(depth, reinterpret_cast<const float*>(block) + r * a_row, a_row, 1, strip, sums,
                                 narrowed, at + r * n, n, MR, columns, add);
                        for (int64_t r = ready; r < high; r += MR)
                            tile(depth, own + r * depth, 1, MR, strip, sums, narrowed, at + r * n, n,
                                 std::min<int64_t>(MR, high - r), columns, add);
                    }
                }
            }
        }
    }
}
