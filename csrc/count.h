/* SPDX-License-Identifier: MIT */
/*
 * How many groups are dirty, at a price that follows what has changed since that
 * was last asked.
 *
 * The block remembers how many groups were dirty in each piece of the leaf (a
 * word of level 1: 4096 groups) when somebody last counted, and their sum.
 * Whatever changes the leaf leaves a note for the piece, and one at the top, for a
 * 64th of all words of notes or for one of them:
 *
 *     top                0..010..0    a word
 *     notes    0..00010  0..0  0..0   a bit for each piece
 *
 * who changes (a mark, say)           who counts (one at a time, by the lock)
 * ----------------------------------------------------------------------------
 * 1 sets bits of the leaf             1 waits for those between 3 and 6
 * 2 looks at the note: set, as a      2 says that it counts
 *   rule, and it is done              3 takes the top
 * 3 says that it is summarising       4 takes the notes below it
 * 4 sets the note                     5 counts the pieces that these are for
 * 5 sets the note at the top          6 stores the sum, says that it has counted
 * 6 says that it is done
 *
 * Who finds a note set has changed the leaf before it was taken, so step 5 sees the
 * change; and who set it has been at the top when step 1 is over.  If there is no
 * note at the top then, and nobody is counting, the sum is right; asked in this
 * order.
 */
#ifndef PYBITMAP_COUNT_H
#define PYBITMAP_COUNT_H

#include "protocol.h"

#pragma GCC visibility push(hidden)

/* Sets notes in word `word`, and the one over it. */
__attribute__((noinline))
void hb_note_first(const struct hb_block *b, uint64_t word, uint64_t notes);

/* The pieces under `bits` of word `word` of level 2 have changed. */
static inline void hb_note_bits(const struct hb_block *b, uint64_t word, uint64_t bits)
{
    if (bits & ~atomic_load(&b->notes[word])) {
        hb_note_first(b, word, bits);
    }
}

/* The piece under word `parent` of level 1 has changed. */
static inline void hb_note(const struct hb_block *b, uint64_t parent)
{
    if (!hb_is_set(b->notes, parent)) {
        hb_note_first(b, parent / HB_BITS, hb_bit(parent));
    }
}

/* So have those under the words [first, last] of level 1. */
void hb_note_range(const struct hb_block *b, uint64_t first, uint64_t last);

/* So have all that have something named; the others had nothing before. */
void hb_note_named(const struct hb_block *b);

/* In the child of a fork, where a thread that counted may be lost: all that has
 * something named, or had, is counted again. */
void hb_count_again(struct hb_block *b);

#pragma GCC visibility pop

#endif
