# A transfer by a child process that shares this address space, has its own descriptors, and can be killed separately
from libc.stdint cimport uint64_t

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <limits.h>
    #include <poll.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysinfo.h>
    #include <sys/sysmacros.h>
    #include <sys/uio.h>
    #include <sys/vfs.h>
    #include <sys/wait.h>
    #include <time.h>
    #include <unistd.h>
    #include "raw_call.h"  /* errno belongs to the waiting thread, whose thread-local storage the child shares */
    #ifndef CLONE_PIDFD
    #define CLONE_PIDFD 0x1000
    #endif
    #ifndef SYS_pidfd_send_signal
    #define SYS_pidfd_send_signal 424
    #endif

    #ifndef MADV_PAGEOUT
    #define MADV_PAGEOUT 21
    #endif
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22
    #endif
    #ifndef SYS_process_madvise
    #define SYS_process_madvise 440
    #endif
    #ifndef SYS_close_range
    #define SYS_close_range 436
    #endif
    #define IOBMD_CLOSE_RANGE_UNSHARE 2

    enum { IOBMD_RANGES = 4096, IOBMD_STACK = 16 << 10, IOBMD_BOUNCE = 64 << 10, IOBMD_CALL = 1 << 20,
           IOBMD_HUGE = 4 << 20 };
    enum iobmd_mode { IOBMD_BOUNCED, IOBMD_DIRECT, IOBMD_COUNTED, IOBMD_RESIDENT, IOBMD_PAGED_OUT };

    struct iobmd_range {
        uint64_t at;                        /* in the file */
        char *ours;                         /* IOBMD_DIRECT: the destination */
        size_t size;
    };

    struct iobmd_attempt {
        struct iobmd_range *ranges;
        unsigned int count;
        size_t size;                        /* of all ranges */
        int mode, file, writing;
        int task;                           /* instead of `file`: its memory, by process_vm_readv(2) */
        int task_pidfd;                     /* -1 if there is none */
        /* Instead of an open file: paths, each terminated by a null byte, and the list by another. The first path
           that leads to a regular file with this inode number, and with this device unless that is 0, is chosen. */
        char *paths;
        uint64_t inode, device;
        int found_only;                     /* the file is not opened, and its server is not called */
        int chosen;                         /* index of the path, or -1 */
        uint64_t length, filesystem, opened_device;
        size_t page;
        int fresh, holes;
        int swaps;                          /* swap space is in use on this host */
        int child, pidfd;
        pid_t maker;
        volatile size_t moved;
        volatile int error;                 /* ECANCELED until the child completes: killed */
        size_t mapped;
        char *bytes;
        char stack[IOBMD_STACK] __attribute__((aligned(64)));
    };

    /* Return whether the process of a pidfd has exited, so that its pid may have been reused; 0 for -1. Checked
       directly before each call that uses the pid. */
    static int iobmd_has_exited(int pidfd)
    {
        struct pollfd ended = { pidfd, POLLIN, 0 };
        struct timespec at_once = { 0, 0 };
        return pidfd >= 0 && iobmd_raw(SYS_ppoll, (long)&ended, 1, (long)&at_once, 0, 8, 0) > 0;
    }

    static long iobmd_statx(int directory, const char *path, int flags, struct statx *found)
    {
        return iobmd_raw(SYS_statx, directory, (long)path, flags, STATX_BASIC_STATS, (long)found, 0);
    }

    static int iobmd_is_wanted(const struct iobmd_attempt *job, const struct statx *found)
    {
        return S_ISREG(found->stx_mode) && found->stx_ino == job->inode &&
               (!job->device || makedev(found->stx_dev_major, found->stx_dev_minor) == job->device);
    }

    /* Open a path if it leads to the file, with O_PATH if the file need only be found; return a descriptor, or a
       negative error number. Devices are not opened, because their drivers would be called, and the access time
       remains unchanged if possible. */
    static long iobmd_attempt_try(struct iobmd_attempt *job, const char *path)
    {
        const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
        char same[32] = "/proc/self/fd/";
        size_t end = strlen(same), digits = 1;
        struct statx found;
        struct statfs system;
        /* The task may replace the file at a path at any time, so that it is checked after it is opened. */
        long fd, error, place = iobmd_raw(SYS_openat, AT_FDCWD, (long)path, O_PATH | O_CLOEXEC, 0, 0, 0);
        if (place < 0)
            return place;
        error = iobmd_statx((int)place, "", AT_EMPTY_PATH | (job->found_only ? AT_STATX_DONT_SYNC : 0), &found);
        if (!error && !iobmd_is_wanted(job, &found))
            error = -ENOENT;
        for (long rest = place; rest >= 10; rest /= 10)
            digits++;
        for (long rest = place; digits--; rest /= 10)
            same[end + digits] = (char)('0' + rest % 10);
        fd = error ? error : place;
        if (!error && !job->found_only) {
            fd = iobmd_raw(SYS_openat, AT_FDCWD, (long)same, flags | O_NOATIME, 0, 0, 0);
            if (fd == -EPERM)  /* permitted for the owner of the file, and with CAP_FOWNER */
                fd = iobmd_raw(SYS_openat, AT_FDCWD, (long)same, flags, 0, 0, 0);
        }
        if (fd != place)
            iobmd_raw(SYS_close, place, 0, 0, 0, 0, 0);
        if (fd < 0)
            return fd;
        job->length = found.stx_size;
        job->opened_device = makedev(found.stx_dev_major, found.stx_dev_minor);
        job->filesystem = job->found_only || iobmd_raw(SYS_fstatfs, fd, (long)&system, 0, 0, 0, 0)
                              ? 0 : (uint64_t)system.f_type;
        return fd;
    }

    /* Open the file of a task in this child's own descriptor table. A process that closes any descriptor of a file
       loses all its POSIX locks on the file (fcntl(2)). With a separate table, neither the closes nor the exit of
       this child release locks of its creator, which may have the file open as well. */
    static long iobmd_attempt_open(struct iobmd_attempt *job)
    {
        const char *path = job->paths;
        long fd = -ENOENT;
        int index = 0;
        /* The table is not copied, because the whole range is closed (Linux 5.9); older kernels copy it for the
           child. */
        if (iobmd_raw(SYS_close_range, 0, UINT_MAX, IOBMD_CLOSE_RANGE_UNSHARE, 0, 0, 0)) {
            long error = iobmd_raw(SYS_unshare, CLONE_FILES, 0, 0, 0, 0, 0);
            if (error)
                return error;
        }
        for (; *path; path += strlen(path) + 1, index++) {
            fd = iobmd_attempt_try(job, path);
            if (fd >= 0) {
                job->chosen = index;
                break;
            }
        }
        return fd;
    }

    static long iobmd_attempt_call(struct iobmd_attempt *job, long fd, uint64_t at, char *ours, size_t size)
    {
        struct iovec local = { ours, size }, remote = { (void *)(uintptr_t)at, size };
        long done;
        do {
            if (job->task && iobmd_has_exited(job->task_pidfd))
                done = -ESRCH;
            else if (job->task)
                done = iobmd_raw(job->writing ? SYS_process_vm_writev : SYS_process_vm_readv, job->task, (long)&local,
                                 1, (long)&remote, 1, 0);
            else
                done = iobmd_raw(job->writing ? SYS_pwrite64 : SYS_pread64, fd, (long)ours, (long)size, (long)at, 0,
                                 0);
        } while (done == -EINTR);
        /* 0 is the end of the file. /proc/PID/mem returns EIO if nothing is mapped. */
        return done == 0 || (done == -EIO && !job->paths) ? -EFAULT : done;
    }

    /* Transfer one range through the buffer `bytes`; return an error number. Each call adds to `moved`. */
    static long iobmd_attempt_bounced(struct iobmd_attempt *job, long fd, struct iobmd_range range)
    {
        while (range.size) {
            size_t step = range.size < IOBMD_CALL ? range.size : IOBMD_CALL;
            long done = iobmd_attempt_call(job, fd, range.at, job->bytes + job->moved, step);
            if (done < 0)
                return -done;
            __atomic_store_n(&job->moved, job->moved + (size_t)done, __ATOMIC_RELEASE);
            range.at += (uint64_t)done;
            range.size -= (size_t)done;
        }
        return 0;
    }

    /* Copy the bytes that were read, but do not touch a page of fresh memory for a page that is all zero. */
    static void iobmd_keep_nonzero(const struct iobmd_attempt *job, char *ours, size_t size)
    {
        size_t done = 0;
        while (done < size) {
            size_t step = job->page - ((uintptr_t)ours + done) % job->page;
            const char *from = job->bytes + done;
            if (step > size - done)
                step = size - done;
            if (from[0] || memcmp(from, from + 1, step - 1))
                memcpy(ours + done, from, step);
            done += step;
        }
    }

    /* Return the distance from `at` to the next data, at most `size`, and in `until` the distance to the end of the
       data. */
    static size_t iobmd_hole(const struct iobmd_attempt *job, long fd, uint64_t at, size_t size, size_t *until)
    {
        long found;
        *until = size;
        if (!job->holes)
            return 0;
        found = iobmd_raw(SYS_lseek, fd, (long)at, SEEK_DATA, 0, 0, 0);
        if (found < 0)  /* ENXIO: no data follows */
            return size;
        if ((uint64_t)found > at)
            return (uint64_t)found - at < size ? (size_t)((uint64_t)found - at) : size;
        found = iobmd_raw(SYS_lseek, fd, (long)at, SEEK_HOLE, 0, 0, 0);
        if (found > 0 && (uint64_t)found > at && (uint64_t)found - at < size)
            *until = (size_t)((uint64_t)found - at);
        return 0;
    }

    /* A part of a tmpfs file that is mapped while it is read, and which of its pages were resident before. */
    struct iobmd_view {
        char *start;
        size_t mapped, pages;
        unsigned char there[IOBMD_CALL / 4096 + 1];
    };

    static void iobmd_view_open(const struct iobmd_attempt *job, long fd, uint64_t at, size_t size,
                                struct iobmd_view *view)
    {
        size_t before = at % job->page;
        long start;
        view->start = NULL;
        if (!job->swaps || !job->holes)
            return;
        view->mapped = (before + size + job->page - 1) / job->page * job->page;
        start = iobmd_raw(SYS_mmap, 0, (long)view->mapped, PROT_READ, MAP_SHARED, fd, (long)(at - before));
        if (start < 0 && start > -4096)
            return;
        view->start = (char *)start;
        view->pages = view->mapped / job->page;
        if (iobmd_raw(SYS_mincore, start, (long)view->mapped, (long)view->there, 0, 0, 0))
            view->pages = 0;
    }

    /* Reading swaps pages in, whatever the flags of preadv2(2). To swap them out again they must be mapped here,
       because the kernel pages out only memory that the calling process maps and no other process does. */
    static void iobmd_view_close(const struct iobmd_attempt *job, struct iobmd_view *view)
    {
        size_t index = 0, last, all = view->pages;
        if (!view->start)
            return;
        for (; index < all; index = last) {
            for (last = index + 1; last < all && !(view->there[last] & 1) == !(view->there[index] & 1);)
                last++;
            if (view->there[index] & 1)
                continue;
            long start = (long)(view->start + index * job->page), size = (long)((last - index) * job->page);
            if (!iobmd_raw(SYS_madvise, start, size, MADV_POPULATE_READ, 0, 0, 0))
                iobmd_raw(SYS_madvise, start, size, MADV_PAGEOUT, 0, 0, 0);
        }
        iobmd_raw(SYS_munmap, (long)view->start, (long)view->mapped, 0, 0, 0, 0);
    }

    /* Copy one range of a file of an in-memory file system to its destination, or count its data; return an error
       number. Nothing is allocated in the file. */
    static long iobmd_attempt_direct(struct iobmd_attempt *job, long fd, struct iobmd_range range)
    {
        size_t done = 0, until;
        struct iobmd_view view;
        while (done < range.size) {
            uint64_t at = range.at + done;
            char *ours = range.ours + done;
            int bounced = job->fresh && !job->holes;
            long got;
            if (at >= job->length)
                return EFAULT;
            size_t left = job->length - at < range.size - done ? (size_t)(job->length - at) : range.size - done;
            size_t step = iobmd_hole(job, fd, at, left, &until);
            if (step) {
                if (job->mode == IOBMD_DIRECT) {
                    if (!job->fresh)
                        memset(ours, 0, step);
                    job->moved += step;
                }
                done += step;
                continue;
            }
            if (job->mode == IOBMD_COUNTED) {
                job->moved += until;
                done += until;
                continue;
            }
            step = bounced ? IOBMD_BOUNCE : IOBMD_CALL;
            step = until < step ? until : step;
            iobmd_view_open(job, fd, at, step, &view);
            got = iobmd_attempt_call(job, fd, at, bounced ? job->bytes : ours, step);
            iobmd_view_close(job, &view);
            if (got < 0)
                return -got;
            if (bounced)
                iobmd_keep_nonzero(job, ours, (size_t)got);
            job->moved += (size_t)got;
            done += (size_t)got;
        }
        return 0;
    }

    /* Count the bytes of a range of a file whose pages are resident (mincore(2)); return an error number. */
    static long iobmd_attempt_resident(struct iobmd_attempt *job, long fd, struct iobmd_range range)
    {
        unsigned char there[IOBMD_CALL / 4096];
        size_t step;
        for (size_t done = 0; done < range.size; done += step) {
            long start, error;
            step = range.size - done < IOBMD_CALL ? range.size - done : IOBMD_CALL;
            start = iobmd_raw(SYS_mmap, 0, (long)step, PROT_READ, MAP_SHARED, fd, (long)(range.at + done));
            if (start < 0 && start > -4096)
                return -start;
            error = iobmd_raw(SYS_mincore, start, (long)step, (long)there, 0, 0, 0);
            iobmd_raw(SYS_munmap, start, (long)step, 0, 0, 0, 0);
            if (error)
                return -error;
            for (size_t page = 0; page < step / job->page; page++)
                job->moved += there[page] & 1 ? job->page : 0;
        }
        return 0;
    }

    /* Swap out a range of the task (CAP_SYS_NICE); return an error number. */
    static long iobmd_attempt_page_out(struct iobmd_attempt *job, struct iobmd_range range)
    {
        struct iovec remote = { (void *)(uintptr_t)range.at, range.size };
        long done = iobmd_raw(SYS_process_madvise, job->task_pidfd, (long)&remote, 1, MADV_PAGEOUT, 0, 0);
        if (done < 0)
            return -done;
        job->moved += range.size;
        return 0;
    }

    static int iobmd_attempt_body(void *argument)
    {
        struct iobmd_attempt *job = (struct iobmd_attempt *)argument;
        long fd = job->file, error = 0;
        /* The child exits with its creator, whether the creator is killed before or after this line. */
        iobmd_raw(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0);
        if (iobmd_raw(SYS_getppid, 0, 0, 0, 0, 0, 0) != job->maker)
            return 0;
        if (job->paths) {
            fd = iobmd_attempt_open(job);
            error = fd < 0 ? -fd : 0;
        }
        for (unsigned int index = 0; index < job->count && !error; index++)
            error = job->mode == IOBMD_BOUNCED    ? iobmd_attempt_bounced(job, fd, job->ranges[index])
                    : job->mode == IOBMD_PAGED_OUT ? iobmd_attempt_page_out(job, job->ranges[index])
                    : job->mode == IOBMD_RESIDENT ? iobmd_attempt_resident(job, fd, job->ranges[index])
                                                  : iobmd_attempt_direct(job, fd, job->ranges[index]);
        job->error = (int)error;
        return 0;
    }

    /* Allocate an attempt for `ranges` ranges, with memory for their bytes and for the paths. */
    static struct iobmd_attempt *iobmd_attempt_new(size_t ranges, size_t room, const char *paths, size_t length)
    {
        size_t head = sizeof(struct iobmd_attempt) + ranges * sizeof(struct iobmd_range), size = head + room + length;
        struct iobmd_attempt *job = (struct iobmd_attempt *)mmap(
            NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (job == MAP_FAILED)
            return NULL;
        if (room >= IOBMD_HUGE)  /* otherwise faulting in and clearing small pages takes longer than the transfer */
            madvise(job, size, MADV_HUGEPAGE);
        job->mapped = size;
        job->ranges = (struct iobmd_range *)(job + 1);
        job->bytes = (char *)job + head;
        if (length) {
            job->paths = job->bytes + room;
            memcpy(job->paths, paths, length);
        }
        job->pidfd = job->task_pidfd = job->file = job->chosen = -1;
        return job;
    }

    /* Start the child; return an error number, 0 for none. The child blocks all signals, and sends none when it
       exits. */
    static int iobmd_attempt_start(struct iobmd_attempt *job)
    {
        sigset_t all, before;
        struct sysinfo host;
        int error;
        job->maker = getpid();
        job->moved = 0;
        job->error = ECANCELED;
        job->swaps = !sysinfo(&host) && host.freeswap < host.totalswap;
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, &before);
        job->child = clone(iobmd_attempt_body, job->stack + IOBMD_STACK,
                           CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_PIDFD, job, &job->pidfd);
        error = errno;
        sigprocmask(SIG_SETMASK, &before, NULL);
        return job->child < 0 ? error : 0;
    }

    static long iobmd_milliseconds(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000L + now.tv_nsec / 1000000;
    }

    /* Wait at most `milliseconds`, or until a signal arrives, for the exit of the child; return whether it has
       exited. */
    static int iobmd_attempt_wait(struct iobmd_attempt *job, int milliseconds)
    {
        struct pollfd ended = { job->pidfd, POLLIN, 0 };
        int status;
        if (job->child <= 0)
            return 1;
        if (poll(&ended, 1, milliseconds) <= 0)
            return 0;
        while (waitpid(job->child, &status, __WALL) < 0 && errno == EINTR)
            continue;
        close(job->pidfd);
        job->child = 0;
        job->pidfd = -1;
        return 1;
    }

    /* Kill the child and free the memory. If the kernel does not end the child (a FUSE server does not answer), both
       remain: its call may still write to that memory, but to no other. A child that writes directly to the
       destination reads from an in-memory file system, and is always waited for. */
    static void iobmd_attempt_free(struct iobmd_attempt *job)
    {
        if (job->child > 0) {
            long until = iobmd_milliseconds() + 1000;
            /* A seccomp filter may permit only one of the two calls. */
            if (syscall(SYS_pidfd_send_signal, job->pidfd, SIGKILL, NULL, 0) && errno != ESRCH)
                kill(job->child, SIGKILL);
            while (!iobmd_attempt_wait(job, 100))
                if ((job->mode == IOBMD_BOUNCED || job->mode == IOBMD_PAGED_OUT) && iobmd_milliseconds() > until) {
                    close(job->pidfd);
                    return;
                }
        }
        IOBMD_UNMARK(job, job->mapped);
        munmap(job, job->mapped);
    }
    """
    enum:
        IOBMD_RANGES
        IOBMD_BOUNCE
        IOBMD_BOUNCED
        IOBMD_DIRECT
        IOBMD_COUNTED
        IOBMD_RESIDENT
        IOBMD_PAGED_OUT
    struct iobmd_range:
        uint64_t at
        char *ours
        size_t size
    struct iobmd_attempt:
        iobmd_range *ranges
        unsigned int count
        size_t size, moved, page
        int mode, file, task, task_pidfd, writing, error, found_only, chosen, fresh, holes, child
        uint64_t inode, device, length, filesystem, opened_device
        char *bytes
    int iobmd_has_exited(int pidfd)
    iobmd_attempt *iobmd_attempt_new(size_t ranges, size_t room, const char *paths, size_t length)
    int iobmd_attempt_start(iobmd_attempt *job)
    int iobmd_attempt_wait(iobmd_attempt *job, int milliseconds)
    void iobmd_attempt_free(iobmd_attempt *job)
