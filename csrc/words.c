/* SPDX-License-Identifier: MIT */
/*
 * The loops that a compiler does not get right for every processor by itself:
 *   - the number of bits set.  Plain x86-64 has no instruction for it, later
 *     ones have one for a word and then one for a vector, 5 and 20 times as fast;
 *   - which words are not zero.  Compilers make no masks of comparisons, though
 *     vector instructions do, in a small part of the time.
 *
 * So there are clones of the loops, and the best that the processor has are
 * taken when the library is loaded.  Not by `target_clones`, whose resolvers run
 * before a sanitizer is up, and which musl and macOS do not know.
 *
 * What words.h says of threads holds for vectors as well: they tear no byte.
 */
#include <stdlib.h>

#include "words.h"

static uint64_t hb_popcount_plain(const hb_word *words, uint64_t n)
{
    const hb_plain *w = (const hb_plain *)words;
    uint64_t sum = 0;

    for (uint64_t i = 0; i < n; i++) {
        sum += hb_popcount(w[i]);
    }
    return sum;
}

/* This and its clones: see hb_copy_nonzero; or hb_nonzero, if `to` is NULL. */
static uint64_t hb_copy_plain(hb_word *to, const void *from, uint64_t n)
{
    const hb_loose *w = from;
    uint64_t all = UINT64_MAX, any = 0, mask = 0;

    if (to) {
        hb_copy_words(to, from, n);
        /* What is there now is looked at; no compiler may take it from `from`. */
        atomic_signal_fence(memory_order_seq_cst);
        w = (const hb_loose *)to;
    }
    /* As a rule none is zero, as the highest bit tells, or all are. */
    for (uint64_t i = 0; i < n; i++) {
        uint64_t word = w[i];

        all &= word | (0 - word);
        any |= word;
    }
    if (all >> 63) {
        return UINT64_MAX >> (64 - n);
    }
    if (!any) {
        return 0;
    }
    for (uint64_t i = n; i-- > 0;) {
        mask = 2 * mask + (w[i] != 0);
    }
    return mask;
}

#ifdef HB_CLONES
#include <immintrin.h>

__attribute__((target("popcnt")))
static uint64_t hb_popcount_popcnt(const hb_word *words, uint64_t n)
{
    const hb_plain *w = (const hb_plain *)words;
    /* Four, since one addition would wait for the other. */
    uint64_t sum[4] = { 0 }, i = 0;

    for (; i + 4 <= n; i += 4) {
        for (unsigned k = 0; k < 4; k++) {
            sum[k] += (unsigned)__builtin_popcountll(w[i + k]);
        }
    }
    for (; i < n; i++) {
        sum[0] += (unsigned)__builtin_popcountll(w[i]);
    }
    return sum[0] + sum[1] + sum[2] + sum[3];
}

__attribute__((target("avx512f,avx512vl,avx512vpopcntdq,popcnt")))
static uint64_t hb_popcount_avx512(const hb_word *words, uint64_t n)
{
    const hb_plain *w = (const hb_plain *)words;
    uint64_t sum = 0;

    for (uint64_t i = 0; i < n; i++) {
        sum += (unsigned)__builtin_popcountll(w[i]);
    }
    return sum;
}

#ifdef HB_TSAN
#define hb_copy_sse2 hb_copy_plain
#define hb_copy_avx512 hb_copy_plain
#else
/* A vector that the compiler must not load a second time: what is stored and
 * what is looked at are the same. */
#define HB_KEEP(vector) __asm__("" : "+v"(vector))

/* Which every x86-64 has. */
static uint64_t hb_copy_sse2(hb_word *to, const void *from, uint64_t n)
{
    const __m128i zero = _mm_setzero_si128();
    uint64_t mask = 0, i = 0;

    for (; i + 16 <= n; i += 16) {
        const __m128i *v = (const __m128i *)((const hb_loose *)from + i);
        __m128i q[4];

        for (unsigned k = 0; k < 4; k++) {
            __m128i x = _mm_loadu_si128(v + 2 * k), y = _mm_loadu_si128(v + 2 * k + 1);

            HB_KEEP(x);
            HB_KEEP(y);
            if (to) {
                _mm_storeu_si128((__m128i *)(to + i) + 2 * k, x);
                _mm_storeu_si128((__m128i *)(to + i) + 2 * k + 1, y);
            }
            /* It compares no more than 32 bits: the halves that are zero, four
             * words in a vector, then the words of which both are. */
            x = _mm_packs_epi32(_mm_cmpeq_epi32(x, zero), _mm_cmpeq_epi32(y, zero));
            q[k] = _mm_cmpeq_epi32(x, _mm_set1_epi32(-1));
        }
        q[0] = _mm_packs_epi16(_mm_packs_epi32(q[0], q[1]), _mm_packs_epi32(q[2], q[3]));
        mask |= (uint64_t)(uint16_t)~_mm_movemask_epi8(q[0]) << i;
    }
    if (i < n) {
        mask |= hb_copy_plain(to ? to + i : NULL, (const hb_loose *)from + i, n - i) << i;
    }
    return mask;
}

__attribute__((target("avx512f")))
static uint64_t hb_copy_avx512(hb_word *to, const void *from, uint64_t n)
{
    uint64_t mask = 0;

    for (uint64_t i = 0; i < n; i += 8) {
        __mmask8 some = (__mmask8)(i + 8 <= n ? 0xff : 0xff >> (i + 8 - n));
        __m512i x = _mm512_maskz_loadu_epi64(some, (const hb_loose *)from + i);

        HB_KEEP(x);
        if (to) {
            _mm512_mask_storeu_epi64(to + i, some, x);
        }
        mask |= (uint64_t)_mm512_test_epi64_mask(x, x) << i;
    }
    return mask;
}
#endif
#endif

static const struct hb_clone {
    const char *name;
    uint64_t (*popcount)(const hb_word *words, uint64_t n);
    uint64_t (*copy)(hb_word *to, const void *from, uint64_t n);
} hb_clones[] = {
    { "plain", hb_popcount_plain, hb_copy_plain },
#ifdef HB_CLONES
    { "popcnt", hb_popcount_popcnt, hb_copy_sse2 },
    { "avx512", hb_popcount_avx512, hb_copy_avx512 },
#endif
};

enum { HB_NCLONES = sizeof(hb_clones) / sizeof(hb_clones[0]) };

/* Written before the first call, or by a test between two. */
static const struct hb_clone *hb_clone = &hb_clones[0];

static bool hb_has_clone(unsigned i)
{
#ifdef HB_CLONES
    __builtin_cpu_init();
    switch (i) {
    case 1:
        return __builtin_cpu_supports("popcnt");
    case 2:
        return __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vpopcntdq");
    }
#endif
    return i == 0;
}

static bool hb_take_clone(unsigned i)
{
    if (!hb_has_clone(i)) {
        return false;
    }
    hb_clone = &hb_clones[i];
    return true;
}

bool hb_use_clone(const char *name)
{
    for (unsigned i = 0; i < HB_NCLONES; i++) {
        if (strcmp(name, hb_clones[i].name) == 0) {
            return hb_take_clone(i);
        }
    }
    return false;
}

const char *hb_clone_name(unsigned i)
{
    return i < HB_NCLONES ? hb_clones[i].name : NULL;
}

/* The last that the processor has, or what the tests ask for. */
__attribute__((constructor))
static void hb_choose_clone(void)
{
    const char *wanted = getenv("PYBITMAP_CLONE");

    if (wanted && hb_use_clone(wanted)) {
        return;
    }
    for (unsigned i = HB_NCLONES; i-- > 0 && !hb_take_clone(i);) {
    }
}

uint64_t hb_popcount_words(const hb_word *words, uint64_t n)
{
    return hb_clone->popcount(words, n);
}

uint64_t hb_nonzero(const void *words, uint64_t n)
{
    return hb_clone->copy(NULL, words, n);
}

uint64_t hb_copy_nonzero(hb_word *to, const void *from, uint64_t n)
{
    return hb_clone->copy(to, from, n);
}
