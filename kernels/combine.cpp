// Several weighted sums of several arrays in one pass over memory; native.py compiles and calls it.
//
// The arrays are cut into blocks that stay in the first-level cache: every input comes from memory once, and the sums read
// it there. 16-bit numbers are widened to fp32 block by block, summed, and rounded to nearest even, once. The loops
// are plain enough to be vectorised, but for conversions that compilers leave scalar.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 1024;
constexpr int kMost = 8;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline void widen(const BFloat16* __restrict x, float* __restrict out, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t bits = static_cast<uint32_t>(x[k].bits) << 16;
    std::memcpy(out + k, &bits, 4);
  }
}

inline void narrow(const float* __restrict x, BFloat16* __restrict out, int64_t count) {
  int64_t k = 0;
#ifdef __AVX2__
  const __m256i low = _mm256_set1_epi32(1), bias = _mm256_set1_epi32(0x7FFF), quiet = _mm256_set1_epi32(0x400000);
  const auto half = [&](const float* p) {
    const __m256 value = _mm256_loadu_ps(p);
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), low);
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(bias, odd));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(bits, quiet), nan), 16);
  };
  for (; k + 16 <= count; k += 16) {
    const __m256i packed = _mm256_packus_epi32(half(x + k), half(x + k + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), _mm256_permute4x64_epi64(packed, 0xD8));
  }
#endif
  for (; k < count; ++k) {
    uint32_t bits;
    std::memcpy(&bits, x + k, 4);
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;  // rounding could carry it over to infinity
    out[k].bits = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}

inline void widen(const Half* __restrict x, float* __restrict out, int64_t count) {
  int64_t k = 0;
#ifdef __F16C__
  for (; k + 8 <= count; k += 8)
    _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k))));
#endif
  for (; k < count; ++k) {
    _Float16 value;
    std::memcpy(&value, x + k, 2);
    out[k] = static_cast<float>(value);
  }
}

inline void narrow(const float* __restrict x, Half* __restrict out, int64_t count) {
  int64_t k = 0;
#ifdef __F16C__
  for (; k + 8 <= count; k += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm256_cvtps_ph(_mm256_loadu_ps(x + k), 0));
#endif
  for (; k < count; ++k) {
    const _Float16 value = static_cast<_Float16>(x[k]);
    std::memcpy(out + k, &value, 2);
  }
}

// The number of terms is known to the compiler, so that the sum is one loop.
template <typename A, int N>
void sum(const A* const* in, A* __restrict out, const A* c, int64_t count) {
  const A* x[N];
  A f[N];
  std::copy(in, in + N, x);
  std::copy(c, c + N, f);
#pragma GCC ivdep
  for (int64_t k = 0; k < count; ++k) {
    A total = f[0] * x[0][k];
    for (int j = 1; j < N; ++j) total += f[j] * x[j][k];
    out[k] = total;
  }
}

template <typename A>
void sum(int n, const A* const* in, A* out, const A* c, int64_t count) {
  switch (n) {
    case 0: return std::fill(out, out + count, A(0));
    case 1: return sum<A, 1>(in, out, c, count);
    case 2: return sum<A, 2>(in, out, c, count);
    case 3: return sum<A, 3>(in, out, c, count);
    case 4: return sum<A, 4>(in, out, c, count);
    case 5: return sum<A, 5>(in, out, c, count);
    case 6: return sum<A, 6>(in, out, c, count);
    case 7: return sum<A, 7>(in, out, c, count);
    case 8: return sum<A, 8>(in, out, c, count);
  }
}

// The terms of each sum; a coefficient of 0 is no term.
template <typename A>
struct Sums {
  int count[kMost] = {};
  int index[kMost][kMost];
  A factor[kMost][kMost];

  Sums(int n, int m, const double* coefs) {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j)
        if (coefs[i * n + j] != 0.0) {
          index[i][count[i]] = j;
          factor[i][count[i]++] = static_cast<A>(coefs[i * n + j]);
        }
  }

  void operator()(int i, const A* const* x, A* out, int64_t size) const {
    const A* terms[kMost];
    for (int j = 0; j < count[i]; ++j) terms[j] = x[index[i][j]];
    sum(count[i], terms, out, factor[i], size);
  }
};

template <typename T, typename A>
void combine(int64_t numel, int n, const void* const* in, int m, void* const* out, const double* coefs, int threads) {
  const Sums<A> sums(n, m, coefs);
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = b * kBlock, count = std::min(kBlock, numel - start);
    const A* x[kMost];
    if constexpr (std::is_same_v<T, A>) {
      for (int j = 0; j < n; ++j) x[j] = static_cast<const T*>(in[j]) + start;
      for (int i = 0; i < m; ++i) sums(i, x, static_cast<T*>(out[i]) + start, count);
    } else {
      alignas(64) A wide[kMost + 1][kBlock];
      for (int j = 0; j < n; ++j) {
        widen(static_cast<const T*>(in[j]) + start, wide[j], count);
        x[j] = wide[j];
      }
      for (int i = 0; i < m; ++i) {
        sums(i, x, wide[kMost], count);
        narrow(wide[kMost], static_cast<T*>(out[i]) + start, count);
      }
    }
  }
}

}  // namespace

// type: 0 fp32, 1 float64, 2 fp16, 3 bf16. At most kMost inputs and outputs; outputs overlap nothing.
extern "C" void fewstep_combine(int type, int64_t numel, int n, const void* const* in, int m, void* const* out,
                                const double* coefs, int threads) {
  switch (type) {
    case 0: return combine<float, float>(numel, n, in, m, out, coefs, threads);
    case 1: return combine<double, double>(numel, n, in, m, out, coefs, threads);
    case 2: return combine<Half, float>(numel, n, in, m, out, coefs, threads);
    case 3: return combine<BFloat16, float>(numel, n, in, m, out, coefs, threads);
  }
}
