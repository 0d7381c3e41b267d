/* SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         /* pipe2, MAP_ANONYMOUS, syscall */
#endif

#include <errno.h>

#include "kvm.h"

#ifdef __linux__

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "words.h"

/* ---- what KVM takes, by its documentation: headers may be older than the kernel ---- */

struct hb_kvm_log {
    uint32_t slot, npages;      /* npages: to clear */
    uint64_t first_page;        /* to clear */
    uint64_t words;             /* address */
};

struct hb_kvm_get_log {
    uint32_t slot, padding;
    uint64_t words;
};

struct hb_kvm_cap {
    uint32_t cap, flags;
    uint64_t args[4];
    uint8_t padding[64];
};

/* An entry of a ring. */
struct hb_kvm_gfn {
    uint32_t flags, slot;
    uint64_t page;
};

#define HB_KVM_CHECK_EXTENSION _IO(0xae, 0x03)
#define HB_KVM_GET_DIRTY_LOG _IOW(0xae, 0x42, struct hb_kvm_get_log)
#define HB_KVM_ENABLE_CAP _IOW(0xae, 0xa3, struct hb_kvm_cap)
#define HB_KVM_CLEAR_DIRTY_LOG _IOWR(0xae, 0xc0, struct hb_kvm_log)
#define HB_KVM_RESET_DIRTY_RINGS _IO(0xae, 0xc7)

enum {
    HB_KVM_CAP_MANUAL = 168,
    HB_KVM_CAP_RING = 192,
    HB_KVM_CAP_RING_ACQ_REL = 223,
};

/* Of an entry: 0: free; DIRTY: written to; RESET: harvested, and not free yet. */
#define HB_KVM_DIRTY UINT32_C(1)
#define HB_KVM_RESET UINT32_C(2)

/* In pages, where the rings lie in what a vCPU has to map. */
#if defined(__x86_64__) || defined(__aarch64__) || defined(__riscv) || defined(__loongarch__)
#define HB_KVM_RING_AT 64
#else
#define HB_KVM_RING_AT 0        /* there are none */
#endif

/* A slot has no more pages; a multiple of 64. */
#define HB_KVM_MOST_PAGES (UINT64_C(1) << 31)

/* So many words of a log, 1 GiB of memory, are cleared by a call: while it runs,
 * writes that KVM would have to record wait. */
enum { HB_KVM_AT_ONCE = 1 << 12 };

/* ---- what is held -------------------------------------------------------- */

struct hb_ring {
    struct hb_kvm_gfn *entries;
    uint32_t next;              /* where the next one appears, if `known` */
    uint32_t begin;             /* of those that were harvested, and */
    uint64_t harvested;         /* how many, until KVM has given all back */
    bool known;
    bool torn;                  /* from the first time on that it was dirty all over: hb_mend */
};

/* A page that was harvested, and is not marked yet. */
struct hb_page {
    uint32_t slot;
    uint64_t page;
};

struct HBKvm {
    int fd;                     /* of the machine, our own */
    unsigned shift;             /* log2 of the bytes of a page */
    /* a log: */
    uint32_t slot;
    bool manual;
    bool can_clear;             /* also if it is not manual */
    uint64_t npages, nwords;
    uint64_t *words;            /* the last one lies before a page that nobody can write to */
    void *mapped;
    size_t nmapped;
    /* rings: */
    size_t nrings, nslots, npending;
    uint32_t nentries;          /* of a ring, a power of two */
    struct hb_ring *rings;
    struct hbkvm_slot *slots;
    struct hb_page *pending;    /* room for all entries of all rings */
    bool all_pending;           /* every page is: entries were lost */
};

/* ioctl whose result is 0 or more, or a negative errno. */
static int hb_kvm(int fd, unsigned long request, void *argument)
{
    int result;

    do {
        result = ioctl(fd, request, argument);
    } while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

static int hb_kvm_has(int fd, uintptr_t cap)
{
    return hb_kvm(fd, HB_KVM_CHECK_EXTENSION, (void *)cap);
}

/*
 * Is fd open, and what KVM calls `kind`?  Then 0, and *id is what comes behind that
 * name.  Asked by name: an ioctl on something else may mean anything there, and waits on a
 * vCPU that runs.
 */
static int hb_kvm_is(int fd, const char *kind, unsigned long *id)
{
    char path[32], name[64];
    size_t length = strlen(kind);
    ssize_t n;

    if (fcntl(fd, F_GETFD) < 0) {
        return -errno;
    }
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    n = readlink(path, name, sizeof(name) - 1);
    if (n < 0) {
        return -errno;
    }
    name[n] = 0;
    if (strncmp(name, kind, length) != 0) {
        return -ENOTTY;
    }
    *id = name[length] == ':' ? strtoul(name + length + 1, NULL, 10) : 0;
    return name[length] && name[length] != ':' ? -ENOTTY : 0;
}

static int hb_kvm_hold(HBKvm **made, int vm_fd)
{
    unsigned long id;
    int err = hb_kvm_is(vm_fd, "anon_inode:kvm-vm", &id);
    HBKvm *kvm;

    if (err) {
        return err;
    }
    kvm = calloc(1, sizeof(*kvm));
    if (!kvm) {
        return -ENOMEM;
    }
    kvm->fd = fcntl(vm_fd, F_DUPFD_CLOEXEC, 0);
    if (kvm->fd < 0) {
        err = -errno;
        free(kvm);
        return err;
    }
    kvm->shift = (unsigned)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
    *made = kvm;
    return 0;
}

int hbkvm_machine(HBKvm *const *held)
{
    return *held ? (*held)->fd : -1;
}

bool hbkvm_same(int vm_fd, int other_fd)
{
#ifdef SYS_kcmp
    const int file = 0;     /* KCMP_FILE */

    return syscall(SYS_kcmp, getpid(), getpid(), file, vm_fd, other_fd) == 0;
#else
    (void)vm_fd, (void)other_fd;
    return false;
#endif
}

void hbkvm_close(HBKvm **held)
{
    HBKvm *kvm = *held;

    if (!kvm) {
        return;
    }
    *held = NULL;
    if (kvm->mapped) {
        (void)munmap(kvm->mapped, kvm->nmapped);
    }
    for (size_t i = 0; i < kvm->nrings; i++) {
        (void)munmap(kvm->rings[i].entries, kvm->nentries * sizeof(struct hb_kvm_gfn));
    }
    free(kvm->rings);
    free(kvm->slots);
    free(kvm->pending);
    (void)close(kvm->fd);
    free(kvm);
}

/* ---- the log ------------------------------------------------------------- */

static int hb_clear_log(const HBKvm *kvm, uint64_t first_page, uint64_t npages)
{
    struct hb_kvm_log log = {
        .slot = kvm->slot, .npages = (uint32_t)npages, .first_page = first_page,
        .words = (uintptr_t)(kvm->words + first_page / 64),
    };

    return hb_kvm(kvm->fd, HB_KVM_CLEAR_DIRTY_LOG, &log);
}

/*
 * How many pages the slot has: what may be cleared begins at a multiple of 64 in it, and
 * is as long as a multiple of 64 or reaches its end.  Nothing is cleared: kvm->words
 * is one word, zero.
 */
static int hb_slot_pages(const HBKvm *kvm, uint64_t *npages)
{
    struct hb_kvm_log log = { .slot = kvm->slot, .words = (uintptr_t)kvm->words };
    uint64_t low = 0, high = HB_KVM_MOST_PAGES / 64;
    int err = hb_kvm(kvm->fd, HB_KVM_CLEAR_DIRTY_LOG, &log);

    if (err < 0) {
        return err;
    }
    while (low < high) {
        uint64_t middle = (low + high + 1) / 2;

        log.first_page = middle * 64;
        err = hb_kvm(kvm->fd, HB_KVM_CLEAR_DIRTY_LOG, &log);
        if (err < 0 && err != -EINVAL) {
            return err;
        }
        low = err < 0 ? low : middle;
        high = err < 0 ? middle - 1 : high;
    }
    log.first_page = low * 64;
    for (log.npages = 63; log.npages; log.npages--) {
        if (hb_kvm(kvm->fd, HB_KVM_CLEAR_DIRTY_LOG, &log) >= 0) {
            break;
        }
    }
    *npages = low * 64 + log.npages;
    return 0;
}

/*
 * Has the slot npages still?  Else -EINVAL.  By the same rules one call says it, which
 * clears nothing: a part of a word has to reach the end.  Where npages has none, it is
 * refused of fewer pages, and for more a fetch had no room: see hb_take_words.
 */
static int hb_check_pages(const HBKvm *kvm)
{
    uint64_t zero = 0;
    struct hb_kvm_log log = {
        .slot = kvm->slot, .npages = kvm->npages % 64, .words = (uintptr_t)&zero,
        .first_page = kvm->npages - kvm->npages % 64,
    };

    return hb_kvm(kvm->fd, HB_KVM_CLEAR_DIRTY_LOG, &log);
}

/* A slot that is made anew may have more pages than there is room for, and KVM does not
 * ask: so what lies behind the words cannot be written to. */
static int hb_take_words(HBKvm *kvm, uint64_t npages)
{
    size_t page = (size_t)1 << kvm->shift, nbytes;

    kvm->npages = npages;
    kvm->nwords = (npages + 63) / 64;
    nbytes = (size_t)(kvm->nwords * 8 + page - 1) & ~(page - 1);
    if (kvm->mapped) {
        (void)munmap(kvm->mapped, kvm->nmapped);
    }
    kvm->nmapped = nbytes + page;
    kvm->mapped = mmap(NULL, kvm->nmapped, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (kvm->mapped == MAP_FAILED) {
        kvm->mapped = NULL;
        return -ENOMEM;
    }
    kvm->words = (uint64_t *)((char *)kvm->mapped + nbytes) - kvm->nwords;
    return mprotect((char *)kvm->mapped + nbytes, page, PROT_NONE) < 0 ? -errno : 0;
}

static int hb_open_log(HBKvm *kvm, uint64_t *npages, int flags)
{
    int can = hb_kvm_has(kvm->fd, HB_KVM_CAP_MANUAL), err;
    uint64_t wanted = *npages;

    if (can < 0) {
        return can;
    }
    kvm->can_clear = can > 0;
    err = hb_take_words(kvm, 64);
    if (!err && can) {
        err = hb_slot_pages(kvm, npages);
        if (!err && *npages != wanted) {
            return -ERANGE;
        }
    }
    if (err) {
        return err;
    }
    if (flags & HBKVM_INITIALLY_SET && !(can & HBKVM_INITIALLY_SET)) {
        return -EOPNOTSUPP;
    }
    if (flags & can & HBKVM_MANUAL) {
        struct hb_kvm_cap cap = { .cap = HB_KVM_CAP_MANUAL, .args = { (uint64_t)flags } };

        err = hb_kvm(kvm->fd, HB_KVM_ENABLE_CAP, &cap);
        kvm->manual = true;
    }
    return err < 0 ? err : hb_take_words(kvm, wanted);
}

int hbkvm_open_log(HBKvm **held, int vm_fd, uint32_t slot, uint64_t *npages, int flags)
{
    HBKvm *kvm = NULL;
    int err = hb_kvm_hold(&kvm, vm_fd);

    if (!err) {
        kvm->slot = slot;
        err = hb_open_log(kvm, npages, flags);
    }
    if (err) {
        hbkvm_close(&kvm);
        return err;
    }
    *held = kvm;
    return 0;
}

/* Clears what the words have.  Zeros at both ends of a piece are left out, and so are
 * pieces of zeros. */
static int hb_clear_words(const HBKvm *kvm)
{
    for (uint64_t word = 0; word < kvm->nwords; word += HB_KVM_AT_ONCE) {
        uint64_t start = UINT64_MAX, stop = 0, last;
        int err;

        for (uint64_t at = word; at < word + HB_KVM_AT_ONCE && at < kvm->nwords; at += 64) {
            uint64_t left = kvm->nwords - at;
            uint64_t named = hb_nonzero(kvm->words + at, left < 64 ? left : 64);

            if (named) {
                start = start == UINT64_MAX ? at + (uint64_t)__builtin_ctzll(named) : start;
                stop = at + 64 - (uint64_t)__builtin_clzll(named);
            }
        }
        if (!stop) {
            continue;
        }
        last = stop == kvm->nwords ? kvm->npages : stop * 64;
        err = hb_clear_log(kvm, start * 64, last - start * 64);
        if (err < 0) {
            return err;
        }
    }
    return 0;
}

int hbkvm_fetch_log(HBKvm *const *held, HBitmap *hb, uint64_t first)
{
    const HBKvm *kvm = *held;
    struct hb_kvm_get_log log = { 0 };
    int err, marked;

    if (!kvm) {
        return -EBADF;
    }
    log.slot = kvm->slot;
    log.words = (uintptr_t)kvm->words;
    if (!kvm->can_clear) {      /* a slot that has fewer pages by now leaves old words */
        memset(kvm->words, 0, (size_t)kvm->nwords * 8);
    }
    err = hb_kvm(kvm->fd, HB_KVM_GET_DIRTY_LOG, &log);
    if (err < 0) {
        return err;
    }
    /* Behind the fetch: a slot that is made anew in between is noticed by the next call. */
    err = kvm->can_clear ? hb_check_pages(kvm) : 0;
    if (err >= 0 && kvm->manual) {
        err = hb_clear_words(kvm);
    }
    /* Behind the clears, see the head of kvm.h; also if one of them failed. */
    marked = hbitmap_merge_bits(hb, (const uint8_t *)kvm->words, kvm->npages, first,
                                (int)kvm->shift, false);
    return err < 0 ? err : marked;
}

/* ---- rings --------------------------------------------------------------- */

/* Can the byte be read?  The system is asked, which gets no SIGBUS. */
static bool hb_can_read(const int pipe_ends[2], const char *byte)
{
    char read_back;

    return write(pipe_ends[1], byte, 1) == 1 && read(pipe_ends[0], &read_back, 1) == 1;
}

/* The entries of a vCPU's ring; all of a machine have the same number.  What is mapped
 * beyond the ring's end cannot be read. */
static int hb_count_entries(HBKvm *kvm, int vcpu_fd)
{
    size_t page = (size_t)1 << kvm->shift, nbytes = 0;
    int most = hb_kvm_has(kvm->fd, HB_KVM_CAP_RING_ACQ_REL), ends[2];
    char *mapped;

    if (most <= 0) {
        most = hb_kvm_has(kvm->fd, HB_KVM_CAP_RING);
    }
    if (most <= 0) {
        return -ENXIO;
    }
    mapped = mmap(NULL, (size_t)most, PROT_READ, MAP_SHARED, vcpu_fd,
                  (off_t)(HB_KVM_RING_AT * page));
    if (mapped == MAP_FAILED) {
        return -errno;
    }
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) {
        int err = -errno;

        (void)munmap(mapped, (size_t)most);
        return err;
    }
    for (size_t size = page; size <= (size_t)most; size *= 2) {
        if (!hb_can_read(ends, mapped + size - 1)) {
            break;
        }
        nbytes = size;
    }
    (void)close(ends[0]);
    (void)close(ends[1]);
    (void)munmap(mapped, (size_t)most);
    kvm->nentries = (uint32_t)(nbytes / sizeof(struct hb_kvm_gfn));
    return nbytes ? 0 : -ENXIO;
}

static int hb_map_ring(HBKvm *kvm, int vcpu_fd)
{
    int err = kvm->nentries ? 0 : hb_count_entries(kvm, vcpu_fd);
    void *mapped;

    if (err) {
        return err;
    }
    mapped = mmap(NULL, kvm->nentries * sizeof(struct hb_kvm_gfn), PROT_READ | PROT_WRITE,
                  MAP_SHARED, vcpu_fd, (off_t)HB_KVM_RING_AT << kvm->shift);
    if (mapped == MAP_FAILED) {
        return -errno;
    }
    kvm->rings[kvm->nrings++].entries = mapped;
    return 0;
}

/* Are these all vCPUs, each another one?  Before there is a descriptor of our own, which
 * might have the number of one that is closed. */
static int hb_check_vcpus(const int *vcpu_fds, size_t nvcpus, size_t *which)
{
    unsigned long *ids = malloc((nvcpus + 1) * sizeof(*ids));
    int err = ids ? 0 : -ENOMEM;

    for (size_t i = 0; !err && i < nvcpus; i++) {
        *which = i;
        err = hb_kvm_is(vcpu_fds[i], "anon_inode:kvm-vcpu", &ids[i]);
        for (size_t j = 0; !err && j < i; j++) {
            err = ids[j] == ids[i] ? -EEXIST : 0;
        }
    }
    free(ids);
    return err;
}

static int hb_open_rings(HBKvm *kvm, const int *vcpu_fds, size_t nvcpus,
                         const struct hbkvm_slot *slots, size_t nslots, size_t *which)
{
    int err = 0;

    kvm->slots = malloc((nslots + 1) * sizeof(*slots));
    kvm->rings = calloc(nvcpus + 1, sizeof(*kvm->rings));
    if (!kvm->slots || !kvm->rings) {
        err = -ENOMEM;
    } else if (nslots) {
        memcpy(kvm->slots, slots, nslots * sizeof(*slots));
        kvm->nslots = nslots;
    }
    for (size_t i = 0; !err && i < nvcpus; i++) {
        *which = i;
        err = hb_map_ring(kvm, vcpu_fds[i]);
    }
    if (!err) {
        kvm->pending = malloc((kvm->nrings * kvm->nentries + 1) * sizeof(*kvm->pending));
        err = kvm->pending ? 0 : -ENOMEM;
    }
    return err;
}

int hbkvm_open_rings(HBKvm **held, int vm_fd, const int *vcpu_fds, size_t nvcpus,
                     const struct hbkvm_slot *slots, size_t nslots, size_t *which)
{
    HBKvm *kvm = NULL;
    int err = hb_check_vcpus(vcpu_fds, nvcpus, which);

    if (!err) {
        *which = nvcpus;
        err = hb_kvm_hold(&kvm, vm_fd);
    }
    if (!err) {
        err = HB_KVM_RING_AT ? hb_kvm(kvm->fd, HB_KVM_RESET_DIRTY_RINGS, NULL) : -ENXIO;
        /* A machine without rings; a kernel that knows none. */
        err = err == -EINVAL || err == -ENOTTY ? -ENXIO : err < 0 ? err : 0;
    }
    if (!err) {
        err = hb_open_rings(kvm, vcpu_fds, nvcpus, slots, nslots, which);
    }
    if (err) {
        hbkvm_close(&kvm);
        return err;
    }
    *held = kvm;
    return 0;
}

/* Acquire: what the entry says is read behind its flags; pairs with KVM's release. */
static inline uint32_t hb_flags(const struct hb_ring *ring, uint32_t at)
{
    return __atomic_load_n(&ring->entries[at].flags, __ATOMIC_ACQUIRE);
}

static inline bool hb_is_dirty(const struct hb_ring *ring, uint32_t at)
{
    return (hb_flags(ring, at) & (HB_KVM_DIRTY | HB_KVM_RESET)) == HB_KVM_DIRTY;
}

/*
 * Dirty entries are one run, harvested from its begin on, and appear at its end.  Where
 * somebody harvested before, nobody says where it begins: with one that is dirty
 * behind one that is not.  Looked at in this order: the other way round the run may come
 * to both in between.  If all are dirty, any one is as good.
 */
static bool hb_find_begin(struct hb_ring *ring, uint32_t nentries)
{
    uint32_t ndirty = 0;

    for (uint32_t at = 0; at < nentries; at++) {
        if (hb_is_dirty(ring, at)) {
            ring->next = at;
            ndirty++;
            if (!hb_is_dirty(ring, (at - 1) & (nentries - 1))) {
                return true;
            }
        }
    }
    return ndirty == nentries;
}

/* What is dirty in the ring becomes pending.  Without room for it there were more than the
 * ring has. */
static void hb_harvest(HBKvm *kvm, struct hb_ring *ring)
{
    const size_t room = kvm->nrings * kvm->nentries;

    ring->known = ring->known || hb_find_begin(ring, kvm->nentries);
    if (!ring->known) {
        return;
    }
    if (!ring->harvested) {
        ring->begin = ring->next;
    }
    for (uint32_t n = 0; n < kvm->nentries && hb_is_dirty(ring, ring->next); n++) {
        struct hb_kvm_gfn *entry = &ring->entries[ring->next];

        if (kvm->npending < room) {
            kvm->pending[kvm->npending].slot = entry->slot;
            kvm->pending[kvm->npending++].page = entry->page;
        } else {
            kvm->all_pending = true;
        }
        /* Release: the entry has been read; pairs with KVM's acquire. */
        __atomic_store_n(&entry->flags, entry->flags | HB_KVM_RESET, __ATOMIC_RELEASE);
        ring->next = (ring->next + 1) & (kvm->nentries - 1);
        ring->harvested++;
    }
    if (ring->harvested >= kvm->nentries) {
        ring->torn = kvm->all_pending = true;
    }
    ring->known = !ring->torn;
}

static bool hb_ring_reset(const HBKvm *kvm, const struct hb_ring *ring)
{
    if (ring->torn) {
        for (uint32_t at = 0; at < kvm->nentries; at++) {
            if (hb_flags(ring, at) & HB_KVM_RESET) {
                return false;
            }
        }
        return true;
    }
    /* KVM gives entries back in order, so the last one that was harvested says of all. */
    return !ring->harvested
           || !(hb_flags(ring, (ring->next - 1) & (kvm->nentries - 1)) & HB_KVM_RESET);
}

static struct hb_ring *hb_not_reset(const HBKvm *kvm)
{
    for (size_t i = 0; i < kvm->nrings; i++) {
        if (!hb_ring_reset(kvm, &kvm->rings[i])) {
            return &kvm->rings[i];
        }
    }
    return NULL;
}

/*
 * KVM has a vCPU stop before its ring is dirty all over.  But kernels that let it run
 * on have been seen (PVM): then new entries replace old ones, which are lost, so every
 * page counts as written to; and the ring is torn:
 *
 *     entries of 8        d d d d d d d d     the next was to be given back, and so many
 *                             ^                 more were made, 3 say
 *     all given back      . . . . . . . .     KVM gives entries back from ^ on
 *     the next ones       . . . . . d d .     which appear 3 behind it; KVM waits at ^
 *
 * until those between are said to be harvested, one after the other backwards from the
 * first that is dirty, as nobody says how many they are.
 */
static bool hb_mend(const HBKvm *kvm, struct hb_ring *ring)
{
    uint32_t at = (ring->begin - 1) & (kvm->nentries - 1);

    if (!ring->torn || !ring->harvested || hb_flags(ring, at)) {
        return false;
    }
    __atomic_store_n(&ring->entries[at].flags, HB_KVM_RESET, __ATOMIC_RELEASE);
    ring->begin = at;
    return true;
}

/*
 * KVM watches the pages of all harvested entries again.  A signal lets it stop early, and
 * then it says how far it came.  If it does not get on, it has replaced harvested
 * entries by new ones, which are harvested; or the ring is torn; or it is not its own.
 */
static int hb_reset_rings(HBKvm *kvm)
{
    struct hb_ring *left;

    for (int idle = 0; (left = hb_not_reset(kvm)) != NULL;) {
        int n = hb_kvm(kvm->fd, HB_KVM_RESET_DIRTY_RINGS, NULL);

        if (n < 0) {
            return n;
        }
        idle = n ? 0 : idle + 1;
        if (idle > 3) {
            uint64_t before = left->harvested;

            hb_harvest(kvm, left);
            idle = left->harvested != before || hb_mend(kvm, left) ? 0 : idle;
        }
        if (idle == 1000) {
            return -EXDEV;
        }
    }
    for (size_t i = 0; i < kvm->nrings; i++) {
        kvm->rings[i].harvested = 0;
    }
    return 0;
}

static const struct hbkvm_slot *hb_slot_of(const HBKvm *kvm, const struct hb_page *page)
{
    for (size_t i = 0; i < kvm->nslots; i++) {
        if (kvm->slots[i].slot == page->slot) {
            return page->page < kvm->slots[i].npages ? &kvm->slots[i] : NULL;
        }
    }
    return NULL;
}

int hbkvm_fetch_rings(HBKvm *const *held, HBitmap *hb, uint64_t stranger[2])
{
    HBKvm *kvm = *held;
    int result;

    if (!kvm) {
        return -EBADF;
    }
    for (size_t i = 0; i < kvm->nrings; i++) {
        hb_harvest(kvm, &kvm->rings[i]);
    }
    result = hb_reset_rings(kvm);
    if (result < 0) {
        return result;          /* pending: not marked before KVM watches them again */
    }
    for (size_t i = 0; i < kvm->npending && result >= 0; i++) {
        const struct hb_page *page = &kvm->pending[i];
        const struct hbkvm_slot *slot = hb_slot_of(kvm, page);

        if (slot) {
            int err = hbitmap_set(hb, slot->first + (page->page << kvm->shift),
                                  UINT64_C(1) << kvm->shift);

            result = err ? err : result;
        } else {
            stranger[0] = page->slot;
            stranger[1] = page->page;
            result = 1;
        }
    }
    for (size_t i = 0; kvm->all_pending && i < kvm->nslots && result >= 0; i++) {
        const struct hbkvm_slot *slot = &kvm->slots[i];
        int err = hbitmap_set(hb, slot->first, slot->npages << kvm->shift);

        result = err ? err : result;
    }
    kvm->npending = 0;
    kvm->all_pending = false;
    return result;
}

#else /* not Linux: there is no KVM */

int hbkvm_open_log(HBKvm **held, int vm_fd, uint32_t slot, uint64_t *npages, int flags)
{
    (void)held, (void)vm_fd, (void)slot, (void)npages, (void)flags;
    return -ENOSYS;
}

int hbkvm_fetch_log(HBKvm *const *held, HBitmap *hb, uint64_t first)
{
    (void)held, (void)hb, (void)first;
    return -ENOSYS;
}

int hbkvm_open_rings(HBKvm **held, int vm_fd, const int *vcpu_fds, size_t nvcpus,
                     const struct hbkvm_slot *slots, size_t nslots, size_t *which)
{
    (void)held, (void)vm_fd, (void)vcpu_fds, (void)slots, (void)nslots;
    *which = nvcpus;
    return -ENOSYS;
}

int hbkvm_fetch_rings(HBKvm *const *held, HBitmap *hb, uint64_t stranger[2])
{
    (void)held, (void)hb, (void)stranger;
    return -ENOSYS;
}

int hbkvm_machine(HBKvm *const *held)
{
    (void)held;
    return -1;
}

bool hbkvm_same(int vm_fd, int other_fd)
{
    (void)vm_fd, (void)other_fd;
    return false;
}

void hbkvm_close(HBKvm **held)
{
    (void)held;
}

#endif
