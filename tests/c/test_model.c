/* SPDX-License-Identifier: MIT */
/*
 * Every function of hbitmap.h against a model: one byte per group, no levels,
 * no words, no shifts but the one that finds the group.  Random operations on
 * a family of bitmaps, and after each step everything is compared; then
 * directed tests of the limits, of refused calls and of failing allocations.
 *
 *     test_model [SEED [ROUNDS]]
 *
 * Build with csrc and -DHB_TEST_ALLOC; -DHB_MAP_MIN=SIZE_MAX puts all memory
 * under AddressSanitizer's red zones, -DHB_MAP_MIN=1 maps all of it.
 * -DBREAK_MODEL breaks one operation of the model: the test has to fail.
 * -DEMULATED where another program plays the processor: what the system knows of
 * memory is that one's, which has its own for each page of 2^41 groups, 24 GiB.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE     /* mincore */
#endif

#include <pthread.h>
#include <unistd.h>

#include "support.h"
#include "words.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__) && !defined(SANITIZED)
#include <fcntl.h>
#include <malloc.h>
#if __GLIBC__ > 2 || __GLIBC_MINOR__ >= 33
#define HAVE_MALLINFO2 1
#endif
#endif

#if defined(__GLIBC__) && !defined(HB_TSAN) && \
    (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 32)
enum { ALONE_IS_KNOWN = 1 };
#else
enum { ALONE_IS_KNOWN = 0 };
#endif

#ifdef EMULATED
enum { EMULATION = 1 };
#else
enum { EMULATION = 0 };
#endif

static uint64_t rng;

/* The n-th allocation from now fails; 0: none does. */
static unsigned fail_countdown;

int hb_test_alloc_fails(void);
int hb_test_alloc_fails(void)
{
    return fail_countdown && --fail_countdown == 0;
}

/* ---- the model ---------------------------------------------------------- */

struct model {
    uint64_t size;
    int granularity;
    uint64_t ngroups;
    uint8_t *dirty;         /* one per group */
};

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t groups_of(uint64_t size, int granularity)
{
    return size ? ((size - 1) >> granularity) + 1 : 0;
}

static void m_init(struct model *m, uint64_t size, int granularity)
{
    m->size = size;
    m->granularity = granularity;
    m->ngroups = groups_of(size, granularity);
    m->dirty = grab(m->ngroups);
}

static void m_free(struct model *m)
{
    free(m->dirty);
    m->dirty = NULL;
}

static bool m_get(const struct model *m, uint64_t item)
{
    return item < m->size && m->dirty[item >> m->granularity];
}

static uint64_t m_group_start(const struct model *m, uint64_t group)
{
    return group << m->granularity;
}

/* Where the group ends within the bitmap. */
static uint64_t m_group_end(const struct model *m, uint64_t group)
{
    return group + 1 == m->ngroups ? m->size : m_group_start(m, group + 1);
}

/* The size rounded up to a group: at most 2^63. */
static uint64_t m_rounded(const struct model *m)
{
    return m->ngroups << m->granularity;
}

static bool m_inside(const struct model *m, uint64_t start, uint64_t count)
{
    return start <= m->size && count <= m->size - start;
}

static void m_put(struct model *m, uint64_t start, uint64_t count, uint8_t to)
{
    for (uint64_t group = start >> m->granularity;
         count && group <= (start + count - 1) >> m->granularity; group++) {
        m->dirty[group] = to;
    }
}

static void m_truncate(struct model *m, uint64_t size)
{
    struct model old = *m;

    m_init(m, size, old.granularity);
    memcpy(m->dirty, old.dirty,
           old.ngroups < m->ngroups ? old.ngroups : m->ngroups);
    m_free(&old);
}

static uint64_t m_dirty_groups(const struct model *m)
{
    uint64_t dirty = 0;

    for (uint64_t group = 0; group < m->ngroups; group++) {
        dirty += m->dirty[group];
    }
    return dirty;
}

/* Where a search of [start, start + count) ends: the clamped end. */
static uint64_t m_clamp(const struct model *m, uint64_t start, uint64_t count)
{
    if (start > m->size) {
        return start;
    }
    return count > m->size - start ? m->size : start + count;
}

static int64_t m_next(const struct model *m, int64_t start, int64_t count,
                      uint8_t wanted)
{
    uint64_t end;

    if (start < 0 || count < 0) {
        return -1;
    }
    end = m_clamp(m, (uint64_t)start, (uint64_t)count);
    for (uint64_t item = (uint64_t)start; item < end;
         item = m_group_end(m, item >> m->granularity)) {
        if (m->dirty[item >> m->granularity] == wanted) {
            return (int64_t)item;
        }
    }
    return -1;
}

/* The end of the run that begins at `start`, not beyond `end`. */
static uint64_t m_run_end(const struct model *m, uint64_t start, uint64_t end)
{
    uint8_t kind = m->dirty[start >> m->granularity];

    while (start < end && m->dirty[start >> m->granularity] == kind) {
        start = m_group_end(m, start >> m->granularity);
    }
    return start < end ? start : end;
}

static uint64_t m_count_range(const struct model *m, uint64_t start,
                              uint64_t count)
{
    uint64_t end = m_clamp(m, start, count), items = 0;

    while (start < end) {
        uint64_t next = m_group_end(m, start >> m->granularity);

        next = next < end ? next : end;
        if (m_get(m, start)) {
            items += next - start;
        }
        start = next;
    }
    return items;
}

/* What may come back for a range of whole groups (reset, drain). */
enum { MAY_SUCCEED = 1, MAY_ERANGE = 2, MAY_EINVAL = 4 };

static unsigned m_whole_groups(const struct model *m, uint64_t start,
                               uint64_t count)
{
    uint64_t inside = (UINT64_C(1) << m->granularity) - 1;
    uint64_t end = start + count;
    unsigned may = 0;

    if (count == 0) {
        return MAY_SUCCEED;
    }
    if (end < start || start >= m->size ||
        (end > m->size && end != m_rounded(m))) {
        may |= MAY_ERANGE;
    }
    if ((start & inside) || (end != m->size && (end & inside))) {
        /* Where the end is beyond the size too, either answer will do. */
        may |= end > m->size ? MAY_EINVAL | MAY_ERANGE : MAY_EINVAL;
    }
    return may ? may : MAY_SUCCEED;
}

/* What may come back for a chunk of (de)serialisation. */
static unsigned m_chunk(const struct model *m, uint64_t start, uint64_t count)
{
    uint64_t end = start + count, inside;
    unsigned may = 0;

    if (count == 0) {
        return MAY_SUCCEED;
    }
    if (end < start || start >= m->size || end > m_rounded(m)) {
        may |= MAY_ERANGE;
    }
    if (m->granularity >= 58) {
        return may | MAY_EINVAL;
    }
    inside = (UINT64_C(64) << m->granularity) - 1;
    if ((start & inside) ||
        ((end & inside) && (end - 1) >> m->granularity != m->ngroups - 1)) {
        may |= MAY_EINVAL;
    }
    return may ? may : MAY_SUCCEED;
}

/* Is `err` one of those? True if the call did its work. */
static bool answered(int err, unsigned may)
{
    unsigned got = err == 0 ? MAY_SUCCEED :
                   err == -ERANGE ? MAY_ERANGE :
                   err == -EINVAL ? MAY_EINVAL : 0;

    CHECK(got & may, "returned %d, expected one of %s%s%s", err,
          may & MAY_SUCCEED ? "0 " : "", may & MAY_ERANGE ? "-ERANGE " : "",
          may & MAY_EINVAL ? "-EINVAL" : "");
    return err == 0;
}

/* ---- a family of bitmaps ------------------------------------------------ */

enum { CANARY_WORDS = 4, MEMBERS = 4 };

static const uint64_t canary = UINT64_C(0xc0ffee00dead0001);

/* One bitmap and its model; some stand on memory of the test's. */
struct member {
    char name;
    HBitmap *hb;
    struct model m;
    uint64_t *memory;       /* canaries, leaf words, canaries; or NULL */
    size_t nwords;          /* leaf words between them */
};

static size_t words_of(const struct model *m)
{
    return m->ngroups ? (size_t)((m->ngroups - 1) / 64 + 1) : 1;
}

static uint64_t m_word(const struct model *m, uint64_t word)
{
    uint64_t value = 0;

    for (uint64_t bit = 0; bit < 64 && word * 64 + bit < m->ngroups; bit++) {
        value |= (uint64_t)m->dirty[word * 64 + bit] << bit;
    }
    return value;
}

static void compare(const struct member *x)
{
    const struct model *m = &x->m;
    size_t nwords = 0;
    const uint64_t *words = hbitmap_words(x->hb, &nwords);
    uint64_t dirty = m_dirty_groups(m), nonzero = 0;

    CHECK_EQ(hbitmap_size(x->hb), m->size);
    CHECK_EQ(hbitmap_granularity(x->hb), m->granularity);
    CHECK_EQ(nwords, words_of(m));
    for (size_t word = 0; word < nwords; word++) {
        uint64_t want = m_word(m, word);

        CHECK(words[word] == want,
              "%c: leaf word %zu is %016" PRIx64 ", not %016" PRIx64,
              x->name, word, words[word], want);
        nonzero += want != 0;
    }
    CHECK_EQ(hbitmap_empty(x->hb), dirty == 0);
    /* Not always, so that both a fresh and a remembered count are met. */
    if (rng_one_in(&rng, 2)) {
        CHECK_EQ(hbitmap_count(x->hb), dirty << m->granularity);
    }
    CHECK_EQ(hbitmap_nonzero_words(x->hb), nonzero);
    CHECK_VALID(x->hb);
    for (size_t i = 0; x->memory && i < CANARY_WORDS; i++) {
        CHECK_EQ(x->memory[i], canary);
        CHECK_EQ(x->memory[CANARY_WORDS + x->nwords + i], canary);
    }
}

static uint64_t random_word(void)
{
    switch (rng_below(&rng, 5)) {
    case 0:
        return 0;
    case 1:
        return UINT64_MAX;
    case 2:
        return UINT64_C(1) << rng_below(&rng, 64);
    case 3:
        return rng_next(&rng) & rng_next(&rng) & rng_next(&rng);
    default:
        return rng_next(&rng);
    }
}

/* On memory of the test's own, whose bits are adopted. */
static void member_on_memory(struct member *x, uint64_t size, int granularity)
{
    size_t spare = (size_t)rng_below(&rng, 3), total;

    m_init(&x->m, size, granularity);
    x->nwords = words_of(&x->m);
    total = x->nwords + 2 * CANARY_WORDS;
    x->memory = grab(total * sizeof(uint64_t));
    for (size_t i = 0; i < total; i++) {
        x->memory[i] = canary;
    }
    for (size_t word = 0; word < x->nwords; word++) {
        uint64_t value = rng_one_in(&rng, 2) ? 0 : random_word();

        x->memory[CANARY_WORDS + word] = value;
        for (uint64_t bit = 0; bit < 64 && word * 64 + bit < x->m.ngroups; bit++) {
            x->m.dirty[word * 64 + bit] = value >> bit & 1;
        }
    }
    x->hb = hbitmap_alloc_on(size, granularity, x->memory + CANARY_WORDS,
                             x->nwords + spare);
    CHECK(x->hb != NULL, "errno %d", errno);
}

static void member_open(struct member *x, char name, uint64_t size,
                        int granularity, bool on_memory)
{
    *x = (struct member){ .name = name };
    if (on_memory) {
        member_on_memory(x, size, granularity);
    } else {
        m_init(&x->m, size, granularity);
        x->hb = hbitmap_alloc(size, granularity);
        CHECK(x->hb != NULL, "errno %d", errno);
    }
}

static void member_close(struct member *x)
{
    hbitmap_free(x->hb);
    for (size_t i = 0; x->memory && i < x->nwords; i++) {
        CHECK_EQ(x->memory[CANARY_WORDS + i], m_word(&x->m, i));
    }
    free(x->memory);
    m_free(&x->m);
}

/* ---- arguments ---------------------------------------------------------- */

/* A number in [0, size] that likes boundaries: of the bitmap, words, groups. */
static uint64_t pick_item(const struct model *m)
{
    uint64_t item;

    switch (rng_below(&rng, 8)) {
    case 0:
        return 0;
    case 1:
        return m->size;
    case 2:
        item = rng_below(&rng, 3);
        return item < m->size ? m->size - item : 0;
    case 3:
    case 4:
        item = m_group_start(m, rng_below(&rng, m->ngroups / 64 + 1) * 64);
        break;
    case 5:
        item = m_group_start(m, rng_below(&rng, m->ngroups + 1));
        break;
    default:
        item = rng_below(&rng, m->size + 1);
        break;
    }
    item += rng_below(&rng, 3);
    item = item ? item - 1 : 0;
    return item < m->size ? item : m->size;
}

static uint64_t pick_wild(const struct model *m)
{
    static const uint64_t wild[] = {
        0, 1, 2, 63, 64, INT64_MAX - 1, INT64_MAX, UINT64_C(1) << 63,
        (UINT64_C(1) << 63) + 1, UINT64_MAX - 1, UINT64_MAX,
    };
    uint64_t which = rng_below(&rng, 16);

    switch (which) {
    case 11:
        return m->size + 1;
    case 12:
        return m_rounded(m);
    case 13:
        return m_rounded(m) + 1;
    case 14:
        return rng_next(&rng);
    case 15:
        return pick_item(m);
    default:
        return wild[which];
    }
}

/* A range inside the bitmap. */
static void pick_range(const struct model *m, uint64_t *start, uint64_t *count)
{
    uint64_t a = pick_item(m), b = pick_item(m);

    if (!rng_one_in(&rng, 6)) {     /* usually a short one */
        uint64_t most = UINT64_C(1) << m->granularity;

        most = rng_one_in(&rng, 2) ? most * 3 / 2 : most * (rng_below(&rng, 150) + 1);
        b = a + rng_below(&rng, most) + 1;
        b = b < a || b > m->size ? m->size : b;
    }
    *start = a < b ? a : b;
    *count = a < b ? b - a : a - b;
}

/* Whole groups; but for now and then, when anything goes. */
static void pick_whole_groups(const struct model *m, uint64_t *start,
                              uint64_t *count)
{
    uint64_t inside = (UINT64_C(1) << m->granularity) - 1, end;

    if (rng_one_in(&rng, 8)) {
        *start = pick_wild(m);
        *count = pick_wild(m);
        return;
    }
    pick_range(m, start, count);
    if (rng_one_in(&rng, 8)) {
        return;
    }
    end = (*start + *count) & ~inside;
    if (*start + *count == m->size || rng_one_in(&rng, 4)) {
        end = rng_one_in(&rng, 2) ? m->size : m_rounded(m);
    }
    *start &= ~inside;
    *count = end > *start ? end - *start : 0;
}

static void pick_chunk(const struct model *m, uint64_t *start, uint64_t *count)
{
    uint64_t inside, end;

    pick_range(m, start, count);
    if (rng_one_in(&rng, 8)) {
        *start = pick_wild(m);
        *count = pick_wild(m);
    } else if (m->granularity < 58 && !rng_one_in(&rng, 8)) {
        inside = (UINT64_C(64) << m->granularity) - 1;
        end = (*start + *count) & ~inside;
        *start &= ~inside;
        if (*start + *count >= (m->size & ~inside) || rng_one_in(&rng, 4)) {
            end = rng_one_in(&rng, 4) ? m_rounded(m) : m->size;
        }
        *count = end > *start ? end - *start : 0;
    }
}

/* ---- operations --------------------------------------------------------- */

static struct member family[MEMBERS];

static struct member *any(void)
{
    return &family[rng_below(&rng, MEMBERS)];
}

static void op_set(void)
{
    struct member *x = any();
    uint64_t start, count;
    bool inside;

    pick_range(&x->m, &start, &count);
    if (rng_one_in(&rng, 6)) {
        start = pick_wild(&x->m);
        count = pick_wild(&x->m);
    }
    trace("%c: set %" PRIu64 " %" PRIu64, x->name, start, count);
    inside = count == 0 || m_inside(&x->m, start, count);
    CHECK_EQ(hbitmap_set(x->hb, start, count), inside ? 0 : -ERANGE);
    if (inside) {
#ifdef BREAK_MODEL
        /* A group that the range only begins to touch stays clean. */
        if (count > 1 && ((start + count - 1) >> x->m.granularity) !=
                             (start >> x->m.granularity)) {
            count--;
        }
#endif
        m_put(&x->m, start, count, 1);
    }
}

static void op_set_many(void)
{
    enum { MOST = 40 };
    struct member *x = any();
    uint64_t starts[MOST], counts[MOST];
    size_t n = (size_t)rng_below(&rng, MOST + 1);
    bool inside = true;

    for (size_t i = 0; i < n; i++) {
        pick_range(&x->m, &starts[i], &counts[i]);
        if (rng_one_in(&rng, 150)) {
            starts[i] = pick_wild(&x->m);
            counts[i] = pick_wild(&x->m);
        }
        inside = inside &&
                 (counts[i] == 0 || m_inside(&x->m, starts[i], counts[i]));
    }
    trace("%c: set_many of %zu, %s", x->name, n, inside ? "good" : "bad");
    CHECK_EQ(hbitmap_set_many(x->hb, n ? starts : NULL, n ? counts : NULL, n),
             inside ? 0 : -ERANGE);
    for (size_t i = 0; inside && i < n; i++) {
        m_put(&x->m, starts[i], counts[i], 1);
    }
}

/* The same of single items, without counts. */
static void op_set_items(void)
{
    enum { MOST = 100 };
    struct member *x = any();
    uint64_t items[MOST];
    size_t n = (size_t)rng_below(&rng, MOST + 1);
    bool inside = true;

    for (size_t i = 0; i < n; i++) {
        items[i] = x->m.size ? least(pick_item(&x->m), x->m.size - 1) : 0;
        items[i] = rng_one_in(&rng, 250) ? pick_wild(&x->m) : items[i];
        inside = inside && items[i] < x->m.size;
    }
    trace("%c: set_many of %zu items, %s", x->name, n, inside ? "good" : "bad");
    CHECK_EQ(hbitmap_set_many(x->hb, items, NULL, n), inside ? 0 : -ERANGE);
    for (size_t i = 0; inside && i < n; i++) {
        m_put(&x->m, items[i], 1, 1);
    }
}

/* Where bit i of a foreign bitmap begins; at the size: there or beyond. */
static uint64_t m_foreign(const struct model *m, uint64_t start, int granularity, uint64_t i)
{
    if (start >= m->size || i > (m->size - start - 1) >> granularity) {
        return m->size;
    }
    return start + (i << granularity);
}

static void op_merge_bits(void)
{
    struct member *x = any();
    const struct model *m = &x->m;
    uint64_t start = rng_one_in(&rng, 3) ? pick_item(m) & ~((UINT64_C(64) << (m->granularity % 58)) - 1)
                                         : pick_item(m);
    int granularity = rng_one_in(&rng, 2)
                          ? m->granularity
                          : m->granularity - 3 + (int)rng_below(&rng, 7);
    uint64_t left = start < m->size ? (m->size - start - 1) >> (granularity & 63) : 0;
    uint64_t nbits = 1 + rng_below(&rng, 1 + least(left + 2, 12000));
    bool msb_first = rng_one_in(&rng, 2), inside = true, valid;
    size_t nbytes = (size_t)(nbits + 7) / 8;
    uint8_t *bits = grab(nbytes);

    valid = granularity >= 0 && granularity <= 63;
    nbits = rng_one_in(&rng, 20) ? 0 : nbits;
    for (uint64_t n = rng_below(&rng, rng_one_in(&rng, 4) ? nbits / 2 + 1 : 6); nbits && n; n--) {
        uint64_t from = rng_below(&rng, nbits);
        uint64_t run = rng_one_in(&rng, 4) ? rng_below(&rng, 300) : 1;

        for (uint64_t i = from; i < nbits && i < from + run; i++) {
            bits[i / 8] |= (uint8_t)(msb_first ? 0x80 >> i % 8 : 1 << i % 8);
        }
    }
    /* Behind the last there may be others. */
    if (nbits % 8 && rng_one_in(&rng, 2)) {
        bits[nbits / 8] |= (uint8_t)(msb_first ? 0xff >> nbits % 8 : 0xff << nbits % 8);
    }
    trace("%c: merge_bits %" PRIu64 " from %" PRIu64 ", granularity %d, %s", x->name, nbits,
          start, granularity, msb_first ? "highest first" : "lowest first");
    for (unsigned pass = 0; valid && inside && pass < 2; pass++) {
        for (uint64_t i = 0; i < nbits; i++) {
            uint64_t from = m_foreign(m, start, granularity, i), count;

            if (!(bits[i / 8] >> (msb_first ? 7 - i % 8 : i % 8) & 1)) {
                continue;
            }
            inside = inside && from < m->size;
            count = m_foreign(m, start, granularity, i + 1) - from;
            if (pass == 1) {
                m_put(&x->m, from, count, 1);
            }
        }
    }
    CHECK_EQ(hbitmap_merge_bits(x->hb, bits, nbits, start, granularity, msb_first),
             !valid ? -EINVAL : inside ? 0 : -ERANGE);
    free(bits);
}

static void op_reset(void)
{
    struct member *x = any();
    uint64_t start, count;

    pick_whole_groups(&x->m, &start, &count);
    trace("%c: reset %" PRIu64 " %" PRIu64, x->name, start, count);
    if (answered(hbitmap_reset(x->hb, start, count),
                 m_whole_groups(&x->m, start, count))) {
        m_put(&x->m, start, count, 0);
    }
}

static void op_flip(void)
{
    struct member *x = any();
    uint64_t start, count;

    pick_whole_groups(&x->m, &start, &count);
    trace("%c: flip %" PRIu64 " %" PRIu64, x->name, start, count);
    if (answered(hbitmap_flip(x->hb, start, count),
                 m_whole_groups(&x->m, start, count))) {
        for (uint64_t group = start >> x->m.granularity;
             count && group <= (start + count - 1) >> x->m.granularity; group++) {
            x->m.dirty[group] = !x->m.dirty[group];
        }
    }
}

static void op_reset_all(void)
{
    struct member *x = any();

    trace("%c: reset_all", x->name);
    hbitmap_reset_all(x->hb);
    memset(x->m.dirty, 0, x->m.ngroups);
}

static void op_take(void)
{
    struct member *x = any();
    uint64_t item = rng_one_in(&rng, 8) ? pick_wild(&x->m) : pick_item(&x->m);

    trace("%c: take %" PRIu64, x->name, item);
    /* Nobody else has the lock. */
    CHECK_EQ(rng_one_in(&rng, 2) ? hbitmap_take(x->hb, item) : hbitmap_try_take(x->hb, item),
             item >= x->m.size ? -ERANGE : m_get(&x->m, item));
    if (item < x->m.size) {
        m_put(&x->m, item, 1, 0);
    }
}

static void op_get(void)
{
    struct member *x = any();

    for (int i = 0; i < 10; i++) {
        uint64_t item = i ? pick_item(&x->m) : pick_wild(&x->m);

        trace("%c: get %" PRIu64, x->name, item);
        CHECK_EQ(hbitmap_get(x->hb, item), m_get(&x->m, item));
    }
}

static void op_count_range(void)
{
    struct member *x = any();

    for (int i = 0; i < 5; i++) {
        uint64_t start, count;

        pick_range(&x->m, &start, &count);
        if (i == 0) {
            start = pick_wild(&x->m);
        }
        if (i <= 1) {
            count = pick_wild(&x->m);
        }
        trace("%c: count_range %" PRIu64 " %" PRIu64, x->name, start, count);
        CHECK_EQ(hbitmap_count_range(x->hb, start, count),
                 m_count_range(&x->m, start, count));
    }
}

static void op_order(void)
{
    struct member *x = any();
    const struct model *m = &x->m;
    uint64_t dirty = m_dirty_groups(m), n = 0;

    for (int i = 0; i < 4; i++) {
        uint64_t item = i ? pick_item(m) : pick_wild(m), rank = 0;

        for (uint64_t group = 0; group < m->ngroups && m_group_start(m, group) <= item; group++) {
            rank += m->dirty[group];
        }
        trace("%c: rank %" PRIu64, x->name, item);
        CHECK_EQ(hbitmap_rank(x->hb, item), rank);
    }
    for (uint64_t group = 0; group < m->ngroups; group++) {
        if (m->dirty[group]) {
            /* Of many, some. */
            if (dirty < 20 || n == dirty - 1 || rng_one_in(&rng, dirty / 8)) {
                trace("%c: select %" PRIu64, x->name, n);
                CHECK_EQ(hbitmap_select(x->hb, n), m_group_start(m, group));
            }
            n++;
        }
    }
    CHECK_EQ(hbitmap_select(x->hb, dirty), -1);
    CHECK_EQ(hbitmap_select(x->hb, UINT64_MAX), -1);
}

static uint64_t pick_size(const struct model *m);

/* One step of an iterator that stands at `group`: what it has to find. */
static int64_t m_iter(const struct model *m, uint64_t *group)
{
    for (; *group < m->ngroups; ++*group) {
        if (m->dirty[*group]) {
            return (int64_t)m_group_start(m, (*group)++);
        }
    }
    return -1;
}

static uint64_t first_group(const struct model *m, uint64_t first)
{
    /* A start beyond the size finds nothing. */
    return first < m->size ? first >> m->granularity : UINT64_MAX;
}

/* An iterator, and changes to its bitmap between its steps. */
static void op_iter(void)
{
    struct member *x = any();
    uint64_t first = rng_one_in(&rng, 6) ? pick_wild(&x->m) : pick_item(&x->m);
    uint64_t group = first_group(&x->m, first);
    bool changing = rng_one_in(&rng, 2);
    HBitmapIter hbi;

    trace("%c: iter from %" PRIu64, x->name, first);
    hbitmap_iter_init(&hbi, x->hb, first);
    for (int i = 0; i < 300; i++) {
        int64_t want;

        if (changing && group != UINT64_MAX && rng_one_in(&rng, 4)) {
            uint64_t start = pick_item(&x->m);

            if (rng_one_in(&rng, 12)) {
                uint64_t size = pick_size(&x->m);

                trace("%c: truncate %" PRIu64 " in the iteration", x->name, size);
                if (hbitmap_truncate(x->hb, size) == 0) {
                    m_truncate(&x->m, size);
                } else {
                    CHECK(x->memory != NULL, "truncate refused");
                }
            } else if (start < x->m.size) {
                bool set = rng_one_in(&rng, 2);

                trace("%c: %s %" PRIu64 " in the iteration", x->name,
                      set ? "set" : "take", start);
                if (set) {
                    CHECK_EQ(hbitmap_set(x->hb, start, 1), 0);
                } else {
                    CHECK_EQ(hbitmap_take(x->hb, start), m_get(&x->m, start));
                }
                m_put(&x->m, start, 1, set);
            }
        }
        want = m_iter(&x->m, &group);
        CHECK_EQ(hbitmap_iter_next(&hbi), want);
        if (want < 0) {
            CHECK_EQ(hbitmap_iter_next(&hbi), -1);
            break;
        }
    }
}

static void op_iter_fill(void)
{
    struct member *x = any();
    uint64_t first = rng_one_in(&rng, 6) ? pick_wild(&x->m) : pick_item(&x->m);
    uint64_t group = first_group(&x->m, first);
    HBitmapIter hbi;

    trace("%c: iter_fill from %" PRIu64, x->name, first);
    hbitmap_iter_init(&hbi, x->hb, first);
    for (int i = 0; i < 20; i++) {
        size_t n = (size_t)rng_below(&rng, rng_one_in(&rng, 2) ? 4 : 300), filled;
        uint64_t *items = grab(n * sizeof(*items));     /* red zones at n */

        filled = hbitmap_iter_fill(&hbi, items, n);
        CHECK(filled <= n, "%zu of %zu", filled, n);
        for (size_t k = 0; k < filled; k++) {
            CHECK_EQ(items[k], m_iter(&x->m, &group));
        }
        free(items);
        if (filled < n) {
            CHECK_EQ(m_iter(&x->m, &group), -1);
            CHECK_EQ(hbitmap_iter_next(&hbi), -1);
            break;
        }
        if (rng_one_in(&rng, 3)) {      /* both ways, mixed */
            CHECK_EQ(hbitmap_iter_next(&hbi), m_iter(&x->m, &group));
        }
    }
}

/* start and count for a search: any int64_t, but mostly within reach. */
static void pick_search(const struct model *m, int64_t *start, int64_t *count)
{
    uint64_t s, c;

    pick_range(m, &s, &c);
    if (rng_one_in(&rng, 3)) {
        c = INT64_MAX - (rng_one_in(&rng, 2) ? 0 : rng_below(&rng, 3));
    }
    if (rng_one_in(&rng, 6)) {
        c = pick_wild(m);
    }
    if (rng_one_in(&rng, 6)) {
        s = pick_wild(m);
    }
    *start = (int64_t)s;
    *count = (int64_t)c;
}

static void op_next(void)
{
    struct member *x = any();

    for (int i = 0; i < 6; i++) {
        int64_t start, count;

        pick_search(&x->m, &start, &count);
        trace("%c: next_dirty, next_zero %" PRId64 " %" PRId64, x->name, start,
              count);
        CHECK_EQ(hbitmap_next_dirty(x->hb, start, count),
                 m_next(&x->m, start, count, 1));
        CHECK_EQ(hbitmap_next_zero(x->hb, start, count),
                 m_next(&x->m, start, count, 0));
    }
}

static int64_t m_prev(const struct model *m, int64_t start, int64_t count)
{
    uint64_t first, item;

    if (start < 0 || count <= 0 || !m->size) {
        return -1;
    }
    first = count == INT64_MAX || count > start ? 0 : (uint64_t)(start - count + 1);
    item = least((uint64_t)start, m->size - 1);
    while (!m_get(m, item)) {
        if (item >> m->granularity == 0) {
            return -1;
        }
        item = m_group_start(m, item >> m->granularity) - 1;
    }
    return item < first ? -1 : (int64_t)item;
}

static void op_prev(void)
{
    struct member *x = any();

    for (int i = 0; i < 6; i++) {
        int64_t start, count;

        pick_search(&x->m, &start, &count);
        trace("%c: prev_dirty %" PRId64 " %" PRId64, x->name, start, count);
        CHECK_EQ(hbitmap_prev_dirty(x->hb, start, count), m_prev(&x->m, start, count));
    }
}

static void op_copy_areas(void)
{
    struct member *x = any();
    const struct model *m = &x->m;
    uint64_t dirty = m_count_range(m, 0, UINT64_MAX);
    uint8_t *from, *to;

    if (m->size > 1 << 20) {
        return;
    }
    from = grab(m->size);
    to = grab(m->size);
    memset(from, 1, m->size);
    trace("%c: copy_areas", x->name);
    CHECK_EQ(hbitmap_copy_areas(x->hb, to, from, m->size), dirty);
    for (uint64_t item = 0; item < m->size; item++) {
        CHECK_EQ(to[item], m_get(m, item));
    }
    if (m->size > 1) {
        CHECK_EQ(hbitmap_copy_areas(x->hb, to, from, m->size - 1), -EINVAL);
        CHECK_EQ(hbitmap_copy_areas(x->hb, to, to + m->size - 1, m->size), -EINVAL);
        CHECK_EQ(hbitmap_copy_areas(x->hb, to + m->size - 1, to, m->size), -EINVAL);
    }
    free(from);
    free(to);
}

static void op_next_dirty_area(void)
{
    struct member *x = any();

    for (int i = 0; i < 6; i++) {
        int64_t start, count, end, most = INT64_MAX, want, found, area, length;

        pick_search(&x->m, &start, &count);
        end = rng_one_in(&rng, 4) ? count :
              start < 0 || count < 0 || count > INT64_MAX - start ? INT64_MAX :
                                                                    start + count;
        if (rng_one_in(&rng, 2)) {
            most = rng_one_in(&rng, 4) ? (int64_t)pick_wild(&x->m) :
                                         (int64_t)pick_item(&x->m);
        }
        trace("%c: next_dirty_area %" PRId64 " %" PRId64 " %" PRId64, x->name,
              start, end, most);
        want = start < 0 || end < start || most <= 0 ? -1 :
               m_next(&x->m, start, end - start, 1);
        area = length = -77;
        found = hbitmap_next_dirty_area(x->hb, start, end, most, &area, &length);
        CHECK_EQ(found, want >= 0);
        if (want < 0) {
            CHECK_EQ(area, -77);
            CHECK_EQ(length, -77);
        } else {
            uint64_t stop = m_clamp(&x->m, 0, (uint64_t)end);
            uint64_t run = m_run_end(&x->m, (uint64_t)want, stop) - (uint64_t)want;

            CHECK_EQ(area, want);
            CHECK_EQ(length, run < (uint64_t)most ? run : (uint64_t)most);
        }
    }
}

static void op_status(void)
{
    struct member *x = any();

    for (int i = 0; i < 6; i++) {
        int64_t start, count, pnum = -77, want = 0;
        bool dirty = false;

        pick_search(&x->m, &start, &count);
        if (start >= 0 && count > 0 && (uint64_t)start < x->m.size) {
            uint64_t end = m_clamp(&x->m, (uint64_t)start, (uint64_t)count);

            dirty = m_get(&x->m, (uint64_t)start);
            want = (int64_t)m_run_end(&x->m, (uint64_t)start, end) - start;
        }
        trace("%c: status %" PRId64 " %" PRId64, x->name, start, count);
        CHECK_EQ(hbitmap_status(x->hb, start, count, &pnum), dirty);
        CHECK_EQ(pnum, want);
    }
}

/* All areas of a range through a buffer of any size, tiny ones most of all. */
static void op_areas(void)
{
    struct member *x = any();
    uint64_t start = rng_one_in(&rng, 8) ? pick_wild(&x->m) : pick_item(&x->m);
    uint64_t end = rng_one_in(&rng, 3) ? pick_wild(&x->m) : pick_item(&x->m);
    uint64_t stop = end < x->m.size ? end : x->m.size, at = start;
    size_t most = 1 + (size_t)rng_below(&rng, rng_one_in(&rng, 2) ? 3 : 200);
    uint64_t *areas = grab(2 * most * sizeof(*areas));
    uint64_t next = UINT64_MAX - 5;
    uint64_t total = 0;
    size_t n;

    trace("%c: areas %" PRIu64 " %" PRIu64 ", %zu at a time", x->name, start,
          end, most);
    CHECK_EQ(hbitmap_areas(x->hb, start, end, NULL, 0, &next), 0);
    if (start < stop) {
        CHECK(next <= (uint64_t)m_next(&x->m, (int64_t)start,
                                       (int64_t)(stop - start), 1),
              "without room it went on to %" PRIu64, next);
    }
    next = start;
    do {
        uint64_t from = next;

        n = hbitmap_areas(x->hb, from, end, areas, most, &next);
        CHECK(n <= most, "%zu of %zu", n, most);
        total += n;
        for (size_t i = 0; i < n; i++) {
            int64_t want = m_next(&x->m, (int64_t)at, (int64_t)(stop - at), 1);
            uint64_t run_end;

            CHECK_EQ(areas[2 * i], want);
            run_end = m_run_end(&x->m, (uint64_t)want, stop);
            CHECK_EQ(areas[2 * i + 1], run_end - (uint64_t)want);
            at = run_end;
        }
        if (n == most) {
            CHECK(next >= at && next <= stop && next > from,
                  "next is %" PRIu64 ", the last area ended at %" PRIu64, next, at);
        }
    } while (n == most);
    if (at < stop) {
        CHECK_EQ(m_next(&x->m, (int64_t)at, (int64_t)(stop - at), 1), -1);
    }
    CHECK_EQ(next, stop);
    CHECK_EQ(hbitmap_count_areas(x->hb, start, end), total);
    free(areas);
}

static bool same_shape(const struct member *a, const struct member *b)
{
    return a->m.size == b->m.size && a->m.granularity == b->m.granularity;
}

static void op_compare(void)
{
    struct member *a = any(), *b = any();
    bool same = same_shape(a, b), equal = same, subset = true, disjoint = true;

    trace("%c %c: equal, is_subset, is_disjoint", a->name, b->name);
    for (uint64_t group = 0; same && group < a->m.ngroups; group++) {
        uint8_t va = a->m.dirty[group], vb = b->m.dirty[group];

        equal = equal && va == vb;
        subset = subset && va <= vb;
        disjoint = disjoint && !(va && vb);
    }
    CHECK_EQ(hbitmap_equal(a->hb, b->hb), equal);
    CHECK_EQ(hbitmap_is_subset(a->hb, b->hb), same ? subset : -EINVAL);
    CHECK_EQ(hbitmap_is_disjoint(a->hb, b->hb), same ? disjoint : -EINVAL);
}

static void op_compare_counts(void)
{
    struct member *a = any(), *b = any();
    bool same = same_shape(a, b);
    int64_t both = 0, first = 0, second = 0;

    trace("%c %c: counts", a->name, b->name);
    for (uint64_t group = 0; same && group < a->m.ngroups; group++) {
        uint8_t va = a->m.dirty[group], vb = b->m.dirty[group];

        both += va && vb;
        first += va && !vb;
        second += !va && vb;
    }
    CHECK_EQ(hbitmap_intersection_count(a->hb, b->hb), same ? both : -EINVAL);
    CHECK_EQ(hbitmap_union_count(a->hb, b->hb), same ? both + first + second : -EINVAL);
    CHECK_EQ(hbitmap_difference_count(a->hb, b->hb), same ? first : -EINVAL);
    CHECK_EQ(hbitmap_symmetric_difference_count(a->hb, b->hb),
             same ? first + second : -EINVAL);
}

/* Marks in `to` whatever the dirty groups of `from` touch. */
static void m_mark_all(struct model *to, const struct model *from)
{
    for (uint64_t group = 0; group < from->ngroups; group++) {
        if (from->dirty[group]) {
            uint64_t start = m_group_start(from, group);

            m_put(to, start, m_group_end(from, group) - start, 1);
        }
    }
}

static void op_merge(void)
{
    struct member *a = any(), *b = any(), *r = any();
    bool fits = a->m.size == b->m.size && a->m.size == r->m.size;

    trace("merge %c %c -> %c", a->name, b->name, r->name);
    CHECK_EQ(hbitmap_merge(a->hb, b->hb, r->hb), fits ? 0 : -EINVAL);
    if (fits) {
        struct model result;

        m_init(&result, r->m.size, r->m.granularity);
        m_mark_all(&result, &a->m);
        m_mark_all(&result, &b->m);
        m_free(&r->m);
        r->m = result;
    }
}

/* What is left of it may become the memory of the next. */
static void op_union(void)
{
    struct member *a = any(), *b = any();
    bool fits = a->m.size == b->m.size;
    struct member made = { .name = 'U', .hb = hbitmap_union(a->hb, b->hb) };

    trace("union %c %c", a->name, b->name);
    CHECK_EQ(made.hb != NULL, fits);
    if (!fits) {
        CHECK_EQ(errno, EINVAL);
        return;
    }
    m_init(&made.m, a->m.size, a->m.granularity);
    m_mark_all(&made.m, &a->m);
    m_mark_all(&made.m, &b->m);
    compare(&made);
    m_put(&made.m, 0, made.m.size, 1);
    CHECK_EQ(hbitmap_set(made.hb, 0, made.m.size), 0);
    compare(&made);
    member_close(&made);
}

static const char *const names[] = { "and", "andnot", "xor" };

static uint8_t m_operate(unsigned which, uint8_t a, uint8_t b)
{
    return which == 0 ? a && b : which == 1 ? a && !b : a != b;
}

/* The same three into new bitmaps. */
static void op_made(void)
{
    static HBitmap *(*const make[])(const HBitmap *, const HBitmap *) = {
        hbitmap_intersection, hbitmap_difference, hbitmap_symmetric_difference,
    };
    struct member *a = any(), *b = any();
    unsigned which = (unsigned)rng_below(&rng, 3);
    struct member made = { .name = 'M', .hb = make[which](a->hb, b->hb) };
    bool fits = same_shape(a, b);

    trace("new %s %c %c", names[which], a->name, b->name);
    CHECK_EQ(made.hb != NULL, fits);
    if (!fits) {
        CHECK_EQ(errno, EINVAL);
        return;
    }
    m_init(&made.m, a->m.size, a->m.granularity);
    for (uint64_t group = 0; group < made.m.ngroups; group++) {
        made.m.dirty[group] = m_operate(which, a->m.dirty[group], b->m.dirty[group]);
    }
    compare(&made);
    member_close(&made);
}

static void op_algebra(void)
{
    struct member *a = any(), *b = any(), *r = any();
    bool fits = same_shape(a, b) && same_shape(a, r);
    unsigned which = (unsigned)rng_below(&rng, 3);
    int err;

    trace("%s %c %c -> %c", names[which], a->name, b->name, r->name);
    err = which == 0 ? hbitmap_and(a->hb, b->hb, r->hb) :
          which == 1 ? hbitmap_andnot(a->hb, b->hb, r->hb) :
                       hbitmap_xor(a->hb, b->hb, r->hb);
    CHECK_EQ(err, fits ? 0 : -EINVAL);
    for (uint64_t group = 0; fits && group < r->m.ngroups; group++) {
        r->m.dirty[group] = m_operate(which, a->m.dirty[group], b->m.dirty[group]);
    }
}

static void op_drain(void)
{
    struct member *x = any(), *into = any();
    uint64_t start, count;
    unsigned may;
    bool fresh;
    int err;

    pick_whole_groups(&x->m, &start, &count);
    may = m_whole_groups(&x->m, start, count);
    if (x == into || !same_shape(x, into)) {
        /* Where the range is wrong too, either answer will do. */
        may = (may & MAY_ERANGE) | MAY_EINVAL;
    }
    trace("drain %" PRIu64 " %" PRIu64 " of %c -> %c", start, count, x->name,
          into->name);
    /* Only one that holds nothing yet may be called fresh. */
    fresh = x != into && hbitmap_empty(into->hb) && rng_one_in(&rng, 2);
    if (fresh) {
        trace("... which is fresh");
    }
    err = fresh ? hbitmap_drain_fresh(x->hb, start, count, into->hb)
                : hbitmap_drain(x->hb, start, count, into->hb);
    if (answered(err, may) && count) {
        for (uint64_t group = start >> x->m.granularity;
             group <= (start + count - 1) >> x->m.granularity; group++) {
            into->m.dirty[group] |= x->m.dirty[group];
            x->m.dirty[group] = 0;
        }
    }
}

/* Byte `i` of the chunk that starts at group `first`. */
static uint8_t m_byte(const struct model *m, uint64_t first, uint64_t i)
{
    uint8_t byte = 0;

    for (uint64_t bit = 0; bit < 8; bit++) {
        uint64_t group = first + i * 8 + bit;

        byte |= (uint8_t)(group < m->ngroups ? m->dirty[group] << bit : 0);
    }
    return byte;
}

static uint64_t m_chunk_bytes(const struct model *m, uint64_t start,
                              uint64_t count)
{
    uint64_t groups;

    if (m_chunk(m, start, count) != MAY_SUCCEED || count == 0) {
        return 0;
    }
    groups = ((start + count - 1) >> m->granularity) + 1 -
             (start >> m->granularity);
    return (groups + 63) / 64 * 8;
}

static void op_serialize(void)
{
    struct member *x = any();
    uint64_t start, count, nbytes;
    size_t off = (size_t)rng_below(&rng, 8);
    uint8_t *buf;

    CHECK_EQ(hbitmap_is_serializable(x->hb), x->m.granularity < 58);
    if (x->m.granularity < 58) {
        CHECK_EQ(hbitmap_serialization_align(x->hb),
                 UINT64_C(64) << x->m.granularity);
    }
    pick_chunk(&x->m, &start, &count);
    trace("%c: serialize %" PRIu64 " %" PRIu64, x->name, start, count);
    nbytes = m_chunk_bytes(&x->m, start, count);
    CHECK_EQ(hbitmap_serialization_size(x->hb, start, count), nbytes);
    buf = grab(off + nbytes);       /* misaligned, its red zone at the end */
    memset(buf, 0x5a, off + nbytes);
    if (answered(hbitmap_serialize_part(x->hb, buf + off, start, count),
                 m_chunk(&x->m, start, count))) {
        for (uint64_t i = 0; i < nbytes; i++) {
            CHECK_EQ(buf[off + i],
                     m_byte(&x->m, start >> x->m.granularity, i));
        }
    }
    for (size_t i = 0; i < off; i++) {
        CHECK_EQ(buf[i], 0x5a);
    }
    free(buf);
}

static void m_load(struct model *m, const uint8_t *buf, uint64_t start,
                   uint64_t nbytes)
{
    for (uint64_t i = 0; i < nbytes * 8; i++) {
        uint64_t group = (start >> m->granularity) + i;

        if (group < m->ngroups) {
            m->dirty[group] = buf[i / 8] >> (i % 8) & 1;
        }
    }
}

/* What the chunk at `start` becomes: some bytes, all zeroes or all ones. */
static void deserialize(struct member *x, uint64_t start, uint64_t count,
                        bool finish)
{
    uint64_t nbytes = m_chunk_bytes(&x->m, start, count);
    size_t off = (size_t)rng_below(&rng, 8);
    uint8_t *buf = grab(off + nbytes);
    unsigned kind = (unsigned)rng_below(&rng, 3);
    int err;

    for (uint64_t i = 0; i < nbytes; i += 8) {
        uint64_t word = kind == 1 ? 0 : kind == 2 ? UINT64_MAX : random_word();

        memcpy(buf + off + i, &word, 8);
    }
    trace("%c: deserialize_%s %" PRIu64 " %" PRIu64 "%s", x->name,
          kind == 1 ? "zeroes" : kind == 2 ? "ones" : "part", start, count,
          finish ? ", finish" : "");
    err = kind == 1 ? hbitmap_deserialize_zeroes(x->hb, start, count, finish) :
          kind == 2 ? hbitmap_deserialize_ones(x->hb, start, count, finish) :
                      hbitmap_deserialize_part(x->hb, buf + off, start, count,
                                               finish);
    if (answered(err, m_chunk(&x->m, start, count))) {
        m_load(&x->m, buf + off, start, nbytes);
    }
    free(buf);
}

static void op_deserialize(void)
{
    struct member *x = any();
    int chunks = 1 + (int)rng_below(&rng, 4);
    bool finish = rng_one_in(&rng, 2);

    for (int i = 0; i < chunks; i++) {
        uint64_t start, count;

        pick_chunk(&x->m, &start, &count);
        deserialize(x, start, count, finish && i + 1 == chunks &&
                                         m_chunk(&x->m, start, count) == MAY_SUCCEED);
    }
    hbitmap_deserialize_finish(x->hb);
}

/* A whole bitmap in aligned chunks of any size, read back by another. */
static void op_round_trip(void)
{
    struct member *from = any(), *to = any();
    uint64_t align, at = 0;

    if (from == to || !same_shape(from, to) || from->m.granularity >= 58) {
        return;
    }
    trace("round trip %c -> %c", from->name, to->name);
    align = hbitmap_serialization_align(from->hb);
    while (at < from->m.size) {
        uint64_t words = (from->m.size - at - 1) / align + 1;
        uint64_t count = (1 + rng_below(&rng, words)) * align, nbytes;
        size_t off = (size_t)rng_below(&rng, 8);
        uint8_t *buf;

        count = count > from->m.size - at ? from->m.size - at : count;
        nbytes = hbitmap_serialization_size(from->hb, at, count);
        buf = grab(off + nbytes);
        CHECK_EQ(hbitmap_serialize_part(from->hb, buf + off, at, count), 0);
        CHECK_EQ(hbitmap_deserialize_part(to->hb, buf + off, at, count, false), 0);
        free(buf);
        at += count;
    }
    hbitmap_deserialize_finish(to->hb);
    memcpy(to->m.dirty, from->m.dirty, from->m.ngroups);
    CHECK_EQ(hbitmap_equal(from->hb, to->hb), 1);
}

/* The most groups that the model is asked to hold. */
enum { MOST_GROUPS = (1 << 18) + 200 };

static uint64_t pick_size(const struct model *m)
{
    uint64_t most = MOST_GROUPS, size;

    if (most > (uint64_t)INT64_MAX >> m->granularity) {
        most = INT64_MAX;
    } else {
        most <<= m->granularity;
    }
    switch (rng_below(&rng, 6)) {
    case 0:
        size = family[0].m.size;        /* so that the family agrees again */
        break;
    case 1:
        size = family[MEMBERS - 1].m.size;
        break;
    case 2:
        size = pick_item(m);
        break;
    case 3:
        size = m->size + rng_below(&rng, UINT64_C(2) << m->granularity);
        break;
    case 4:
        size = m_rounded(m) + (rng_below(&rng, 130) << m->granularity);
        break;
    default:
        size = rng_below(&rng, 8) ? m->size / 2 + rng_below(&rng, m->size + 2) :
                                    rng_below(&rng, most);
        break;
    }
    return size < most ? size : most;
}

static void op_truncate(void)
{
    struct member *x = any();
    uint64_t size = pick_size(&x->m);
    bool refused = rng_one_in(&rng, 8), pinned = rng_one_in(&rng, 6);
    int err;

    if (refused) {
        size = (uint64_t)INT64_MAX + 1 + rng_below(&rng, 3);
        if (x->m.granularity < 21 && rng_one_in(&rng, 2)) {
            size = (UINT64_C(1) << (HBITMAP_LOG_MAX_SIZE + x->m.granularity)) + 1;
        }
    }
    trace("%c: truncate %" PRIu64 "%s", x->name, size, pinned ? ", pinned" : "");
    if (pinned) {
        hbitmap_pin(x->hb);
        if (rng_one_in(&rng, 2)) {
            hbitmap_pin(x->hb);
            hbitmap_unpin(x->hb);
        }
    }
    err = hbitmap_truncate(x->hb, size);
    if (pinned || x->memory) {
        CHECK(err == -EBUSY || (refused && err == -EINVAL) ||
              (err == 0 && size == x->m.size), "returned %d", err);
    } else {
        CHECK_EQ(err, refused ? -EINVAL : 0);
    }
    if (pinned) {
        hbitmap_unpin(x->hb);
    }
    if (err == 0) {
        m_truncate(&x->m, size);
    }
}

static const struct {
    const char *name;
    void (*run)(void);
    unsigned weight;
} operations[] = {
    { "set", op_set, 20 },
    { "set_many", op_set_many, 4 },
    { "set_items", op_set_items, 3 },
    { "merge_bits", op_merge_bits, 5 },
    { "reset", op_reset, 14 },
    { "flip", op_flip, 5 },
    { "reset_all", op_reset_all, 1 },
    { "take", op_take, 4 },
    { "get", op_get, 3 },
    { "count_range", op_count_range, 3 },
    { "order", op_order, 3 },
    { "prev", op_prev, 5 },
    { "copy_areas", op_copy_areas, 2 },
    { "iter", op_iter, 5 },
    { "iter_fill", op_iter_fill, 3 },
    { "next", op_next, 5 },
    { "next_dirty_area", op_next_dirty_area, 4 },
    { "status", op_status, 4 },
    { "areas", op_areas, 4 },
    { "compare", op_compare, 3 },
    { "compare_counts", op_compare_counts, 3 },
    { "merge", op_merge, 5 },
    { "union", op_union, 3 },
    { "algebra", op_algebra, 8 },
    { "made", op_made, 4 },
    { "drain", op_drain, 8 },
    { "serialize", op_serialize, 4 },
    { "deserialize", op_deserialize, 4 },
    { "round_trip", op_round_trip, 2 },
    { "truncate", op_truncate, 4 },
};

enum { OPERATIONS = sizeof(operations) / sizeof(operations[0]) };

static unsigned long times[OPERATIONS];

static void random_sequence(uint64_t groups, int granularity, int steps)
{
    uint64_t most = ((uint64_t)INT64_MAX >> granularity) +
                    (granularity ? 1 : 0), size;
    int other = granularity + (int)rng_below(&rng, 12) - 4;
    unsigned weights = 0;

    /* The last group is whole or cut. */
    groups = groups < most ? groups : most;
    size = groups << granularity;
    if (groups && rng_one_in(&rng, 2)) {
        size -= rng_below(&rng, UINT64_C(1) << granularity);
    }
    size = size < INT64_MAX ? size : INT64_MAX;
    other = other < 0 ? 0 : other > 63 ? 63 : other;
    while (groups_of(size, other) > MOST_GROUPS) {
        other++;
    }
    trace_clear();
    trace("A, B, D: size %" PRIu64 ", granularity %d; C: granularity %d", size,
          granularity, other);
    member_open(&family[0], 'A', size, granularity, false);
    member_open(&family[1], 'B', size, granularity, false);
    member_open(&family[2], 'C', size, other, rng_one_in(&rng, 4));
    member_open(&family[3], 'D', size, granularity, rng_one_in(&rng, 2));
    for (int i = 0; i < MEMBERS; i++) {
        compare(&family[i]);
    }
    for (int i = 0; i < OPERATIONS; i++) {
        weights += operations[i].weight;
    }
    for (int step = 0; step < steps; step++) {
        uint64_t at = rng_below(&rng, weights);
        int which = 0;

        while (at >= operations[which].weight) {
            at -= operations[which++].weight;
        }
        operations[which].run();
        times[which]++;
        for (int i = 0; i < MEMBERS; i++) {
            compare(&family[i]);
        }
    }
    for (int i = 0; i < MEMBERS; i++) {
        member_close(&family[i]);
    }
}

static void test_random(unsigned long rounds)
{
    static const uint64_t sizes[] = {
        0, 1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097,
        (1 << 18) - 1, 1 << 18, (1 << 18) + 1,
    };

    for (unsigned long round = 0; round < rounds; round++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            int granularity = rng_one_in(&rng, 2) ? 0 : (int)rng_below(&rng, 64);

            random_sequence(sizes[i], granularity, sizes[i] > 10000 ? 60 : 250);
        }
        for (int granularity = 0; granularity < 64; granularity++) {
            random_sequence(rng_below(&rng, 300), granularity, 60);
        }
        for (int i = 0; i < 10; i++) {
            uint64_t groups = rng_below(&rng, UINT64_C(1) << rng_below(&rng, 19));

            random_sequence(groups, (int)rng_below(&rng, 30),
                            groups > 10000 ? 60 : 250);
        }
    }
    trace_clear();
    for (int i = 0; i < OPERATIONS; i++) {
        CHECK(rounds == 0 || times[i] > 0, "%s never ran", operations[i].name);
    }
    ok("random operations");
}

/* ---- limits ------------------------------------------------------------- */

static void check_refused(uint64_t size, int granularity)
{
    HBitmap *hb;

    trace("alloc %" PRIu64 ", granularity %d", size, granularity);
    errno = 0;
    hb = hbitmap_alloc(size, granularity);
    CHECK(hb == NULL, "accepted");
    CHECK_EQ(errno, EINVAL);
}

static void test_alloc_refuses(void)
{
    const uint64_t most = UINT64_C(1) << HBITMAP_LOG_MAX_SIZE;

    check_refused(most + 1, 0);
    check_refused((most << 1) + 1, 1);
    check_refused((most << 21) + 1, 21);
    check_refused(INT64_MAX, 21);
    check_refused((uint64_t)INT64_MAX + 1, 63);
    check_refused(UINT64_MAX, 63);
    check_refused(UINT64_MAX, 0);
    check_refused(1, -1);
    check_refused(1, 64);
    check_refused(0, -1);
    check_refused(0, 64);
    check_refused(1, INT32_MIN);
    check_refused(1, INT32_MAX);
    hbitmap_free(NULL);
    ok("alloc refuses what it should");
}

/* Huge bitmaps are only mapped; there is no point in asking malloc. */
#if defined(HB_MAP_MIN)
#define HUGE_BITMAPS (HB_MAP_MIN <= (1 << 20))
#else
#define HUGE_BITMAPS 1
#endif

static void test_most_groups(uint64_t size, int granularity)
{
    const uint64_t group = UINT64_C(1) << granularity;
    uint64_t last = (size - 1) & ~(group - 1), next = 0, area[4];
    HBitmap *hb, *into;
    HBitmapIter hbi;
    int64_t start, count;

    trace("2^41 groups, granularity %d", granularity);
    hb = hbitmap_alloc(size, granularity);
    if (!hb) {
        CHECK_EQ(errno, ENOMEM);
        printf("# no address space for 2^41 groups\n");
        return;
    }
    CHECK_EQ(hbitmap_empty(hb), true);
    CHECK_EQ(hbitmap_next_dirty(hb, 0, INT64_MAX), -1);
    CHECK_EQ(hbitmap_set(hb, size, 1), -ERANGE);
    CHECK_EQ(hbitmap_set(hb, size - 1, 2), -ERANGE);
    CHECK_EQ(hbitmap_set(hb, size - 1, UINT64_MAX), -ERANGE);
    CHECK_EQ(hbitmap_set(hb, 1, UINT64_MAX), -ERANGE);
    CHECK_EQ(hbitmap_empty(hb), true);
    CHECK_EQ(hbitmap_set(hb, size - 1, 1), 0);
    CHECK_EQ(hbitmap_next_dirty(hb, 0, INT64_MAX), last);
    CHECK_EQ(hbitmap_next_zero(hb, (int64_t)last, INT64_MAX), -1);
    CHECK_EQ(hbitmap_get(hb, size - 1), true);
    CHECK_EQ(hbitmap_get(hb, size), false);
    CHECK_EQ(hbitmap_count(hb), group);
    CHECK_EQ(hbitmap_count_range(hb, 0, UINT64_MAX), size - last);
    hbitmap_iter_init(&hbi, hb, 0);
    CHECK_EQ(hbitmap_iter_next(&hbi), last);
    CHECK_EQ(hbitmap_iter_next(&hbi), -1);
    CHECK_EQ(hbitmap_set(hb, 0, 1), 0);
    CHECK_EQ(hbitmap_areas(hb, 0, UINT64_MAX, area, 2, &next), 2);
    CHECK_EQ(area[0], 0);
    CHECK_EQ(area[1], group);
    CHECK_EQ(area[2], last);
    CHECK_EQ(area[3], size - last);
    CHECK_EQ(next, size);
    CHECK_EQ(hbitmap_next_dirty_area(hb, (int64_t)group, INT64_MAX, INT64_MAX,
                                     &start, &count), true);
    CHECK_EQ(start, last);
    CHECK_EQ(count, size - last);
    CHECK_EQ(hbitmap_status(hb, (int64_t)group, INT64_MAX, &count), false);
    CHECK_EQ(count, last - group);
    CHECK_EQ(hbitmap_nonzero_words(hb), 2);

    into = hbitmap_alloc(size, granularity);
    if (into) {
        CHECK_EQ(hbitmap_drain(hb, 0, size, into), 0);
        CHECK_EQ(hbitmap_empty(hb), true);
        CHECK_EQ(hbitmap_count(into), 2 * group);
        CHECK_EQ(hbitmap_merge(hb, into, hb), 0);
        CHECK_EQ(hbitmap_equal(hb, into), 1);
        CHECK_EQ(hbitmap_is_subset(hb, into), 1);
        CHECK_EQ(hbitmap_xor(hb, into, into), 0);
        CHECK_EQ(hbitmap_empty(into), true);
        hbitmap_free(into);
    }
    CHECK_EQ(hbitmap_truncate(hb, last), 0);
    CHECK_EQ(hbitmap_count(hb), group);
    CHECK_EQ(hbitmap_truncate(hb, size), 0);
    CHECK_EQ(hbitmap_get(hb, size - 1), false);
    CHECK_EQ(hbitmap_truncate(hb, (uint64_t)INT64_MAX + 1), -EINVAL);
    hbitmap_reset_all(hb);
    CHECK_EQ(hbitmap_empty(hb), true);
    hbitmap_free(hb);
}

/* Between what the model can hold and the most: marks kept in an array. */
static void test_sparse(uint64_t groups, int granularity)
{
    enum { MARKS = 200 };
    uint64_t size = groups << granularity, marks[MARKS], at = 0;
    HBitmap *hb = hbitmap_alloc(size, granularity);
    HBitmapIter hbi;

    trace("sparse: %" PRIu64 " groups, granularity %d", groups, granularity);
    if (!hb) {
        CHECK_EQ(errno, ENOMEM);
        return;
    }
    /* In order, some next to each other, some far apart, all of them clean
     * of each other's groups. */
    for (int i = 0; i < MARKS; i++) {
        uint64_t left = groups - at - (uint64_t)(MARKS - i);

        at += rng_one_in(&rng, 3) ? 0 : rng_below(&rng, left / 8 + 1);
        marks[i] = at++;
    }
    marks[MARKS - 1] = groups - 1;
    for (int i = MARKS; i-- > 0;) {
        CHECK_EQ(hbitmap_set(hb, marks[i] << granularity, 1), 0);
    }
    CHECK_EQ(hbitmap_count(hb), (uint64_t)MARKS << granularity);
    hbitmap_iter_init(&hbi, hb, 0);
    for (int i = 0; i < MARKS; i++) {
        uint64_t start = marks[i] << granularity;
        uint64_t after = i ? marks[i - 1] + 1 : 0;

        CHECK_EQ(hbitmap_iter_next(&hbi), start);
        CHECK_EQ(hbitmap_next_dirty(hb, (int64_t)(after << granularity),
                                    INT64_MAX), start);
    }
    CHECK_EQ(hbitmap_iter_next(&hbi), -1);
    for (int i = 0; i < MARKS; i++) {
        CHECK_EQ(hbitmap_take(hb, marks[i] << granularity), 1);
        CHECK_EQ(hbitmap_next_dirty(hb, 0, INT64_MAX),
                 i + 1 < MARKS ? (int64_t)(marks[i + 1] << granularity) : -1);
    }
    CHECK_EQ(hbitmap_empty(hb), true);
    /* A range over every level's boundary, and one group cut out of it. */
    at = groups / 2 << granularity;
    CHECK_EQ(hbitmap_set(hb, at - 70000, 140000), 0);
    CHECK_EQ(hbitmap_reset(hb, at, UINT64_C(1) << granularity), 0);
    CHECK_EQ(hbitmap_next_zero(hb, (int64_t)at - 70000, INT64_MAX), at);
    if (groups <= (UINT64_C(1) << 24) + 1) {
        CHECK_VALID(hb);
    }
    hbitmap_free(hb);
}

static void test_huge(void)
{
    if (HUGE_BITMAPS) {
        const uint64_t most = UINT64_C(1) << HBITMAP_LOG_MAX_SIZE;

        test_sparse((UINT64_C(1) << 24) - 1, 0);
        test_sparse(UINT64_C(1) << 24, 3);
        test_sparse((UINT64_C(1) << 24) + 1, 0);
        test_sparse((UINT64_C(1) << 30) - 1, 1);
        test_sparse((UINT64_C(1) << 30) + 1, 0);
        test_sparse((UINT64_C(1) << 36) + 1, 0);
        if (EMULATION) {
            printf("# emulated: no 2^41 groups\n");
        } else {
            test_most_groups(most, 0);
            test_most_groups(most - 1, 0);
            test_most_groups((most << 7) - 5, 7);
            test_most_groups(INT64_MAX, 22);
        }
    } else {
        printf("# everything comes from malloc: no huge bitmaps\n");
    }
    ok("2^24 to 2^41 groups");
}

/*
 * Memory that somebody has locked cannot be given back.  reset_all empties it
 * all the same, and does not touch what was never marked: a page at a time is
 * locked here, with mlockall it is all of them.
 */
static void test_locked(void)
{
#if defined(__linux__) && !defined(HB_TSAN)
    const uint64_t groups = UINT64_C(1) << 31, marks[] = { 5, groups / 2, groups - 1 };
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t nwords, resident = 0, npages;
    const uint64_t *words;
    unsigned char *pages;
    HBitmap *hb = HUGE_BITMAPS ? hbitmap_alloc(groups, 0) : NULL;

    if (!hb) {
        printf("# no locked memory\n");
        return;
    }
    words = hbitmap_words(hb, &nwords);
    npages = nwords * sizeof(*words) / page;
    pages = grab(npages);
    for (int i = 0; i < 3; i++) {
        size_t word = (size_t)marks[i] / 64;

        for (int k = 0; k < 3; k++) {
            CHECK_EQ(hbitmap_set(hb, marks[k], 1), 0);
        }
        CHECK_EQ(hbitmap_count(hb), 3);
        if (mlock(&words[word], sizeof(*words)) != 0) {
            printf("# may not lock memory\n");
            break;
        }
        hbitmap_reset_all(hb);
        CHECK_EQ(hbitmap_empty(hb), true);
        CHECK_EQ(hbitmap_count(hb), 0);
        for (int k = 0; k < 3; k++) {
            CHECK_EQ(words[marks[k] / 64], 0);
        }
        CHECK_EQ(munlock(&words[word], sizeof(*words)), 0);
    }
    CHECK_EQ(mincore((void *)(uintptr_t)words, npages * page, pages), 0);
    for (size_t i = 0; i < npages; i++) {
        resident += pages[i] & 1;
    }
    CHECK(resident < npages / 8, "%zu of %zu pages are in memory", resident, npages);
    free(pages);
    hbitmap_free(hb);
    ok("locked memory is emptied");
#endif
}

static void test_alloc_on_refuses(void)
{
    uint64_t words[8];
    HBitmap *hb;

    memset(words, 0xa5, sizeof(words));
#define REFUSED(...) \
    do { \
        errno = 0; \
        hb = hbitmap_alloc_on(__VA_ARGS__); \
        CHECK(hb == NULL, "accepted"); \
        CHECK_EQ(errno, EINVAL); \
    } while (0)
    REFUSED(64, 0, NULL, 1);
    REFUSED(64, 0, words, 0);
    REFUSED(0, 0, words, 0);
    REFUSED(65, 0, words, 1);
    REFUSED(129, 0, words, 2);
    REFUSED(64, -1, words, 8);
    REFUSED(64, 64, words, 8);
    REFUSED((uint64_t)INT64_MAX + 1, 63, words, 8);
    REFUSED((UINT64_C(1) << HBITMAP_LOG_MAX_SIZE) + 1, 0, words, SIZE_MAX);
    for (uintptr_t off = 1; off < 8; off++) {
        REFUSED(64, 0, (uint64_t *)(void *)((char *)words + off), 2);
    }
#undef REFUSED
    for (int i = 0; i < 8; i++) {
        CHECK_EQ(words[i], UINT64_C(0xa5a5a5a5a5a5a5a5));
    }
    hb = hbitmap_alloc_on(65, 0, words + 1, 7);
    CHECK(hb != NULL, "errno %d", errno);
    CHECK_EQ(words[2], 1);
    CHECK_EQ(words[0], words[3]);
    CHECK_EQ(hbitmap_truncate(hb, 66), -EBUSY);
    CHECK_EQ(hbitmap_truncate(hb, 1), -EBUSY);
    hbitmap_reset_all(hb);
    hbitmap_free(hb);
    CHECK_EQ(words[1], 0);
    CHECK_EQ(words[2], 0);
    CHECK_EQ(words[3], UINT64_C(0xa5a5a5a5a5a5a5a5));
    ok("alloc_on refuses memory that does not fit");
}

/* The picture in the header. */
static void test_header_examples(void)
{
    HBitmap *hb = hbitmap_alloc(8, 1);
    int64_t start, count;
    size_t nwords;

    CHECK_EQ(hbitmap_set(hb, 3, 2), 0);
    CHECK_EQ(hbitmap_words(hb, &nwords)[0], 0x6);
    CHECK_EQ(hbitmap_count(hb), 4);
    hbitmap_free(hb);
    hb = hbitmap_alloc(10, 2);
    CHECK_EQ(hbitmap_set(hb, 0, 8), 0);
    CHECK_EQ(hbitmap_next_dirty_area(hb, 1, 10, INT64_MAX, &start, &count), 1);
    CHECK_EQ(start, 1);
    CHECK_EQ(count, 7);
    /* A group that the end cuts counts whole, but is clipped in a range. */
    CHECK_EQ(hbitmap_set(hb, 9, 1), 0);
    CHECK_EQ(hbitmap_count(hb), 12);
    CHECK_EQ(hbitmap_count_range(hb, 0, UINT64_MAX), 10);
    hbitmap_free(hb);
    hb = hbitmap_alloc(8, 1);
    CHECK_EQ(hbitmap_merge_bits(hb, (const uint8_t[]){ 0xa }, 4, 2, 0, false), 0);
    CHECK_EQ(hbitmap_words(hb, &nwords)[0], 0x6);
    for (uint64_t item = 1; item <= 4; item++) {
        CHECK_EQ(hbitmap_rank(hb, item), item / 2);
    }
    CHECK_EQ(hbitmap_select(hb, 0), 2);
    CHECK_EQ(hbitmap_select(hb, 1), 4);
    CHECK_EQ(hbitmap_select(hb, 2), -1);
    CHECK_EQ(hbitmap_prev_dirty(hb, 7, INT64_MAX), 5);
    CHECK_EQ(hbitmap_prev_dirty(hb, 4, 1), 4);
    CHECK_EQ(hbitmap_prev_dirty(hb, 7, 2), -1);
    CHECK_EQ(hbitmap_flip(hb, 0, 8), 0);
    CHECK_EQ(hbitmap_words(hb, &nwords)[0], 0x9);
    hbitmap_free(hb);
    ok("the header's examples");
}

/* ---- searches through buffers of every size ----------------------------- */

/* A buffer of n words with canaries behind it. */
static uint64_t *guarded(size_t n)
{
    uint64_t *words = grab((n + CANARY_WORDS) * sizeof(*words));

    for (size_t i = 0; i < CANARY_WORDS; i++) {
        words[n + i] = canary;
    }
    return words;
}

static void check_guard(const uint64_t *words, size_t n)
{
    for (size_t i = 0; i < CANARY_WORDS; i++) {
        CHECK_EQ(words[n + i], canary);
    }
}

/* iter_fill from `first` on, n at a time, gives what the model has. */
static void check_fill(const struct member *x, uint64_t first, size_t n)
{
    uint64_t *items = guarded(n), group = first_group(&x->m, first);
    HBitmapIter hbi;
    size_t filled;

    trace("iter_fill from %" PRIu64 ", %zu at a time", first, n);
    hbitmap_iter_init(&hbi, x->hb, first);
    do {
        filled = hbitmap_iter_fill(&hbi, items, n);
        CHECK(filled <= n, "%zu of %zu", filled, n);
        check_guard(items, n);
        for (size_t i = 0; i < filled; i++) {
            CHECK_EQ(items[i], m_iter(&x->m, &group));
        }
    } while (filled == n);
    CHECK_EQ(m_iter(&x->m, &group), -1);
    free(items);
}

/* areas of [start, end), `most` at a time, and next_dirty_area one by one. */
static void check_areas(const struct member *x, uint64_t start, uint64_t end,
                        size_t most)
{
    uint64_t *areas = guarded(2 * most), stop = m_clamp(&x->m, 0, end);
    uint64_t at = start, next = start;
    int64_t one = (int64_t)start, length = 0;
    size_t n;

    trace("areas of %" PRIu64 " to %" PRIu64 ", %zu at a time", start, end, most);
    do {
        n = hbitmap_areas(x->hb, next, end, areas, most, &next);
        CHECK(n <= most, "%zu of %zu", n, most);
        check_guard(areas, 2 * most);
        for (size_t i = 0; i < n; i++) {
            CHECK_EQ(areas[2 * i], m_next(&x->m, (int64_t)at, (int64_t)(stop - at), 1));
            at = m_run_end(&x->m, areas[2 * i], stop);
            CHECK_EQ(areas[2 * i] + areas[2 * i + 1], at);
            CHECK_EQ(hbitmap_next_dirty_area(x->hb, one + length, (int64_t)end,
                                             INT64_MAX, &one, &length), 1);
            CHECK_EQ(one, areas[2 * i]);
            CHECK_EQ(length, areas[2 * i + 1]);
        }
        if (n == most) {
            CHECK_EQ(next, at);
        }
    } while (n == most);
    CHECK_EQ(next, stop);
    CHECK_EQ(m_next(&x->m, (int64_t)at, stop > at ? (int64_t)(stop - at) : 0, 1), -1);
    CHECK_EQ(hbitmap_next_dirty_area(x->hb, one + length, (int64_t)end, INT64_MAX,
                                     &one, &length), 0);
    free(areas);
}

static void mark(struct member *x, uint64_t group, uint64_t ngroups)
{
    uint64_t start = group << x->m.granularity;
    uint64_t count = m_clamp(&x->m, start, ngroups << x->m.granularity) - start;

    CHECK_EQ(hbitmap_set(x->hb, start, count), 0);
    m_put(&x->m, start, count, 1);
}

/* The borders of words, of summary words, of the bitmap. */
static uint64_t near_border(const struct model *m)
{
    static const uint64_t borders[] = { 0, 64, 128, 4096, 4160, 8192, UINT64_MAX };
    uint64_t border = borders[rng_below(&rng, 7)];

    border = (border < m->ngroups ? border : m->ngroups) + rng_below(&rng, 5);
    border = border < 2 ? 0 : border - 2;
    return border < m->ngroups ? border : m->ngroups - 1;
}

enum pattern {
    NOTHING, EVERYTHING, LAST_GROUP, LAST_WORD, WORDS, SUMMARY_WORD, EVERY_OTHER,
    NEAR_BORDERS, FEW, SOME_IN_A_WORD, SPARSER, SPARSE, DENSE, PATTERNS,
};

static void mark_pattern(struct member *x, enum pattern pattern)
{
    uint64_t n = x->m.ngroups, at = 0;

    switch (pattern) {
    case EVERYTHING:
        mark(x, 0, n);
        break;
    case LAST_GROUP:
        mark(x, n - 1, 1);
        break;
    case LAST_WORD:
        mark(x, (n - 1) / 64 * 64, 64);
        break;
    case WORDS:             /* full ones, some of them side by side */
        for (at = 0; at < n; at += 64 * (1 + rng_below(&rng, 3))) {
            mark(x, at, 64);
        }
        break;
    case SUMMARY_WORD:      /* a full one, and somewhat more or less */
        mark(x, rng_below(&rng, 3), 4096 + rng_below(&rng, 5) - 2);
        break;
    case EVERY_OTHER:
        for (at = rng_below(&rng, 2); at < n; at += 2) {
            mark(x, at, 1);
        }
        break;
    case NEAR_BORDERS:
        for (int i = 0; i < 6; i++) {
            mark(x, near_border(&x->m), 1 + rng_below(&rng, 4));
        }
        break;
    case FEW:
        for (int i = 0; i < 6; i++) {
            mark(x, rng_below(&rng, n), 1 + rng_below(&rng, 200));
        }
        break;
    case SOME_IN_A_WORD:    /* 0, 1, 2, .. runs in a word, in 3, 12, .. words in a row */
        for (at = 0; at < n; at += 64) {
            for (uint64_t i = 0; at % 4096 / 64 < at / 4096 * 9 + 3 && i < at / 64 % 9; i++) {
                mark(x, at + 7 * i, at + 7 * i < n ? 1 + rng_below(&rng, 7) % 6 : 0);
            }
        }
        break;
    case SPARSER:
    case SPARSE:
    case DENSE:
        for (at = 0; at < n;) {
            mark(x, at, 1 + rng_below(&rng, pattern == DENSE ? 3 : 2));
            at += 1 + rng_below(&rng, pattern == DENSE ? 4 : pattern == SPARSE ? 500 : 2000);
        }
        break;
    case NOTHING:
    case PATTERNS:
        break;
    }
}

/* Empties some words behind the bitmap's back: the bits above them are stale. */
static void make_stale(struct member *x)
{
    for (size_t word = 0; x->memory && word < x->nwords; word++) {
        if (rng_one_in(&rng, 5)) {
            x->memory[CANARY_WORDS + word] = 0;
            for (uint64_t i = 0; i < 64 && word * 64 + i < x->m.ngroups; i++) {
                x->m.dirty[word * 64 + i] = 0;
            }
        }
    }
}

static void test_buffers(void)
{
    static const uint64_t groups[] = { 1, 63, 64, 65, 128, 4095, 4096, 4097, 8192, 40000 };
    enum { SIZES = sizeof(groups) / sizeof(groups[0]) };

    for (unsigned k = 0; k < SIZES * PATTERNS; k++) {
        int granularity = rng_one_in(&rng, 2) ? 0 : 1 + (int)rng_below(&rng, 20);
        uint64_t cut = rng_below(&rng, UINT64_C(1) << granularity);
        uint64_t size = (groups[k / PATTERNS] << granularity) - cut;
        struct member x;

        member_open(&x, 'b', size, granularity, rng_one_in(&rng, 2));
        mark_pattern(&x, (enum pattern)(k % PATTERNS));
        if (rng_one_in(&rng, 3)) {
            make_stale(&x);
        }
        trace("%" PRIu64 " groups, granularity %d, %" PRIu64 " items cut, pattern %u",
              groups[k / PATTERNS], granularity, cut, k % PATTERNS);
        for (size_t n = 1; n <= 70; n++) {
            check_fill(&x, n % 2 ? 0 : near_border(&x.m) << granularity, n);
        }
        check_fill(&x, 0, 5000);
        for (size_t most = 1; most <= 5; most++) {
            check_areas(&x, 0, INT64_MAX, most);
        }
        for (int i = 0; i < 20; i++) {
            uint64_t start = near_border(&x.m) << granularity;
            uint64_t end = near_border(&x.m) << granularity;

            start += rng_below(&rng, UINT64_C(1) << granularity);
            end += rng_below(&rng, UINT64_C(1) << granularity);
            check_areas(&x, start, end, 1 + rng_below(&rng, 70));
        }
        check_areas(&x, 0, size, 3000);
        trace_clear();
        member_close(&x);
    }
    ok("searches through buffers of every size");
}

/* Marks what the model has. */
static void mark_all(HBitmap *hb, const struct model *m)
{
    for (uint64_t group = 0; group < m->ngroups; group++) {
        if (m->dirty[group]) {
            CHECK_EQ(hbitmap_set(hb, m_group_start(m, group), 1), 0);
        }
    }
}

/* Something in word `word`, where an iterator stands, becomes different; or does for
 * a while. */
static void change_word(HBitmap *hb, struct model *m, uint64_t word)
{
    uint64_t first = word * 64, end = first + 64 < m->ngroups ? first + 64 : m->ngroups;
    uint64_t group = first + rng_below(&rng, end - first);
    HBitmap *fresh;

    switch (rng_below(&rng, 6)) {
    case 0:
        trace("take group %" PRIu64, group);
        (void)hbitmap_take(hb, m_group_start(m, group));
        m->dirty[group] = 0;
        break;
    case 1:
        trace("set group %" PRIu64, group);
        CHECK_EQ(hbitmap_set(hb, m_group_start(m, group), 1), 0);
        m->dirty[group] = 1;
        break;
    case 2:
        trace("reset word %" PRIu64 " and mark it again but for %" PRIu64, word, group);
        CHECK_EQ(hbitmap_reset(hb, m_group_start(m, first),
                               m_group_end(m, end - 1) - m_group_start(m, first)), 0);
        m->dirty[group] = 0;
        mark_all(hb, m);
        break;
    case 3:
        trace("reset word %" PRIu64 " for good", word);
        CHECK_EQ(hbitmap_reset(hb, m_group_start(m, first),
                               m_group_end(m, end - 1) - m_group_start(m, first)), 0);
        memset(m->dirty + first, 0, end - first);
        break;
    case 4:
        /* Where this is the only thread, the block goes to the other one, and away. */
        trace("drain all, mark it again");
        fresh = hbitmap_alloc(m->size, m->granularity);
        CHECK_EQ(hbitmap_drain_fresh(hb, 0, m->size, fresh), 0);
        hbitmap_free(fresh);
        mark_all(hb, m);
        break;
    default:
        trace("truncate to %" PRIu64 " groups and back", group + 1);
        CHECK_EQ(hbitmap_truncate(hb, m_group_start(m, group + 1)), 0);
        CHECK_EQ(hbitmap_truncate(hb, m->size), 0);
        memset(m->dirty + group + 1, 0, m->ngroups - group - 1);
        break;
    }
}

/* What an iterator has seen of its word is not what it gives: the word is. */
static void test_changes_where_an_iterator_is(void)
{
    for (int round = 0; round < 1500; round++) {
        int granularity = rng_one_in(&rng, 2) ? 0 : 3;
        struct model m;
        uint64_t group = 0;
        int64_t want;
        HBitmapIter hbi;
        HBitmap *hb;

        m_init(&m, UINT64_C(150) << granularity, granularity);
        for (uint64_t i = 0; i < m.ngroups; i++) {
            m.dirty[i] = rng_one_in(&rng, 3);
        }
        hb = hbitmap_alloc(m.size, granularity);
        mark_all(hb, &m);
        trace_clear();
        hbitmap_iter_init(&hbi, hb, 0);
        do {
            if (rng_one_in(&rng, 3)) {
                change_word(hb, &m, group < m.ngroups ? group / 64 : 0);
            }
            if (rng_one_in(&rng, 6)) {
                uint64_t items[3];
                size_t filled = hbitmap_iter_fill(&hbi, items, 3);

                trace("fill");
                for (size_t i = 0; i < filled; i++) {
                    CHECK_EQ(items[i], m_iter(&m, &group));
                }
            }
            want = m_iter(&m, &group);
            trace("next: %" PRId64, want);
            CHECK_EQ(hbitmap_iter_next(&hbi), want);
        } while (want >= 0);
        hbitmap_free(hb);
        m_free(&m);
    }
    ok("changes where an iterator is");
}

/* A partly covered group never becomes clean. */
static void test_reset_ends(void)
{
    static const struct {
        uint64_t start, count;
        int err;
        uint64_t left;
    } cases[] = {
        /* size 10, granularity 2: groups [0,4) [4,8) [8,10) */
        { 0, 10, 0, 0x0 }, { 0, 12, 0, 0x0 }, { 8, 2, 0, 0x3 },
        { 8, 4, 0, 0x3 }, { 4, 4, 0, 0x5 }, { 0, 0, 0, 0x7 },
        { 0, 11, -ERANGE, 0x7 }, { 0, 13, -ERANGE, 0x7 }, { 8, 3, -ERANGE, 0x7 },
        { 12, 4, -ERANGE, 0x7 }, { 0, 9, -EINVAL, 0x7 }, { 1, 3, -EINVAL, 0x7 },
        { 2, 8, -EINVAL, 0x7 }, { 9, 1, -EINVAL, 0x7 }, { 0, 1, -EINVAL, 0x7 },
        { 4, UINT64_MAX, -ERANGE, 0x7 }, { 8, UINT64_MAX - 7, -ERANGE, 0x7 },
        { UINT64_MAX - 3, 4, -ERANGE, 0x7 }, { UINT64_MAX - 3, 8, -ERANGE, 0x7 },
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        HBitmap *hb = hbitmap_alloc(10, 2), *into = hbitmap_alloc(10, 2);
        size_t nwords;

        trace("reset %" PRIu64 " %" PRIu64, cases[i].start, cases[i].count);
        CHECK_EQ(hbitmap_set(hb, 0, 10), 0);
        CHECK_EQ(hbitmap_drain(hb, cases[i].start, cases[i].count, into),
                 cases[i].err);
        CHECK_EQ(hbitmap_words(hb, &nwords)[0], cases[i].left);
        CHECK_EQ(hbitmap_words(into, &nwords)[0], 0x7 & ~cases[i].left);
        CHECK_EQ(hbitmap_set(hb, 0, 10), 0);
        CHECK_EQ(hbitmap_reset(hb, cases[i].start, cases[i].count), cases[i].err);
        CHECK_EQ(hbitmap_words(hb, &nwords)[0], cases[i].left);
        hbitmap_free(hb);
        hbitmap_free(into);
    }
    ok("reset and drain take whole groups only");
}

static void test_two_groups_of_2_to_62(void)
{
    HBitmap *hb = hbitmap_alloc(INT64_MAX, 62);
    int64_t pnum;

    CHECK_EQ(hbitmap_set(hb, INT64_MAX - 1, 1), 0);
    CHECK_EQ(hbitmap_next_dirty(hb, 0, INT64_MAX), INT64_C(1) << 62);
    CHECK_EQ(hbitmap_status(hb, 1, INT64_MAX, &pnum), false);
    CHECK_EQ(pnum, (INT64_C(1) << 62) - 1);
    CHECK_EQ(hbitmap_set(hb, 0, INT64_MAX), 0);
    CHECK_EQ(hbitmap_count(hb), INT64_MIN);     /* 2^63, as unsigned */
    CHECK_EQ(hbitmap_count_range(hb, 0, UINT64_MAX), INT64_MAX);
    CHECK_EQ(hbitmap_reset(hb, 0, UINT64_C(1) << 63), 0);
    CHECK_EQ(hbitmap_empty(hb), true);
    CHECK_EQ(hbitmap_is_serializable(hb), false);
    CHECK_EQ(hbitmap_serialization_size(hb, 0, INT64_MAX), 0);
    CHECK_VALID(hb);
    hbitmap_free(hb);
    ok("two groups of 2^62 items");
}

/* What has been truncated stays readable until the bitmap is freed. */
static void test_old_words_stay(void)
{
    HBitmap *hb = hbitmap_alloc(200, 0);
    size_t nwords;
    const uint64_t *words;

    CHECK_EQ(hbitmap_set(hb, 0, 200), 0);
    words = hbitmap_words(hb, &nwords);
    for (uint64_t size = 0; size < 3000; size += 63) {
        CHECK_EQ(hbitmap_truncate(hb, size), 0);
    }
    CHECK_EQ(words[nwords - 1], 0xff);
    CHECK_EQ(hbitmap_empty(hb), true);
    hbitmap_free(hb);
    ok("old words stay until the bitmap is freed");
}

/* ---- hbitmap_check notices ---------------------------------------------- */

static void check_says(HBitmap *hb, const char *word)
{
    const char *reason = NULL;

    CHECK_EQ(hbitmap_check(hb, &reason), -EINVAL);
    CHECK(reason && strstr(reason, word), "it says \"%s\", not \"%s\"",
          reason ? reason : "nothing", word);
    CHECK_EQ(hbitmap_check(hb, NULL), -EINVAL);
}

static void test_check_notices(void)
{
    HBitmap *hb = hbitmap_alloc(130, 0);
    size_t nwords;
    uint64_t *words = (uint64_t *)(uintptr_t)hbitmap_words(hb, &nwords);

    CHECK_VALID(hb);
    words[1] = 1;
    check_says(hb, "summary");
    words[1] = 0;
    CHECK_EQ(hbitmap_set(hb, 129, 1), 0);
    words[2] |= 4;
    check_says(hb, "beyond the end");
    words[2] &= 3;
    CHECK_VALID(hb);
    CHECK_EQ(hbitmap_count(hb), 1);
    words[2] |= 1;
    check_says(hb, "count");
    words[2] = 2;
    CHECK_VALID(hb);
    hbitmap_free(hb);
    ok("check notices broken bitmaps");
}

/* ---- allocations that fail ---------------------------------------------- */

/* What the process holds, as far as it can be asked: 0 where it cannot. */
static size_t memory_held(void)
{
    size_t held = 0;

#ifdef HAVE_MALLINFO2
    struct mallinfo2 info = mallinfo2();
    char line[64] = "";
    int fd = open("/proc/self/statm", O_RDONLY);

    /* From malloc; and all of the address space but what is malloc's. */
    held = info.uordblks + info.hblkhd;
    if (fd >= 0) {
        if (!EMULATION && read(fd, line, sizeof(line) - 1) > 0) {
            held += strtoul(line, NULL, 10) * (size_t)sysconf(_SC_PAGESIZE) -
                    info.arena - info.hblkhd;
        }
        close(fd);
    }
#endif
    return held;
}

static void alloc_once(void)
{
    HBitmap *hb = hbitmap_alloc(100000, 3);

    CHECK(hb || errno == ENOMEM, "errno %d", errno);
    hbitmap_free(hb);
}

static void alloc_large_once(void)
{
    HBitmap *hb = hbitmap_alloc(UINT64_C(1) << 26, 0);

    CHECK(hb || errno == ENOMEM, "errno %d", errno);
    hbitmap_free(hb);
}

static void alloc_on_once(void)
{
    uint64_t words[100];
    HBitmap *hb;

    memset(words, 0xff, sizeof(words));
    hb = hbitmap_alloc_on(6399, 0, words, 100);
    CHECK(hb || errno == ENOMEM, "errno %d", errno);
    if (!hb) {
        CHECK_EQ(words[98], UINT64_MAX);
        CHECK_EQ(words[99], UINT64_MAX);    /* a failed call changes nothing */
    }
    hbitmap_free(hb);
}

/* Fails every allocation of `run` in turn, until it needs no more; how many
 * there are. */
static unsigned fail_each(void (*run)(void))
{
    enum { WARM_UP = 10, TIMES = 40, SMALLEST = 64 };
    size_t before = 0, after;
    unsigned n = 0;

    for (int time = 0; time < WARM_UP + TIMES; time++) {
        if (time == WARM_UP) {
            before = memory_held();
        }
        n = 0;
        for (bool failed = true; failed; n++) {
            trace("allocation %u fails", n + 1);
            fail_countdown = n + 1;
            run();
            failed = fail_countdown == 0;
            fail_countdown = 0;
        }
    }
    /* Malloc's caches may grow a little; something left behind each time would
     * be more. */
    after = memory_held();
    CHECK(after < before + TIMES * SMALLEST, "%zu bytes leaked", after - before);
    return n - 1;
}

static void test_failing_alloc(void)
{
    CHECK(fail_each(alloc_once) >= 1, "nothing was allocated");
    CHECK(fail_each(alloc_large_once) >= 1, "nothing was allocated");
    CHECK(fail_each(alloc_on_once) >= 1, "nothing was allocated");
    ok("alloc without memory: NULL and ENOMEM");
}

/* Every operation on bitmaps that exist: -ENOMEM or done, nothing between. */
static int (*failing)(struct member *a, struct member *b);

static int run_truncate_up(struct member *a, struct member *b)
{
    (void)b;
    return hbitmap_truncate(a->hb, 1000000);
}

static int run_truncate_down(struct member *a, struct member *b)
{
    (void)b;
    return hbitmap_truncate(a->hb, 77);
}

static int run_merge(struct member *a, struct member *b)
{
    return hbitmap_merge(a->hb, b->hb, a->hb);
}

static int run_merge_finer(struct member *a, struct member *b)
{
    return hbitmap_merge(b->hb, a->hb, b->hb);
}

static int run_union(struct member *a, struct member *b)
{
    HBitmap *hb = hbitmap_union(a->hb, b->hb);
    int err = hb ? 0 : -errno;

    hbitmap_free(hb);
    return err;
}

static int run_difference(struct member *a, struct member *b)
{
    HBitmap *hb = hbitmap_difference(a->hb, b->hb);
    int err = hb ? 0 : -errno;

    hbitmap_free(hb);
    return err;
}

static int run_drain(struct member *a, struct member *b)
{
    return hbitmap_drain(a->hb, 0, a->m.size, b->hb);
}

static int run_drain_fresh(struct member *a, struct member *b)
{
    if (same_shape(a, b)) {
        hbitmap_reset_all(b->hb);
    }
    return hbitmap_drain_fresh(a->hb, 0, a->m.size, b->hb);
}

static int run_xor(struct member *a, struct member *b)
{
    return hbitmap_xor(a->hb, b->hb, b->hb);
}

static int run_deserialize(struct member *a, struct member *b)
{
    (void)b;
    return hbitmap_deserialize_ones(a->hb, 0, a->m.size, true);
}

static int run_set(struct member *a, struct member *b)
{
    (void)b;
    return hbitmap_set(a->hb, 0, a->m.size);
}

static int run_flip(struct member *a, struct member *b)
{
    (void)b;
    return hbitmap_flip(a->hb, 0, a->m.size);
}

static int run_merge_bits(struct member *a, struct member *b)
{
    static const uint8_t bits[100] = { 1, 2, 3, [99] = 0x40 };

    (void)b;
    return hbitmap_merge_bits(a->hb, bits, 800, 0, 0, false);
}

static int run_reset(struct member *a, struct member *b)
{
    (void)b;
    return hbitmap_reset(a->hb, 0, a->m.size);
}

static void fail_operation(void)
{
    unsigned armed = fail_countdown;

    for (int coarser = 0; coarser < 4; coarser += 3) {
        /* Not the allocations that make the members. */
        struct member a, b;
        int err;

        fail_countdown = 0;
        member_open(&a, 'A', 9999, 0, false);
        member_open(&b, 'B', 9999, coarser, false);
        for (uint64_t item = 0; item < 9999; item += 1 + item / 8) {
            CHECK_EQ(hbitmap_set(a.hb, item, 1), 0);
            CHECK_EQ(hbitmap_set(b.hb, 9998 - item, 1), 0);
            m_put(&a.m, item, 1, 1);
            m_put(&b.m, 9998 - item, 1, 1);
        }
        fail_countdown = armed;
        err = failing(&a, &b);
        if (err == -ENOMEM) {
            CHECK(armed && fail_countdown == 0, "-ENOMEM out of nothing");
        } else {
            CHECK(err == 0 || (err == -EINVAL && coarser), "returned %d", err);
        }
        if (err != 0) {
            compare(&a);
            compare(&b);
        } else {
            CHECK_VALID(a.hb);
            CHECK_VALID(b.hb);
        }
        hbitmap_free(a.hb);
        hbitmap_free(b.hb);
        m_free(&a.m);
        m_free(&b.m);
        if (armed && fail_countdown == 0) {
            return;
        }
    }
}

static void test_failing_operations(void)
{
    static int (*const runs[])(struct member *, struct member *) = {
        run_truncate_up, run_truncate_down, run_union, run_difference, run_merge,
        run_merge_finer, run_flip, run_merge_bits, run_drain, run_drain_fresh, run_xor, run_deserialize, run_set, run_reset,
    };

    for (size_t i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
        unsigned allocations;

        failing = runs[i];
        allocations = fail_each(fail_operation);
        CHECK(allocations || i > 3, "truncate, union or difference allocates nothing");
    }
    ok("operations without memory: -ENOMEM, nothing changed");
}

/* ---- clones of loops ---------------------------------------------------- */

/* nbytes behind which nothing may be read. */
static uint8_t *before_a_hole(size_t nbytes)
{
#if defined(__linux__)
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t whole = (nbytes + page - 1) / page * page;
    uint8_t *memory = mmap(NULL, whole + page, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(memory != MAP_FAILED, "mmap: %d", errno);
    CHECK_EQ(mprotect(memory + whole, page, PROT_NONE), 0);
    return memory + (whole - nbytes);
#else
    return grab(nbytes);
#endif
}

/* Contents of n words: none, all, only the last is set, or one bit in each of
 * some, more and more of them. */
enum { CONTENTS = 12 };

static void fill_content(uint8_t *bytes, uint64_t n, unsigned content)
{
    memset(bytes, content == 1 ? 0xff : 0, (size_t)n * 8);
    for (uint64_t i = content == 2 ? n - 1 : 0; i < n && content > 1; i++) {
        if (content == 2 || rng_below(&rng, CONTENTS) < content) {
            bytes[8 * i + rng_below(&rng, 8)] = (uint8_t)(1 << rng_below(&rng, 8));
        }
    }
}

/* n words at `from`, and copied to 64 words and some around them. */
static void check_nonzero(const uint8_t *from, uint64_t n)
{
    enum { AROUND = 8, ALL = 64 + 2 * AROUND };
    _Alignas(64) hb_word room[ALL];
    const uint8_t *bytes = (const uint8_t *)room;
    const uint64_t at = rng_below(&rng, 2 * AROUND);
    uint64_t want = 0;

    for (uint64_t i = 0; i < 8 * n; i++) {
        want |= (uint64_t)(from[i] != 0) << (i / 8);
    }
    memset((void *)room, 0xa5, sizeof(room));
    CHECK_EQ(hb_nonzero(from, n), want);
    CHECK_EQ(hb_copy_nonzero(&room[at], from, n), want);
    CHECK(memcmp(&bytes[8 * at], from, (size_t)n * 8) == 0, "not copied");
    for (uint64_t i = 0; i < sizeof(room); i++) {
        if (i < 8 * at || i >= 8 * (at + n)) {
            CHECK(bytes[i] == 0xa5, "%" PRIu64 " words also changed byte %" PRId64,
                  n, (int64_t)i - (int64_t)(8 * at));
        }
    }
}

static void test_clones(void)
{
    enum { MOST = 200, EDGE = 8 };
    uint64_t words[MOST];
    uint8_t *hole = before_a_hole(64 * 8 + EDGE) + 64 * 8 + EDGE;

    CHECK(!hb_use_clone("no such clone"), "taken");
    for (int i = 0; i < MOST; i++) {
        words[i] = random_word();
    }
    for (unsigned i = 0; hb_clone_name(i); i++) {
        uint64_t bits = 0;

        if (!hb_use_clone(hb_clone_name(i))) {
            printf("   clone %s: not on this processor\n", hb_clone_name(i));
            continue;
        }
        trace("clone %s", hb_clone_name(i));
        for (uint64_t n = 0; n < MOST; n++) {
            CHECK_EQ(hb_popcount_words((const hb_word *)words, n), bits);
            CHECK_EQ(hb_popcount(words[n]), __builtin_popcountll(words[n]));
            bits += (unsigned)__builtin_popcountll(words[n]);
        }
        for (uint64_t n = 1; n <= 64; n++) {
            for (unsigned gap = 0; gap < EDGE; gap++) {
                for (unsigned content = 0; content < CONTENTS; content++) {
                    memset(hole - (64 * 8 + EDGE), 0xff, 64 * 8 + EDGE);
                    fill_content(hole - gap - 8 * n, n, content);
                    check_nonzero(hole - gap - 8 * n, n);
                }
            }
        }
    }
    trace_clear();
    ok("clones of loops");
}

/* Zeros that are deserialized take no memory where there was nothing. */
static void test_zeros_untouched(void)
{
#if defined(__linux__) && !defined(HB_TSAN)
    const uint64_t groups = UINT64_C(1) << 26;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), nbytes = (size_t)groups / 8;
    HBitmap *hb = HUGE_BITMAPS ? hbitmap_alloc(groups, 0) : NULL;
    size_t nwords, resident = 0;
    unsigned char *pages;
    uint64_t *buf;

    if (!hb) {
        printf("# no memory that is not touched\n");
        return;
    }
    buf = grab(nbytes);
    pages = grab(nbytes / page);
    buf[1000] = 1;
    CHECK_EQ(hbitmap_deserialize_part(hb, (uint8_t *)buf, 0, groups, true), 0);
    CHECK_EQ(hbitmap_deserialize_zeroes(hb, groups / 2, groups / 2, true), 0);
    CHECK_EQ(mincore((void *)(uintptr_t)hbitmap_words(hb, &nwords), nbytes, pages), 0);
    for (size_t i = 0; i < nbytes / page; i++) {
        resident += pages[i] & 1;
    }
    CHECK_EQ(resident, 1);
    CHECK_EQ(hbitmap_count(hb), 1);
    free(pages);
    free(buf);
    hbitmap_free(hb);
    ok("zeros take no memory");
#endif
}

static void *wait_for_ever(void *unused)
{
    for (;;) {
        pause();
    }
    return unused;
}

/* From here on the process has more than one thread. */
static void keep_company(void)
{
    pthread_t thread;

    CHECK_EQ(hb_alone(), ALONE_IS_KNOWN);
    CHECK_EQ(pthread_create(&thread, NULL, wait_for_ever, NULL), 0);
    CHECK(!hb_alone(), "alone with another thread");
}

int main(int argc, char **argv)
{
    unsigned long rounds = read_arguments(argc, argv, 2);

    rng = test_seed;
    test_header_examples();
    test_alloc_refuses();
    test_alloc_on_refuses();
    test_buffers();
    test_changes_where_an_iterator_is();
    test_reset_ends();
    test_two_groups_of_2_to_62();
    test_old_words_stay();
    test_check_notices();
    test_failing_alloc();
    test_failing_operations();
    test_huge();
    test_locked();
    test_zeros_untouched();
    test_clones();
    test_random(rounds);
    /* Some things are done another way while this is the only thread. */
    keep_company();
    test_changes_where_an_iterator_is();
    test_failing_operations();
    for (unsigned i = 0; hb_clone_name(i); i++) {
        if (hb_use_clone(hb_clone_name(i))) {
            test_random(rounds);
        }
    }
    return 0;
}
