// Kernels of the diagonal coupling: irfft2(symbol rfft2(v)) and its gradients, with the symbol computed on the fly. Built by
// cpu.py, which defines ROWS, MAX_SIDE and LARGEST_PRIME, and tested against `evolve_plainly` of pde_ssm.py.
//
// Sixteen channels, or eight without AVX-512, are one vector. The working set of one vector of one image fits into a core's own
// cache: main memory is read and written once for the tokens, and never holds a spectrum or a symbol.

#include <cmath>
#include <memory>

#include "vectors.h"

typedef double D __attribute__((vector_size(8 * LANES)));

static INLINE Z conj(const Z &a) { return {a.re, -a.im}; }
static INLINE Z turned(const Z &a, float cosine, float sine) { return {a.re * cosine - a.im * sine, a.re * sine + a.im * cosine}; }

// Fourier transforms of n points by Stockham's algorithm, whose results are in order without a reordering pass.

struct Axis {
  int n, stages = 0, radix[16];
  float cosine[MAX_SIDE], sine[MAX_SIDE];  // of 2 pi j / n

  explicit Axis(int n) : n(n) {
    int left = n;
    for (int r = 4; left > 1; r = r == 4 ? 2 : r == 2 ? 3 : r + 2)
      for (; left % r == 0; left /= r) radix[stages++] = r;
    for (int j = 0; j < n; j++) {
      cosine[j] = std::cos(TURN * j / n);
      sine[j] = std::sin(TURN * j / n);
    }
  }
};

// One stage of radix r = n / (m s), of s transforms side by side; `sign` is that of the exponent.
template <int sign>
static INLINE void stage2(const Axis &axis, int m, int s, const Z *in, Z *out) {
  for (int p = 0; p < m; p++)
    for (int q = 0; q < s; q++) {
      Z a = in[q + s * p], b = in[q + s * (p + m)];
      out[q + s * 2 * p] = a + b;
      out[q + s * (2 * p + 1)] = turned(a - b, axis.cosine[p * s], sign * axis.sine[p * s]);
    }
}

template <int sign>
static INLINE void stage4(const Axis &axis, int m, int s, const Z *in, Z *out) {
  for (int p = 0; p < m; p++) {
    float c1 = axis.cosine[p * s], c2 = axis.cosine[2 * p * s], c3 = axis.cosine[3 * p * s];
    float s1 = sign * axis.sine[p * s], s2 = sign * axis.sine[2 * p * s], s3 = sign * axis.sine[3 * p * s];
    for (int q = 0; q < s; q++) {
      Z a = in[q + s * p], b = in[q + s * (p + m)], c = in[q + s * (p + 2 * m)], d = in[q + s * (p + 3 * m)];
      Z even = a + c, odd = b + d, x = a - c, y = b - d;
      Z iy = sign > 0 ? Z{-y.im, y.re} : Z{y.im, -y.re};
      out[q + s * 4 * p] = even + odd;
      out[q + s * (4 * p + 1)] = turned(x + iy, c1, s1);
      out[q + s * (4 * p + 2)] = turned(even - odd, c2, s2);
      out[q + s * (4 * p + 3)] = turned(x - iy, c3, s3);
    }
  }
}

template <int sign>
void stage_odd(const Axis &axis, int r, int m, int s, const Z *in, Z *out) {
  Z sums[LARGEST_PRIME / 2 + 1], differences[LARGEST_PRIME / 2 + 1];
  for (int p = 0; p < m; p++)
    for (int q = 0; q < s; q++) {
      Z first = in[q + s * p], total = first;
      for (int j = 1; 2 * j < r; j++) {
        Z a = in[q + s * (p + m * j)], b = in[q + s * (p + m * (r - j))];
        sums[j] = a + b;
        differences[j] = a - b;
        total = total + sums[j];
      }
      out[q + s * r * p] = total;
      for (int k = 1; 2 * k < r; k++) {
        Z even = first, odd = {};
        for (int j = 1; 2 * j < r; j++) {
          int angle = j * k % r * (axis.n / r);
          float c = axis.cosine[angle], si = sign * axis.sine[angle];
          even.re += sums[j].re * c;
          even.im += sums[j].im * c;
          odd.re -= differences[j].im * si;
          odd.im += differences[j].re * si;
        }
        int angle = p * k * s, opposite = p * (r - k) * s;
        out[q + s * (r * p + k)] = turned(even + odd, axis.cosine[angle], sign * axis.sine[angle]);
        out[q + s * (r * p + r - k)] = turned(even - odd, axis.cosine[opposite], sign * axis.sine[opposite]);
      }
    }
}

// Computes sum_j a_j exp(sign 2 pi i j k / n) in a or in b, both n long, and returns the one that holds the result.
template <int sign>
static Z *transform(const Axis &axis, Z *a, Z *b) {
  int left = axis.n, s = 1;
  for (int i = 0; i < axis.stages; i++) {
    int r = axis.radix[i], m = left / r;
    if (r == 4) stage4<sign>(axis, m, s, a, b);
    else if (r == 2) stage2<sign>(axis, m, s, a, b);
    else stage_odd<sign>(axis, r, m, s, a, b);
    Z *result = b;
    b = a, a = result, left = m, s *= r;
  }
  return a;
}

// A grid and its wave numbers; below, the memory in which one core works. Spectra are stored column after column, [x][y] with x
// up to w / 2; one row of padding keeps columns whose length is a power of two from mapping to the same cache lines.

struct Grid {
  Axis X, Y;
  int h, w, f, column;
  long spectrum;
  float kx[MAX_SIDE], ky[MAX_SIDE], kx_odd[MAX_SIDE], ky_odd[MAX_SIDE];

  Grid(int h, int w) : X(w), Y(h), h(h), w(w), f(w / 2 + 1), column(h + 1), spectrum((long)f * column) {
    for (int x = 0; x < f; x++) {
      kx[x] = TURN * x;
      kx_odd[x] = 2 * x == w ? 0 : kx[x];
    }
    for (int y = 0; y < h; y++) {
      ky[y] = TURN * (2 * y < h ? y : y - h);
      ky_odd[y] = 2 * y == h ? 0 : ky[y];
    }
  }
};

static Z *workspace(long size) {
  static thread_local std::unique_ptr<char[]> memory;
  static thread_local long capacity = 0;
  if (capacity < size) {
    memory.reset(new char[size * sizeof(Z) + 64]);
    capacity = size;
  }
  return (Z *)(((size_t)memory.get() + 63) / 64 * 64);
}

// Prefetches tokens of the next two rows, for reading or writing: they lie too far apart for the hardware prefetcher. This is
// harmless beyond the last row.
template <int writing>
static INLINE void will_need(const float *upper, const float *lower) {
  __builtin_prefetch(upper, writing);
  __builtin_prefetch(lower, writing);
}

// Computes twice the rfft of tokens along x. Two rows at a time are the real and imaginary parts of one complex row.
static void spectrum_of(const Grid &grid, const float *tokens, long C, int lanes, Z *result, Z *line) {
  int h = grid.h, w = grid.w;
  Z *other = line + (w > h ? w : h);
  for (int y = 0; y < h; y += 2) {
    const float *upper = tokens + (long)y * w * C, *lower = upper + w * C;
    bool two = y + 1 < h;
    for (int x = 0; x < w; x++) {
      will_need<0>(lower + (w + x) * C, lower + (2 * w + x) * C);
      line[x] = {load(upper + x * C, lanes), two ? load(lower + x * C, lanes) : V{}};
    }
    const Z *both = transform<-1>(grid.X, line, other);
    for (int x = 0; x < grid.f; x++) {
      Z a = both[x], b = conj(both[x ? w - x : 0]), *to = result + x * grid.column + y;
      Z difference = a - b;                                                // 2 i times the lower row's
      to[0] = a + b;
      if (two) to[1] = {difference.im, -difference.re};
    }
  }
}

// Along y, times the symbol, and back.
static void multiply(const Grid &grid, Z *spectrum, const Z *symbol, Z *line) {
  for (int x = 0; x < grid.f; x++) {
    Z *column = spectrum + x * grid.column;
    const Z *factor = symbol + x * grid.column;
    Z *waves = transform<-1>(grid.Y, column, line);
    for (int y = 0; y < grid.h; y++) waves[y] = waves[y] * factor[y];
    transform<1>(grid.Y, waves, waves == column ? line : column);          // the same number of stages, so it ends in `column`
  }
}

// Back along x, from twice the spectrum of every row.
static void tokens_of(const Grid &grid, const Z *spectrum, float *tokens, long C, int lanes, Z *line) {
  int h = grid.h, w = grid.w;
  Z *other = line + (w > h ? w : h);
  float scale = 0.5f / ((float)h * w);
  for (int y = 0; y < h; y += 2) {
    float *upper = tokens + (long)y * w * C, *lower = upper + w * C;
    bool two = y + 1 < h;
    for (int x = 0; x < grid.f; x++) {
      const Z *from = spectrum + x * grid.column + y;
      Z a = from[0], b = two ? from[1] : Z{};
      if (x == 0 || 2 * x == w) line[x] = {a.re, b.re};                    // what a real row has there is real
      else {
        line[x] = {a.re - b.im, a.im + b.re};
        line[w - x] = {a.re + b.im, b.re - a.im};
      }
    }
    const Z *both = transform<1>(grid.X, line, other);
    for (int x = 0; x < w; x++) {
      will_need<1>(lower + (w + x) * C, lower + (2 * w + x) * C);
      store(upper + x * C, both[x].re * scale, lanes);
      if (two) store(lower + x * C, both[x].im * scale, lanes);
    }
  }
}

// cos and sin of j angle, j < n, the angle in turns.
static void powers(V turns, int n, Z *result) {
  D cosine, sine, re = {}, im = {};
  for (int lane = 0; lane < LANES; lane++) {
    double part = (double)turns[lane] - std::nearbyint((double)turns[lane]);
    cosine[lane] = std::cos(TURN * part);
    sine[lane] = std::sin(TURN * part);
  }
  re += 1;
  for (int j = 0; j < n; j++) {
    result[j] = {__builtin_convertvector(re, V), __builtin_convertvector(im, V)};
    D next = re * cosine - im * sine;
    im = re * sine + im * cosine;
    re = next;
  }
}

// Calls visit(x, y, G(k), B(k)) at every wave vector of a grid, for one PDE of each channel.
template <class Visit>
static INLINE void for_each_wave(const Grid &grid, const V *row, Z *waves_x, Z *waves_y, Visit visit) {
  V r = row[0], Kxx = row[1], Kxy = row[2], Kyy = row[3];
  V gx = row[6], gy = row[7], g0 = row[8];
  powers(row[4], grid.f, waves_x);
  powers(row[5], grid.h / 2 + 1, waves_y);
  for (int x = 0; x < grid.f; x++) {
    float kx = grid.kx_odd[x];
    V growth_x = r - Kxx * (grid.kx[x] * grid.kx[x]), cross = Kxy * (-2 * kx), B_x = gx * kx;
    Z wave_x = kx == 0 ? Z{V{} + 1, V{}} : waves_x[x];
    for (int y = 0; y < grid.h; y++) {
      float ky = grid.ky_odd[y];
      V size = exponential(growth_x - Kyy * (grid.ky[y] * grid.ky[y]) + cross * ky);
      Z wave = 2 * y == grid.h ? wave_x : wave_x * (2 * y < grid.h ? waves_y[y] : conj(waves_y[grid.h - y]));
      visit(x, y, Z{wave.re * size, wave.im * size}, Z{g0, B_x + gy * ky});
    }
  }
}

struct Channels {  // of one block
  long first, C;
  int lanes;
  Channels(long block, long C) : first(block * LANES), C(C), lanes(C - first < LANES ? C - first : LANES) {}
};

static void load_rows(const float *from, const Channels &c, V *to) {
  for (int i = 0; i < ROWS; i++) to[i] = load(from + i * c.C + c.first, c.lanes);
}

static void symbol_of(const Grid &grid, const float *rows, int components, const Channels &c, Z *symbol, Z *waves) {
  V row[ROWS];
  for (int n = 0; n < components; n++) {
    load_rows(rows + n * ROWS * c.C, c, row);
    for_each_wave(grid, row, waves, waves + grid.f, [&](int x, int y, const Z &G, const Z &B) {
      Z *at = symbol + x * grid.column + y;
      *at = n ? *at + G * B : G * B;
    });
  }
}

// v and out are (B, h, w, C). Each of `groups` shares of the images has rows (components, ROWS, C), `stride` numbers from one
// share to the next.
extern "C" void evolve(const float *v, const float *rows, float *out, long B, int h, int w, long C, int components,
                       int groups, long stride, int threads) {
  const Grid grid(h, w);
  const long blocks = (C + LANES - 1) / LANES, image = (long)h * w * C;
  #pragma omp parallel num_threads(threads)
  {
    Z *symbol = workspace(2 * grid.spectrum + 2 * (h + w)), *waves = symbol + grid.spectrum, *line = waves + grid.spectrum;
    #pragma omp for collapse(2) schedule(dynamic)
    for (long block = 0; block < blocks; block++)
      for (int group = 0; group < groups; group++) {
        const Channels c(block, C);
        symbol_of(grid, rows + group * stride, components, c, symbol, line);
        for (long b = group * B / groups; b < (group + 1) * B / groups; b++) {
          spectrum_of(grid, v + b * image + c.first, C, c.lanes, waves, line);
          multiply(grid, waves, symbol, line);
          tokens_of(grid, waves, out + b * image + c.first, C, c.lanes, line);
        }
      }
  }
}

// Computes the gradients of v and of each group's rows, (groups, components, ROWS, C), from that of out.
extern "C" void evolve_backward(const float *gradient, const float *v, const float *rows, float *v_gradient,
                                float *rows_gradient, long B, int h, int w, long C, int components, int groups,
                                long stride, int threads) {
  const Grid grid(h, w);
  const long blocks = (C + LANES - 1) / LANES, image = (long)h * w * C;
  #pragma omp parallel num_threads(threads)
  {
    Z *symbol = workspace(4 * grid.spectrum + 2 * (h + w)), *symbol_gradient = symbol + grid.spectrum;
    Z *waves = symbol_gradient + grid.spectrum, *gradient_waves = waves + grid.spectrum;
    Z *line = gradient_waves + grid.spectrum;
    #pragma omp for collapse(2) schedule(dynamic)
    for (long block = 0; block < blocks; block++)
      for (int group = 0; group < groups; group++) {
        const Channels c(block, C);
        const float *own = rows + group * stride;
        symbol_of(grid, own, components, c, symbol, line);
        const long first = group * B / groups, last = (group + 1) * B / groups;
        for (long b = first; b < last; b++) {
          spectrum_of(grid, v + b * image + c.first, C, c.lanes, waves, line);
          spectrum_of(grid, gradient + b * image + c.first, C, c.lanes, gradient_waves, line);
          for (int x = 0; x < grid.f; x++) {
            Z *column = gradient_waves + x * grid.column, *sums = symbol_gradient + x * grid.column;
            const Z *factor = symbol + x * grid.column;
            const Z *a = transform<-1>(grid.Y, waves + x * grid.column, line);             // its result may lie in `line`
            Z *g = transform<-1>(grid.Y, column, line + h);
            for (int y = 0; y < h; y++) {
              Z product = conj(a[y]) * g[y];
              sums[y] = b == first ? product : sums[y] + product;
              g[y] = g[y] * conj(factor[y]);
            }
            transform<1>(grid.Y, g, g == column ? line : column);
          }
          tokens_of(grid, gradient_waves, v_gradient + b * image + c.first, C, c.lanes, line);
        }
        for (int n = 0; n < components; n++) {
          V row[ROWS], total[ROWS] = {}, sum[ROWS] = {};
          load_rows(own + n * ROWS * C, c, row);
          for_each_wave(grid, row, line, line + grid.f, [&](int x, int y, const Z &G, const Z &B) {
            // With P = conj(G) times the symbol's gradient, B's gradient is P and the exponent's conj(B) P.
            float kx = grid.kx_odd[x], ky = grid.ky_odd[y];
            Z P = conj(G) * symbol_gradient[x * grid.column + y], Q = conj(B) * P;
            sum[0] += Q.re;
            sum[1] -= Q.re * (grid.kx[x] * grid.kx[x]);
            sum[2] -= Q.re * (2 * kx * ky);
            sum[3] -= Q.re * (grid.ky[y] * grid.ky[y]);
            sum[4] += Q.im * kx;
            sum[5] += Q.im * ky;
            sum[6] += P.im * kx;
            sum[7] += P.im * ky;
            sum[8] += P.re;
            if (y == h - 1)  // each column is summed by itself: sums of partial sums lose less to rounding
              for (int i = 0; i < ROWS; i++) {
                // every wave but those with kx = 0 or at its Nyquist frequency stands for its mirror image, too
                total[i] += sum[i] * ((x == 0 || 2 * x == w ? 0.25f : 0.5f) / ((float)h * w));
                sum[i] = V{};
              }
          });
          float *to = rows_gradient + ((long)group * components + n) * ROWS * C + c.first;
          for (int i = 0; i < ROWS; i++) store(to + i * C, total[i], c.lanes);
        }
      }
  }
}
