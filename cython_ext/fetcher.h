/* A thread that fetches the contents of a lazy copy, from a process that holds them as of one moment (a snapshot).

   The destination is registered with a userfaultfd(2). The thread serves its page faults first, and fetches the rest
   in the background, for which it has a helper, another thread. It then unregisters the destination and ends, so that
   it never sleeps. They run no Python code, because a thread that waits for a page may hold the interpreter's lock.

   It is a thread and not a process because the kernel ends it with its process in each case (kill, exit, execve), and
   because nothing else can end it: a fault cannot wait for a handler that was killed. Its descriptors are in a
   separate table. The program can neither close them, which would end the registration so that missing pages would read
   as zeros, nor pass them on to a child.

   The snapshot of this process is a child of the thread, created by clone(2) without CLONE_VM, so that no handler of
   pthread_atfork(3) runs. The kernel kills it when the thread ends (PR_SET_PDEATHSIG). */
#ifndef IOBMD_FETCHER_H
#define IOBMD_FETCHER_H
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "raw_call.h"
#include "userfault.h"
#if defined(__SANITIZE_ADDRESS__)
#define IOBMD_UNCHECKED __attribute__((no_sanitize("address")))
#else
#define IOBMD_UNCHECKED
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif

enum iobmd_fetch_state {
    IOBMD_BEGINNING,
    IOBMD_FETCHING,  /* faults are served */
    IOBMD_COMPLETE,  /* all contents were fetched */
    IOBMD_LOST,      /* the snapshot ended before all contents were fetched; accesses to the rest fail */
    IOBMD_REFUSED,   /* nothing was started, for the reason in `error` */
    IOBMD_STOPPED,
};

/* A range that a thread waits for: pages of the destination. */
struct iobmd_wanted_pages {
    size_t first, last;
    int done;
    struct iobmd_wanted_pages *next;
};

enum {
    IOBMD_BLOCK = 2 << 20,            /* bytes that are fetched at once, at most; the size of the staging areas */
    IOBMD_BLOCK_PAGES = IOBMD_BLOCK / 4096,
    IOBMD_ALONE = 8 * IOBMD_BLOCK,    /* bytes that one thread fetches */
    IOBMD_FAULTS = 32,                /* reports that are read at once */
    IOBMD_FETCHER_STACK = 128 << 10,
    IOBMD_SNAPSHOT_STACK = 16 << 10,
};

/* The end of user addresses on every 64-bit architecture (procfs.USER_END); unmapped ranges in it do not matter. */
static const uintptr_t IOBMD_USER_END = (uintptr_t)1 << 56;

static const int64_t IOBMD_QUIET_NS = 1000000;     /* without a fault, before the background fetch continues */
static const int64_t IOBMD_SPIN_NS = 30000;        /* of that without sleeping, for a thread that touches random pages */
static const int64_t IOBMD_STARVED_NS = 20000000;  /* the longest pause of the background fetch */

struct iobmd_fetcher;

/* A thread that fetches: the one that serves faults, or its helper. */
struct iobmd_fetching {
    struct iobmd_fetcher *f;
    char *staging;           /* two areas: one for UFFDIO_MOVE, and one for UFFDIO_COPY, which remains populated */
    size_t begin;            /* the first page whose entry of pagemap was read last */
    uint64_t entries[IOBMD_BLOCK_PAGES + 1];
    volatile size_t block;   /* the block that it fetches, or SIZE_MAX */
};

struct iobmd_fetcher {
    /* Set by the maker. */
    char *destination;
    size_t size, page;       /* bytes: whole pages; and the size of a page */
    size_t pages;
    uintptr_t source;        /* the address in the snapshot */
    pid_t snapshot;          /* the process with the contents; 0: the thread creates one of this process */
    char directory[32];      /* of that process in /proc */
    const uint64_t *samples; /* pages that exist in the source; a snapshot without one of them is refused (ENODATA) */
    size_t samples_count;
    int moves;               /* whether to try UFFDIO_MOVE */
    int spins;               /* whether another processor can run the program */

    pthread_t thread;
    pthread_mutex_t lock;    /* of `state` and `wanted` */
    pthread_cond_t changed;
    int state;
    int error;
    struct iobmd_wanted_pages *wanted;
    volatile int stop;

    /* The results of the start, valid before the state is FETCHING. */
    int is_lazy;             /* whether faults are served; if not, the thread copies everything and then is COMPLETE */
    int serves_kernel;       /* whether faults of system calls are served too */
    int64_t snapshot_ns;     /* the duration of clone(2) */
    pid_t tid;

    /* Private to the thread. */
    int has_child, pidfd, uffd, pagemap, memory;  /* pidfd: of the child; the latter two are files of the snapshot */
    int life[2];             /* a pipe; its writing end is only in the thread's descriptor table, which the helper uses */
    struct iobmd_fetching own, helper;
    pthread_t helping;
    int has_helper;
    volatile int helper_stops, helper_failed;
    volatile int64_t quiet_until;  /* the background fetch pauses, so that faults are served sooner */
    size_t next, window;     /* the page after the last one that was fetched by a fault; and the number fetched */
    size_t cursor;           /* the block that is fetched next in the background */
    volatile size_t done_pages, lost_pages;
    uint64_t *done, *lost;   /* a bit for each page; `lost` pages are also done */
    char stack[IOBMD_SNAPSHOT_STACK] __attribute__((aligned(64)));
    /* Not a stack of the C library, which would retain it when the thread has ended. */
    char thread_stack[IOBMD_FETCHER_STACK] __attribute__((aligned(64)));
    char helper_stack[IOBMD_FETCHER_STACK] __attribute__((aligned(64)));
};

/* -- bits of pages -- */

static int iobmd_bit(const uint64_t *bits, size_t page)
{
    return __atomic_load_n(&bits[page / 64], __ATOMIC_ACQUIRE) >> page % 64 & 1;
}

static void iobmd_set_bits(uint64_t *bits, volatile size_t *count, size_t first, size_t last)
{
    for (; first < last; first++) {
        uint64_t bit = (uint64_t)1 << first % 64;
        if (!iobmd_bit(bits, first) && !(__atomic_fetch_or(&bits[first / 64], bit, __ATOMIC_RELEASE) & bit))
            __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
    }
}

/* Return the first page of a range whose bit is `value`, or its end. */
static size_t iobmd_find_bit(const uint64_t *bits, size_t first, size_t last, int value)
{
    while (first < last) {
        uint64_t word = __atomic_load_n(&bits[first / 64], __ATOMIC_ACQUIRE);
        if (!(first % 64) && word == (value ? 0 : ~(uint64_t)0)) first += 64;
        else if ((int)(word >> first % 64 & 1) == value) return first;
        else first++;
    }
    return last;
}

static int64_t iobmd_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

/* -- the snapshot of this process -- */

/* Wait to be killed. The child's copies of all memory but the source are dropped, so that writes to it in this process
   cost no copies. From there on only registers, this stack and code are available. */
IOBMD_UNCHECKED
static int iobmd_snapshot_body(void *argument)
{
    struct iobmd_fetcher *f = argument;
    uintptr_t keep[2][2], at = f->page;
    uintptr_t first = f->source & ~(f->page - 1), last = (f->source + f->size + f->page - 1) & ~(f->page - 1);
    uintptr_t own = (uintptr_t)f, own_end = own + sizeof *f;
    int after = own > first;
    struct pollfd life = { f->life[0], POLLIN, 0 };
    iobmd_raw(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0);
    /* The thread may have ended before that, also by an execve(2) of another thread, after which the parent is the same
       process. The end of its descriptor table ends this process then. */
    iobmd_raw(SYS_close, f->life[1], 0, 0, 0, 0, 0);
    iobmd_raw(SYS_setpgid, 0, 0, 0, 0, 0, 0);  /* no SIGKILL or SIGSTOP of the maker's group reaches it */
    iobmd_raw(SYS_prctl, PR_SET_NAME, (long)"iobmd-snapshot", 0, 0, 0, 0);
    keep[!after][0] = first, keep[!after][1] = last;
    keep[after][0] = own & ~(f->page - 1), keep[after][1] = (own_end + f->page - 1) & ~(f->page - 1);
    for (int i = 0; i < 2; i++) {
        if (keep[i][0] > at) iobmd_raw(SYS_madvise, (long)at, (long)(keep[i][0] - at), MADV_DONTNEED, 0, 0, 0);
        at = keep[i][1];
    }
    iobmd_raw(SYS_madvise, (long)at, (long)(IOBMD_USER_END - at), MADV_DONTNEED, 0, 0, 0);
    while (iobmd_raw(SYS_ppoll, (long)&life, 1, 0, 0, 0, 0) <= 0) continue;
    iobmd_raw(SYS_exit_group, 0, 0, 0, 0, 0, 0);
    return 0;
}

static int iobmd_create_snapshot(struct iobmd_fetcher *f)
{
    int64_t begin;
    if (pipe2(f->life, O_CLOEXEC)) return errno;
    begin = iobmd_clock();
    f->snapshot = clone(iobmd_snapshot_body, f->stack + sizeof f->stack, 0, f);
    if (f->snapshot < 0) return errno;
    f->snapshot_ns = iobmd_clock() - begin;
    close(f->life[0]);
    f->has_child = 1;
    f->pidfd = (int)syscall(SYS_pidfd_open, f->snapshot, 0);  /* it lives: nothing ends it yet; Linux 5.3 */
    snprintf(f->directory, sizeof f->directory, "/proc/%d", (int)f->snapshot);
    return 0;
}

static void iobmd_end_snapshot(struct iobmd_fetcher *f)
{
    if (!f->has_child) return;
    /* Not by its pid, which may belong to another process if the program has reaped the child (__WALL). */
    if (f->pidfd >= 0) syscall(SYS_pidfd_send_signal, f->pidfd, SIGKILL, NULL, 0);
    else kill(f->snapshot, SIGKILL);
    if (f->pidfd >= 0) close(f->pidfd);
    while (waitpid(f->snapshot, NULL, __WALL) < 0 && errno == EINTR) continue;
    close(f->life[1]);
    f->has_child = 0;
}

/* -- moving pages to the destination -- */

static int iobmd_is_gone(const struct iobmd_fetcher *f)
{
    uint64_t entry;
    return pread(f->pagemap, &entry, sizeof entry, 0) != sizeof entry;  /* its memory no longer exists */
}

/* Read bytes of the snapshot; return the number read before the first unreadable one. Not by process_vm_readv(2),
   which pins the pages: the kernel first copies a page that the snapshot shares with its source (gup_must_unshare(),
   Linux 6.0), so that the contents would be in memory three times, and charged to the source (measured: 505 MiB for
   512 MiB, at a third of the speed). */
static size_t iobmd_pull(const struct iobmd_fetcher *f, char *to, size_t offset, size_t size)
{
    size_t got = 0;
    while (got < size) {
        ssize_t moved = pread(f->memory, to + got, size - got, (off_t)(f->source + offset + got));
        if (moved <= 0) break;
        got += (size_t)moved;
    }
    return got;
}

/* Declare pages as lost: an access to them fails with SIGBUS from now on, or before Linux 6.6 with SIGSEGV. */
static void iobmd_lose(struct iobmd_fetcher *f, size_t first, size_t last)
{
    iobmd_set_bits(f->lost, &f->lost_pages, first, last);
    iobmd_set_bits(f->done, &f->done_pages, first, last);
    while (f->is_lazy && first < last) {
        struct iobmd_uffd_poison poison = { (uintptr_t)f->destination + first * f->page,
                                            (last - first) * f->page, 0, 0 };
        int failed = ioctl(f->uffd, IOBMD_UFFDIO_POISON, &poison), error = errno;
        size_t made = poison.updated > 0 ? (size_t)poison.updated / f->page : 0;
        if (!failed) break;
        first += made;
        if (!made && error == EAGAIN) sched_yield();
        else if (!made && (error == EINVAL || error == ENOTTY)) {
            mprotect(f->destination + first * f->page, (last - first) * f->page, PROT_NONE);
            iobmd_uffd_wake(f->uffd, (uintptr_t)f->destination + first * f->page, (last - first) * f->page);
            break;
        } else if (!made) first++;  /* the program has unmapped or replaced it */
    }
}

/* Copy staged bytes to pages of the destination. */
static void iobmd_insert(struct iobmd_fetcher *f, const char *staged, size_t first, size_t last)
{
    size_t at = first;
    int tries = 0;
    while (at < last) {
        struct iobmd_uffd_copy copy = { (uintptr_t)f->destination + at * f->page,
                                        (uintptr_t)staged + (at - first) * f->page, (last - at) * f->page, 0, 0 };
        int failed = ioctl(f->uffd, IOBMD_UFFDIO_COPY, &copy), error = errno;
        size_t made = copy.copy > 0 ? (size_t)copy.copy / f->page : 0;
        if (!failed) break;
        at += made;
        if (made) continue;
        if (error == EAGAIN) {  /* the program changes its mappings at the same time */
            if (f->stop) return;
            sched_yield();
        } else if (error == ENOMEM && tries++ < 100 && !f->stop) usleep(10000);
        else if (error == ENOMEM) {
            iobmd_lose(f, at, last);
            break;
        } else at++;  /* it is present already, or the program has unmapped or replaced it */
    }
    iobmd_set_bits(f->done, &f->done_pages, first, last);
}

/* Move a block that is staged in the first area. What cannot be moved is copied. */
static void iobmd_move(struct iobmd_fetching *w, size_t first)
{
    struct iobmd_fetcher *f = w->f;
    size_t moved = 0;
    while (moved < IOBMD_BLOCK && f->moves) {
        struct iobmd_uffd_move move = { (uintptr_t)f->destination + first * f->page + moved,
                                        (uintptr_t)w->staging + moved, IOBMD_BLOCK - moved, 0, 0 };
        int failed = ioctl(f->uffd, IOBMD_UFFDIO_MOVE, &move), error = errno;
        moved += move.move > 0 ? (size_t)move.move : 0;
        if (!failed) break;
        if (error == EINVAL || error == ENOTTY) f->moves = 0;
        if (error != EAGAIN && !(move.move > 0)) break;
        if (error == EAGAIN && !(move.move > 0)) sched_yield();
        if (f->stop) return;
    }
    if (moved < IOBMD_BLOCK)
        iobmd_insert(f, w->staging + moved, first + moved / f->page, first + IOBMD_BLOCK / f->page);
    iobmd_set_bits(f->done, &f->done_pages, first, first + IOBMD_BLOCK / f->page);
}

/* Return whether a page of the destination has contents in the snapshot; the entries of pagemap have been read. */
static int iobmd_exists(const struct iobmd_fetching *w, size_t page)
{
    size_t at = page - w->begin;
    uint64_t both = w->entries[at] | (w->f->source % w->f->page ? w->entries[at + 1] : 0);
    return both >> 62 != 0;  /* present, or in swap */
}

static int iobmd_read_entries(struct iobmd_fetching *w, size_t first, size_t last)
{
    const struct iobmd_fetcher *f = w->f;
    size_t count = last - first + (f->source % f->page != 0);
    off_t at = (off_t)((f->source / f->page + first) * sizeof *w->entries);
    w->begin = first;
    return pread(f->pagemap, w->entries, count * sizeof *w->entries, at) != (ssize_t)(count * sizeof *w->entries);
}

/* Fetch pages that exist; return nonzero if the snapshot has ended. */
static int iobmd_fetch_run(struct iobmd_fetching *w, size_t first, size_t last)
{
    struct iobmd_fetcher *f = w->f;
    while (first < last) {
        char *to = f->is_lazy ? w->staging + IOBMD_BLOCK : f->destination + first * f->page;
        size_t whole = first + iobmd_pull(f, to, first * f->page, (last - first) * f->page) / f->page;
        if (whole > first && f->is_lazy) iobmd_insert(f, to, first, whole);
        else iobmd_set_bits(f->done, &f->done_pages, first, whole);
        if (whole == last) break;
        if (iobmd_is_gone(f)) return 1;
        iobmd_lose(f, whole, whole + 1);
        first = whole + 1;
    }
    return 0;
}

/* Fetch those of the pages of a range in one block that have not been; return nonzero if the snapshot has ended. */
static int iobmd_fetch(struct iobmd_fetching *w, size_t first, size_t last)
{
    struct iobmd_fetcher *f = w->f;
    size_t block = IOBMD_BLOCK / f->page, at, end;
    if (iobmd_read_entries(w, first, last)) return 1;
    for (at = first; at < last && iobmd_exists(w, at); at++) continue;
    if (first % block == 0 && at == first + block && iobmd_find_bit(f->done, first, at, 1) == at) {
        if (f->moves || !f->is_lazy) {
            char *to = f->is_lazy ? w->staging : f->destination + first * f->page;
            /* The kernel clears a huge page so that the touched end comes last: see iobmd_fault_in_huge(). */
            madvise(to + IOBMD_BLOCK - f->page, f->page, 23 /* MADV_POPULATE_WRITE */);
        }
        if (f->moves && iobmd_pull(f, w->staging, first * f->page, IOBMD_BLOCK) == IOBMD_BLOCK) {
            iobmd_move(w, first);
            return 0;
        }
    }
    for (at = first; at < last; at = end) {
        int exists = iobmd_exists(w, at);
        for (end = at; end < last && iobmd_exists(w, end) == exists; end++) continue;
        if (!exists) iobmd_set_bits(f->done, &f->done_pages, at, end);
        while (exists && at < end) {
            size_t stop = iobmd_find_bit(f->done, at = iobmd_find_bit(f->done, at, end, 0), end, 1);
            if (at < stop && iobmd_fetch_run(w, at, stop)) return 1;
            at = stop;
        }
    }
    return 0;
}

/* -- serving -- */

/* Resolve a fault at a page without contents, or at one that is present already. */
static void iobmd_resolve(struct iobmd_fetcher *f, size_t page)
{
    uintptr_t address = (uintptr_t)f->destination + page * f->page;
    struct iobmd_uffd_zeropage zero = { address, f->page, 0, 0 };
    while (!iobmd_bit(f->lost, page) && ioctl(f->uffd, IOBMD_UFFDIO_ZEROPAGE, &zero) && errno == EAGAIN) {
        if (f->stop) return;
        sched_yield();
    }
    iobmd_uffd_wake(f->uffd, address, f->page);
}

static size_t iobmd_least(size_t one, size_t other) { return one < other ? one : other; }

/* Serve a fault: fetch one page, or more if the previous ones were accessed in order, up to whole blocks.
   Returns -1 if the snapshot has ended, 1 if accesses are in order, otherwise 0. */
static int iobmd_serve(struct iobmd_fetcher *f, size_t page)
{
    size_t block = IOBMD_BLOCK / f->page, start = page - page % block;
    size_t end = iobmd_least(start + block, f->pages), last;
    int in_order = page == start && page && iobmd_bit(f->done, page - 1);
    if (page >= f->pages) return 0;
    if (iobmd_bit(f->done, page)) {
        iobmd_resolve(f, page);
        return page + 1 == end || iobmd_bit(f->done, page + 1);
    }
    /* The helper wakes the thread that waits for a page of its block. */
    if (f->helper.block == start / block) return 1;
    f->window = in_order ? block : page == f->next ? iobmd_least(2 * f->window, block) : 1;
    last = iobmd_least(page + f->window, end);
    f->next = last;
    if (f->window == block) __atomic_store_n(&f->cursor, start / block + 1, __ATOMIC_RELAXED);
    f->own.block = start / block;
    if (iobmd_fetch(&f->own, page, last)) return -1;
    f->own.block = SIZE_MAX;
    if (!iobmd_exists(&f->own, page)) iobmd_resolve(f, page);
    return f->window == block;
}

/* Serve one block of a range that a thread waits for; return whether there was one, or -1. */
static int iobmd_serve_wanted(struct iobmd_fetcher *f)
{
    struct iobmd_wanted_pages *one;
    size_t block = IOBMD_BLOCK / f->page, at = 0, end = 0;
    int failed = 0;
    pthread_mutex_lock(&f->lock);
    if ((one = f->wanted)) {
        at = iobmd_find_bit(f->done, one->first, one->last, 0);
        end = iobmd_least(at - at % block + block, one->last);
    }
    pthread_mutex_unlock(&f->lock);
    if (!one) return 0;
    if (at < end) failed = iobmd_fetch(&f->own, at, end);
    pthread_mutex_lock(&f->lock);
    if (f->wanted == one && iobmd_find_bit(f->done, one->first, one->last, 0) == one->last) {
        one->done = 1;
        f->wanted = one->next;
        pthread_cond_broadcast(&f->changed);
    }
    pthread_mutex_unlock(&f->lock);
    return failed ? -1 : 1;
}

/* Fetch the next block in the background; return nonzero if the snapshot has ended. */
static int iobmd_fetch_block(struct iobmd_fetching *w)
{
    struct iobmd_fetcher *f = w->f;
    size_t block = IOBMD_BLOCK / f->page, blocks = (f->pages + block - 1) / block;
    for (size_t i = 0; i < blocks; i++) {
        size_t at = __atomic_fetch_add(&f->cursor, 1, __ATOMIC_RELAXED) % blocks, first = at * block;
        size_t end = iobmd_least(first + block, f->pages);
        int failed;
        if (at == f->own.block || at == f->helper.block || iobmd_find_bit(f->done, first, end, 0) == end) continue;
        w->block = at;
        failed = iobmd_fetch(w, first, end);
        /* Faults at its pages were left to the helper: those without contents are now reported again. */
        if (w == &f->helper && f->is_lazy)
            iobmd_uffd_wake(f->uffd, (uintptr_t)f->destination + first * f->page, (end - first) * f->page);
        w->block = SIZE_MAX;
        return failed;
    }
    return 0;
}

/* Fetch in the background, on another processor than the thread that serves faults, until all is done. */
static void *iobmd_helper_body(void *argument)
{
    struct iobmd_fetcher *f = argument;
    prctl(PR_SET_NAME, "iobmd-fetch");
    while (!f->helper_stops && !f->stop && f->done_pages < f->pages && !f->helper_failed) {
        if (iobmd_clock() < f->quiet_until) usleep(IOBMD_QUIET_NS / 1000);
        else if (iobmd_fetch_block(&f->helper)) f->helper_failed = 1;
    }
    return NULL;
}

/* Serve faults and requests, and fetch the rest, until all is done; return nonzero if the snapshot has ended. */
static int iobmd_fetch_all(struct iobmd_fetcher *f)
{
    struct iobmd_uffd_msg faults[IOBMD_FAULTS];
    int64_t last_block = iobmd_clock();
    struct pollfd next = { f->uffd, POLLIN, 0 };
    int served;
    while (f->done_pages < f->pages && !f->stop && !f->helper_failed) {
        ssize_t got = f->is_lazy ? read(f->uffd, faults, sizeof faults) : -1;
        int64_t now;
        served = 0;
        for (ssize_t i = 0; got > 0 && i < got / (ssize_t)sizeof *faults; i++) {
            if (faults[i].event != IOBMD_UFFD_EVENT_PAGEFAULT) continue;
            served = iobmd_serve(f, (faults[i].address - (uintptr_t)f->destination) / f->page);
            if (served < 0) return 1;
            now = iobmd_clock();
            f->quiet_until = served ? 0 : now + IOBMD_QUIET_NS;
        }
        if (got > 0) continue;
        if ((served = iobmd_serve_wanted(f)) < 0) return 1;
        now = iobmd_clock();
        if (served) f->quiet_until = now + IOBMD_QUIET_NS;
        else if (now < f->quiet_until && now < last_block + IOBMD_STARVED_NS) {
            if (!f->spins || now >= f->quiet_until - IOBMD_QUIET_NS + IOBMD_SPIN_NS) poll(&next, 1, 1);
        } else {
            if (iobmd_fetch_block(&f->own)) return 1;
            last_block = iobmd_clock();
        }
    }
    return f->helper_failed;
}

/* -- the thread -- */

/* Map the staging areas: without access first, because after mlockall(MCL_FUTURE) mmap(2) would populate them. */
static int iobmd_map_staging(struct iobmd_fetching *w)
{
    size_t span = 3 * (size_t)IOBMD_BLOCK;
    char *found = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *aligned = (char *)(((uintptr_t)found + IOBMD_BLOCK - 1) & ~(uintptr_t)(IOBMD_BLOCK - 1));
    if (found == MAP_FAILED) return errno;
    if (aligned > found) munmap(found, (size_t)(aligned - found));
    if (aligned < found + IOBMD_BLOCK) munmap(aligned + 2 * IOBMD_BLOCK, (size_t)(found + IOBMD_BLOCK - aligned));
    w->staging = aligned;
    munlock(aligned, 2 * IOBMD_BLOCK);
    madvise(aligned, 2 * IOBMD_BLOCK, MADV_DONTFORK);
    madvise(aligned, IOBMD_BLOCK, MADV_HUGEPAGE);
    madvise(aligned + IOBMD_BLOCK, IOBMD_BLOCK, MADV_NOHUGEPAGE);
    return mprotect(aligned, 2 * IOBMD_BLOCK, PROT_READ | PROT_WRITE) ? errno : 0;
}

static int iobmd_open_file(const struct iobmd_fetcher *f, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "%s/%s", f->directory, name);
    return open(path, O_RDONLY | O_CLOEXEC);
}

/* Prepare the fetch; return an error number. Without a userfaultfd, everything is copied directly. */
static int iobmd_fetch_begin(struct iobmd_fetcher *f)
{
    char byte;
    uint64_t entry;
    int error;
    if (iobmd_raw(SYS_close_range, 0, UINT_MAX, 2 /* CLOSE_RANGE_UNSHARE */, 0, 0, 0)) return ENOSYS;
    if (!f->snapshot && (error = iobmd_create_snapshot(f))) return error;
    if ((f->pagemap = iobmd_open_file(f, "pagemap")) < 0 || (f->memory = iobmd_open_file(f, "mem")) < 0) return errno;
    if (iobmd_pull(f, &byte, 0, 1) != 1) return EFAULT;
    for (size_t i = 0; i < f->samples_count; i++)
        if (pread(f->pagemap, &entry, sizeof entry, (off_t)(f->samples[i] * sizeof entry)) != sizeof entry || !entry)
            return ENODATA;
    f->uffd = iobmd_uffd_open_missing((uintptr_t)f->destination, f->size, &f->serves_kernel);
    if (f->uffd < 0) return 0;
    if ((error = iobmd_map_staging(&f->own)) || (error = iobmd_map_staging(&f->helper))) return error;
    /* A fault in memory that may have huge pages allocates no page table, which would prevent a huge page from being
       moved there. */
    if (f->moves && madvise(f->destination, f->size, MADV_HUGEPAGE)) f->moves = 0;
    f->is_lazy = 1;
    return 0;
}

static void iobmd_set_state(struct iobmd_fetcher *f, int state)
{
    pthread_mutex_lock(&f->lock);
    f->state = state;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

/* If it cannot be started, because no thread or no second processor is available, this thread fetches everything. */
static void iobmd_start_helper(struct iobmd_fetcher *f)
{
    pthread_attr_t attributes;
    if (!f->spins || f->size <= IOBMD_ALONE || pthread_attr_init(&attributes)) return;
    if (!pthread_attr_setstack(&attributes, f->helper_stack, sizeof f->helper_stack))
        f->has_helper = !pthread_create(&f->helping, &attributes, iobmd_helper_body, f);
    pthread_attr_destroy(&attributes);
}

static void *iobmd_fetcher_body(void *argument)
{
    struct iobmd_fetcher *f = argument;
    int lost = 0;
    f->pidfd = f->uffd = f->pagemap = f->memory = -1;
    f->tid = (pid_t)syscall(SYS_gettid);
    prctl(PR_SET_NAME, "iobmd-fetch");
    f->error = iobmd_fetch_begin(f);
    if (!f->error) {
        if (f->is_lazy) iobmd_set_state(f, IOBMD_FETCHING);
        iobmd_start_helper(f);
        lost = iobmd_fetch_all(f);
        f->helper_stops = 1;
        if (f->has_helper) pthread_join(f->helping, NULL);
    }
    if (lost)
        for (size_t at = 0, end; (at = iobmd_find_bit(f->done, at, f->pages, 0)) < f->pages; at = end) {
            end = iobmd_find_bit(f->done, at, f->pages, 1);
            iobmd_lose(f, at, end);
        }
    /* What is absent in the source remains absent, and is not extended to huge pages when it is touched. */
    if (f->is_lazy) madvise(f->destination, f->size, MADV_NOHUGEPAGE);
    /* Faults that still wait are repeated, and no longer reported. */
    if (f->is_lazy) iobmd_uffd_unregister(f->uffd, (uintptr_t)f->destination, f->size);
    if (f->uffd >= 0) close(f->uffd);
    if (f->pagemap >= 0) close(f->pagemap);
    if (f->memory >= 0) close(f->memory);
    if (f->own.staging) munmap(f->own.staging, 2 * IOBMD_BLOCK);
    if (f->helper.staging) munmap(f->helper.staging, 2 * IOBMD_BLOCK);
    if (!f->stop) madvise(f->destination, f->size, MADV_DOFORK);
    iobmd_end_snapshot(f);
    iobmd_set_state(f, f->error ? IOBMD_REFUSED
                       : f->done_pages < f->pages ? IOBMD_STOPPED
                       : f->lost_pages ? IOBMD_LOST : IOBMD_COMPLETE);
    return NULL;
}

static size_t iobmd_fetcher_size(size_t pages, size_t page)
{
    size_t bits = 2 * ((pages + 63) / 64) * sizeof(uint64_t);
    return (sizeof(struct iobmd_fetcher) + bits + page - 1) & ~(page - 1);
}

/* Return a fetcher that has not been started; NULL with errno if no memory is available. */
static struct iobmd_fetcher *iobmd_fetcher_new(size_t size, size_t page)
{
    size_t pages = size / page;
    cpu_set_t allowed;
    struct iobmd_fetcher *f = mmap(NULL, iobmd_fetcher_size(pages, page), PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f == MAP_FAILED) return NULL;
    f->size = size;
    f->page = page;
    f->pages = pages;
    f->done = (uint64_t *)(f + 1);
    f->lost = f->done + (pages + 63) / 64;
    f->own.f = f->helper.f = f;
    f->own.block = f->helper.block = SIZE_MAX;
    f->window = 1;
    f->spins = sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) > 1;
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->changed, NULL);
    return f;
}

/* Start the thread; return the error number if no thread can be created. */
static int iobmd_fetcher_start(struct iobmd_fetcher *f)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    int error = pthread_attr_init(&attributes);
    if (error) return error;
    error = pthread_attr_setstack(&attributes, f->thread_stack, sizeof f->thread_stack);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!error) error = pthread_create(&f->thread, &attributes, iobmd_fetcher_body, f);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

static void iobmd_deadline(struct timespec *when, int milliseconds)
{
    clock_gettime(CLOCK_REALTIME, when);
    when->tv_nsec += (long)milliseconds * 1000000;
    when->tv_sec += when->tv_nsec / 1000000000;
    when->tv_nsec %= 1000000000;
}

/* Wait until the state is not `before`, at most for a time; return the state. */
static int iobmd_fetcher_wait(struct iobmd_fetcher *f, int before, int milliseconds)
{
    struct timespec until;
    int state, late = 0;
    iobmd_deadline(&until, milliseconds);
    pthread_mutex_lock(&f->lock);
    while ((state = f->state) <= before && !late) late = pthread_cond_timedwait(&f->changed, &f->lock, &until);
    pthread_mutex_unlock(&f->lock);
    return state;
}

/* Wait until pages are done, at most for a time; return whether they are. */
static int iobmd_fetcher_require(struct iobmd_fetcher *f, size_t first, size_t last, int milliseconds)
{
    struct iobmd_wanted_pages mine = { first, last, 0, NULL }, **link;
    struct timespec until;
    int late = 0;
    if (iobmd_find_bit(f->done, first, last, 0) == last) return 1;
    iobmd_deadline(&until, milliseconds);
    pthread_mutex_lock(&f->lock);
    for (link = &f->wanted; *link; link = &(*link)->next) continue;
    *link = &mine;
    while (!mine.done && f->state == IOBMD_FETCHING && !late)
        late = pthread_cond_timedwait(&f->changed, &f->lock, &until);
    for (link = &f->wanted; *link; link = &(*link)->next)
        if (*link == &mine) {
            *link = mine.next;
            break;
        }
    pthread_mutex_unlock(&f->lock);
    return f->state != IOBMD_FETCHING || iobmd_find_bit(f->done, first, last, 0) == last;
}

/* Return the first lost page of a range, or its end. */
static size_t iobmd_fetcher_lost(const struct iobmd_fetcher *f, size_t first, size_t last)
{
    return iobmd_find_bit(f->lost, first, last, 1);
}

static void iobmd_fetcher_stop(struct iobmd_fetcher *f)
{
    f->stop = 1;
    pthread_join(f->thread, NULL);
}

static void iobmd_fetcher_free(struct iobmd_fetcher *f)
{
    IOBMD_UNMARK(f, sizeof *f);
    munmap(f, iobmd_fetcher_size(f->pages, f->page));
}

#endif
