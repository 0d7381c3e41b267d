/* SPDX-License-Identifier: MIT */
/*
 * THREADS.  What is packed is somebody else's memory and may be changing: each byte is
 * read once.
 *
 * Workload: masks of some millions of groups, in one call.  Eight bytes at a time, by a
 * multiplication: their bits come to lie beside each other, or are spread.
 */
#include <stdbool.h>
#include <string.h>

#include "mask.h"
#include "words.h"

#define HB_ONES UINT64_C(0x0101010101010101)

/* Of 8 bytes, byte i is 0 or 1; bit i is that. */
static inline uint8_t hb_pack_byte(uint64_t bools)
{
    return (uint8_t)((bools * UINT64_C(0x0102040810204080)) >> 56);
}

/* Byte i is bit i. */
static inline uint64_t hb_spread_byte(uint8_t bits)
{
    uint64_t one_each = (bits * HB_ONES) & UINT64_C(0x8040201008040201);

    return (one_each + (HB_ONES * 0x7f)) >> 7 & HB_ONES;
}

uint64_t hbmask_pack(uint8_t *bits, const uint8_t *bools, uint64_t nbits)
{
    memset(bits, 0, (size_t)((nbits + 7) / 8));
    for (uint64_t at = 0; at < nbits; at += 8) {
        uint64_t eight = 0, n = nbits - at < 8 ? nbits - at : 8;

        memcpy(&eight, bools + at, (size_t)n);
        if (eight & ~HB_ONES) {
            uint8_t bytes[8];   /* their memory may have become another meanwhile */

            memcpy(bytes, &eight, sizeof(bytes));
            for (n = 0; bytes[n] <= 1; n++) {
            }
            return at + n;
        }
        bits[at / 8] = hb_pack_byte(hb_little_endian(eight));
    }
    return nbits;
}

void hbmask_unpack(uint8_t *bools, const uint8_t *bits, uint64_t nbits)
{
    for (uint64_t at = 0; at < nbits; at += 8) {
        uint64_t eight = hb_little_endian(hb_spread_byte(bits[at / 8]));

        memcpy(bools + at, &eight, (size_t)(nbits - at < 8 ? nbits - at : 8));
    }
}
