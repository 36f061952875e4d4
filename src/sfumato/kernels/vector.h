/* Vectors of floats in the compiler's own terms (GCC and Clang vector extensions): one source for AVX-512, AVX2, NEON.
 *
 * Elements in memory are `element`: float, or bfloat16 as uint16_t when BFLOAT16 is defined. Arithmetic is float32.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#if defined(__AVX512DQ__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

static inline vec splat(float x) { return (vec){} + x; }

static inline vec load(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float *p, vec x) { memcpy(p, &x, sizeof x); }

static inline vec load_bf16(const uint16_t *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, ivec) << 16);
}

/* Round to nearest, ties to even; a NaN stays one. */
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void store_bf16(uint16_t *p, vec x) {
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)x);
#else
    ivec bits = (ivec)x;
    ivec rounded = bits + 0x7fff + (bits >> 16 & 1);
    ivec nan = bits | 0x400000;
    ivec is_nan = x != x;
    hvec h = __builtin_convertvector(((rounded & ~is_nan) | (nan & is_nan)) >> 16, hvec);
#endif
    memcpy(p, &h, sizeof h);
}

/* The larger and the smaller; where one is NaN, the second. */
static inline vec vmax(vec a, vec b) {
#ifdef __AVX512DQ__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
#endif
}

static inline vec vmin(vec a, vec b) { return -vmax(-a, -b); }

static inline float sum_of(vec x) {
#ifdef __AVX512DQ__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

static inline float max_of(vec x) {
#ifdef __AVX512DQ__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

/* 2**x; below -126 it is 2**-126 or 0, and a NaN stays one. The integer part goes into the exponent, the rest f in
 * [-1/2, 1/2] through a polynomial: for float32 the Taylor series of exp(f ln 2), relative error below 2e-7; for bfloat16, which
 * keeps eight bits, the minimax cubic, below 1e-4. */
static inline vec exp2_of(vec x) {
#ifdef __AVX512DQ__
    vec whole = (vec)_mm512_roundscale_ps((__m512)x, 0);
    vec f = (vec)_mm512_reduce_ps((__m512)x, 0); /* x - whole, and 0 for infinities */
#else
    x = vmin(splat(128.0f), vmax(splat(-126.0f), x));
    const vec magic = splat(12582912.0f); /* 1.5 * 2**23: adding it rounds to an integer */
    vec whole = (x + magic) - magic, f = x - whole;
#endif
#ifdef BFLOAT16
    vec y = splat(0.05517166f);
    y = y * f + splat(0.24261112f);
    y = y * f + splat(0.69326097f);
    y = y * f + splat(0.99992807f);
#else
    vec y = splat(1.5403530e-4f);
    y = y * f + splat(1.3333558e-3f);
    y = y * f + splat(9.6181291e-3f);
    y = y * f + splat(5.5504109e-2f);
    y = y * f + splat(2.4022651e-1f);
    y = y * f + splat(6.9314718e-1f);
    y = y * f + splat(1.0f);
#endif
#ifdef __AVX512DQ__
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    return (vec)((ivec)y + (__builtin_convertvector(whole, ivec) << 23));
#endif
}

#ifdef BFLOAT16
typedef uint16_t element;
#define LOAD load_bf16
#define STORE store_bf16
static inline float get(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
#define PUT to_bf16
#else
typedef float element;
#define LOAD load
#define STORE store
static inline float get(element x) { return x; }
static inline element PUT(float x) { return x; }
#endif
