# A transfer that may wait for ever, made by a child process that shares this address space and can be killed alone
from libc.stdint cimport uint64_t
from uio cimport iovec

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <poll.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <sys/wait.h>
    #include <unistd.h>
    #ifndef CLONE_PIDFD
    #define CLONE_PIDFD 0x1000
    #endif
    #ifndef SYS_pidfd_send_signal
    #define SYS_pidfd_send_signal 424
    #endif

    enum { IOBMD_RANGES = 256, IOBMD_STACK = 16 << 10 };

    struct iobmd_attempt {
        struct iovec ranges[IOBMD_RANGES];  /* in the task; where `file` is not -1, one of that */
        unsigned int count;
        size_t size;                        /* of all of them */
        int task, file, writing;
        int child, pidfd;
        pid_t maker;
        volatile size_t moved;
        volatile int error;                 /* ECANCELED until it is over: it was killed */
        size_t mapped;
        char *bytes;
        char stack[IOBMD_STACK] __attribute__((aligned(64)));
    };

    /* errno belongs to the thread that waits, whose thread-local storage the child shares: system calls are raw. */
    static inline long iobmd_raw(long number, long a, long b, long c, long d, long e, long f)
    {
    #if defined(__x86_64__)
        long result;
        register long r10 __asm__("r10") = d;
        register long r8 __asm__("r8") = e;
        register long r9 __asm__("r9") = f;
        __asm__ volatile ("syscall" : "=a"(result)
                          : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                          : "rcx", "r11", "memory");
        return result;
    #elif defined(__aarch64__)
        register long x8 __asm__("x8") = number;
        register long x0 __asm__("x0") = a;
        register long x1 __asm__("x1") = b;
        register long x2 __asm__("x2") = c;
        register long x3 __asm__("x3") = d;
        register long x4 __asm__("x4") = e;
        register long x5 __asm__("x5") = f;
        __asm__ volatile ("svc 0" : "+r"(x0)
                          : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
        return x0;
    #else
        long result = syscall(number, a, b, c, d, e, f);
        return result < 0 ? -errno : result;
    #endif
    }

    static long iobmd_attempt_call(struct iobmd_attempt *job, unsigned int first)
    {
        struct iovec local = { job->bytes + job->moved, job->size - job->moved };
        struct iovec *remote = &job->ranges[first];
        if (job->file >= 0)
            return iobmd_raw(job->writing ? SYS_pwrite64 : SYS_pread64, job->file, (long)local.iov_base,
                             (long)local.iov_len, (long)remote->iov_base, 0, 0);
        return iobmd_raw(job->writing ? SYS_process_vm_writev : SYS_process_vm_readv, job->task, (long)&local, 1,
                         (long)remote, (long)(job->count - first), 0);
    }

    static int iobmd_attempt_body(void *argument)
    {
        struct iobmd_attempt *job = (struct iobmd_attempt *)argument;
        unsigned int first = 0;
        int error = 0;
        /* Nothing is left behind by a maker that is killed, before or after this line. */
        iobmd_raw(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0);
        if (iobmd_raw(SYS_getppid, 0, 0, 0, 0, 0, 0) != job->maker)
            return 0;
        while (job->moved < job->size) {
            long done = iobmd_attempt_call(job, first);
            if (done == -EINTR)
                continue;
            if (done <= 0) {
                error = done ? (int)-done : EFAULT;
                break;
            }
            job->moved += (size_t)done;
            while (first < job->count && (size_t)done >= job->ranges[first].iov_len)
                done -= (long)job->ranges[first++].iov_len;
            if (first < job->count) {
                job->ranges[first].iov_base = (char *)job->ranges[first].iov_base + done;
                job->ranges[first].iov_len -= (size_t)done;
            }
        }
        job->error = error;
        return 0;
    }

    static struct iobmd_attempt *iobmd_attempt_new(size_t room)
    {
        size_t size = sizeof(struct iobmd_attempt) + room;
        struct iobmd_attempt *job = (struct iobmd_attempt *)mmap(
            NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (job == MAP_FAILED)
            return NULL;
        job->mapped = size;
        job->bytes = (char *)(job + 1);
        job->pidfd = job->file = -1;
        job->error = ECANCELED;
        return job;
    }

    /* Begin; returns an error number, 0 for none. The child blocks every signal, and its end sends none. */
    static int iobmd_attempt_start(struct iobmd_attempt *job)
    {
        sigset_t all, before;
        int error;
        job->maker = getpid();
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, &before);
        job->child = clone(iobmd_attempt_body, job->stack + IOBMD_STACK,
                           CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_PIDFD, job, &job->pidfd);
        error = errno;
        sigprocmask(SIG_SETMASK, &before, NULL);
        return job->child < 0 ? error : 0;
    }

    /* Wait until the child has ended, at most so many milliseconds; whether it has. */
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

    /* End the child and free the memory. Where the kernel does not let it end (a FUSE server that never answers),
       both stay: its call may write to that memory one day, and to no other. */
    static void iobmd_attempt_free(struct iobmd_attempt *job)
    {
        if (job->child > 0) {
            syscall(SYS_pidfd_send_signal, job->pidfd, SIGKILL, NULL, 0);
            if (!iobmd_attempt_wait(job, 1000)) {
                close(job->pidfd);
                return;
            }
        }
        munmap(job, job->mapped);
    }
    """
    enum:
        IOBMD_RANGES
    struct iobmd_attempt:
        iovec *ranges
        unsigned int count
        size_t size, moved
        int task, file, writing, error
        char *bytes
    iobmd_attempt *iobmd_attempt_new(size_t room)
    int iobmd_attempt_start(iobmd_attempt *job)
    int iobmd_attempt_wait(iobmd_attempt *job, int milliseconds)
    void iobmd_attempt_free(iobmd_attempt *job)
