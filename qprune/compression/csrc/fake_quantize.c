/* Eq. 1 to 3 in one pass over memory each: the bits that fake_quantize.py computes with torch's functions.
 *
 * Compiled by native.py. Tensors are float32 and dense: `rows` of `width` elements in the order of memory; a mask, if
 * any, has `width` elements. Fraction bits are read from memory, so nothing waits for a value: one for all, or
 * `channels` of them (a weight: `rows` is 1), of which element i has number (i / inner) % channels.
 *
 * Products with a mask and with powers of two are exact, so their order is free. Compiled without contraction into
 * fused multiply-adds and without -ffast-math: NaN, infinities and signed zeros are those of torch.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Below this many elements, starting threads costs more than it saves. */
#define PARALLEL (1 << 15)
#define SIMD _Pragma("omp simd")

static inline float power_of_two(int32_t exponent) {
    int32_t bits = (int32_t)((uint32_t)(exponent + 127) << 23);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* As torch clamps: NaN passes. */
static inline float clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* `trunc` as fake_quantize.py writes it, v minus its fraction, which makes -0.3 a positive zero. */
static inline float trunc_(float v) { return v - (v - truncf(v)); }
static inline float floor_(float v) { return floorf(v); }
static inline float nearest_(float v) { return rintf(v); } /* ties to even */
static inline float none_(float v) { return v; }

/* out = ROUND(clamp(in * (mask * SCALE(d)), low * LIMIT(d), high * LIMIT(d))) * STEP(d), or with the mask last. */
#define ONE(d) 1.0f
#define UP(d) power_of_two(d)
#define DOWN(d) power_of_two(-(d))

#define PASS(NAME, ROUND, SCALE, LIMIT, STEP, FIRST, LAST)                                                           \
    static void NAME(const float *x, const float *mask, float *out, int64_t rows, int64_t width,                     \
                     const int32_t *decimals, int64_t channels, int64_t inner, float low, float high) {              \
        if (channels == 1) {                                                                                         \
            const float scale = SCALE(*decimals), step = STEP(*decimals);                                            \
            const float least = low * LIMIT(*decimals), most = high * LIMIT(*decimals);                              \
            if (mask) {                                                                                              \
                _Pragma("omp parallel for if (rows * width > PARALLEL)") for (int64_t r = 0; r < rows; r++)          \
                    SIMD for (int64_t i = 0; i < width; i++) {                                                       \
                        const int64_t at = r * width + i;                                                            \
                        out[at] = LAST(ROUND(clamp(x[at] * FIRST(scale, mask[i]), least, most)) * step, mask[i]);    \
                    }                                                                                                \
            } else {                                                                                                 \
                _Pragma("omp parallel for simd if (parallel : rows * width > PARALLEL)")                             \
                for (int64_t i = 0; i < rows * width; i++)                                                           \
                    out[i] = ROUND(clamp(x[i] * scale, least, most)) * step;                                         \
            }                                                                                                        \
            return;                                                                                                  \
        }                                                                                                            \
        _Pragma("omp parallel for if (rows * width > PARALLEL)")                                                     \
        for (int64_t block = 0; block < rows * width / inner; block++) {                                             \
            const int32_t d = decimals[block % channels];                                                            \
            const float scale = SCALE(d), step = STEP(d), least = low * LIMIT(d), most = high * LIMIT(d);            \
            SIMD for (int64_t i = block * inner; i < (block + 1) * inner; i++) {                                     \
                const float m = mask ? mask[i] : 1.0f;                                                               \
                out[i] = LAST(ROUND(clamp(x[i] * FIRST(scale, m), least, most)) * step, m);                          \
            }                                                                                                        \
        }                                                                                                            \
    }

#define TIMES(a, m) ((a) * (m))
#define ALONE(a, m) (a)

PASS(quantize_trunc, trunc_, UP, ONE, DOWN, TIMES, ALONE)
PASS(quantize_floor, floor_, UP, ONE, DOWN, TIMES, ALONE)
PASS(quantize_nearest, nearest_, UP, ONE, DOWN, TIMES, ALONE)
PASS(clip, none_, ONE, DOWN, ONE, ALONE, TIMES)

/* Eq. 1 and 3, or with `kind` 3 the gradient of Eq. 2: 0 trunc, 1 floor, 2 nearest, 3 clip. */
void apply(const float *x, const float *mask, float *out, int64_t rows, int64_t width, const int32_t *decimals,
           int64_t channels, int64_t inner, float low, float high, int32_t kind) {
    (kind == 0 ? quantize_trunc : kind == 1 ? quantize_floor : kind == 2 ? quantize_nearest : clip)(
        x, mask, out, rows, width, decimals, channels, inner, low, high);
}
