// Products of the pairwise coupling, a complex c x c matrix times the spectra of B images at each wave vector of a grid, and
// their gradients; further below, those of systems of channels. The matrices are computed on the fly, a few at a time in a
// core's own cache, and never stored in main memory. Built by pairs.py, and tested against the equations of pde_ssm.py.
//
// Sixteen output channels, or eight without AVX-512, are one vector. Spectra are real parts, then imaginary parts: "lanes" are
// (f, 2, B, c), in which output channels lie side by side, and "packed" (f, c, 2, B), of which a product takes one number at a
// time. f counts wave vectors row by row, as rfft2 has them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

constexpr int IMAGES = LANES / 2;      // as many sums as registers hold
constexpr float LARGEST_GROWTH = 1;     // of tau r: R_MAX of pde_ssm.py
constexpr float LARGEST_STEP = 30;     // of an exponent from one wave vector to the next, where recurrences are trusted
constexpr int RUN = 8;                 // wave vectors from one exact value to the next
constexpr int PIECE = 32;              // input channels at a time: RUN * PIECE vectors of a matrix fit into the first cache
constexpr int STRIDE = PIECE + 1;      // from one wave vector to the next: powers of two fall on one place in the cache
constexpr int SPAN = 4;                // vectors of output channels that share what they read, where all cores have work
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

static INLINE bool all(const I &mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) == 0xffff;
#else
  int every = -1;
  for (int lane = 0; lane < LANES; lane++) every &= mask[lane];
  return every;
#endif
}

// Loads LANES numbers that lie `stride` apart.
static INLINE V gather(const float *from, long stride, int lanes) {
  V v = {};
#ifdef __AVX512F__
  const I step = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (lanes == LANES) return (V)_mm512_i32gather_ps((__m512i)(step * (int)stride), from, 4);
#endif
  for (int lane = 0; lane < lanes; lane++) v[lane] = from[lane * stride];
  return v;
}

// cos and sin of an angle in units of 2^-32 turns. Multiples and sums of such angles are exact: whole turns overflow to zero.
static INLINE Z wave(const U &angle) {
  U quadrant = (angle + (1u << 29)) >> 30;
  V a = __builtin_convertvector((I)(angle - (quadrant << 30)), V) * (float)(TURN / 4294967296.0), aa = a * a;
  V sine = a + a * aa * (-1 / 6.0f + aa * (1 / 120.0f + aa * (-1 / 5040.0f + aa * (1 / 362880.0f))));
  V cosine = 1 + aa * (-0.5f + aa * (1 / 24.0f + aa * (-1 / 720.0f + aa * (1 / 40320.0f))));
  I odd = (quadrant & 1) != 0;
  U re = (U)(odd ? sine : cosine) ^ (((quadrant + 1) & 2) << 30), im = (U)(odd ? cosine : sine) ^ ((quadrant & 2) << 30);
  return {(V)re, (V)im};
}

// Wave vectors with one x and neighbouring y, at most RUN of them, as integers m of k = 2 pi m. At the Nyquist frequency of y,
// which is a run of its own, and of x, odd powers are zero: see `wave_numbers` of pde_ssm.py. Where x_odd is zero, values at -y
// are the complex conjugates of those at y, so only one of the two has a run: see `conjugates` of pairs.py.
struct Run {
  int x, x_odd, y, step, n;
  bool nyquist;
  int y_at(int t) const { return y + step * t; }
  int y_odd(int t) const { return nyquist ? 0 : y_at(t); }
};

struct Grid {
  int h, f;  // f columns
  std::vector<Run> runs;

  Grid(int h, int w) : h(h), f(w / 2 + 1) {
    for (int x = 0; x < f; x++) {
      int x_odd = 2 * x == w ? 0 : x, most = (h - 1) / 2;
      int least = x_odd ? -most : 0, count = most - least + 1, pieces = (count + RUN - 1) / RUN;
      for (int i = 0; i < pieces; i++) {                                   // runs go outward, where growth usually falls
        int first = count * i / pieces + least, last = count * (i + 1) / pieces + least - 1;
        if (first + last < 0) runs.push_back({x, x_odd, last, -1, last - first + 1, false});
        else runs.push_back({x, x_odd, first, 1, last - first + 1, false});
      }
      if (h % 2 == 0) runs.push_back({x, x_odd, h / 2, 1, 1, true});
    }
  }
  long size() const { return (long)h * f; }
  long at(const Run &run, int t) const { return (long)((run.y_at(t) + h) % h) * f + run.x; }
};

// The symbol G = exp(tau Lambda), Eq. (10), of one pair of channels per lane.
//
// Along a run, G(y + 1) = G(y) Q(y) and Q(y + 1) = Q(y) exp(-2 tau Kyy): two products and no exponential. Each run begins with
// exact values; where a recurrence could overflow, or grow from an underflow, every value is computed directly. With u = 2^-24
// and S the largest sum of the magnitudes of the exponent's terms in the run, the relative error is at most u (128 + 16 S):
// roundings of the first exponent, 4 S; of the first step, which counts up to RUN - 1 times, 12 S; of exp, cos and sin at both,
// 4 RUN; of the products, 3 RUN, and of those in Q, which add up, 3 RUN^2 / 2. Below exp(LEAST_GROWTH) values may be zero.
struct Green {
  static constexpr int ROWS = 6;  // tau times r, Kxx, Kxy and Kyy, then tau times bx and by in turns, from -1/2 to 1/2
  V r, xx, xy, yy, bend;
  U bx, by;
  Z turn;

  void set(const V *row) {
    const float square = TURN * TURN;
    r = row[0] + 0.0f * (row[4] + row[5]);                                    // NaN in bx or by, lost in integers, passes to r
    xx = row[1] * square, xy = row[2] * (2 * square), yy = row[3] * square;
    bend = exponential(-2 * yy);
    bx = (U)__builtin_convertvector(row[4] * 4294967296.0f, I), by = (U)__builtin_convertvector(row[5] * 4294967296.0f, I);
    turn = wave(by);
  }
  V growth(const Run &run, int t) const {
    float y = run.y_at(t), y_odd = run.y_odd(t);
    return r - (xx * (float)(run.x * run.x) + xy * (run.x_odd * y_odd) + yy * (y * y));
  }
  Z exact(const Run &run, int t, const V &exponent) const {
    return wave(bx * (uint32_t)run.x_odd + by * (uint32_t)run.y_odd(t)) * exponential(exponent);
  }
  V slope(const Run &run, int t) const {                                   // from value t to the next
    return -(xy * (float)(run.x_odd * run.step) + yy * (float)(2 * run.step * run.y_at(t) + 1));
  }
  INLINE void fill(const Run &run, Z *G) const {                    // G[t * STRIDE]
    V first = growth(run, 0);
    if (run.n == 1) {
      *G = exact(run, 0, first);
      return;
    }
    V rise = slope(run, 0), last = slope(run, run.n - 2);
    if (all((first >= LEAST_GROWTH) & (rise <= LARGEST_STEP) & (last >= -LARGEST_STEP))) {  // slopes fall along a run
      Z value = exact(run, 0, first), ratio = (run.step > 0 ? turn : Z{turn.re, -turn.im}) * exponential(rise);
      for (int t = 0;; t++) {
        G[t * STRIDE] = value;
        if (t == run.n - 1) return;
        value = value * ratio;
        ratio = ratio * bend;
      }
    }
    if (all((first < LEAST_GROWTH) & (first + rise * (float)(run.n - 1) < LEAST_GROWTH))) {  // growth never exceeds its tangent
      for (int t = 0; t < run.n; t++) G[t * STRIDE] = Z{};
      return;
    }
    for (int t = 0; t < run.n; t++) G[t * STRIDE] = exact(run, t, growth(run, t));
  }
  static Z exponents_gradient(const Z &G, const Z &g) {                    // conj(G) g
    return {G.re * g.re + G.im * g.im, G.re * g.im - G.im * g.re};
  }
  static INLINE void sum(const Run &run, const Z *g, V *sums) {     // of g[t * STRIDE]
    V even[3] = {}, odd[2] = {};
    for (int t = 0; t < run.n; t++) {
      float y = run.y_at(t), y_odd = run.y_odd(t);
      V re = g[t * STRIDE].re, im = g[t * STRIDE].im;
      even[0] += re, even[1] += re * y_odd, even[2] += re * (y * y);
      odd[0] += im, odd[1] += im * y_odd;
    }
    const float square = TURN * TURN, turn = TURN;
    sums[0] += even[0];
    sums[1] -= even[0] * (square * (run.x * run.x));
    sums[2] -= even[1] * (2 * square * run.x_odd);
    sums[3] -= even[2] * square;
    sums[4] += odd[0] * (turn * run.x_odd);
    sums[5] += odd[1] * turn;
  }
};

// The same for the embedding B = g0 + i (gx kx + gy ky): Eq. (6).
struct Embedding {
  static constexpr int ROWS = 3;  // g0, gx, gy
  V g0, gx, gy;

  void set(const V *row) { g0 = row[0], gx = row[1] * (float)TURN, gy = row[2] * (float)TURN; }
  INLINE void fill(const Run &run, Z *B) const {
    for (int t = 0; t < run.n; t++) B[t * STRIDE] = {g0, gx * (float)run.x_odd + gy * (float)run.y_odd(t)};
  }
  static Z exponents_gradient(const Z &, const Z &g) { return g; }
  static INLINE void sum(const Run &run, const Z *g, V *sums) {
    V even = {}, odd[2] = {};
    for (int t = 0; t < run.n; t++) {
      even += g[t * STRIDE].re;
      odd[0] += g[t * STRIDE].im, odd[1] += g[t * STRIDE].im * (float)run.y_odd(t);
    }
    sums[0] += even, sums[1] += odd[0] * (float)(TURN * run.x_odd), sums[2] += odd[1] * (float)TURN;
  }
};

struct Shape {
  int c, B, groups, blocks, span, shares;  // a share of the work is `span` of a group's blocks of LANES output channels
  Shape(int c, int B, int groups, int threads) : c(c), B(B), groups(groups), blocks((c + LANES - 1) / LANES) {
    long each = (long)groups * blocks / (4 * threads);
    span = each < 1 ? 1 : each < SPAN ? each : SPAN;
    shares = (blocks + span - 1) / span;
  }
  int lanes(int block) const { return c - block * LANES < LANES ? c - block * LANES : LANES; }
};

// Where coefficients or their gradients lie, each (groups, c, c).
template <class Number>
using Rows = std::vector<Number *>;

// One block's pairs with all input channels. Outputs are rows of the coefficients, or columns if `turned`.
template <class Pair>
static void set_pairs(const Rows<const float> &rows, long matrix, const Shape &shape, int block, bool turned, Pair *pairs) {
  const int c = shape.c, lanes = shape.lanes(block), first = block * LANES;
  for (int j = 0; j < c; j++) {
    V row[Pair::ROWS];
    for (int i = 0; i < Pair::ROWS; i++) {
      const float *from = rows[i] + matrix;
      row[i] = turned ? load(from + (long)j * c + first, lanes) : gather(from + (long)first * c + j, c, lanes);
    }
    pairs[j].set(row);
  }
}

// out += G v, or conj(G) v, for NB images: G (n), v (n, 2, B) and out (2, B, c), all of one wave vector.
template <int NB, bool conjugate>
static INLINE void multiply(const Z *G, int n, const float *v, int B, float *out, int c, int lanes, bool fresh) {
  V re[NB], im[NB];
  for (int b = 0; b < NB; b++) {
    re[b] = fresh ? V{} : load(out + (long)b * c, lanes);
    im[b] = fresh ? V{} : load(out + (long)(B + b) * c, lanes);
  }
  for (int j = 0; j < n; j++, v += 2 * B) {
    V g_re = G[j].re, g_im = conjugate ? -G[j].im : G[j].im;
    for (int b = 0; b < NB; b++) {
      re[b] += g_re * v[b];
      im[b] += g_re * v[B + b];
      re[b] -= g_im * v[B + b];
      im[b] += g_im * v[b];
    }
  }
  for (int b = 0; b < NB; b++) {
    store(out + (long)b * c, re[b], lanes);
    store(out + (long)(B + b) * c, im[b], lanes);
  }
}

template <bool conjugate>
static void multiply_all(const Z *G, int n, const float *v, int B, float *out, int c, int lanes, bool fresh) {
  int b = 0;
  for (; b + IMAGES <= B; b += IMAGES) multiply<IMAGES, conjugate>(G, n, v + b, B, out + (long)b * c, c, lanes, fresh);
  for (; b + 4 <= B; b += 4) multiply<4, conjugate>(G, n, v + b, B, out + (long)b * c, c, lanes, fresh);
  for (; b + 2 <= B; b += 2) multiply<2, conjugate>(G, n, v + b, B, out + (long)b * c, c, lanes, fresh);
  if (b < B) multiply<1, conjugate>(G, n, v + b, B, out + (long)b * c, c, lanes, fresh);
}

// Replaces G (n) by the gradient of its exponents, from the sum over images of conj(w) g at one wave vector; g (n, 2, B) is the
// gradient of the product G w. Here the channels of w (2, B, c) are the lanes.
template <class Pair, int N>
static INLINE void outer(Z *G, const float *g, const float *w, int B, int c, int lanes) {
  V re[N] = {}, im[N] = {};
  for (int b = 0; b < B; b++) {
    V w_re = load(w + (long)b * c, lanes), w_im = load(w + (long)(B + b) * c, lanes);
    for (int i = 0; i < N; i++) {
      float g_re = g[2 * i * B + b], g_im = g[(2 * i + 1) * B + b];
      re[i] += w_re * g_re;
      im[i] += w_re * g_im;
      re[i] += w_im * g_im;
      im[i] -= w_im * g_re;
    }
  }
  for (int i = 0; i < N; i++) G[i] = Pair::exponents_gradient(G[i], {re[i], im[i]});
}

template <class Pair>
static INLINE void outer_all(Z *G, int n, const float *g, const float *w, int B, int c, int lanes) {
  int i = 0;
  for (; i + IMAGES <= n; i += IMAGES) outer<Pair, IMAGES>(G + i, g + 2 * i * B, w, B, c, lanes);
  for (; i < n; i++) outer<Pair, 1>(G + i, g + 2 * i * B, w, B, c, lanes);
}

// Flushes subnormal numbers to zero while a kernel runs: they would take a hundred times as long.
struct WithoutSubnormals {
#ifdef __x86_64__
  unsigned before = _mm_getcsr();
  WithoutSubnormals() { _mm_setcsr(before | 0x8040); }
  ~WithoutSubnormals() { _mm_setcsr(before); }
#endif
};

template <class Pair>
static void forward(const float *v, const Rows<const float> &rows, float *out, int h, int w, int c, int B, int groups,
                    int threads) {
  const Grid grid(h, w);
  const Shape shape(c, B, groups, threads);
  const long spectrum = grid.size() * 2 * B * c;
  #pragma omp parallel num_threads(threads)
  {
    WithoutSubnormals mode;
    std::vector<Pair> pairs((long)shape.span * c);
    std::vector<Z> G(RUN * STRIDE);
    #pragma omp for collapse(2) schedule(dynamic)
    for (int group = 0; group < groups; group++)
      for (int share = 0; share < shape.shares; share++) {
        const int first = share * shape.span, last = first + shape.span < shape.blocks ? first + shape.span : shape.blocks;
        for (int block = first; block < last; block++)
          set_pairs(rows, (long)group * c * c, shape, block, false, &pairs[(long)(block - first) * c]);
        for (const Run &run : grid.runs)
          for (int block = first; block < last; block++)
            for (int j = 0; j < c; j += PIECE) {
              const int n = c - j < PIECE ? c - j : PIECE;
              for (int i = 0; i < n; i++) pairs[(long)(block - first) * c + j + i].fill(run, &G[i]);
              for (int t = 0; t < run.n; t++) {
                long at = group * spectrum + grid.at(run, t) * 2 * B * c;
                multiply_all<false>(&G[t * STRIDE], n, v + at + (long)j * 2 * B, B, out + at + block * LANES, c,
                                    shape.lanes(block), j == 0);
              }
            }
      }
  }
}

template <class Pair>
static void backward(const float *gradient, const float *v, const Rows<const float> &rows, float *v_gradient,
                     const Rows<float> &rows_gradient, int h, int w, int c, int B, int groups, int threads) {
  const Grid grid(h, w);
  const Shape shape(c, B, groups, threads);
  const long spectrum = grid.size() * 2 * B * c;
  #pragma omp parallel num_threads(threads)
  {
    WithoutSubnormals mode;
    std::vector<Pair> pairs((long)shape.span * c);
    std::vector<V> sums((long)shape.span * c * Pair::ROWS);
    std::vector<Z> G(RUN * STRIDE);
    #pragma omp for collapse(2) schedule(dynamic)
    for (int group = 0; group < groups; group++)
      for (int share = 0; share < shape.shares; share++) {
        const int first = share * shape.span, last = first + shape.span < shape.blocks ? first + shape.span : shape.blocks;
        const long matrix = (long)group * c * c;
        for (int block = first; block < last; block++)
          set_pairs(rows, matrix, shape, block, true, &pairs[(long)(block - first) * c]);
        for (V &sum : sums) sum = V{};
        for (const Run &run : grid.runs)
          for (int block = first; block < last; block++)
            for (int i = 0; i < c; i += PIECE) {
              const int n = c - i < PIECE ? c - i : PIECE, lanes = shape.lanes(block);
              const long pair = (long)(block - first) * c + i;
              for (int k = 0; k < n; k++) pairs[pair + k].fill(run, &G[k]);
              for (int t = 0; t < run.n; t++) {
                long at = group * spectrum + grid.at(run, t) * 2 * B * c, place = at + block * LANES;
                const float *g = gradient + at + (long)i * 2 * B;
                Z *own = &G[t * STRIDE];
                multiply_all<true>(own, n, g, B, v_gradient + place, c, lanes, i == 0);
                outer_all<Pair>(own, n, g, v + place, B, c, lanes);
              }
              for (int k = 0; k < n; k++) Pair::sum(run, &G[k], &sums[(pair + k) * Pair::ROWS]);
            }
        for (int block = first; block < last; block++)
          for (int row = 0; row < Pair::ROWS; row++)
            for (int i = 0; i < c; i++)
              store(rows_gradient[row] + matrix + (long)i * c + block * LANES,
                    sums[((long)(block - first) * c + i) * Pair::ROWS + row], shape.lanes(block));
      }
  }
}

template <class Number>
static Rows<Number> rows_of(Number *exponents, long size) {
  Rows<Number> rows;
  for (int i = 0; i < Green::ROWS; i++) rows.push_back(exponents + i * size);
  return rows;
}

// The same with matrices from memory, (f, blocks of LANES outputs, inputs, 2, LANES): v (f, inputs, 2, B) to out (f, 2, B, c).
extern "C" void multiply_by(const float *matrices, const float *v, float *out, int f, int inputs, int c, int B, int threads) {
  const Shape shape(c, B, 1, threads);
  #pragma omp parallel for num_threads(threads)
  for (int k = 0; k < f; k++) {
    WithoutSubnormals mode;
    for (int block = 0; block < shape.blocks; block++)
      multiply_all<false>((const Z *)matrices + ((long)k * shape.blocks + block) * inputs, inputs, v + (long)k * inputs * 2 * B,
                          B, out + (long)k * 2 * B * c + block * LANES, c, shape.lanes(block), true);
  }
}

extern "C" int lanes() { return LANES; }

// Packed v (groups, f, c, 2, B) to out in lanes (groups, f, 2, B, c); exponents (6, groups, c, c), g0, gx and gy (groups, c, c).
extern "C" void green(const float *v, const float *exponents, float *out, int h, int w, int c, int B, int groups, int threads) {
  forward<Green>(v, rows_of(exponents, (long)groups * c * c), out, h, w, c, B, groups, threads);
}

extern "C" void embed(const float *v, const float *g0, const float *gx, const float *gy, float *out, int h, int w, int c, int B,
                      int groups, int threads) {
  forward<Embedding>(v, {g0, gx, gy}, out, h, w, c, B, groups, threads);
}

// Computes the gradients of v, in lanes as v is here, and of the coefficients from the packed gradient of out.
extern "C" void green_backward(const float *gradient, const float *v, const float *exponents, float *v_gradient,
                               float *exponents_gradient, int h, int w, int c, int B, int groups, int threads) {
  const long size = (long)groups * c * c;
  backward<Green>(gradient, v, rows_of(exponents, size), v_gradient, rows_of(exponents_gradient, size), h, w, c, B, groups,
                  threads);
}

extern "C" void embed_backward(const float *gradient, const float *v, const float *g0, const float *gx, const float *gy,
                               float *v_gradient, float *g0_gradient, float *gx_gradient, float *gy_gradient, int h, int w,
                               int c, int B, int groups, int threads) {
  backward<Embedding>(gradient, v, {g0, gx, gy}, v_gradient, {g0_gradient, gx_gradient, gy_gradient}, h, w, c, B, groups,
                      threads);
}

// Systems of channels, the coupling of `Coupled`: at each wave vector the symbol is exp(A) B, with the exponential of a matrix
// A = tau Lambda(k), c x c, and the embedding B. Here one vector is LANES wave vectors, and matrices are n x n, c padded by
// zeros to a multiple of 4. The exponential is a Taylor polynomial of A / 2^s, squared s times. Its gradient is the derivative
// at the adjoint of A in the direction of the result's gradient (Mathias, 1996), which the same steps carry along as a second
// part of each matrix: (X, E) (Y, F) = (X Y, X F + E Y). Nothing is stored, and a gradient takes three products where a value
// takes one.
//
// Forward and backward, 48 groups of 8 channels take 0.6 and 1.8 ms for 4 images of 8 x 8 tokens, 1.8 and 5.5 ms for 4 of 16 x 16
// (one thread of an AMD EPYC). PyTorch's exponential and its gradient alone take ten times as long as these kernels, in one run.

constexpr int COLUMNS = LANES / 4;     // 2 x COLUMNS complex sums are as many as registers hold
constexpr int DEGREE = 12;             // of the polynomial
constexpr float INVERSE[DEGREE + 1] = {1, 1, 1 / 2.0f, 1 / 6.0f, 1 / 24.0f, 1 / 120.0f, 1 / 720.0f, 1 / 5040.0f, 1 / 40320.0f,
                                       1 / 362880.0f, 1 / 3628800.0f, 1 / 39916800.0f, 1 / 479001600.0f};  // of factorials
constexpr float LARGEST_NORM = 1.45f;  // of A / 2^s, up to which the polynomial is off by less than 2^-25
constexpr int MOST_SQUARINGS = 126;    // 2^-s is a normal number

template <bool add>
static void product(const Z *a, const Z *b, Z *out, int n) {
  for (int i = 0; i < n; i += 2)
    for (int j = 0; j < n; j += COLUMNS) {
      Z sum[2][COLUMNS];
      for (int row = 0; row < 2; row++)
        for (int k = 0; k < COLUMNS; k++) sum[row][k] = add ? out[(i + row) * n + j + k] : Z{};
      for (int l = 0; l < n; l++)
        for (int row = 0; row < 2; row++) {
          const Z left = a[(i + row) * n + l];
          for (int k = 0; k < COLUMNS; k++) {
            const Z &right = b[l * n + j + k];
            sum[row][k].re += left.re * right.re;
            sum[row][k].im += left.re * right.im;
            sum[row][k].re -= left.im * right.im;
            sum[row][k].im += left.im * right.re;
          }
        }
      for (int row = 0; row < 2; row++)
        for (int k = 0; k < COLUMNS; k++) out[(i + row) * n + j + k] = sum[row][k];
    }
}

template <int PARTS>
static void multiply_parts(const Z *a, const Z *b, Z *out, int n) {
  product<false>(a, b, out, n);
  if (PARTS == 1) return;
  product<false>(a, b + n * n, out + n * n, n);
  product<true>(a + n * n, b, out + n * n, n);
}

// Replaces A by exp(A) and, with two parts, the second by the derivative in its direction; `room` holds four more of its size.
template <int PARTS>
static void matrix_exponential(Z *A, Z *room, int n) {
  const int size = PARTS * n * n;
  Z *A2 = room, *A3 = A2 + size, *P = A3 + size, *Q = P + size;
  V norm = {};                                                             // the largest sum of a column's magnitudes
  for (int j = 0; j < n; j++) {
    V sum = {};
    for (int i = 0; i < n; i++) {
      V re = A[i * n + j].re, im = A[i * n + j].im;
      re = re < 0 ? -re : re, im = im < 0 ? -im : im;
      sum += re > im ? re + 0.4143f * im : im + 0.4143f * re;              // no smaller than the magnitude
    }
    norm = sum > norm ? sum : norm;
  }
  I s = ((I)(norm * (1 / LARGEST_NORM)) >> 23) - 126;
  s = s < 0 ? I{} : s > MOST_SQUARINGS ? I{} + MOST_SQUARINGS : s;
  const V scale = (V)((127 - s) << 23);
  for (int e = 0; e < size; e++) A[e] = A[e] * scale;
  multiply_parts<PARTS>(A, A, A2, n);
  multiply_parts<PARTS>(A2, A, A3, n);
  const auto add = [&](Z *to, int power) {                                 // A^i / (power + i)! for i < 3
    for (int e = 0; e < size; e++) to[e] = to[e] + A[e] * INVERSE[power + 1] + A2[e] * INVERSE[power + 2];
    for (int i = 0; i < n; i++) to[i * n + i].re += INVERSE[power];
  };
  for (int e = 0; e < size; e++) P[e] = A3[e] * INVERSE[DEGREE];
  add(P, DEGREE - 3);
  for (int power = DEGREE - 6; power >= 0; power -= 3) {
    multiply_parts<PARTS>(A3, P, Q, n);
    add(Q, power);
    std::swap(P, Q);
  }
  for (int step = 0; !all(s <= step); step++) {
    multiply_parts<PARTS>(P, P, Q, n);
    for (int e = 0; e < size; e++) P[e] = {s > step ? Q[e].re : P[e].re, s > step ? Q[e].im : P[e].im};
  }
  std::copy(P, P + size, A);
}

// Takes up to LANES wave vectors of a grid at once, in order of length, as those of similar length need equally many squarings.
struct Waves {
  struct Wave { int x, x_odd, y, y_odd; long at; };
  long size;  // of a spectrum, with those that have no product of their own
  std::vector<Wave> all;

  Waves(int h, int w) : size((long)h * (w / 2 + 1)) {
    const Grid grid(h, w);
    for (const Run &run : grid.runs)
      for (int t = 0; t < run.n; t++) all.push_back({run.x, run.x_odd, run.y_at(t), run.y_odd(t), grid.at(run, t)});
    std::stable_sort(all.begin(), all.end(), [](const Wave &a, const Wave &b) {
      return a.x * a.x + a.y * a.y < b.x * b.x + b.y * b.y;
    });
  }
  long at(int group, long block, int t) const { return group * size + all[block * LANES + t].at; }
  long blocks() const { return (all.size() + LANES - 1) / LANES; }
  int lanes(long block) const { return std::min((long)all.size() - block * LANES, (long)LANES); }
};

// What a row of coefficients, those of `Green` and then of `Embedding`, is multiplied by, in A or B of LANES wave vectors.
struct Monomials {
  static constexpr int ROWS = Green::ROWS + Embedding::ROWS;
  V of[ROWS] = {};

  Monomials(const Waves &waves, long block) {
    const float turn = TURN, square = TURN * TURN;
    for (int t = 0; t < waves.lanes(block); t++) {
      const Waves::Wave &k = waves.all[block * LANES + t];
      const float row[ROWS] = {1, -square * (k.x * k.x), -2 * square * (k.x_odd * k.y_odd), -square * (k.y * k.y),
                               turn * k.x_odd, turn * k.y_odd, turn * k.x_odd, turn * k.y_odd, 1};
      for (int i = 0; i < ROWS; i++) of[i][t] = row[i];
    }
  }
};

// A and B of a group, or their adjoints.
template <bool adjoint>
static void set_matrices(const Rows<const float> &rows, long matrix, const Monomials &k, int c, int n, Z *A, Z *B) {
  std::fill(A, A + n * n, Z{});
  std::fill(B, B + n * n, Z{});
  for (int i = 0; i < c; i++)
    for (int j = 0; j < c; j++) {
      V term[Monomials::ROWS];
      for (int r = 0; r < Monomials::ROWS; r++) term[r] = rows[r][matrix + i * c + j] * k.of[r];
      const V growth = term[0] + term[1] + term[2] + term[3], phase = term[4] + term[5], slope = term[6] + term[7];
      const int at = adjoint ? j * n + i : i * n + j;
      A[at] = {growth, adjoint ? -phase : phase};
      B[at] = {term[8], adjoint ? -slope : slope};
    }
}

// One wave vector's columns of G, a vector each.
static void take_columns(const Z *G, int t, int c, int n, Z *columns) {
  for (int j = 0; j < c; j++)
    for (int i = 0; i < c; i++) columns[j].re[i] = G[i * n + j].re[t], columns[j].im[i] = G[i * n + j].im[t];
}

static int padded(int c) { return (c + 3) / 4 * 4; }

template <class Number>
static Rows<Number> all_rows(Number *g0, Number *gx, Number *gy, Number *exponents, long size) {
  Rows<Number> rows = rows_of(exponents, size);
  rows.insert(rows.end(), {gx, gy, g0});
  return rows;
}

// Packed v (groups, f, c, 2, B) to out in lanes (groups, f, 2, B, c), c at most LANES; g0, gx and gy (groups, c, c) and exponents
// (6, groups, c, c).
extern "C" void systems(const float *v, const float *g0, const float *gx, const float *gy, const float *exponents, float *out,
                        int h, int w, int c, int B, int groups, int threads) {
  const Rows<const float> rows = all_rows(g0, gx, gy, exponents, (long)groups * c * c);
  const Waves waves(h, w);
  const int n = padded(c), size = n * n;
  #pragma omp parallel num_threads(threads)
  {
    WithoutSubnormals mode;
    std::vector<Z> room(7 * size), columns(c);
    Z *A = room.data(), *embedding = A + size, *symbol = embedding + size, *more = symbol + size;
    #pragma omp for collapse(2) schedule(dynamic)
    for (int group = 0; group < groups; group++)
      for (long block = 0; block < waves.blocks(); block++) {
        const Monomials k(waves, block);
        set_matrices<false>(rows, (long)group * c * c, k, c, n, A, embedding);
        matrix_exponential<1>(A, more, n);
        product<false>(A, embedding, symbol, n);
        for (int t = 0; t < waves.lanes(block); t++) {
          const long at = waves.at(group, block, t) * 2 * B * c;
          take_columns(symbol, t, c, n, columns.data());
          multiply_all<false>(columns.data(), c, v + at, B, out + at, c, c, true);
        }
      }
  }
}

// From the packed gradient of out to those of v, in lanes as v is here, and of the coefficients.
extern "C" void systems_backward(const float *gradient, const float *v, const float *g0, const float *gx, const float *gy,
                                 const float *exponents, float *v_gradient, float *g0_gradient, float *gx_gradient,
                                 float *gy_gradient, float *exponents_gradient, int h, int w, int c, int B, int groups,
                                 int threads) {
  const Rows<const float> rows = all_rows(g0, gx, gy, exponents, (long)groups * c * c);
  const Rows<float> found = all_rows(g0_gradient, gx_gradient, gy_gradient, exponents_gradient, (long)groups * c * c);
  const Waves waves(h, w);
  const int n = padded(c), size = n * n;
  #pragma omp parallel num_threads(threads)
  {
    WithoutSubnormals mode;
    std::vector<Z> room(13 * size), columns(c);
    std::vector<V> sums(Monomials::ROWS * c * c);
    Z *A = room.data(), *embedding = A + 2 * size, *given = embedding + size, *symbol = given + size, *more = symbol + size;
    #pragma omp for schedule(dynamic)
    for (int group = 0; group < groups; group++) {
      const long matrix = (long)group * c * c;
      std::fill(sums.begin(), sums.end(), V{});
      for (long block = 0; block < waves.blocks(); block++) {
        const Monomials k(waves, block);
        set_matrices<true>(rows, matrix, k, c, n, A, embedding);
        std::fill(given, given + size, Z{});
        for (int t = 0; t < waves.lanes(block); t++) {                     // the gradient of exp(A) B
          const long at = waves.at(group, block, t) * 2 * B * c;
          outer_all<Embedding>(columns.data(), c, gradient + at, v + at, B, c, c);
          for (int i = 0; i < c; i++)
            for (int j = 0; j < c; j++) given[i * n + j].re[t] = columns[i].re[j], given[i * n + j].im[t] = columns[i].im[j];
        }
        product<false>(given, embedding, A + size, n);                     // of exp(A)
        matrix_exponential<2>(A, more, n);
        product<false>(embedding, A, symbol, n);                           // the adjoint of exp(A) B
        product<false>(A, given, embedding, n);                            // of B
        for (int t = 0; t < waves.lanes(block); t++) {
          const long at = waves.at(group, block, t) * 2 * B * c;
          take_columns(symbol, t, c, n, columns.data());
          multiply_all<false>(columns.data(), c, gradient + at, B, v_gradient + at, c, c, true);
        }
        for (int i = 0; i < c; i++)
          for (int j = 0; j < c; j++) {
            const Z &a = A[size + i * n + j], &b = embedding[i * n + j];
            const V parts[] = {a.re, a.re, a.re, a.re, a.im, a.im, b.im, b.im, b.re};
            for (int r = 0; r < Monomials::ROWS; r++) sums[(r * c + i) * c + j] += parts[r] * k.of[r];
          }
      }
      for (int r = 0; r < Monomials::ROWS; r++)
        for (int i = 0; i < c * c; i++) {
          float sum = 0;
          for (int t = 0; t < LANES; t++) sum += sums[r * c * c + i][t];
          found[r][matrix + i] = sum;
        }
    }
  }
}

// Computes the exponents of `Green` from the parameters of Pairwise, n pairs per group: `PDE.entries`, `PDE.bound`, the shift
// of `green_symbol` in one pass over memory. PyTorch's operations take as long for this as the products of a few small images.

constexpr int CHUNK = 1024;  // pairs whose gradients of tau are summed at once, whatever the number of threads

// From b (n, 2) to bx and by, and back.
static INLINE void load_shifts(const float *from, int lanes, V &bx, V &by) {
  bx = by = V{};
  for (int lane = 0; lane < lanes; lane++) bx[lane] = from[2 * lane], by[lane] = from[2 * lane + 1];
}

static INLINE void store_shifts(float *to, int lanes, const V &bx, const V &by) {
  for (int lane = 0; lane < lanes; lane++) to[2 * lane] = bx[lane], to[2 * lane + 1] = by[lane];
}

// Modulo one turn, from -1/2 to 1/2.
static INLINE V fraction(V turns) {
  turns = (turns < 16777216.0f) & (turns > -16777216.0f) ? turns : 0.0f * turns;         // larger ones are whole turns, or NaN
  turns -= __builtin_convertvector(__builtin_convertvector(turns, I), V);
  return turns - ((turns + 12582912.0f) - 12582912.0f);
}

// r is 1 - softplus(r_slack), not yet bounded. Null pointers are parameters of absent terms.
extern "C" void exponents(const float *tau, const float *log_lx, const float *log_ly, const float *shear, const float *b,
                          const float *r, float *out, int n, int groups, int threads) {
  #pragma omp parallel for collapse(2) num_threads(threads)
  for (int group = 0; group < groups; group++)
    for (long i = 0; i < n; i += LANES) {
      const int lanes = n - i < LANES ? n - i : LANES;
      const long at = group * n + i;
      V t = V{} + tau[group], row[Green::ROWS] = {};
      if (r) {
        row[0] = t * load(r + at, lanes);
        row[0] = row[0] > LARGEST_GROWTH ? V{} + LARGEST_GROWTH : row[0];
      }
      if (log_lx) {
        V lx = exponential(load(log_lx + at, lanes)), ly = exponential(load(log_ly + at, lanes));
        V lyx = load(shear + at, lanes) * ly;
        row[1] = t * (lx * lx), row[2] = t * (lx * lyx), row[3] = t * (ly * ly + lyx * lyx);
      }
      if (b) {
        load_shifts(b + 2 * at, lanes, row[4], row[5]);
        row[4] = fraction(t * row[4]), row[5] = fraction(t * row[5]);
      }
      for (int k = 0; k < Green::ROWS; k++) store(out + (long)k * groups * n + at, row[k], lanes);
    }
}

// Computes the gradients of r and the other parameters, and partial sums of tau's, (groups, n / CHUNK), from the exponents'.
extern "C" void exponents_backward(const float *gradient, const float *tau, const float *log_lx, const float *log_ly,
                                   const float *shear, const float *b, const float *r, float *tau_gradient,
                                   float *log_lx_gradient, float *log_ly_gradient, float *shear_gradient, float *b_gradient,
                                   float *r_gradient, int n, int groups, int threads) {
  const long chunks = (n + CHUNK - 1) / CHUNK;
  #pragma omp parallel for collapse(2) num_threads(threads)
  for (int group = 0; group < groups; group++)
    for (long chunk = 0; chunk < chunks; chunk++) {
      V t = V{} + tau[group], of_tau = {};
      for (long i = chunk * CHUNK; i < n && i < (chunk + 1) * CHUNK; i += LANES) {
        const int lanes = n - i < LANES ? n - i : LANES;
        const long at = group * n + i;
        V g[Green::ROWS];
        for (int k = 0; k < Green::ROWS; k++) g[k] = load(gradient + (long)k * groups * n + at, lanes);
        if (r) {
          V rate = load(r + at, lanes);
          g[0] = t * rate > LARGEST_GROWTH ? V{} : g[0];
          of_tau += rate * g[0];
          store(r_gradient + at, t * g[0], lanes);
        }
        if (log_lx) {
          V lx = exponential(load(log_lx + at, lanes)), ly = exponential(load(log_ly + at, lanes));
          V s = load(shear + at, lanes), xx = lx * lx * g[1], xy = lx * ly * g[2], yy = ly * ly * g[3];
          of_tau += xx + s * xy + (1 + s * s) * yy;
          store(log_lx_gradient + at, t * (2 * xx + s * xy), lanes);
          store(log_ly_gradient + at, t * (s * xy + 2 * (1 + s * s) * yy), lanes);
          store(shear_gradient + at, t * (xy + 2 * s * yy), lanes);
        }
        if (b) {
          V bx, by;
          load_shifts(b + 2 * at, lanes, bx, by);
          of_tau += bx * g[4] + by * g[5];
          store_shifts(b_gradient + 2 * at, lanes, t * g[4], t * g[5]);
        }
      }
      double sum = 0;
      for (int lane = 0; lane < LANES; lane++) sum += of_tau[lane];
      tau_gradient[group * chunks + chunk] = sum;
    }
}
