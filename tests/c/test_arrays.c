/* SPDX-License-Identifier: MIT */
/*
 * Streams of arrow.h, taken and released in every way that the interface allows, and masks
 * of mask.h beside a loop over single bits.  What is freed twice, or not at all, the
 * sanitizers say: make asan-c.
 */
#include <pthread.h>

#include "arrow.h"
#include "mask.h"
#include "support.h"

enum { ROWS = 1000 };

static uint64_t values[2 * ROWS];
static uint64_t rng;

/* ---- streams ------------------------------------------------------------- */

static void *release_in_thread(void *array)
{
    struct hbarrow_array *each = array;

    each->release(each);
    return NULL;
}

static void check_batch(const struct hbarrow_array *batch, uint64_t nrows, unsigned ncolumns)
{
    CHECK_EQ(batch->length, nrows);
    CHECK_EQ(batch->n_children, ncolumns);
    CHECK_EQ(batch->n_buffers, 1);
    for (unsigned column = 0; column < ncolumns; column++) {
        const struct hbarrow_array *each = batch->children[column];
        const uint64_t *found = each->buffers[1];

        CHECK_EQ(each->length, nrows);
        CHECK_EQ(each->n_buffers, 2);
        CHECK_EQ((uintptr_t)found % 8, 0);
        for (uint64_t row = 0; row < nrows; row++) {
            CHECK_EQ(found[row], values[row * ncolumns + column]);
        }
    }
}

/* What is done with a stream: bit by bit, yes or no. */
enum { SCHEMA = 1, TAKE = 2, MOVE = 4, MOVE_CHILD = 8, CHILD_FIRST = 16, THREAD = 32, WAYS = 64 };

static void use(uint64_t nrows, unsigned ncolumns, unsigned way)
{
    struct hbarrow_stream *stream = hbarrow_alloc(), moved, *used = stream;
    struct hbarrow_array batch, child = { 0 };
    struct hbarrow_schema schema, field;

    trace("%" PRIu64 " rows of %u, way %u", nrows, ncolumns, way);
    CHECK(stream && !stream->release, "no stream that is released");
    CHECK_EQ(hbarrow_fill(stream, values, nrows, 3), -EINVAL);
    CHECK_EQ(hbarrow_fill(stream, values, nrows, 0), -EINVAL);
    CHECK_EQ(!stream->release, 1);
    CHECK_EQ(hbarrow_fill(stream, values, nrows, ncolumns), 0);
    if (way & MOVE) {
        moved = *stream;
        stream->release = NULL;
        used = &moved;
        hbarrow_free(stream);
    }
    if (way & SCHEMA) {
        CHECK_EQ(used->get_schema(used, &schema), 0);
        CHECK_EQ(strcmp(schema.format, "+s"), 0);
        CHECK_EQ(strcmp(schema.children[0]->name, "offset"), 0);
        if (way & MOVE_CHILD) {
            field = *schema.children[0];
            schema.children[0]->release = NULL;
            schema.release(&schema);
            field.release(&field);
        } else {
            schema.release(&schema);
        }
        CHECK_EQ(!schema.release, 1);
    }
    if (way & TAKE) {
        CHECK_EQ(used->get_next(used, &batch), 0);
        check_batch(&batch, nrows, ncolumns);
        if (way & MOVE_CHILD) {
            child = *batch.children[ncolumns - 1];
            batch.children[ncolumns - 1]->release = NULL;
        }
    }
    if (way & MOVE) {
        used->release(used);
        CHECK_EQ(!used->release, 1);
    } else {
        hbarrow_free(stream);
    }
    if (way & TAKE) {
        if (child.release && way & CHILD_FIRST) {
            child.release(&child);
        }
        if (way & THREAD) {
            pthread_t thread;

            CHECK_EQ(pthread_create(&thread, NULL, release_in_thread, &batch), 0);
            CHECK_EQ(pthread_join(thread, NULL), 0);
        } else {
            batch.release(&batch);
        }
        CHECK_EQ(!batch.release, 1);
        if (child.release) {
            const uint64_t *found = child.buffers[1];

            for (uint64_t row = 0; row < nrows; row++) {
                CHECK_EQ(found[row], values[row * ncolumns + ncolumns - 1]);
            }
            child.release(&child);
        }
    }
}

/* ---- masks --------------------------------------------------------------- */

static void check_mask(uint64_t nbits, unsigned one_in)
{
    uint8_t *bools = grab(nbits + 1), *back = grab(nbits + 1);
    uint64_t nbytes = (nbits + 7) / 8;
    uint8_t *bits = grab(nbytes + 1);

    trace("a mask of %" PRIu64 ", one in %u", nbits, one_in);
    for (uint64_t i = 0; i < nbits; i++) {
        bools[i] = rng_below(&rng, one_in) == 0;
    }
    bools[nbits] = back[nbits] = bits[nbytes] = 0xaa;   /* not to be touched */
    CHECK_EQ(hbmask_pack(bits, bools, nbits), nbits);
    for (uint64_t i = 0; i < 8 * nbytes; i++) {
        CHECK_EQ(bits[i / 8] >> i % 8 & 1, i < nbits ? bools[i] : 0);
    }
    hbmask_unpack(back, bits, nbits);
    CHECK_EQ(memcmp(bools, back, nbits), 0);
    CHECK_EQ(bools[nbits], 0xaa);
    CHECK_EQ(back[nbits], 0xaa);
    CHECK_EQ(bits[nbytes], 0xaa);
    if (nbits) {
        uint64_t bad = rng_below(&rng, nbits);

        bools[bad] = (uint8_t)(2 + rng_below(&rng, 254));
        CHECK_EQ(hbmask_pack(bits, bools, nbits), bad);
    }
    free(bools);
    free(back);
    free(bits);
}

int main(int argc, char **argv)
{
    (void)read_arguments(argc, argv, 1);
    rng = test_seed;
    for (unsigned i = 0; i < 2 * ROWS; i++) {
        values[i] = rng_next(&rng);
    }
    for (unsigned way = 0; way < WAYS; way++) {
        for (unsigned ncolumns = 1; ncolumns <= 2; ncolumns++) {
            use(0, ncolumns, way);
            use(1, ncolumns, way);
            use(ROWS, ncolumns, way);
        }
    }
    hbarrow_free(NULL);
    ok("streams");
    for (uint64_t nbits = 0; nbits < 300; nbits++) {
        check_mask(nbits, 1 + (unsigned)rng_below(&rng, 4));
    }
    ok("masks");
    return 0;
}
