// Kernels of the selective scan, of the convolution that mixers have before it, and of their gradients. Built by
// selective_scan_cpu.py, which defines CHUNK and SHARE, and tested against the reference of selective_scan.py and PyTorch.
//
// Sixteen channels of float32 are one vector, or eight without AVX-512, and half as many of float64. A core goes through a
// SHARE of the channels a CHUNK of tokens at a time, with its working set in its own cache: main memory is accessed once for
// the inputs and outputs, and stores only the states before each chunk. The division of work, and so the order of every sum,
// depends on sizes alone: any number of threads gives the same bits.

#include <cstring>
#include <memory>
#include <type_traits>
#if defined __AVX__
#include <immintrin.h>
#endif

// Clamps x to [low, high] and keeps NaN. From the comparison, compilers make more instructions than these two.
#if defined __AVX512F__
constexpr int BYTES = 64;
#define CLAMP(type, low, x, high) (V) _mm512_min_##type(high, _mm512_max_##type(low, x))
#elif defined __AVX__
constexpr int BYTES = 32;
#define CLAMP(type, low, x, high) (V) _mm256_min_##type(high, _mm256_max_##type(low, x))
#else
constexpr int BYTES = 32;
#define CLAMP(type, low, x, high) x < low ? low : x > high ? high : x
#endif

#define INLINE static inline __attribute__((always_inline))

template <class T> struct Rows { T *data; long batch, channel, token; };            // (B, E, L) and its strides
template <class T> struct Columns { T *data; long batch, group, state, token; };    // (B, G, N, L)

// The argument of both kernels, in the order in which `call` of selective_scan_cpu.py packs it. In the backward pass out and
// last are gradients. Gradients of A (B, E, N), D and bias (B, E) are per image, those of B and C (shares, B, G, L, N) per
// share.
template <class T> struct Scan {
  Rows<T> u, delta, z, out, u_grad, delta_grad, z_grad;
  Columns<T> B, C;
  T *A, *D, *bias, *last, *before;                                         // before (chunks, B, N, E), or none
  T *A_grad, *D_grad, *bias_grad, *B_grad, *C_grad;
  long batch, channels, tokens, states, groups, softplus, threads;
};

// out (a gradient in the backward pass) is silu of the convolution of x with `width` weights for each channel, the last of
// which is for the token itself. The gradients of weight (B, E, width) and bias (B, E) are those of each image.
template <class T> struct Convolution {
  Rows<T> x, out, x_grad;
  T *weight, *bias, *weight_grad, *bias_grad;
  long batch, channels, tokens, width, threads;
};

template <class T> struct Types;
template <> struct Types<float> {
  typedef float V __attribute__((vector_size(BYTES)));
  typedef int I __attribute__((vector_size(BYTES)));
  INLINE V between(V low, V x, V high) { return CLAMP(ps, low, x, high); }
  static constexpr int mantissa = 23, bias = 127, root_half = 0x3f3504f3;
  static constexpr float rounder = 12582912, least = -126, most = 128;     // adding the first rounds to whole numbers
  static constexpr float powers[] = {0.693147188f, 0.2402265076f, 0.05550357114f, 0.009618082557f, 0.001339086336f,
                                     0.0001545316295f};
  static constexpr int logarithms = 5;                                     // terms of a series
};
template <> struct Types<double> {
  typedef double V __attribute__((vector_size(BYTES)));
  typedef long I __attribute__((vector_size(BYTES)));
  INLINE V between(V low, V x, V high) { return CLAMP(pd, low, x, high); }
  static constexpr long mantissa = 52, bias = 1023, root_half = 0x3fe6a09e667f3bcd;
  static constexpr double rounder = 6755399441055744, least = -1022, most = 1024;
  static constexpr double powers[] = {0.69314718055994531, 0.24022650695910098, 0.055504108664821594, 0.0096181291076068885,
                                      0.0013333558146416935, 0.0001540353044173605, 1.5252733829836118e-5, 1.321544258792169e-6,
                                      1.0178062445845774e-7, 7.0725859492692237e-9, 4.4549605981865184e-10};
  static constexpr int logarithms = 11;
};

template <class T> struct Kernels {
  using Of = Types<T>;
  using V = typename Of::V;
  using I = typename Of::I;
  static constexpr int LANES = BYTES / sizeof(T);
  static constexpr long PER_SHARE = SHARE / LANES;
  static constexpr T LN2 = 0.693147180559945309, LOG2E = 1.44269504088896341;

  INLINE V load(const T *from, int lanes) {
    V v = {};
    if (lanes == LANES) std::memcpy(&v, from, sizeof v);
    else std::memcpy(&v, from, lanes * sizeof(T));
    return v;
  }

  INLINE void store(T *to, const V &v, int lanes) {
    if (lanes == LANES) std::memcpy(to, &v, sizeof v);
    else std::memcpy(to, &v, lanes * sizeof(T));
  }

  // Numbers of some channels that lie `stride` apart.
  INLINE V gather(const T *from, long stride, int lanes) {
    V v = {};
    for (int lane = 0; lane < lanes; lane++) v[lane] = from[lane * stride];
    return v;
  }

  INLINE void scatter(T *to, long stride, const V &v, int lanes) {
    for (int lane = 0; lane < lanes; lane++) to[lane * stride] = v[lane];
  }

  // 2^x to one unit in the last place or two; not below the least normal number, which takes no longer than others. NaN stays.
  INLINE V power_of_2(V x) {
    x = Of::between(V{} + Of::least, x, V{} + Of::most);
    V whole = x + Of::rounder;
    V scale = (V)(((I)whole << Of::mantissa) + (Of::bias << Of::mantissa));
    V part = x - (whole - Of::rounder);
    constexpr int n = sizeof Of::powers / sizeof(T);
    V power = V{} + Of::powers[n - 1];
    for (int i = n - 2; i >= 0; i--) power = Of::powers[i] + part * power;
    return scale * (1 + part * power);
  }

  INLINE V exponential(V x) { return power_of_2(x * LOG2E); }

  // log(1 + x) of x >= 0, with 1 + x = 2^k (1 + f) and f in (-0.3, 0.42): what rounding 1 + x loses goes into f.
  INLINE V log_1_plus(V x) {
    V sum = 1 + x;
    I doublings = ((I)sum - Of::root_half) >> Of::mantissa;
    V scale = (V)((Of::bias - doublings) << Of::mantissa);                 // 2^-k
    V f = ((V)((I)sum - (doublings << Of::mantissa)) - 1) + (x - (sum - 1)) * scale;
    V s = f / (2 + f), square = s * s, series = V{} + T(1) / (2 * Of::logarithms + 1);
    for (int i = Of::logarithms - 1; i >= 0; i--) series = T(1) / (2 * i + 1) + square * series;
    return __builtin_convertvector(doublings, V) * LN2 + 2 * s * series;
  }

  INLINE V sigmoid(V x) { return 1 / (1 + exponential(-x)); }

  // softplus of x and its slope, from exp(x); from 20 on, PyTorch calls it x.
  INLINE V softplus(V x, V exp) { return x > 20 ? x : log_1_plus(exp); }
  INLINE V softplus_slope(V x, V exp) { return x > 20 ? V{} + 1 : exp / (1 + exp); }

  // Gathers the lanes of two vectors whose number lacks the bit `span` into low, and those that have it into high.
  template <int span>
  INLINE void exchange(const V &a, const V &b, V &low, V &high) {
    V c = {}, d = {};
#ifdef __clang__
    for (int l = 0; l < LANES; l++) c[l] = l & span ? b[l - span] : a[l], d[l] = l & span ? b[l] : a[l + span];
#else
    I lower = {}, upper = {};
    for (int l = 0; l < LANES; l++) lower[l] = l & span ? LANES + l - span : l, upper[l] = l & span ? LANES + l : l + span;
    c = __builtin_shuffle(a, b, lower), d = __builtin_shuffle(a, b, upper);
#endif
    low = c, high = d;
  }

  // Rows become columns.
  template <int span = LANES / 2>
  INLINE void transpose(V *rows) {
    for (int i = 0; i < LANES; i++)
      if (!(i & span)) exchange<span>(rows[i], rows[i + span], rows[i], rows[i + span]);
    if constexpr (span > 1) transpose<span / 2>(rows);
  }

  // Returns the sums over lanes of LANES vectors, side by side; the vectors are overwritten.
  template <int span = LANES / 2>
  INLINE V sums_over_lanes(V *rows) {
    for (int i = 0; i < span; i++) {
      V low, high;
      exchange<span>(rows[i], rows[i + span], low, high);
      rows[i] = low + high;
    }
    if constexpr (span > 1) return sums_over_lanes<span / 2>(rows);
    return rows[0];
  }

  // A chunk of tokens of some channels, a vector for each token. Where tokens lie side by side, LANES of them are transposed at
  // once.
  static void load_rows(const Rows<T> &rows, long b, long channel, long token, int lanes, int tokens, V *to) {
    const T *from = rows.data + b * rows.batch + channel * rows.channel + token * rows.token;
    if (rows.channel == 1)
      for (int t = 0; t < tokens; t++) to[t] = load(from + t * rows.token, lanes);
    else if (rows.token == 1 && lanes == LANES && tokens == CHUNK)
      for (int t = 0; t < CHUNK; t += LANES) {
        for (int lane = 0; lane < LANES; lane++) to[t + lane] = load(from + lane * rows.channel + t, LANES);
        transpose(to + t);
      }
    else
      for (int t = 0; t < tokens; t++) to[t] = gather(from + t * rows.token, rows.channel, lanes);
  }

  static void store_rows(const Rows<T> &rows, long b, long channel, long token, int lanes, int tokens, V *from) {
    T *to = rows.data + b * rows.batch + channel * rows.channel + token * rows.token;
    if (rows.channel == 1)
      for (int t = 0; t < tokens; t++) store(to + t * rows.token, from[t], lanes);
    else if (rows.token == 1 && lanes == LANES && tokens == CHUNK)
      for (int t = 0; t < CHUNK; t += LANES) {
        transpose(from + t);
        for (int lane = 0; lane < LANES; lane++) store(to + lane * rows.channel + t, from[t + lane], LANES);
      }
    else
      for (int t = 0; t < tokens; t++) scatter(to + t * rows.token, rows.channel, from[t], lanes);
  }

  static void load_columns(const Columns<T> &columns, long b, long group, long token, int tokens, int N, T *to) {
    const T *from = columns.data + b * columns.batch + group * columns.group + token * columns.token;
    for (int t = 0; t < tokens; t++)
      for (int n = 0; n < N; n++) to[t * N + n] = from[t * columns.token + n * columns.state];
  }

  // How work is divided: a group's channels into blocks of one vector, and blocks into shares.
  struct Cut {
    long per_group, blocks, shares, chunks;
    explicit Cut(const Scan<T> &scan)
        : per_group(scan.channels / scan.groups), blocks((per_group + LANES - 1) / LANES),
          shares((blocks + PER_SHARE - 1) / PER_SHARE), chunks((scan.tokens + CHUNK - 1) / CHUNK) {}
  };

  static V *workspace(long size) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local long capacity = 0;
    if (capacity < size) {
      memory.reset(new char[size * sizeof(V) + 64]);
      capacity = size;
    }
    return (V *)(((size_t)memory.get() + 63) / 64 * 64);
  }

  // A vector of channels.
  struct Block {
    long channel;
    int lanes;
    V D, bias;
    Block(const Scan<T> &scan, const Cut &cut, long group, long block) {
      channel = group * cut.per_group + block * LANES;
      lanes = cut.per_group - block * LANES < LANES ? cut.per_group - block * LANES : LANES;
      D = scan.D ? load(scan.D + channel, lanes) : V{};
      bias = scan.bias ? load(scan.bias + channel, lanes) : V{};
    }
  };

  // Advances states n to n + S - 1 through a chunk: h goes from before the chunk to its end, and y += C h.
  template <int S>
  INLINE void steps(int n, int N, int tokens, const V *exponents, const T *B, const T *C, const V *delta, const V *x, V *h,
                    V *y) {
    V state[S];
    for (int s = 0; s < S; s++) state[s] = h[n + s];
    for (int t = 0; t < tokens; t++) {
      V sum = y[t];
      for (int s = 0; s < S; s++) {
        state[s] = power_of_2(delta[t] * exponents[n + s]) * state[s] + x[t] * B[t * N + n + s];
        sum += state[s] * C[t * N + n + s];
      }
      y[t] = sum;
    }
    for (int s = 0; s < S; s++) h[n + s] = state[s];
  }

  static void forward(const Scan<T> &scan) {
    const Cut cut(scan);
    const int N = scan.states;
    const long columns = (CHUNK * N + LANES - 1) / LANES;                   // of B and C, in vectors
    #pragma omp parallel num_threads(scan.threads)
    {
      V *states = workspace(2 * PER_SHARE * N + 2 * columns), *exponents = states + PER_SHARE * N;
      T *B = (T *)(exponents + PER_SHARE * N), *C = (T *)((V *)B + columns);
      #pragma omp for collapse(3) schedule(dynamic)
      for (long b = 0; b < scan.batch; b++)
        for (long group = 0; group < scan.groups; group++)
          for (long share = 0; share < cut.shares; share++) {
            const long first = share * PER_SHARE, end = first + PER_SHARE < cut.blocks ? first + PER_SHARE : cut.blocks;
            for (long j = first; j < end; j++) {
              const Block block(scan, cut, group, j);
              for (int n = 0; n < N; n++) {
                exponents[(j - first) * N + n] = gather(scan.A + block.channel * N + n, N, block.lanes) * LOG2E;
                states[(j - first) * N + n] = V{};
              }
            }
            for (long chunk = 0; chunk < cut.chunks; chunk++) {
              const long token = chunk * CHUNK;
              const int tokens = scan.tokens - token < CHUNK ? scan.tokens - token : CHUNK;
              load_columns(scan.B, b, group, token, tokens, N, B);
              load_columns(scan.C, b, group, token, tokens, N, C);
              for (long j = first; j < end; j++) {
                const Block block(scan, cut, group, j);
                V *h = states + (j - first) * N, *exponent = exponents + (j - first) * N;
                T *before = scan.before + ((chunk * scan.batch + b) * N) * scan.channels + block.channel;
                if (scan.before)
                  for (int n = 0; n < N; n++) store(before + n * scan.channels, h[n], block.lanes);
                V delta[CHUNK], x[CHUNK], y[CHUNK];
                load_rows(scan.delta, b, block.channel, token, block.lanes, tokens, delta);
                load_rows(scan.u, b, block.channel, token, block.lanes, tokens, x);
                for (int t = 0; t < tokens; t++) {
                  delta[t] += block.bias;
                  if (scan.softplus) delta[t] = softplus(delta[t], exponential(delta[t]));
                  y[t] = block.D * x[t];
                  x[t] *= delta[t];
                }
                int n = 0;
                for (; n + 4 <= N; n += 4) steps<4>(n, N, tokens, exponent, B, C, delta, x, h, y);
                for (; n < N; n++) steps<1>(n, N, tokens, exponent, B, C, delta, x, h, y);
                if (scan.z.data) {
                  load_rows(scan.z, b, block.channel, token, block.lanes, tokens, x);
                  for (int t = 0; t < tokens; t++) y[t] *= x[t] * sigmoid(x[t]);
                }
                store_rows(scan.out, b, block.channel, token, block.lanes, tokens, y);
              }
            }
            for (long j = first; j < end; j++) {
              const Block block(scan, cut, group, j);
              for (int n = 0; n < N; n++)
                scatter(scan.last + (b * scan.channels + block.channel) * N + n, N, states[(j - first) * N + n], block.lanes);
            }
          }
    }
  }

  // Takes states n to n + S - 1 through a chunk and back. On entry, `carry` is exp(delta A) times the gradient of the state
  // after the chunk; on return, the gradient of the state before it.
  template <int S>
  INLINE void steps_back(int n, int N, int tokens, const V *A, const T *B, const T *C, const V *delta, const V *x, const V *dy,
                         const T *before, long stride, int lanes, V *carry, V *A_grad, V *B_grad, V *C_grad, V *x_grad,
                         V *delta_grad, V *y) {
    V decay[CHUNK][S], state[CHUNK + 1][S], h[S], g[S], sum[S];
    for (int s = 0; s < S; s++) state[0][s] = h[s] = load(before + (n + s) * stride, lanes);
    for (int t = 0; t < tokens; t++)
      for (int s = 0; s < S; s++) {
        decay[t][s] = power_of_2(delta[t] * (A[n + s] * LOG2E));
        state[t + 1][s] = h[s] = decay[t][s] * h[s] + x[t] * B[t * N + n + s];
        y[t] += h[s] * C[t * N + n + s];
      }
    for (int s = 0; s < S; s++) g[s] = carry[n + s], sum[s] = A_grad[n + s];
    for (int t = tokens - 1; t >= 0; t--) {
      V of_x = x_grad[t], of_delta = delta_grad[t];
      for (int s = 0; s < S; s++) {
        const int at = t * N + n + s;
        g[s] += dy[t] * C[at];
        C_grad[at] += dy[t] * state[t + 1][s];
        B_grad[at] += g[s] * x[t];
        of_x += g[s] * B[at];
        g[s] *= decay[t][s];
        V exponent_grad = g[s] * state[t][s];
        of_delta += exponent_grad * A[n + s];
        sum[s] += exponent_grad * delta[t];
      }
      x_grad[t] = of_x;
      delta_grad[t] = of_delta;
    }
    for (int s = 0; s < S; s++) carry[n + s] = g[s], A_grad[n + s] = sum[s];
  }

  static void backward(const Scan<T> &scan) {
    const Cut cut(scan);
    const int N = scan.states;
    const long columns = (CHUNK * N + LANES - 1) / LANES;
    #pragma omp parallel num_threads(scan.threads)
    {
      // A, its gradient, carries, and the gradients of D and bias of every block; B and C, and their gradients in each lane.
      V *A = workspace(PER_SHARE * (3 * N + 2) + 2 * columns + 2 * columns * LANES), *A_grad = A + PER_SHARE * N;
      V *carries = A_grad + PER_SHARE * N, *D_grad = carries + PER_SHARE * N, *bias_grad = D_grad + PER_SHARE;
      T *B = (T *)(bias_grad + PER_SHARE), *C = (T *)((V *)B + columns);
      V *B_grad = (V *)C + columns, *C_grad = B_grad + columns * LANES;
      #pragma omp for collapse(3) schedule(dynamic)
      for (long b = 0; b < scan.batch; b++)
        for (long group = 0; group < scan.groups; group++)
          for (long share = 0; share < cut.shares; share++) {
            const long first = share * PER_SHARE, end = first + PER_SHARE < cut.blocks ? first + PER_SHARE : cut.blocks;
            for (long j = first; j < end; j++) {
              const Block block(scan, cut, group, j);
              const long at = (j - first) * N;
              for (int n = 0; n < N; n++) {
                A[at + n] = gather(scan.A + block.channel * N + n, N, block.lanes);
                A_grad[at + n] = V{};
                carries[at + n] = gather(scan.last + (b * scan.channels + block.channel) * N + n, N, block.lanes);
              }
              D_grad[j - first] = bias_grad[j - first] = V{};
            }
            for (long chunk = cut.chunks - 1; chunk >= 0; chunk--) {
              const long token = chunk * CHUNK;
              const int tokens = scan.tokens - token < CHUNK ? scan.tokens - token : CHUNK;
              load_columns(scan.B, b, group, token, tokens, N, B);
              load_columns(scan.C, b, group, token, tokens, N, C);
              for (long i = 0; i < columns * LANES; i++) B_grad[i] = C_grad[i] = V{};
              for (long j = first; j < end; j++) {
                const Block block(scan, cut, group, j);
                const long at = (j - first) * N;
                auto load_here = [&](const Rows<T> &rows, V *to) {
                  load_rows(rows, b, block.channel, token, block.lanes, tokens, to);
                };
                auto store_here = [&](const Rows<T> &rows, V *from) {
                  store_rows(rows, b, block.channel, token, block.lanes, tokens, from);
                };
                V u[CHUNK], delta[CHUNK], slope[CHUNK], x[CHUNK], y[CHUNK], dy[CHUNK], z[CHUNK], open[CHUNK];
                V out_grad[CHUNK];
                V x_grad[CHUNK] = {}, delta_grad[CHUNK] = {};
                load_here(scan.u, u);
                load_here(scan.delta, delta);
                load_here(scan.out, out_grad);
                if (scan.z.data) load_here(scan.z, z);
                for (int t = 0; t < tokens; t++) {
                  delta[t] += block.bias;
                  if (scan.softplus) {
                    V exp = exponential(delta[t]);
                    slope[t] = softplus_slope(delta[t], exp);
                    delta[t] = softplus(delta[t], exp);
                  } else slope[t] = V{} + 1;
                  x[t] = delta[t] * u[t];
                  y[t] = block.D * u[t];
                  dy[t] = out_grad[t];
                  if (scan.z.data) {
                    open[t] = sigmoid(z[t]);
                    dy[t] *= z[t] * open[t];
                  }
                }
                const T *before = scan.before + chunk * scan.batch * N * scan.channels + b * N * scan.channels + block.channel;
                auto back = [&](auto S, int n) {
                  steps_back<S.value>(n, N, tokens, A + at, B, C, delta, x, dy, before, scan.channels, block.lanes,
                                      carries + at, A_grad + at, B_grad, C_grad, x_grad, delta_grad, y);
                };
                int n = 0;
                for (; n + 4 <= N; n += 4) back(std::integral_constant<int, 4>(), n);
                for (; n < N; n++) back(std::integral_constant<int, 1>(), n);
                V D_sum = {}, bias_sum = {};
                for (int t = 0; t < tokens; t++) {
                  D_sum += dy[t] * u[t];
                  delta_grad[t] = (delta_grad[t] + x_grad[t] * u[t]) * slope[t];
                  bias_sum += delta_grad[t];
                  x_grad[t] = x_grad[t] * delta[t] + block.D * dy[t];      // of u
                }
                D_grad[j - first] += D_sum;
                bias_grad[j - first] += bias_sum;
                store_here(scan.u_grad, x_grad);
                store_here(scan.delta_grad, delta_grad);
                if (scan.z.data) {
                  for (int t = 0; t < tokens; t++) z[t] = out_grad[t] * y[t] * open[t] * (1 + z[t] * (1 - open[t]));
                  store_here(scan.z_grad, z);
                }
              }
              const long to = (((share * scan.batch + b) * scan.groups + group) * scan.tokens + token) * N;
              for (long i = 0; i < tokens * N; i += LANES) {
                const int lanes = tokens * N - i < LANES ? tokens * N - i : LANES;
                store(scan.B_grad + to + i, sums_over_lanes(B_grad + i), lanes);
                store(scan.C_grad + to + i, sums_over_lanes(C_grad + i), lanes);
              }
            }
            for (long j = first; j < end; j++) {
              const Block block(scan, cut, group, j);
              const long channel = b * scan.channels + block.channel;
              for (int n = 0; n < N; n++) scatter(scan.A_grad + channel * N + n, N, A_grad[(j - first) * N + n], block.lanes);
              store(scan.D_grad + channel, D_grad[j - first], block.lanes);
              store(scan.bias_grad + channel, bias_grad[j - first], block.lanes);
            }
          }
    }
  }

  INLINE V load_token(const Rows<T> &rows, long b, long channel, long token, int lanes) {
    const T *from = rows.data + b * rows.batch + channel * rows.channel + token * rows.token;
    return rows.channel == 1 ? load(from, lanes) : gather(from, rows.channel, lanes);
  }

  INLINE void store_token(const Rows<T> &rows, long b, long channel, long token, int lanes, const V &v) {
    T *to = rows.data + b * rows.batch + channel * rows.channel + token * rows.token;
    if (rows.channel == 1) store(to, v, lanes);
    else scatter(to, rows.channel, v, lanes);
  }

  INLINE V convolved(const Convolution<T> &conv, long b, long channel, long token, int lanes, long width, const V *weight,
                     V bias) {
    V sum = bias;
    for (long k = 0; k < width; k++) {
      const long from = token + k + 1 - width;
      if (from >= 0) sum += weight[k] * load_token(conv.x, b, channel, from, lanes);
    }
    return sum;
  }

  // WIDTH is 4, Mamba's number of weights, as a compile-time constant, or 0 for any other number.
  template <int WIDTH>
  static void convolve(const Convolution<T> &conv) {
    const long blocks = (conv.channels + LANES - 1) / LANES, width = WIDTH ? WIDTH : conv.width;
    #pragma omp parallel num_threads(conv.threads)
    {
      V *weight = workspace(width);
      #pragma omp for collapse(2) schedule(dynamic)
      for (long b = 0; b < conv.batch; b++)
        for (long block = 0; block < blocks; block++) {
          const long channel = block * LANES;
          const int lanes = conv.channels - channel < LANES ? conv.channels - channel : LANES;
          for (long k = 0; k < width; k++) weight[k] = gather(conv.weight + channel * width + k, width, lanes);
          const V bias = load(conv.bias + channel, lanes);
          for (long t = 0; t < conv.tokens; t++) {
            V sum = convolved(conv, b, channel, t, lanes, width, weight, bias);
            store_token(conv.out, b, channel, t, lanes, sum * sigmoid(sum));
          }
        }
    }
  }

  // Goes from the last token to the first: the gradient of x at a token comes from that token and the width - 1 that follow it.
  template <int WIDTH>
  static void convolve_backward(const Convolution<T> &conv) {
    const long blocks = (conv.channels + LANES - 1) / LANES, width = WIDTH ? WIDTH : conv.width;
    #pragma omp parallel num_threads(conv.threads)
    {
      V *weight = workspace(3 * width), *weight_grad = weight + width, *recent = weight_grad + width;
      #pragma omp for collapse(2) schedule(dynamic)
      for (long b = 0; b < conv.batch; b++)
        for (long block = 0; block < blocks; block++) {
          const long channel = block * LANES;
          const int lanes = conv.channels - channel < LANES ? conv.channels - channel : LANES;
          for (long k = 0; k < width; k++) {
            weight[k] = gather(conv.weight + channel * width + k, width, lanes);
            weight_grad[k] = recent[k] = V{};
          }
          const V bias = load(conv.bias + channel, lanes);
          V bias_grad = {};
          for (long t = conv.tokens - 1; t >= 0; t--) {
            V sum = convolved(conv, b, channel, t, lanes, width, weight, bias), open = sigmoid(sum);
            V grad = load_token(conv.out, b, channel, t, lanes) * open * (1 + sum * (1 - open));
            bias_grad += grad;
            for (long k = 0; k + 1 < width; k++) recent[k] = recent[k + 1];
            recent[width - 1] = grad;                                      // before it lie those of the tokens that follow
            V x_grad = {};
            for (long k = 0; k < width; k++) {
              const long from = t + k + 1 - width;
              if (from >= 0) weight_grad[k] += grad * load_token(conv.x, b, channel, from, lanes);
              x_grad += weight[k] * recent[k];
            }
            store_token(conv.x_grad, b, channel, t, lanes, x_grad);
          }
          const long at = b * conv.channels + channel;
          for (long k = 0; k < width; k++) scatter(conv.weight_grad + at * width + k, width, weight_grad[k], lanes);
          store(conv.bias_grad + at, bias_grad, lanes);
        }
    }
  }

  static void convolve(const Convolution<T> &conv, bool back) {
    if (back) conv.width == 4 ? convolve_backward<4>(conv) : convolve_backward<0>(conv);
    else conv.width == 4 ? convolve<4>(conv) : convolve<0>(conv);
  }

  // Adds up rows of n numbers, each in the order of the rows: PyTorch's order depends on the number of threads.
  static void sum(const T *rows, T *to, long count, long n, long threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) {
      T total = rows[i];
      for (long row = 1; row < count; row++) total += rows[row * n + i];
      to[i] = total;
    }
  }
};

extern "C" void forward32(const Scan<float> *scan) { Kernels<float>::forward(*scan); }
extern "C" void forward64(const Scan<double> *scan) { Kernels<double>::forward(*scan); }
extern "C" void backward32(const Scan<float> *scan) { Kernels<float>::backward(*scan); }
extern "C" void backward64(const Scan<double> *scan) { Kernels<double>::backward(*scan); }
extern "C" void sum32(const float *rows, float *to, long count, long n, long threads) {
  Kernels<float>::sum(rows, to, count, n, threads);
}
extern "C" void sum64(const double *rows, double *to, long count, long n, long threads) {
  Kernels<double>::sum(rows, to, count, n, threads);
}
extern "C" void convolve32(const Convolution<float> *conv) { Kernels<float>::convolve(*conv, false); }
extern "C" void convolve_backward32(const Convolution<float> *conv) { Kernels<float>::convolve(*conv, true); }
extern "C" void convolve64(const Convolution<double> *conv) { Kernels<double>::convolve(*conv, false); }
extern "C" void convolve_backward64(const Convolution<double> *conv) { Kernels<double>::convolve(*conv, true); }
