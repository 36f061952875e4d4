/* Group normalization of channels-last pictures, with the addition before it and the SiLU after it in the same two passes
 * ("Group Normalization", arXiv 1803.08494), and the gate of feed-forward layers. Channels must fill whole vectors.
 */
#include "vector.h"

/* Vectors of channels summed side by side; pixels whose sum one float32 carries; pixels from which the mean is guessed. */
enum { BLOCK = 4, PIXELS = 1024, SAMPLES = 16 };

static inline vec silu_of(vec x) { return x / (exp2_of(x * -1.44269504f) + 1); }

/* The mean of a few pixels, channel by channel: a number near all of them, which no single one of them can draw away. */
static void guess_mean(const element *x, float *pivot, int64_t pixels, int64_t channels) {
    int64_t samples = pixels < SAMPLES ? pixels : SAMPLES;
    for (int64_t c = 0; c < channels; c += LANES) {
        vec sum = splat(0);
        for (int64_t k = 0; k < samples; k++) sum += LOAD(x + k * pixels / samples * channels + c);
        store(pivot + c, sum / (float)samples);
    }
}

/* Sums of (x - pivot) and of its square over `count` pixels, channel by channel; the pivot keeps the squares from cancelling. */
static void sum_channels(const element *x, const float *pivot, float *sums, int64_t count, int64_t channels) {
    for (int64_t c = 0; c < channels; c += BLOCK * LANES) {
        int64_t vectors = (channels - c) / LANES < BLOCK ? (channels - c) / LANES : BLOCK;
        vec sum[BLOCK] = {0}, square[BLOCK] = {0}, from[BLOCK] = {0};
        for (int64_t j = 0; j < vectors; j++) from[j] = load(pivot + c + j * LANES);
        if (vectors == BLOCK)
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < BLOCK; j++) {
                    vec d = LOAD(x + i * channels + c + j * LANES) - from[j];
                    sum[j] += d, square[j] += d * d;
                }
        else
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < vectors; j++) {
                    vec d = LOAD(x + i * channels + c + j * LANES) - from[j];
                    sum[j] += d, square[j] += d * d;
                }
        for (int64_t j = 0; j < vectors; j++) {
            store(sums + c + j * LANES, sum[j]);
            store(sums + channels + c + j * LANES, square[j]);
        }
    }
}

/* From the sums of every part of a picture to what each channel is multiplied by and what is added to it. */
static void scale_and_shift(const float *pivot, const float *sums, const float *added, const float *weight, const float *bias,
                            float *scale, int64_t parts, int64_t pixels, int64_t channels, int64_t groups, double eps) {
    int64_t width = channels / groups;
    float *shift = scale + channels;
    for (int64_t g = 0; g < groups; g++) {
        double total = 0, squares = 0;
        /* All channels of a group around one number: its first pivot. */
        double centre = (double)pivot[g * width] + (added ? added[g * width] : 0);
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
            double sum = 0, square = 0, offset = (double)pivot[c] + (added ? added[c] : 0) - centre;
            for (int64_t k = 0; k < parts; k++) sum += sums[2 * k * channels + c], square += sums[(2 * k + 1) * channels + c];
            total += sum + pixels * offset;
            squares += square + 2 * offset * sum + pixels * offset * offset;
        }
        double count = (double)pixels * width, mean = total / count, variance = squares / count - mean * mean;
        double inverse = 1 / sqrt((variance > 0 || variance != variance ? variance : 0) + eps);
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
            scale[c] = weight[c] * inverse;
            shift[c] = bias[c] + ((added ? added[c] : 0) - centre - mean) * weight[c] * inverse;
        }
    }
}

/* out = activation(group_norm(x + added)); x and out (batch, pixels, channels), added (batch, channels) or NULL, weight and bias
 * (channels,) float32. Returns 0, or 1 where memory ran out. */
int group_norm(const element *x, const float *added, const float *weight, const float *bias, element *out, int64_t batch,
               int64_t pixels, int64_t channels, int64_t groups, double eps, int64_t silu) {
    int64_t parts = (pixels + PIXELS - 1) / PIXELS;
    float *sums = malloc(sizeof(float) * batch * (2 * parts + 3) * channels);
    if (!sums) return 1;
    float *scales = sums + batch * parts * 2 * channels, *pivots = scales + batch * 2 * channels;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; b++) guess_mean(x + b * pixels * channels, pivots + b * channels, pixels, channels);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * parts; task++) {
            int64_t b = task / parts, from = task % parts * PIXELS;
            int64_t count = pixels - from < PIXELS ? pixels - from : PIXELS;
            sum_channels(x + (b * pixels + from) * channels, pivots + b * channels, sums + task * 2 * channels, count, channels);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; b++)
            scale_and_shift(pivots + b * channels, sums + b * parts * 2 * channels, added ? added + b * channels : NULL, weight,
                            bias, scales + b * 2 * channels, parts, pixels, channels, groups, eps);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * pixels; i++) {
            const float *scale = scales + i / pixels * 2 * channels, *shift = scale + channels;
            const element *from = x + i * channels;
            element *to = out + i * channels;
            if (silu)
                for (int64_t c = 0; c < channels; c += LANES) STORE(to + c, silu_of(LOAD(from + c) * load(scale + c) + load(shift + c)));
            else
                for (int64_t c = 0; c < channels; c += LANES) STORE(to + c, LOAD(from + c) * load(scale + c) + load(shift + c));
        }
    }
    free(sums);
    return 0;
}

/* GELU(x) = x (1 + erf(x / sqrt 2)) / 2, erf by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7). */
static inline vec gelu_of(vec x) {
    vec z = x * 0.70710678f;
    ivec negative = z < 0;
    vec size = (vec)((ivec)z & 0x7fffffff);
    vec t = 1 / (1 + 0.3275911f * size);
    vec tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t *
               exp2_of(size * size * -1.44269504f);
    /* tail = 1 - erf(|z|): of both signs the small one is computed without cancelling */
    vec share = (vec)(((ivec)(tail * 0.5f) & negative) | ((ivec)(1 - tail * 0.5f) & ~negative));
    return x * share;
}

/* out = x[:, :width] * GELU(x[:, width:]); x (rows, 2 width), out (rows, width). "GLU Variants Improve Transformer", arXiv 2002.05202 */
void geglu(const element *x, element *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const element *value = x + i * 2 * width, *gate = value + width;
        for (int64_t c = 0; c < width; c += LANES) STORE(out + i * width + c, LOAD(value + c) * gelu_of(LOAD(gate + c)));
    }
}
