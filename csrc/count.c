/* SPDX-License-Identifier: MIT */
/*
 * Counting: all of a bitmap, by the notes of count.h, and parts of it.
 */
#include "count.h"
#include "locks.h"

/* ---- notes -------------------------------------------------------------- */

void hb_note_first(const struct hb_block *b, uint64_t word, uint64_t notes)
{
    /* They are no part of what const says. */
    struct hb_block *own = (struct hb_block *)(uintptr_t)b;
    struct hb_slot *slot;

    if (hb_alone()) {
        hb_or_alone(&b->notes[word], notes);
        hb_or_alone(&own->top, hb_bit(word >> b->top_shift));
        return;
    }
    slot = hb_summarising_begins();
    hb_test_delay();
    atomic_fetch_or(&b->notes[word], notes);
    hb_test_delay();
    (void)hb_or(&own->top, hb_bit(word >> b->top_shift));
    hb_summarising_ends(slot);
}

void hb_note_range(const struct hb_block *b, uint64_t first, uint64_t last)
{
    for (uint64_t word = first / HB_BITS; word <= last / HB_BITS; word++) {
        hb_note_bits(b, word, hb_mask(word, first, last));
    }
}

void hb_count_again(struct hb_block *b)
{
    uint64_t groups = 0;

    for (uint64_t parent = 0; parent < b->nwords[1]; parent++) {
        groups += b->counts[parent];
        if (b->counts[parent] || atomic_load(&b->level[1][parent])) {
            hb_note(b, parent);
        }
    }
    atomic_store(&b->count, groups);
    atomic_store(&b->counting, false);
}

void hb_note_named(const struct hb_block *b)
{
    for (uint64_t above = hb_next_above(b, 0); above != HB_NONE;
         above = hb_next_above(b, above + 1)) {
        hb_note_bits(b, above, hb_pieces_under(b, above));
    }
}

/* ---- all of it: the caller holds the lock, or is alone ---------------------- */

/* Dirty groups in the piece under word `parent` of level 1. */
static uint64_t hb_count_piece(const struct hb_block *b, uint64_t parent)
{
    const uint64_t at = parent * HB_BITS;
    uint64_t named = atomic_load(&b->level[1][parent]), groups = 0;

    if (hb_many(named, HB_SOME)) {
        return hb_popcount_words(&b->level[0][at], hb_min(HB_BITS, b->nwords[0] - at));
    }
    for (; named; named &= named - 1) {
        groups += hb_popcount(atomic_load(&b->level[0][at + hb_lowest(named)]));
    }
    return groups;
}

/* Takes the notes in word `word` and counts the pieces that they are for: by how
 * much has the sum grown? */
static uint64_t hb_count_noted(struct hb_block *b, uint64_t word, bool alone)
{
    hb_word *notes = &b->notes[word];
    /* Who has set one, and found the top set before it was taken, is seen here. */
    uint64_t bits = atomic_load(notes), grown = 0;

    if (alone) {
        atomic_store_explicit(notes, 0, memory_order_relaxed);
    } else if (bits) {
        bits = atomic_exchange(notes, 0);
        /* The loads of the leaf, most of which are plain, come after this; with those
         * of hb_mark: leaf, then note. */
        hb_fence();
        hb_test_delay();
    }
    for (; bits; bits &= bits - 1) {
        uint64_t parent = word * HB_BITS + hb_lowest(bits);
        uint64_t groups = hb_count_piece(b, parent);

        grown += groups - b->counts[parent];
        b->counts[parent] = (uint16_t)groups;
    }
    return grown;
}

static void hb_count_changes(struct hb_block *b)
{
    const bool alone = hb_alone();
    uint64_t top, groups;

    if (alone) {
        top = atomic_load_explicit(&b->top, memory_order_relaxed);
        atomic_store_explicit(&b->top, 0, memory_order_relaxed);
    } else {
#ifndef HB_BREAK_COUNTING       /* for the stress test */
        atomic_store(&b->counting, true);
#endif
        hb_test_delay();
        top = atomic_exchange(&b->top, 0);
        hb_test_delay();
    }
    groups = atomic_load_explicit(&b->count, memory_order_relaxed);
    for (; top; top &= top - 1) {
        uint64_t word = (uint64_t)hb_lowest(top) << b->top_shift;
        uint64_t end = hb_min(word + (UINT64_C(1) << b->top_shift),
                              (b->nwords[1] - 1) / HB_BITS + 1);

        for (; word < end; word++) {
            groups += hb_count_noted(b, word, alone);
        }
    }
    if (alone) {
        atomic_store_explicit(&b->count, groups, memory_order_relaxed);
    } else {
        atomic_store(&b->count, groups);
        atomic_store(&b->counting, false);
    }
}

uint64_t hbitmap_count(const HBitmap *hb)
{
    HB_AT_HOME(hb, 0, hbitmap_count, hb);
    struct hb_block *b = hb_block_of(hb);
    uint64_t groups;

#ifndef HB_BREAK_COUNT_WAIT
    if (!hb_alone()) {
        hb_wait_for_summarising();
    }
#endif
    if (!hb_unfinished(hb) && !atomic_load(&b->top) && !atomic_load(&b->counting)) {
        return atomic_load(&b->count) << hb->granularity;
    }
    hb_lock(hb, HB_READ);
    b = hb_block_of(hb);
    hb_count_changes(b);
    groups = atomic_load(&b->count);
    hb_unlock(hb);
    return groups << hb->granularity;
}

/* ---- parts of it: the caller holds the lock ------------------------------- */

/* Dirty groups in the leaf words [word, end). */
static uint64_t hb_count_words(const struct hb_block *b, uint64_t word,
                               uint64_t end)
{
    uint64_t groups = 0;

    while ((word = hb_next_bit(b, 1, word)) < end) {
        uint64_t stop = hb_many_end(b, HB_SOME, word, end);

        if (stop > word) {
            groups += hb_popcount_words(&b->level[0][word], stop - word);
            word = stop;
        } else {
            groups += hb_popcount(atomic_load(&b->level[0][word]));
            word++;
        }
    }
    return groups;
}

/* Dirty groups in [first, last]. */
static uint64_t hb_count(const struct hb_block *b, uint64_t first, uint64_t last)
{
    const hb_word *leaf = b->level[0];
    uint64_t head = first / HB_BITS, tail = last / HB_BITS;

    if (head == tail) {
        return hb_popcount(atomic_load(&leaf[head]) & hb_mask(head, first, last));
    }
    return hb_popcount(atomic_load(&leaf[head]) & hb_mask_from(first)) +
           hb_count_words(b, head + 1, tail) +
           hb_popcount(atomic_load(&leaf[tail]) & hb_mask_to(last));
}

uint64_t hbitmap_count_range(const HBitmap *hb, uint64_t start, uint64_t count)
{
    HB_AT_HOME(hb, 0, hbitmap_count_range, hb, start, count);
    const struct hb_block *b;
    uint64_t items = 0;

    hb_lock(hb, HB_READ);
    b = hb_block_of(hb);
    if (start < b->size && count) {
        uint64_t end = start + hb_min(count, b->size - start);
        uint64_t first = start >> hb->granularity;
        uint64_t last = (end - 1) >> hb->granularity;

        /* The outer two groups may be cut, the ones between are whole. */
        if (first == last) {
            items = hb_count(b, first, last) * (end - start);
        } else {
            items = hb_count(b, first, first) *
                        (((first + 1) << hb->granularity) - start) +
                    hb_count(b, last, last) *
                        (end - (last << hb->granularity));
            if (last - first > 1) {
                items += hb_count(b, first + 1, last - 1) << hb->granularity;
            }
        }
    }
    hb_unlock(hb);
    return items;
}

uint64_t hbitmap_nonzero_words(const HBitmap *hb)
{
    HB_AT_HOME(hb, 0, hbitmap_nonzero_words, hb);
    const struct hb_block *b;
    uint64_t words = 0;

    hb_lock(hb, HB_READ);
    b = hb_block_of(hb);
    for (uint64_t word = hb_next_bit(b, 1, 0); word != HB_NONE;
         word = hb_next_bit(b, 1, word + 1)) {
        words += atomic_load(&b->level[0][word]) != 0;
    }
    hb_unlock(hb);
    return words;
}
