// Matrices laid out in panels, as products read them.

#pragma once

#include "vectors.h"

#include <algorithm>

namespace {

constexpr int EIGHT = 8;
constexpr int BEFORE = 8; // columns fetched before their turn

typedef float Eight __attribute__((vector_size(EIGHT * sizeof(float))));

template <int... I> inline Eight picked(Eight a, Eight b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Ints<Eight>::type{I...});
#endif
}

// R rows of 8 numbers, `row` apart, R <= 8 -> 8 of R, the i-th at to(i): 8 are written of each, those beyond R are for
// the next to overwrite
template <int R, typename To> inline void transpose(const float* from, int64_t row, To to) {
  Eight a[EIGHT] = {}, b[EIGHT];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) a[i] = load<Eight>(from + i * row);
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
  for (int i = 0; i < 4; i++) store(to(i), picked<0, 1, 2, 3, 8, 9, 10, 11>(a[i], a[i + 4]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) store(to(i + 4), picked<4, 5, 6, 7, 12, 13, 14, 15>(a[i], a[i + 4]));
}

// Numbers (rows, columns), `row` and `column` from one to the next
struct Matrix {
  const float* at;
  int64_t row, column;
  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
};

// `count` rows of so many columns -> panels of LONG rows, filled up with 0: column j of the one from row i on to to(i, j)
template <int LONG, typename To> void lay_out(Matrix x, int64_t count, int64_t columns, To to) {
  const int64_t whole = count / LONG * LONG;
  int64_t done = 0;
  if (x.row == 1)
    for (; done < columns; done++) {
      const float* const column = x.at + done * x.column;
      for (int64_t i = 0; i < whole; i += LINE) __builtin_prefetch(column + BEFORE * x.column + i);
      for (int64_t i = 0; i < whole; i += LONG) std::memcpy(to(i, done), column + i, LONG * sizeof(float));
    }
  if (x.column == 1)
    for (int64_t i = 0; i < whole; i += LONG)
      for (done = 0; done + EIGHT <= columns; done += EIGHT)
#pragma GCC unroll 2
        for (int part = 0; part < LONG; part += EIGHT)
          transpose<std::min(LONG, EIGHT)>(x.at + (i + part) * x.row + done, x.row, [&](int64_t j) { return to(i, done + j) + part; });
  for (int64_t i = 0; i < count; i += LONG)
    for (int64_t j = i < whole ? done : 0; j < columns; j++)
      for (int64_t r = i; r < i + LONG; r++) to(i, j)[r - i] = r < count ? x.at[r * x.row + j * x.column] : 0.0f;
}

// ... each panel (columns, LONG), one after the other
template <int LONG> void lay_out(Matrix x, int64_t count, int64_t columns, float* laid) {
  lay_out<LONG>(x, count, columns, [&](int64_t i, int64_t j) { return laid + i * columns + j * LONG; });
}

} // namespace
