/* SPDX-License-Identifier: MIT */
/*
 * What is done with whole pages.
 */
#ifndef PYBITMAP_PAGES_H
#define PYBITMAP_PAGES_H

#include "block.h"

#pragma GCC visibility push(hidden)

/* From here on a leaf begins where a huge page can. */
#define HB_HUGE ((size_t)2 << 20)

/* Words of level 1 over so much leaf. */
enum { HB_HUGE_PARENTS = ((size_t)2 << 20) / sizeof(hb_word) / HB_BITS };

/* So many bytes of fresh zeroes that take no memory until they are touched. */
void *hb_map(size_t nbytes);

/*
 * Empties the bitmap by moving its pages, all at once.  They are the caller's
 * then, *nbytes from where this says; what b marks from now on goes to fresh
 * ones.  NULL: it is not to be had, nothing has changed.
 */
hb_word *hb_move_leaf(const struct hb_block *b, size_t *nbytes);

/*
 * Moves whole pages of the leaf of `from` into that of `to`, which nobody else uses:
 * at most `words` leaf words, returns how many.  `from` has zeroes there then, and its
 * summaries as they were.
 */
uint64_t hb_move_pages(const struct hb_block *from, const struct hb_block *to,
                       uint64_t words);

/* The words under word `parent` of level 1 were the first to be named there: where
 * marks come densely, pages are taken many at a time. */
void hb_first_named(const struct hb_block *b, uint64_t parent);

/* Level-1 words over 4 KiB of leaf; how many such pieces have something named. */
enum { HB_PAGE_PARENTS = 4096 / sizeof(hb_word) / HB_BITS };

uint64_t hb_pages_named(const struct hb_block *b);

static inline uint64_t hb_pages(uint64_t words)
{
    return (words - 1) / HB_BITS / HB_PAGE_PARENTS + 1;
}

/* Are that many nearly all of those that so many leaf words have? */
static inline bool hb_nearly_all(uint64_t pages, uint64_t words)
{
    return pages >= hb_pages(words) - hb_pages(words) / 8;
}

/*
 * Somebody is about to fill the first `words` of the leaf, and will touch this many of
 * those pieces at least: if b is clean and that is nearly all, huge pages are taken,
 * if the leaf is large enough for one.  True: hb_filled is to be called behind it, so that
 * a single mark does not take a huge page later on, when these have been given
 * back.
 */
bool hb_will_fill(const struct hb_block *b, uint64_t words, uint64_t pages);
void hb_filled(const struct hb_block *b);

/* Empties a large bitmap by giving its pages back, as far as that can be done. */
void hb_give_back(const struct hb_block *b);

#pragma GCC visibility pop

#endif
