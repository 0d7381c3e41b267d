/* SPDX-License-Identifier: MIT */
/*
 * The hook of a machine of Unicorn's.  The regions stand in a list; the hook goes through
 * it without a lock, some ten million times a second.
 *
 * Whoever removes a region has to know when the hook does not use it any more, because
 * its bitmap may go then:
 *
 *     the hook                            a removal
 *     1  inside = odd                     1  the region out of the list
 *     2  go through the list, mark        2  wait until inside is even, or has changed
 *     3  inside = even                    3  the region may go
 *
 * Steps 1 and the loads of the list are sequentially consistent: if the removal finds an
 * even number, the hook's step 2 comes after the removal's step 1.  The same for what is
 * marked for others than the guest, who may be several: `others` counts them.
 *
 * A MARK COMES BEFORE ITS WRITE.  Whoever takes the mark in between, and copies, has the
 * old bytes:
 *
 *     the guest                           who collects            dirty
 *     hook: marks A                                               A
 *                                         takes A, copies A       --      the old A
 *     writes A                                                    --      lost
 *
 * So the hook marks the last write again when it is called for the next one (which comes
 * when the last is done), and so does the end of a run.
 *
 * THE HOOK MAY BECOME DEAF.  Unicorn (2.1.4) does an access byte by byte where it crosses a
 * page, or is an unaligned store to a page with code, and calls no hooks meanwhile.  If it
 * leaves the access by a jump, hooks stay mute, mostly until the run ends:
 *
 *     x86     an unaligned store changes code of the block that is running
 *     any     the guest faults in the second page, and a hook of interrupts goes on
 *
 * Nothing tells when that happens, but the hook is called before the store, and another one
 * after the fault: where it may, `deaf` is counted, and the end of the run marks all.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"
#include "unicorn.h"

enum { HB_UC_HOOK_INTR = 1 << 0, HB_UC_HOOK_MEM_WRITE = 1 << 11 };

/* How long a hook waits for a node that is truncated or closed: so many times, of so many
 * milliseconds. */
enum { HB_WAITS = 1000, HB_WAIT_MS = 10 };

typedef int hb_hook_add_fn(void *engine, size_t *hook, int type, void *callback,
                           void *user_data, uint64_t begin, uint64_t end, ...);
typedef int hb_hook_del_fn(void *engine, size_t hook);
typedef int hb_reg_read_fn(void *engine, int reg, void *value);

struct HBUnicornRegion {
    HBUnicorn *machine;
    _Atomic(HBUnicornRegion *) next;
    bool added;                         /* under the machine's `changing` */
    uint64_t begin, last, at;
    HBitmap *hb;
    HBTracker *tracker;
    _Atomic uint64_t failures;
    _Atomic uint64_t failed_address;    /* of the first */
    atomic_int failed_code;
};

struct HBUnicorn {
    _Atomic(HBUnicornRegion *) regions;
    _Atomic uint64_t inside;            /* odd: the hook is at work */
    _Atomic uint64_t others;            /* how many mark for others than the guest */
    atomic_flag changing;               /* the list */
    _Atomic uint64_t last_address, last_nbytes;
    atomic_bool always;
    atomic_bool failed;                 /* in some region, and nobody was told */
    _Atomic uint64_t deaf;              /* how often the hook may have become it */
    atomic_uint line;                   /* log2 of what is marked together in all regions */
    HBUnicornGuest guest;
    void *engine;
    size_t hook, exceptions;            /* exceptions 0: there is no hook of them */
    hb_hook_add_fn *hook_add;
    hb_hook_del_fn *hook_del;           /* NULL: there is no hook */
    hb_reg_read_fn *reg_read;
};

/* ---- marks -------------------------------------------------------------- */

static int hb_mark_node(HBTracker *tracker, uint64_t offset, uint64_t nbytes)
{
    int code = hbtracker_try_mark(tracker, offset, nbytes);

    /* The machine runs without the GIL, so who truncates or closes the node comes to its
     * end; unless that is this thread. */
    for (unsigned i = 0; code == -EAGAIN && i < HB_WAITS; i++) {
        (void)hbtracker_wait(tracker, HB_WAIT_MS);
        code = hbtracker_try_mark(tracker, offset, nbytes);
    }
    return code;
}

/* Addresses from `first` to `last`, of which the region may have some. */
static void hb_mark_in(HBUnicornRegion *region, uint64_t first, uint64_t last)
{
    uint64_t begin = first > region->begin ? first : region->begin;
    uint64_t end = last < region->last ? last : region->last;
    uint64_t offset = region->at + (begin - region->begin);
    int code;

    if (begin > end) {
        return;
    }
    /* A region is smaller than a bitmap may be, so this does not overflow. */
    code = region->hb ? hbitmap_set(region->hb, offset, end - begin + 1)
                      : hb_mark_node(region->tracker, offset, end - begin + 1);
    if (code) {
        int none = 0;

        if (atomic_compare_exchange_strong(&region->failed_code, &none, code)) {
            atomic_store(&region->failed_address, begin);
        }
        atomic_fetch_add(&region->failures, 1);
        atomic_store(&region->machine->failed, true);
    }
}

static void hb_mark_regions(HBUnicorn *machine, uint64_t first, uint64_t last)
{
    for (HBUnicornRegion *region = atomic_load(&machine->regions); region;
         region = atomic_load(&region->next)) {
        hb_mark_in(region, first, last);
    }
}

static void hb_mark_everything(HBUnicorn *machine)
{
    hb_mark_regions(machine, 0, UINT64_MAX);
}

static bool hb_is_translated(HBUnicorn *machine)
{
    const HBUnicornGuest *guest = &machine->guest;
    uint8_t query[sizeof(guest->query)];
    uint64_t value;

    if (atomic_load(&machine->always)) {
        return true;
    }
    if (!guest->reg) {
        return false;
    }
    memcpy(query, guest->query, sizeof(query));
    if (machine->reg_read(machine->engine, guest->reg, query)) {
        return true;
    }
    memcpy(&value, query + guest->value_at, sizeof(value));
    return value & guest->mask;
}

/* A write of the guest's that goes into the next page, wherever that is. */
__attribute__((noinline))
static void hb_mark_crossing(HBUnicorn *machine, uint64_t address, uint64_t nbytes)
{
    uint64_t second = address - address % machine->guest.page + machine->guest.page;
    uint64_t rest = nbytes - (second - address);

    if (hb_is_translated(machine)) {
        hb_mark_everything(machine);
        return;
    }
    hb_mark_regions(machine, address, second - 1);
    second &= machine->guest.last;
    hb_mark_regions(machine, second, second + (rest - 1));
}

static inline void hb_mark_guest(HBUnicorn *machine, uint64_t address, uint64_t nbytes)
{
    const uint64_t page = machine->guest.page;

    if ((address & (page - 1)) + nbytes > page) {
        hb_mark_crossing(machine, address, nbytes);
    } else {
        hb_mark_regions(machine, address, address + (nbytes - 1));
    }
}

static void hb_mark_last(HBUnicorn *machine)
{
    uint64_t nbytes = atomic_load_explicit(&machine->last_nbytes, memory_order_relaxed);

    if (nbytes) {
        hb_mark_guest(machine,
                      atomic_load_explicit(&machine->last_address, memory_order_relaxed),
                      nbytes);
    }
}

/* The same, unless marking `address` marks it, too. */
static inline void hb_mark_last_but(HBUnicorn *machine, uint64_t address)
{
    const unsigned line = atomic_load_explicit(&machine->line, memory_order_relaxed);
    uint64_t first = atomic_load_explicit(&machine->last_address, memory_order_relaxed);
    uint64_t nbytes = atomic_load_explicit(&machine->last_nbytes, memory_order_relaxed);

    if (nbytes && ((first ^ address) | ((first + (nbytes - 1)) ^ address)) >> line) {
        hb_mark_guest(machine, first, nbytes);
    }
}

/* Where the guest's code segment begins; false: that is not known. */
static bool hb_has_base(HBUnicorn *machine, uint64_t *base)
{
    const HBUnicornGuest *guest = &machine->guest;
    uint64_t segment = 0, control = 0;

    *base = 0;
    if (!guest->cs) {
        return true;
    }
    if (machine->reg_read(machine->engine, guest->cs, &segment)) {
        return false;
    }
    if (!guest->real) {
        return !segment;        /* that of the start */
    }
    *base = segment << 4;
    return !machine->reg_read(machine->engine, guest->reg, &control) &&
           !(control & 1);      /* CR0.PE: the base is in a table */
}

/*
 * May a write change code of the block that is running?  That begins in the page of the
 * instruction, and ends in this page or with an instruction that goes on in the next.
 */
__attribute__((noinline))
static bool hb_changes_block(HBUnicorn *machine, uint64_t address, uint64_t nbytes)
{
    const HBUnicornGuest *guest = &machine->guest;
    const uint64_t pages = guest->last / guest->page;
    uint64_t pc = 0, base, page;

    if (atomic_load(&machine->deaf) || hb_is_translated(machine) ||
        !hb_has_base(machine, &base) || machine->reg_read(machine->engine, guest->pc, &pc)) {
        return true;
    }
    page = ((pc + base) & guest->last) / guest->page;
    return ((address / guest->page - page) & pages) <= 1 ||
           (((address + (nbytes - 1)) / guest->page - page) & pages) <= 1;
}

static void hb_set_last(HBUnicorn *machine, uint64_t address, uint64_t nbytes)
{
    atomic_store_explicit(&machine->last_address, address, memory_order_relaxed);
    atomic_store_explicit(&machine->last_nbytes, nbytes, memory_order_relaxed);
}

void hbunicorn_on_write(void *engine, int type, uint64_t address, int nbytes,
                        int64_t value, void *user_data)
{
    HBUnicorn *machine = user_data;
    const uint64_t inside = atomic_load_explicit(&machine->inside, memory_order_relaxed);

    (void)engine, (void)type, (void)value;
    if (nbytes <= 0) {
        return;
    }
    atomic_store(&machine->inside, inside + 1);
    hb_mark_last_but(machine, address);
    hb_mark_guest(machine, address, (uint64_t)nbytes);
    hb_set_last(machine, address, (uint64_t)nbytes);
    if (machine->guest.pc && address & (uint64_t)(nbytes - 1) &&
        hb_changes_block(machine, address, (uint64_t)nbytes)) {
        atomic_fetch_add(&machine->deaf, 1);
    }
    /* Release: the marks come before it, for whoever then frees a bitmap. */
    atomic_store_explicit(&machine->inside, inside + 2, memory_order_release);
}

void hbunicorn_on_exception(void *engine, uint32_t number, void *user_data)
{
    HBUnicorn *machine = user_data;

    (void)engine;
    if (number < 128 && machine->guest.faults[number / 64] >> number % 64 & 1) {
        atomic_fetch_add(&machine->deaf, 1);
    }
}

bool hbunicorn_written(HBUnicorn *machine, uint64_t address, uint64_t nbytes)
{
    uint64_t last = address + (nbytes - 1);

    if (nbytes) {
        atomic_fetch_add(&machine->others, 1);
        hb_mark_regions(machine, address, last < address ? UINT64_MAX : last);
        atomic_fetch_sub(&machine->others, 1);
    }
    return atomic_exchange(&machine->failed, false);
}

bool hbunicorn_mark_all(HBUnicorn *machine)
{
    atomic_fetch_add(&machine->others, 1);
    hb_mark_everything(machine);
    atomic_fetch_sub(&machine->others, 1);
    return atomic_exchange(&machine->failed, false);
}

uint64_t hbunicorn_deaf(HBUnicorn *machine)
{
    return atomic_load(&machine->deaf);
}

void hbunicorn_hears(HBUnicorn *machine, uint64_t deaf)
{
    /* Another run may have begun meanwhile, and the hook become deaf in it. */
    (void)atomic_compare_exchange_strong(&machine->deaf, &deaf, 0);
}

void hbunicorn_run_begins(HBUnicorn *machine, HBUnicornWrite *outer)
{
    outer->address = atomic_load(&machine->last_address);
    outer->nbytes = atomic_load(&machine->last_nbytes);
    hb_set_last(machine, 0, 0);
}

bool hbunicorn_run_ends(HBUnicorn *machine, const HBUnicornWrite *outer)
{
    atomic_fetch_add(&machine->others, 1);
    hb_mark_last(machine);
    if (atomic_load(&machine->deaf)) {
        hb_mark_everything(machine);
    }
    atomic_fetch_sub(&machine->others, 1);
    hb_set_last(machine, outer ? outer->address : 0, outer ? outer->nbytes : 0);
    return atomic_exchange(&machine->failed, false);
}

bool hbunicorn_unfinished(HBUnicorn *machine)
{
    return atomic_load(&machine->last_nbytes);
}

/* ---- regions ------------------------------------------------------------ */

static void hb_change(HBUnicorn *machine)
{
    for (unsigned round = 0; atomic_flag_test_and_set(&machine->changing);) {
        hb_relax(&round);
    }
}

HBUnicornRegion *hbunicorn_region_alloc(HBUnicorn *machine, uint64_t begin, uint64_t last,
                                        uint64_t at, HBitmap *hb, HBTracker *tracker)
{
    HBUnicornRegion *region = calloc(1, sizeof(*region));

    if (region) {
        region->machine = machine;
        region->begin = begin;
        region->last = last;
        region->at = at;
        region->hb = hb;
        region->tracker = tracker;
    }
    return region;
}

/*
 * log2 of the lines of addresses of which the region has all or none, and that are marked
 * in one group: the edges of groups and of the region lie between lines.
 */
static unsigned hb_line_of(const HBUnicornRegion *region)
{
    /* Of a node's bitmaps, which may come and go, none is finer than 512 bytes. */
    const int granularity = region->hb ? hbitmap_granularity(region->hb) : 9;
    const uint64_t edges = region->begin | (region->last + 1) | region->at;
    unsigned line = 0;

    while (line < 63 && line < (unsigned)granularity && !(edges >> line & 1)) {
        line++;
    }
    return line;
}

void hbunicorn_region_add(HBUnicornRegion *region)
{
    HBUnicorn *machine = region->machine;
    const unsigned line = hb_line_of(region);

    hb_change(machine);
    if (!region->added) {
        if (line < atomic_load(&machine->line)) {
            atomic_store(&machine->line, line);
        }
        atomic_store(&region->next, atomic_load(&machine->regions));
        atomic_store(&machine->regions, region);
        region->added = true;
    }
    atomic_flag_clear(&machine->changing);
}

void hbunicorn_region_remove(HBUnicornRegion *region)
{
    HBUnicorn *machine = region->machine;
    _Atomic(HBUnicornRegion *) *link = &machine->regions;
    uint64_t inside;
    unsigned round = 0;

    hb_change(machine);
    while (region->added && atomic_load(link) != region) {
        link = &atomic_load(link)->next;
    }
    if (region->added) {
        /* Its own link stays: the hook may be at it, and goes on from there. */
        atomic_store(link, atomic_load(&region->next));
        region->added = false;
    }
    /* Under `changing`: what the hook goes on to may go only after this. */
    inside = atomic_load(&machine->inside);
    while (inside % 2 && atomic_load(&machine->inside) == inside) {
        hb_relax(&round);
    }
    while (atomic_load(&machine->others)) {
        hb_relax(&round);
    }
    atomic_flag_clear(&machine->changing);
}

void hbunicorn_region_free(HBUnicornRegion *region)
{
    if (region) {
        hbunicorn_region_remove(region);
        free(region);
    }
}

uint64_t hbunicorn_region_failures(HBUnicornRegion *region, int *code, uint64_t *address)
{
    uint64_t failures = atomic_exchange(&region->failures, 0);

    *address = atomic_load(&region->failed_address);
    *code = failures ? atomic_exchange(&region->failed_code, 0) : 0;
    return failures;
}

/* ---- machines ----------------------------------------------------------- */

HBUnicorn *hbunicorn_alloc(const HBUnicornGuest *guest)
{
    HBUnicorn *machine = calloc(1, sizeof(*machine));

    if (machine) {
        machine->guest = *guest;
        atomic_init(&machine->line, 63);
        atomic_init(&machine->always, guest->always);
        atomic_flag_clear(&machine->changing);
    }
    return machine;
}

void hbunicorn_free(HBUnicorn *machine)
{
    free(machine);
}

int hbunicorn_hook(HBUnicorn *machine, void *engine, uintptr_t hook_add,
                   uintptr_t hook_del, uintptr_t reg_read)
{
    union {
        void (*function)(void *, int, uint64_t, int, int64_t, void *);
        void *pointer;
    } callback = {.function = hbunicorn_on_write};
    int err;

    machine->engine = engine;
    machine->reg_read = (hb_reg_read_fn *)reg_read;
    /* begin > end: all addresses.  A range would be asked only about the first byte of a
     * write; and pages outside of it become plain memory for some instructions. */
    err = ((hb_hook_add_fn *)hook_add)(engine, &machine->hook, HB_UC_HOOK_MEM_WRITE,
                                       callback.pointer, machine, 1, 0);
    if (!err) {
        machine->hook_add = (hb_hook_add_fn *)hook_add;
        machine->hook_del = (hb_hook_del_fn *)hook_del;
    }
    return err;
}

int hbunicorn_listen(HBUnicorn *machine, bool on)
{
    union {
        void (*function)(void *, uint32_t, void *);
        void *pointer;
    } callback = {.function = hbunicorn_on_exception};

    if (!machine->hook_del || on == !!machine->exceptions) {
        return 0;
    }
    if (on) {
        return machine->hook_add(machine->engine, &machine->exceptions, HB_UC_HOOK_INTR,
                                 callback.pointer, machine, 1, 0);
    }
    (void)machine->hook_del(machine->engine, machine->exceptions);
    machine->exceptions = 0;
    return 0;
}

void hbunicorn_unhook(HBUnicorn *machine)
{
    hb_hook_del_fn *hook_del = machine->hook_del;

    (void)hbunicorn_listen(machine, false);
    machine->hook_del = NULL;
    if (hook_del) {
        (void)hook_del(machine->engine, machine->hook);
    }
}

void hbunicorn_forked(HBUnicorn *machine)
{
    atomic_store(&machine->others, 0);
    atomic_store(&machine->inside, 0);
    atomic_flag_clear(&machine->changing);
}

void hbunicorn_translates(HBUnicorn *machine, bool always)
{
    atomic_store(&machine->always, machine->guest.always || always);
}
