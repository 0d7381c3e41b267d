/* SPDX-License-Identifier: MIT */
/*
 * Rows of uint64 as a stream of Arrow's C data interface, which pandas, Polars, pyarrow
 * and DuckDB read (https://arrow.apache.org/docs/format/CStreamInterface.html).  Not part
 * of the core: it knows numbers, no bitmaps.
 *
 * OWNER.  What is handed out is a copy in memory of malloc's, and each part of it is
 * freed by its own release callback: no callback needs Python, its lock, or anything
 * else than the part.  So whoever has a part may release it in any thread, in the child
 * of a fork, after the stream, or when the interpreter is gone.
 */
#ifndef PYBITMAP_ARROW_H
#define PYBITMAP_ARROW_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/* The interface's three structs, field by field; released when `release` is NULL. */
struct hbarrow_schema {
    const char *format;
    const char *name;
    const char *metadata;
    int64_t flags;
    int64_t n_children;
    struct hbarrow_schema **children;
    struct hbarrow_schema *dictionary;
    void (*release)(struct hbarrow_schema *);
    void *private_data;
};

struct hbarrow_array {
    int64_t length;
    int64_t null_count;
    int64_t offset;
    int64_t n_buffers;
    int64_t n_children;
    const void **buffers;
    struct hbarrow_array **children;
    struct hbarrow_array *dictionary;
    void (*release)(struct hbarrow_array *);
    void *private_data;
};

struct hbarrow_stream {
    int (*get_schema)(struct hbarrow_stream *, struct hbarrow_schema *out);
    int (*get_next)(struct hbarrow_stream *, struct hbarrow_array *out);
    const char *(*get_last_error)(struct hbarrow_stream *);
    void (*release)(struct hbarrow_stream *);
    void *private_data;
};

/* A stream that is released already, for hbarrow_fill; NULL: no memory. */
struct hbarrow_stream *hbarrow_alloc(void);

/*
 * Gives it one batch, a struct of columns of uint64 without nulls: 1, "offset", or 2,
 * "offset" and "length".  values[row * ncolumns + column] is copied.  0, or -ENOMEM,
 * -EINVAL (no such number of columns): it is released as before.
 */
int hbarrow_fill(struct hbarrow_stream *stream, const uint64_t *values, uint64_t nrows,
                 unsigned ncolumns);

/* Releases the stream, if whoever took it has not moved it away, and frees it. */
void hbarrow_free(struct hbarrow_stream *stream);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
