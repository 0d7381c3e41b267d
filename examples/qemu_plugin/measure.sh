#!/bin/sh
# SPDX-License-Identifier: MIT
# What does libdirty.so cost? The same program under QEMU without a plugin, with one that is called at each
# store and does nothing, and with libdirty.so: medians of CPU seconds, and ratios.
#     ./measure.sh [ROUNDS]          (CC, PYTHON: as for make)
set -eu
cd "$(dirname "$0")"
rounds=${1:-5}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make -s OUT="$work" "$work/libdirty.so" "$work/libempty.so"
cat > "$work/program.c" << 'END'
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
enum { N = 1 << 23 };
static unsigned char *bytes;
static void *stores(void *which)        /* in order ('s'), all over ('r'), or a real loop: a sieve */
{
    uint64_t x = 88172645463325252u;
    if (*(const char *)which == 's') {
        for (int round = 0; round < 80; round++) {
            for (volatile uint64_t *at = (void *)bytes; at < (uint64_t *)(void *)(bytes + N); at++) *at = x;
        }
    } else if (*(const char *)which == 'r') {
        for (int i = 0; i < 8 * N; i++) {
            x ^= x << 13; x ^= x >> 7; x ^= x << 17;
            ((volatile unsigned char *)bytes)[x % N] = 1;
        }
    } else {
        for (int round = 0; round < 8; round++, memset(bytes, 0, N))
            for (size_t i = 2; i < N; i++) if (!bytes[i]) for (size_t k = 2 * i; k < N; k += i) bytes[k] = 1;
    }
    return NULL;
}
int main(int argc, char **argv)
{
    pthread_t other;
    bytes = calloc(N, 1);
    if (argc > 2) pthread_create(&other, NULL, stores, argv[1]);
    stores(argv[1]);
    if (argc > 2) pthread_join(other, NULL);
    return 0;
}
END
${CC:-cc} -O2 -static -pthread -o "$work/program" "$work/program.c"
${PYTHON:-python3} - "$work" "$rounds" << 'END'
import os, resource, statistics, subprocess, sys
work, rounds = sys.argv[1], int(sys.argv[2])
ways = ["no plugin", "empty", "libdirty"]
for name, what in [("in order", ["s"]), ("all over", ["r"]), ("a sieve", ["p"]), ("in order, two threads", ["s", "2"])]:
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            out = os.path.join(work, "out")
            plugin = {"no plugin": [], "empty": ["-plugin", f"{work}/libempty.so"],
                      "libdirty": ["-plugin", f"{work}/libdirty.so,out={out}"]}[way]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(["qemu-x86_64", *plugin, f"{work}/program", *what], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[way].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            if os.path.exists(out):
                os.unlink(out)
    median = {way: statistics.median(found[way]) for way in ways}
    print(f"{name:22}", *(f"{way} {median[way]:.2f} s" for way in ways),
          f"{median['libdirty'] / median['empty']:.2f} x empty, {median['libdirty'] / median['no plugin']:.1f} x no plugin", sep="   ")
END
