/* SPDX-License-Identifier: MIT */
/*
 * Marking upwards and clearing upwards: the movements of the protocol that do not
 * stand in protocol.h, which has the rules.
 */
#include "count.h"
#include "pages.h"
#include "threads.h"

/* ---- marking upwards ---------------------------------------------------- */

/*
 * Sets all bits of the words [first, end) of level k; false only if they were
 * set already.  The caller's fence stands between this and the next level.
 *
 * A clear that empties a word after the store has taken the mark; one that did
 * so before it left the word to the store.
 */
static bool hb_mark_whole(const struct hb_block *b, unsigned k,
                          uint64_t first, uint64_t end)
{
    bool changed = false;

    /* Those under one summary word at a time, so that a few that are clear do
     * not cause stores to all.  As above, no look where all are empty. */
    while (first < end) {
        uint64_t stop = hb_min(end, (first / HB_BITS + 1) * HB_BITS);
        hb_word *words = &b->level[k][first];

        if ((k == 0 && !atomic_load_explicit(&b->level[1][first / HB_BITS],
                                             memory_order_relaxed)) ||
            !hb_all_ones(words, stop - first)) {
            hb_fill_words(words, 0xff, stop - first);
            changed = true;
        }
        first = stop;
    }
    return changed;
}

bool hb_mark_level(const struct hb_block *b, unsigned k, uint64_t first, uint64_t last)
{
    uint64_t head = first / HB_BITS, tail = last / HB_BITS;
    bool changed;

    if (head == tail) {
        return hb_mark_part(b, k, head, hb_mask_from(first) & hb_mask_to(last));
    }
    __builtin_prefetch(&b->level[k][head], 1);
    __builtin_prefetch(&b->level[k][tail], 1);
    changed = hb_mark_whole(b, k, head + 1, tail);
    changed |= hb_mark_part(b, k, head, hb_mask_from(first));
    changed |= hb_mark_part(b, k, tail, hb_mask_to(last));
    return changed;
}

/* For one thread alone: in any order, and nobody has to be told. */
static void hb_summarise_alone(const struct hb_block *b, uint64_t parent, uint64_t words)
{
    hb_or_alone(&b->level[1][parent], words);
    for (unsigned k = 2; k < b->nlevels; k++) {
        hb_or_alone(&b->level[k][parent / HB_BITS], hb_bit(parent));
        parent /= HB_BITS;
    }
}

void hb_summarise_words(const struct hb_block *b, uint64_t parent, uint64_t words)
{
    hb_word *named = &b->level[1][parent];
    uint64_t old = atomic_load(named);

    if (!(words & ~old)) {
        return;
    }
    if (hb_alone()) {
        hb_summarise_alone(b, parent, words);
    } else {
        struct hb_slot *slot = hb_summarising_begins();
        uint64_t bit = parent;

        for (unsigned k = 2; k < b->nlevels; k++) {
            hb_test_delay();
            hb_or_bit(b->level[k], bit);
            bit /= HB_BITS;
        }
        hb_test_delay();
        atomic_fetch_or(named, words);
        hb_summarising_ends(slot);
    }
    if (!old) {
        hb_first_named(b, parent);
    }
}

void hb_summarise_range(const struct hb_block *b, uint64_t first, uint64_t last)
{
    uint64_t head = first / HB_BITS, tail = last / HB_BITS;
    const hb_word *named = b->level[1];

    if (head == tail) {
        hb_summarise_words(b, head, hb_mask_from(first) & hb_mask_to(last));
        return;
    }
    if ((~atomic_load(&named[head]) & hb_mask_from(first)) ||
        (~atomic_load(&named[tail]) & hb_mask_to(last)) ||
        !hb_all_ones(&named[head + 1], tail - head - 1)) {
        struct hb_slot *slot = hb_summarising_begins();
        uint64_t lo = head, hi = tail;

        /* Loads and stores follow that are plain.  If they came before what says
         * so, a clear that takes the bits they saw or set would not wait (with the
         * read-modify-writes of hb_unsummarise_above). */
        hb_fence();
        for (unsigned k = 2; k < b->nlevels; k++) {
            hb_test_delay();
            (void)hb_mark_level(b, k, lo, hi);
            lo /= HB_BITS;
            hi /= HB_BITS;
        }
        /* Whoever sees a bit of level 1 relies on those above, some of which
         * may have been stored: they come first (with the load of hb_summarise). */
        hb_fence();
        hb_test_delay();
        (void)hb_mark_level(b, 1, first, last);
        hb_summarising_ends(slot);
    } else {
        /* Plain loads; what is above these bits was set by others (with the second
         * fence above). */
        hb_read_fence();
    }
}

/* ---- clearing upwards --------------------------------------------------- */

void hb_unsummarise(const struct hb_block *b, uint64_t parent, uint64_t words,
                    struct hb_gone *gone)
{
    uint64_t left, again = 0;

    hb_test_delay();
    if (hb_alone()) {
        left = atomic_load_explicit(&b->level[1][parent], memory_order_relaxed) & ~words;
        atomic_store_explicit(&b->level[1][parent], left, memory_order_relaxed);
        words = 0;
    } else {
        left = atomic_fetch_and(&b->level[1][parent], ~words) & ~words;
    }
    hb_test_delay();
    /* The second look.  A mark of such a word that came after the first look and
     * still found it named came before the fetch_and in the one order of all
     * these accesses, so it is seen here. */
    for (; words; words &= words - 1) {
        if (atomic_load(&b->level[0][parent * HB_BITS + hb_lowest(words)])) {
            again |= words & (0 - words);
        }
    }
    if (again) {
        hb_summarise_words(b, parent, again);
    } else if (!left && b->nlevels > 2) {
        /* This word was emptied in its turn. */
        if (gone->word != parent / HB_BITS) {
            hb_unsummarise_above(b, gone);
            gone->word = parent / HB_BITS;
        }
        gone->bits |= hb_bit(parent);
    }
}

/* For one thread alone: nobody is waited for, nothing looked at again. */
static void hb_unsummarise_alone(const struct hb_block *b, uint64_t word, uint64_t bits)
{
    for (unsigned k = 2; k < b->nlevels; k++) {
        hb_word *above = &b->level[k][word];
        uint64_t left = atomic_load_explicit(above, memory_order_relaxed) & ~bits;

        atomic_store_explicit(above, left, memory_order_relaxed);
        if (left) {
            return;
        }
        bits = hb_bit(word);
        word /= HB_BITS;
    }
}

void hb_unsummarise_above(const struct hb_block *b, struct hb_gone *gone)
{
    uint64_t taken[HB_MAX_LEVELS];
    uint64_t word = gone->word, bits = gone->bits;
    unsigned end = 2;

    if (!bits) {
        return;
    }
    gone->bits = 0;
    if (hb_alone()) {
        hb_unsummarise_alone(b, word, bits);
        return;
    }
    while (end < b->nlevels) {
        uint64_t left;

        hb_test_delay();
        left = atomic_fetch_and(&b->level[end][word], ~bits) & ~bits;

        taken[end++] = bits;
        if (left) {
            break;
        }
        bits = hb_bit(word);
        word /= HB_BITS;
    }
    /* Who found a bit set that is gone now has said before that it is summarising
     * words.  Behind this it has done so, and the plain loads below come
     * after the loads that have seen so. */
    hb_wait_for_summarising();
    hb_test_delay();
    word = gone->word;
    for (unsigned k = 2; k < end; k++) {
        uint64_t at = word * HB_BITS;

        bits = taken[k] & hb_nonzero(&b->level[k - 1][at],
                                     hb_min(HB_BITS, b->nwords[k - 1] - at));
        for (; bits; bits &= bits - 1) {
            uint64_t below = at + hb_lowest(bits);

            for (unsigned up = k; up < b->nlevels; up++) {
                hb_or_bit(b->level[up], below);
                below /= HB_BITS;
            }
        }
        word /= HB_BITS;
    }
}

void hb_drop_summaries_under(const struct hb_block *b, uint64_t word)
{
    struct hb_gone gone = { word, hb_pieces_under(b, word) };

    for (uint64_t bits = gone.bits; bits; bits &= bits - 1) {
        atomic_store_explicit(&b->level[1][word * HB_BITS + hb_lowest(bits)], 0,
                              HB_BULK);
    }
    hb_note_bits(b, word, gone.bits);
    hb_unsummarise_above(b, &gone);
}

void hb_drop_summaries(const struct hb_block *b)
{
    for (uint64_t above = hb_next_above(b, 0); above != HB_NONE;
         above = hb_next_above(b, above + 1)) {
        hb_drop_summaries_under(b, above);
    }
}

/* ---- after a fork ------------------------------------------------------- */

void hb_finish_marks(const HBitmap *hb)
{
    HBitmap *own = (HBitmap *)(uintptr_t)hb;
    const struct hb_block *b = hb_block_of(hb);

#ifdef HB_BREAK_UNFINISHED_MARKS
    return;     /* for the stress test */
#endif
    for (uint64_t word = 0; word < b->nwords[0]; word++) {
        if (atomic_load(&b->level[0][word])) {
            hb_summarise(b, word);
        }
    }
    /* And what a clear had taken above level 1, and did not come to look at again. */
    for (unsigned k = 1; k + 1 < b->nlevels; k++) {
        for (uint64_t word = 0; word < b->nwords[k]; word++) {
            if (atomic_load(&b->level[k][word])) {
                (void)hb_or_bit(b->level[k + 1], word);
            }
        }
    }
    hb_count_again(hb_block_of(own));
    atomic_store(&own->forks, hb_forks);
}
