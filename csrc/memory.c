/* SPDX-License-Identifier: MIT */
/*
 * Workload: an emulator's RAM, some GiB, of which some thousand pages are written to
 * between two collects.  The kernel looks at every entry of the page tables and answers
 * runs of pages, which are few: so the answer goes through a small array on the stack.
 *
 * The constants and structs are declared here, as the kernel's documentation has them
 * (admin-guide/mm/pagemap.rst, admin-guide/mm/userfaultfd.rst): systems have kernels that
 * are newer than their headers.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* syscall */
#endif

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "memory.h"

#ifdef __linux__

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "process.h"

/* ---- what the kernel offers ---------------------------------------------- */

struct hb_api {
    uint64_t api, features, ioctls;
};

struct hb_register {
    uint64_t start, nbytes, mode, ioctls;
};

struct hb_protect {
    uint64_t start, nbytes, mode;
};

struct hb_run {
    uint64_t start, end, categories;
};

struct hb_scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define HB_NEW_FAULTFD _IO(0xAA, 0x00)      /* of /dev/userfaultfd */
#define HB_API         _IOWR(0xAA, 0x3F, struct hb_api)
#define HB_REGISTER    _IOWR(0xAA, 0x00, struct hb_register)
#define HB_PROTECT     _IOWR(0xAA, 0x06, struct hb_protect)
#define HB_SCAN        _IOWR('f', 16, struct hb_scan)

#define HB_API_VERSION     UINT64_C(0xAA)
#define HB_USER_MODE_ONLY  1
#define HB_MODE_WP         UINT64_C(2)      /* of a registration */
#define HB_PROTECT_WP      UINT64_C(1)      /* of a protection */
#define HB_WP_MATCHING     UINT64_C(1)      /* of a scan: protect what it answers, ... */
#define HB_CHECK_WPASYNC   UINT64_C(2)      /* ... refuse memory that is not registered */
#define HB_IS_WRITTEN      UINT64_C(2)      /* a category */

static const uint64_t hb_wanted = HBMEM_WP_ASYNC | HBMEM_WP_UNPOPULATED;

/* As many as the kernel gathers before it copies them out. */
#define HB_RUNS 512

/* The kernel's writes (read(2) into the memory) are recorded also by one that does not
 * trap its faults, since protection that is asynchronous traps nobody: so this needs no
 * rights. */
static int hb_new_faultfd(void)
{
#ifdef SYS_userfaultfd
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | HB_USER_MODE_ONLY);
#else
    int fd = (errno = ENOSYS, -1);
#endif
    int err = errno, device;

    if (fd < 0) {           /* a filter of system calls, as those of containers */
        device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device >= 0) {
            fd = ioctl(device, HB_NEW_FAULTFD, O_CLOEXEC | O_NONBLOCK);
            (void)close(device);
        }
    }
    return fd < 0 ? -err : fd;
}

/* Of what is wanted, what the kernel has not. */
static uint64_t hb_lacking(void)
{
    struct hb_api api = { HB_API_VERSION, 0, 0 };
    int fd = hb_new_faultfd();

    if (fd >= 0) {
        (void)ioctl(fd, HB_API, &api);
        (void)close(fd);
    }
    return hb_wanted & ~api.features;
}

/* ---- recording ----------------------------------------------------------- */

static uint64_t hb_page_bytes(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

static uint64_t hb_whole_pages(const HBMemory *m)
{
    return (m->nbytes + hb_page_bytes() - 1) & ~(hb_page_bytes() - 1);
}

/* This writes nothing; the kernel only says whether it is all there. */
static bool hb_is_mapped(const HBMemory *m)
{
    return msync((void *)(uintptr_t)m->address, (size_t)hb_whole_pages(m), MS_ASYNC) == 0 ||
           errno != ENOMEM;
}

static struct hb_scan hb_scan_of(const HBMemory *m, struct hb_run *runs)
{
    return (struct hb_scan) {
        .size = sizeof(struct hb_scan), .start = m->address, .end = m->address,
        .vec = (uintptr_t)runs, .vec_len = HB_RUNS,
        .category_mask = HB_IS_WRITTEN, .return_mask = HB_IS_WRITTEN,
    };
}

static int hb_failed_at(HBMemory *m, int step, int code)
{
    hbmem_close(m);
    m->step = step;
    return code;
}

int hbmem_open(HBMemory *m, uint64_t address, uint64_t nbytes)
{
    struct hb_run runs[1];
    struct hb_scan scan;
    struct hb_api api = { HB_API_VERSION, hb_wanted, 0 };
    struct hb_register registration;
    struct hb_protect protection;

    m->step = 0;
    m->address = address;
    m->nbytes = nbytes;
    m->process = hbprocess_number();
    m->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (m->pagemap < 0) {
        return hb_failed_at(m, HBMEM_PAGEMAP, -errno);
    }
    scan = hb_scan_of(m, runs);
    scan.start = scan.end = 0;      /* of nothing: is it there? */
    if (ioctl(m->pagemap, HB_SCAN, &scan) < 0) {
        return hb_failed_at(m, HBMEM_SCAN, -errno);
    }
    m->uffd = hb_new_faultfd();
    if (m->uffd < 0) {
        return hb_failed_at(m, HBMEM_FAULTFD, m->uffd);
    }
    if (ioctl(m->uffd, HB_API, &api) < 0) {
        int err = errno;

        m->lacking = hb_lacking();
        return hb_failed_at(m, HBMEM_FEATURES, -err);
    }
    if (!nbytes) {
        return 0;
    }
    if (!hb_is_mapped(m)) {
        return hb_failed_at(m, HBMEM_MAPPED, -ENXIO);
    }
    registration = (struct hb_register) { address, hb_whole_pages(m), HB_MODE_WP, 0 };
    if (ioctl(m->uffd, HB_REGISTER, &registration) < 0) {
        return hb_failed_at(m, HBMEM_REGISTER, -errno);
    }
    /* Pages that are not there yet, too; so the page tables for all of it are now. */
    protection = (struct hb_protect) { address, hb_whole_pages(m), HB_PROTECT_WP };
    if (ioctl(m->uffd, HB_PROTECT, &protection) < 0) {
        return hb_failed_at(m, HBMEM_PROTECT, -errno);
    }
    return 0;
}

void hbmem_close(HBMemory *m)
{
    int uffd = m->uffd, pagemap = m->pagemap;

    m->uffd = m->pagemap = -1;
    if (uffd >= 0) {        /* with the last descriptor goes the registration */
        (void)close(uffd);
    }
    if (pagemap >= 0) {
        (void)close(pagemap);
    }
}

/* ---- collecting ---------------------------------------------------------- */

/* The end of the memory may lie within the last page. */
static void hb_mark_run(const HBMemory *m, HBitmap *log, uint64_t start, uint64_t end)
{
    uint64_t stop = end < m->nbytes ? end : m->nbytes;

    (void)hbitmap_set(log, start, stop - start);
}

static void hb_mark_different(const HBMemory *m, HBitmap *log, uint64_t start, uint64_t end,
                              const char *same)
{
    const char *memory = (const char *)(uintptr_t)m->address;
    uint64_t page = hb_page_bytes();

    for (; start < end; start += page) {
        uint64_t left = m->nbytes - start, nbytes = left < page ? left : page;

        if (memcmp(memory + start, same + start, (size_t)nbytes) != 0) {
            hb_mark_run(m, log, start, start + page);
        }
    }
}

static int hb_scan_all(HBMemory *m, HBitmap *log, const char *same, uint64_t flags)
{
    struct hb_run runs[HB_RUNS];
    struct hb_scan scan = hb_scan_of(m, runs);

    if (m->process != hbprocess_number()) {
        return -ESRCH;
    }
    if (m->pagemap < 0) {
        return -EBADF;
    }
    scan.flags = flags;
    scan.end += hb_whole_pages(m);
    while (scan.start < scan.end) {
        int n = ioctl(m->pagemap, HB_SCAN, &scan);

        if (n < 0) {
            return -errno;
        }
        for (int i = 0; i < n; i++) {
            uint64_t start = runs[i].start - m->address, end = runs[i].end - m->address;

            if (same) {     /* after the page was protected: a write comes before or after */
                hb_mark_different(m, log, start, end, same);
            } else {
                hb_mark_run(m, log, start, end);
            }
        }
        scan.start = scan.walk_end;
    }
    /* A scan passes over what is not mapped. */
    return m->nbytes && !hb_is_mapped(m) ? -ENXIO : 0;
}

int hbmem_collect(HBMemory *m, HBitmap *log, const void *same)
{
    return hb_scan_all(m, log, same, HB_WP_MATCHING | HB_CHECK_WPASYNC);
}

int hbmem_look(HBMemory *m, HBitmap *log)
{
    return hb_scan_all(m, log, NULL, HB_CHECK_WPASYNC);
}

#else

int hbmem_open(HBMemory *m, uint64_t address, uint64_t nbytes)
{
    m->step = HBMEM_SYSTEM;
    (void)address;
    (void)nbytes;
    return -ENOSYS;
}

void hbmem_close(HBMemory *m)
{
    (void)m;
}

int hbmem_collect(HBMemory *m, HBitmap *log, const void *same)
{
    (void)m;
    (void)log;
    (void)same;
    return -ENOSYS;
}

int hbmem_look(HBMemory *m, HBitmap *log)
{
    (void)m;
    (void)log;
    return -ENOSYS;
}

#endif

/* ---- copies -------------------------------------------------------------- */

void hbmem_copy_sparse(void *dst, const void *src, uint64_t nbytes)
{
    static const char zeros[4096];
    char *to = dst;
    const char *from = src;

    while (nbytes) {
        size_t n = nbytes < sizeof(zeros) ? (size_t)nbytes : sizeof(zeros);

        if (memcmp(from, zeros, n) != 0) {
            memcpy(to, from, n);
        }
        to += n;
        from += n;
        nbytes -= n;
    }
}
