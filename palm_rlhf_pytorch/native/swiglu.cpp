// SwiGLU (Shazeer, 2002.05202, eq. 6) and its gradients, each in one pass over memory. float32.
// The plain twins are in swiglu.py.

#include "vectors.h"

namespace {

// sigmoid(z) and what silu(z) = z sigmoid(z) grows by: sigmoid(z) (1 + z (1 - sigmoid(z)))
template <typename V> inline V sigmoid(V z) { return 1.0f / (1.0f + exponential(-z)); }
inline float sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }

template <typename V> inline V at(const float* from) {
  if constexpr (sizeof(V) == sizeof(float)) return *from;
  else return load<V>(from);
}
template <typename V> inline void put(float* to, V value) {
  if constexpr (sizeof(V) == sizeof(float)) *to = value;
  else store(to, value);
}

template <typename V> inline void gradients(float* to_inner, const float* value, const float* gate, float* inner, float* to_value, int64_t i) {
  const V g = at<V>(to_inner + i), v = at<V>(value + i), z = at<V>(gate + i), s = sigmoid(z), silu = z * s;
  if (inner) put(inner + i, silu * v);
  put(to_value + i, silu * g);
  put(to_inner + i, g * v * s * (1.0f + z * (1.0f - s)));
}

} // namespace

// value and gate (rows, n), `stride` floats from row to row -> out (rows, n)
extern "C" void forward(const float* value, const float* gate, int64_t rows, int64_t n, int64_t stride, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) swiglu(value + r * stride, gate + r * stride, n, out + r * n);
}

// to_inner, value and gate (n) -> inner again, where it is wanted, its gradient by value, and in place of to_inner that by gate
extern "C" void backward(float* to_inner, const float* value, const float* gate, int64_t n, float* inner, float* to_value) {
  const int64_t whole = n / LANES * LANES;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < whole; i += LANES) gradients<Lanes>(to_inner, value, gate, inner, to_value, i);
  for (int64_t i = whole; i < n; i++) gradients<float>(to_inner, value, gate, inner, to_value, i);
}
