// Shared by the kernels of all couplings: vectors of sixteen float32 numbers, or eight without AVX-512, complex numbers made of
// two such vectors, and the exponential.

#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr double TURN = 6.283185307179586;
constexpr float LEAST_GROWTH = -80;  // exp of anything smaller is negligible in float32, but would take ten times as long
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
struct Z { V re, im; };

#define INLINE inline __attribute__((always_inline))

static INLINE Z operator+(const Z &a, const Z &b) { return {a.re + b.re, a.im + b.im}; }
static INLINE Z operator-(const Z &a, const Z &b) { return {a.re - b.re, a.im - b.im}; }
static INLINE Z operator*(const Z &a, const Z &b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
static INLINE Z operator*(const Z &a, const V &b) { return {a.re * b, a.im * b}; }
static INLINE Z operator*(const Z &a, float b) { return {a.re * b, a.im * b}; }

static INLINE V load(const float *from, int lanes) {
  V v = {};
  if (lanes == LANES) std::memcpy(&v, from, sizeof v);
  else std::memcpy(&v, from, 4 * lanes);
  return v;
}

static INLINE void store(float *to, const V &v, int lanes) {
  if (lanes == LANES) std::memcpy(to, &v, sizeof v);
  else std::memcpy(to, &v, 4 * lanes);
}

// exp to one unit in the last place or two; not below exp(LEAST_GROWTH).
static INLINE V exponential(V x) {
  x = x < LEAST_GROWTH ? V{} + LEAST_GROWTH : x > 89.0f ? V{} + 89.0f : x; // above 88.7 it is infinite, and NaN stays
  V doublings = x * 1.44269504f + 12582912.0f;                             // rounded by a number whose last bit is one
  V scale = (V)(((I)doublings << 23) + (127 << 23));
  doublings -= 12582912.0f;
  x -= doublings * 0.693145752f;
  x -= doublings * 1.42860677e-6f;
  V power = 1 / 720.0f + x * (1 / 5040.0f);
  power = 1 / 24.0f + x * (1 / 120.0f + x * power);
  return scale * (1 + x * (1 + x * (0.5f + x * (1 / 6.0f + x * power))));
}
