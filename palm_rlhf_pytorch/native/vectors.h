// Numbers computed many at once, and what is made of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int WIDE = 16; // features computed at once
constexpr int HEADS = 8; // heads computed at once, all on the same keys

typedef float Features __attribute__((vector_size(WIDE * sizeof(float))));
typedef float PerHead __attribute__((vector_size(HEADS * sizeof(float))));

// as many whole numbers
template <typename V> struct Ints { typedef int32_t type __attribute__((vector_size(sizeof(V)))); };

template <typename V> inline V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof value); // from anywhere, aligned or not
  return value;
}
template <typename V> inline void store(float* to, V value) { std::memcpy(to, &value, sizeof value); }

// e^x to 1e-7 of it, of x from -87 to 88 (beyond, of these): 2^k e^r with |r| <= ln(2) / 2, and a Taylor polynomial of degree 7
template <typename V> inline V exponential(V x) {
  typedef typename Ints<V>::type I;
  x = x < -87.0f ? V{} - 87.0f : x;
  x = x > 88.0f ? V{} + 88.0f : x;
  const V scaled = x * 1.44269504088896341f;
  const I k = __builtin_convertvector(scaled + (scaled < 0.0f ? V{} - 0.5f : V{} + 0.5f), I);
  const V whole = __builtin_convertvector(k, V);
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V sum = V{} + 1.9841270e-4f;
  for (const float c : {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f})
    sum = sum * r + c;
  const I bits = (k + 127) << 23;
  V power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// silu(gate) * value, n features
inline void swiglu(const float* value, const float* gate, int64_t n, float* out) {
  int64_t c = 0;
  for (; c + WIDE <= n; c += WIDE) {
    const Features z = load<Features>(gate + c);
    store(out + c, load<Features>(value + c) * (z / (1.0f + exponential(-z))));
  }
  for (; c < n; c++) out[c] = value[c] * (gate[c] / (1.0f + std::exp(-gate[c])));
}

} // namespace
