// Products of large matrices in float32, by Goto & van de Geijn (Anatomy of high-performance matrix multiplication, 2008,
// figure 10) for processors with 16 registers of 8 numbers: a part of either factor is laid out as it will be read, and
// TALL x WIDE numbers are summed in registers. The plain twin is torch.mm.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" int omp_get_max_threads();

namespace {

constexpr int EIGHT = 8, TALL = 6, WIDE = 2 * EIGHT;
constexpr int LINE = 16, AHEAD = 8; // numbers of a cache line; columns fetched before their turn
constexpr int64_t DEEP = 768;       // numbers summed in registers at most, before the rest are added in memory:
constexpr int64_t GROUP = 12 * TALL; // so many rows of them stay in a core's second cache,
constexpr int64_t SOME = 8 * WIDE;   // columns of it laid out by a thread together
constexpr int64_t LAID_OUT = 1 << 20; // and so many numbers of the right factor in the last

typedef float Eight __attribute__((vector_size(EIGHT * sizeof(float))));
typedef int32_t Places __attribute__((vector_size(EIGHT * sizeof(int32_t))));

inline Eight load(const float* from) {
  Eight value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Eight value) { std::memcpy(to, &value, sizeof value); }

// from here on in a register: GCC would read what is used several times from memory as often
inline void hold(Eight& x) {
#if defined(__AVX__)
  asm("" : "+x"(x));
#endif
}

template <int... I> inline Eight picked(Eight a, Eight b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Places{I...});
#endif
}

// R rows of 8 numbers, `row` apart, R <= 8 -> 8 of R, `to_row` apart: 8 are written of each, those beyond R are for the
// next to overwrite
template <int R> inline void transpose(const float* from, int64_t row, float* to, int64_t to_row) {
  Eight a[EIGHT] = {}, b[EIGHT];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) a[i] = load(from + i * row);
#pragma GCC unroll 4
  for (int i = 0; i < EIGHT; i += 2) {
    b[i] = picked<0, 8, 1, 9, 4, 12, 5, 13>(a[i], a[i + 1]);
    b[i + 1] = picked<2, 10, 3, 11, 6, 14, 7, 15>(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < EIGHT; half += 4)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      a[half + 2 * i] = picked<0, 1, 8, 9, 4, 5, 12, 13>(b[half + i], b[half + i + 2]);
      a[half + 2 * i + 1] = picked<2, 3, 10, 11, 6, 7, 14, 15>(b[half + i], b[half + i + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) store(to + i * to_row, picked<0, 1, 2, 3, 8, 9, 10, 11>(a[i], a[i + 4]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) store(to + (i + 4) * to_row, picked<4, 5, 6, 7, 12, 13, 14, 15>(a[i], a[i + 4]));
}

// Numbers (rows, columns), `row` and `column` from one to the next
struct Matrix {
  const float* at;
  int64_t row, column;
  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
};

// `count` rows of so many columns -> panels of LONG rows (columns, LONG), the last one filled up with 0
template <int LONG> void lay_out(Matrix x, int64_t count, int64_t columns, float* laid) {
  const int64_t whole = count / LONG * LONG;
  int64_t done = 0;
  if (x.row == 1)
    for (; done < columns; done++) {
      const float* const column = x.at + done * x.column;
      for (int64_t i = 0; i < whole; i += LINE) __builtin_prefetch(column + AHEAD * x.column + i);
      for (int64_t i = 0; i < whole; i += LONG) std::memcpy(laid + i * columns + done * LONG, column + i, LONG * sizeof(float));
    }
  if (x.column == 1)
    for (int64_t i = 0; i < whole; i += LONG)
      for (done = 0; done + EIGHT <= columns; done += EIGHT)
#pragma GCC unroll 2
        for (int part = 0; part < LONG; part += EIGHT)
          transpose<std::min(LONG, EIGHT)>(x.at + (i + part) * x.row + done, x.row, laid + i * columns + done * LONG + part, LONG);
  for (int64_t i = 0; i < count; i += LONG)
    for (int64_t j = i < whole ? done : 0; j < columns; j++)
      for (int64_t r = i; r < i + LONG; r++)
        laid[i * columns + j * LONG + r - i] = r < count ? x.at[r * x.row + j * x.column] : 0.0f;
}

// a (n, TALL) and b (n, WIDE): the sum of their outer products -> out (TALL, WIDE), `row` apart, added to what is there
// if there is `more`
__attribute__((noinline)) void multiply(const float* a, const float* b, int64_t n, bool more, float* out, int64_t row) {
  Eight sum[TALL][2] = {};
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++) __builtin_prefetch(out + r * row, 1, 3);
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; k++) {
    Eight left = load(b + k * WIDE), right = load(b + k * WIDE + EIGHT);
    hold(left), hold(right);
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++) {
      sum[r][0] += a[k * TALL + r] * left;
      sum[r][1] += a[k * TALL + r] * right;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      float* const to = out + r * row + half * EIGHT;
      store(to, more ? load(to) + sum[r][half] : sum[r][half]);
    }
}

// the same for rows and columns that are fewer
void multiply_some(const float* a, const float* b, int64_t n, bool more, float* out, int64_t row, int64_t rows, int64_t columns) {
  float sums[TALL * WIDE];
  multiply(a, b, n, false, sums, WIDE);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i++) out[r * row + i] = (more ? out[r * row + i] : 0.0f) + sums[r * WIDE + i];
}

float* memory(std::vector<float>& kept, int64_t size) {
  if (int64_t(kept.size()) < size) kept.resize(size);
  return kept.data();
}

int64_t parts(int64_t size, int64_t largest) { return (size + largest - 1) / largest; }
int64_t part(int64_t size, int64_t count, int64_t multiple) { return parts(parts(size, count), multiple) * multiple; }

} // namespace

// a (m, k) b (k, n) -> out (m, n), its rows `row` apart, added to what is there if there is `more`. Each number is summed
// in one order, whatever rows and columns come with it, and whatever the threads.
extern "C" void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t b_column,
                        int64_t m, int64_t k, int64_t n, bool more, float* out, int64_t row) {
  static thread_local std::vector<float> right, left;
  const Matrix of_a = {a, a_row, a_column}, of_b = {b, b_column, b_row}; // b by its columns
  const int64_t threads = omp_get_max_threads(), deep = part(k, parts(k, DEEP), EIGHT);
  const int64_t width = LAID_OUT / deep / WIDE * WIDE, tall = part(m, parts(parts(m, GROUP), threads) * threads, TALL);
  float* const panels = memory(right, std::min(width, parts(n, WIDE) * WIDE) * deep);
#pragma omp parallel
  {
    float* const rows = memory(left, tall * deep + EIGHT);
    for (int64_t first = 0; first < n; first += width)
      for (int64_t c = 0; c < k; c += deep) {
        const int64_t columns = std::min(width, n - first), depth = std::min(deep, k - c);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < columns; o += SOME)
          lay_out<WIDE>(of_b.from(first + o, c), std::min(SOME, columns - o), depth, panels + o * depth);
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < m; r += tall) {
          const int64_t count = std::min(tall, m - r);
          lay_out<TALL>(of_a.from(r, c), count, depth, rows);
          for (int64_t o = 0; o < columns; o += WIDE)
            for (int64_t i = 0; i < count; i += TALL) {
              const float *const some = rows + i * depth, *const panel = panels + o * depth;
              float* const to = out + (r + i) * row + first + o;
              const int64_t high = std::min<int64_t>(TALL, count - i), wide = std::min<int64_t>(WIDE, columns - o);
              if (high == TALL && wide == WIDE) multiply(some, panel, depth, more || c, to, row);
              else multiply_some(some, panel, depth, more || c, to, row, high, wide);
            }
        }
      }
  }
}
