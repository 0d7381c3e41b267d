/* SPDX-License-Identifier: MIT */
/*
 * The table of this copy, and where things of others have theirs: see copies.h.
 */
#include <string.h>

#include "copies.h"

const struct pybitmap_api hb_home = {
    PYBITMAP_API_MAGIC,
    PYBITMAP_API_VERSION,
    sizeof(struct pybitmap_api),
#define HB_ADDRESS(name) name,
    PYBITMAP_FUNCTIONS(HB_ADDRESS)
#undef HB_ADDRESS
};

const void *hbitmap_api(void)
{
    return &hb_home;
}

const char *hbitmap_api_names(void)
{
#define HB_NAME(name) " " #name
    static const char names[] = PYBITMAP_FUNCTIONS(HB_NAME);
#undef HB_NAME

    return names + 1;
}

static const struct pybitmap_api *hb_table_of(const void *thing)
{
    return *(const struct pybitmap_api *const *)thing;
}

bool hb_is_known(const void *thing)
{
    const struct pybitmap_api *table = hb_table_of(thing);

    /* Nothing is read of what is no table. */
    if (table == &hb_home || (table && table->magic == PYBITMAP_API_MAGIC &&
                              table->version == PYBITMAP_API_VERSION)) {
        return true;
    }
    errno = EXDEV;
    return false;
}

const struct pybitmap_api *hb_home_of(const void *thing, size_t at, hb_function *own)
{
    const struct pybitmap_api *table = hb_table_of(thing);
    hb_function *there;

    if (!hb_is_known(thing)) {
        return NULL;
    }
    if (at + sizeof(there) <= table->size) {
        memcpy(&there, (const char *)table + at, sizeof(there));
        if (there != own) {
            return table;
        }
    }
    errno = EXDEV;
    return NULL;
}

bool hb_one_home(const void *const *things)
{
    for (const void *const *thing = things; *thing; thing++) {
        if (hb_table_of(*thing) != hb_table_of(*things)) {
            errno = EXDEV;
            return false;
        }
    }
    return true;
}
