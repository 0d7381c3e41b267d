/* SPDX-License-Identifier: MIT */
/*
 * The three promises of hbitmap.h about threads, each with an oracle that is
 * exact: it fails on a lost mark and on nothing else.  The bitmaps are small,
 * so that leaf words and summaries are fought over all the time.
 *
 *     test_threads [SEED [ROUNDS [SCENARIO]]]
 *
 * Meant for ThreadSanitizer and AddressSanitizer as much as for a plain build.
 * SCENARIO: only those whose name contains this.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* fork, usleep */
#endif

#include <sys/wait.h>
#include <unistd.h>

#include "words.h"
#include "workers.h"

static atomic_uint busy;    /* workers that others wait for */

static HBitmap *make(uint64_t size, int granularity)
{
    HBitmap *hb = hbitmap_alloc(size, granularity);

    CHECK(hb != NULL, "errno %d", errno);
    return hb;
}

static uint64_t count_groups(const HBitmap *hb)
{
    uint64_t groups = 0;
    HBitmapIter hbi;

    hbitmap_iter_init(&hbi, hb, 0);
    while (hbitmap_iter_next(&hbi) >= 0) {
        groups++;
    }
    return groups;
}

/* Promises (a) and (c), when all calls have returned. */
static void check_quiet(const HBitmap *hb)
{
    uint64_t count = hbitmap_count(hb) >> hbitmap_granularity(hb);
    uint64_t dirty = 0;
    size_t nwords = 0;
    const uint64_t *words = hbitmap_words(hb, &nwords);

    CHECK_VALID(hb);
    for (size_t i = 0; i < nwords; i++) {
        dirty += (unsigned)__builtin_popcountll(words[i]);
    }
    CHECK_EQ(count, dirty);
    CHECK_EQ(count_groups(hb), dirty);
    CHECK_EQ(hbitmap_empty(hb), dirty == 0);
}

/* The groups and the granularity of a scenario's bitmaps. */
static const struct shape {
    uint64_t groups;
    int granularity;
} shapes[] = {
    { 64, 0 }, { 130, 3 }, { 64 * 64, 0 }, { 64 * 64 + 5, 1 }, { 64 * 70, 9 },
};

enum { SHAPES = sizeof(shapes) / sizeof(shapes[0]) };

/* Where a mark underway is looked for: the more levels, the longer it is that. */
static const struct shape tall[] = {
    { 64, 0 }, { 64 * 70, 2 }, { 64 * 64 * 70, 0 }, { (1 << 24) + 64 * 3, 0 },
    { 130, 9 },
};

enum { TALL = sizeof(tall) / sizeof(tall[0]) };

static uint64_t ngroups;
static int granularity;

static void use_shape(const struct shape *shape)
{
    ngroups = shape->groups;
    granularity = shape->granularity;
    nworkers = 0;
    atomic_store(&busy, 0);
}

static uint64_t bitmap_size(void)
{
    return ngroups << granularity;
}

static uint64_t item_of(uint64_t group)
{
    return group << granularity;
}

/* A random range of whole groups. */
static void pick_groups(struct worker *self, uint64_t *start, uint64_t *count)
{
    uint64_t a = rng_below(&self->rng, ngroups);
    uint64_t b = rng_below(&self->rng, ngroups);

    *start = item_of(a < b ? a : b);
    *count = item_of((a < b ? b - a : a - b) + 1);
}

/* ---- each mark in exactly one drain, or in what remains ----------------- */

/*
 * Each marker marks groups of its own, each once in the whole run; neighbours
 * in a word belong to different markers.  Drainers take them into private
 * bitmaps, directly or by way of a second shared one, and takers one by one.
 * At the end each group was seen once, wherever; those of nobody, never.
 */
static struct {
    HBitmap *first, *second;
    unsigned markers;
} once;

static bool of_nobody(uint64_t group)
{
    return group % 8 == 5;
}

static void once_mark(struct worker *self)
{
    enum { BATCH = 80 };
    uint64_t *mine = grab((ngroups + 1) * sizeof(*mine)), n = 0;
    uint64_t starts[BATCH], counts[BATCH];

    for (uint64_t group = self->index; group < ngroups; group += once.markers) {
        if (!of_nobody(group)) {
            mine[n++] = group;
        }
    }
    for (uint64_t i = n; i > 1; i--) {      /* in any order */
        uint64_t j = rng_below(&self->rng, i), t = mine[i - 1];

        mine[i - 1] = mine[j];
        mine[j] = t;
    }
    for (uint64_t i = 0; i < n;) {
        size_t batch = (size_t)rng_below(&self->rng, BATCH);

        if (batch == 0 || batch > n - i) {
            uint64_t within = rng_below(&self->rng, item_of(1));

            CHECK_EQ(hbitmap_set(once.first, item_of(mine[i]) + within, 1), 0);
            i++;
        } else {
            for (size_t k = 0; k < batch; k++) {
                starts[k] = item_of(mine[i + k]);
                counts[k] = item_of(1);
            }
            CHECK_EQ(hbitmap_set_many(once.first, starts, counts, batch), 0);
            i += batch;
        }
        linger(self, ngroups < 1000 ? 300 : 30);
    }
    free(mine);
    atomic_fetch_sub(&busy, 1);
}

/* What has been drained into `from`. */
static void once_see(struct worker *self, HBitmap *from)
{
    uint64_t items[50];
    size_t n;
    HBitmapIter hbi;

    hbitmap_iter_init(&hbi, from, 0);
    do {
        n = hbitmap_iter_fill(&hbi, items, 50);
        for (size_t i = 0; i < n; i++) {
            self->seen[items[i] >> granularity]++;
        }
    } while (n == 50);
    hbitmap_reset_all(from);
}

static void once_drain(struct worker *self)
{
    HBitmap *mine = make(bitmap_size(), granularity);
    bool last;

    do {
        HBitmap *from = self->index % 2 ? once.second : once.first;
        HBitmap *into = self->index % 4 == 2 ? once.second : mine;
        uint64_t start = 0, count = bitmap_size();

        last = atomic_load(&busy) == 0;
        if (rng_one_in(&self->rng, 2)) {
            pick_groups(self, &start, &count);
        }
        CHECK_EQ((into == mine ? hbitmap_drain_fresh : hbitmap_drain)(
                     from, start, count, into), 0);
        once_see(self, mine);
        linger(self, 500);
    } while (!last);
    hbitmap_free(mine);
}

static void once_take(struct worker *self)
{
    bool last;

    do {
        last = atomic_load(&busy) == 0;
        for (int i = 0; i < 50; i++) {
            int64_t item = hbitmap_next_dirty(
                once.first, (int64_t)rng_below(&self->rng, bitmap_size()),
                INT64_MAX);

            if (item >= 0) {
                int taken = hbitmap_take(once.first, (uint64_t)item);

                CHECK(taken == 0 || taken == 1, "returned %d", taken);
                self->seen[item >> granularity] += (unsigned)taken;
            }
        }
    } while (!last);
}

static void scenario_once(void)
{
    for (int shape = 0; shape < SHAPES; shape++) {
        unsigned repeats = shapes[shape].groups < 1000 ? 20 : 2;

        for (unsigned repeat = 0; repeat < repeats; repeat++) {
            use_shape(&shapes[shape]);
            once.first = make(bitmap_size(), granularity);
            once.second = make(bitmap_size(), granularity);
            once.markers = 3;
            atomic_store(&busy, once.markers);
            add(once.markers, once_mark);
            add(3, once_drain);
            add(1 + repeat % 2, once_take);
            for (unsigned i = 0; i < nworkers; i++) {
                workers[i].seen = grab(ngroups * sizeof(uint64_t));
            }
            run_workers();
            check_quiet(once.first);
            check_quiet(once.second);
            for (uint64_t group = 0; group < ngroups; group++) {
                uint64_t seen = hbitmap_get(once.first, item_of(group)) +
                                hbitmap_get(once.second, item_of(group));

                for (unsigned i = 0; i < nworkers; i++) {
                    seen += workers[i].seen[group];
                }
                CHECK(seen == !of_nobody(group),
                      "group %" PRIu64 " of %" PRIu64 " was marked %d times and "
                      "seen %" PRIu64 " times", group, ngroups,
                      !of_nobody(group), seen);
            }
            for (unsigned i = 0; i < nworkers; i++) {
                free(workers[i].seen);
            }
            hbitmap_free(once.first);
            hbitmap_free(once.second);
        }
    }
}

/* ---- no drain passes over a mark that returned before it ---------------- */

/*
 * A few hot groups are marked again and again, by several threads at the same
 * time, and drained.  Every call notes when it began and when it had ended, in
 * ticks of one clock.  A mark that began at `since` and had returned before a
 * drain began, and is not in what that drain took, must have been taken by a
 * clear that ended after `since` and began before that drain had ended: a take
 * of the group with
 *
 *     take.end > since  and  take.begin < drain.end
 *
 * This holds whatever the threads do, and a passed-over mark breaks it unless
 * somebody else happens to take the same group in the same time.  The drains
 * that find nothing note what they expected, and the end of the round decides.
 *
 * Groups in between, in the same words and in words between, are noise: marked,
 * filled, and reset, so that summaries come and go.
 */
enum { HOT = 6, HOT_STEPS = 400 };

struct note {
    unsigned hot;
    uint64_t since, until;  /* take: begin, end; demand: since, drain's end */
};

struct notes {
    struct note *note;
    size_t n, room;
};

static struct {
    HBitmap *hb;
    unsigned steps;
    uint64_t group[HOT];
    _Atomic uint64_t clock;
    /* By worker: the beginning of the latest mark that has returned. */
    _Atomic uint64_t published[MOST_WORKERS][HOT];
    atomic_uint marks[HOT];
    struct notes takes[MOST_WORKERS], demands[MOST_WORKERS];
} hot;

static uint64_t tick(void)
{
    return atomic_fetch_add(&hot.clock, 1) + 1;
}

static size_t place_of(const struct worker *self)
{
    return (size_t)(self - workers);
}

static void notes_add(struct notes *notes, unsigned which, uint64_t since,
                      uint64_t until)
{
    if (notes->n == notes->room) {
        notes->room = notes->room ? 2 * notes->room : 1000;
        notes->note = realloc(notes->note, notes->room * sizeof(*notes->note));
        CHECK(notes->note != NULL, "the test is out of memory");
    }
    notes->note[notes->n++] = (struct note){ which, since, until };
}

static bool is_noise(uint64_t group)
{
    return group / 64 % 2 == 1 || group % 2 == 1;
}

static void hot_publish(struct worker *self, unsigned which, uint64_t since)
{
    atomic_store(&hot.published[place_of(self)][which], since);
    atomic_fetch_add(&hot.marks[which], 1);
}

/* Once, or so often that set_many comes to groups which it finds set. */
static void hot_set(struct worker *self, unsigned which)
{
    enum { OFTEN = 70 };
    uint64_t item = item_of(hot.group[which]);
    uint64_t starts[OFTEN], counts[OFTEN];

    if (!rng_one_in(&self->rng, 4)) {
        CHECK_EQ(hbitmap_set(hot.hb, item, 1), 0);
        return;
    }
    for (unsigned i = 0; i < OFTEN; i++) {
        starts[i] = item;
        counts[i] = 1;
    }
    /* Each of them may be taken by itself; the caller counts one. */
    atomic_fetch_add(&hot.marks[which], OFTEN - 1);
    CHECK_EQ(hbitmap_set_many(hot.hb, starts, counts, OFTEN), 0);
}

static void hot_mark(struct worker *self)
{
    for (unsigned i = 0; i < hot.steps; i++) {
        unsigned which = (unsigned)rng_below(&self->rng, 1 + i % HOT);
        uint64_t since;

        linger(self, 400);
        since = tick();
        hot_set(self, which);
        hot_publish(self, which, since);
    }
    atomic_fetch_sub(&busy, 1);
}

/* After a drain into `mine`: what it took, and what it should have taken. */
static void hot_note(struct worker *self, HBitmap *mine, uint64_t begin,
                     const uint64_t *since)
{
    uint64_t end = tick();

    for (unsigned which = 0; which < HOT; which++) {
        if (hbitmap_get(mine, item_of(hot.group[which]))) {
            notes_add(&hot.takes[place_of(self)], which, begin, end);
        } else if (since[which]) {
            notes_add(&hot.demands[place_of(self)], which, since[which], end);
        }
    }
    hbitmap_reset_all(mine);
}

/* Drains what others have marked before. */
static void hot_drain(struct worker *self)
{
    HBitmap *mine = make(bitmap_size(), granularity);
    bool last;

    do {
        uint64_t since[HOT] = { 0 }, begin;

        last = atomic_load(&busy) == 0;
        for (unsigned i = 0; i < nworkers; i++) {
            for (unsigned which = 0; which < HOT; which++) {
                uint64_t at = atomic_load(&hot.published[i][which]);

                since[which] = at > since[which] ? at : since[which];
            }
        }
        begin = tick();
        CHECK_EQ((rng_one_in(&self->rng, 2) ? hbitmap_drain_fresh : hbitmap_drain)(
                     hot.hb, 0, bitmap_size(), mine), 0);
        hot_note(self, mine, begin, since);
        linger(self, 2000);
    } while (!last);
    hbitmap_free(mine);
}

/* Marks a group and drains at once: its mark may meet another's halfway. */
static void hot_mark_and_drain(struct worker *self)
{
    HBitmap *mine = make(bitmap_size(), granularity);

    for (unsigned i = 0; i < hot.steps; i++) {
        unsigned which = (unsigned)rng_below(&self->rng, 1 + i % HOT);
        uint64_t since[HOT] = { 0 };
        /* Some drain their word only, some everything. */
        bool all = rng_one_in(&self->rng, 2);
        uint64_t item = item_of(hot.group[which]);
        uint64_t start = all ? 0 : item, count = all ? bitmap_size() : item_of(1);

        linger(self, 100);
        since[which] = tick();
        CHECK_EQ(hbitmap_set(hot.hb, item, 1), 0);
        CHECK_EQ(hbitmap_drain(hot.hb, start, count, mine), 0);
        hot_note(self, mine, since[which], since);
        atomic_fetch_add(&hot.marks[which], 1);
    }
    hbitmap_free(mine);
    atomic_fetch_sub(&busy, 1);
}

static void hot_noise(struct worker *self)
{
    while (atomic_load(&busy)) {
        uint64_t group = rng_below(&self->rng, ngroups), count = 1;

        if (!is_noise(group)) {
            continue;
        }
        if (group / 64 % 2 == 1) {          /* a word of noise: part or whole */
            group = group / 64 * 64;
            count = rng_one_in(&self->rng, 2) ? 64 : 1 + rng_below(&self->rng, 64);
            count = count < ngroups - group ? count : ngroups - group;
        }
        if (rng_one_in(&self->rng, 2)) {
            CHECK_EQ(hbitmap_set(hot.hb, item_of(group), item_of(count)), 0);
        } else {
            CHECK_EQ(hbitmap_reset(hot.hb, item_of(group), item_of(count)), 0);
        }
        linger(self, 100);
    }
}

static bool hot_was_taken(unsigned which, uint64_t since, uint64_t until)
{
    for (unsigned i = 0; i < nworkers; i++) {
        const struct notes *takes = &hot.takes[i];

        for (size_t k = 0; k < takes->n; k++) {
            if (takes->note[k].hot == which && takes->note[k].until > since &&
                takes->note[k].since < until) {
                return true;
            }
        }
    }
    return false;
}

static void hot_judge(void)
{
    uint64_t taken[HOT] = { 0 };

    for (unsigned i = 0; i < nworkers; i++) {
        for (size_t k = 0; k < hot.takes[i].n; k++) {
            taken[hot.takes[i].note[k].hot]++;
        }
        for (size_t k = 0; k < hot.demands[i].n; k++) {
            const struct note *note = &hot.demands[i].note[k];

            CHECK(hot_was_taken(note->hot, note->since, note->until),
                  "(b) group %" PRIu64 " of %" PRIu64 " was marked at tick %" PRIu64
                  ", a drain that began after that mark returned and had ended at "
                  "%" PRIu64 " passed it over, and nobody else took it",
                  hot.group[note->hot], ngroups, note->since, note->until);
        }
    }
    for (unsigned which = 0; which < HOT; which++) {
        bool there = hbitmap_get(hot.hb, item_of(hot.group[which]));

        CHECK(taken[which] + there <= atomic_load(&hot.marks[which]),
              "group %" PRIu64 " was marked %u times and seen %" PRIu64 " times",
              hot.group[which], atomic_load(&hot.marks[which]),
              taken[which] + there);
        for (unsigned i = 0; !there && i < nworkers; i++) {
            uint64_t since = atomic_load(&hot.published[i][which]);

            CHECK(!since || hot_was_taken(which, since, UINT64_MAX),
                  "group %" PRIu64 " was marked at tick %" PRIu64
                  " and is lost", hot.group[which], since);
        }
    }
}

static void scenario_hot(void)
{
    static const struct {
        unsigned markers, both, drainers, noise;
    } casts[] = {
        { 1, 1, 0, 0 }, { 2, 1, 0, 0 }, { 0, 2, 0, 0 }, { 0, 3, 0, 1 },
        { 2, 0, 1, 0 }, { 2, 1, 1, 2 },
    };

    for (unsigned turn = 0; turn < 60; turn++) {
        unsigned cast = turn % (unsigned)(sizeof(casts) / sizeof(casts[0]));

        use_shape(&tall[turn % TALL]);
        hot.hb = make(bitmap_size(), granularity);
        hot.steps = HOT_STEPS * (casts[cast].drainers + casts[cast].noise ? 1 : 8);
        for (unsigned which = 0; which < HOT; which++) {
            do {
                hot.group[which] = rng_below(&rng, ngroups);
            } while (is_noise(hot.group[which]));
            for (unsigned i = 0; i < which; i++) {
                if (hot.group[i] == hot.group[which]) {
                    which--;
                    break;
                }
            }
        }
        atomic_store(&hot.clock, 0);
        for (unsigned which = 0; which < HOT; which++) {
            atomic_store(&hot.marks[which], 0);
            for (unsigned i = 0; i < MOST_WORKERS; i++) {
                atomic_store(&hot.published[i][which], 0);
            }
        }
        atomic_store(&busy, casts[cast].markers + casts[cast].both);
        add(casts[cast].markers, hot_mark);
        add(casts[cast].both, hot_mark_and_drain);
        add(casts[cast].drainers, hot_drain);
        add(casts[cast].noise, hot_noise);
        run_workers();
        check_quiet(hot.hb);
        hot_judge();
        hbitmap_free(hot.hb);
        for (unsigned i = 0; i < MOST_WORKERS; i++) {
            free(hot.takes[i].note);
            free(hot.demands[i].note);
            hot.takes[i] = hot.demands[i] = (struct notes){ 0 };
        }
    }
}

/* ---- nor does one whose thread has marked just now ---------------------- */

/*
 * One thread marks and drains, and whatever it marked is there: nobody else takes
 * these groups.  Others mark them too, also as the end of a range, and mark and
 * clear the rest of their words and of words beside them.  So its mark ends where
 * others have come halfway, and clears are at the levels above.
 */
enum { HALFWAY = 3, HALFWAY_STEPS = 400 };

static struct {
    HBitmap *hb;
    uint64_t group[HALFWAY];        /* the first of their words */
} halfway;

static uint64_t halfway_pick(struct worker *self)
{
    return halfway.group[rng_below(&self->rng, HALFWAY)];
}

static void halfway_drain(struct worker *self)
{
    HBitmap *mine = make(bitmap_size(), granularity);

    for (unsigned i = 0; i < HALFWAY_STEPS; i++) {
        uint64_t group = halfway_pick(self);
        bool all = rng_one_in(&self->rng, 2);

        CHECK_EQ(hbitmap_set(halfway.hb, item_of(group), 1), 0);
        CHECK_EQ(hbitmap_drain(halfway.hb, all ? 0 : item_of(group),
                               all ? bitmap_size() : item_of(1), mine), 0);
        CHECK(hbitmap_get(mine, item_of(group)),
              "(b) group %" PRIu64 " of %" PRIu64 " was passed over", group, ngroups);
        hbitmap_reset_all(mine);
    }
    hbitmap_free(mine);
    atomic_fetch_sub(&busy, 1);
}

static void halfway_mark(struct worker *self)
{
    while (atomic_load(&busy)) {
        uint64_t group = halfway_pick(self), count = 1;

        if (group >= 64 * 64 && rng_one_in(&self->rng, 16)) {
            count = 64 * 64 + 1;            /* under two words of level 1 */
        }
        CHECK_EQ(hbitmap_set(halfway.hb, item_of(group - (count - 1)), item_of(count)),
                 0);
    }
}

static void halfway_clear(struct worker *self)
{
    while (atomic_load(&busy)) {
        /* The first of a word may be one of those. */
        uint64_t first = halfway_pick(self) + rng_below(&self->rng, 2) * 64 + 1;
        uint64_t count = first < ngroups ? ngroups - first : 0;

        count = count < 63 ? count : 63;
        if (count && rng_one_in(&self->rng, 4)) {
            CHECK_EQ(hbitmap_set(halfway.hb, item_of(first), item_of(count)), 0);
        } else if (count) {
            CHECK_EQ(hbitmap_reset(halfway.hb, item_of(first), item_of(count)), 0);
        }
    }
}

static void scenario_halfway(void)
{
    for (unsigned turn = 0; turn < 12; turn++) {
        use_shape(&tall[1 + turn % 2]);     /* three and four levels */
        halfway.hb = make(bitmap_size(), granularity);
        for (unsigned which = 0; which < HALFWAY; which++) {
            halfway.group[which] = rng_below(&rng, ngroups) / 64 * 64;
        }
        atomic_store(&busy, 1);
        add(1, halfway_drain);
        add(1 + turn % 3, halfway_mark);
        add(turn % 2, halfway_clear);
        run_workers();
        check_quiet(halfway.hb);
        hbitmap_free(halfway.hb);
    }
}

/* ---- nor is a bitmap called empty that has a mark of one's own ----------- */

/*
 * One thread marks a group that nobody else takes, and asks.  Others mark it, too, and
 * mark and clear another group of its word: so that word, which was empty, loses its
 * summary bit while a mark that is there relied on it.  The word is ever another
 * one, since what empty has found once it finds again at a glance.
 */
static struct {
    HBitmap *hb;
    _Atomic uint64_t group;
} asked;

static void asked_ask(struct worker *self)
{
    for (int i = 0; i < 3000; i++) {
        uint64_t group = (rng_below(&self->rng, ngroups / 64 - 1) + 1) * 64;

        atomic_store(&asked.group, group);
        linger(self, 200);
        CHECK_EQ(hbitmap_set(asked.hb, item_of(group), 1), 0);
        CHECK(!hbitmap_empty(asked.hb), "group %" PRIu64 " is there", group);
        CHECK_EQ(hbitmap_take(asked.hb, item_of(group)), 1);
    }
    atomic_fetch_sub(&busy, 1);
}

/* Of the same group; what comes after its taker is taken with the next. */
static void asked_mark(struct worker *self)
{
    while (atomic_load(&busy)) {
        CHECK_EQ(hbitmap_set(asked.hb, item_of(atomic_load(&asked.group)), 1), 0);
        linger(self, 50);
    }
}

static void asked_clear(struct worker *self)
{
    while (atomic_load(&busy)) {
        uint64_t other = atomic_load(&asked.group) + 1;

        CHECK_EQ(hbitmap_set(asked.hb, item_of(other), 1), 0);
        switch (rng_below(&self->rng, 4)) {
        case 0:
            (void)hbitmap_take(asked.hb, item_of(other));
            break;
        case 1:
            (void)hbitmap_try_take(asked.hb, item_of(other));
            break;
        case 2:
            CHECK_EQ(hbitmap_reset(asked.hb, item_of(other), item_of(1)), 0);
            break;
        default:
            CHECK_EQ(hbitmap_flip(asked.hb, item_of(other), item_of(1)), 0);
            break;
        }
        linger(self, 50);
    }
}

static void scenario_asked(void)
{
    for (unsigned turn = 0; turn < 4; turn++) {
        use_shape(&tall[1 + turn % 2]);
        asked.hb = make(bitmap_size(), granularity);
        atomic_store(&asked.group, 64);
        atomic_store(&busy, 1);
        add(1, asked_ask);
        add(turn / 2, asked_mark);
        add(1, asked_clear);
        run_workers();
        hbitmap_reset_all(asked.hb);
        check_quiet(asked.hb);
        CHECK(hbitmap_empty(asked.hb), "all was taken");
        hbitmap_free(asked.hb);
    }
}

/* ---- operations in place keep the marks beside them --------------------- */

/*
 * Markers mark groups that no operation is to change (even groups of even
 * words); set operations with the bitmap as result, and resets, change all
 * others.  Every mark is visible, at once to what looks at the leaf or takes
 * the lock, and at the end to everything.
 */
static struct {
    HBitmap *hb;
    HBitmap *noise;         /* only noise */
    HBitmap *keep;          /* all that is not noise, and some noise */
    HBitmap *coarse;        /* whole words of noise, one group each */
    unsigned markers;
    atomic_uint done[MOST_WORKERS];     /* marks that have returned */
} kept;

/* The n-th group that marker `index` marks, or ngroups. */
static uint64_t kept_group(unsigned index, unsigned n)
{
    uint64_t even = (uint64_t)n * kept.markers + index;
    uint64_t group = even / 32 * 128 + even % 32 * 2;

    return group < ngroups ? group : ngroups;
}

static void kept_mark(struct worker *self)
{
    uint64_t group;

    for (unsigned n = 0; (group = kept_group(self->index, n)) < ngroups; n++) {
        CHECK_EQ(hbitmap_set(kept.hb, item_of(group), 1), 0);
        atomic_store(&kept.done[self->index], n + 1);
        linger(self, 1000);
    }
    atomic_fetch_sub(&busy, 1);
}

static void kept_operate(struct worker *self)
{
    HBitmap *hb = kept.hb;
    bool last;

    do {
        uint64_t group = rng_below(&self->rng, ngroups);
        int err = 0;

        last = atomic_load(&busy) == 0;
        switch (rng_below(&self->rng, 13)) {
        case 0:
            err = hbitmap_merge(hb, kept.noise, hb);
            break;
        case 1:
            err = hbitmap_merge(kept.noise, hb, hb);
            break;
        case 2:
            err = hbitmap_merge(hb, hb, hb);
            break;
        case 3:
            err = hbitmap_merge(hb, kept.coarse, hb);
            break;
        case 4:
            err = hbitmap_merge(kept.coarse, hb, hb);
            break;
        case 5:
            err = hbitmap_and(hb, kept.keep, hb);
            break;
        case 6:
            err = hbitmap_and(kept.keep, hb, hb);
            break;
        case 7:
            err = hbitmap_and(hb, hb, hb);
            break;
        case 8:
        case 9:
            err = hbitmap_andnot(hb, kept.noise, hb);
            break;
        case 10:
            err = hbitmap_xor(hb, kept.noise, hb);
            break;
        case 11:
            err = hbitmap_xor(kept.noise, hb, hb);
            break;
        default:
            if (is_noise(group)) {
                err = hbitmap_reset(hb, item_of(group), item_of(1));
            }
            break;
        }
        CHECK_EQ(err, 0);
        linger(self, 200);
    } while (!last);
}

static void kept_look(struct worker *self)
{
    uint64_t nbytes = hbitmap_serialization_size(kept.hb, 0, bitmap_size());
    uint8_t *buf = grab(nbytes);
    bool last;

    do {
        unsigned done[MOST_WORKERS];
        uint64_t all = 0, count;

        last = atomic_load(&busy) == 0;
        for (unsigned i = 0; i < kept.markers; i++) {
            done[i] = atomic_load(&kept.done[i]);
            all += done[i];
        }
        count = hbitmap_count(kept.hb) >> granularity;
        CHECK(count >= all, "%" PRIu64 " marks have returned, the count is %" PRIu64,
              all, count);
        CHECK_EQ(hbitmap_serialize_part(kept.hb, buf, 0, bitmap_size()), 0);
        for (unsigned i = 0; i < kept.markers; i++) {
            for (unsigned n = 0; n < done[i]; n++) {
                uint64_t group = kept_group(i, n);

                CHECK(hbitmap_get(kept.hb, item_of(group)),
                      "group %" PRIu64 " is not there", group);
                CHECK(buf[group / 8] >> (group % 8) & 1,
                      "group %" PRIu64 " was not serialized", group);
            }
        }
        linger(self, 500);
    } while (!last);
    free(buf);
}

static void scenario_kept(void)
{
    for (unsigned turn = 0; turn < 2 * SHAPES; turn++) {
        use_shape(&shapes[turn % SHAPES]);
        kept.hb = make(bitmap_size(), granularity);
        kept.noise = make(bitmap_size(), granularity);
        kept.keep = make(bitmap_size(), granularity);
        kept.coarse = make(bitmap_size(), granularity + 6);
        for (uint64_t group = 0; group < ngroups; group++) {
            if (!is_noise(group)) {
                CHECK_EQ(hbitmap_set(kept.keep, item_of(group), 1), 0);
            } else {
                if (rng_one_in(&rng, 2)) {
                    CHECK_EQ(hbitmap_set(kept.noise, item_of(group), 1), 0);
                }
                if (rng_one_in(&rng, 2)) {
                    CHECK_EQ(hbitmap_set(kept.keep, item_of(group), 1), 0);
                }
                if (group / 64 % 2 == 1 && rng_one_in(&rng, 100)) {
                    CHECK_EQ(hbitmap_set(kept.coarse, item_of(group), 1), 0);
                }
            }
        }
        kept.markers = 2;
        for (unsigned i = 0; i < MOST_WORKERS; i++) {
            atomic_store(&kept.done[i], 0);
        }
        atomic_store(&busy, kept.markers);
        add(kept.markers, kept_mark);
        add(2, kept_operate);
        add(1, kept_look);
        run_workers();
        check_quiet(kept.hb);
        for (uint64_t group = 0; group < ngroups; group++) {
            CHECK(is_noise(group) || hbitmap_get(kept.hb, item_of(group)),
                  "group %" PRIu64 " of %" PRIu64 " is lost", group, ngroups);
        }
        hbitmap_free(kept.hb);
        hbitmap_free(kept.noise);
        hbitmap_free(kept.keep);
        hbitmap_free(kept.coarse);
    }
}

/* ---- where nothing is cleared, searches see every mark ------------------ */

static void seek_mark(struct worker *self)
{
    /* Two markers for each group: the second may return before the first. */
    unsigned of = self->index / 2;
    uint64_t group;

    for (unsigned n = 0; (group = kept_group(of, n)) < ngroups; n++) {
        uint64_t count = rng_one_in(&self->rng, 20) ? ngroups - group : 1;

        linger(self, 60);
        CHECK_EQ(hbitmap_set(kept.hb, item_of(group),
                             item_of(count < 300 ? count : 300)), 0);
        /* Whoever of the two comes first says so. */
        while (atomic_load(&kept.done[of]) < n + 1) {
            unsigned done = n;

            atomic_compare_exchange_weak(&kept.done[of], &done, n + 1);
        }
        if (rng_one_in(&self->rng, 4)) {
            int64_t item = (int64_t)item_of(group);

            CHECK_EQ(hbitmap_next_dirty(kept.hb, item, 1), item);
        }
    }
    atomic_fetch_sub(&busy, 1);
}

static void seek_look(struct worker *self)
{
    bool last;

    do {
        unsigned of = (unsigned)rng_below(&self->rng, kept.markers);
        unsigned done, n = 0;
        int64_t item, before = -1, pnum;
        HBitmapIter hbi;

        last = atomic_load(&busy) == 0;
        done = atomic_load(&kept.done[of]);
        for (unsigned i = 0; i < 20 && done; i++) {
            uint64_t group = kept_group(of, done - 1 - (i ? 0 : (unsigned)rng_below(
                                                                   &self->rng, done)));
            uint64_t back = rng_below(&self->rng, group + 1);

            item = (int64_t)item_of(group);
            CHECK_EQ(hbitmap_get(kept.hb, item_of(group)), true);
            CHECK_EQ(hbitmap_next_dirty(kept.hb, item, INT64_MAX), item);
            CHECK_EQ(hbitmap_status(kept.hb, item, INT64_MAX, &pnum), true);
            CHECK(pnum >= (int64_t)item_of(1), "pnum is %" PRId64, pnum);
            item = hbitmap_next_dirty(kept.hb, (int64_t)item_of(back), INT64_MAX);
            CHECK(item >= 0 && (uint64_t)item <= item_of(group),
                  "from %" PRIu64 ", next_dirty found %" PRId64 " beyond group %"
                  PRIu64, item_of(back), item, group);
        }
        /* In order, and none left out of what had been marked before. */
        hbitmap_iter_init(&hbi, kept.hb, 0);
        while ((item = hbitmap_iter_next(&hbi)) >= 0) {
            CHECK(item > before, "%" PRId64 " after %" PRId64, item, before);
            before = item;
            while (n < done && item_of(kept_group(of, n)) <= (uint64_t)item) {
                CHECK_EQ(item_of(kept_group(of, n)), item);
                n++;
            }
        }
        CHECK_EQ(n, done);
    } while (!last);
}

static void scenario_seek(void)
{
    for (unsigned turn = 0; turn < 2 * SHAPES; turn++) {
        use_shape(&shapes[turn % SHAPES]);
        kept.hb = make(bitmap_size(), granularity);
        kept.markers = 1 + turn % 2;
        for (unsigned i = 0; i < MOST_WORKERS; i++) {
            atomic_store(&kept.done[i], 0);
        }
        atomic_store(&busy, 2 * kept.markers);
        add(2 * kept.markers, seek_mark);
        add(2, seek_look);
        run_workers();
        check_quiet(kept.hb);
        hbitmap_free(kept.hb);
    }
}

/* ---- the count is exact once all calls have returned -------------------- */

/* A meeting of `n` threads, over and over. */
static struct {
    atomic_uint here, turn;
} meeting;

static void meet(unsigned n)
{
    unsigned turn = atomic_load(&meeting.turn);

    if (atomic_fetch_add(&meeting.here, 1) + 1 == n) {
        atomic_store(&meeting.here, 0);
        atomic_store(&meeting.turn, turn + 1);
    } else {
        WAIT_UNTIL(atomic_load(&meeting.turn) != turn);
    }
}

static struct {
    HBitmap *hb;
    unsigned turns;
} counted;

enum { COUNT_ROLES = 3 };

static void counted_turns(struct worker *self)
{
    for (unsigned turn = 0; turn < counted.turns; turn++) {
        for (unsigned i = 0; i < 4; i++) {
            uint64_t item = item_of(rng_below(&self->rng, ngroups));

            if (self->index == 0) {
                for (unsigned n = 0; n < 4; n++) {
                    (void)hbitmap_count(counted.hb);
                }
                continue;
            }
            linger(self, 200);
            if (self->index == 2 && rng_one_in(&self->rng, 4)) {
                (void)hbitmap_take(counted.hb, item);
            } else {
                CHECK_EQ(hbitmap_set(counted.hb, item, 1), 0);
            }
        }
        meet(COUNT_ROLES);
        if (self->index == turn % COUNT_ROLES) {
            CHECK_EQ(hbitmap_count(counted.hb),
                     count_groups(counted.hb) << granularity);
            if (turn % 512 == 0) {
                hbitmap_reset_all(counted.hb);
            }
        }
        meet(COUNT_ROLES);
    }
}

static void scenario_count(void)
{
    for (unsigned shape = 0; shape < SHAPES; shape++) {
        use_shape(&shapes[shape]);
        counted.hb = make(bitmap_size(), granularity);
        counted.turns = 2000;
        add(COUNT_ROLES, counted_turns);
        run_workers();
        check_quiet(counted.hb);
        hbitmap_free(counted.hb);
    }
}

/* ---- what has been marked is in the count -------------------------------- */

enum { MARK_COUNTERS = 3 };

static struct {
    HBitmap *hb;
    unsigned turns;
    _Atomic uint64_t begun[MARK_COUNTERS], marked[MARK_COUNTERS];
} growing;

static uint64_t growing_sum(_Atomic uint64_t *progress)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < MARK_COUNTERS; i++) {
        sum += atomic_load(&progress[i]);
    }
    return sum << granularity;
}

/* Each marks groups of its own, in words that all share, and asks how many there are
 * after each. */
static void growing_turns(struct worker *self)
{
    for (unsigned turn = 0; turn < growing.turns; turn++) {
        for (uint64_t group = self->index; group < ngroups; group += MARK_COUNTERS) {
            uint64_t least, count;

            atomic_fetch_add(&growing.begun[self->index], 1);
            CHECK_EQ(hbitmap_set(growing.hb, item_of(group), 1), 0);
            atomic_fetch_add(&growing.marked[self->index], 1);
            least = growing_sum(growing.marked);
            count = hbitmap_count(growing.hb);
            CHECK(count >= least, "count %" PRIu64 ", but %" PRIu64 " were marked", count, least);
            least = growing_sum(growing.begun);
            CHECK(count <= least, "count %" PRIu64 ", but %" PRIu64 " were begun", count, least);
        }
        meet(MARK_COUNTERS);
        if (self->index == 0) {
            CHECK_EQ(hbitmap_count(growing.hb), ngroups << granularity);
            hbitmap_reset_all(growing.hb);
            CHECK_EQ(hbitmap_count(growing.hb), 0);
            for (unsigned i = 0; i < MARK_COUNTERS; i++) {
                atomic_store(&growing.begun[i], 0);
                atomic_store(&growing.marked[i], 0);
            }
        }
        meet(MARK_COUNTERS);
    }
}

static void scenario_growing(void)
{
    for (unsigned shape = 0; shape < SHAPES; shape++) {
        use_shape(&shapes[shape]);
        growing.hb = make(bitmap_size(), granularity);
        growing.turns = (unsigned)(3000 / ngroups + 1);
        add(MARK_COUNTERS, growing_turns);
        run_workers();
        check_quiet(growing.hb);
        hbitmap_free(growing.hb);
    }
}

/* ---- what is emptied by its pages is empty, and can be marked again ------ */

/* So large that pages are moved and given back, where the system can do that. */
enum { PAGED_GROUPS = 1 << 28 };

static void paged_check(const HBitmap *hb, uint64_t groups)
{
    CHECK_EQ(hbitmap_count_range(hb, 0, PAGED_GROUPS), groups);
    CHECK_EQ(hbitmap_get(hb, 5), groups != 0);
    CHECK_EQ(hbitmap_empty(hb), groups == 0);
    CHECK_VALID(hb);
}

static void paged_turn(HBitmap *hb, HBitmap *into, bool fresh)
{
    HBitmap *other;

    CHECK_EQ(hbitmap_set(hb, 0, PAGED_GROUPS), 0);
    CHECK_EQ((fresh ? hbitmap_drain_fresh : hbitmap_drain)(hb, 0, PAGED_GROUPS, into), 0);
    paged_check(hb, 0);
    paged_check(into, PAGED_GROUPS);
    /* What has come in between has no pages of theirs. */
    other = make(PAGED_GROUPS, 0);
    CHECK_EQ(hbitmap_set(other, 0, PAGED_GROUPS), 0);
    paged_check(hb, 0);
    CHECK_EQ(hbitmap_set(hb, 5, 1), 0);
    paged_check(hb, 1);
    hbitmap_reset_all(hb);
    paged_check(hb, 0);
    CHECK_EQ(hbitmap_set(hb, 0, PAGED_GROUPS), 0);
    hbitmap_reset_all(hb);
    paged_check(hb, 0);
    paged_check(into, PAGED_GROUPS);
    paged_check(other, PAGED_GROUPS);
    hbitmap_free(other);
}

/* One thread; but the process has another one. */
static void paged_run(struct worker *self)
{
    HBitmap *hb = make(PAGED_GROUPS, 0), *into = make(PAGED_GROUPS, 0);

    (void)self;
    paged_turn(hb, into, true);
    paged_turn(hb, into, false);
    hbitmap_free(hb);
    hbitmap_reset_all(into);
    paged_check(into, 0);
    hbitmap_free(into);
}

static void scenario_paged(void)
{
    nworkers = 0;
    add(1, paged_run);
    run_workers();
}

/* ---- (a) also where somebody writes to what is deserialized -------------- */

/* It may be the words of another bitmap that is marked.  ThreadSanitizer would
 * be right about the bytes. */
#ifndef HB_TSAN
enum { LIVE_WORDS = 512, LIVE_LOADS = 40000 };

static _Atomic uint64_t live[LIVE_WORDS];

static void live_write(struct worker *self)
{
    while (atomic_load(&busy)) {
        atomic_fetch_xor(&live[rng_below(&self->rng, LIVE_WORDS)], 1);
    }
}

static void live_load(struct worker *self)
{
    for (unsigned i = 0; i < LIVE_LOADS; i++) {
        uint64_t count = 64 * (1 + rng_below(&self->rng, LIVE_WORDS));
        HBitmap *hb = kept.hb;

        hbitmap_reset_all(hb);
        CHECK_EQ(hbitmap_deserialize_part(hb, (const uint8_t *)live, 0, count,
                                          true), 0);
        CHECK_VALID(hb);
        for (unsigned at = 0; at < LIVE_WORDS; at += 64) {
            hb_word copy[64];
            uint64_t mask = hb_copy_nonzero(copy, &live[at], 64);

            CHECK_EQ(mask, hb_nonzero(copy, 64));
        }
    }
    atomic_fetch_sub(&busy, 1);
}

static void scenario_live(void)
{
    kept.hb = make(64 * LIVE_WORDS, 0);
    nworkers = 0;
    for (unsigned n = 0; n < LIVE_WORDS; n++) {
        /* Stretches that are dense, and others. */
        atomic_store(&live[n], n / 64 % 2 && !rng_one_in(&rng, 16));
    }
    atomic_store(&busy, 1);
    add(1, live_load);
    add(1, live_write);
    run_workers();
    hbitmap_free(kept.hb);
}
#endif

/* ---- the child of a fork does not wait for threads that it has not ------ */

static struct {
    HBitmap *changed;       /* marks and clears */
    HBitmap *asked;         /* constant, and every third group of it dirty */
    unsigned torn;          /* children that found `changed` torn */
} forked;

static void fork_change(struct worker *self)
{
    while (atomic_load(&busy)) {
        CHECK_EQ(hbitmap_set(forked.changed, rng_below(&self->rng, ngroups), 1), 0);
        if (rng_one_in(&self->rng, 2)) {
            CHECK_EQ(hbitmap_reset(forked.changed, 0, ngroups), 0);
        } else {
            hbitmap_reset_all(forked.changed);
        }
    }
}

static void fork_ask(struct worker *self)
{
    (void)self;
    while (atomic_load(&busy)) {
        CHECK_EQ(hbitmap_count_range(forked.asked, 0, ngroups), (ngroups + 2) / 3);
        CHECK_EQ(hbitmap_is_subset(forked.asked, forked.changed) & ~1, 0);
    }
}

/* After which a child is taken to hang. */
#ifndef CHILD_SECONDS
#define CHILD_SECONDS 20
#endif

/* It uses a bitmap of its own, and those of its parent. */
static void fork_child(void)
{
    HBitmap *mine = make(ngroups, 0);
    bool torn = hbitmap_torn(forked.changed);

    alarm(CHILD_SECONDS);
    CHECK_EQ(hbitmap_set(mine, 5, 1), 0);
    CHECK_EQ(hbitmap_reset(mine, 0, 64), 0);
    CHECK_VALID(mine);

    CHECK_EQ(hbitmap_torn(NULL), torn);
    CHECK(!hbitmap_torn(forked.asked), "torn, although nobody changes it");
    CHECK_EQ(hbitmap_count(forked.asked), (ngroups + 2) / 3);
    CHECK_EQ(hbitmap_drain(forked.asked, 0, ngroups, mine), 0);
    CHECK(hbitmap_empty(forked.asked), "not empty");
    CHECK_VALID(forked.asked);
    CHECK_VALID(mine);

    CHECK_EQ(hbitmap_set(forked.changed, 7, 1), 0);
    CHECK_EQ(hbitmap_take(forked.changed, 7), 1);
    hbitmap_reset_all(forked.changed);
    CHECK_EQ(hbitmap_count(forked.changed), 0);
    CHECK_VALID(forked.changed);
    hbitmap_free(forked.changed);
    _Exit(torn ? 3 : 0);
}

static void fork_often(struct worker *self)
{
    for (unsigned i = 0; i < 100; i++) {
        pid_t child;
        int status;

        linger(self, 1000);
        child = fork();
        CHECK(child >= 0, "fork: errno %d", errno);
        if (child == 0) {
            fork_child();
        }
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK(status == 0 || (WIFEXITED(status) && WEXITSTATUS(status) == 3),
              "the child of fork %u ended with %#x", i, status);
        forked.torn += status != 0;
    }
    atomic_fetch_sub(&busy, 1);
}

static void scenario_fork(void)
{
    ngroups = 64 * 64 * 70;
    nworkers = 0;
    forked.changed = make(ngroups, 0);
    forked.asked = make(ngroups, 0);
    forked.torn = 0;
    for (uint64_t group = 0; group < ngroups; group += 3) {
        CHECK_EQ(hbitmap_set(forked.asked, group, 1), 0);
    }
    CHECK(!hbitmap_torn(NULL) && !hbitmap_torn(forked.changed), "torn without a fork");
    atomic_store(&busy, 1);
    add(2, fork_change);
    add(1, fork_ask);
    add(1, fork_often);
    run_workers();
    CHECK(forked.torn > 0, "nobody was in a change at any of the forks");
    hbitmap_free(forked.changed);
    hbitmap_free(forked.asked);
}

/* ---- everything at once: memory and promise (a) ------------------------- */

static struct {
    HBitmap *hb[3];         /* two of one shape, and a coarser one */
    unsigned steps;
    bool truncating;
    uint64_t most;          /* groups */
} mixed;

static void mixed_search(struct worker *self, HBitmap *hb)
{
    int64_t start = (int64_t)rng_below(&self->rng, item_of(mixed.most)), count;
    uint64_t items[70], next, end, above = 0;
    HBitmapIter hbi;
    size_t n;

    hbitmap_iter_init(&hbi, hb, (uint64_t)start);
    for (int i = 0; i < 20 && hbitmap_iter_next(&hbi) >= 0; i++) {
        continue;
    }
    n = hbitmap_iter_fill(&hbi, items, 70);
    for (size_t i = 1; i < n; i++) {
        CHECK(items[i] > items[i - 1], "%" PRIu64 " is behind %" PRIu64, items[i],
              items[i - 1]);
    }
    (void)hbitmap_next_dirty(hb, start, INT64_MAX);
    (void)hbitmap_next_zero(hb, start, INT64_MAX);
    (void)hbitmap_status(hb, start, INT64_MAX, &count);
    if (hbitmap_next_dirty_area(hb, start, INT64_MAX, INT64_MAX, &start, &count)) {
        CHECK(start >= 0 && count > 0, "%" PRId64 " %" PRId64, start, count);
    }
    /* Whatever changes meanwhile: in order, not empty, inside the range. */
    end = rng_below(&self->rng, item_of(mixed.most)) + 1;
    n = hbitmap_areas(hb, 0, end, items, 35, &next);
    for (size_t i = 0; i < n; i++) {
        CHECK((i == 0 || items[2 * i] > above) && items[2 * i + 1] > 0 &&
              items[2 * i] < end && items[2 * i + 1] <= end - items[2 * i],
              "area %zu of %zu is %" PRIu64 " + %" PRIu64 ", %" PRIu64
              " is where the one before it ended", i, n, items[2 * i],
              items[2 * i + 1], above);
        above = items[2 * i] + items[2 * i + 1];
    }
    (void)hbitmap_get(hb, (uint64_t)start);
    (void)hbitmap_empty(hb);
}

static void mixed_serialize(struct worker *self, HBitmap *hb, HBitmap *other)
{
    uint64_t align = hbitmap_serialization_align(hb);
    uint64_t start = rng_below(&self->rng, hbitmap_size(hb) / align + 1) * align;
    uint64_t count = align * (1 + rng_below(&self->rng, 4));
    /* Sizes may change between two calls, and where `other` is the finer one
     * the chunk has four times as many groups there: room for the most. */
    uint8_t *buf = grab(8 * 4 * 4);

    if (hbitmap_serialize_part(hb, buf, start, count) == 0) {
        (void)hbitmap_deserialize_part(other, buf, start, count, true);
    }
    if (rng_one_in(&self->rng, 4)) {
        (void)hbitmap_deserialize_zeroes(other, start, count, true);
    } else if (rng_one_in(&self->rng, 4)) {
        (void)hbitmap_deserialize_ones(other, start, count, false);
        hbitmap_deserialize_finish(other);
    }
    free(buf);
}

static void mixed_do(struct worker *self)
{
    for (unsigned i = 0; i < mixed.steps; i++) {
        HBitmap *hb = mixed.hb[rng_below(&self->rng, 3)];
        HBitmap *a = mixed.hb[rng_below(&self->rng, 3)];
        HBitmap *b = mixed.hb[rng_below(&self->rng, 3)];
        uint64_t starts[5], counts[5], size = hbitmap_size(hb);
        uint64_t start = rng_below(&self->rng, item_of(mixed.most));
        uint64_t count = item_of(rng_below(&self->rng,
                                           rng_one_in(&self->rng, 4) ? mixed.most : 70));
        size_t nwords;

        switch (rng_below(&self->rng, 22)) {
        case 0:
        case 1:
        case 2:
        case 3:
            (void)hbitmap_set(hb, start, count);
            break;
        case 4:
            for (int k = 0; k < 5; k++) {
                starts[k] = rng_below(&self->rng, size + 1);
                counts[k] = rng_below(&self->rng, size - starts[k] + 1);
                counts[k] = counts[k] < item_of(9) ? counts[k] : item_of(9);
            }
            (void)hbitmap_set_many(hb, starts, counts, 5);
            break;
        case 5:
        case 6:
            start &= ~(item_of(64) - 1);
            (void)hbitmap_reset(hb, start, count & ~(item_of(64) - 1));
            break;
        case 7:
            (void)hbitmap_reset(hb, 0, size);
            break;
        case 8:
            hbitmap_reset_all(hb);
            break;
        case 9:
            (void)hbitmap_take(hb, start);
            break;
        case 10:
        case 11:
            (void)hbitmap_drain(a, 0, hbitmap_size(a), b);
            break;
        case 12:
            (void)hbitmap_merge(a, b, hb);
            break;
        case 13:
            (void)hbitmap_and(a, b, hb);
            break;
        case 14:
            (void)hbitmap_andnot(a, b, hb);
            break;
        case 15:
            (void)hbitmap_xor(a, b, hb);
            break;
        case 16:
            mixed_serialize(self, a, b);
            break;
        case 17:
            (void)hbitmap_equal(a, b);
            (void)hbitmap_is_subset(a, b);
            (void)hbitmap_is_disjoint(a, b);
            break;
        case 18:
            (void)hbitmap_count(hb);
            (void)hbitmap_count_range(hb, start, count);
            (void)hbitmap_nonzero_words(hb);
            break;
        case 19:
            if (mixed.truncating) {
                /* Sizes that come back, so that the bitmaps fit at times. */
                static const uint64_t groups[] = { 0, 1, 64, 65, 4096, 20000 };

                (void)hbitmap_truncate(hb, item_of(groups[rng_below(&self->rng, 6)]));
            } else {
                hbitmap_pin(hb);
                CHECK_EQ(hbitmap_truncate(hb, size + 1), -EBUSY);
                hbitmap_unpin(hb);
            }
            break;
        default:
            mixed_search(self, hb);
            CHECK(hbitmap_words(hb, &nwords) != NULL && nwords, "no words");
            break;
        }
    }
}

static void mixed_run(bool truncating)
{
    for (unsigned turn = 0; turn < 6; turn++) {
        use_shape(&shapes[turn % SHAPES]);
        mixed.truncating = truncating;
        mixed.most = truncating ? 20000 : ngroups;
        mixed.steps = 300;
        mixed.hb[0] = make(bitmap_size(), granularity);
        mixed.hb[1] = make(bitmap_size(), granularity);
        mixed.hb[2] = make(bitmap_size(), granularity + (truncating ? 0 : 2));
        add(5, mixed_do);
        run_workers();
        for (int i = 0; i < 3; i++) {
            check_quiet(mixed.hb[i]);
            hbitmap_free(mixed.hb[i]);
        }
    }
}

static void scenario_mixed(void)
{
    mixed_run(false);
}

static void scenario_truncate(void)
{
    mixed_run(true);
}

/* ------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(void);
} scenarios[] = {
    { "hot: no drain passes over a mark", scenario_hot },
    { "halfway: nor over one of its own thread", scenario_halfway },
    { "asked: what is marked is not empty", scenario_asked },
    { "once: each mark in one drain or in the rest", scenario_once },
    { "kept: marks beside operations in place", scenario_kept },
    { "seek: searches see every mark", scenario_seek },
    { "count: exact when all is quiet", scenario_count },
    { "growing: what has been marked is in the count", scenario_growing },
    { "paged: emptied by its pages, and marked again", scenario_paged },
#ifndef HB_TSAN
    { "live: what is deserialized changes meanwhile", scenario_live },
#endif
    { "fork: children wait for nobody", scenario_fork },
    { "mixed: everything together", scenario_mixed },
    { "truncate: everything together, and truncate", scenario_truncate },
};

int main(int argc, char **argv)
{
    unsigned long rounds = read_arguments(argc, argv, 1);
    const char *only = argc > 3 ? argv[3] : "";

    rng = test_seed;
    for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++) {
        if (strstr(scenarios[i].name, only)) {
            for (unsigned long round = 0; round < rounds; round++) {
                scenarios[i].run();
            }
            ok(scenarios[i].name);
        }
    }
    return 0;
}
