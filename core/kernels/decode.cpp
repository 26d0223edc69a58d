// What a new token costs on a CPU, in fp32: linear layers and attention for few rows, whose time goes into reading weights, keys
// and values. native.py compiles this for the processor it finds.

#include <math.h>

constexpr long LANES = 16, WIDTH = 32, VECTORS = WIDTH / LANES, ROWS = 8;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

static inline Vector& at(float* p) { return *(Vector*)p; }
static inline const Vector& at(const float* p) { return *(const Vector*)p; }

// A block of weights times M rows of x
template <int M>
static void rows(const float* x, const float* w, const float* b, float* y, long N, long K) {
  Vector sum[M][VECTORS];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VECTORS; v++) sum[m][v] = b ? at(b + LANES * v) : Vector{};
  for (long k = 0; k < K; k++, w += WIDTH)
    for (int v = 0; v < VECTORS; v++) {
      const Vector weights = at(w + LANES * v);
      for (int m = 0; m < M; m++) sum[m][v] += weights * x[m * K + k];
    }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VECTORS; v++) at(y + m * N + LANES * v) = sum[m][v];
}

typedef void Rows(const float*, const float*, const float*, float*, long, long);
static Rows* const FOR_ROWS[ROWS] = {rows<1>, rows<2>, rows<3>, rows<4>, rows<5>, rows<6>, rows<7>, rows<8>};

// y = x Wᵀ + b: x (M, K), b (N,) or null, y (M, N), N a multiple of WIDTH.
//
// W comes in blocks of WIDTH outputs, (N / WIDTH, K, WIDTH), so that each thread reads its part in one stream, as memory is
// fastest, and no sum over a vector's elements is needed. Up to ROWS rows share what is read; for more, the weights of a block,
// WIDTH K floats, are read again, from a cache.
extern "C" void linear(const float* x, const float* w, const float* b, float* y, long M, long N, long K) {
#pragma omp parallel for schedule(static)
  for (long n = 0; n < N; n += WIDTH)
    for (long m = 0; m < M; m += ROWS)
      FOR_ROWS[(M - m < ROWS ? M - m : ROWS) - 1](x + m * K, w + n * K, b ? b + n : nullptr, y + m * N + n, N, K);
}

static inline float total(Vector a) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
}

// softmax(q kᵀ scale) v of one query and S keys, D = W LANES
template <int W>
static void head(const float* q, const float* k, const float* v, float* p, float* y, long S, float scale) {
  constexpr long D = W * LANES;
  float most = -INFINITY, sum = 0;
  for (long s = 0; s < S; s++) {
    Vector product{};
    for (int w = 0; w < W; w++) product += at(q + LANES * w) * at(k + s * D + LANES * w);
    p[s] = scale * total(product);
    most = p[s] > most ? p[s] : most;
  }
  for (long s = 0; s < S; s++) sum += p[s] = expf(p[s] - most);
  Vector mean[W] = {};
  for (long s = 0; s < S; s++)
    for (int w = 0; w < W; w++) mean[w] += p[s] * at(v + s * D + LANES * w);
  for (int w = 0; w < W; w++) at(y + LANES * w) = mean[w] / sum;
}

typedef void Head(const float*, const float*, const float*, float*, float*, long, float);
static Head* const FOR_WIDTH[] = {head<1>, head<2>, head<3>, head<4>, head<5>, head<6>, head<7>, head<8>};

// Attention of one query of each of N heads to the head's S keys: q, y (N, D), p (N, S) for what lies between, keys and values
// (N, at least S, D), a head's `stride` floats behind the one's before, D a multiple of LANES up to 8 LANES.
extern "C" void attend(
    const float* q, const float* k, const float* v, float* p, float* y, long N, long S, long D, long stride, float scale) {
#pragma omp parallel for schedule(static)
  for (long n = 0; n < N; n++)
    FOR_WIDTH[D / LANES - 1](q + n * D, k + n * stride, v + n * stride, p + n * S, y + n * D, S, scale);
}
