/* SPDX-License-Identifier: MIT */
/*
 * How marks and clears go upwards through the levels.
 *
 * PROTOCOL.  Every access is sequentially consistent unless the comment beside
 * it argues otherwise.
 *   A mark sets its leaf bits, then sees to it that level 1 names their words,
 * whether or not its leaf bits were set already: the marker that set them may
 * not have come there yet, and a drain that began now would pass the word over
 * although this mark has returned.
 *   With level 1 it ends, as a rule: what is above a bit of level 1 is set while
 * that bit is.  So whoever has to set one sets first all bits above it, on every
 * level, and then the bit; meanwhile its thread's slot says so (threads.h).
 *   A clear (one at a time: it holds the lock) empties leaf words, then takes
 * the bits of level 1 over those it saw empty, then looks at the words again.  A
 * mark that came in between either found its bit of level 1 taken and sets it
 * again, or found it still set; then its leaf bit was there before the clear
 * took that, so the second look finds it.
 *   If a word of level 1 has become zero, the clear takes the bit above it, and
 * so on upwards.  Then it waits until those who were setting summary bits have
 * finished, and looks at the words below all that it took again: one who found a
 * bit above still set has put the bit of level 1 there by then, one who comes
 * later finds what is missing.  Marks never wait.
 *   Where leaf words are emptied whatever they hold, the order is the other one:
 * the bits above them go first, then the words.  A mark that the words' going
 * leaves alone came after it, so it finds its bit of level 1 gone and sets it
 * again; no second look at the leaf is needed.
 */
#ifndef PYBITMAP_PROTOCOL_H
#define PYBITMAP_PROTOCOL_H

#include "block.h"

#pragma GCC visibility push(hidden)

/* Relaxed stores of single words, see words.h. */
#ifdef HB_TSAN
#define HB_BULK memory_order_seq_cst
#else
#define HB_BULK memory_order_relaxed
#endif

/* ---- marking upwards ---------------------------------------------------- */

/*
 * Sets `mask` in a word; false only if its bits were set already.  The test
 * before the read-modify-write keeps the line shared where nothing is to be
 * done, which is the common case.  It takes nothing from the protocol: what it
 * saw set was set by somebody at that moment, a clear that takes it comes later,
 * and the caller goes on either way.
 */
static inline bool hb_or(hb_word *word, uint64_t mask)
{
    if ((atomic_load(word) & mask) == mask) {
        return false;
    }
    /* Nobody asks what the word was: with the answer it would be a loop around
     * a compare-and-exchange. */
    atomic_fetch_or(word, mask);
    return true;
}

/* The same for one bit, which the test needs no mask for. */
static inline bool hb_or_bit(hb_word *words, uint64_t bit)
{
    hb_word *word = &words[bit / HB_BITS];

    if (atomic_load(word) >> (bit % HB_BITS) & 1) {
        return false;
    }
    atomic_fetch_or(word, hb_bit(bit));
    return true;
}

/* For one thread alone: relaxed, since nobody else is there. */
static inline void hb_or_alone(hb_word *word, uint64_t mask)
{
    mask |= atomic_load_explicit(word, memory_order_relaxed);
    atomic_store_explicit(word, mask, memory_order_relaxed);
}

/* Is bit `bit` of these words set? */
static inline bool hb_is_set(const hb_word *words, uint64_t bit)
{
    return atomic_load(&words[bit / HB_BITS]) >> (bit % HB_BITS) & 1;
}

/* Level 1 is to name these words under its word `parent`. */
__attribute__((noinline))
void hb_summarise_words(const struct hb_block *b, uint64_t parent, uint64_t words);

/*
 * The same for one leaf word.  As a rule it is named, so here is one load; what a
 * read-modify-write needs stands elsewhere, so that more marks fit into what
 * the processor does at a time.
 */
static inline void hb_summarise(const struct hb_block *b, uint64_t word)
{
    if (!hb_is_set(b->level[1], word)) {
        hb_summarise_words(b, word / HB_BITS, hb_bit(word));
    }
}

/* The same for the words [first, last]. */
void hb_summarise_range(const struct hb_block *b, uint64_t first, uint64_t last);

/*
 * May word `word` of the leaf hold something?  Where the summary says no, a mark
 * does not look before it writes: on fresh memory the look would cost a page
 * fault of its own.  Nothing depends on the answer being right, so this is a
 * relaxed load.
 */
static inline bool hb_maybe_dirty(const struct hb_block *b, uint64_t word)
{
    return atomic_load_explicit(&b->level[1][word / HB_BITS],
                                memory_order_relaxed) >> (word % HB_BITS) & 1;
}

/* Sets `mask` in a word of level k; false only if its bits were set already. */
static inline bool hb_mark_part(const struct hb_block *b, unsigned k,
                                uint64_t word, uint64_t mask)
{
    if (k > 0 || hb_maybe_dirty(b, word)) {
        return hb_or(&b->level[k][word], mask);
    }
    atomic_fetch_or(&b->level[0][word], mask);
    return true;
}

/* Sets the bits [first, last] of level k; false only if they were set already.
 * The caller's fence stands between this and the next level. */
bool hb_mark_level(const struct hb_block *b, unsigned k, uint64_t first, uint64_t last);

/* Marks the groups [first, last]; false only if all of them were set already. */
bool hb_mark(const struct hb_block *b, uint64_t first, uint64_t last);

/*
 * Marks in the words under word `parent` of level 1 what the named ones of those
 * at `source` have.  A word that gains nothing costs a load, one that does an
 * atomic or, as long as there are other threads.  As with any mark, level 1 is
 * seen to also where nothing changed.
 */
void hb_mark_words(const struct hb_block *to, uint64_t parent, const hb_word *source,
                   uint64_t named);

/* ---- clearing upwards: the caller holds the lock ------------------------ */

/* Bits of one word of level 2, over words of level 1 that have become empty. */
struct hb_gone {
    uint64_t word;
    uint64_t bits;
};

/*
 * `words` under word `parent` of level 1 were seen empty: takes their bits and
 * looks again.  What that has emptied on level 1 is collected in *gone (which
 * begins as zero) for hb_unsummarise_above, so that this waits once for many.
 */
void hb_unsummarise(const struct hb_block *b, uint64_t parent, uint64_t words,
               struct hb_gone *gone);

/* Takes the bits that were collected and what is above, as far as that is empty,
 * waits and looks again. */
void hb_unsummarise_above(const struct hb_block *b, struct hb_gone *gone);

/*
 * The first part of what empties leaf words by their pages: no word of level 1
 * under word `word` of level 2 names any, or none at all.  (Below two summaries,
 * word 0.)  The caller's fence stands between this and the pages' going.
 */
void hb_drop_summaries_under(const struct hb_block *b, uint64_t word);
void hb_drop_summaries(const struct hb_block *b);

/* ---- clearing groups ---------------------------------------------------- */

/* Does something to the groups [first, last]. */
typedef void hb_change(const struct hb_block *b, uint64_t first, uint64_t last);

/* Clears them. */
hb_change hb_clear;

/* Does so with a range of whole groups, holding the lock.  0, -ERANGE or -EINVAL, see
 * hbitmap_reset. */
int hb_change_groups(HBitmap *hb, uint64_t start, uint64_t count, hb_change *change);

#pragma GCC visibility pop

#endif
