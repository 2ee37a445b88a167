# A child that shares our memory and descriptors, and is a process of its own (clone(2), as vfork(2) has it); x86-64
cdef extern from * nogil:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stddef.h>
    #include <unistd.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>

    /* The process that made it is dead. What is under way is finished, and what waits gives up, which takes no time;
       a wait for a lock that the dead process held would never end. */
    static volatile pid_t iobmd_maker;
    static volatile int iobmd_is_orphan;
    enum { IOBMD_SECONDS = 5 };  /* for that */
    static void iobmd_orphaned(int number)
    {
        (void)number;
        if (getppid() == iobmd_maker) return;
        iobmd_is_orphan = 1;
        alarm(IOBMD_SECONDS);
    }
    static void iobmd_prolong(void) { if (iobmd_is_orphan) alarm(IOBMD_SECONDS); }

    /* Whether a job is to give up: `cancelled` is set by any thread, the rest by the one that runs it. */
    struct iobmd_order { volatile int cancelled; int shielded; };
    static __thread struct iobmd_order *iobmd_current;
    static void iobmd_set_current(struct iobmd_order *order) { iobmd_current = order; }
    static int iobmd_interrupted(void)
    {
        return iobmd_current && !iobmd_current->shielded && (iobmd_current->cancelled || iobmd_is_orphan);
    }
    static int iobmd_orphan(void) { return iobmd_is_orphan; }
    static void iobmd_exit(void) { for (;;) syscall(SYS_exit_group, 0); }
    static void iobmd_shield(int more) { if (iobmd_current) iobmd_current->shielded += more; }

    static void iobmd_begin_apart(void)
    {
        sigset_t ours;
        signal(SIGTERM, iobmd_orphaned);
        signal(SIGALRM, SIG_DFL);
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        iobmd_orphaned(0);
        sigemptyset(&ours);
        sigaddset(&ours, SIGTERM);
        sigaddset(&ours, SIGALRM);
        sigprocmask(SIG_UNBLOCK, &ours, NULL);
    }

    static __attribute__((noinline, noreturn)) void iobmd_apart(void *function, void *argument)
    {
        iobmd_begin_apart();
        ((void (*)(void *))function)(argument);
        for (;;) syscall(SYS_exit, 0);
    }

    /* Run a function in such a child, with all signals blocked; 0, an error number where no child is to be had, or -1
       where it was killed.
       The child goes on in this very frame, and never leaves it: of the stack of this thread, which waits, what is
       below is lost, and what is above is as it was. */
    static __attribute__((noinline)) int iobmd_run_apart(void *function, void *argument)
    {
    #ifdef __x86_64__
        sigset_t all, before;
        long pid;
        int status = 0;
        iobmd_maker = getpid();
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        /* CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_VFORK, and no signal when it ends */
        __asm__ volatile (
            "xorl %%r10d, %%r10d; xorl %%r8d, %%r8d; syscall"
            : "=a"(pid)
            : "0"((long)SYS_clone), "D"(0x4700L), "S"(0L), "d"(0L)
            : "rcx", "r8", "r10", "r11", "memory");
        if (pid == 0)
            iobmd_apart(function, argument);
        if (pid > 0)
            while (waitpid(pid, &status, __WALL) < 0 && errno == EINTR) continue;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return pid < 0 ? (int)-pid : status ? -1 : 0;
    #else
        (void)function; (void)argument;
        return ENOSYS;
    #endif
    }
    """
    int iobmd_run_apart(void *function, void *argument)
    struct iobmd_order:
        int cancelled
        int shielded
    void iobmd_set_current(iobmd_order *order)
    int iobmd_interrupted()
    int iobmd_orphan()
    void iobmd_exit()
    void iobmd_shield(int more)
    void iobmd_prolong()
