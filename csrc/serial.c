/* SPDX-License-Identifier: MIT */
/*
 * Serialisation: chunks of the leaf as little-endian words, and back.
 */
#include <errno.h>
#include <string.h>

#include "count.h"
#include "locks.h"

/* Are the bytes of a chunk those of the words, and may both be plain? */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ || defined(HB_TSAN)
enum { HB_AS_IT_IS = 0 };
#else
enum { HB_AS_IT_IS = 1 };
#endif

/* n words of the leaf, little-endian and unaligned at `buf`. */
static void hb_store_words(uint8_t *buf, const hb_word *words, uint64_t n)
{
    if (HB_AS_IT_IS) {
        memcpy(buf, (const void *)words, (size_t)n * sizeof(words[0]));
        return;
    }
    for (uint64_t i = 0; i < n; i++) {
        uint64_t word = hb_little_endian(atomic_load(&words[i]));

        memcpy(buf + i * sizeof(word), &word, sizeof(word));
    }
}

bool hbitmap_is_serializable(const HBitmap *hb)
{
    HB_AT_HOME(hb, false, hbitmap_is_serializable, hb);
    return hb->granularity < 64 - HB_SHIFT;
}

uint64_t hbitmap_serialization_align(const HBitmap *hb)
{
    HB_AT_HOME(hb, 0, hbitmap_serialization_align, hb);
    return hbitmap_is_serializable(hb) ? UINT64_C(64) << hb->granularity : 0;
}

/* The leaf words [*first, *last] of a chunk; count is not 0. */
static int hb_chunk(const HBitmap *hb, const struct hb_block *b,
                    uint64_t start, uint64_t count,
                    uint64_t *first, uint64_t *last)
{
    uint64_t inside = hbitmap_serialization_align(hb) - 1;
    uint64_t last_group;

    if (!hbitmap_is_serializable(hb)) {
        return -EINVAL;
    }
    if (start >= b->size || count > hb_round_up(hb, b->size) - start) {
        return -ERANGE;
    }
    last_group = (start + count - 1) >> hb->granularity;
    if ((start & inside) || (last_group != b->ngroups - 1 && (count & inside))) {
        return -EINVAL;
    }
    *first = (start >> hb->granularity) / HB_BITS;
    *last = last_group / HB_BITS;
    return 0;
}

uint64_t hbitmap_serialization_size(const HBitmap *hb,
                                    uint64_t start, uint64_t count)
{
    HB_AT_HOME(hb, 0, hbitmap_serialization_size, hb, start, count);
    uint64_t first, last;

    if (!count || hb_chunk(hb, hb_block_of(hb), start, count, &first, &last)) {
        return 0;
    }
    return (last - first + 1) * sizeof(uint64_t);
}

int hbitmap_serialize_part(const HBitmap *hb, uint8_t *buf,
                           uint64_t start, uint64_t count)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_serialize_part, hb, buf, start, count);
    const struct hb_block *b;
    uint64_t first, last;
    int err = 0;

    if (!count) {
        return 0;
    }
    hb_lock(hb, HB_READ);
    b = hb_block_of(hb);
    err = hb_chunk(hb, b, start, count, &first, &last);
    /* Those under one word of level 1 after the other, as long as it names some,
     * or none: then the leaf is not touched. */
    while (!err && first <= last) {
        uint64_t parent = first / HB_BITS, end;
        bool dirty = (atomic_load(&b->level[1][parent]) & hb_mask_from(first)) != 0;
        size_t nbytes;

        do {
            parent++;
        } while (parent <= last / HB_BITS &&
                 (atomic_load(&b->level[1][parent]) != 0) == dirty);
        end = hb_min(last + 1, parent * HB_BITS);
        nbytes = (size_t)(end - first) * sizeof(uint64_t);
        if (dirty) {
            hb_store_words(buf, &b->level[0][first], end - first);
        } else {
            memset(buf, 0, nbytes);
        }
        buf += nbytes;
        first = end;
    }
    hb_unlock(hb);
    return err;
}

/*
 * n leaf words from `first` on, under one summary word, become those at `buf`
 * or, if that is NULL, all `fill`; bits beyond the end are dropped.  Answers
 * which of them are not zero, as bits of the summary word.
 */
static uint64_t hb_load_few(const struct hb_block *b, const uint8_t *buf,
                            uint64_t fill, uint64_t first, uint64_t n)
{
    hb_word *words = &b->level[0][first];
    uint64_t own[HB_BITS];
    const void *from = buf;

    /* By way of our own words where they have to be changed. */
    if (!HB_AS_IT_IS || !buf || first + n == b->nwords[0]) {
        for (uint64_t i = 0; i < n; i++) {
            own[i] = fill;
            if (buf) {
                memcpy(&own[i], buf + i * sizeof(own[i]), sizeof(own[i]));
                own[i] = hb_little_endian(own[i]);
            }
        }
        own[n - 1] &= hb_used(b, first + n - 1);
        from = own;
    }
    /* Words that no summary names are zero.  Where the new ones are too they stay
     * untouched, so that zeros take no memory. */
    if (!atomic_load(&b->level[1][first / HB_BITS]) && !hb_nonzero(from, n)) {
        return 0;
    }
    /* What is at `buf` may be changing.  The answer has to be about what was
     * stored: a bit too few would hide a word from every search. */
    return hb_copy_nonzero(words, from, n) << (first % HB_BITS);
}

/*
 * The words of a chunk become those at `buf`, or all `fill` where that is NULL,
 * and the summaries follow at once: what hbitmap_deserialize_finish would do
 * later for the whole bitmap costs next to nothing while the words are at hand.
 */
static int hb_load_words(HBitmap *hb, const uint8_t *buf, uint64_t fill,
                         uint64_t start, uint64_t count)
{
    struct hb_gone gone = { 0, 0 };
    const struct hb_block *b;
    uint64_t first, last;
    int err;

    if (!count) {
        return 0;
    }
    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    err = hb_chunk(hb, b, start, count, &first, &last);
    while (!err && first <= last) {
        /* Up to 4096 words, then their summaries; as in hb_overwrite (ops.c), there
         * is no fence in between. */
        uint64_t set[HB_BITS], changed = 0, parent = first / HB_BITS, end = first;
        unsigned n = 0;

        for (; n < HB_BITS && end <= last; n++) {
            uint64_t from = end;

            end = hb_min(last + 1, (parent + n + 1) * HB_BITS);
            set[n] = hb_load_few(b, buf, fill, from, end - from);
            if (buf) {
                buf += (end - from) * sizeof(uint64_t);
            }
        }
        hb_test_delay();
        for (unsigned i = 0; i < n; i++) {
            uint64_t at = (parent + i) * HB_BITS;
            uint64_t named = atomic_load(&b->level[1][parent + i]);
            uint64_t empty = named & ~set[i];

            empty &= at < first ? hb_mask_from(first) : UINT64_MAX;
            empty &= at + HB_BITS > end ? hb_mask_to(end - 1) : UINT64_MAX;
            changed |= set[i] | empty;
            if (set[i] & ~named) {
                hb_summarise_words(b, parent + i, set[i]);
            }
            if (empty) {
                hb_unsummarise(b, parent + i, empty, &gone);
            }
        }
        if (changed) {
            hb_note_range(b, parent, parent + n - 1);
        }
        first = end;
    }
    hb_unsummarise_above(b, &gone);
    hb_unlock(hb);
    return err;
}

int hbitmap_deserialize_part(HBitmap *hb, const uint8_t *buf,
                             uint64_t start, uint64_t count, bool finish)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_deserialize_part, hb, buf, start, count, finish);
    (void)finish;
    return hb_load_words(hb, buf, 0, start, count);
}

int hbitmap_deserialize_zeroes(HBitmap *hb, uint64_t start, uint64_t count,
                               bool finish)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_deserialize_zeroes, hb, start, count, finish);
    (void)finish;
    return hb_load_words(hb, NULL, 0, start, count);
}

int hbitmap_deserialize_ones(HBitmap *hb, uint64_t start, uint64_t count,
                             bool finish)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_deserialize_ones, hb, start, count, finish);
    (void)finish;
    return hb_load_words(hb, NULL, UINT64_MAX, start, count);
}

void hbitmap_deserialize_finish(HBitmap *hb)
{
    HB_AT_HOME_VOID(hb, hbitmap_deserialize_finish, hb);
    /* Nothing is left to do: see hb_load_words. */
    (void)hb;
}
