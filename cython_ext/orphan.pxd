# The end of a snapshot whose maker was killed: what `Snapshot` does by Python is done here without it; x86-64
cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/ptrace.h>
    #include <sys/syscall.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <sys/wait.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef CLONE_PIDFD
    #define CLONE_PIDFD 0x1000
    #endif

    /* What is to be taken away: a process made by a guest, which was made in a task, and what it takes to have the
       task wait for the guest: a system call instruction, the options to trace it with, the guest as it counts. */
    struct iobmd_leftover {
        pid_t task;
        int pidfd; /* of the task, or -1 */
        pid_t child, guest, guest_there;
        unsigned long instruction;
        long options;
    };

    #ifdef __x86_64__
    #include <sys/user.h>
    enum { IOBMD_EVENT_STOP = 128, IOBMD_GETSIGMASK = 0x420a, IOBMD_SETSIGMASK = 0x420b, IOBMD_SYSCALL_INFO = 0x420e,
           IOBMD_RSEQ = 0x420f };

    static void iobmd_pause(void)
    {
        struct timespec moment = { 0, 50000 };
        nanosleep(&moment, NULL);
    }

    /* Wait for a stop of a thread that is traced, at most so many times 50 us; its wait status, 0 for none. */
    static int iobmd_next_stop(pid_t tid, int looks)
    {
        int status;
        for (; looks > 0; looks--) {
            pid_t found = waitpid(tid, &status, __WALL | WNOHANG);
            if (found == tid) return WIFSTOPPED(status) ? status : 0;
            if (found < 0 && errno != EINTR) return 0;
            iobmd_pause();
        }
        return 0;
    }

    static void iobmd_end_traced(pid_t pid)
    {
        int looks = 20000;
        /* What this process traces nobody else can reap: its number is its own. */
        if (pid <= 0 || ptrace((enum __ptrace_request)PTRACE_INTERRUPT, pid, 0, 0) < 0) return;
        kill(pid, SIGKILL);
        while (looks-- > 0) {
            int status;
            pid_t found = waitpid(pid, &status, __WALL | WNOHANG);
            if (found < 0 || (found == pid && !WIFSTOPPED(status))) return;
            iobmd_pause();
        }
    }

    /* Whether a stopped thread may be in a restartable sequence, which a call hides from the kernel (rseq(2)). */
    static int iobmd_in_sequence(pid_t tid, pid_t task)
    {
        unsigned long area[3] = { 0, 0, 0 }, descriptor = 0;
        if (ptrace((enum __ptrace_request)IOBMD_RSEQ, tid, sizeof area, area) < 0 || !area[0]) return 0;
        struct iovec ours = { &descriptor, 8 }, theirs = { (void *)(area[0] + 8), 8 };
        return process_vm_readv(task, &ours, 1, &theirs, 1, 0) == 8 && descriptor;
    }

    /* Calls that a stop ends with EINTR, and that are begun again (`threads.ENDED_BY_A_STOP`). */
    static int iobmd_is_ended(long call)
    {
        static const short calls[] = { 0, 1, 19, 20, 42, 43, 44, 45, 46, 47, 65, 128, 208, 220, 232, 281, 288, 299,
                                       307, 333, 426, 441 };
        for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
            if (calls[i] == call) return 1;
        return 0;
    }

    /* Whether a thread that is traced, so that its number is no other's, is one of the task. */
    static int iobmd_belongs(const struct iobmd_leftover *left, pid_t tid)
    {
        char path[64];
        struct pollfd ended = { left->pidfd, POLLIN, 0 };
        snprintf(path, sizeof path, "/proc/%d/task/%d", (int)left->task, (int)tid);
        return access(path, F_OK) == 0 && poll(&ended, 1, 0) == 0;
    }

    /* Whether a thread that has begun a system call makes the one that its registers were set to: its task may have
       written other code there (`Tracee._skip_call`). */
    static int iobmd_makes(pid_t tid, const struct user_regs_struct *regs)
    {
        struct {
            unsigned char at, unused[3];
            unsigned int architecture;
            unsigned long behind, stack, call, arguments[6];
        } begun;
        return ptrace((enum __ptrace_request)IOBMD_SYSCALL_INFO, tid, sizeof begun, &begun) >= (long)sizeof begun &&
               begun.at == 1 && begun.architecture == 0xc000003e && begun.behind == regs->rip + 2 &&
               begun.call == regs->rax && begun.arguments[0] == regs->rdi && begun.arguments[1] == regs->rsi &&
               begun.arguments[2] == regs->rdx && begun.arguments[3] == regs->r10;
    }

    /* Have one thread of the task wait for the guest. 1: it was done, or no try is to follow; 0: try another. */
    static int iobmd_wait_in(const struct iobmd_leftover *left, pid_t tid)
    {
        struct user_regs_struct before, regs;
        unsigned long mask, all = ~0ul;
        int status, stops = 0, done = 0;
        if (ptrace(PTRACE_SEIZE, tid, 0, 0) < 0) return 0;
        if (!iobmd_belongs(left, tid)) return 1;  /* a stranger, which is let go with the end of this process */
        ptrace(PTRACE_INTERRUPT, tid, 0, 0);
        while ((status = iobmd_next_stop(tid, 4000)) && status >> 16 != IOBMD_EVENT_STOP)
            ptrace(PTRACE_CONT, tid, 0, WSTOPSIG(status));
        if (!status) return 0;  /* it is let go with the end of this process */
        if (ptrace(PTRACE_GETREGS, tid, 0, &before) < 0) return 0;
        ptrace(PTRACE_SETOPTIONS, tid, 0, left->options | PTRACE_O_TRACESYSGOOD);
        if ((long)before.rax == -EINTR && iobmd_is_ended((long)before.orig_rax)) {
            before.rax = (unsigned long)-514L;  /* ERESTARTNOHAND */
            ptrace(PTRACE_SETREGS, tid, 0, &before);
        }
        if (before.cs == 0x33 && !iobmd_in_sequence(tid, left->task) &&
            ptrace((enum __ptrace_request)IOBMD_GETSIGMASK, tid, 8, &mask) == 0) {
            regs = before;
            regs.rip = left->instruction;
            regs.rax = 61;  /* wait4 */
            regs.orig_rax = ~0ul;
            regs.rdi = (unsigned long)left->guest_there;
            regs.rsi = regs.r10 = 0;
            regs.rdx = __WALL | WNOHANG;
            ptrace((enum __ptrace_request)IOBMD_SETSIGMASK, tid, 8, &all);
            ptrace(PTRACE_SETREGS, tid, 0, &regs);
            while (stops < 2) {
                ptrace(PTRACE_SYSCALL, tid, 0, 0);
                if (!(status = iobmd_next_stop(tid, 20000))) break;
                if (WSTOPSIG(status) != (SIGTRAP | 0x80)) continue;
                if (++stops == 1 && !iobmd_makes(tid, &regs)) {
                    struct user_regs_struct skipped;
                    if (ptrace(PTRACE_GETREGS, tid, 0, &skipped) < 0) break;
                    skipped.orig_rax = ~0ul;
                    ptrace(PTRACE_SETREGS, tid, 0, &skipped);
                }
            }
            done = stops == 2;
            ptrace(PTRACE_SETREGS, tid, 0, &before);
            ptrace((enum __ptrace_request)IOBMD_SETSIGMASK, tid, 8, &mask);
        }
        ptrace(PTRACE_DETACH, tid, 0, 0);
        return done;
    }

    static void iobmd_take_away(const struct iobmd_leftover *left)
    {
        char path[32];
        iobmd_end_traced(left->child);
        iobmd_end_traced(left->guest);
        snprintf(path, sizeof path, "/proc/%d/task", (int)left->task);
        for (int tries = 0, done = 0; tries < 20 && !done; tries++) {
            /* Not opendir(3): it allocates, and who was killed may have held the lock of the heap. */
            char entries[4096] __attribute__((aligned(8)));
            int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            long size = folder < 0 ? 0 : syscall(SYS_getdents64, folder, entries, sizeof entries);
            for (long at = 0; at < size && !done; at += *(unsigned short *)(entries + at + 16)) {
                pid_t tid = (pid_t)atoi(entries + at + 19);
                done = tid > 0 && iobmd_wait_in(left, tid);
            }
            if (folder < 0) return;
            close(folder);
            iobmd_pause();
        }
    }
    #else
    static void iobmd_take_away(const struct iobmd_leftover *left) { (void)left; }
    #endif

    /* A process that shares this memory, outlives this process if that is killed, and then has the task wait for
       the guest, which dies with its tracer. Made before that is, so that no moment is missed. It blocks every
       signal, and sends none. */
    struct iobmd_janitor {
        struct iobmd_leftover left;
        pid_t maker, pid;
        int pidfd;
        volatile int over;
        char stack[32 << 10] __attribute__((aligned(64)));
    };

    static int iobmd_janitor_body(void *argument)
    {
        struct iobmd_janitor *janitor = (struct iobmd_janitor *)argument;
        unsigned long terminated = 1ul << (SIGTERM - 1);
        struct pollfd ended = { -1, POLLIN, 0 };
        /* Until the maker is dead, thread-local storage is that of a thread of it: these calls do not touch it as
           long as they succeed, and no cancellation point is among them. */
        syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
        while (!janitor->over && syscall(SYS_getppid) == janitor->maker)
            syscall(SYS_rt_sigtimedwait, &terminated, NULL, NULL, sizeof terminated);
        if (janitor->over || !janitor->left.guest) return 0;
        ended.fd = (int)syscall(SYS_pidfd_open, janitor->left.guest, 0);
        poll(&ended, 1, 1000);
        iobmd_take_away(&janitor->left);
        return 0;
    }

    /* Begin; NULL, and errno, where no process can be made. */
    static struct iobmd_janitor *iobmd_janitor_start(void)
    {
        sigset_t all, before;
        int error;
        struct iobmd_janitor *janitor = (struct iobmd_janitor *)mmap(
            NULL, sizeof *janitor, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (janitor == MAP_FAILED) return NULL;
        janitor->maker = getpid();
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        janitor->pid = clone(iobmd_janitor_body, janitor->stack + sizeof janitor->stack,
                             CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_PIDFD, janitor, &janitor->pidfd);
        error = errno;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (janitor->pid > 0) return janitor;
        munmap(janitor, sizeof *janitor);
        errno = error;
        return NULL;
    }

    static void iobmd_janitor_end(struct iobmd_janitor *janitor)
    {
        janitor->over = 1;
        if (syscall(SYS_pidfd_send_signal, janitor->pidfd, SIGTERM, NULL, 0) < 0 && errno != ESRCH)
            kill(janitor->pid, SIGTERM);  /* a seccomp filter */
        while (waitpid(janitor->pid, NULL, __WALL) < 0 && errno == EINTR) continue;
        close(janitor->pidfd);
        munmap(janitor, sizeof *janitor);
    }
    """
    struct iobmd_leftover:
        int task, pidfd, child, guest, guest_there
        unsigned long instruction
        long options
    void iobmd_take_away(const iobmd_leftover *left)
    struct iobmd_janitor:
        iobmd_leftover left
    iobmd_janitor *iobmd_janitor_start()
    void iobmd_janitor_end(iobmd_janitor *janitor)
