/* SPDX-License-Identifier: MIT */
/*
 * The loop that a compiler does not get right for every processor by itself:
 * the number of bits set.  Plain x86-64 has no instruction for it, later ones
 * have one for a word and then one for a vector, 5 and 20 times as fast.
 *
 * So there are clones of the loop, and the best that the processor has is taken
 * when the library is loaded.  Not by `target_clones`, whose resolvers run
 * before a sanitizer is up, and which musl and macOS do not know.
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

#if defined(__x86_64__) && defined(__GNUC__)
#define HB_CLONES 1

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
#endif

static const struct hb_clone {
    const char *name;
    uint64_t (*popcount)(const hb_word *words, uint64_t n);
} hb_clones[] = {
    { "plain", hb_popcount_plain },
#ifdef HB_CLONES
    { "popcnt", hb_popcount_popcnt },
    { "avx512", hb_popcount_avx512 },
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
        return __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vpopcntdq");
    }
#endif
    return i == 0;
}

bool hb_use_clone(const char *name)
{
    for (unsigned i = 0; i < HB_NCLONES; i++) {
        if (strcmp(name, hb_clones[i].name) == 0 && hb_has_clone(i)) {
            hb_clone = &hb_clones[i];
            return true;
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
    for (unsigned i = HB_NCLONES; i-- > 0;) {
        if (hb_has_clone(i)) {
            hb_clone = &hb_clones[i];
            return;
        }
    }
}

uint64_t hb_popcount_words(const hb_word *words, uint64_t n)
{
    return hb_clone->popcount(words, n);
}
