/* SPDX-License-Identifier: MIT */
/*
 * The write path: bitmaps come and go while other threads mark.
 *
 *     test_tracker [SEED [ROUNDS [SCENARIO]]]
 *
 * A bitmap that records throughout must have every write; one that was left
 * out must stay as it was when publish returned, and may be freed at once
 * (AddressSanitizer looks on); a new one must have every write made after
 * publish returned.  Where several trackers get new bitmaps at one instant, no
 * write is on the wrong side of it.
 *
 * SCENARIO: only those whose name contains this.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* usleep */
#endif

#include <signal.h>
#include <unistd.h>

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

/* A mark in memory that was freed may end here before a check notices it.  Sanitizers
 * say more themselves. */
#ifndef SANITIZED
static void fault(int number)
{
    CHECK(false, "signal %d", number);
}
#endif

static HBitmap *make(uint64_t size)
{
    HBitmap *hb = hbitmap_alloc(size, GRANULARITY);

    CHECK(hb != NULL, "errno %d", errno);
    return hb;
}

static HBTracker *make_tracker(void)
{
    HBTracker *made = hbtracker_alloc();

    CHECK(made != NULL, "no memory for a tracker");
    return made;
}

static HBTrackerSet *make_set(HBitmap *const *bitmaps, size_t n, uint64_t size,
                              bool readonly)
{
    HBTrackerSet *set = hbtracker_set_alloc(size, bitmaps, n, readonly);

    CHECK(set != NULL, "no memory for a set of %zu", n);
    return set;
}

static void publish(HBitmap *const *bitmaps, size_t n, uint64_t size, bool readonly)
{
    hbtracker_publish(tracker, make_set(bitmaps, n, size, readonly));
}

/* n writes, in one of the ways there are. */
static void mark_somehow(struct worker *self, HBTracker *where, const uint64_t *offsets,
                         const uint64_t *lengths, size_t n)
{
    if (n > 1) {
        CHECK_EQ(hbtracker_mark_many(where, offsets, lengths, n), 0);
        return;
    }
    if (rng_one_in(&self->rng, 2)) {
        int err = hbtracker_try_mark(where, offsets[0], lengths[0]);

        if (!err) {
            return;
        }
        CHECK_EQ(err, -EAGAIN);
    }
    CHECK_EQ(hbtracker_mark(where, offsets[0], lengths[0]), 0);
}

/* ---- one thread --------------------------------------------------------- */

static void test_writes(void)
{
    HBitmap *a = make(SIZE), *b = make(SIZE);
    HBitmap *both[] = { a, b };
    uint64_t offsets[] = { 0, 64, 128 }, lengths[] = { 1, 0, 16 };
    uint64_t beyond[] = { 0, SIZE, 1 };

    tracker = make_tracker();
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
}

static void test_publishing_all(void)
{
    enum { N = 4, SMALL = 64 };
    static const uint64_t sizes[N] = { SIZE, 2 * SIZE, SMALL, SIZE };
    HBTracker *trackers[N];
    HBTrackerSet *sets[N];
    HBitmap *old[N], *now[N];

    hbtracker_publish_all(NULL, NULL, 0);
    for (int i = 0; i < N; i++) {
        trackers[i] = make_tracker();
        old[i] = make(SIZE);
        now[i] = make(sizes[i]);
        sets[i] = make_set(&old[i], 1, SIZE, i == 2);
        hbtracker_publish_all(&trackers[i], &sets[i], 1);
        CHECK(sets[i] == NULL, "set %d is still the caller's", i);
        CHECK_EQ(hbtracker_mark(trackers[i], 0, 1), i == 2 ? -EROFS : 0);
    }
    hbtracker_publish(trackers[3], NULL);
    CHECK_EQ(hbtracker_try_mark(trackers[3], 16, 1), -EAGAIN);
    for (int i = 0; i < N; i++) {
        sets[i] = make_set(&now[i], 1, sizes[i], i == 1);
    }
    hbtracker_publish_all(trackers, sets, N);
    for (int i = 0; i < N; i++) {
        CHECK(sets[i] == NULL, "set %d is still the caller's", i);
        CHECK_EQ(hbtracker_mark(trackers[i], sizes[i] - 1, 1), i == 1 ? -EROFS : 0);
        CHECK_EQ(hbtracker_try_mark(trackers[i], sizes[i], 1), -ERANGE);
        CHECK_EQ(hbitmap_count(now[i]), i == 1 ? 0 : 16);
        CHECK_EQ(hbitmap_count(old[i]), i == 2 ? 0 : 16);
        hbitmap_free(old[i]);
    }
    /* Where all of them wait, some of which were refused before. */
    for (int i = 0; i < N; i++) {
        hbtracker_publish(trackers[i], NULL);
        CHECK_EQ(hbtracker_try_mark(trackers[i], 0, 1), -EAGAIN);
        sets[i] = make_set(&now[i], 1, sizes[i], false);
    }
    hbtracker_publish_all(trackers, sets, 1);
    CHECK_EQ(hbtracker_try_mark(trackers[1], 0, 1), -EAGAIN);
    hbtracker_publish_all(trackers + 1, sets + 1, N - 1);
    for (int i = 0; i < N; i++) {
        uint64_t offsets[] = { 0, 32 }, lengths[] = { 1, 1 };

        CHECK_EQ(hbtracker_mark_many(trackers[i], offsets, lengths, 2), 0);
        CHECK_EQ(hbitmap_count(now[i]), i == 1 ? 32 : 48);
        hbtracker_free(trackers[i]);
        hbitmap_free(now[i]);
    }
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
        mark_somehow(self, tracker, offsets, lengths, n);
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
    tracker = make_tracker();
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

static void test_one_size(void)
{
    test_coming_and_going(false);
}

static void test_growth(void)
{
    test_coming_and_going(true);
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
    WAIT_UNTIL(hbitmap_get(late_bitmap, LATE_GROUPS - 1));
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
    CHECK(late_bitmap != NULL, "errno %d", errno);
    tracker = make_tracker();
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
}

/* ---- several trackers at one instant ------------------------------------ */

/*
 * A chain is a sequence of writes, each of which begins when the one before it
 * has returned: those of one thread, or of several that take turns.  Every chain
 * has pages of its own, writes each of them once on every node, and goes from
 * node to node in a way of its own.
 *
 * Meanwhile one thread publishes new bitmaps on all nodes at one instant, again
 * and again: a generation.  When the call has returned, the bitmaps of the
 * generation before do not change any more.  In the end
 *
 *     each write is in one generation,
 *     along a chain the generations never go back, whatever the nodes, and
 *     a write is in no older generation than one that had returned before it
 *     began, of another chain.
 */
enum { MOST_NODES = 5, MOST_CHAINS = 5 };

static struct node {
    HBTracker *tracker;
    HBitmap *always, *now;
} nodes[MOST_NODES];

static unsigned nnodes;

struct write {
    unsigned node, page;
    unsigned seen;          /* how many of the next chain had returned */
};

/* How a chain writes. */
static const struct style {
    unsigned members;       /* threads that take turns */
    int step;               /* to the next node; 0: to any */
    unsigned most;          /* writes at a time */
    unsigned pages;         /* on each node */
    uint64_t length;        /* of a page, in groups */
} styles[MOST_CHAINS] = {
    { 2, 1, 1, 40, 1 },
    { 1, 1, 1, 1200, 1 },
    { 1, -1, 1, 1200, 3 },
    { 1, 0, 12, 6000, 1 },
    { 1, 1, 9000, 4500, 70 },      /* more than mark_many marks at a stretch */
};

static struct chain {
    const struct style *style;
    uint64_t first;         /* group of page 0 */
    struct write *writes;
    unsigned begun;
    atomic_uint returned, turn;
    unsigned node, next[MOST_NODES];    /* the last one, and the next page of each */
    /* By page, where it was found; 0: nowhere yet. */
    unsigned *generation[MOST_NODES];
} chains[MOST_CHAINS];

static unsigned nchains;

static const struct chain *next_chain(const struct chain *chain)
{
    return &chains[(size_t)(chain - chains + 1) % nchains];
}

/* Returns how many writes; 0 at the end. */
static unsigned write_next(struct worker *self, struct chain *chain, uint64_t *offsets,
                           uint64_t *lengths)
{
    const struct style *style = chain->style;
    unsigned seen = atomic_load(&next_chain(chain)->returned);
    unsigned n = 1 + (unsigned)rng_below(&self->rng, style->most), node = chain->node;

    if (chain->begun == nnodes * style->pages) {
        return 0;
    }
    node += style->step ? nnodes + (unsigned)style->step
                        : (unsigned)rng_below(&self->rng, nnodes);
    while (chain->next[node % nnodes] == style->pages) {
        node++;
    }
    chain->node = node %= nnodes;
    for (unsigned i = 0; i < n; i++) {
        uint64_t page = chain->next[node]++;

        chain->writes[chain->begun++] = (struct write){ node, (unsigned)page, seen };
        offsets[i] = (chain->first + page * style->length) << GRANULARITY;
        lengths[i] = (style->length << GRANULARITY) -
                     rng_below(&self->rng, 1 << GRANULARITY);
        if (chain->next[node] == style->pages) {
            n = i + 1;
        }
    }
    mark_somehow(self, nodes[node].tracker, offsets, lengths, n);
    atomic_store(&chain->returned, chain->begun);
    return n;
}

static void write_chain(struct worker *self)
{
    struct chain *chain = &chains[self->index % nchains];
    unsigned member = self->index / nchains;
    uint64_t *offsets = grab(chain->style->most * sizeof(*offsets));
    uint64_t *lengths = grab(chain->style->most * sizeof(*lengths));
    unsigned n;

    do {
        WAIT_UNTIL(atomic_load(&chain->turn) % chain->style->members == member);
        n = write_next(self, chain, offsets, lengths);
        atomic_fetch_add(&chain->turn, 1);
        linger(self, 400 * n);
    } while (n);
    free(offsets);
    free(lengths);
    atomic_fetch_sub(&marking, 1);
}

/* Whose writes are in a bitmap of that generation; returns how many groups. */
static uint64_t sort_out(const HBitmap *hb, unsigned node, unsigned number)
{
    uint64_t groups = 0;

    for (unsigned c = 0; c < nchains; c++) {
        const struct style *style = chains[c].style;
        uint64_t first = chains[c].first, length = style->length;
        int64_t start = (int64_t)(first << GRANULARITY), count = 0;
        int64_t end = (int64_t)((first + style->pages * length) << GRANULARITY);

        while (hbitmap_next_dirty_area(hb, start + count, end, INT64_MAX, &start,
                                       &count)) {
            uint64_t from = ((uint64_t)start >> GRANULARITY) - first;
            uint64_t n = (uint64_t)count >> GRANULARITY;

            CHECK(from % length == 0 && n % length == 0,
                  "chain %u, node %u: groups %" PRIu64 " + %" PRIu64 " of generation "
                  "%u are not whole writes", c, node, from, n, number);
            for (uint64_t page = from / length; page < (from + n) / length; page++) {
                unsigned *where = &chains[c].generation[node][page];

                CHECK(*where == 0, "chain %u, node %u: page %" PRIu64 " is in the "
                      "generations %u and %u", c, node, page, *where, number);
                *where = number;
            }
            groups += n;
        }
    }
    return groups;
}

/* On all nodes, in any order.  Some may have waited. */
static void publish_generation(struct worker *self)
{
    HBTracker *trackers[MOST_NODES];
    HBTrackerSet *sets[MOST_NODES];
    unsigned from = (unsigned)rng_below(&self->rng, nnodes);

    for (unsigned i = 0; i < nnodes; i++) {
        struct node *node = &nodes[(from + i) % nnodes];
        HBitmap *both[] = { node->always, NULL };
        uint64_t size = hbitmap_size(node->always);

        node->now = both[1] = make(size);
        if (rng_one_in(&self->rng, 2)) {
            both[0] = node->now;
            both[1] = node->always;
        }
        trackers[i] = node->tracker;
        sets[i] = make_set(both, 2, size, false);
        if (rng_one_in(&self->rng, 16)) {
            hbtracker_publish(node->tracker, NULL);
        }
    }
    hbtracker_publish_all(trackers, sets, nnodes);
    for (unsigned i = 0; i < nnodes; i++) {
        CHECK(sets[i] == NULL, "set %u of %u is still the caller's", i, nnodes);
    }
}

static void publish_generations(struct worker *self)
{
    bool last;
    unsigned number = 0;

    do {
        HBitmap *old[MOST_NODES];
        uint64_t counts[MOST_NODES];

        last = atomic_load(&marking) == 0;
        for (unsigned i = 0; i < nnodes; i++) {
            old[i] = nodes[i].now;
        }
        publish_generation(self);
        number++;
        for (unsigned i = 0; i < nnodes; i++) {
            counts[i] = hbitmap_count(old[i]);
        }
        linger(self, 4000);
        for (unsigned i = 0; i < nnodes; i++) {
            CHECK_EQ(hbitmap_count(old[i]), counts[i]);
            CHECK_VALID(old[i]);
            CHECK_EQ(sort_out(old[i], i, number) << GRANULARITY, counts[i]);
            CHECK(hbitmap_is_subset(old[i], nodes[i].always) == 1,
                  "it has what `always` lacks");
            hbitmap_free(old[i]);
        }
        linger(self, 4000);
    } while (!last);
}

static unsigned generation_of(const struct chain *chain, unsigned k)
{
    return chain->generation[chain->writes[k].node][chain->writes[k].page];
}

static void judge(const struct chain *chain)
{
    unsigned c = (unsigned)(chain - chains), latest = 0;

    for (unsigned k = 0; k < nnodes * chain->style->pages; k++) {
        const struct write *w = &chain->writes[k];
        unsigned number = generation_of(chain, k), other;

        CHECK(number != 0, "chain %u, node %u: page %u is in no generation", c,
              w->node, w->page);
        CHECK(number >= latest, "chain %u, node %u: page %u is in generation %u, the "
              "write before it on node %u is in generation %u", c, w->node,
              w->page, number, chain->writes[k - 1].node, latest);
        latest = number;
        other = w->seen ? generation_of(next_chain(chain), w->seen - 1) : 0;
        CHECK(number >= other, "chain %u, node %u: page %u is in generation %u, a "
              "write of the next chain that had returned before it began is in "
              "generation %u", c, w->node, w->page, number, other);
    }
}

static void test_one_instant(unsigned n)
{
    unsigned members = 0;
    uint64_t groups = 0;

    nnodes = 3 + (unsigned)rng_below(&rng, MOST_NODES - 2);
    nchains = n;
    nworkers = 0;
    for (unsigned c = 0; c < nchains; c++) {
        struct chain *chain = &chains[c];

        memset(chain, 0, sizeof(*chain));
        chain->style = &styles[c];
        chain->first = groups;
        chain->writes = grab(nnodes * chain->style->pages * sizeof(*chain->writes));
        for (unsigned i = 0; i < nnodes; i++) {
            chain->generation[i] = grab(chain->style->pages * sizeof(unsigned));
        }
        groups += chain->style->pages * chain->style->length;
        members += chain->style->members;
    }
    for (unsigned i = 0; i < nnodes; i++) {
        nodes[i].tracker = make_tracker();
        nodes[i].always = make(groups << GRANULARITY);
        nodes[i].now = make(groups << GRANULARITY);
        hbtracker_publish(nodes[i].tracker,
                          make_set((HBitmap *[]){ nodes[i].now, nodes[i].always }, 2,
                                   groups << GRANULARITY, false));
    }
    atomic_store(&marking, members);
    add(members, write_chain);
    add(1, publish_generations);
    run_workers();
    for (unsigned i = 0; i < nnodes; i++) {
        CHECK_VALID(nodes[i].always);
        CHECK_EQ(hbitmap_count(nodes[i].always), groups << GRANULARITY);
        CHECK(hbitmap_empty(nodes[i].now), "nobody writes any more");
        hbtracker_free(nodes[i].tracker);
        hbitmap_free(nodes[i].always);
        hbitmap_free(nodes[i].now);
    }
    for (unsigned c = 0; c < nchains; c++) {
        judge(&chains[c]);
    }
    for (unsigned c = 0; c < nchains; c++) {
        free(chains[c].writes);
        for (unsigned i = 0; i < nnodes; i++) {
            free(chains[c].generation[i]);
        }
    }
}

static void test_small_writes(void)
{
    test_one_instant(MOST_CHAINS - 1);
}

static void test_large_writes(void)
{
    test_one_instant(MOST_CHAINS);
}

/* ---- what refuses the rest of many writes ------------------------------- */

/*
 * One call marks more writes than mark_many marks at a stretch.  What is published
 * meanwhile refuses all of them, or those beyond half of them; so the call stops
 * after a stretch, or is done before.
 */
enum { STRETCH = 4096, REST_WRITES = 5 * STRETCH, REST_LENGTH = 35 << GRANULARITY };

static uint64_t rest_offsets[REST_WRITES], rest_lengths[REST_WRITES];
static int rest_err;

static void rest_mark(struct worker *self)
{
    linger(self, 1000);
    rest_err = hbtracker_mark_many(nodes[0].tracker, rest_offsets, rest_lengths,
                                   REST_WRITES);
}

/* When some write has been marked, or early. */
static void rest_publish(struct worker *self)
{
    HBTracker *trackers[] = { nodes[0].tracker, nodes[1].tracker };
    HBTrackerSet *sets[2];
    bool readonly = rng_one_in(&self->rng, 2), early = rng_one_in(&self->rng, 8);
    uint64_t from = rng_below(&self->rng, REST_WRITES);
    uint64_t size = hbitmap_size(nodes[0].always) / (readonly ? 1 : 2);

    for (unsigned i = 0; i < 2; i++) {
        nodes[i].now = make(size);
        sets[i] = make_set(&nodes[i].now, 1, size, readonly);
    }
    WAIT_UNTIL(early || hbitmap_get(nodes[0].always, from * REST_LENGTH));
    hbtracker_publish_all(trackers, sets, 2);
    CHECK_EQ(hbtracker_mark(nodes[1].tracker, size - 1, 2), -ERANGE);
}

static void test_rest(void)
{
    uint64_t size = (uint64_t)REST_WRITES * REST_LENGTH, before, after;

    nworkers = 0;
    for (uint64_t i = 0; i < REST_WRITES; i++) {
        rest_offsets[i] = i * REST_LENGTH;
        rest_lengths[i] = REST_LENGTH;
    }
    for (unsigned i = 0; i < 2; i++) {
        nodes[i].tracker = make_tracker();
        nodes[i].always = make(size);
        hbtracker_publish(nodes[i].tracker, make_set(&nodes[i].always, 1, size, false));
    }
    add(1, rest_mark);
    add(1, rest_publish);
    run_workers();
    before = hbitmap_count(nodes[0].always);
    after = hbitmap_count(nodes[0].now);
    CHECK_EQ(hbitmap_count_range(nodes[0].always, 0, before), before);
    CHECK_EQ(hbitmap_count_range(nodes[0].now, before, after), after);
    before /= REST_LENGTH;
    after /= REST_LENGTH;
    if (before == REST_WRITES) {
        CHECK_EQ(rest_err, 0);
    } else if (hbitmap_size(nodes[0].now) == size) {
        CHECK_EQ(rest_err, -EROFS);
        CHECK_EQ(after, 0);
    } else {
        /* Writes in the first half are fine still, if the call had begun before. */
        CHECK_EQ(rest_err, -ERANGE);
        CHECK(after == (before < 2 * STRETCH ? 2 * STRETCH - before : 0) ||
              (before == 0 && after == 0), "%" PRIu64 " writes and %" PRIu64, before,
              after);
    }
    CHECK_EQ(before % STRETCH, 0);
    for (unsigned i = 0; i < 2; i++) {
        hbtracker_free(nodes[i].tracker);
        hbitmap_free(nodes[i].always);
        hbitmap_free(nodes[i].now);
    }
}

/* ------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(void);
    bool once;
} scenarios[] = {
    { "writes: refused and not", test_writes, true },
    { "facts: several trackers, one thread", test_publishing_all, true },
    /* Before other threads have left slots behind. */
    { "late: a thread marks when it has all but ended", test_late_marks, true },
    { "guests: bitmaps come and go, and no write is lost", test_one_size, false },
    { "growth: and the device grows", test_growth, false },
    { "instant: several trackers go over at once", test_small_writes, false },
    { "large: and some writes are large", test_large_writes, false },
    { "rest: many writes, of which the rest is refused", test_rest, false },
};

int main(int argc, char **argv)
{
    unsigned long rounds = read_arguments(argc, argv, 20);
    const char *only = argc > 3 ? argv[3] : "";

    rng = test_seed;
#ifndef SANITIZED
    (void)signal(SIGSEGV, fault);
    (void)signal(SIGABRT, fault);
#endif
    for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++) {
        if (strstr(scenarios[i].name, only)) {
            for (unsigned long round = 0; round < rounds; round++) {
                scenarios[i].run();
                if (scenarios[i].once) {
                    break;
                }
            }
            ok(scenarios[i].name);
        }
    }
    return 0;
}
