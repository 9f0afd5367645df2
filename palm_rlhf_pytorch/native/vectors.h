// Numbers computed many at once, and what is made of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

// numbers in a register
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int WIDE = 16, PARTS = WIDE / LANES; // outputs of a panel, features worked on at once; registers that hold them
constexpr int LINE = 16; // floats of a cache line

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

// as many whole numbers
template <typename V> struct Ints { typedef int32_t type __attribute__((vector_size(sizeof(V)))); };

template <typename V> inline V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof value); // from anywhere, aligned or not
  return value;
}
template <typename V> inline void store(float* to, V value) { std::memcpy(to, &value, sizeof value); }

// from here on in a register, if it fits into one: GCC would read what is used several times from memory as often
template <typename V> inline void hold(V& x) {
  if constexpr (sizeof(V) <= sizeof(Lanes)) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
  }
}

template <typename V> inline V larger(V a, V b) { return a > b ? a : b; } // b, if either is no number

// e^x to 2e-7 of it, of x from -87 to 88 (beyond, of these): 2^k e^r with |r| <= ln(2) / 2; of e^r = 1 + r + r^2 p(r) the
// polynomial p, of degree 4, is fitted on Chebyshev's points and errs by 4e-9
template <typename V> inline V exponential(V x) {
  typedef typename Ints<V>::type I;
  x = x < -87.0f ? V{} - 87.0f : x;
  x = x > 88.0f ? V{} + 88.0f : x;
  const V shifted = x * 1.44269504088896341f + 12582912.0f; // 1.5 * 2^23: what is below 1 is rounded away, k is left
  const V whole = shifted - 12582912.0f;
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V sum = V{} + 1.37512791e-3f;
  for (const float c : {8.36895178e-3f, 4.16695387e-2f, 1.66665182e-1f, 4.99999886e-1f, 1.0f, 1.0f}) sum = sum * r + c;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  V power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// 2^x of several registers to 2e-7 of it, of x from -126 to 127 (below, of -126): as `exponential`, with a minimax
// polynomial that errs by 2e-9. All of them at once: one alone waits for each result before the next
template <typename V, int N> inline void powers_of_two(V (&x)[N]) {
  typedef typename Ints<V>::type I;
  V shifted[N], sum[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) {
    x[i] = larger(V{} - 126.0f, x[i]);
    shifted[i] = x[i] + 12583039.0f; // 1.5 * 2^23 + 127: the exponent's bits of 2^k are left at the end
    x[i] -= shifted[i] - 12583039.0f;
    sum[i] = x[i] * 1.53533620e-4f + 1.33988739e-3f;
  }
#pragma GCC unroll 8
  for (const float c : {9.61843692e-3f, 5.55033237e-2f, 2.40226477e-1f, 6.93147182e-1f, 1.0f})
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) sum[i] = sum[i] * x[i] + c;
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) {
    I bits;
    V power;
    std::memcpy(&bits, &shifted[i], sizeof bits);
    bits <<= 23;
    std::memcpy(&power, &bits, sizeof power);
    x[i] = sum[i] * power; // what is no number stays none
  }
}

// silu(gate) * value, n features
inline void swiglu(const float* value, const float* gate, int64_t n, float* out) {
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES) {
    const Lanes z = load<Lanes>(gate + c);
    store(out + c, load<Lanes>(value + c) * (z / (1.0f + exponential(-z))));
  }
  for (; c < n; c++) out[c] = value[c] * (gate[c] / (1.0f + std::exp(-gate[c])));
}

} // namespace
