/* The operators of a feature map or weight, each one pass over memory: what functional.py computes, the same bits.
 *
 * Compiled by kernels.py when a process asks for it. Tensors are float32 and dense, `rows` of `width` elements in the
 * order of memory; a mask, if any, has `width` elements. Decimal bits come from memory, so nothing waits for a value:
 * one for all, or `channels` of them (a weight: `rows` is 1), of which element i has number (i / inner) % channels.
 *
 * Products with a mask and with powers of two are exact, so their order is free. Compiled without contraction into
 * fused multiply-adds and without -ffast-math: NaN, infinities and signed zeros come out as they do from torch.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Below so many elements starting threads costs more than they save. */
#define PARALLEL (1 << 15)
/* Columns that are summed at a time: their partial sums stay in the first-level cache. */
#define BLOCK 512
/* Elements that are looked at before it is asked whether to go on. */
#define SCAN 8192

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

/* A ReLU where least is 0, as torch has it: NaN and negative zeros pass. */
static inline float at_least(float v, float least) { return v < least ? least : v; }

/* `trunc` as functional.py writes it: v minus its fraction, which makes -0.3 a positive zero. */
static inline float trunc_(float v) { return v - (v - truncf(v)); }
static inline float floor_(float v) { return floorf(v); }
static inline float nearest_(float v) { return rintf(v); } /* ties to even */

/* Element i depends on element i alone, also where `out` is the input: no check for overlap is needed. */
#define SIMD _Pragma("omp simd")

static inline float masked(const float *mask, int64_t i) { return mask ? mask[i] : 1.0f; }

#define QUANTIZE(NAME, ROUND)                                                                                        \
    static void NAME(const float *x, const float *mask, float *out, int64_t rows, int64_t width,                     \
                     const int32_t *decimals, int64_t channels, int64_t inner, float low, float high, float least) { \
        if (channels > 1) {                                                                                          \
            _Pragma("omp parallel for if (rows * width > PARALLEL)")                                                 \
            for (int64_t at = 0; at < rows * width; at += channels * inner)                                          \
                if (inner == 1) {                                                                                    \
                    SIMD                                                                                             \
                    for (int64_t c = 0; c < channels; c++) {                                                         \
                        float v = x[at + c] * (masked(mask, at + c) * power_of_two(decimals[c]));                    \
                        out[at + c] = ROUND(clamp(v, low, high)) * power_of_two(-decimals[c]);                       \
                    }                                                                                                \
                } else                                                                                               \
                    for (int64_t c = 0; c < channels; c++) {                                                         \
                        const float scale = power_of_two(decimals[c]), step = power_of_two(-decimals[c]);            \
                        SIMD for (int64_t i = at + c * inner; i < at + (c + 1) * inner; i++)                         \
                            out[i] = ROUND(clamp(x[i] * (masked(mask, i) * scale), low, high)) * step;               \
                    }                                                                                                \
            return;                                                                                                  \
        }                                                                                                            \
        const float scale = power_of_two(*decimals), step = power_of_two(-*decimals);                                \
        if (mask) {                                                                                                  \
            _Pragma("omp parallel for if (rows * width > PARALLEL)") for (int64_t r = 0; r < rows; r++) {            \
                const float *in = x + r * width;                                                                     \
                float *to = out + r * width;                                                                         \
                SIMD for (int64_t i = 0; i < width; i++)                                                             \
                    to[i] = at_least(ROUND(clamp(in[i] * (mask[i] * scale), low, high)) * step, least);              \
            }                                                                                                        \
        } else {                                                                                                     \
            _Pragma("omp parallel for simd if (parallel : rows * width > PARALLEL)")                                 \
            for (int64_t i = 0; i < rows * width; i++)                                                               \
                out[i] = at_least(ROUND(clamp(x[i] * scale, low, high)) * step, least);                              \
        }                                                                                                            \
    }

QUANTIZE(quantize_trunc, trunc_)
QUANTIZE(quantize_floor, floor_)
QUANTIZE(quantize_nearest, nearest_)

/* Eq. 1, or Eq. 3 and 1. `out` may be x. rounding: 0 trunc, 1 floor, 2 nearest. rectify: with a ReLU behind (one d). */
void quantize(const float *x, const float *mask, float *out, int64_t rows, int64_t width, const int32_t *decimals,
              int64_t channels, int64_t inner, float low, float high, int32_t rounding, int32_t rectify) {
    (rounding == 0 ? quantize_trunc : rounding == 1 ? quantize_floor : quantize_nearest)(
        x, mask, out, rows, width, decimals, channels, inner, low, high, rectify ? 0.0f : -INFINITY);
}

/* Eq. 3. `out` may be x. */
void multiply(const float *x, const float *mask, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const float *in = x + r * width;
        float *to = out + r * width;
        SIMD for (int64_t i = 0; i < width; i++)
            to[i] = in[i] * mask[i];
    }
}

/* Eq. 2 behind a ReLU whose output is `result`, for one d: the gradient of both in one pass. */
void clip_rectified(const float *grad, const float *result, const float *mask, float *out, int64_t rows, int64_t width,
                    const int32_t *decimal, float low, float high) {
    const float step = power_of_two(-*decimal), least = low * step, most = high * step;
#pragma omp parallel for if (rows * width > PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const float *in = grad + r * width, *of = result + r * width;
        float *to = out + r * width;
        if (mask) {
            SIMD for (int64_t i = 0; i < width; i++) {
                const float v = clamp(in[i], least, most); /* read whatever it is: a masked load is slow */
                to[i] = (of[i] <= 0 ? 0.0f : v) * mask[i];
            }
        } else {
            SIMD for (int64_t i = 0; i < width; i++) {
                const float v = clamp(in[i], least, most);
                to[i] = of[i] <= 0 ? 0.0f : v;
            }
        }
    }
}

/* The gradient of a tanh that gave v: as torch compiles it, which may contract it into one instruction. */
static inline float slope_contracted(float v) { return fmaf(-v, v, 1.0f); }
static inline float slope_separate(float v) { return 1.0f - v * v; }

#define CLIP_BEFORE_TANH(NAME, SLOPE)                                                                                 \
    static void NAME(const float *grad, const float *result, const float *mask, float *out, int64_t rows,            \
                     int64_t width, float least, float most) {                                                       \
        if (mask) {                                                                                                  \
            _Pragma("omp parallel for if (rows * width > PARALLEL)") for (int64_t r = 0; r < rows; r++) {            \
                const float *in = grad + r * width, *of = result + r * width;                                        \
                float *to = out + r * width;                                                                         \
                SIMD for (int64_t i = 0; i < width; i++)                                                             \
                    to[i] = clamp(in[i], least, most) * mask[i] * SLOPE(of[i]);                                      \
            }                                                                                                        \
        } else {                                                                                                     \
            _Pragma("omp parallel for simd if (parallel : rows * width > PARALLEL)")                                 \
            for (int64_t i = 0; i < rows * width; i++)                                                               \
                out[i] = clamp(grad[i], least, most) * SLOPE(result[i]);                                             \
        }                                                                                                            \
    }

CLIP_BEFORE_TANH(clip_before_contracted, slope_contracted)
CLIP_BEFORE_TANH(clip_before_separate, slope_separate)

/* Eq. 2, then through the tanh in front of the operators, whose output is `result`, for one d: one pass. */
void clip_before_tanh(const float *grad, const float *result, const float *mask, float *out, int64_t rows,
                      int64_t width, const int32_t *decimal, float low, float high, int32_t contracted) {
    const float step = power_of_two(-*decimal);
    (contracted ? clip_before_contracted : clip_before_separate)(grad, result, mask, out, rows, width, low * step,
                                                                 high * step);
}

/* Eq. 2 as the authors coded it: the gradient clamped to the grid's range, then masked. */
void clip_gradient(const float *grad, const float *mask, float *out, int64_t rows, int64_t width,
                   const int32_t *decimals, int64_t channels, int64_t inner, float low, float high) {
    if (channels > 1) {
#pragma omp parallel for if (rows * width > PARALLEL)
        for (int64_t at = 0; at < rows * width; at += channels * inner)
            if (inner == 1) {
                SIMD for (int64_t c = 0; c < channels; c++) {
                    const float step = power_of_two(-decimals[c]);
                    out[at + c] = clamp(grad[at + c], low * step, high * step) * masked(mask, at + c);
                }
            } else
                for (int64_t c = 0; c < channels; c++) {
                    const float step = power_of_two(-decimals[c]), least = low * step, most = high * step;
                    SIMD for (int64_t i = at + c * inner; i < at + (c + 1) * inner; i++)
                        out[i] = clamp(grad[i], least, most) * masked(mask, i);
                }
        return;
    }
    const float step = power_of_two(-*decimals), least = low * step, most = high * step;
    if (mask) {
#pragma omp parallel for if (rows * width > PARALLEL)
        for (int64_t r = 0; r < rows; r++) {
            const float *in = grad + r * width;
            float *to = out + r * width;
            SIMD for (int64_t i = 0; i < width; i++)
                to[i] = clamp(in[i], least, most) * mask[i];
        }
    } else {
#pragma omp parallel for simd if (parallel : rows * width > PARALLEL)
        for (int64_t i = 0; i < rows * width; i++)
            out[i] = clamp(grad[i], least, most);
    }
}

/* Whether `clip_gradient` would change a bit of grad, for one d. A gradient that comes through a ReLU is zero already
 * where the mask is, and gradients seldom reach the range's end: then nothing need be written. */
int32_t changes_gradient(const float *grad, const float *mask, int64_t rows, int64_t width, const int32_t *decimal,
                         float low, float high) {
    const float step = power_of_two(-*decimal), least = low * step, most = high * step;
    int32_t found = 0;
#pragma omp parallel for collapse(2) if (rows * width > PARALLEL)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t at = 0; at < width; at += SCAN) {
            int32_t here, changed = 0;
            __atomic_load(&found, &here, __ATOMIC_RELAXED);
            if (here)
                continue;
            const float *in = grad + r * width;
            const int64_t end = width - at < SCAN ? width : at + SCAN;
            for (int64_t i = at; i < end; i++) {
                float v = clamp(in[i], least, most) * masked(mask, i);
                int32_t before, after;
                memcpy(&before, in + i, sizeof before);
                memcpy(&after, &v, sizeof after);
                changed |= before ^ after;
            }
            if (changed)
                __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
        }
    return found;
}

/* Sum of |x| over the rows, added to `total` (width): in the order in which torch sums the outer dimension of float64
 * tensors on a CPU, a cascade of four levels (ATen's SumKernel.cpp, multi_row_sum), so that the bits are the same. */
void add_magnitudes(const float *x, double *total, int64_t rows, int64_t width) {
    int power = 0;
    while ((int64_t)1 << power < rows)
        power++;
    power = power / 4 > 4 ? power / 4 : 4;
    const int64_t step = (int64_t)1 << power;
#pragma omp parallel for if (rows * width > PARALLEL)
    for (int64_t at = 0; at < width; at += BLOCK) {
        const int64_t size = width - at < BLOCK ? width - at : BLOCK;
        double level[4][BLOCK] = {{0}};
        for (int64_t r = 0; r < rows;) {
            const float *in = x + r * width + at;
            SIMD for (int64_t i = 0; i < size; i++)
                level[0][i] += (double)fabsf(in[i]);
            if (++r % step)
                continue;
            for (int l = 1; l < 4; l++) {
                SIMD for (int64_t i = 0; i < size; i++) {
                    level[l][i] += level[l - 1][i];
                    level[l - 1][i] = 0;
                }
                if (r & ((step - 1) << (l * power)))
                    break;
            }
        }
        SIMD for (int64_t i = 0; i < size; i++)
            total[at + i] += level[0][i] + level[1][i] + level[2][i] + level[3][i];
    }
}

#define SQUARED_ERRORS(NAME, ROUND)                                                                                  \
    static double NAME(const float *x, int64_t size, float scale, float step, float low, float high) {               \
        double sum = 0;                                                                                              \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < size; i++) {                                  \
            const double error = (double)(ROUND(clamp(x[i] * scale, low, high)) * step - x[i]);                      \
            sum += error * error;                                                                                    \
        }                                                                                                            \
        return sum;                                                                                                  \
    }

SQUARED_ERRORS(errors_of_trunc, trunc_)
SQUARED_ERRORS(errors_of_floor, floor_)
SQUARED_ERRORS(errors_of_nearest, nearest_)

/* Sum of (Q(x, d) - x)^2 for each of `count` decimals d; equal errors have equal sums. `sums` has rows of `count`: the
 * first is the result, and one for each `part` elements of x, which are summed by themselves and then in their order,
 * so that the number of threads does not show. */
void squared_errors(const float *x, double *sums, int64_t size, int64_t part, const int32_t *decimals, int64_t count,
                    float low, float high, int32_t rounding) {
    double (*const sum)(const float *, int64_t, float, float, float, float) =
        rounding == 0 ? errors_of_trunc : rounding == 1 ? errors_of_floor : errors_of_nearest;
#pragma omp parallel for if (size * count > PARALLEL)
    for (int64_t at = 0; at < size; at += part)
        for (int64_t k = 0; k < count; k++)
            sums[(1 + at / part) * count + k] = sum(x + at, size - at < part ? size - at : part,
                                                    power_of_two(decimals[k]), power_of_two(-decimals[k]), low, high);
    for (int64_t k = 0; k < count; k++) {
        sums[k] = 0;
        for (int64_t at = 0; at < size; at += part)
            sums[k] += sums[(1 + at / part) * count + k];
    }
}
