/* SPDX-License-Identifier: MIT */
/*
 * What clears: reset, take, drain.
 */
#include <errno.h>
#include <sys/mman.h>

#include "locks.h"
#include "pages.h"
#include "protocol.h"

/*
 * Empties the leaf words [word, end), whole ones under summary words, at most
 * those under one word of level 2.
 *
 * Summary first, see protocol.h.  What is stored is relaxed; the fence pairs
 * with the accesses of a mark, leaf then summary, which are sequentially
 * consistent or have the same fence between them: if the mark's leaf word comes
 * after ours, its look at the summary comes after our store.  A mark by loads
 * alone has less between them, an acquire fence.  Should it find what another
 * mark stored after ours, and the summary as it was before, then it did not
 * begin after this clear, so it counts as taken; the other one sees to the
 * summary.  Above it is the usual order, with the second look, at 64 times fewer
 * words.
 */
static void hb_empty_words(const struct hb_block *b, uint64_t word, uint64_t end)
{
    uint64_t first = word / HB_BITS, last = (end - 1) / HB_BITS;
    struct hb_gone gone = { first / HB_BITS, hb_mask_from(first) & hb_mask_to(last) };

    hb_fill_words(&b->level[1][first], 0, last - first + 1);
    hb_fence();
    hb_test_delay();
    hb_fill_words(&b->level[0][word], 0, end - word);
    hb_unsummarise_above(b, &gone);
}

/* Where such words end, if they begin at `word`; else `word`. */
static uint64_t hb_whole_end(const struct hb_block *b, uint64_t word,
                             uint64_t first, uint64_t last)
{
    const uint64_t under = HB_BITS * HB_BITS;
    /* Behind the last word that is in the range with all its bits: the last of
     * the bitmap is one, whatever it has. */
    uint64_t end = last + 1 == b->ngroups ? b->nwords[0] : (last + 1) / HB_BITS;

    if (word % HB_BITS || word * HB_BITS < first) {
        return word;
    }
    if (end < b->nwords[0]) {
        end = end / HB_BITS * HB_BITS;
    }
    end = hb_min(end, (word / under + 1) * under);
    return word < end ? hb_many_end(b, HB_SOME, word, end) : word;
}

/* Clears `mask` in a word; had it such a bit? */
static bool hb_clear_word(const struct hb_block *b, uint64_t word, uint64_t mask)
{
    struct hb_gone gone = { 0, 0 };
    uint64_t old = atomic_load(&b->level[0][word]);

    if (!(old & mask)) {
        return false;
    }
    old = atomic_fetch_and(&b->level[0][word], ~mask);
    if (!(old & ~mask)) {
        hb_unsummarise(b, word / HB_BITS, hb_bit(word), &gone);
        hb_unsummarise_above(b, &gone);
    }
    return (old & mask) != 0;
}

bool hb_clear(const struct hb_block *b, uint64_t first, uint64_t last,
              const struct hb_block *into, bool fresh)
{
    hb_word *leaf = b->level[0];
    uint64_t head = first / HB_BITS, tail = last / HB_BITS;
    struct hb_gone gone = { 0, 0 };
    bool changed = false;

    if (head == tail && !into) {
        return hb_clear_word(b, head, hb_mask_from(first) & hb_mask_to(last));
    }
    /* One word of level 1, so up to 64 leaf words, at a time. */
    for (uint64_t next = hb_next_bit(b, 1, head); next <= tail;
         next = hb_next_bit(b, 1, next)) {
        uint64_t parent = next / HB_BITS;
        uint64_t named = atomic_load(&b->level[1][parent]) &
                         hb_mask(parent, next, tail);
        uint64_t empty = 0, moved = 0;
        uint64_t whole = into ? 0 : hb_whole_end(b, parent * HB_BITS, first, last);

        if (whole > parent * HB_BITS) {
            hb_empty_words(b, parent * HB_BITS, whole);
            changed = true;
            next = whole;
            continue;
        }
        for (uint64_t bits = named; bits; bits &= bits - 1) {
            uint64_t word = parent * HB_BITS + hb_lowest(bits);
            uint64_t mask = hb_mask(word, first, last);
            uint64_t old = atomic_load(&leaf[word]);

            if (old & mask) {
                if (mask == UINT64_MAX && !into) {
                    /* Relaxed: a mark that this store overwrites overlaps this
                     * clear, one that comes after it is found by the second
                     * look, and that comes after a read-modify-write, which
                     * keeps this store before it. */
                    atomic_store_explicit(&leaf[word], 0, HB_BULK);
                    old = 0;
                    changed = true;
                } else {
                    uint64_t taken;

                    /* An exchange is one instruction everywhere. */
                    old = mask == UINT64_MAX
                              ? atomic_exchange(&leaf[word], 0)
                              : atomic_fetch_and(&leaf[word], ~mask);
                    taken = old & mask;
                    old &= ~mask;
                    if (taken) {
                        changed = true;
                        if (into && fresh) {
                            atomic_store_explicit(&into->level[0][word], taken,
                                                  memory_order_relaxed);
                        } else if (into) {
                            (void)hb_mark_part(into, 0, word, taken);
                        }
                        moved |= hb_bit(word);
                    }
                }
            }
            if (!old) {
                empty |= hb_bit(word);
            }
        }
        if (into && moved) {
            hb_summarise_words(into, parent, moved);
        }
        if (empty) {
            hb_unsummarise(b, parent, empty, &gone);
        }
        next = (parent + 1) * HB_BITS;
    }
    hb_unsummarise_above(b, &gone);
    return changed;
}

int hb_whole_groups(const HBitmap *hb, const struct hb_block *b,
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

int hbitmap_reset(HBitmap *hb, uint64_t start, uint64_t count)
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
    if (!err && hb_clear(b, first, last, NULL, false)) {
        hb_count_changed(hb);
    }
    hb_unlock(hb);
    return err;
}

void hbitmap_reset_all(HBitmap *hb)
{
    const struct hb_block *b;

    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    if (b->ngroups) {
        bool changed = hb_give_back(hb, b);

        changed |= hb_clear(b, 0, b->ngroups - 1, NULL, false);
        if (changed) {
            hb_count_changed(hb);
        }
    }
    hb_unlock(hb);
}

int hbitmap_take(HBitmap *hb, uint64_t item)
{
    const struct hb_block *b;
    int taken = -ERANGE;

    hb_lock(hb, HB_CHANGE);
    b = hb_block_of(hb);
    if (item < b->size) {
        uint64_t group = item >> hb->granularity;

        taken = hb_clear(b, group, group, NULL, false);
        if (taken) {
            hb_count_changed(hb);
        }
    }
    hb_unlock(hb);
    return taken;
}

/* ---- draining ----------------------------------------------------------- */

/*
 * All of hb by its pages, where that is less work than word by word: an exchange
 * costs some 20 times a plain access, a fresh page of `into` about 100 times an
 * exchange.  What it spares now, hb pays in part when it is marked again, by a
 * fault for each page.
 */
static bool hb_drain_pages(const HBitmap *hb, const struct hb_block *b,
                           struct hb_block *target, bool fresh)
{
    uint64_t pages = hb_pages(b);
    size_t nbytes;
    hb_word *leaf;

    if (!b->mapped || hb->foreign_leaf || hb_pages_named(b) < pages - pages / 2) {
        return false;
    }
    if (!fresh) {
        /* Each word that gains costs the target an atomic or in any case. */
        uint64_t named = hb_popcount_words(b->level[1], b->nwords[1]);

        if (named < b->nwords[0] / 8) {
            return false;
        }
    }
    leaf = hb_move_leaf(hb, b, &nbytes);
    if (!leaf) {
        return false;
    }
    if (fresh) {
        if (target->leaf_mapped) {
            munmap((void *)target->level[0], target->leaf_mapped);
        }
        target->level[0] = leaf;
        target->leaf_mapped = nbytes;
        hb_build_summaries(target);
        return true;
    }
    for (uint64_t parent = 0; parent < b->nwords[1]; parent++) {
        const hb_word *source = &leaf[parent * HB_BITS];
        uint64_t named = hb_nonzero(source, hb_min(HB_BITS, b->nwords[0] -
                                                            parent * HB_BITS));

        if (named) {
            (void)hb_mark_words(target, parent, source, named);
        }
    }
    munmap((void *)leaf, nbytes);
    return true;
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

            if ((all && fresh && hb_drain_block(hb, into)) ||
                (all && hb_drain_pages(hb, b, target, fresh)) ||
                hb_clear(b, first, last, target, fresh)) {
                hb_count_changed(hb);
                hb_count_changed(into);
            }
        }
    }
    hb_unlock(hb);
    return err;
}

int hbitmap_drain(HBitmap *hb, uint64_t start, uint64_t count, HBitmap *into)
{
    return hb_drain(hb, start, count, into, false);
}

int hbitmap_drain_fresh(HBitmap *hb, uint64_t start, uint64_t count,
                        HBitmap *fresh)
{
    return hb_drain(hb, start, count, fresh, true);
}
