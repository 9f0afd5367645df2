// Products of many rows with a weight, in float32. The weight is laid out in panels, a group of rows and a panel of so many
// inputs are multiplied in registers block by block, as by Goto & van de Geijn (Anatomy of high-performance matrix
// multiplication, 2008, section 4); rows are read where they lie. The plain twin is F.linear.

#include "vectors.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

extern "C" int omp_get_max_threads();

namespace {

constexpr int ROWS = LANES == 8 ? 6 : 16 / PARTS; // multiplied at once: their sums leave registers for the rest
constexpr int64_t INPUTS = 1024;      // of a panel that are multiplied one after the other: they stay in the second cache,
constexpr int64_t GROUP = 8 * ROWS;   // beside so many rows
constexpr int64_t LAID_OUT = 1 << 21; // numbers of a weight laid out at once, for the last cache
constexpr int64_t TURN = 64;          // inputs laid out at once, for the first

// Numbers (rows, columns), `row` and `column` from one to the next
struct Matrix {
  const float* at;
  int64_t row, column;
};

// `outputs` of a weight, WIDE at most, and their inputs -> a panel (inputs, WIDE), filled up with 0
void to_panel(Matrix weight, int64_t outputs, int64_t inputs, float* panel) {
  if (weight.row == 1 && outputs == WIDE) {
    for (int64_t k = 0; k < inputs; k++) std::copy_n(weight.at + k * weight.column, WIDE, panel + k * WIDE);
    return;
  }
  for (int64_t first = 0; first < inputs; first += TURN)
    for (int64_t i = 0; i < WIDE; i++) {
      const float* const from = weight.at + i * weight.row;
      for (int64_t k = first; k < std::min(inputs, first + TURN); k++)
        panel[k * WIDE + i] = i < outputs ? from[k * weight.column] : 0.0f;
    }
}

// R rows of x, so many inputs, with a panel, plus what is `added` -> out; all of them `row` numbers apart
template <int R>
void multiply(const float* x, int64_t row, const float* panel, int64_t inputs, const float* added, int64_t added_row, float* out,
              int64_t out_row) {
  Lanes sum[R][PARTS] = {};
  for (int64_t k = 0; k < inputs; k++) {
    Lanes weight[PARTS];
#pragma GCC unroll 4
    for (int u = 0; u < PARTS; u++) hold(weight[u] = load<Lanes>(panel + k * WIDE + u * LANES));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int u = 0; u < PARTS; u++) sum[r][u] += x[r * row + k] * weight[u];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int u = 0; u < PARTS; u++)
      store(out + r * out_row + u * LANES, added ? load<Lanes>(added + r * added_row + u * LANES) + sum[r][u] : sum[r][u]);
}

typedef void Multiply(const float*, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t);
template <std::size_t... R> constexpr std::array<Multiply*, sizeof...(R)> for_rows(std::index_sequence<R...>) {
  return {multiply<R + 1>...};
}
constexpr auto MULTIPLY = for_rows(std::make_index_sequence<ROWS>());

// rows of x with the n first outputs of a panel, n < WIDE
void multiply_some(const float* x, int64_t row, int64_t rows, const float* panel, int64_t inputs, int64_t n, const float* added,
                   int64_t added_row, float* out, int64_t out_row) {
  alignas(64) float sums[ROWS * WIDE];
  MULTIPLY[rows - 1](x, row, panel, inputs, nullptr, 0, sums, WIDE);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < n; i++)
      out[r * out_row + i] = added ? added[r * added_row + i] + sums[r * WIDE + i] : sums[r * WIDE + i];
}

// a group of rows x (m, k) with panels (n, k), and what is `added` -> out (m, n)
void multiply_group(const float* x, int64_t row, int64_t m, const float* panels, int64_t k, int64_t n, const float* added,
                    int64_t added_row, float* out, int64_t out_row) {
  for (int64_t c = 0; c < k; c += INPUTS) {
    const int64_t inputs = std::min(INPUTS, k - c);
    for (int64_t o = 0; o < n; o += WIDE)
      for (int64_t r = 0; r < m; r += ROWS) {
        const float *const from = x + r * row + c, *const panel = panels + o * k + c * WIDE;
        const float* const more = added ? added + r * added_row + o : nullptr;
        const int64_t rows = std::min<int64_t>(ROWS, m - r);
        float* const to = out + r * out_row + o;
        if (n - o >= WIDE) MULTIPLY[rows - 1](from, row, panel, inputs, more, added_row, to, out_row);
        else multiply_some(from, row, rows, panel, inputs, n - o, more, added_row, to, out_row);
      }
    added = out, added_row = out_row;
  }
}

} // namespace

// x (m, k) weight^T, weight (n, k), plus what is `added` (m, n), if any -> out (m, n). A row's numbers follow each other;
// rows are `row` apart. Each number is summed in one order, whatever the threads.
extern "C" void product(const float* x, int64_t row, const float* weight, int64_t weight_row, int64_t weight_column, int64_t m,
                        int64_t k, int64_t n, const float* added, int64_t added_row, float* out, int64_t out_row) {
  const int64_t panels = (n + WIDE - 1) / WIDE, width = std::clamp<int64_t>(LAID_OUT / (k * WIDE), 1, panels) * WIDE;
  const int64_t threads = omp_get_max_threads(), turns = ((m + GROUP - 1) / GROUP + threads - 1) / threads * threads;
  const int64_t size = ((m + turns - 1) / turns + ROWS - 1) / ROWS * ROWS; // of a group: as many groups for each thread
  const std::unique_ptr<float[]> laid(new float[width * k]);
#pragma omp parallel
  for (int64_t first = 0; first < n; first += width) {
    const int64_t outputs = std::min(width, n - first);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < outputs; o += WIDE)
      to_panel({weight + (first + o) * weight_row, weight_row, weight_column}, std::min<int64_t>(WIDE, outputs - o), k,
               laid.get() + o * k);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < m; r += size)
      multiply_group(x + r * row, row, std::min(size, m - r), laid.get(), k, outputs, added ? added + r * added_row + first : nullptr,
                     added_row, out + r * out_row + first, out_row);
  }
}
