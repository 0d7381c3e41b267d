/* SPDX-License-Identifier: MIT */
/*
 * Two copies of this code in one process, and things that one has made and the other
 * is given.
 *
 * Whoever clears or publishes waits for the slots of its own copy's threads
 * (threads.h); in another copy's nobody would look.  So a copy does nothing to what
 * it has not made: a bitmap, a tracker, a set, an open write begin with a pointer to
 * the table of their maker's functions, their *home*, and each public function first
 * sees whether it is at home, and else calls its namesake there.
 *
 *     a module's hbitmap_set(hb)          Python's copy
 *     hb->home is not mine
 *     hb->home->hbitmap_set(hb)    ->     hb->home is mine: marks, in a slot of mine
 *
 * At home that is one load, from the line that holds what is needed next.  What comes
 * from a copy of another version, or of none, is refused: -EXDEV, or what the
 * function says where there is nothing (0, false, NULL), with errno EXDEV.  So are calls on
 * things of several copies at once.
 */
#ifndef PYBITMAP_COPIES_H
#define PYBITMAP_COPIES_H

#include <errno.h>

#include "pybitmap_table.h"

#pragma GCC visibility push(hidden)

/* This copy's. */
extern const struct pybitmap_api hb_home;

typedef void hb_function(void);

/*
 * Where a thing has its home, which is not here, if that has a function at `at`, an
 * offset into the table.  NULL with errno EXDEV: it has not; or that is `own`, the
 * function that asks, because the names of one copy lead to another.
 */
const struct pybitmap_api *hb_home_of(const void *thing, size_t at, hb_function *own);

/* Have all things of an array that ends with NULL the same home?  If not, errno is EXDEV. */
bool hb_one_home(const void *const *things);

/* Can it be called here at all?  If not, errno is EXDEV. */
bool hb_is_known(const void *thing);

#pragma GCC visibility pop

static inline bool hb_at_home(const void *thing)
{
#ifdef HB_BREAK_HOME
    return true;        /* for tests: whose it is, nobody asks */
#endif
    return __builtin_expect(*(const struct pybitmap_api *const *)thing == &hb_home, 1);
}

/*
 * To stand first in a public function: where the thing is not at home, returns what
 * `name`(...) does there, or `refused`.
 */
#define HB_AT_HOME(thing, refused, name, ...)                                          \
    do {                                                                               \
        if (!hb_at_home(thing)) {                                                      \
            const struct pybitmap_api *home_ = hb_home_of(                             \
                thing, offsetof(struct pybitmap_api, name), (hb_function *)name);      \
            return home_ ? home_->name(__VA_ARGS__) : (refused);                       \
        }                                                                              \
    } while (0)

/* For functions that return nothing. */
#define HB_AT_HOME_VOID(thing, name, ...)                                              \
    do {                                                                               \
        if (!hb_at_home(thing)) {                                                      \
            const struct pybitmap_api *home_ = hb_home_of(                             \
                thing, offsetof(struct pybitmap_api, name), (hb_function *)name);      \
            if (home_) {                                                               \
                home_->name(__VA_ARGS__);                                              \
            }                                                                          \
            return;                                                                    \
        }                                                                              \
    } while (0)

/* The same for several things; `things` are in parentheses. */
#define HB_TOGETHER(things, refused, name, ...)                                        \
    do {                                                                               \
        const void *const things_[] = { HB_LIST things, NULL };                        \
        if (!hb_one_home(things_)) {                                                   \
            return (refused);                                                          \
        }                                                                              \
        HB_AT_HOME(things_[0], refused, name, __VA_ARGS__);                            \
    } while (0)
#define HB_LIST(...) __VA_ARGS__

#endif
