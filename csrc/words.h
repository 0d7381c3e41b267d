/* SPDX-License-Identifier: MIT */
/*
 * Loops over whole words, in plain C, so that compilers vectorise them (they
 * leave alone what is written with C11 atomics).
 *
 * THREADS.  Marks may run beside all of these.  What a plain loop sees or leaves
 * of a word that is marked meanwhile is, bit by bit, from before the mark or
 * from after it: no machine tears a byte.  So
 *   - a load serves where a relaxed one would;
 *   - a store serves where any mark of that word that it wipes out may be taken
 *     for an earlier one: where the caller sets all bits, or clears, or puts
 *     something else in their place.  (Wiped out twice, by a memcpy whose ends
 *     overlap say, is still earlier than the end of the call.)
 * Either is ordered by nothing: the caller puts hb_fence() (after stores, or
 * hb_read_fence() after loads) before the next level is looked at, or says why
 * that may be left out.
 * ThreadSanitizer would be right to complain, so its build has the same loops
 * with atomics; it knows no fences either, so there they are sequentially
 * consistent.
 */
#ifndef PYBITMAP_WORDS_H
#define PYBITMAP_WORDS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__SANITIZE_THREAD__)
#define HB_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HB_TSAN 1
#endif
#endif

typedef _Atomic uint64_t hb_word;

#ifdef HB_TSAN
#define hb_fence() ((void)0)
#define hb_read_fence() ((void)0)
#define hb_write_fence() ((void)0)
typedef hb_word hb_plain;
typedef hb_word hb_loose;
#else
#define hb_fence() atomic_thread_fence(memory_order_seq_cst)
/*
 * Loads before it and behind it are in order for all threads.  An acquire fence is
 * enough for that where a store reaches all other threads at once (tests/litmus,
 * mark-loads-armv8); of other machines, POWER is one, C11 does not promise it
 * (mark-loads).
 */
#if defined(__x86_64__) || defined(__aarch64__) || defined(__riscv) || defined(__s390x__)
#define hb_read_fence() atomic_thread_fence(memory_order_acquire)
#else
#define hb_read_fence() hb_fence()
#endif
#define hb_write_fence() atomic_thread_fence(memory_order_release)
typedef uint64_t hb_plain;
typedef uint64_t hb_loose __attribute__((aligned(1), may_alias));
#endif

/*
 * Is this the only thread of the process?  It stays so at least until the caller
 * makes another.  glibc says so from 2.32 on; elsewhere nobody is ever alone.
 */
#if defined(__has_include) && !defined(HB_TSAN)
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
#define hb_alone() (__libc_single_threaded != 0)
#endif
#endif
#ifndef hb_alone
#define hb_alone() false
#endif

/* A word as its bytes lie in memory, the lowest first; or back. */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define hb_little_endian(word) __builtin_bswap64(word)
#else
#define hb_little_endian(word) (word)
#endif

#pragma GCC visibility push(hidden)

/* All bytes of n words become `byte`. */
static inline void hb_fill_words(hb_word *words, int byte, uint64_t n)
{
#ifdef HB_TSAN
    for (uint64_t i = 0; i < n; i++) {
        atomic_store(&words[i], byte ? UINT64_MAX : 0);
    }
#else
    memset((void *)words, byte, (size_t)n * sizeof(words[0]));
#endif
}

/* Are all bits of n words set? */
static inline bool hb_all_ones(const hb_word *words, uint64_t n)
{
    const hb_plain *w = (const hb_plain *)words;
    uint64_t all = UINT64_MAX;

    for (uint64_t i = 0; i < n; i++) {
        all &= w[i];
    }
    return all == UINT64_MAX;
}

/* n words from anywhere (under TSan, from where a word can lie). */
static inline void hb_copy_words(hb_word *to, const void *from, uint64_t n)
{
#ifdef HB_TSAN
    for (uint64_t i = 0; i < n; i++) {
        atomic_store(&to[i], atomic_load(&((const hb_word *)from)[i]));
    }
#else
    memcpy((void *)to, from, (size_t)n * sizeof(to[0]));
#endif
}

/* to = a | b, or a where b is a. */
static inline void hb_or_words(hb_word *to, const hb_word *a, const hb_word *b,
                               uint64_t n)
{
    hb_plain *restrict t = (hb_plain *)to;
    const hb_plain *x = (const hb_plain *)a, *y = (const hb_plain *)b;

#ifndef HB_TSAN
    if (x == y) {
        memcpy(t, x, (size_t)n * sizeof(t[0]));
        return;
    }
#endif
    for (uint64_t i = 0; i < n; i++) {
        t[i] = x[i] | y[i];
    }
}

/* to |= from; has `to` gained a bit?  This reads, changes and stores, which a mark
 * beside it would not survive: the caller is alone. */
static inline bool hb_gain_words(hb_word *to, const hb_word *from, uint64_t n)
{
    hb_plain *restrict t = (hb_plain *)to;
    const hb_plain *restrict f = (const hb_plain *)from;
    uint64_t more = 0;

    for (uint64_t i = 0; i < n; i++) {
        more |= f[i] & ~t[i];
        t[i] |= f[i];
    }
    return more != 0;
}

/* Has `from` a bit that `to` has not? */
static inline bool hb_has_more(const hb_word *from, const hb_word *to, uint64_t n)
{
    const hb_plain *x = (const hb_plain *)from, *y = (const hb_plain *)to;
    uint64_t more = 0;

    for (uint64_t i = 0; i < n; i++) {
        more |= x[i] & ~y[i];
    }
    return more != 0;
}

/* Bits set in a word. */
static inline unsigned hb_popcount(uint64_t word)
{
#if defined(__x86_64__) && !defined(__POPCNT__)
    /* The compiler's own would be a call and a table. */
    word -= word >> 1 & UINT64_C(0x5555555555555555);
    word = (word & UINT64_C(0x3333333333333333)) +
           (word >> 2 & UINT64_C(0x3333333333333333));
    word = (word + (word >> 4)) & UINT64_C(0x0f0f0f0f0f0f0f0f);
    return (unsigned)(word * UINT64_C(0x0101010101010101) >> 56);
#else
    return (unsigned)__builtin_popcountll(word);
#endif
}

/* What two bitmaps make: the groups that are dirty in both, in one at least, in the first
 * only, in one only. */
enum hb_kind { HB_BOTH, HB_EITHER, HB_FIRST_ONLY, HB_ONE_ONLY };

static inline uint64_t hb_of_kind(enum hb_kind kind, uint64_t a, uint64_t b)
{
    switch (kind) {
    case HB_BOTH:
        return a & b;
    case HB_EITHER:
        return a | b;
    case HB_FIRST_ONLY:
        return a & ~b;
    case HB_ONE_ONLY:
        return a ^ b;
    }
    return 0;
}

/* Bits set in n words. */
uint64_t hb_popcount_words(const hb_word *words, uint64_t n);

/* Bit i: word i of n, 1 to 64, is not zero.  Any alignment (not under TSan). */
uint64_t hb_nonzero(const void *words, uint64_t n);

/*
 * Copies them, and answers the same of what was stored, to the bit (or of marks
 * that came since), also where what is at `from` changes meanwhile.
 */
uint64_t hb_copy_nonzero(hb_word *to, const void *from, uint64_t n);

/* Are there clones? */
#if defined(__x86_64__) && defined(__GNUC__)
#define HB_CLONES 1
#endif

/*
 * For tests: takes another clone of the loops in words.c; false if there is no
 * such clone for this processor.  The names, NULL behind the last.  (From
 * outside: PYBITMAP_CLONE=plain in the environment when the library is loaded.)
 */
bool hb_use_clone(const char *name);
const char *hb_clone_name(unsigned i);

#pragma GCC visibility pop

#endif
