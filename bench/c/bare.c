/* SPDX-License-Identifier: MIT */
/*
 * What trackers and snapshots are measured against, without anything around it: compiled
 * and loaded by bench_trackers.py.
 */
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

#ifdef __linux__
struct run {
    uint64_t start, end, categories;
};

struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

/* Fetches and clears, and forgets; returns the number of runs, or -1. */
long bare_scan(int pagemap, uint64_t start, uint64_t end)
{
    struct run runs[512];
    struct scan scan = {
        .size = sizeof(scan), .flags = 3, .start = start, .end = end,
        .vec = (uintptr_t)runs, .vec_len = 512, .category_mask = 2, .return_mask = 2,
    };
    long all = 0;

    while (scan.start < scan.end) {
        int n = ioctl(pagemap, _IOWR('f', 16, struct scan), &scan);

        if (n < 0) {
            return -1;
        }
        all += n;
        scan.start = scan.walk_end;
    }
    return all;
}
#endif

/* Copies areas, start and count in turn. */
void bare_copy(char *dst, const char *src, const uint64_t *areas, uint64_t nareas)
{
    for (uint64_t i = 0; i < nareas; i++) {
        memcpy(dst + areas[2 * i], src + areas[2 * i], areas[2 * i + 1]);
    }
}
