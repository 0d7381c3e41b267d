/* SPDX-License-Identifier: MIT */
/*
 * Workload: once for each table that a user makes of a bitmap, some millions of rows.
 *
 * A consumer moves a struct by copying it and setting the old one's release to NULL, also
 * children of what it then releases.  So each struct that is handed out has memory of its
 * own behind private_data, which goes with it; who releases a parent releases those
 * children that are still there, and their structs in any case.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "arrow.h"

enum { HB_MOST_COLUMNS = 2 };

/* As columns of others are, by default: then tables can be put together. */
enum { HB_NULLABLE = 2 };

static const char *const hb_names[HB_MOST_COLUMNS] = { "offset", "length" };

/* Behind a stream: what it gives next, all in one piece. */
struct hb_table {
    struct hbarrow_array batch;
    unsigned ncolumns;
};

/* Behind the struct of a batch, and of a schema. */
struct hb_batch {
    const void *buffers[1];     /* no validity: nothing is null */
    struct hbarrow_array *children[HB_MOST_COLUMNS];
    struct hbarrow_array columns[HB_MOST_COLUMNS];
};

struct hb_fields {
    struct hbarrow_schema *children[HB_MOST_COLUMNS];
    struct hbarrow_schema fields[HB_MOST_COLUMNS];
};

/* Behind the struct of a column: the values follow. */
struct hb_column {
    const void *buffers[2];     /* no validity, and the values */
    uint64_t values[];
};

/* ---- schema -------------------------------------------------------------- */

static void hb_release_field(struct hbarrow_schema *field)
{
    field->release = NULL;
}

static void hb_release_schema(struct hbarrow_schema *schema)
{
    for (int64_t i = 0; i < schema->n_children; i++) {
        if (schema->children[i]->release) {
            schema->children[i]->release(schema->children[i]);
        }
    }
    free(schema->private_data);
    schema->release = NULL;
}

static int hb_get_schema(struct hbarrow_stream *stream, struct hbarrow_schema *out)
{
    const struct hb_table *table = stream->private_data;
    struct hb_fields *made = calloc(1, sizeof(*made));

    if (!made) {
        return ENOMEM;
    }
    for (unsigned i = 0; i < table->ncolumns; i++) {
        made->children[i] = &made->fields[i];
        made->fields[i] = (struct hbarrow_schema){
            .format = "L",
            .name = hb_names[i],
            .flags = HB_NULLABLE,
            .release = hb_release_field,
        };
    }
    *out = (struct hbarrow_schema){
        .format = "+s",
        .name = "",
        .n_children = table->ncolumns,
        .children = made->children,
        .release = hb_release_schema,
        .private_data = made,
    };
    return 0;
}

/* ---- values -------------------------------------------------------------- */

static void hb_release_column(struct hbarrow_array *column)
{
    free(column->private_data);
    column->release = NULL;
}

static void hb_release_batch(struct hbarrow_array *batch)
{
    for (int64_t i = 0; i < batch->n_children; i++) {
        if (batch->children[i]->release) {
            batch->children[i]->release(batch->children[i]);
        }
    }
    free(batch->private_data);
    batch->release = NULL;
}

/* One value in `step`, from values[0] on.  False: no memory. */
static bool hb_make_column(struct hbarrow_array *out, const uint64_t *values, uint64_t nrows,
                           unsigned step)
{
    struct hb_column *made;

    if (nrows > (INT64_MAX - sizeof(*made)) / sizeof(made->values[0])) {
        return false;
    }
    made = malloc(sizeof(*made) + (size_t)nrows * sizeof(made->values[0]));
    if (!made) {
        return false;
    }
    made->buffers[0] = NULL;
    made->buffers[1] = made->values;
    for (uint64_t i = 0; i < nrows; i++) {
        made->values[i] = values[i * step];
    }
    *out = (struct hbarrow_array){
        .length = (int64_t)nrows,
        .n_buffers = 2,
        .buffers = made->buffers,
        .release = hb_release_column,
        .private_data = made,
    };
    return true;
}

static bool hb_make_batch(struct hbarrow_array *out, const uint64_t *values, uint64_t nrows,
                          unsigned ncolumns)
{
    struct hb_batch *made = calloc(1, sizeof(*made));

    if (!made) {
        return false;
    }
    *out = (struct hbarrow_array){
        .length = (int64_t)nrows,
        .n_buffers = 1,
        .n_children = ncolumns,
        .buffers = made->buffers,
        .children = made->children,
        .release = hb_release_batch,
        .private_data = made,
    };
    for (unsigned i = 0; i < ncolumns; i++) {
        made->children[i] = &made->columns[i];
    }
    for (unsigned i = 0; i < ncolumns; i++) {
        if (!hb_make_column(&made->columns[i], values + i, nrows, ncolumns)) {
            out->release(out);  /* those that there are */
            return false;
        }
    }
    return true;
}

/* ---- the stream ---------------------------------------------------------- */

/* The batch is moved out; then the end, which is a released array. */
static int hb_get_next(struct hbarrow_stream *stream, struct hbarrow_array *out)
{
    struct hb_table *table = stream->private_data;

    *out = table->batch;
    table->batch.release = NULL;
    return 0;
}

/* What can fail has no text besides its errno. */
static const char *hb_get_last_error(struct hbarrow_stream *stream)
{
    (void)stream;
    return NULL;
}

static void hb_release_stream(struct hbarrow_stream *stream)
{
    struct hb_table *table = stream->private_data;

    if (table->batch.release) {
        table->batch.release(&table->batch);
    }
    free(table);
    stream->release = NULL;
}

struct hbarrow_stream *hbarrow_alloc(void)
{
    return calloc(1, sizeof(struct hbarrow_stream));
}

int hbarrow_fill(struct hbarrow_stream *stream, const uint64_t *values, uint64_t nrows,
                 unsigned ncolumns)
{
    struct hb_table *table;

    if (ncolumns < 1 || ncolumns > HB_MOST_COLUMNS) {
        return -EINVAL;
    }
    table = calloc(1, sizeof(*table));
    if (!table || !hb_make_batch(&table->batch, values, nrows, ncolumns)) {
        free(table);
        return -ENOMEM;
    }
    table->ncolumns = ncolumns;
    *stream = (struct hbarrow_stream){
        .get_schema = hb_get_schema,
        .get_next = hb_get_next,
        .get_last_error = hb_get_last_error,
        .release = hb_release_stream,
        .private_data = table,
    };
    return 0;
}

void hbarrow_free(struct hbarrow_stream *stream)
{
    if (stream && stream->release) {
        stream->release(stream);
    }
    free(stream);
}
