/* Work on memory that may be unmapped while it is accessed: a fault is reported, and does not end the process.
 *
 * The work runs in a child process that shares this address space (CLONE_VM) but not its signal handlers (no
 * CLONE_SIGHAND): handlers for SIGSEGV and SIGBUS that are set there are set nowhere else, so no handler of the
 * program, of faulthandler or of a debugger is replaced or called, and no core is dumped. Cache lines are physical:
 * a line that the child flushes is flushed for all. With CLONE_VFORK the calling thread waits for it, as in
 * posix_spawn(3), and the child may use its thread-local storage. Creating and ending the child takes 25 us
 * (measured; 50 us with 1 GiB resident).
 *
 * sigsetjmp and a handler in this process are not an alternative: signal handlers belong to the program, others may
 * be installed later, and there is one table for all threads.
 */
#ifndef IOBMD_GUARDED_H
#define IOBMD_GUARDED_H

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define IOBMD_UNCHECKED __attribute__((no_sanitize("address")))
#else
#define IOBMD_UNCHECKED
#endif

/* Room for the work and one signal frame, whose largest part is the vector registers (11 KiB with AMX). */
enum { IOBMD_CHILD_STACK = 32 << 10 };

struct iobmd_job {
    void (*work)(void *);
    void *argument;
    volatile uintptr_t fault; /* the address that could not be reached */
    volatile int ended;       /* 1: the work is done; 2: a fault ended it */
};

/* Thread-local data of the waiting thread, which the child shares. */
static __thread struct iobmd_job *iobmd_current_job;

static inline void iobmd_on_fault(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    iobmd_current_job->fault = (uintptr_t)info->si_addr;
    iobmd_current_job->ended = 2;
    syscall(SYS_exit, 0);
}

static inline void iobmd_never_reached(void) {}

/* System calls without wrappers: libraries that wrap sigaction(2), as for a Java VM, record its arguments in memory,
   which here is the parent's. */
static inline int iobmd_catch(int number)
{
#if defined(__x86_64__) || defined(__aarch64__)
    struct {
        void (*handler)(int, siginfo_t *, void *);
        unsigned long flags;
        void (*restorer)(void);
        uint64_t mask;
    } action = {iobmd_on_fault, SA_SIGINFO | 0x04000000 /* SA_RESTORER */, iobmd_never_reached, 0};
    return (int)syscall(SYS_rt_sigaction, number, &action, NULL, sizeof(uint64_t));
#else
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = iobmd_on_fault;
    action.sa_flags = SA_SIGINFO;
    return sigaction(number, &action, NULL);
#endif
}

static inline int iobmd_child(void *argument)
{
    struct iobmd_job *job = argument;
    /* All other signals remain blocked: a handler of the program would run in the parent's memory a second time. */
    uint64_t faults = (uint64_t)1 << (SIGSEGV - 1) | (uint64_t)1 << (SIGBUS - 1);
    if (iobmd_catch(SIGSEGV) || iobmd_catch(SIGBUS))
        return 1;
    syscall(SYS_rt_sigprocmask, SIG_UNBLOCK, &faults, NULL, sizeof faults);
    job->work(job->argument);
    job->ended = 1;
    return 0;
}

/* Call work(argument). Return 0 if it completed, -1 if a fault at *fault ended it, otherwise an error number: that of
   clone(2), or ECHILD if the child was killed. */
IOBMD_UNCHECKED
static inline int iobmd_guarded(void (*work)(void *), void *argument, uintptr_t *fault)
{
    char stack[IOBMD_CHILD_STACK] __attribute__((aligned(64)));
    struct iobmd_job job = {work, argument, 0, 0};
    uint64_t all = ~(uint64_t)0, before;
    int pid, error;
    iobmd_current_job = &job;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
    /* The lowest byte, the exit signal, is 0: the program receives no SIGCHLD, and its wait calls do not see the
       child. CLONE_FILES: the table is not copied, and the child keeps no descriptor open. */
    pid = clone(iobmd_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | CLONE_FILES, &job);
    error = errno;
    if (pid > 0)
        while (waitpid(pid, NULL, __WALL) < 0 && errno == EINTR)
            ;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    *fault = job.fault;
    if (pid < 0)
        return error;
    return job.ended == 1 ? 0 : job.ended == 2 ? -1 : ECHILD;
}

#endif
