/* SPDX-License-Identifier: MIT */
/*
 * A program in C without Python: the core compiled in, from its sources.
 *
 *     cc -std=c11 -O2 $(python -m pybitmap --cflags) -o program program.c \
 *         $(python -m pybitmap --sources --ldflags)
 */
#include <inttypes.h>
#include <stdio.h>

#include <hbitmap.h>

int main(void)
{
    HBitmap *hb = hbitmap_alloc(UINT64_C(1) << 40, 16);     /* 1 TiB, a bit for 64 KiB */
    int64_t start = 0, count;

    if (!hb) {
        perror("hbitmap_alloc");
        return 1;
    }
    (void)hbitmap_set(hb, 1000000, 100000);
    if (hbitmap_set(hb, UINT64_C(1) << 40, 512) < 0) {
        puts("a write beyond the end is refused");
    }
    while (hbitmap_next_dirty_area(hb, start, INT64_MAX, INT64_MAX, &start, &count)) {
        printf("%" PRId64 " bytes to copy at %" PRId64 "\n", count, start);
        start += count;
    }
    hbitmap_free(hb);
    return 0;
}
