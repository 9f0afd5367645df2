// Tokens drawn from softmax(logits / temperature), perhaps of the largest logits alone, row by row in a core's caches. The
// least logit that stays is searched for bit by bit, which takes up to 32 looks at all of them but no sorting. float32.
// The plain twin is Sampling.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace {

const Lanes ONE = Lanes{} + 1.0f, NONE = Lanes{} - INFINITY;
constexpr int64_t BLOCK = 256; // numbers that are added up together

// What native_draw.py says of a call, in its order
struct Call {
  int64_t rows, vocab, row; // floats from one row of logits to the next
  const float* logits;
  double temperature;      // 0: the likeliest token, with its log-prob at 1
  int64_t count;           // how many of the largest logits are kept at most,
  double mass;             // and of those the fewest whose probabilities add up to more than this, if it is below 1,
  double mass_temperature; // at this temperature
  const double* uniform;   // (rows), from 0 to below 1
  int64_t* tokens;         // (rows)
  float* log_probs;        // (rows)
};

// A row's logits and what they weigh, filled up to whole blocks with what weighs nothing, and what each block weighs
struct Row {
  std::vector<float> logits, weights;
  std::vector<double> blocks;
  void read(const float* from, int64_t vocab) {
    logits.resize((vocab + BLOCK - 1) / BLOCK * BLOCK, -INFINITY);
    weights.resize(logits.size()), blocks.resize(logits.size() / BLOCK);
    std::copy_n(from, vocab, logits.begin());
  }
  int64_t size() const { return logits.size(); }
  Lanes logit(int64_t i) const { return load<Lanes>(&logits[i]); }
  Lanes weight(int64_t i) const { return load<Lanes>(&weights[i]); }
};

float largest(const Row& row) {
  Lanes most = NONE;
  for (int64_t i = 0; i < row.size(); i += LANES) most = larger(row.logit(i), most);
  float found = -INFINITY;
  for (int i = 0; i < LANES; i++) found = std::max(found, most[i]);
  return found;
}

// f(i), registers of numbers, added up: in a block in float32, by several sums, for none to wait for the one before
template <typename F> double sum_of(const Row& row, F f) {
  double sum = 0;
  for (int64_t block = 0; block < row.size(); block += BLOCK) {
    Lanes sums[4] = {};
    for (int64_t i = block; i < block + BLOCK; i += 4 * LANES)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[j] += f(i + j * LANES);
    const Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int i = 0; i < LANES; i++) sum += all[i];
  }
  return sum;
}

typedef float Half __attribute__((vector_size(LANES / 2 * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES / 2 * sizeof(double))));

// weights e^((logit - most) / temperature), 0 where that is below e^-87, and those of blocks; the sum of all. What is no
// number, or without bounds, makes it none.
double weigh(Row& row, float most, double temperature) {
  const float scale = std::min(1 / temperature, double(std::numeric_limits<float>::max()));
  double sum = 0;
  for (int64_t block = 0; block < row.size(); block += BLOCK) {
    for (int64_t i = block; i < block + BLOCK; i += LANES) {
      const Lanes x = (row.logit(i) - most) * scale;
      store(&row.weights[i], x < -87.0f ? Lanes{} : exponential(x));
    }
    Doubles sums[4] = {};
    for (int64_t i = block; i < block + BLOCK; i += 2 * LANES)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[j] += __builtin_convertvector(load<Half>(&row.weights[i + j * LANES / 2]), Doubles);
    const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double& own = row.blocks[block / BLOCK] = 0;
    for (int i = 0; i < LANES / 2; i++) own += all[i];
    sum += own;
  }
  return sum;
}

// The number that comes after so many others in the order of floats, of which the first and last are none
float of_rank(uint32_t rank) {
  const uint32_t bits = rank >> 31 ? rank ^ 0x80000000 : ~rank;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The largest number for which `of` it, the less the larger it is, is more than `amount`, or another one for which it is
// `enough`. If there is none it is no number, and nothing is below it.
template <typename F> float bound(F of, double amount, double enough) {
  uint32_t rank = 0;
  for (uint32_t bit = 0x80000000; bit; bit >>= 1) {
    const double found = of(of_rank(rank | bit));
    if (found > amount) rank |= bit;
    if (found == enough) break;
  }
  return of_rank(rank);
}

// Logits above `least` stay, and the first so many that are equal to it
void keep(Row& row, float least, double equal) {
  const double all = sum_of(row, [&](int64_t i) {
    const Lanes x = row.logit(i);
    store(&row.logits[i], x < least ? NONE : x);
    return x == least ? ONE : Lanes{};
  });
  if (all > equal)
    for (float& x : row.logits)
      if (x == least && equal-- < 1) x = -INFINITY;
}

void keep_largest(Row& row, int64_t count) {
  const auto counted = [&](float least) { return sum_of(row, [&](int64_t i) { return row.logit(i) >= least ? ONE : Lanes{}; }); };
  const float least = bound(counted, count - 0.5, count);
  const double above = sum_of(row, [&](int64_t i) { return row.logit(i) > least ? ONE : Lanes{}; });
  keep(row, least, count - above);
}

// Holtzman et al., 1904.09751, eq. 2
void keep_nucleus(Row& row, float most, double mass, double temperature) {
  const double amount = mass * weigh(row, most, temperature);
  const auto weighed = [&](float least) {
    return sum_of(row, [&](int64_t i) { return row.logit(i) >= least ? row.weight(i) : Lanes{}; });
  };
  const float least = bound(weighed, amount, NAN);
  const double above = sum_of(row, [&](int64_t i) { return row.logit(i) > least ? row.weight(i) : Lanes{}; });
  const double each = std::exp((double(least) - most) / temperature);
  keep(row, least, std::floor((amount - above) / each) + 1);
}

// where the running sum of weights first passes `amount`, or the last one that weighs anything: rounding may have none pass
int64_t drawn(const Row& row, double amount) {
  int64_t block = 0;
  double before = 0, sum = 0;
  for (std::size_t i = 0; i < row.blocks.size() && !(sum > amount); i++) {
    if (row.blocks[i] == 0) continue;
    block = i, before = sum;
    sum += row.blocks[i];
  }
  int64_t found = block * BLOCK;
  sum = before;
  for (int64_t i = found; i < (block + 1) * BLOCK && !(sum > amount); i++) {
    if (row.weights[i] == 0) continue;
    found = i;
    sum += row.weights[i];
  }
  return found;
}

// all of a call. Either one thread or all of them: between teams of different sizes they end and are made anew.
void draw(const Call& call) {
#pragma omp parallel if (call.rows > 1)
  {
    Row row;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < call.rows; r++) {
      row.read(call.logits + r * call.row, call.vocab);
      const float most = largest(row);
      if (call.count < call.vocab) keep_largest(row, call.count);
      if (call.mass < 1) keep_nucleus(row, most, call.mass, call.mass_temperature);
      const bool likeliest = call.temperature == 0;
      const double temperature = likeliest ? 1.0 : call.temperature, total = weigh(row, most, temperature);
      const int64_t token = likeliest ? std::find(row.logits.begin(), row.logits.end(), most) - row.logits.begin()
                                      : drawn(row, call.uniform[r] * total);
      call.tokens[r] = std::min(token, call.vocab - 1);
      call.log_probs[r] = (double(row.logits[call.tokens[r]]) - most) / temperature - std::log(total);
    }
  }
}

} // namespace
