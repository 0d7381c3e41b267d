/* SPDX-License-Identifier: MIT */
/*
 * Validates every invariant of a bitmap, for tests and for whoever suspects
 * their memory.  Shares no code with what it checks but the layout.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "locks.h"
#include "words.h"

static _Thread_local char hb_reason[160];

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static int hb_broken(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    (void)vsnprintf(hb_reason, sizeof(hb_reason), format, args);
    va_end(args);
    return -EINVAL;
}

static int hb_check_shape(const HBitmap *hb, const struct hb_block *b)
{
    uint64_t nwords = b->ngroups ? (b->ngroups + 63) / 64 : 1;
    uint64_t group, ngroups;

    if (hb->granularity < 0 || hb->granularity > 63) {
        return hb_broken("granularity %d is not in 0..63", hb->granularity);
    }
    group = UINT64_C(1) << hb->granularity;
    ngroups = b->size / group + (b->size % group != 0);
    if (b->ngroups != ngroups) {
        return hb_broken("%" PRIu64 " items make %" PRIu64 " groups, not %" PRIu64,
                         b->size, ngroups, b->ngroups);
    }
    if (b->nlevels < HB_MIN_LEVELS || b->nlevels > HB_MAX_LEVELS) {
        return hb_broken("%u levels", b->nlevels);
    }
    for (unsigned k = 0; k < b->nlevels; k++) {
        if (b->nwords[k] != nwords) {
            return hb_broken("level %u has %" PRIu64 " words, not %" PRIu64,
                             k, b->nwords[k], nwords);
        }
        nwords = (nwords + 63) / 64;
    }
    if (b->nwords[b->nlevels - 1] != 1) {
        return hb_broken("the top level has %" PRIu64 " words",
                         b->nwords[b->nlevels - 1]);
    }
    return 0;
}

static int hb_check_levels(const struct hb_block *b)
{
    uint64_t nbits = b->ngroups;

    for (unsigned k = 0; k < b->nlevels; k++) {
        for (uint64_t word = 0; word < b->nwords[k]; word++) {
            uint64_t value = atomic_load(&b->level[k][word]);

            if (value && nbits - word * 64 < 64 &&
                value >> (nbits - word * 64)) {
                return hb_broken("level %u, word %" PRIu64 " has bits beyond the "
                                 "end: %016" PRIx64, k, word, value);
            }
            if (value && k + 1 < b->nlevels &&
                !(atomic_load(&b->level[k + 1][word / 64]) >> (word % 64) & 1)) {
                return hb_broken("level %u, word %" PRIu64 " is %016" PRIx64
                                 " and its summary bit is clear", k, word, value);
            }
        }
        nbits = b->nwords[k];
    }
    return 0;
}

static int hb_check_count(const struct hb_block *b)
{
    uint64_t sum = 0;

    for (uint64_t piece = 0; piece < b->nwords[1]; piece++) {
        bool noted = atomic_load(&b->notes[piece / 64]) >> (piece % 64) & 1;
        uint64_t dirty = 0;

        for (uint64_t word = piece * 64; word < piece * 64 + 64 && word < b->nwords[0];
             word++) {
            dirty += hb_popcount(atomic_load(&b->level[0][word]));
        }
        if (noted && !(atomic_load(&b->top) >> (piece / 64 >> b->top_shift) & 1)) {
            return hb_broken("piece %" PRIu64 " has a note, and none at the top", piece);
        }
        if (b->counts[piece] != dirty && !noted) {
            return hb_broken("the remembered count of piece %" PRIu64 " is %u, not %" PRIu64,
                             piece, b->counts[piece], dirty);
        }
        sum += b->counts[piece];
    }
    if (atomic_load(&b->count) != sum) {
        return hb_broken("the remembered count is %" PRIu64 ", not %" PRIu64,
                         atomic_load(&b->count), sum);
    }
    return 0;
}

static int hb_check_refused(const char **reason)
{
    if (reason) {
        *reason = "it was made by another version of this code, or is no bitmap";
    }
    return -EXDEV;
}

int hbitmap_check(const HBitmap *hb, const char **reason)
{
    const struct hb_block *b;
    int err;

    HB_AT_HOME(hb, hb_check_refused(reason), hbitmap_check, hb, reason);
    hb_reason[0] = '\0';
    hb_lock(hb, HB_READ);
    b = hb_block_of(hb);
    err = hb_check_shape(hb, b);
    if (!err) {
        err = hb_check_levels(b);
    }
    if (!err) {
        err = hb_check_count(b);
    }
    hb_unlock(hb);
    if (reason) {
        *reason = hb_reason;
    }
    return err;
}
