// Queries and keys turned, and their gradients turned back, each in one pass over memory. float32.
// The plain twin is HeadsRotation.

#include "turn.h"

namespace {

// Heads of d features at places (b, n), and what turns them: floats from one to the next of each
struct Call {
  int64_t b, n, heads, d;
  int64_t x_b, x_n, x_head;
  int64_t turn_b, turn_n, turn_head;
  const float *x, *cos, *sin;
  float* out; // (b, n, heads, d)
};

template <typename Turn> void everywhere(const Call& call, Turn turned) {
#pragma omp parallel for schedule(static)
  for (int64_t place = 0; place < call.b * call.n; place++) {
    const int64_t b = place / call.n, n = place % call.n;
    for (int64_t h = 0; h < call.heads; h++) {
      const int64_t by = b * call.turn_b + n * call.turn_n + h * call.turn_head;
      turned(call.x + b * call.x_b + n * call.x_n + h * call.x_head, call.cos + by, call.sin + by, call.d,
             call.out + (place * call.heads + h) * call.d);
    }
  }
}

} // namespace

extern "C" void forward(const Call* call) { everywhere(*call, turn); }
extern "C" void backward(const Call* call) { everywhere(*call, turn_back); }
extern "C" int64_t size_of_call() { return sizeof(Call); }
