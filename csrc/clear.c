/* SPDX-License-Identifier: MIT */
/*
 * What clears: reset, take, drain.
 */
#include <errno.h>
#include <sys/mman.h>

#include "count.h"
#include "locks.h"
#include "pages.h"

/* ---- pieces: what is under a word of level 1 ------------------------------- */

/*
 * Empties the pieces `bits` under word `above` of level 2, whole ones.
 *
 * Summary first, see protocol.h.  What is stored is relaxed or plain; the fence
 * pairs with the accesses of a mark, leaf then summary, which are sequentially
 * consistent or have the same fence between them: if the mark's leaf word comes
 * after ours, its look at the summary comes after our store.  A mark by loads
 * alone has less between them, an acquire fence.  Should it find what another
 * mark stored after ours, and the summary as it was before, then it did not
 * begin after this clear, so it counts as taken; the other one sees to the
 * summary.  Where only the named words are emptied, no name may be overlooked, so
 * their word is exchanged.  Above it is the usual order, with the second look, at
 * 64 times fewer words.
 */
static void hb_empty_pieces(const struct hb_block *b, uint64_t above, uint64_t bits)
{
    const uint64_t first = above * HB_BITS;
    hb_word *names = &b->level[1][first];
    struct hb_gone gone = { above, bits };
    uint64_t named[HB_BITS], many = 0;

    if (bits == UINT64_MAX) {       /* something in each of them */
        hb_fill_words(names, 0, HB_BITS);
        many = bits;
    }
    for (uint64_t rest = bits & ~many; rest; rest &= rest - 1) {
        unsigned i = hb_lowest(rest);

        named[i] = atomic_load(&names[i]);
        if (hb_many(named[i], HB_SOME)) {
            atomic_store_explicit(&names[i], 0, HB_BULK);
            many |= hb_bit(i);
        } else if (hb_alone()) {
            atomic_store_explicit(&names[i], 0, HB_BULK);
        } else if (named[i]) {
            named[i] = atomic_exchange(&names[i], 0);
        }
    }
    hb_fence();     /* with those of hb_mark: leaf, then level 1 */
    hb_test_delay();
    for (uint64_t rest = bits & ~many; rest; rest &= rest - 1) {
        unsigned i = hb_lowest(rest);

        for (; named[i]; named[i] &= named[i] - 1) {
            hb_word *word = &b->level[0][(first + i) * HB_BITS + hb_lowest(named[i])];

            atomic_store_explicit(word, 0, HB_BULK);
        }
    }
    while (many) {      /* a run of them after the other */
        unsigned i = hb_lowest(many);
        uint64_t behind = hb_behind_run(many), word = (first + i) * HB_BITS;
        uint64_t n = ((behind ? hb_lowest(behind) : HB_BITS) - i) * (uint64_t)HB_BITS;

        hb_fill_words(&b->level[0][word], 0, hb_min(n, b->nwords[0] - word));
        many &= behind;
    }
    hb_note_bits(b, above, bits);
    hb_unsummarise_above(b, &gone);
}

/* Clears the groups [first, last] as far as they lie in the piece `parent`. */
static void hb_clear_piece(const struct hb_block *b, uint64_t parent, uint64_t first,
                           uint64_t last, struct hb_gone *gone)
{
    uint64_t named = atomic_load(&b->level[1][parent]) &
                     hb_mask(parent, first / HB_BITS, last / HB_BITS), empty = 0;

    for (; named; named &= named - 1) {
        uint64_t word = parent * HB_BITS + hb_lowest(named);
        uint64_t mask = hb_mask(word, first, last);
        hb_word *leaf = &b->level[0][word];
        uint64_t old = atomic_load(leaf);

        if (mask == UINT64_MAX) {
            /* Relaxed: a mark that this store overwrites overlaps this clear, one
             * that comes after it is found by the second look, and that comes
             * after a read-modify-write, which keeps this store before it. */
            atomic_store_explicit(leaf, 0, HB_BULK);
            old = 0;
        } else if (old & mask) {
            old = atomic_fetch_and(leaf, ~mask) & ~mask;
        }
        if (!old) {
            empty |= named & (0 - named);
        }
    }
    hb_note(b, parent);
    if (empty) {
        hb_unsummarise(b, parent, empty, gone);
    }
}

/* The pieces [first, end), whole ones. */
static void hb_clear_pieces(const struct hb_block *b, uint64_t first, uint64_t end)
{
    for (uint64_t above = hb_next_above(b, first / HB_BITS); above <= (end - 1) / HB_BITS;
         above = hb_next_above(b, above + 1)) {
        uint64_t bits = hb_pieces_under(b, above) & hb_mask(above, first, end - 1);

        if (bits) {
            hb_empty_pieces(b, above, bits);
        }
    }
}

/* Clears `mask` in a word; had it such a bit? */
static bool hb_clear_word(const struct hb_block *b, uint64_t word, uint64_t mask)
{
    struct hb_gone gone = { 0, 0 };
    uint64_t old = atomic_load(&b->level[0][word]);

    if (!(old & mask)) {
        return false;
    }
    if (hb_alone()) {
        atomic_store_explicit(&b->level[0][word], old & ~mask, memory_order_relaxed);
    } else {
        old = atomic_fetch_and(&b->level[0][word], ~mask);
    }
    hb_note(b, word / HB_BITS);
    if (!(old & ~mask)) {
        hb_unsummarise(b, word / HB_BITS, hb_bit(word), &gone);
        hb_unsummarise_above(b, &gone);
    }
    return (old & mask) != 0;
}

void hb_clear(const struct hb_block *b, uint64_t first, uint64_t last)
{
    enum { PIECE = HB_BITS * HB_BITS };
    const uint64_t head = first / PIECE, tail = last / PIECE;
    /* The whole pieces; the last of the bitmap is one, whatever it has. */
    const uint64_t whole = (first + PIECE - 1) / PIECE;
    const uint64_t end = last + 1 == b->ngroups ? b->nwords[1] : (last + 1) / PIECE;
    struct hb_gone gone = { 0, 0 };

    if (first / HB_BITS == last / HB_BITS) {
        (void)hb_clear_word(b, first / HB_BITS, hb_mask_from(first) & hb_mask_to(last));
        return;
    }
    if (head < whole) {
        hb_clear_piece(b, head, first, last, &gone);
    }
    if (whole < end) {
        hb_clear_pieces(b, whole, end);
    }
    if (end <= tail && (tail > head || head == whole)) {
        hb_clear_piece(b, tail, first, last, &gone);
    }
    hb_unsummarise_above(b, &gone);
}

/* ---- whole groups ----------------------------------------------------------- */

/* What reset and drain take: whole groups, see hbitmap_reset.  The groups in
 * [*first, *last]; count is not 0.  0, -ERANGE or -EINVAL. */
static int hb_whole_groups(const HBitmap *hb, const struct hb_block *b,
                           uint64_t start, uint64_t count,
                           uint64_t *first, uint64_t *last)
{
    uint64_t inside = (UINT64_C(1) << hb->granularity) - 1;
    uint64_t end = start + count;

    /* A start in the last group, and an end at the size rounded up, are both
     * within the rounded size, which fits 64 bits. */
    if (start >= b->size || count > hb_round_up(hb, b->size) - start) {
        return -ERANGE;
    }
    if (start & inside) {
        return -EINVAL;
    }
    if ((end & inside) && end != b->size) {
        return end > b->size ? -ERANGE : -EINVAL;
    }
    *first = start >> hb->granularity;
    *last = (end - 1) >> hb->granularity;
    return 0;
}

/* ---- reset, take -------------------------------------------------------- */

int hb_change_groups(HBitmap *hb, uint64_t start, uint64_t count, hb_change *change)
{
    const struct hb_block *b;
    uint64_t first, last;
    int err;

    if (count == 0) {
        return 0;
    }
    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    err = hb_whole_groups(hb, b, start, count, &first, &last);
    if (!err) {
        change(b, first, last);
    }
    hb_unlock(hb);
    return err;
}

int hbitmap_reset(HBitmap *hb, uint64_t start, uint64_t count)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_reset, hb, start, count);
    return hb_change_groups(hb, start, count, hb_clear);
}

void hbitmap_reset_all(HBitmap *hb)
{
    HB_AT_HOME_VOID(hb, hbitmap_reset_all, hb);
    const struct hb_block *b;

    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    if (b->ngroups) {
        hb_give_back(b);
        hb_clear(b, 0, b->ngroups - 1);
    }
    hb_unlock(hb);
}

/* The caller holds the lock; it is released. */
static int hb_take(HBitmap *hb, uint64_t item)
{
    const struct hb_block *b = hb_block_of(hb);
    int taken = -ERANGE;

    if (item < b->size) {
        uint64_t group = item >> hb->granularity;

        taken = hb_clear_word(b, group / HB_BITS, hb_bit(group));
    }
    hb_unlock(hb);
    return taken;
}

int hbitmap_take(HBitmap *hb, uint64_t item)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_take, hb, item);
    hb_lock(hb, HB_CHANGE);
    return hb_take(hb, item);
}

int hbitmap_try_take(HBitmap *hb, uint64_t item)
{
    HB_AT_HOME(hb, -EXDEV, hbitmap_try_take, hb, item);
    return hb_lock_if(hb, HB_CHANGE, false) ? hb_take(hb, item) : -EAGAIN;
}

/* ---- draining ----------------------------------------------------------- */

/*
 * All of hb by its pages, where that is less work than word by word: an exchange
 * costs some 20 times a plain access, a fresh page of `into` about 100 times an
 * exchange.  What it spares now, hb pays in part when it is marked again, by a
 * fault for each page.
 */
static bool hb_drain_pages(const struct hb_block *b, struct hb_block *target,
                           bool fresh)
{
    uint64_t pages = hb_pages(b->nwords[0]);
    size_t nbytes;
    hb_word *leaf;

    if (!b->paged || hb_pages_named(b) < pages - pages / 2) {
        return false;
    }
    if (!fresh) {
        /* Each word that gains costs the target an atomic or in any case. */
        uint64_t named = hb_popcount_words(b->level[1], b->nwords[1]);

        if (named < b->nwords[0] / 8) {
            return false;
        }
    }
    leaf = hb_move_leaf(b, &nbytes);
    if (!leaf) {
        return false;
    }
    if (fresh) {
        if (target->leaf_mapped) {
            munmap((void *)target->level[0], target->leaf_mapped);
        }
        target->level[0] = leaf;
        target->leaf_mapped = nbytes;
        hb_build_summaries(target, 1);
        hb_note_named(target);
        return true;
    }
    for (uint64_t parent = 0; parent < b->nwords[1]; parent++) {
        const hb_word *source = &leaf[parent * HB_BITS];
        uint64_t named = hb_nonzero(source, hb_min(HB_BITS, b->nwords[0] -
                                                            parent * HB_BITS));

        if (named) {
            hb_mark_words(target, parent, source, named);
        }
    }
    munmap((void *)leaf, nbytes);
    return true;
}

/* The groups [first, last] as far as they lie in the piece `parent`. */
static void hb_drain_piece(const struct hb_block *b, uint64_t parent, uint64_t first,
                           uint64_t last, const struct hb_block *into, bool fresh,
                           struct hb_gone *gone)
{
    uint64_t named = atomic_load(&b->level[1][parent]) &
                     hb_mask(parent, first / HB_BITS, last / HB_BITS);
    uint64_t empty = 0, moved = 0;

    for (; named; named &= named - 1) {
        uint64_t word = parent * HB_BITS + hb_lowest(named);
        uint64_t mask = hb_mask(word, first, last);
        hb_word *leaf = &b->level[0][word];
        uint64_t old = atomic_load(leaf), taken = 0;

        if (old & mask) {
            /* An exchange is one instruction everywhere. */
            old = mask == UINT64_MAX ? atomic_exchange(leaf, 0)
                                     : atomic_fetch_and(leaf, ~mask);
            taken = old & mask;
        }
        if (taken && fresh) {
            atomic_store_explicit(&into->level[0][word], taken, memory_order_relaxed);
        } else if (taken) {
            (void)hb_mark_part(into, 0, word, taken);
        }
        moved |= taken ? hb_bit(word) : 0;
        empty |= old & ~mask ? 0 : hb_bit(word);
    }
    if (moved) {
        hb_summarise_words(into, parent, moved);
        hb_note(into, parent);
        hb_note(b, parent);
    }
    if (empty) {
        hb_unsummarise(b, parent, empty, gone);
    }
}

/* The groups [first, last], word by word.  fresh: nobody else sees `into`, and it is
 * clean. */
static void hb_drain_words(const struct hb_block *b, uint64_t first, uint64_t last,
                           const struct hb_block *into, bool fresh)
{
    struct hb_gone gone = { 0, 0 };

    for (uint64_t next = hb_next_bit(b, 1, first / HB_BITS); next <= last / HB_BITS;
         next = hb_next_bit(b, 1, (next / HB_BITS + 1) * HB_BITS)) {
        hb_drain_piece(b, next / HB_BITS, first, last, into, fresh, &gone);
    }
    hb_unsummarise_above(b, &gone);
}

/*
 * All of hb, into a fresh bitmap, by exchanging their blocks.  For one thread
 * alone: a marker in another might have asked for the block already.
 */
static bool hb_drain_block(HBitmap *hb, HBitmap *fresh)
{
    struct hb_block *b = hb_block_of(hb);

    if (!hb_alone() || hb->foreign_leaf || hb->pins) {
        return false;
    }
    atomic_store(&hb->block, hb_block_of(fresh));
    atomic_store(&fresh->block, b);
    return true;
}

static int hb_drain(HBitmap *hb, uint64_t start, uint64_t count, HBitmap *into,
                    bool fresh)
{
    const struct hb_block *b;
    struct hb_block *target;
    uint64_t first, last;
    int err = 0;

    if (hb == into) {
        return -EINVAL;
    }
    /* Marks in `into` need no lock; the one of hb is enough.  Without its lock
     * `into` may be truncated any time, so its block is asked for once. */
    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    target = hb_block_of(into);
    if (hb->granularity != into->granularity || b->size != target->size) {
        err = -EINVAL;
    } else if (count) {
        err = hb_whole_groups(hb, b, start, count, &first, &last);
        /* Adopting a leaf, or storing, would undo what is there. */
        fresh = fresh && !into->foreign_leaf && !into->pins &&
                !atomic_load(&target->level[target->nlevels - 1][0]);
        if (!err) {
            bool all = first == 0 && last == b->ngroups - 1;

            if (!(all && fresh && hb_drain_block(hb, into)) &&
                !(all && hb_drain_pages(b, target, fresh))) {
                hb_drain_words(b, first, last, target, fresh);
            }
        }
    }
    hb_unlock(hb);
    return err;
}

int hbitmap_drain(HBitmap *hb, uint64_t start, uint64_t count, HBitmap *into)
{
    HB_TOGETHER((hb, into), -EXDEV, hbitmap_drain, hb, start, count, into);
    return hb_drain(hb, start, count, into, false);
}

int hbitmap_drain_fresh(HBitmap *hb, uint64_t start, uint64_t count,
                        HBitmap *fresh)
{
    HB_TOGETHER((hb, fresh), -EXDEV, hbitmap_drain_fresh, hb, start, count, fresh);
    return hb_drain(hb, start, count, fresh, true);
}
