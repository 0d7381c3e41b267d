/* SPDX-License-Identifier: MIT */
/*
 * What is done with whole pages.
 */
#ifndef PYBITMAP_PAGES_H
#define PYBITMAP_PAGES_H

#include "block.h"

/* From here on a leaf begins where a huge page can. */
#define HB_HUGE ((size_t)2 << 20)

/* So many bytes of fresh zeroes that take no memory until they are touched. */
void *hb_map(size_t nbytes);

/*
 * Empties the bitmap by moving its pages, all at once.  They are the caller's
 * then, *nbytes from where this says; what b marks from now on goes to fresh
 * ones.  NULL: it is not to be had, nothing has changed.
 */
hb_word *hb_move_leaf(const HBitmap *hb, const struct hb_block *b, size_t *nbytes);

/* Level-1 words over 4 KiB of leaf; how many such pieces have something named. */
enum { HB_PAGE_PARENTS = 4096 / sizeof(hb_word) / HB_BITS };

uint64_t hb_pages_named(const struct hb_block *b);

static inline uint64_t hb_pages(const struct hb_block *b)
{
    return (b->nwords[1] + (HB_PAGE_PARENTS - 1)) / HB_PAGE_PARENTS;
}

/*
 * Somebody is about to fill b, and will touch this many of those pieces at least:
 * if b is clean and that is nearly all, its pages are taken at once, huge ones
 * where the leaf is large.  True: hb_filled is to be called behind it, so that
 * a single mark does not take a huge page later on, when these have been given
 * back.
 */
bool hb_will_fill(const HBitmap *hb, const struct hb_block *b, uint64_t pages);
void hb_filled(const struct hb_block *b);

/* Are that many of those pieces nearly all? */
static inline bool hb_nearly_all(const struct hb_block *b, uint64_t pages)
{
    return pages >= hb_pages(b) - hb_pages(b) / 8;
}

/* Empties a large bitmap by giving its pages back, as far as that can be done. */
void hb_give_back(const HBitmap *hb, const struct hb_block *b);

#endif
