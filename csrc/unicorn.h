/* SPDX-License-Identifier: MIT */
/*
 * The writes of a machine of Unicorn's, marked: the hook that it calls for each, and
 * what Python needs beside it in one call, since between two a signal handler may raise.
 * Not part of the core's table: programs with an emulator of their own call tracker.h.
 *
 * Nothing here is compiled or linked against Unicorn: its functions are given by their
 * addresses.  Addresses are the guest's physical ones, in bytes.
 *
 * THREADS.  A machine runs in one thread at a time, and so the hook does.  All else may
 * be called beside it, from any thread, without Unicorn being called; but for
 * hbunicorn_hook and hbunicorn_unhook, which are Unicorn's own calls.
 */
#ifndef PYBITMAP_UNICORN_H
#define PYBITMAP_UNICORN_H

#include "hbitmap.h"
#include "tracker.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

typedef struct HBUnicorn HBUnicorn;             /* a machine: its hook, its regions */
typedef struct HBUnicornRegion HBUnicornRegion;

typedef struct HBUnicornWrite {
    uint64_t address, nbytes;                   /* nbytes 0: there is none */
} HBUnicornWrite;

/*
 * What a guest's addresses are like.  Of a write that crosses a page the hook is told
 * where its first byte lies; where the rest does is known only while nothing is
 * translated: `always` says that something may be, and so does a bit of `mask` in the
 * register.
 */
typedef struct HBUnicornGuest {
    uint64_t page;              /* bytes, a power of 2 */
    uint64_t last;              /* the highest address; a write beyond it goes on at 0 */
    bool always;
    int reg;                    /* Unicorn's number; 0: no such register */
    uint8_t query[64];          /* what uc_reg_read is given */
    uint64_t value_at;          /* where in it the value is put, 64 bits */
    uint64_t mask;
    int pc;                     /* 0: a store leaves no block whose code it changes */
    int cs;                     /* its segment; 0: there is none */
    bool real;                  /* is that segment one of real mode? */
    uint64_t faults[2];         /* bit n: exception n may come amid an access to memory */
} HBUnicornGuest;

/* A machine without a hook.  NULL: no memory. */
HBUnicorn *hbunicorn_alloc(const HBUnicornGuest *guest);

/* It has no regions, and no hook but one that went with its engine.  NULL is fine. */
void hbunicorn_free(HBUnicorn *machine);

/*
 * Adds the hook to the engine, a uc_engine *; the last three are uc_hook_add, uc_hook_del
 * and uc_reg_read of the library that made it.  What uc_hook_add returned; not 0: there
 * is none.
 */
int hbunicorn_hook(HBUnicorn *machine, void *engine, uintptr_t hook_add,
                   uintptr_t hook_del, uintptr_t reg_read);

/* Takes it away, once; where there is none nothing happens. */
void hbunicorn_unhook(HBUnicorn *machine);

/*
 * Listen to the guest's exceptions, too, or no longer.  Only beside a hook of somebody
 * else's: an exception that nobody hooks ends the run.  What uc_hook_add returned.
 */
int hbunicorn_listen(HBUnicorn *machine, bool on);

/* In the child of a fork: what other threads were at is no more. */
void hbunicorn_forked(HBUnicorn *machine);

/* May addresses be translated, whatever the register says? */
void hbunicorn_translates(HBUnicorn *machine, bool always);

/*
 * The addresses from `begin` to `last`, which are marked in `hb` or, where that is NULL,
 * by `tracker`, the first of them at offset `at`.  Nothing is marked before it is added;
 * added or removed twice, nothing happens the second time.  When remove returns, no write
 * is being marked in it any more.  Free removes it.  Alloc is NULL where memory lacks.
 */
HBUnicornRegion *hbunicorn_region_alloc(HBUnicorn *machine, uint64_t begin, uint64_t last,
                                        uint64_t at, HBitmap *hb, HBTracker *tracker);
void hbunicorn_region_add(HBUnicornRegion *region);
void hbunicorn_region_remove(HBUnicornRegion *region);
void hbunicorn_region_free(HBUnicornRegion *region);

/*
 * What could not be marked since this was asked last: how many writes, the code of the
 * first, a negative errno, and its address.  -EAGAIN: a node was truncated or closed for
 * longer than the hook waits.
 */
uint64_t hbunicorn_region_failures(HBUnicornRegion *region, int *code, uint64_t *address);

/* What the machine calls, a uc_cb_hookmem_t, with an HBUnicorn * as its user_data. */
void hbunicorn_on_write(void *engine, int type, uint64_t address, int nbytes,
                        int64_t value, void *user_data);

/* What others than the guest wrote, or are about to.  Did a mark fail in any region since
 * this, or the end of a run, was called last? */
bool hbunicorn_written(HBUnicorn *machine, uint64_t address, uint64_t nbytes);

/*
 * The hook is called before the write is done.  So the last one is marked again when the
 * next comes, and when the machine rests.  Around a run: its begin puts into *outer what
 * is not done yet of the run that it may lie in; its end marks the last one of this run
 * again, and gives that back.  NULL: the machine rests.  The end says whether a mark failed,
 * as hbunicorn_written does.
 */
void hbunicorn_run_begins(HBUnicorn *machine, HBUnicornWrite *outer);
bool hbunicorn_run_ends(HBUnicorn *machine, const HBUnicornWrite *outer);

/* Is there one that was not marked again? */
bool hbunicorn_unfinished(HBUnicorn *machine);

/* Marks all of every region; returns as hbunicorn_written. */
bool hbunicorn_mark_all(HBUnicorn *machine);

/*
 * How often the hook may have become deaf since it heard for certain; 0: it hears.  While it
 * is deaf, the end of a run marks all.  hears: it does again, if nothing was added to `deaf`.
 */
uint64_t hbunicorn_deaf(HBUnicorn *machine);
void hbunicorn_hears(HBUnicorn *machine, uint64_t deaf);

/* What the machine calls for an exception, a uc_cb_hookintr_t. */
void hbunicorn_on_exception(void *engine, uint32_t number, void *user_data);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
