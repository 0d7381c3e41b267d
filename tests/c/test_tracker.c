/* SPDX-License-Identifier: MIT */
/*
 * The write path: bitmaps come and go while other threads mark.
 *
 *     test_tracker [SEED [ROUNDS]]
 *
 * A bitmap that records throughout must have every write; one that was left
 * out must stay as it was when publish returned, and may be freed at once
 * (AddressSanitizer looks on); a new one must have every write made after
 * publish returned.
 */
#include "tracker.h"
#include "workers.h"

enum { SIZE = 1 << 20, GRANULARITY = 4, GROUPS = SIZE >> GRANULARITY };

static HBTracker *tracker;
static HBitmap *always;         /* records throughout */
static uint64_t size_now;
static bool growing;
static unsigned nmarkers;
static atomic_uint marking;     /* markers that are not done */
static atomic_uint published;   /* number of the last guest that records */
static atomic_uint marked[GROUPS];  /* what it was before the group was marked */

static HBitmap *make(uint64_t size)
{
    HBitmap *hb = hbitmap_alloc(size, GRANULARITY);

    CHECK(hb != NULL, "errno %d", errno);
    return hb;
}

static void publish(HBitmap *const *bitmaps, size_t n, uint64_t size, bool readonly)
{
    HBTrackerSet *set = hbtracker_set_alloc(size, bitmaps, n, readonly);

    CHECK(set != NULL, "no memory for a set of %zu", n);
    hbtracker_publish(tracker, set);
}

/* ---- one thread --------------------------------------------------------- */

static void test_writes(void)
{
    HBitmap *a = make(SIZE), *b = make(SIZE);
    HBitmap *both[] = { a, b };
    uint64_t offsets[] = { 0, 64, 128 }, lengths[] = { 1, 0, 16 };
    uint64_t beyond[] = { 0, SIZE, 1 };

    tracker = hbtracker_alloc();
    CHECK(tracker != NULL, "no memory");
    CHECK_EQ(hbtracker_mark(tracker, 0, 1), -ERANGE);
    CHECK_EQ(hbtracker_mark(tracker, 7, 0), 0);
    publish(both, 2, SIZE, false);
    CHECK_EQ(hbtracker_mark(tracker, SIZE - 1, 1), 0);
    CHECK_EQ(hbitmap_count(a), 16);
    CHECK(hbitmap_equal(a, b), "one write, two bitmaps");
    CHECK_EQ(hbtracker_mark(tracker, SIZE, 1), -ERANGE);
    CHECK_EQ(hbtracker_mark(tracker, 1, UINT64_MAX), -ERANGE);
    CHECK_EQ(hbtracker_mark_many(tracker, beyond, lengths, 2), 0);
    CHECK_EQ(hbtracker_mark_many(tracker, beyond, beyond, 3), -ERANGE);
    CHECK_EQ(hbtracker_mark_many(tracker, offsets, lengths, 3), 0);
    CHECK_EQ(hbitmap_count(a), 3 * 16);
    publish(both, 1, SIZE, true);
    CHECK_EQ(hbtracker_mark(tracker, 512, 1), -EROFS);
    CHECK_EQ(hbtracker_mark(tracker, 512, 0), 0);
    CHECK_EQ(hbtracker_mark_many(tracker, beyond, lengths, 1), -EROFS);
    CHECK_EQ(hbitmap_count(a), 3 * 16);
    publish(both + 1, 1, SIZE, false);
    CHECK_EQ(hbtracker_mark(tracker, 512, 1), 0);
    CHECK_EQ(hbitmap_count(a), 3 * 16);
    CHECK_EQ(hbitmap_count(b), 4 * 16);
    hbtracker_publish(tracker, NULL);
    CHECK_EQ(hbtracker_try_mark(tracker, 1024, 1), -EAGAIN);
    CHECK_EQ(hbtracker_try_mark(tracker, SIZE, 1), -EAGAIN);
    publish(both + 1, 1, SIZE, false);
    CHECK_EQ(hbitmap_count(b), 4 * 16);
    CHECK_EQ(hbtracker_try_mark(tracker, SIZE, 1), -ERANGE);
    CHECK_EQ(hbtracker_try_mark(tracker, 1024, 1), 0);
    CHECK_EQ(hbitmap_count(b), 5 * 16);
    hbtracker_free(tracker);
    hbtracker_free(NULL);
    hbtracker_set_free(NULL);
    hbitmap_free(a);
    hbitmap_free(b);
    ok("writes, refused and not");
}

/* ---- many --------------------------------------------------------------- */

/* Marks each group of its residue once, in ascending order, one write or
 * several at a time. */
static void mark_all(struct worker *self)
{
    uint64_t offsets[8], lengths[8], groups[8];

    for (uint64_t group = self->index; group < GROUPS;) {
        uint64_t most = 1 + rng_below(&self->rng, 8);
        unsigned seen = atomic_load(&published);
        size_t n = 0;

        for (; n < most && group < GROUPS; n++, group += nmarkers) {
            groups[n] = group;
            offsets[n] = group << GRANULARITY;
            lengths[n] = 1 + rng_below(&self->rng, 1 << GRANULARITY);
        }
        if (n == 1 && rng_one_in(&self->rng, 2)) {
            int err = hbtracker_try_mark(tracker, offsets[0], lengths[0]);

            if (err) {
                CHECK_EQ(err, -EAGAIN);
                CHECK_EQ(hbtracker_mark(tracker, offsets[0], lengths[0]), 0);
            }
        } else if (n == 1) {
            CHECK_EQ(hbtracker_mark(tracker, offsets[0], lengths[0]), 0);
        } else {
            CHECK_EQ(hbtracker_mark_many(tracker, offsets, lengths, n), 0);
        }
        while (n--) {
            atomic_store(&marked[groups[n]], seen);
        }
        linger(self, 40);
    }
    atomic_fetch_sub(&marking, 1);
}

/* Adds a bitmap beside `always`, takes it out again and frees it. */
static void come_and_go(struct worker *self)
{
    for (unsigned number = 1; atomic_load(&marking); number++) {
        HBitmap *guest = make(size_now);
        HBitmap *both[] = { always, guest };
        HBitmap *turned[] = { guest, always };
        bool *must_have = grab(GROUPS);
        uint64_t count;

        publish(rng_one_in(&self->rng, 2) ? both : turned, 2, size_now, false);
        atomic_store(&published, number);
        linger(self, 20000);
        for (uint64_t group = 0; group < GROUPS; group++) {
            must_have[group] = atomic_load(&marked[group]) == number;
        }
        publish(both, 1, size_now, false);

        count = hbitmap_count(guest);
        for (uint64_t group = 0; group < GROUPS; group++) {
            CHECK(!must_have[group] || hbitmap_get(guest, group << GRANULARITY),
                  "group %" PRIu64 " was written while guest %u recorded", group,
                  number);
        }
        linger(self, 2000);
        CHECK_VALID(guest);
        CHECK_EQ(hbitmap_count_range(guest, 0, size_now), count);
        CHECK(hbitmap_is_subset(guest, always) == 1, "it has what `always` lacks");
        hbitmap_free(guest);
        free(must_have);

        if (growing && size_now < 4 * SIZE) {
            size_now += 1 << GRANULARITY;
            hbtracker_publish(tracker, NULL);
            CHECK_EQ(hbitmap_truncate(always, size_now), 0);
            publish(both, 1, size_now, false);
        }
    }
}

static void test_coming_and_going(bool grow)
{
    growing = grow;
    size_now = SIZE;
    always = make(SIZE);
    tracker = hbtracker_alloc();
    CHECK(tracker != NULL, "no memory");
    publish(&always, 1, SIZE, false);
    for (uint64_t group = 0; group < GROUPS; group++) {
        atomic_store(&marked[group], 0);
    }
    atomic_store(&published, 0);
    nworkers = 0;
    nmarkers = 3;
    atomic_store(&marking, nmarkers);
    add(nmarkers, mark_all);
    add(1, come_and_go);
    run_workers();
    CHECK_VALID(always);
    CHECK_EQ(hbitmap_count(always), SIZE);
    hbtracker_free(tracker);
    hbitmap_free(always);
}

/* ---- a thread that marks when it has all but ended ---------------------- */

/*
 * Its slot has gone to another thread by then: what it does must not hide from
 * publish that the other one is marking.
 */
enum { LATE_WRITES = 4096, LATE_GROUPS = 1 << 19 };

static pthread_key_t late_key;
static HBitmap *late_bitmap;

static void *late_many(void *unused)
{
    uint64_t *offsets = grab(LATE_WRITES * sizeof(*offsets));
    uint64_t *lengths = grab(LATE_WRITES * sizeof(*lengths));

    (void)unused;
    for (int i = 0; i < LATE_WRITES; i++) {
        lengths[i] = LATE_GROUPS;
    }
    CHECK_EQ(hbtracker_mark_many(tracker, offsets, lengths, LATE_WRITES), 0);
    free(offsets);
    free(lengths);
    return NULL;
}

/* Called when the thread's slot has been left: the key of that is the older. */
static void late_leave(void *other)
{
    CHECK_EQ(pthread_create(other, NULL, late_many, NULL), 0);
    while (!hbitmap_get(late_bitmap, LATE_GROUPS - 1)) {
        sched_yield();
    }
    CHECK_EQ(hbtracker_mark(tracker, 0, 1), 0);
}

static void *late_mark(void *other)
{
    CHECK_EQ(hbtracker_mark(tracker, 0, 1), 0);
    CHECK_EQ(pthread_setspecific(late_key, other), 0);
    return NULL;
}

static void test_late_marks(void)
{
    pthread_t thread, other;

    CHECK_EQ(pthread_key_create(&late_key, late_leave), 0);
    late_bitmap = hbitmap_alloc(LATE_GROUPS, 0);
    tracker = hbtracker_alloc();
    CHECK(late_bitmap && tracker, "no memory");
    publish(&late_bitmap, 1, LATE_GROUPS, false);
    CHECK_EQ(pthread_create(&thread, NULL, late_mark, &other), 0);
    pthread_join(thread, NULL);
    publish(NULL, 0, LATE_GROUPS, false);
    /* Nobody marks it any more. */
    hbitmap_reset_all(late_bitmap);
    pthread_join(other, NULL);
    CHECK(hbitmap_empty(late_bitmap), "marked after publish had left it out");
    hbtracker_free(tracker);
    hbitmap_free(late_bitmap);
    pthread_key_delete(late_key);
    ok("a thread marks when it has all but ended");
}

int main(int argc, char **argv)
{
    unsigned long rounds = read_arguments(argc, argv, 20);

    rng = test_seed;
    test_writes();
    test_late_marks();          /* before other threads have left slots behind */
    for (unsigned long round = 0; round < rounds; round++) {
        test_coming_and_going(false);
    }
    ok("bitmaps come and go, and no write is lost");
    for (unsigned long round = 0; round < rounds; round++) {
        test_coming_and_going(true);
    }
    ok("and the device grows");
    return 0;
}
