/* SPDX-License-Identifier: MIT */
/*
 * Masks: a byte for each bit, 1 or 0, as NumPy's arrays of bools have them, and back.
 * Not part of the core: it knows bits, no bitmaps.
 */
#ifndef PYBITMAP_MASK_H
#define PYBITMAP_MASK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/*
 * bools[i] becomes bit i % 8 of bits[i / 8], counted from the lowest, for all nbits of
 * them; what the last byte has beyond them is 0.  nbits, or the first i where there is
 * neither 0 nor 1: then all bits are 0 from the byte before on.
 *
 *     1 0 0 1 0 0 0 0  1  ->  0x09 0x01
 */
uint64_t hbmask_pack(uint8_t *bits, const uint8_t *bools, uint64_t nbits);

/* The way back: nbits bytes are written, 0 or 1 each. */
void hbmask_unpack(uint8_t *bools, const uint8_t *bits, uint64_t nbits);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
