/* SPDX-License-Identifier: MIT */
/*
 * A plugin for QEMU's TCG: the pages that a guest stores to, in a file.
 *
 *     qemu-x86_64 -plugin ./libdirty.so,out=FILE[,granularity=4096][,base=0][,size=512G] PROGRAM
 *
 * In user mode the bits are for the program's virtual addresses, in system mode for the
 * guest's physical ones as QEMU numbers its RAM; stores to devices are left out.
 *
 * The file is a header of HEADER bytes and the leaf words of an HBitmap, mapped while QEMU
 * runs.  So a mark that was made is in the file, whatever becomes of QEMU (not of the machine):
 *
 *     0       a line of JSON: what the bits are for, padded with blanks
 *     4080    uint64_t: stores outside [base, base + size), or of which QEMU does not say where
 *     4088    uint64_t: 1 once QEMU has come to its end by itself
 *     4096    the leaf, in the machine's byte order
 *
 * Threads: each vCPU marks by itself, without a lock.  Nobody clears.  Fork: the child of a
 * program that forks has another address space, so it is not recorded.  Twin: a file that is
 * there already is refused.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <hbitmap.h>

#include "qemu_api.h"

#define EXPORT __attribute__((visibility("default")))

enum { HEADER = 4096, OUTSIDE = 4080, ENDED = 4088, PAGE = 4096, LONGEST = 128 };

EXPORT extern int qemu_plugin_version;
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                               char **argv);
int qemu_plugin_version = QEMU_PLUGIN_VERSION;

struct options {
    const char *out;
    uint64_t granularity, base, size;
};

static HBitmap *bitmap;     /* NULL in the child of a fork */
static uint64_t base, size;
static unsigned shift;      /* log2 of the granularity */
static const _Atomic uint64_t *leaf;
static bool is_aarch64;
static atomic_bool any_translated;
static _Atomic uint64_t *outside, *ended;

/* ---- stores ------------------------------------------------------------- */

/* Whoever asks for stores alone is called at loads as well by QEMU 7.2, so each callback asks. */

/* Is all dirty where at most LONGEST bytes are stored?  As a rule it is, and then nothing needs to be
 * asked, not even whether it is a store.  Nobody clears, and readers look at the leaf alone, so its
 * bit says all; near the end of a group it is not known which one a store touches. */
static inline bool is_dirty(uint64_t address)
{
    uint64_t offset = address - base, group = offset >> shift;

    return offset < size && (offset + LONGEST - 1) >> shift == group &&
           atomic_load_explicit(&leaf[group / 64], memory_order_relaxed) >> group % 64 & 1;
}

static void mark(HBitmap *hb, uint64_t address, uint64_t nbytes)
{
    uint64_t offset = address - base;

    if (hbitmap_set(hb, offset, nbytes) == 0) {
        return;
    }
    /* It leaves the range: what is inside is marked. */
    atomic_fetch_add(outside, 1);
    if (offset < size) {
        (void)hbitmap_set(hb, offset, size - offset);
    } else if (offset + nbytes > 0 && offset + nbytes < nbytes) {
        (void)hbitmap_set(hb, 0, offset + nbytes);      /* it began below the base */
    }
}

static void user_store(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *unused)
{
    HBitmap *hb = bitmap;

    (void)vcpu, (void)unused;
    if (hb && !is_dirty(vaddr) && qemu_plugin_mem_is_store(info)) {
        mark(hb, vaddr, UINT64_C(1) << qemu_plugin_mem_size_shift(info));
    }
}

/* Of a store that is in one page. */
static void store_in_ram(qemu_plugin_meminfo_t info, uint64_t vaddr, uint64_t nbytes)
{
    struct qemu_plugin_hwaddr *address = qemu_plugin_get_hwaddr(info, vaddr);

    if (!address) {
        atomic_fetch_add(outside, 1);
    } else if (!qemu_plugin_hwaddr_is_io(address)) {
        mark(bitmap, qemu_plugin_hwaddr_phys_addr(address), nbytes);
    }
}

static void system_store(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *unused)
{
    uint64_t nbytes = UINT64_C(1) << qemu_plugin_mem_size_shift(info);
    uint64_t here = PAGE - vaddr % PAGE;

    (void)vcpu, (void)unused;
    if (!qemu_plugin_mem_is_store(info)) {
        return;
    }
    if (nbytes <= here) {
        store_in_ram(info, vaddr, nbytes);
    } else {        /* the next page may be anywhere */
        store_in_ram(info, vaddr, here);
        store_in_ram(info, vaddr + here, nbytes - here);
    }
}

/*
 * Some instructions are carried out by QEMU's own code, on its own pointers, and no callback says
 * what they write.  On these machines it is known which do, by looking (QEMU 7.2); the
 * plugin refuses the others (s390x has MVC and many more, PowerPC dcbz).
 */
static bool is_known(const char *target)
{
    static const char *const known[] = { "x86_64", "i386", "aarch64", "arm", "riscv64", "riscv32" };

    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (strcmp(target, known[i]) == 0) {
            return true;
        }
    }
    return false;
}

/* Does this one store unseen?  aarch64: DC ZVA, GVA, GZVA, and stores of SVE. */
static bool is_unseen(const struct qemu_plugin_insn *insn)
{
    uint32_t word;

    if (!is_aarch64) {
        return false;
    }
#if QEMU_PLUGIN_VERSION >= 3
    if (qemu_plugin_insn_data(insn, &word, sizeof(word)) != sizeof(word)) {
        return false;
    }
#else
    memcpy(&word, qemu_plugin_insn_data(insn), sizeof(word));
#endif
    word = le32toh(word);
    return ((word & 0xffffff00) == 0xd50b7400 && (word >> 5 & 7) != 0) || word >> 25 == 0x72;
}

static void unseen_store(unsigned vcpu, void *unused)
{
    (void)vcpu, (void)unused;
    if (bitmap) {
        atomic_fetch_add(outside, 1);
    }
}

static void translated(struct qemu_plugin_tb *tb, qemu_plugin_vcpu_mem_cb_t cb)
{
    size_t n = qemu_plugin_tb_n_insns(tb);

    atomic_store(&any_translated, true);
    for (size_t i = 0; i < n; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);

        qemu_plugin_register_vcpu_mem_cb(insn, cb, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_W, NULL);
        if (is_unseen(insn)) {
            qemu_plugin_register_vcpu_insn_exec_cb(insn, unseen_store, QEMU_PLUGIN_CB_NO_REGS,
                                                   NULL);
        }
    }
}

static void user_translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    translated(tb, user_store);
}

static void system_translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    translated(tb, system_store);
}

/* ---- begin and end ------------------------------------------------------ */

static void at_exit(qemu_plugin_id_t id, void *unused)
{
    (void)id, (void)unused;
    if (bitmap && !atomic_load(&any_translated)) {
        fprintf(stderr, "libdirty: QEMU translated nothing, so nothing was recorded; with KVM and other "
                "accelerators it never does: use -accel tcg\n");
        atomic_fetch_add(outside, 1);   /* for who reads the file */
    }
    if (bitmap) {
        atomic_store(ended, 1);     /* threads may still store: nothing is freed */
    }
}

static void in_the_child(void)
{
    bitmap = NULL;
}

__attribute__((format(printf, 1, 2)))
static int refuse(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fprintf(stderr, "libdirty: ");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return -1;
}

/* A number, perhaps with K, M, G or T behind it. */
static bool parse(const char *text, uint64_t *number)
{
    static const char units[] = "KMGT";
    const char *unit;
    char *end;

    errno = 0;
    *number = strtoull(text, &end, 0);
    if (errno || end == text || *text == '-' || *text == ' ' || *text == '+') {
        return false;
    }
    unit = *end ? strchr(units, *end) : NULL;
    if (unit) {
        unsigned shift = 10 * (unsigned)(unit - units + 1);

        if (*number > UINT64_MAX >> shift) {
            return false;
        }
        *number <<= shift;
        end++;
    }
    return *end == '\0';
}

static int read_options(struct options *options, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        const char *value = strchr(argv[i], '=');
        size_t length = value ? (size_t)(value++ - argv[i]) : 0;
        uint64_t *number = NULL;

        if (length == 3 && strncmp(argv[i], "out", length) == 0) {
            options->out = value;
            continue;
        } else if (length == 11 && strncmp(argv[i], "granularity", length) == 0) {
            number = &options->granularity;
        } else if (length == 4 && strncmp(argv[i], "base", length) == 0) {
            number = &options->base;
        } else if (length == 4 && strncmp(argv[i], "size", length) == 0) {
            number = &options->size;
        }
        if (!number) {
            return refuse("'%s' is no option: there are out=FILE, granularity=, base=, size=",
                          argv[i]);
        }
        if (!parse(value, number)) {
            return refuse("'%s' is no number of bytes, as 4096, 0x1000, 64K, 512G", argv[i]);
        }
    }
    if (!options->out || !*options->out) {
        return refuse("say where the bitmap goes: out=FILE");
    }
    if (!options->granularity || options->granularity & (options->granularity - 1)) {
        return refuse("granularity=%" PRIu64 " is no power of two", options->granularity);
    }
    if (!options->size || options->size % options->granularity ||
        options->base % options->granularity || options->size > INT64_MAX ||
        options->base > UINT64_MAX - options->size) {
        return refuse("base=%" PRIu64 " and size=%" PRIu64 " must be multiples of the granularity,"
                      " size at least one and less than 2^63, and their sum less than 2^64",
                      options->base, options->size);
    }
    if (options->size / options->granularity > UINT64_C(1) << HBITMAP_LOG_MAX_SIZE) {
        return refuse("%" PRIu64 " bytes are too many for a granularity of %" PRIu64,
                      options->size, options->granularity);
    }
    return 0;
}

/* Lays the file out over nwords words and maps it; NULL with errno. */
static char *map_file(const char *path, const char *header, size_t nbytes)
{
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666), err;
    char *file = MAP_FAILED;

    if (fd < 0) {
        return NULL;
    }
    /* All of it: on a full disk a mark would kill QEMU. */
    err = posix_fallocate(fd, 0, (off_t)nbytes);
    if (!err) {
        file = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        err = file == MAP_FAILED ? errno : 0;
    }
    close(fd);
    if (err) {
        unlink(path);
        errno = err;
        return NULL;
    }
    memset(file, ' ', OUTSIDE);
    memcpy(file, header, strlen(header));
    file[OUTSIDE - 1] = '\n';
    return file;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                               char **argv)
{
    struct options options = { NULL, PAGE, 0, UINT64_C(512) << 30 };
    const bool is_system = info->system_emulation;
    const uint16_t one = 1;
    char header[1024], *file;
    size_t nwords;

    if (read_options(&options, argc, argv) < 0) {
        return -1;
    }
    if (!is_known(info->target_name)) {
        return refuse("QEMU does not tell a plugin all that %s writes; this one is for x86_64, i386, "
                      "aarch64, arm, riscv64 and riscv32", info->target_name);
    }
    is_aarch64 = strcmp(info->target_name, "aarch64") == 0;
    while (UINT64_C(1) << shift < options.granularity) {
        shift++;
    }
    nwords = (size_t)((options.size / options.granularity + 63) / 64);
    (void)snprintf(header, sizeof(header),
                   "{\"pybitmap\": \"leaf\", \"version\": 1, \"addresses\": \"%s\", "
                   "\"target\": \"%s\", \"base\": %" PRIu64 ", \"size\": %" PRIu64
                   ", \"granularity\": %" PRIu64 ", \"byteorder\": \"%s\", \"leaf\": %d}",
                   is_system ? "physical" : "virtual", info->target_name, options.base,
                   options.size, options.granularity, *(const char *)&one ? "little" : "big",
                   HEADER);
    file = map_file(options.out, header, HEADER + nwords * sizeof(uint64_t));
    if (!file && errno == EEXIST) {
        return refuse("%s is there already: remove it, or name another file", options.out);
    }
    if (!file) {
        return refuse("%s: %s", options.out, strerror(errno));
    }
    base = options.base;
    size = options.size;
    outside = (_Atomic uint64_t *)(void *)(file + OUTSIDE);
    ended = (_Atomic uint64_t *)(void *)(file + ENDED);
    leaf = (const _Atomic uint64_t *)(const void *)(file + HEADER);
    bitmap = hbitmap_alloc_on(size, (int)shift, (uint64_t *)(void *)(file + HEADER), nwords);
    if (!bitmap || (errno = pthread_atfork(NULL, NULL, in_the_child)) != 0) {
        unlink(options.out);
        return refuse("%s", strerror(errno));
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, is_system ? system_translated : user_translated);
    qemu_plugin_register_atexit_cb(id, at_exit, NULL);
    return 0;
}
