/* SPDX-License-Identifier: MIT */
/*
 * What KVM recorded of the writes of a virtual machine, marked in a bitmap.
 *
 * Workload: a log that is fetched again and again beside a running machine, with one
 * bit for each page: 32 KiB for 1 GiB, 32 MiB for 1 TiB.
 *
 * The invariant: a page is marked after KVM watches it again, and in the same call.
 * Watched and not marked yet, it is in the next drain of the bitmap; marked and not
 * watched yet, another thread might drain it, copy the page, and what is written then
 * would be nowhere:
 *
 *     one thread                another              the machine
 *     fetches page 5
 *     marks it
 *                               drains, copies it
 *                                                    writes to it: in the log already
 *     has KVM watch it again, with a clean log: the write is lost
 *
 * THREADS.  One call at a time for each HBKvm; the machine runs beside it.
 * Not part of the core: nothing here is in the table of its functions.
 *
 * Source: Documentation/virt/kvm/api.rst of the Linux kernel: KVM_GET_DIRTY_LOG (4.8),
 * KVM_CLEAR_DIRTY_LOG (4.117), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (7.18),
 * KVM_CAP_DIRTY_LOG_RING (8.29).
 */
#ifndef PYBITMAP_KVM_H
#define PYBITMAP_KVM_H

#include "hbitmap.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/* The log of a slot, or the rings of a machine, as somebody holds them. */
typedef struct HBKvm HBKvm;

#define HBKVM_MANUAL 1          /* clear the log by a call of its own, if KVM can */
#define HBKVM_INITIALLY_SET 2   /* logs that begin later begin with all pages */

/*
 * Holds the log of a slot (the address space in bits 16 to 31) of npages pages.
 * *held is NULL before, and if this fails: -EBADF: vm_fd is closed; -ENOTTY: it is no
 * machine's; -EIO: of another process; -EOPNOTSUPP: the flags are not to be had;
 * -ENXIO: the machine has rings; -ENOENT: the slot has no log; -EINVAL: there can be no
 * such slot; -ERANGE: it has *npages pages; -ENOSYS: there is no KVM here; or what the
 * system says.
 */
int hbkvm_open_log(HBKvm **held, int vm_fd, uint32_t slot, uint64_t *npages, int flags);

/*
 * Marks what the log has and clears that; `first` is the item of hb that the slot's
 * memory begins with, hb's items are bytes.  -EBADF: nothing is held; -EINVAL, -EFAULT:
 * the slot has another number of pages by now; or what the system says, and then it is
 * marked, or is fetched by a later call.  Where KVM cannot clear (hbkvm_open_log finds no
 * size there), noticed is only a log of more words.
 */
int hbkvm_fetch_log(HBKvm *const *held, HBitmap *hb, uint64_t first);

/* A slot, and where its memory lies in the bitmap. */
struct hbkvm_slot {
    uint64_t slot, first, npages;
};

/*
 * Holds the rings of a machine's processors, all of them.  As hbkvm_open_log; -ENXIO:
 * the machine has no rings; -EBADF, -ENOTTY: *which of vcpu_fds, or nvcpus for vm_fd,
 * is closed or not what it should be; -EEXIST: *which is there a second time.
 */
int hbkvm_open_rings(HBKvm **held, int vm_fd, const int *vcpu_fds, size_t nvcpus,
                     const struct hbkvm_slot *slots, size_t nslots, size_t *which);

/*
 * Marks what is in the rings, and empties them.  1: so it was, but a page in no slot
 * was written, the last of them is stranger[1] of slot stranger[0].  -EBADF: nothing
 * is held.  -EXDEV: one of the processors is another machine's.  What is not marked,
 * because of an error, is in a later call.  Where KVM let a processor run on with a ring
 * that was full, everything in the slots is marked.
 */
int hbkvm_fetch_rings(HBKvm *const *held, HBitmap *hb, uint64_t stranger[2]);

/* The descriptor of its machine, its own; -1: nothing is held. */
int hbkvm_machine(HBKvm *const *held);

/* Are the two descriptors of one machine?  False also where the system does not tell. */
bool hbkvm_same(int vm_fd, int other_fd);

/* Gives everything back and makes *held NULL; nothing to do if it is. */
void hbkvm_close(HBKvm **held);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif
