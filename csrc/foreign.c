/* SPDX-License-Identifier: MIT */
/*
 * What is in memory of others: a flat bitmap that a hypervisor, a kernel or a
 * disk has kept is marked here; bytes that are dirty here are copied there.
 *
 * Workload: logs that are nearly empty, read again and again, a few hundred MiB
 * each.  So what is zero is passed over 64 bytes at a time, and what is not goes
 * in by whole words where the granularities are the same.
 *
 * THREADS.  Their memory is theirs, and may be changing: it is copied first, and
 * the copy is looked at.  Both calls take no lock: one is a mark, the other a
 * search.
 */
#include <errno.h>

#include "count.h"

/* ---- reading ------------------------------------------------------------- */

/* Bit i is bit i % 8 of byte i / 8, counted from the lowest bit or the highest. */
struct hb_log {
    const uint8_t *bytes;
    uint64_t nbits;
    bool msb_first;
};

/* Turns every byte of a word round. */
static inline uint64_t hb_turn_bytes(uint64_t word)
{
    const uint64_t one = UINT64_C(0x5555555555555555);
    const uint64_t two = UINT64_C(0x3333333333333333);
    const uint64_t four = UINT64_C(0x0f0f0f0f0f0f0f0f);

    word = (word >> 1 & one) | (word & one) << 1;
    word = (word >> 2 & two) | (word & two) << 2;
    return (word >> 4 & four) | (word & four) << 4;
}

/* nbytes, 8 at most, from byte `at` on; the others are 0. */
static inline uint64_t hb_read_bytes(const struct hb_log *log, uint64_t at, uint64_t nbytes)
{
    uint64_t word = 0;

    memcpy(&word, log->bytes + at, (size_t)nbytes);
    word = hb_little_endian(word);
    return log->msb_first ? hb_turn_bytes(word) : word;
}

/* 64 bits from bit `at` (of the log) on; what is beyond its end is 0. */
static inline uint64_t hb_read_bits(const struct hb_log *log, uint64_t at)
{
    uint64_t byte = at / 8, shift = at % 8, left = (log->nbits + 7) / 8 - byte;
    uint64_t word = left >= 8 ? hb_read_bytes(log, byte, 8)
                              : hb_read_bytes(log, byte, left);

    if (shift) {
        word >>= shift;
        if (left > 8) {
            word |= hb_read_bytes(log, byte + 8, 1) << (HB_BITS - shift);
        }
    }
    return log->nbits - at < HB_BITS ? word & (hb_bit(log->nbits - at) - 1) : word;
}

/* Are 64 bytes zero? */
static inline bool hb_line_is_zero(const uint8_t *bytes)
{
    uint64_t words[8], any = 0;

    memcpy(words, bytes, sizeof(words));
    for (unsigned i = 0; i < 8; i++) {
        any |= words[i];
    }
    return !any;
}

/* The first bit set at or after `at`; nbits: there is none. */
static uint64_t hb_next_in_log(const struct hb_log *log, uint64_t at)
{
    while (at < log->nbits) {
        uint64_t word;

        while (at % 8 == 0 && log->nbits - at >= 512 && hb_line_is_zero(log->bytes + at / 8)) {
            at += 512;
        }
        if (at == log->nbits) {
            break;
        }
        word = hb_read_bits(log, at);
        if (word) {
            return at + hb_lowest(word);
        }
        at = (at + HB_BITS) / 8 * 8;
    }
    return log->nbits;
}

/* ---- marking ------------------------------------------------------------- */

/* The leaf word of the groups from `group` on, where bit 0 is group `base`. */
static inline uint64_t hb_read_groups(const struct hb_log *log, uint64_t group, uint64_t base)
{
    if (group >= base) {
        return group - base < log->nbits ? hb_read_bits(log, group - base) : 0;
    }
    return base - group < HB_BITS ? hb_read_bits(log, 0) << (base - group) : 0;
}

/* A bit is as long as a group; so it touches one, or two: all bits or none begin
 * within a group. */
static void hb_mark_log_words(const HBitmap *hb, const struct hb_block *b,
                              const struct hb_log *log, uint64_t start)
{
    const uint64_t under = HB_BITS * HB_BITS, base = start >> hb->granularity;
    const bool cut = (start & ((UINT64_C(1) << hb->granularity) - 1)) != 0;
    uint64_t bit = hb_next_in_log(log, 0);
    /* The groups that have been done; nothing to do in front of the first. */
    uint64_t done = (base + bit) / under * under;

    while (bit < log->nbits) {
        uint64_t parent = done / under, at = parent * HB_BITS;
        uint64_t n = hb_min(HB_BITS, b->nwords[0] - at), named;
        uint64_t words[HB_BITS];

        if (hb_little_endian(1) == 1 && !log->msb_first && !cut && done >= base &&
            (done - base) % 8 == 0 && n == HB_BITS && log->nbits - (done - base) >= under) {
            memcpy(words, log->bytes + (done - base) / 8, sizeof(words));
        } else {
            for (uint64_t i = 0; i < n; i++) {
                words[i] = hb_read_groups(log, done + i * HB_BITS, base);
                if (cut) {
                    words[i] |= hb_read_groups(log, done + i * HB_BITS, base + 1);
                }
            }
        }
        words[n - 1] &= hb_used(b, at + n - 1);
        named = hb_nonzero(words, n);
        if (named) {
            hb_mark_words(b, parent, (const hb_word *)words, named);
        }
        done += under;
        if (done >= b->ngroups) {
            break;
        }
        /* A bit that touches two groups may be the last of those before. */
        bit = hb_next_in_log(log, done - base - cut);
        if (base + bit > done) {
            done = (base + bit) / under * under;
        }
    }
}

/* Of any granularity: by runs of bits. */
static void hb_mark_log_runs(const HBitmap *hb, const struct hb_block *b,
                             const struct hb_log *log, uint64_t start, int granularity)
{
    uint64_t stop;

    for (uint64_t bit = hb_next_in_log(log, 0); bit < log->nbits;
         bit = hb_next_in_log(log, stop)) {
        uint64_t last, clean = 0;

        for (stop = bit; !clean; stop += clean ? hb_lowest(clean) : HB_BITS) {
            clean = stop < log->nbits ? ~hb_read_bits(log, stop) : 1;
        }
        /* No more than size - 1 + 2^granularity, so this fits. */
        last = hb_min(start + (stop << granularity), b->size) - 1;
        (void)hb_mark(b, (start + (bit << granularity)) >> hb->granularity,
                      last >> hb->granularity);
    }
}

int hbitmap_merge_bits(HBitmap *hb, const uint8_t *bits, uint64_t nbits,
                       uint64_t start, int granularity, bool msb_first)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_merge_bits, hb, bits, nbits, start, granularity, msb_first);
    const struct hb_block *b = hb_block_of(hb);
    struct hb_log log = { bits, nbits, msb_first };
    uint64_t inside = 0;

    if (granularity < 0 || granularity > 63) {
        return -EINVAL;
    }
    if (start < b->size) {
        inside = ((b->size - start - 1) >> granularity) + 1;
    }
    if (hb_next_in_log(&log, inside) < nbits) {
        return -ERANGE;
    }
    log.nbits = hb_min(nbits, inside);
    if (!log.nbits) {
        return 0;
    }
    if (granularity == hb->granularity) {
        hb_mark_log_words(hb, b, &log, start);
    } else {
        hb_mark_log_runs(hb, b, &log, start, granularity);
    }
    return 0;
}

/* ---- copying ------------------------------------------------------------- */

int64_t hbitmap_copy_areas(const HBitmap *hb, void *dst, const void *src, uint64_t nbytes)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_copy_areas, hb, dst, src, nbytes);
    uint64_t size = hbitmap_size(hb), next = 0, areas[2 * HB_BITS];
    uintptr_t to = (uintptr_t)dst, from = (uintptr_t)src;
    int64_t copied = 0;
    size_t n;

    if (nbytes < size || (to < from ? from - to : to - from) < size) {
        return -EINVAL;
    }
    /* No further than the size that was asked about: a truncate may run beside. */
    while ((n = hbitmap_areas(hb, next, size, areas, HB_BITS, &next)) != 0) {
        for (size_t i = 0; i < n; i++) {
            memcpy((char *)dst + areas[2 * i], (const char *)src + areas[2 * i],
                   (size_t)areas[2 * i + 1]);
            copied += (int64_t)areas[2 * i + 1];
        }
    }
    return copied;
}
