// Products of large matrices in float32, by Goto & van de Geijn (Anatomy of high-performance matrix multiplication, 2008,
// figure 10) for processors with 16 registers of 8 numbers: a part of either factor is laid out as it will be read, and
// TALL x WIDE numbers are summed in registers. The plain twin is torch.mm.

#include "layout.h"

#include <vector>

extern "C" int omp_get_max_threads();

namespace {

constexpr int TALL = 6;               // rows multiplied at once: their sums, of WIDE columns, leave registers for the rest
constexpr int64_t DEEP = 768;         // numbers summed in registers at most, before the rest are added in memory:
constexpr int64_t GROUP = 12 * TALL;  // so many rows of them stay in a core's second cache,
constexpr int64_t SOME = 8 * WIDE;    // columns of the right factor are laid out by a thread together,
constexpr int64_t LAID_OUT = 1 << 20; // and so many numbers of it stay in the last cache

// a (n, TALL) and b (n, WIDE): the sum of their outer products -> out (TALL, WIDE), `row` apart, added to what is there
// if there is `more`
__attribute__((noinline)) void multiply(const float* a, const float* b, int64_t n, bool more, float* out, int64_t row) {
  Eight sum[TALL][2] = {};
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++) __builtin_prefetch(out + r * row, 1, 3);
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; k++) {
    Eight left = load<Eight>(b + k * WIDE), right = load<Eight>(b + k * WIDE + EIGHT);
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
      store(to, more ? load<Eight>(to) + sum[r][half] : sum[r][half]);
    }
}

// the same for rows and columns that are fewer
void multiply_some(const float* a, const float* b, int64_t n, bool more, float* out, int64_t row, int64_t rows, int64_t columns) {
  float sums[TALL * WIDE];
  multiply(a, b, n, false, sums, WIDE);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i++) out[r * row + i] = more ? out[r * row + i] + sums[r * WIDE + i] : sums[r * WIDE + i];
}

// What a thread lays rows, or all threads of a call the right factor, out in: kept for the next call
template <char FACTOR> float* memory(int64_t size) {
  static thread_local std::vector<float> kept;
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
  if (k == 0 && !more)
    for (int64_t r = 0; r < m; r++) std::fill_n(out + r * row, n, 0.0f);
  if (m == 0 || k == 0 || n == 0) return;
  const Matrix of_a = {a, a_row, a_column}, of_b = {b, b_column, b_row}; // b by its columns
  const int64_t threads = omp_get_max_threads(), deep = part(k, parts(k, DEEP), EIGHT);
  const int64_t width = LAID_OUT / deep / WIDE * WIDE, tall = part(m, parts(parts(m, GROUP), threads) * threads, TALL);
  float* const panels = memory<'b'>(std::min(width, parts(n, WIDE) * WIDE) * deep);
#pragma omp parallel
  {
    float* const rows = memory<'a'>(tall * deep + EIGHT);
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
