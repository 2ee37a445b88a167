/* A process that traces another task for this one (ptrace(2)).

   It is created by clone(2) with CLONE_VM: it shares this process's memory, through which it receives commands, and
   survives this process. From the first to the last ptrace call on a thread of the task, the code uses neither
   Python, nor the C library's locks, heap or thread-local data, nor the dynamic loader, because a thread that was
   killed may have held any of them. If its maker (the process that created it) dies, it completes the current
   command, removes all that it has created in the task, and exits.

   Only this process waits for its tracees, so that the id of a tracee that it has not reaped cannot be reused.

   What depends on the processor is in one header for each (`tracer_x86_64.h`, `tracer_aarch64.h`), included below at
   "the processor", where its contents are described. */
#ifndef IOBMD_TRACER_H
#define IOBMD_TRACER_H
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "raw_call.h"
/* Numbers that older headers lack; those from 424 on are the same on all processors. */
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#define SYS_io_uring_enter 426
#define SYS_io_uring_register 427
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif

enum iobmd_command {
    IOBMD_NOTHING, IOBMD_STOP, IOBMD_RUN, IOBMD_FREEZE, IOBMD_THAW, IOBMD_STAND_ALONE, IOBMD_COLLECT, IOBMD_END
};

enum iobmd_status {
    IOBMD_DONE,
    IOBMD_GONE,        /* the task has no threads left */
    IOBMD_REFUSED,     /* the kernel does not permit tracing it: `error` */
    IOBMD_FOREIGN_THREAD,    /* a thread of another process reused a thread's id, and is traced until this tracer ends */
    IOBMD_LATE,        /* no thread stopped, or one of those to be frozen did not */
    IOBMD_HELD,        /* it stops, but does not proceed to a system call: it is frozen, or not scheduled */
    IOBMD_CHANGED,     /* the task has changed its code, and would have made a different call */
    IOBMD_32_BIT,
    IOBMD_DIVERTED,    /* a handler receives its system calls (PR_SET_SYSCALL_USER_DISPATCH) */
    IOBMD_SIGNALLED,   /* a signal that cannot be blocked arrived before the call: `error` */
    IOBMD_FAILED,      /* the call with the index `failed` failed: `error` */
    IOBMD_ENDED,       /* the thread, or the guest, ended */
    IOBMD_STUCK,       /* a call of the guest has not returned by the deadline, or until it was cancelled */
    IOBMD_UNSEEN,      /* a process was created that this one does not see */
    IOBMD_UNREADABLE,  /* memory of the thread that must be read is absent: a fault could wait for this very thread */
    IOBMD_NO_MEMORY,
    IOBMD_UNCOPIED,    /* the shared object with the index `failed` could not be copied: `error` */
};

enum iobmd_made { IOBMD_NO_RANGE, IOBMD_SCRATCH, IOBMD_MAPPING };

/* The process that is created while all threads are stopped. After a snapshot is created, they resume. */
enum iobmd_wanted { IOBMD_NO_PROCESS, IOBMD_GUEST, IOBMD_SNAPSHOT };

/* A system call to be made by a thread of the task, or by the guest. */
struct iobmd_call {
    long number;
    unsigned long arguments[6];
    unsigned char of[6];   /* n: the argument is relative to the result of the nth call of the program; 0: to none */
    unsigned char made;    /* iobmd_made: it maps arguments[1] bytes, which the end of the session unmaps: always
                              (SCRATCH), or if the session has failed (MAPPING) */
    long result;
};

/* A thread of the task, and since when it has been sleeping in epoll_wait(2): 0 if irrelevant or unknown. */
struct iobmd_thread {
    pid_t tid;
    int cpu;               /* the processor it ran on last, or -1 */
    int64_t since_ns;      /* CLOCK_MONOTONIC */
    unsigned long switches;
    int64_t begun_ns;      /* when its stop began */
    char stands, ended, reaped;
    long call, slept;      /* where the processor requires it: the call in which it sleeps, or -1; how often it had slept */
    unsigned long argument;  /* the first one of that call */
    char restarts;         /* its call returned EINTR because of the stop, and was prepared to start again */
    unsigned long stack_low, stack_high;  /* its stack: what is below its stack pointer there is unused; 0: unknown */
};

/* The registers of a stopped thread, as for a core file. */
struct iobmd_registers {
    pid_t tid;
    unsigned int size;      /* bytes of the register sets that follow */
    unsigned long blocked;  /* signals */
};

/* One set of registers: its data follow, padded to a multiple of 8 bytes. */
struct iobmd_register_set {
    unsigned int type;      /* as of a note of a core file (NT_...) */
    unsigned int size;
};

/* A file that the task has mapped as shared memory, to be copied to memory of the maker while all threads are stopped. */
struct iobmd_object {
    char path[PATH_MAX];
    unsigned long inode, device;
    unsigned long offset, size;
    char *to;              /* zeroed */
    int has_holes;         /* its file system supports SEEK_DATA; nothing is written to `to` for a hole */
    int file;              /* the tracer's own descriptor, or -1 */
};

enum { IOBMD_CALLS = 16, IOBMD_RANGES_MADE = 16, IOBMD_LATE_THREADS = 16, IOBMD_TRACER_STACK = 64 << 10 };

struct iobmd_tracer {
    /* Set by the maker. */
    pid_t task;
    unsigned long page;         /* bytes of a page */
    unsigned long instruction;  /* the address of a system call instruction of the task */
    unsigned long returning;    /* the addresses of IOBMD_RETURNING and IOBMD_CALLING in the task; 0: unknown */
    unsigned long calling;
    long options;               /* of ptrace(2) */
    int is_thread;              /* of the maker: see iobmd_tracer_start() */
    int64_t patience_ns;        /* for the stop of all threads, and for one of several */
    int64_t short_ns;

    volatile int command;       /* a futex: IOBMD_NOTHING when it is done */
    volatile int cancelled;
    volatile int abandoned;     /* the maker no longer waits: this process exits as if the maker had died */
    struct iobmd_call calls[IOBMD_CALLS];
    int count;
    const struct iobmd_thread *known;  /* STOP, COLLECT: candidates; FREEZE: threads that sleep in epoll_wait */
    int knows;
    int64_t deadline_ns;        /* of the guest's calls */
    int may_wait;               /* RUN: abandon the calls if cancelled; memory that they map is not recorded */
    int wanted;                 /* FREEZE: iobmd_wanted */
    int records;                /* FREEZE: save the registers of all threads */
    struct iobmd_object *objects;  /* FREEZE: copied after the snapshot was created */
    int object_count;
    int failed_session;         /* COLLECT, END: unmap all that was mapped */

    /* The results. */
    int status, error, failed;
    volatile int64_t alarm_ns;  /* when its alarm kills it, because a read of a stopped thread's memory waits; 0: never */
    pid_t refused;              /* the thread that may not be traced */
    int64_t stopped_ns;         /* upper bound of the time for which a thread was stopped */
    pid_t guest, child;         /* in the pid namespace of this process; 0: none */
    char *registers;            /* FREEZE: `recorded` bytes: each thread's iobmd_registers and its sets */
    size_t recorded;

    /* Private to the tracer. */
    pid_t maker, maker_thread, pid, self;
    pthread_t thread;
    long pagemap, writes;       /* "pagemap" and "mem" of the thread to be stopped, opened before the stop, or -1 */
    int folder;                 /* /proc/PID of the task, and of no other process that may reuse the pid */
    int memory;                 /* memory of the program that the task runs now, not of a later one; or -1 */
    int alarm;                  /* a timer that kills this process, or -1 */
    int shares;                 /* whether kcmp(2) can confirm that the maker has the memory of this process */
    int guest_is_stuck, ending, unmaps_once_more, is_alone;
    int succeeds;               /* it takes the place of one that was killed */
    volatile int seizing;       /* iobmd_seizing */
    int64_t reaped_ns;          /* when dead threads were last reaped */
    int is_far;            /* whether the thread that was stopped last ran on another processor */
    int spins;             /* whether to spin before sleeping, because the tracee runs on another processor */
    long guest_there, child_there;  /* in the pid namespace of the task */
    long guest_began, child_began;  /* iobmd_began */
    pid_t made;                 /* by the last clone */
    struct iobmd_thread used;   /* the thread in which calls were made last */
    int clones;                 /* whether the last call is a clone that has begun */
    long cloned;                /* when it began, in clock ticks since boot */
    struct iobmd_thread late[IOBMD_LATE_THREADS];
    int lates;
    struct iobmd_thread *threads;  /* those that are frozen */
    int frozen, room;
    size_t registers_room;
    int64_t froze_ns;
    struct { unsigned long start, size; int made; } ranges[IOBMD_RANGES_MADE];
    char stack[IOBMD_TRACER_STACK] __attribute__((aligned(64)));
};

#if defined(__x86_64__) || defined(__aarch64__)

/* From linux/ptrace.h, which cannot be included together with sys/ptrace.h. */
enum {
    IOBMD_SEIZE = 0x4206, IOBMD_INTERRUPT = 0x4207, IOBMD_GETSIGINFO = 0x4202, IOBMD_GETSIGMASK = 0x420a,
    IOBMD_SETSIGMASK = 0x420b, IOBMD_SYSCALL_INFO = 0x420e /* Linux 5.3 */, IOBMD_RSEQ = 0x420f /* Linux 5.13 */,
    IOBMD_DISPATCH = 0x4211 /* Linux 6.4 */, IOBMD_EVENT_STOP = 128, IOBMD_EVENT_CLONE = 3,
    IOBMD_EXITKILL = 1 << 20, IOBMD_ENTRY = 1, IOBMD_EXIT = 2,
};
enum { IOBMD_NO_STACK = 8 };
/* Bits of a pagemap entry: a write to a page that a userfaultfd protects would wait for its handler (Linux 5.13); one to
   a page that is not exclusive, because it is shared since a fork or a zero page, would copy it. */
static const unsigned long IOBMD_PRESENT = 1ul << 63, IOBMD_SWAPPED = 1ul << 62, IOBMD_PROTECTED = 1ul << 57,
                           IOBMD_EXCLUSIVE = 1ul << 56;

/* The results by which the kernel marks a call that it will restart (linux/errno.h). */
enum { IOBMD_ERESTARTSYS = 512, IOBMD_ERESTARTNOINTR = 513, IOBMD_ERESTARTNOHAND = 514, IOBMD_ERESTARTBLOCK = 516 };

static const int64_t IOBMD_MS = 1000000;
static const long IOBMD_HZ = 100;                /* clock ticks per second in /proc (USER_HZ) */
static const int64_t IOBMD_FAR_NS = 25000;       /* a stop takes longer than this if it needs two processors */
static const int64_t IOBMD_SPIN_NS = 60000;      /* the longest spin; a stop that takes longer ends the spinning */
static const int64_t IOBMD_END_NS = 20000000000; /* ns within which a tracer must exit */
static const int64_t IOBMD_BEGIN = 1000000000;   /* ns within which a thread must begin a call */
static const int64_t IOBMD_DEATH = 5000000000;   /* ns within which a killed process must exit, and a new one stop */

struct iobmd_syscall_info {
    unsigned char at, unused[3];
    unsigned int architecture;
    unsigned long behind, stack;
    union { struct { unsigned long number, arguments[6]; } entry; struct { long result; } exit; };
};

/* -- system calls and time -- */

static long iobmd_ptrace(int request, pid_t tid, unsigned long address, const void *data)
{
    return iobmd_raw(SYS_ptrace, request, tid, (long)address, (long)data, 0, 0);
}

static int64_t iobmd_now(void)
{
    struct timespec now;
    iobmd_raw(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&now, 0, 0, 0, 0);
    return now.tv_sec * 1000 * IOBMD_MS + now.tv_nsec;
}

static int iobmd_has_our_memory(const struct iobmd_tracer *t)
{
    return !iobmd_raw(SYS_kcmp, t->maker, t->self, 1 /* KCMP_VM */, 0, 0, 0);
}

/* Return whether the commanding thread no longer exists: its process was killed, or executed another program. */
static int iobmd_is_orphan(const struct iobmd_tracer *t)
{
    return t->abandoned || (!t->is_thread && iobmd_raw(SYS_getppid, 0, 0, 0, 0, 0, 0) != t->maker) ||
           iobmd_raw(SYS_tgkill, t->maker, t->maker_thread, 0, 0, 0, 0) == -ESRCH ||
           (t->shares && !iobmd_has_our_memory(t));
}

/* Return whether to abandon all that may be abandoned. */
static int iobmd_gives_up(const struct iobmd_tracer *t)
{
    return !t->ending && (t->cancelled || iobmd_is_orphan(t));
}

/* -- tracees that have exited --

   As long as a dead thread is not reaped, the exit of its process is not reported to the parent, and another thread that
   executes a program waits, holding a lock for which PTRACE_SEIZE waits. */

static void iobmd_reap_all(void)
{
    siginfo_t end;
    do end.si_pid = 0;
    while (!iobmd_raw(SYS_waitid, P_ALL, 0, (long)&end, WEXITED | WNOHANG | __WALL, 0, 0) && end.si_pid);
}

static void iobmd_reap_one(int number)
{
    (void)number;
    iobmd_reap_all();
}

/* Reap a thread if it is dead, for a tracer that is a thread of the maker. */
static void iobmd_reap_thread(struct iobmd_thread *thread, int options)
{
    siginfo_t end = { 0 };
    if (thread->reaped) return;  /* another process may have its id now */
    iobmd_raw(SYS_waitid, P_PID, thread->tid, (long)&end, options | WEXITED | WNOHANG | __WALL, 0, 0);
    thread->reaped = end.si_pid && end.si_code != CLD_TRAPPED;  /* stops are reported in any case */
}

/* Reap the dead threads among those that a thread of the maker traces: it must not wait for the maker's children. Without
   __WNOTHREAD in `options`, those of another thread of the maker. The first thread of the task may be such a child. */
static void iobmd_reap_threads(struct iobmd_tracer *t, int options)
{
    for (int i = 0; i < t->frozen; i++)
        if (t->threads[i].tid != t->task) iobmd_reap_thread(&t->threads[i], options);
    for (int i = 0; i < t->lates; i++)
        if (t->late[i].tid != t->task) iobmd_reap_thread(&t->late[i], options);
}

static void iobmd_reap(struct iobmd_tracer *t)
{
    if (!t->is_thread) iobmd_reap_all();
    else iobmd_reap_threads(t, __WNOTHREAD);
    t->reaped_ns = iobmd_now();
}

/* Block or unblock SIGCHLD. While it is unblocked, it interrupts calls, and dead tracees are reaped at once. */
static void iobmd_admit_reports(const struct iobmd_tracer *t, int how)
{
    unsigned long reports = 1ul << (SIGCHLD - 1);
    if (!t->is_thread) iobmd_raw(SYS_rt_sigprocmask, how, (long)&reports, 0, sizeof reports, 0, 0);
}

/* Wait at most 2 ms for a report of a tracee; return whether there was one. A tracer thread of the maker must not
   consume the maker's signals, and only sleeps. */
static int iobmd_doze(struct iobmd_tracer *t)
{
    struct timespec moment = { 0, t->is_thread ? 50000 : 2 * IOBMD_MS };
    unsigned long reports = 1ul << (SIGCHLD - 1);
    int reported = 0;
    if (t->is_thread) {
        iobmd_raw(SYS_nanosleep, (long)&moment, 0, 0, 0, 0, 0);
        if (iobmd_now() - t->reaped_ns > 5 * IOBMD_MS) iobmd_reap(t);
    } else {
        reported = iobmd_raw(SYS_rt_sigtimedwait, (long)&reports, 0, (long)&moment, sizeof reports, 0, 0) > 0;
        iobmd_reap_all();
    }
    return reported;
}

/* -- files of /proc -- */

static char *iobmd_append(char *end, const char *text)
{
    while ((*end = *text++)) end++;
    return end;
}

static char *iobmd_append_number(char *end, unsigned long number)
{
    char digits[24], *first = digits + sizeof digits;
    *--first = 0;
    do *--first = (char)('0' + number % 10); while (number /= 10);
    return iobmd_append(end, first);
}

/* Open a file in the /proc directory of a thread of the task or of another tracee, "" for the directory itself;
   return a descriptor or a negative error number. */
static long iobmd_open(const struct iobmd_tracer *t, pid_t tid, const char *name, int flags)
{
    char path[64], *end = path;
    int is_guest = tid == t->guest || tid == t->child;
    if (is_guest) end = iobmd_append_number(iobmd_append(end, "/proc/"), (unsigned long)tid);
    else end = iobmd_append_number(iobmd_append(end, "task/"), (unsigned long)tid);
    iobmd_append(iobmd_append(end, "/"), name);
    return iobmd_raw(SYS_openat, is_guest ? AT_FDCWD : t->folder, (long)path, flags | O_CLOEXEC, 0, 0, 0);
}

static void iobmd_close(long file) { iobmd_raw(SYS_close, file, 0, 0, 0, 0, 0); }

/* Return the last number, or the letter, in the last line of a thread's status that begins with `name`; -1 if there is
   no such line. Earlier lines may be part of the name of the program, which can contain newlines. */
static long iobmd_status_field(const struct iobmd_tracer *t, pid_t tid, const char *name)
{
    char text[4096];
    long number = -1, at, size, file = iobmd_open(t, tid, "status", O_RDONLY);
    if (file < 0) return -1;
    size = iobmd_raw(SYS_read, file, (long)text, sizeof text - 1, 0, 0, 0);
    iobmd_close(file);
    if (size < 0) return -1;
    text[size] = 0;
    for (at = 0; at < size; at++) {
        const char *wanted = name, *found = text + at;
        if (at && text[at - 1] != '\n') continue;
        while (*wanted && *wanted == *found) wanted++, found++;
        if (*wanted) continue;
        while (*found == '\t' || *found == ' ') found++;
        if (*found > '9') number = *found;
        else for (number = 0; *found && *found != '\n'; found++)
            number = *found < '0' || *found > '9' ? 0 : number * 10 + *found - '0';
    }
    return number;
}

/* Return a field of a process's stat (proc_pid_stat(5)) that contains a number; -1 if there is no such process. */
static long iobmd_stat_field(const struct iobmd_tracer *t, pid_t pid, int wanted)
{
    char text[1024];
    long number = 0, at, size, file = iobmd_open(t, pid, "stat", O_RDONLY);
    if (file < 0) return -1;
    size = iobmd_raw(SYS_read, file, (long)text, sizeof text, 0, 0, 0);
    iobmd_close(file);
    for (at = size - 1; at >= 0 && text[at] != ')'; at--);  /* names may contain any byte */
    if (at < 0) return -1;
    for (int field = 2; field < wanted && at < size; at++) field += text[at] == ' ';
    for (; at < size && text[at] >= '0' && text[at] <= '9'; at++) number = number * 10 + text[at] - '0';
    return number;
}

/* Return when a process began, in clock ticks since boot, which distinguishes it from a later one with its id; -1 if it
   does not exist. */
static long iobmd_began(const struct iobmd_tracer *t, pid_t pid) { return iobmd_stat_field(t, pid, 22); }

/* Return the time as iobmd_began() does. */
static long iobmd_ticks(void)
{
    struct timespec now;
    iobmd_raw(SYS_clock_gettime, CLOCK_BOOTTIME, (long)&now, 0, 0, 0, 0);
    return now.tv_sec * IOBMD_HZ + now.tv_nsec / (1000 * IOBMD_MS / IOBMD_HZ);
}

static int iobmd_is_dead(const struct iobmd_tracer *t, pid_t tid)
{
    long state = iobmd_status_field(t, tid, "State:");
    return state == 'Z' || state == 'X';
}

/* Return whether a tracee has exited, or has executed another program, by which a thread takes over the id of its
   process. */
static int iobmd_is_gone(const struct iobmd_tracer *t, pid_t tid)
{
    return iobmd_is_dead(t, tid) || iobmd_status_field(t, tid, "TracerPid:") != t->self;
}

/* Kill this process after a time (0: never); the kernel then resumes the threads that it has stopped. */
static void iobmd_set_alarm(struct iobmd_tracer *t, int64_t after_ns)
{
    struct itimerspec when = { { 0, 0 }, { after_ns / (1000 * IOBMD_MS), after_ns % (1000 * IOBMD_MS) } };
    t->alarm_ns = after_ns ? iobmd_now() + after_ns : 0;
    if (t->alarm >= 0) iobmd_raw(SYS_timer_settime, t->alarm, 0, (long)&when, 0, 0, 0);
}

/* Return whether all pages of a range of a thread have these bits of their pagemap entry clear, and one of these set. */
static int iobmd_all_pages(const struct iobmd_tracer *t, pid_t tid, unsigned long address, size_t size,
                           unsigned long clear, unsigned long set)
{
    unsigned long page, entry;
    long file = t->pagemap >= 0 ? t->pagemap : iobmd_open(t, tid, "pagemap", O_RDONLY);
    if (file < 0) return 0;
    for (page = address / t->page; page <= (address + size - 1) / t->page; page++)
        if (iobmd_raw(SYS_pread64, file, (long)&entry, 8, (long)(page * 8), 0, 0) != 8 || entry & clear ||
            !(entry & set))
            break;
    if (file != t->pagemap) iobmd_close(file);
    return page > (address + size - 1) / t->page;
}

static int iobmd_read_words(const struct iobmd_tracer *t, pid_t tid, unsigned long address, void *data, size_t size)
{
    unsigned long word, at = address & ~7ul;
    if (!iobmd_all_pages(t, tid, address, size, 0, IOBMD_PRESENT | IOBMD_SWAPPED)) return IOBMD_UNREADABLE;
    for (; at < address + size; at += 8) {
        if (iobmd_ptrace(PTRACE_PEEKDATA, tid, at, &word)) return IOBMD_UNREADABLE;
        for (unsigned long byte = at; byte < at + 8; byte++)
            if (byte >= address && byte < address + size)
                ((char *)data)[byte - address] = (char)(word >> 8 * (byte - at));
    }
    return IOBMD_DONE;
}

/* Read the memory of a stopped thread if no page fault is necessary, because a fault could wait for a stopped thread. The
   thread's own id is used: the task's id gives no access to memory after the main thread has exited. The lock of the
   address space may be held by a thread that waits for this one, for example as the server of its FUSE file. Only SIGKILL
   ends a wait for the lock (and not even a wait of process_vm_readv(2)); nothing of the thread has been changed yet. */
static int iobmd_peek(struct iobmd_tracer *t, pid_t tid, unsigned long address, void *data, size_t size)
{
    int status;
    iobmd_set_alarm(t, IOBMD_BEGIN);
    status = iobmd_read_words(t, tid, address, data, size);
    iobmd_set_alarm(t, 0);
    return status;
}

/* -- one tracee -- */

/* Spin until a tracee stops; return whether it did. An idle processor of a virtual machine takes 15 to 30 us to wake up,
   for the tracee and then again for the tracer, which spins instead. */
static int iobmd_spin(struct iobmd_tracer *t, pid_t tid, siginfo_t *why)
{
    int64_t until = iobmd_now() + IOBMD_SPIN_NS;
    while (t->spins) {
        if (!iobmd_ptrace(IOBMD_GETSIGINFO, tid, 0, why)) return 1;
        if (iobmd_now() >= until) t->spins = 0;  /* it waits for this processor, or for others */
    }
    return 0;
}

/* Wait until a tracee stops, and return the reason in `why`. `may_give_up`: the wait may be abandoned. */
static int iobmd_await(struct iobmd_tracer *t, pid_t tid, int64_t until, int may_give_up, siginfo_t *why)
{
    for (;;) {
        long error = iobmd_ptrace(IOBMD_GETSIGINFO, tid, 0, why);
        if (!error) return IOBMD_DONE;
        if (error != -ESRCH) return IOBMD_ENDED;
        if (may_give_up && iobmd_gives_up(t)) return IOBMD_LATE;
        if (until && iobmd_now() >= until) return IOBMD_LATE;
        if (iobmd_spin(t, tid, why)) return IOBMD_DONE;
        if (!iobmd_doze(t) && iobmd_is_gone(t, tid)) return IOBMD_ENDED;
    }
}

static int iobmd_is_event_stop(const siginfo_t *why) { return why->si_code >> 8 == IOBMD_EVENT_STOP; }

/* Resume the tracee until the start or the end of a system call. */
static int iobmd_run_to(struct iobmd_tracer *t, pid_t tid, int at, int64_t until, int may_give_up,
                        struct iobmd_syscall_info *info)
{
    long signal_number = 0;
    for (;;) {
        siginfo_t why;
        int status;
        iobmd_ptrace(PTRACE_SYSCALL, tid, 0, (void *)signal_number);
        signal_number = 0;
        if ((status = iobmd_await(t, tid, until, may_give_up, &why))) return status;
        if (iobmd_ptrace(IOBMD_SYSCALL_INFO, tid, sizeof *info, info) < 0) return IOBMD_ENDED;
        if (info->at == at) return IOBMD_DONE;
        if (info->at == IOBMD_ENTRY || info->at == IOBMD_EXIT) continue;
        if (why.si_code >> 8 == IOBMD_EVENT_CLONE) {
            unsigned long made = 0;
            iobmd_ptrace(PTRACE_GETEVENTMSG, tid, 0, &made);
            t->made = (pid_t)made;
        } else if (!iobmd_is_event_stop(&why)) {
            /* A signal that cannot be blocked: SIGSTOP, which stops its process in any case, or a fault. */
            signal_number = why.si_signo;
            if (signal_number != SIGSTOP) {
                t->error = why.si_signo;
                return IOBMD_SIGNALLED;
            }
        }
    }
}

/* -- the processor --

   A header for a processor declares:
   IOBMD_PROCESSOR                     its name
   IOBMD_AUDIT, IOBMD_ELF              its numbers in linux/audit.h and linux/elf-em.h
   IOBMD_INSTRUCTION, .._ALIGNMENT     the system call instruction, and a divisor of its addresses
   IOBMD_RETURNING, IOBMD_CALLING      code for iobmd_protect(): that which makes the call rt_sigreturn(2), and any call
                                       followed by a return; "": unused
   struct iobmd_state                  the registers of a stopped thread, and other state that system calls change
   iobmd_load(), iobmd_store()         read and write the registers; load returns IOBMD_32_BIT for other programs
   iobmd_position(), iobmd_move()      read and set the program counter in a state
   iobmd_set_call()                    write the number and the arguments of a call into a state
   iobmd_protect()                     before calls are injected: let the thread restore its registers and its signal mask
                                       by itself, should this process be killed
   iobmd_start_call()                  run a tracee to the start of a call that is injected
   iobmd_skip()                        at the start of a call: make the kernel skip it
   iobmd_before_stopping()             record what a stop makes invisible
   iobmd_undo_eintr()                  after a stop: restart a call that returned EINTR because of the stop
   iobmd_know_processor()              called in the maker
   iobmd_leave_call()                  before calls are injected: leave the interrupted call; save what injected calls
                                       change
   iobmd_reenter_call()                afterwards: restore the signal mask, and the registers so that the interrupted call
                                       restarts; `made`: all calls were made, so that others can be
   iobmd_before_detaching()            restart the call of a thread that made no other calls
   iobmd_sets_expected(), IOBMD_SETS_SIZE, iobmd_save_sets()
                                       the register sets of a thread: their usual and largest size in bytes, and how to
                                       save them

   The numbers of system calls are those of sys/syscall.h. */

struct iobmd_named_call { const char *name; int number; };

/* The calls that are made in other tasks. */
static const struct iobmd_named_call iobmd_made_calls[] = {
    { "clone", SYS_clone }, { "close", SYS_close }, { "close_range", SYS_close_range },
    { "io_uring_register", SYS_io_uring_register }, { "io_uring_setup", SYS_io_uring_setup }, { "mlock", SYS_mlock },
    { "mmap", SYS_mmap }, { "mprotect", SYS_mprotect }, { "munlock", SYS_munlock }, { "munmap", SYS_munmap },
    { "recvfrom", SYS_recvfrom }, { "recvmsg", SYS_recvmsg }, { "socketpair", SYS_socketpair },
    { "unshare", SYS_unshare }, { "userfaultfd", SYS_userfaultfd }, { NULL, 0 }
};

/* Calls that may return EINTR after a stop although no signal handler ran (signal(7)); the kernel itself restarts the
   others. Such a call has had no effect, and can be restarted. */
static const struct iobmd_named_call iobmd_calls_ended_by_a_stop[] = {
    { "accept", SYS_accept }, { "accept4", SYS_accept4 }, { "connect", SYS_connect },
    { "epoll_pwait", SYS_epoll_pwait }, { "epoll_pwait2", SYS_epoll_pwait2 },
#ifdef SYS_epoll_wait
    { "epoll_wait", SYS_epoll_wait },
#endif
    { "io_getevents", SYS_io_getevents }, { "io_pgetevents", SYS_io_pgetevents },
    { "io_uring_enter", SYS_io_uring_enter }, { "read", SYS_read }, { "readv", SYS_readv },
    { "recvfrom", SYS_recvfrom }, { "recvmmsg", SYS_recvmmsg }, { "recvmsg", SYS_recvmsg },
    { "rt_sigtimedwait", SYS_rt_sigtimedwait }, { "semop", SYS_semop }, { "semtimedop", SYS_semtimedop },
    { "sendmmsg", SYS_sendmmsg }, { "sendmsg", SYS_sendmsg }, { "sendto", SYS_sendto }, { "write", SYS_write },
    { "writev", SYS_writev }, { NULL, 0 }
};

static int iobmd_is_ended_by_a_stop(unsigned long call)
{
    for (const struct iobmd_named_call *one = iobmd_calls_ended_by_a_stop; one->name; one++)
        if ((unsigned long)one->number == call) return 1;
    return 0;
}

/* Return the remaining timeout of a thread's epoll_wait in milliseconds, to be stored in the register of the timeout,
   which the C library does not read again. If the timeout is in memory or is a socket option, the call starts again with
   the whole timeout. */
static unsigned long iobmd_remaining(const struct iobmd_tracer *t, const struct iobmd_thread *thread,
                                     unsigned long timeout)
{
    int64_t left;
    /* One sleep more than before, that of this stop: the thread has been in the same call since. */
    if ((int)timeout <= 0 || !thread->since_ns ||
        iobmd_status_field(t, thread->tid, "voluntary_ctxt_switches:") != (long)thread->switches + 1)
        return timeout;
    left = (int)timeout * IOBMD_MS - (iobmd_now() - thread->since_ns);
    return left > 0 ? (unsigned long)((left + IOBMD_MS - 1) / IOBMD_MS) : 0;
}

/* The register sets of a thread, as they are appended. */
struct iobmd_sets { char *at, *end; };

/* Append a set, and return the place for its data. */
static void *iobmd_add_set(struct iobmd_sets *sets, unsigned int type, size_t size)
{
    struct iobmd_register_set *set = (struct iobmd_register_set *)sets->at;
    set->type = type;
    set->size = (unsigned int)size;
    sets->at += sizeof *set + ((size + 7) & ~(size_t)7);
    return set + 1;
}

/* Append a set as PTRACE_GETREGSET returns it, unless it is absent, or not larger than `empty` bytes; return its data
   or NULL. */
static void *iobmd_add_regset(struct iobmd_sets *sets, pid_t tid, unsigned int type, size_t empty)
{
    char *data = sets->at + sizeof(struct iobmd_register_set);
    struct iovec area = { data, (size_t)(sets->end - data) };
    if (iobmd_ptrace(PTRACE_GETREGSET, tid, type, &area) || area.iov_len <= empty) return NULL;
    return iobmd_add_set(sets, type, area.iov_len);
}

struct iobmd_state;
static int iobmd_is_at(struct iobmd_tracer *t, pid_t tid, unsigned long address, int *found);
static int iobmd_make(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *base, unsigned long instruction,
                      struct iobmd_call *call, int64_t until, int may_give_up);
static int iobmd_begin(struct iobmd_tracer *t, pid_t tid, struct iobmd_syscall_info *info);
static int iobmd_begin_call(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *base,
                            unsigned long instruction, const struct iobmd_call *call);

#if defined(__x86_64__)
#include "tracer_x86_64.h"
#else
#include "tracer_aarch64.h"
#endif

/* -- calls of a tracee -- */

/* Return whether a system call instruction is at an address, which must be in memory. */
static int iobmd_is_at(struct iobmd_tracer *t, pid_t tid, unsigned long address, int *found)
{
    unsigned char code[sizeof IOBMD_INSTRUCTION - 1];
    int status = iobmd_peek(t, tid, address, code, sizeof code);
    *found = !status && !__builtin_memcmp(code, IOBMD_INSTRUCTION, sizeof code);
    return status;
}

/* Run a tracee to the start of its next system call, which its instruction is to begin at once. */
static int iobmd_begin(struct iobmd_tracer *t, pid_t tid, struct iobmd_syscall_info *info)
{
    siginfo_t why;
    int status = iobmd_run_to(t, tid, IOBMD_ENTRY, iobmd_now() + IOBMD_BEGIN, 0, info);
    if (status != IOBMD_LATE) return status;
    /* It has not begun: withdraw it. Registers can be restored only while the thread is stopped, and a thread that is
       frozen (cgroup version 1) stops when it is thawed. The maker does not wait for that. */
    iobmd_ptrace(IOBMD_INTERRUPT, tid, 0, NULL);
    status = iobmd_await(t, tid, 0, 0, &why);
    return status ? status : IOBMD_HELD;
}

/* Return whether a tracee that begins a system call begins this one. Another thread of its task may write to the code
   at any time, and thus choose the call. Seccomp filters are suspended for the tracee, so that only the intended call
   may be made. */
static int iobmd_is_call(const struct iobmd_syscall_info *info, unsigned long instruction, const struct iobmd_call *call)
{
    const unsigned long *arguments = info->entry.arguments;
    if (info->architecture != IOBMD_AUDIT || info->behind != instruction + sizeof IOBMD_INSTRUCTION - 1) return 0;
    for (int i = 0; i < 6; i++)
        if (arguments[i] != call->arguments[i]) return 0;
    return info->entry.number == (unsigned long)call->number;
}

/* Run a stopped tracee to the start of a system call; `base` contains its other registers. */
static int iobmd_begin_call(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *base,
                            unsigned long instruction, const struct iobmd_call *call)
{
    struct iobmd_state state = *base;
    struct iobmd_syscall_info info;
    int status;
    iobmd_move(&state, instruction);
    iobmd_set_call(&state, call);
    if ((status = iobmd_store(tid, &state)) || (status = iobmd_begin(t, tid, &info))) return status;
    if (iobmd_is_call(&info, instruction, call)) return IOBMD_DONE;
    iobmd_skip(tid);
    iobmd_run_to(t, tid, IOBMD_EXIT, iobmd_now() + IOBMD_BEGIN, 0, &info);
    return IOBMD_CHANGED;
}

/* Make one system call in a stopped tracee; `base` contains its other registers. */
static int iobmd_make(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *base, unsigned long instruction,
                      struct iobmd_call *call, int64_t until, int may_give_up)
{
    struct iobmd_syscall_info info;
    int64_t begin = iobmd_now() + IOBMD_BEGIN;
    int status;
    t->made = 0;
    do {
        if ((status = iobmd_start_call(t, tid, base, instruction, call))) return status;
        t->clones = call->number == SYS_clone;
        t->cloned = t->clones ? iobmd_ticks() : 0;
        if ((status = iobmd_run_to(t, tid, IOBMD_EXIT, until, may_give_up, &info))) return status;
        call->result = info.exit.result;
        /* The kernel would restart the call after a SIGSTOP. */
    } while (call->result <= -IOBMD_ERESTARTSYS && call->result >= -IOBMD_ERESTARTNOHAND && iobmd_now() < begin);
    return call->result <= -IOBMD_ERESTARTSYS && call->result >= -IOBMD_ERESTARTNOHAND ? IOBMD_HELD : IOBMD_DONE;
}

static void iobmd_note_range(struct iobmd_tracer *t, const struct iobmd_call *call)
{
    for (int i = 0; i < IOBMD_RANGES_MADE; i++)
        if (!t->ranges[i].size) {
            t->ranges[i].start = (unsigned long)call->result;
            t->ranges[i].size = call->arguments[1];
            t->ranges[i].made = call->made;
            return;
        }
}

/* Remove a range that the task has unmapped on request from the record. It must not be unmapped again, because other
   memory may be mapped there later. */
static void iobmd_forget_range(struct iobmd_tracer *t, unsigned long start, unsigned long size)
{
    for (int i = 0; i < IOBMD_RANGES_MADE; i++) {
        unsigned long first = t->ranges[i].start, end = first + t->ranges[i].size;
        if (start <= first && first < start + size) {
            t->ranges[i].start = start + size < end ? start + size : end;
            t->ranges[i].size = end - t->ranges[i].start;
        } else if (first < start && start < end && start + size >= end)
            t->ranges[i].size = start - first;
    }
}

/* Make system calls one after another until one fails. */
static int iobmd_program(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *base, struct iobmd_call *calls,
                         int count, int64_t until, int may_give_up)
{
    for (t->failed = 0; t->failed < count; t->failed++) {
        struct iobmd_call *call = calls + t->failed;
        int status;
        for (int i = 0; i < 6; i++)
            if (call->of[i]) call->arguments[i] += (unsigned long)calls[call->of[i] - 1].result;
        if ((status = iobmd_make(t, tid, base, t->instruction, call, until, may_give_up))) return status;
        if (call->result < 0 && call->result > -4096) {
            t->error = (int)-call->result;
            return IOBMD_FAILED;
        }
        if (call->made) iobmd_note_range(t, call);
        if (call->number == SYS_munmap) iobmd_forget_range(t, call->arguments[0], call->arguments[1]);
    }
    return IOBMD_DONE;
}

/* -- a thread of the task -- */

/* PTRACE_SEIZE waits for a thread that executes a program, and that thread waits until a dead thread is reaped. If the
   tracer is a thread of the maker, no signal can interrupt its wait: the maker reaps the dead thread. */
enum iobmd_seizing { IOBMD_NOT_SEIZING, IOBMD_SEIZING, IOBMD_HELPED };

static void iobmd_begin_seizing(struct iobmd_tracer *t)
{
    if (t->is_thread) __atomic_store_n(&t->seizing, IOBMD_SEIZING, __ATOMIC_RELEASE);
}

static void iobmd_end_seizing(struct iobmd_tracer *t)
{
    int seizing = IOBMD_SEIZING;
    while (t->is_thread && !__atomic_compare_exchange_n(&t->seizing, &seizing, IOBMD_NOT_SEIZING, 0, __ATOMIC_ACQ_REL,
                                                        __ATOMIC_RELAXED)) {
        seizing = IOBMD_SEIZING;
        iobmd_raw(SYS_sched_yield, 0, 0, 0, 0, 0, 0);  /* the maker reads the lists of threads */
    }
}

static void iobmd_help_seizing(struct iobmd_tracer *t)
{
    int seizing = IOBMD_SEIZING;
    if (!__atomic_compare_exchange_n(&t->seizing, &seizing, IOBMD_HELPED, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
    iobmd_reap_threads(t, 0);
    __atomic_store_n(&t->seizing, IOBMD_SEIZING, __ATOMIC_RELEASE);
}

/* Begin to stop a thread. Only when it is traced, and cannot disappear, can its process be determined; until then,
   nothing in it is changed. */
static int iobmd_seize(struct iobmd_tracer *t, struct iobmd_thread *thread)
{
    long error;
    iobmd_before_stopping(t, thread);
    iobmd_admit_reports(t, SIG_UNBLOCK);
    iobmd_reap(t);
    iobmd_begin_seizing(t);
    error = iobmd_ptrace(IOBMD_SEIZE, thread->tid, 0, NULL);
    iobmd_end_seizing(t);
    iobmd_admit_reports(t, SIG_BLOCK);
    thread->stands = thread->restarts = 0;
    /* A thread that executes a program takes over the id of its process: it is already seized. */
    if (error == -EPERM && iobmd_status_field(t, thread->tid, "TracerPid:") == t->self) error = 0;
    if (error == -ESRCH || (error && iobmd_is_dead(t, thread->tid))) return IOBMD_ENDED;
    if (error) {
        t->error = (int)-error;
        t->refused = thread->tid;
        return IOBMD_REFUSED;
    }
    long folder = iobmd_open(t, thread->tid, "", O_PATH);
    if (folder < 0) {
        char path[32];
        iobmd_append_number(iobmd_append(path, "/proc/"), (unsigned long)thread->tid);
        folder = iobmd_raw(SYS_openat, AT_FDCWD, (long)path, O_PATH | O_CLOEXEC, 0, 0, 0);
        if (folder < 0) return IOBMD_ENDED;
        iobmd_close(folder);
        return IOBMD_FOREIGN_THREAD;
    }
    iobmd_close(folder);
    thread->begun_ns = iobmd_now();
    return iobmd_ptrace(IOBMD_INTERRUPT, thread->tid, 0, NULL) ? IOBMD_ENDED : IOBMD_DONE;
}

/* Return the signal that a stopped tracee is about to get; 0 if it stopped for another reason. */
static long iobmd_signal_of(const siginfo_t *why)
{
    int is_report = why->si_signo == SIGTRAP && (why->si_code == (SIGTRAP | 0x80) || why->si_code >> 8 > 0);
    return is_report ? 0 : why->si_signo;
}

/* Wait until a thread is stopped between two of its own instructions. */
static int iobmd_stand(struct iobmd_tracer *t, struct iobmd_thread *thread, int64_t until)
{
    siginfo_t why;
    int status;
    while (!(status = iobmd_await(t, thread->tid, until, 1, &why)) && !iobmd_is_event_stop(&why)) {
        iobmd_ptrace(PTRACE_CONT, thread->tid, 0, (void *)iobmd_signal_of(&why));
        iobmd_ptrace(IOBMD_INTERRUPT, thread->tid, 0, NULL);  /* again: any other stop cancels a pending one */
    }
    if (status) return status;
    thread->stands = 1;
    iobmd_undo_eintr(t, thread);
    return IOBMD_DONE;
}

/* Detach from a thread, or reap it. Return 0 if it has not stopped yet, or has not exited yet: the exit of this process
   detaches it. */
static int iobmd_detach(struct iobmd_tracer *t, struct iobmd_thread *thread)
{
    int stands = thread->stands || !iobmd_stand(t, thread, 1);
    if (stands) iobmd_before_detaching(t, thread);
    thread->stands = 0;
    if (stands && !iobmd_ptrace(PTRACE_DETACH, thread->tid, 0, NULL)) return 1;
    if (!t->is_thread) iobmd_reap_all();
    /* The kernel reports the exit of a child of the maker to the maker, and also while it is traced. */
    else if (thread->tid != t->task || iobmd_status_field(t, thread->tid, "PPid:") != t->maker)
        iobmd_reap_thread(thread, __WNOTHREAD);
    return iobmd_status_field(t, thread->tid, "TracerPid:") != t->self;
}

/* Abort a restartable sequence, as the kernel does when it interrupts one; an injected call hides the interruption
   from the kernel (rseq(2)). */
static int iobmd_abort_sequence(struct iobmd_tracer *t, pid_t tid, struct iobmd_state *state)
{
    unsigned long area[3] = { 0, 0, 0 }, descriptor = 0;
    struct { unsigned int version, flags; unsigned long start, length, abort; } sequence;
    int status;
    if (iobmd_ptrace(IOBMD_RSEQ, tid, sizeof area, area) < 0 || !area[0]) return IOBMD_DONE;
    if ((status = iobmd_peek(t, tid, area[0] + 8, &descriptor, sizeof descriptor)) || !descriptor) return status;
    if ((status = iobmd_peek(t, tid, descriptor, &sequence, sizeof sequence))) return status;
    if (iobmd_position(state) - sequence.start < sequence.length) iobmd_move(state, sequence.abort);
    return IOBMD_DONE;
}

/* Make system calls in a stopped thread, and restore its state. The calls must never block, because the thread cannot
   be removed from a blocked call. */
static int iobmd_use(struct iobmd_tracer *t, struct iobmd_thread *thread, struct iobmd_call *calls, int count)
{
    struct iobmd_state before;
    pid_t tid = thread->tid;
    unsigned long mask, all = ~0ul, dispatch[4] = { 0, 0, 0, 0 };
    int status, found;
    if (!count) return IOBMD_DONE;
    if (!thread->stack_high && tid == t->used.tid)  /* it ran when the maker looked for its stack, or the maker is dead */
        thread->stack_low = t->used.stack_low, thread->stack_high = t->used.stack_high;
    t->used = *thread;
    if ((status = iobmd_load(tid, &before))) return status;
    if (!iobmd_ptrace(IOBMD_DISPATCH, tid, sizeof dispatch, dispatch) && dispatch[0]) return IOBMD_DIVERTED;
    /* It may have executed another program since the instruction was found. */
    if ((status = iobmd_is_at(t, tid, t->instruction, &found))) return status;
    if (!found) return IOBMD_UNREADABLE;
    if ((status = iobmd_abort_sequence(t, tid, &before))) return status;
    if (iobmd_ptrace(PTRACE_SETOPTIONS, tid, 0, (void *)(t->options | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE)))
        return IOBMD_ENDED;
    if (iobmd_ptrace(IOBMD_GETSIGMASK, tid, sizeof mask, &mask)) return IOBMD_ENDED;
    if (!(status = iobmd_protect(t, thread, &before, mask))) {
        iobmd_ptrace(IOBMD_SETSIGMASK, tid, sizeof all, &all);
        if (!(status = iobmd_leave_call(t, thread, &before)))
            status = iobmd_program(t, tid, &before, calls, count, 0, 0);
    }
    iobmd_reenter_call(t, thread, &before, !status || status == IOBMD_FAILED, mask);
    return status;
}

static void iobmd_run_near(const struct iobmd_tracer *t, int cpu)
{
    /* A tracer and its tracee alternate in 3 us on one processor, and in 17 us on two. */
    unsigned long set[16] = { 0 };
    if (t->is_thread || cpu < 0 || cpu >= (int)sizeof set * 8) return;
    set[cpu / 64] = 1ul << cpu % 64;
    iobmd_raw(SYS_sched_setaffinity, 0, sizeof set, (long)set, 0, 0, 0);
}

static void iobmd_open_files(struct iobmd_tracer *t, pid_t tid)
{
    t->pagemap = iobmd_open(t, tid, "pagemap", O_RDONLY);
    if (t->returning) t->writes = iobmd_open(t, tid, "mem", O_WRONLY);
}

static void iobmd_close_files(struct iobmd_tracer *t)
{
    if (t->pagemap >= 0) iobmd_close(t->pagemap);
    if (t->writes >= 0) iobmd_close(t->writes);
    t->pagemap = t->writes = -1;
}

/* Detach from threads that stopped too late to be used, or reap them; the others remain for the next call. */
static void iobmd_detach_late(struct iobmd_tracer *t)
{
    int left = 0;
    for (int i = 0; i < t->lates; i++)
        if (!iobmd_detach(t, &t->late[i])) t->late[left++] = t->late[i];
    t->lates = left;
}

static void iobmd_add_late(struct iobmd_tracer *t, const struct iobmd_thread *thread)
{
    if (t->lates < IOBMD_LATE_THREADS) t->late[t->lates++] = *thread;
}

/* Return whether a thread that has not stopped is executing a program, or may be. */
static int iobmd_may_execute(const struct iobmd_tracer *t, const struct iobmd_thread *thread)
{
    char text[16] = "";
    int digits = 0;
    long number = 0, file;
    if (thread->stands || thread->tid == t->task) return 0;
    file = iobmd_open(t, thread->tid, "syscall", O_RDONLY);
    if (file < 0) return 1;
    iobmd_raw(SYS_read, file, (long)text, sizeof text - 1, 0, 0, 0);
    iobmd_close(file);
    for (; text[digits] >= '0' && text[digits] <= '9'; digits++) number = number * 10 + (text[digits] - '0');
    return !digits || number == SYS_execve || number == SYS_execveat;  /* no digits: "running" */
}

/* Return whether a thread that is traced and has not stopped yet may take over the id of the first thread, by executing a
   program: what is done to the first thread would then be done to the new program. */
static int iobmd_may_be_replaced(const struct iobmd_tracer *t)
{
    int may = 0;
    for (int i = 0; i < t->lates; i++) may |= iobmd_may_execute(t, &t->late[i]);
    for (int i = 0; i < t->frozen; i++) may |= iobmd_may_execute(t, &t->threads[i]);
    return may;
}

/* Stop the first of several threads that stops soon, make system calls in it, and resume it. */
static int iobmd_stop(struct iobmd_tracer *t, const struct iobmd_thread *threads, int known, struct iobmd_call *calls,
                      int count)
{
    int result = IOBMD_LATE, gone = 0;
    for (int i = 0; i < known; i++) {
        struct iobmd_thread thread = threads[i];
        int64_t ended, stood;
        int status = IOBMD_DONE, late;
        if (thread.tid == t->task && iobmd_may_be_replaced(t)) continue;
        for (late = 0; late < t->lates && t->late[late].tid != thread.tid;) late++;
        iobmd_run_near(t, thread.cpu);
        if (late == t->lates) {
            iobmd_open_files(t, thread.tid);
            status = iobmd_seize(t, &thread);
        } else thread = t->late[late];
        if (!status) status = iobmd_stand(t, &thread, iobmd_now() + t->short_ns);
        if (status) iobmd_close_files(t);
        if ((status == IOBMD_LATE || status == IOBMD_ENDED) && late == t->lates) iobmd_add_late(t, &thread);
        gone += status == IOBMD_ENDED;
        if (status == IOBMD_REFUSED || status == IOBMD_FOREIGN_THREAD) return status;
        if (status) continue;
        if (late < t->lates) t->late[late] = t->late[--t->lates];
        t->spins = t->is_far = !t->is_thread && iobmd_now() - thread.begun_ns > IOBMD_FAR_NS;
        result = iobmd_use(t, &thread, calls, count);
        t->spins = 0;
        if (!iobmd_detach(t, &thread)) iobmd_add_late(t, &thread);
        ended = iobmd_now();
        iobmd_close_files(t);
        stood = ended - thread.begun_ns;
        if (stood > t->stopped_ns) t->stopped_ns = stood;
        if (result != IOBMD_UNREADABLE) break;
    }
    if (result == IOBMD_LATE && gone < known) return IOBMD_LATE;
    iobmd_detach_late(t);
    if (result == IOBMD_LATE) return IOBMD_GONE;
    return result;
}

/* Call a function for each thread of the task as long as it returns 0; return its last result. */
static int iobmd_each_thread(struct iobmd_tracer *t, int (*function)(struct iobmd_tracer *, pid_t, void *), void *data)
{
    char entries[8192] __attribute__((aligned(8)));
    int status = IOBMD_DONE;
    long size, folder = iobmd_raw(SYS_openat, t->folder, (long)"task", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    if (folder < 0) return IOBMD_GONE;
    while (!status && (size = iobmd_raw(SYS_getdents64, folder, (long)entries, sizeof entries, 0, 0, 0)) > 0)
        for (long at = 0; at < size && !status; at += *(unsigned short *)(entries + at + 16)) {
            pid_t tid = 0;
            for (const char *digit = entries + at + 19; *digit >= '0' && *digit <= '9'; digit++)
                tid = tid * 10 + (*digit - '0');
            if (tid) status = function(t, tid, data);
        }
    iobmd_close(folder);
    return status;
}

/* -- the guest -- */

/* Wait until a new process is ready for calls, and request that it be killed when this one exits. */
static int iobmd_receive(struct iobmd_tracer *t, pid_t pid)
{
    siginfo_t why;
    int status = iobmd_await(t, pid, iobmd_now() + IOBMD_DEATH, 0, &why);
    if (!status)
        iobmd_ptrace(PTRACE_SETOPTIONS, pid, 0,
                     (void *)(t->options | IOBMD_EXITKILL | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE));
    return status;
}

/* A process that a thread of the task, or a guest, has created by a clone whose event was not reported. */
struct iobmd_lost { int is_dead, lives; pid_t found; };

/* Search the children of a thread for the process. Its parent learns nothing of its death: its exit signal is 0. */
static int iobmd_find_child(struct iobmd_tracer *t, pid_t tid, void *data)
{
    struct iobmd_lost *lost = data;
    char text[8192];
    pid_t guest = t->guest;
    long size, file = iobmd_open(t, tid, "children", O_RDONLY);
    if (file < 0) return IOBMD_DONE;
    size = iobmd_raw(SYS_read, file, (long)text, sizeof text, 0, 0, 0);
    iobmd_close(file);
    for (long at = 0; at < size && !lost->found; at++) {
        pid_t pid = 0;
        for (; at < size && text[at] != ' '; at++) pid = pid * 10 + (text[at] - '0');
        t->guest = pid;  /* iobmd_open() finds it by this */
        if (pid != guest && !iobmd_stat_field(t, pid, 38) && iobmd_began(t, pid) >= t->cloned) {
            long signal_number = iobmd_stat_field(t, pid, 52) & 0x7f;  /* that killed it */
            int died = iobmd_is_dead(t, pid) && (signal_number == SIGKILL || signal_number == SIGSEGV);
            if (lost->is_dead ? died : !iobmd_is_gone(t, pid)) lost->found = pid;
            else if (!iobmd_is_dead(t, pid)) lost->lives = 1;
        }
    }
    t->guest = guest;
    return lost->found ? IOBMD_LATE : IOBMD_DONE;
}

/* Return the process that a thread has created by a clone during which the thread was killed, for example by another
   thread's execve(2). Its event is not reported in that case, but the process is traced nevertheless, and stops at its
   first instruction; waitid(2) has reported that stop to iobmd_reap_all() before. With `is_dead`, the process has died
   with a tracer that was killed. 0: there is none. */
static pid_t iobmd_find_lost(struct iobmd_tracer *t, int is_dead)
{
    struct iobmd_lost lost = { is_dead, 0, 0 };
    int64_t begun = iobmd_now(), wait;
    for (;;) {
        lost.lives = 0;
        iobmd_each_thread(t, iobmd_find_child, &lost);
        if (lost.found) return lost.found;
        wait = 10 * IOBMD_MS;  /* a thread that executes a program changes its id */
        /* The thread, which blocks all signals then, may still have to make the call, and the process to die. */
        if (is_dead && (lost.lives || iobmd_status_field(t, t->used.tid, "SigBlk:") == 'f')) wait = 3 * IOBMD_BEGIN;
        if (iobmd_now() - begun >= wait) return 0;
        iobmd_doze(t);
    }
}

/* Record the process that a guest has created. */
static void iobmd_take_snapshot(struct iobmd_tracer *t, long child_there)
{
    t->child = t->made;
    t->child_there = child_there > 0 ? child_there : iobmd_status_field(t, t->made, "NSpid:");
    t->child_began = iobmd_began(t, t->made);
}

static void iobmd_take_guest(struct iobmd_tracer *t, const struct iobmd_call *calls, int count, int status)
{
    if (status == IOBMD_ENDED && t->clones && !t->made) t->made = iobmd_find_lost(t, 0);
    for (int i = 0; i < count; i++)
        if (calls[i].number == SYS_clone && t->made) {
            t->guest = t->made;
            /* A thread that exits during the call returns no pid. */
            t->guest_there = calls[i].result > 0 ? calls[i].result : iobmd_status_field(t, t->made, "NSpid:");
            t->guest_began = iobmd_began(t, t->made);
        }
    t->clones = 0;
}

/* Complete the record of a tracer that was killed in the middle of a command: threads were resumed, guests died. */
static void iobmd_inherit(struct iobmd_tracer *t)
{
    const struct iobmd_call clone = { .number = SYS_clone };
    t->frozen = t->lates = t->knows = t->seizing = 0;
    t->froze_ns = t->alarm_ns = 0;
    if (t->clones && !t->made) t->made = iobmd_find_lost(t, 1);
    if (t->clones && t->made && t->guest && t->guest != t->made) iobmd_take_snapshot(t, 0);
    else if (t->clones) iobmd_take_guest(t, &clone, 1, IOBMD_DONE);
    t->clones = 0;
    t->guest_is_stuck = 1;
}

/* Make system calls in a guest or a snapshot, which may block until the deadline. */
static int iobmd_run_in(struct iobmd_tracer *t, pid_t pid, struct iobmd_call *calls, int count, int64_t until,
                        int may_give_up)
{
    struct iobmd_state state;
    int status = iobmd_load(pid, &state);
    if (status) return status;
    status = iobmd_program(t, pid, &state, calls, count, until, may_give_up);
    return status == IOBMD_LATE ? IOBMD_STUCK : status;
}

static int iobmd_run_guest(struct iobmd_tracer *t, struct iobmd_call *calls, int count, int64_t until, int may_give_up)
{
    int status;
    if (!t->guest || t->guest_is_stuck) return IOBMD_ENDED;
    status = iobmd_run_in(t, t->guest, calls, count, until, may_give_up);
    t->guest_is_stuck = status && status != IOBMD_FAILED;
    return status;
}

/* Kill a guest or snapshot, and reap it as its tracer. */
static void iobmd_kill(struct iobmd_tracer *t, pid_t pid)
{
    int64_t until = iobmd_now() + IOBMD_DEATH;
    /* If it has ended by itself, it has been reaped, and its id may be that of another process now. */
    if (iobmd_ptrace(IOBMD_INTERRUPT, pid, 0, NULL)) return;
    if (iobmd_raw(SYS_kill, pid, SIGKILL, 0, 0, 0, 0)) iobmd_ptrace(PTRACE_KILL, pid, 0, NULL);
    while (iobmd_now() < until) {
        siginfo_t end = { 0 };
        long error = iobmd_raw(SYS_waitid, P_PID, pid, (long)&end, WEXITED | WNOHANG | __WALL, 0, 0);
        if (error || (end.si_pid && end.si_code != CLD_TRAPPED)) return;  /* stops are reported in any case */
        iobmd_doze(t);
    }
}

static struct iobmd_call iobmd_new_call(long number, unsigned long a, unsigned long b, unsigned long c)
{
    struct iobmd_call call;
    __builtin_memset(&call, 0, sizeof call);
    call.number = number;
    call.arguments[0] = a;
    call.arguments[1] = b;
    call.arguments[2] = c;
    return call;
}

/* Collect the calls that unmap all that the session has mapped in the task and must not leave there; return their
   number. */
static int iobmd_ranges_left(const struct iobmd_tracer *t, struct iobmd_call *calls)
{
    int count = 0;
    for (int i = 0; i < IOBMD_RANGES_MADE; i++)
        if (t->ranges[i].size && (t->failed_session || t->ranges[i].made == IOBMD_SCRATCH))
            calls[count++] = iobmd_new_call(SYS_munmap, t->ranges[i].start, t->ranges[i].size, 0);
    return count;
}

struct iobmd_collection { struct iobmd_call *calls; int count, alive, unreadable; };

static int iobmd_collect_by(struct iobmd_tracer *t, pid_t tid, void *data)
{
    struct iobmd_collection *left = data;
    struct iobmd_thread thread = { .tid = tid, .cpu = -1 };
    int status = iobmd_stop(t, &thread, 1, left->calls, left->count);
    left->alive += status != IOBMD_GONE;
    left->unreadable += status == IOBMD_UNREADABLE;
    if (status == IOBMD_DONE) return left->calls[left->count - 1].result ? IOBMD_FAILED : IOBMD_LATE;
    return status == IOBMD_FAILED || status == IOBMD_FOREIGN_THREAD ? status : IOBMD_DONE;
}

static int iobmd_clone_by(struct iobmd_tracer *t, pid_t tid, void *data)
{
    struct iobmd_thread thread = { .tid = tid, .cpu = -1 };
    return iobmd_stop(t, &thread, 1, data, 1) == IOBMD_DONE ? IOBMD_LATE : IOBMD_DONE;
}

/* Unmap in another guest what a guest that was stuck or killed has not unmapped. A thread of the task could not be
   removed from a call that waits for the lock of the address space. If that is still held, a page or two remain
   mapped. */
static void iobmd_unmap_left(struct iobmd_tracer *t)
{
    struct iobmd_call clone = iobmd_new_call(SYS_clone, CLONE_VM | CLONE_FS | CLONE_FILES, IOBMD_NO_STACK, 0);
    struct iobmd_call calls[IOBMD_RANGES_MADE];
    char byte;
    int status, count = iobmd_ranges_left(t, calls);
    /* If the task has executed another program, the memory no longer exists: a read then returns 0 bytes, not an
       error. */
    if (!count || !iobmd_raw(SYS_pread64, t->memory, (long)&byte, 1, 0, 0, 0)) return;
    if (t->knows) status = iobmd_stop(t, t->known, t->knows, &clone, 1);
    else status = iobmd_each_thread(t, iobmd_clone_by, &clone) == IOBMD_LATE ? IOBMD_DONE : IOBMD_GONE;
    iobmd_take_guest(t, &clone, 1, status);
    if (!t->guest) return;
    t->guest_is_stuck = 0;
    if (!status && !iobmd_receive(t, t->guest)) iobmd_run_guest(t, calls, count, iobmd_now() + IOBMD_BEGIN, 0);
    iobmd_kill(t, t->guest);
}

/* Make the task reap the guest, which would otherwise remain a zombie, in one of the threads in `known`, or in any thread
   if there are none; then unmap what the guest has not unmapped. If another process has killed the guest, and the task has
   reaped it, its id may be that of another child of the task. */
static int iobmd_collect(struct iobmd_tracer *t)
{
    struct iobmd_call wait = iobmd_new_call(SYS_wait4, (unsigned long)t->guest_there, 0, __WALL | WNOHANG);
    struct iobmd_collection left = { &wait, 1, 0, 0 };
    int status = IOBMD_DONE;
    if (iobmd_began(t, t->guest) != t->guest_began) wait.result = t->guest_there;
    else if (t->knows) status = iobmd_stop(t, t->known, t->knows, &wait, 1);
    else if (!(status = iobmd_each_thread(t, iobmd_collect_by, &left))) {
        /* No thread has done it. The code is unreadable in all if the task has executed another program. */
        status = left.unreadable ? IOBMD_UNREADABLE : left.alive ? IOBMD_LATE : IOBMD_GONE;
        iobmd_doze(t);
    }
    /* wait4 returns 0 if the guest is not dead yet, and an error if it does not exist. */
    if (status == IOBMD_FAILED || (status == IOBMD_DONE && wait.result)) {
        /* The snapshot that it has created takes its place: it will be reaped in the same way. */
        t->guest = t->child;
        t->guest_there = t->child_there;
        t->guest_began = t->child_began;
        t->child = 0;
        t->guest_is_stuck = 0;
        if (!t->guest && !t->unmaps_once_more) {
            t->unmaps_once_more = 1;
            iobmd_unmap_left(t);
        }
    }
    return status;
}

/* -- all threads -- */

static int iobmd_add_thread(struct iobmd_tracer *t, pid_t tid, void *data)
{
    int *hint = data;
    for (int i = 0; i < t->frozen; i++) {
        if (*hint >= t->frozen) *hint = 0;
        if (t->threads[(*hint)++].tid == tid) return IOBMD_DONE;  /* the order is the same each time */
    }
    if (t->frozen == t->room) {
        size_t before = (size_t)t->room * sizeof *t->threads, size = before ? 2 * before : 1 << 16;
        long grown = before ? iobmd_raw(SYS_mremap, (long)t->threads, (long)before, (long)size, MREMAP_MAYMOVE, 0, 0)
                            : iobmd_raw(SYS_mmap, 0, (long)size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                                        -1, 0);
        if (grown < 0 && grown > -4096) return IOBMD_NO_MEMORY;
        t->threads = (struct iobmd_thread *)grown;
        t->room = (int)(size / sizeof *t->threads);
    }
    struct iobmd_thread *thread = &t->threads[t->frozen];
    *thread = (struct iobmd_thread){ .tid = tid, .cpu = -1 };
    for (int i = 0; i < t->knows; i++)
        if (t->known[i].tid == tid) *thread = t->known[i];
    t->frozen++;
    *hint = 0;
    return iobmd_now() > t->deadline_ns ? IOBMD_LATE : IOBMD_DONE;
}

/* Resume the threads that are stopped and, with `all`, detach from the others as soon as they have stopped. */
static void iobmd_thaw(struct iobmd_tracer *t, int all)
{
    int left = 0;
    for (int i = 0; i < t->frozen; i++)
        if (!(all || t->threads[i].stands) || !iobmd_detach(t, &t->threads[i])) t->threads[left++] = t->threads[i];
    t->frozen = left;
    if (t->froze_ns) t->stopped_ns += iobmd_now() - t->froze_ns;
    t->froze_ns = 0;
}

/* Stop every thread. The threads are listed until no new one is found, because running threads may create others. */
static int iobmd_stop_all(struct iobmd_tracer *t)
{
    int done = 0, status;
    for (;;) {
        int first = done, hint = 0;
        if ((status = iobmd_each_thread(t, iobmd_add_thread, &hint))) return status;
        if (t->frozen == first) break;
        if (!t->froze_ns) t->froze_ns = iobmd_now();
        for (int i = first; i < t->frozen; i++) {
            status = iobmd_seize(t, &t->threads[i]);
            t->threads[i].ended = status == IOBMD_ENDED;
            if (status && status != IOBMD_ENDED) return status;
        }
        for (; done < t->frozen; done++) {
            int64_t soon = iobmd_now() + t->short_ns;
            if (t->threads[done].ended) continue;
            status = iobmd_stand(t, &t->threads[done], soon < t->deadline_ns ? soon : t->deadline_ns);
            t->threads[done].ended = status == IOBMD_ENDED;
            if (status && status != IOBMD_ENDED) return status;
        }
    }
    for (int i = 0; i < t->frozen; i++)
        if (!t->threads[i].ended) return IOBMD_DONE;
    return IOBMD_GONE;
}

/* Create a guest by a clone call in one of the stopped threads; all threads are stopped. */
static int iobmd_make_guest(struct iobmd_tracer *t)
{
    int status = IOBMD_LATE;
    for (int i = 0; i < t->frozen && !t->guest; i++) {
        struct iobmd_call clone = iobmd_new_call(SYS_clone, CLONE_VM | CLONE_FS | CLONE_FILES, IOBMD_NO_STACK, 0);
        if (t->threads[i].ended) continue;
        status = iobmd_use(t, &t->threads[i], &clone, 1);
        iobmd_take_guest(t, &clone, 1, status);
        if (status != IOBMD_UNREADABLE && status != IOBMD_ENDED) break;
    }
    if (status) return status;
    if (!t->guest) return IOBMD_UNSEEN;
    return iobmd_receive(t, t->guest);
}

/* Create a process that shares the memory copy-on-write. It is a child of the task (CLONE_PARENT), so that it outlives
   the guest, and has its exit signal: no signal. */
static int iobmd_snapshot(struct iobmd_tracer *t)
{
    struct iobmd_call fork = iobmd_new_call(SYS_clone, CLONE_PARENT | CLONE_FS | CLONE_FILES, IOBMD_NO_STACK, 0);
    int status = iobmd_run_guest(t, &fork, 1, t->deadline_ns, 1);
    iobmd_take_snapshot(t, fork.result);
    if (status) return status;
    return t->child ? iobmd_receive(t, t->child) : IOBMD_UNSEEN;
}

/* End the guest, but not the snapshot that it has created. The snapshot gets a separate, empty descriptor table and a
   separate working directory: files that the task closes must not remain open, also after an execve(2), and a task
   that shares its directory cannot change its mount namespace. */
static int iobmd_stand_alone(struct iobmd_tracer *t)
{
    int status;
    if (!t->is_alone) {
        struct iobmd_call calls[2] = { iobmd_new_call(SYS_close_range, 0, UINT_MAX, 2 /* CLOSE_RANGE_UNSHARE */),
                                       iobmd_new_call(SYS_unshare, CLONE_FS, 0, 0) };
        if (!t->child) return IOBMD_ENDED;
        status = iobmd_run_in(t, t->child, calls, 2, t->deadline_ns, 1);
        /* Before Linux 5.9 the table remains that of the task. */
        if (status == IOBMD_FAILED && !t->failed) status = iobmd_run_in(t, t->child, calls + 1, 1, t->deadline_ns, 1);
        if (status) return status;
        iobmd_kill(t, t->guest);
        t->is_alone = 1;
        t->maker_thread = t->maker;  /* it may outlive the thread that has created it */
    }
    return t->child ? iobmd_collect(t) : IOBMD_DONE;
}

/* Provide memory for register sets, and retain those that are recorded already. */
static int iobmd_make_room(struct iobmd_tracer *t, size_t size)
{
    long memory;
    if (t->registers_room >= size) return IOBMD_DONE;
    size = (size + t->page - 1) & ~(t->page - 1);
    memory = t->registers_room ? iobmd_raw(SYS_mremap, (long)t->registers, (long)t->registers_room, (long)size,
                                           MREMAP_MAYMOVE, 0, 0)
                               : iobmd_raw(SYS_mmap, 0, (long)size, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory < 0 && memory > -4096) return IOBMD_NO_MEMORY;
    t->registers = (char *)memory;
    t->registers_room = size;
    return IOBMD_DONE;
}

static int iobmd_count_thread(struct iobmd_tracer *t, pid_t tid, void *data)
{
    (void)t;
    (void)tid;
    ++*(int *)data;
    return IOBMD_DONE;
}

/* Reserve memory for the registers of the threads, before they are stopped. */
static int iobmd_reserve_registers(struct iobmd_tracer *t)
{
    size_t each = iobmd_sets_expected() + sizeof(struct iobmd_registers) + 8 * sizeof(struct iobmd_register_set);
    int threads = 0;
    iobmd_each_thread(t, iobmd_count_thread, &threads);
    return iobmd_make_room(t, (size_t)(threads + threads / 8 + 16) * each + IOBMD_SETS_SIZE);
}

/* Save the registers of all threads, which are stopped. */
static int iobmd_record(struct iobmd_tracer *t)
{
    int status;
    t->recorded = 0;
    for (int i = 0; i < t->frozen; i++) {
        struct iobmd_registers *here;
        struct iobmd_sets sets;
        pid_t tid = t->threads[i].tid;
        if (t->threads[i].ended) continue;
        if (t->registers_room - t->recorded < IOBMD_SETS_SIZE &&
            (status = iobmd_make_room(t, 2 * t->registers_room + IOBMD_SETS_SIZE)))
            return status;
        here = (struct iobmd_registers *)(t->registers + t->recorded);
        sets = (struct iobmd_sets){ (char *)(here + 1), t->registers + t->registers_room };
        if (iobmd_save_sets(tid, &sets)) continue;
        here->tid = tid;
        here->size = (unsigned int)(sets.at - (char *)(here + 1));
        here->blocked = 0;
        iobmd_ptrace(IOBMD_GETSIGMASK, tid, sizeof here->blocked, &here->blocked);
        t->recorded = (size_t)(sets.at - t->registers);
    }
    return IOBMD_DONE;
}

/* -- shared memory -- */

enum { IOBMD_COPIED_AT_ONCE = 4 << 20 };

/* Find the next range of an object that is not a hole, from `*at` on; return 0 if there is none. */
static int iobmd_next_data(const struct iobmd_object *object, unsigned long *at, unsigned long *end)
{
    long data, hole;
    *end = object->size;
    if (object->has_holes) {
        data = iobmd_raw(SYS_lseek, object->file, (long)(object->offset + *at), SEEK_DATA, 0, 0, 0);
        if (data < 0) return 0;
        hole = iobmd_raw(SYS_lseek, object->file, data, SEEK_HOLE, 0, 0, 0);
        *at = (unsigned long)data - object->offset;
        if (hole > data && (unsigned long)hole - object->offset < *end) *end = (unsigned long)hole - object->offset;
    }
    return *at < *end;
}

/* Read a range of an object. Bytes past the end of a truncated file are zero. */
static int iobmd_read_object(struct iobmd_tracer *t, const struct iobmd_object *object, unsigned long at,
                             unsigned long end)
{
    while (at < end) {
        unsigned long size = end - at < IOBMD_COPIED_AT_ONCE ? end - at : IOBMD_COPIED_AT_ONCE;
        long got = iobmd_raw(SYS_pread64, object->file, (long)(object->to + at), (long)size,
                             (long)(object->offset + at), 0, 0);
        if (iobmd_gives_up(t)) return IOBMD_LATE;
        if (got == -EINTR) continue;
        if (got < 0) {
            t->error = (int)-got;
            return IOBMD_UNCOPIED;
        }
        if (!got) {
            __builtin_memset(object->to + at, 0, end - at);
            break;
        }
        at += (unsigned long)got;
    }
    return IOBMD_DONE;
}

/* Copy the objects or, with `prepares`, populate the memory for the copies, and the page cache if they are on a disk.
   Page faults would take more time than the copy. */
static int iobmd_copy_objects(struct iobmd_tracer *t, int prepares)
{
    int status;
    for (t->failed = 0; t->failed < t->object_count; t->failed++) {
        const struct iobmd_object *object = &t->objects[t->failed];
        unsigned long at, end;
        for (at = 0; at < object->size && iobmd_next_data(object, &at, &end); at = end) {
            if (prepares && object->has_holes) {
                unsigned long first = at & ~(t->page - 1), last = (end + t->page - 1) & ~(t->page - 1);
                iobmd_raw(SYS_madvise, (long)(object->to + first), (long)(last - first), 23 /* MADV_POPULATE_WRITE */, 0,
                          0, 0);
                if (iobmd_gives_up(t)) return IOBMD_LATE;
            } else if ((status = iobmd_read_object(t, object, at, end))) return status;
        }
    }
    return IOBMD_DONE;
}

/* Open the file of an object; return a descriptor or a negative error number. The task may have replaced the file at
   its path: opening a device would have effects, and opening a pipe or a file of a FUSE server may wait. */
static long iobmd_open_object(const struct iobmd_object *object)
{
    const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
    char same[48];
    struct statx found;
    long file, place = iobmd_raw(SYS_openat, AT_FDCWD, (long)object->path, O_PATH | O_CLOEXEC, 0, 0, 0);
    if (place < 0) return place;
    file = iobmd_raw(SYS_statx, place, (long)"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO, (long)&found, 0);
    if (!file && (found.stx_ino != object->inode || makedev(found.stx_dev_major, found.stx_dev_minor) != object->device))
        file = -ESTALE;
    if (!file) {
        iobmd_append_number(iobmd_append(same, "/proc/thread-self/fd/"), (unsigned long)place);
        file = iobmd_raw(SYS_openat, AT_FDCWD, (long)same, flags | O_NOATIME, 0, 0, 0);
        if (file == -EPERM) /* permitted for the owner of the file, and with CAP_FOWNER */
            file = iobmd_raw(SYS_openat, AT_FDCWD, (long)same, flags, 0, 0, 0);
    }
    iobmd_close((int)place);
    return file;
}

static int iobmd_open_objects(struct iobmd_tracer *t)
{
    for (t->failed = 0; t->failed < t->object_count; t->failed++) {
        long file = iobmd_open_object(&t->objects[t->failed]);
        t->objects[t->failed].file = (int)file;
        if (file >= 0) continue;
        t->error = (int)-file;
        return IOBMD_UNCOPIED;
    }
    return IOBMD_DONE;
}

static void iobmd_close_objects(struct iobmd_tracer *t)
{
    for (int i = 0; i < t->object_count; i++) {
        if (t->objects[i].file >= 0) iobmd_close(t->objects[i].file);
        t->objects[i].file = -1;
    }
}

/* Schedule this process before others, because stopped threads wait for it, or like others. It may be refused. */
static void iobmd_schedule(const struct iobmd_tracer *t, int policy)
{
    struct sched_param first = { policy == SCHED_RR };
    if (!t->is_thread) iobmd_raw(SYS_sched_setscheduler, 0, policy, (long)&first, 0, 0, 0);
}

static int iobmd_freeze(struct iobmd_tracer *t)
{
    int64_t begin, snapshot_deadline = t->deadline_ns;
    int status;
    if (t->records && (status = iobmd_reserve_registers(t))) return status;
    if ((status = iobmd_open_objects(t))) return status;
    if (t->object_count) iobmd_schedule(t, SCHED_OTHER);  /* no thread is stopped yet, and this may take long */
    status = iobmd_copy_objects(t, 1);
    if (t->object_count) iobmd_schedule(t, SCHED_RR);
    if (status) return status;
    begin = iobmd_now();
    t->deadline_ns = begin + t->patience_ns;
    while ((status = iobmd_stop_all(t)) == IOBMD_LATE && !iobmd_gives_up(t)) {
        if (iobmd_now() >= t->deadline_ns) break;
        /* A thread may be waiting for a stopped one, in a page fault that a thread of the task serves. Only stopped
           threads can be detached, so that these resume first, and the others are detached when they have stopped. */
        iobmd_thaw(t, 0);
        for (int i = 0; i < t->frozen; i++)
            if (!t->threads[i].ended) iobmd_stand(t, &t->threads[i], t->deadline_ns);
        iobmd_thaw(t, 1);
    }
    t->deadline_ns = snapshot_deadline;
    if (!status && t->records) status = iobmd_record(t);
    if (!status && t->wanted) status = iobmd_make_guest(t);
    if (!status && t->wanted == IOBMD_SNAPSHOT) status = iobmd_snapshot(t);
    iobmd_admit_reports(t, SIG_UNBLOCK);  /* the copy takes long, and the frozen task may be killed */
    if (!status) status = iobmd_copy_objects(t, 0);
    iobmd_admit_reports(t, SIG_BLOCK);
    if (status || t->wanted == IOBMD_SNAPSHOT) iobmd_thaw(t, 1);
    return status;
}

/* -- commands -- */

static void iobmd_end_guest(struct iobmd_tracer *t)
{
    struct iobmd_call calls[IOBMD_RANGES_MADE];
    int count;
    t->ending = 1;
    iobmd_thaw(t, 1);
    iobmd_detach_late(t);
    if (t->child) iobmd_kill(t, t->child);
    if (t->guest && (count = iobmd_ranges_left(t, calls)))
        iobmd_run_guest(t, calls, count, iobmd_now() + IOBMD_DEATH, 0);
    if (t->guest) iobmd_kill(t, t->guest);
}

/* A user who kills the maker by its command line (pkill -f) also kills this process, which has the same one. A thread of
   the task that is stopped for a call would then continue with the registers of that call, and crash the task. */
static void iobmd_outlast_killers(void)
{
    struct timespec moment = { 0, 200 * IOBMD_MS };
    iobmd_raw(SYS_nanosleep, (long)&moment, 0, 0, 0, 0, 0);
}

static void iobmd_end(struct iobmd_tracer *t)
{
    int64_t until = iobmd_now() + t->patience_ns;
    int status, gone = 0;  /* in succession, because briefly no thread may be visible while one executes a program */
    if (!t->ending) iobmd_end_guest(t);
    if (t->guest && !t->is_thread && iobmd_is_orphan(t)) iobmd_outlast_killers();
    t->knows = 0;
    while (t->guest && iobmd_now() < until) {
        status = iobmd_collect(t);
        gone = status == IOBMD_GONE ? gone + 1 : 0;
        if (gone == 20 || status == IOBMD_FOREIGN_THREAD) break;
        iobmd_doze(t);
    }
}

static int iobmd_do(struct iobmd_tracer *t, int command)
{
    int status;
    t->error = t->failed = t->made = t->clones = 0;
    /* After unshare(CLONE_NEWPID), this process is in another pid namespace than its maker. */
    if ((command == IOBMD_STOP || command == IOBMD_FREEZE) && iobmd_is_orphan(t)) return IOBMD_UNSEEN;
    switch (command) {
    case IOBMD_STOP:
        status = iobmd_stop(t, t->known, t->knows, t->calls, t->count);
        iobmd_take_guest(t, t->calls, t->count, status);
        return !status && t->guest ? iobmd_receive(t, t->guest) : status;
    case IOBMD_RUN:
        t->spins = t->is_far;  /* most calls are short */
        status = iobmd_run_guest(t, t->calls, t->count, t->deadline_ns, t->may_wait);
        t->spins = 0;
        return status;
    case IOBMD_FREEZE:
        status = iobmd_freeze(t);
        iobmd_close_objects(t);
        return status;
    case IOBMD_THAW:
        iobmd_thaw(t, 1);
        return IOBMD_DONE;
    case IOBMD_STAND_ALONE:
        return iobmd_stand_alone(t);
    case IOBMD_COLLECT:
        if (!t->ending) iobmd_end_guest(t);
        return t->guest ? iobmd_collect(t) : IOBMD_DONE;
    default:
        iobmd_end(t);
        return IOBMD_DONE;
    }
}

static void iobmd_settle(struct iobmd_tracer *t)
{
    struct sigaction reports;
    char path[32];
    struct sigevent killed = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL };
    t->pagemap = t->writes = t->alarm = -1;
    if (!t->is_thread) iobmd_raw(SYS_timer_create, CLOCK_MONOTONIC, (long)&killed, (long)&t->alarm, 0, 0, 0);
    t->self = (pid_t)iobmd_raw(SYS_gettid, 0, 0, 0, 0, 0, 0);
    /* A separate descriptor table, in which descriptors are always free. It is not copied, because all of it is
       closed. */
    iobmd_raw(SYS_close_range, 0, UINT_MAX, 2 /* CLOSE_RANGE_UNSHARE */, 0, 0, 0);
    if (!t->is_thread) {
        __builtin_memset(&reports, 0, sizeof reports);
        reports.sa_handler = iobmd_reap_one;
        sigaction(SIGCHLD, &reports, NULL);  /* of this process only; an ignored SIGCHLD would report nothing */
        iobmd_schedule(t, SCHED_RR);
        /* No SIGKILL or SIGSTOP of the maker's group reaches it. In a session of its own (setsid(2)), the scheduler would
           place it in another group (autogroup), which may not run for seconds on a busy host. */
        iobmd_raw(SYS_setpgid, 0, 0, 0, 0, 0, 0);
        iobmd_raw(SYS_prctl, PR_SET_NAME, (long)"iobmd-tracer", 0, 0, 0, 0);
    }
    iobmd_append_number(iobmd_append(path, "/proc/"), (unsigned long)t->task);
    t->folder = (int)iobmd_raw(SYS_openat, AT_FDCWD, (long)path, O_PATH | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    t->memory = (int)iobmd_raw(SYS_openat, t->folder, (long)"mem", O_RDONLY | O_CLOEXEC, 0, 0, 0);
    t->shares = iobmd_has_our_memory(t);
}

/* Wait briefly for a command. Threads may be frozen and, if they are killed, the task exits now. A thread that stops only
   now does not end the wait: the next command can use it, if the thread is not released before. */
static void iobmd_idle(const struct iobmd_tracer *t)
{
    int64_t left, until = iobmd_now() + 20 * IOBMD_MS;
    iobmd_admit_reports(t, SIG_UNBLOCK);
    while ((left = until - iobmd_now()) > 0) {
        struct timespec moment = { 0, left };
        if (iobmd_raw(SYS_futex, (long)&t->command, FUTEX_WAIT_PRIVATE, IOBMD_NOTHING, (long)&moment, 0, 0) != -EINTR) break;
    }
    iobmd_admit_reports(t, SIG_BLOCK);
}

static int iobmd_tracer_body(void *argument)
{
    struct iobmd_tracer *t = argument;
    iobmd_settle(t);
    if (t->succeeds) iobmd_inherit(t);
    for (;;) {
        int command = __atomic_load_n(&t->command, __ATOMIC_ACQUIRE);
        if (command == IOBMD_NOTHING) {
            if (iobmd_is_orphan(t)) {
                /* Once the end of the session has begun, its maker has decided whether the mappings stay. */
                if (!t->ending) t->failed_session = 1;
                iobmd_end(t);
                break;
            }
            if (t->frozen && !t->froze_ns) iobmd_thaw(t, 1);
            iobmd_detach_late(t);
            iobmd_reap(t);
            iobmd_idle(t);
            continue;
        }
        t->status = iobmd_do(t, command);
        iobmd_reap(t);  /* before the maker asks whether the task has exited */
        __atomic_store_n(&t->command, IOBMD_NOTHING, __ATOMIC_RELEASE);
        iobmd_raw(SYS_futex, (long)&t->command, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
        if (command == IOBMD_END) break;
    }
    iobmd_close(t->folder);  /* without close_range(2), the table is the maker's */
    iobmd_close(t->memory);
    if (!t->is_thread) iobmd_raw(SYS_exit_group, 0, 0, 0, 0, 0, 0);
    return 0;
}

static void *iobmd_tracer_thread(void *argument)
{
    iobmd_tracer_body(argument);
    return NULL;
}

/* Abandoned tracers, whose memory is released when they have exited. */
static struct iobmd_tracer *iobmd_abandoned[16];

static void iobmd_retain(struct iobmd_tracer *t)
{
    struct iobmd_tracer *none = NULL;
    for (int i = 0; i < 16; i++, none = NULL)
        if (__atomic_compare_exchange_n(&iobmd_abandoned[i], &none, t, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
}

static int iobmd_has_exited(const struct iobmd_tracer *t)
{
    siginfo_t end = { 0 };
    if (t->maker != getpid()) return 1;  /* this is a forked child, which has a copy */
    if (t->is_thread) return !pthread_tryjoin_np(t->thread, NULL);
    return iobmd_raw(SYS_waitid, P_PID, t->pid, (long)&end, WEXITED | WNOHANG | __WALL, 0, 0) || end.si_pid;
}

static void iobmd_release(struct iobmd_tracer *t)
{
    free(t->objects);
    if (t->threads) munmap(t->threads, (size_t)t->room * sizeof *t->threads);
    if (t->registers_room) munmap(t->registers, t->registers_room);
    IOBMD_UNMARK(t, sizeof *t);
    munmap(t, sizeof *t);
}

static void iobmd_release_ended(void)
{
    for (int i = 0; i < 16; i++) {
        struct iobmd_tracer *t = __atomic_exchange_n(&iobmd_abandoned[i], NULL, __ATOMIC_ACQ_REL);
        if (!t) continue;
        if (!iobmd_has_exited(t)) {
            iobmd_retain(t);
            continue;
        }
        free((void *)t->known);
        iobmd_release(t);
    }
}

/* Stop waiting for a tracer: it completes its command when it can, and exits. */
static void iobmd_tracer_abandon(struct iobmd_tracer *t)
{
    t->abandoned = 1;
    iobmd_retain(t);
}

/* Start the process or thread of a tracer; return 0 or an error number. */
static int iobmd_start(struct iobmd_tracer *t)
{
    sigset_t all, before;
    int error;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (t->is_thread)
        error = pthread_create(&t->thread, NULL, iobmd_tracer_thread, t);
    else {
        t->pid = clone(iobmd_tracer_body, t->stack + sizeof t->stack, CLONE_VM | CLONE_FS | CLONE_FILES, t);
        error = t->pid < 0 ? errno : 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* Start a tracer: a process, or a thread of the maker. If Yama permits a process to trace only its descendants
   (kernel.yama.ptrace_scope 1, without CAP_SYS_PTRACE), a separate process may not trace them, and only the target
   could permit it (PR_SET_PTRACER). In that case a thread of the maker must trace, and if the maker is killed during
   a stop, the stop is not completed. Returns NULL with errno if no tracer can be created. */
static struct iobmd_tracer *iobmd_tracer_start(pid_t task, unsigned long instruction, long options, int is_thread)
{
    int error;
    struct iobmd_tracer *t = mmap(NULL, sizeof *t, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
                                  -1, 0);
    if (t == MAP_FAILED) return NULL;
    iobmd_release_ended();
    t->task = task;
    t->page = (unsigned long)getpagesize();
    t->instruction = instruction;
    t->options = options;
    t->is_thread = is_thread;
    iobmd_know_processor();
    t->maker = getpid();
    t->maker_thread = (pid_t)syscall(SYS_gettid);
    if (!(error = iobmd_start(t))) return t;
    munmap(t, sizeof *t);
    errno = error;
    return NULL;
}

/* Start another process in place of a tracer that was killed, so that it removes what this has created in the task;
   return whether it was started. */
static int iobmd_tracer_succeed(struct iobmd_tracer *t)
{
    if (t->is_thread || t->maker != getpid()) return 0;
    while (iobmd_raw(SYS_wait4, t->pid, 0, __WALL, 0, 0, 0) == -EINTR) continue;
    t->succeeds = 1;
    t->command = IOBMD_NOTHING;
    return !iobmd_start(t);
}

/* Start a command, whose parameters must have been set. */
static void iobmd_tracer_begin(struct iobmd_tracer *t, int command)
{
    __atomic_store_n(&t->command, command, __ATOMIC_RELEASE);
    iobmd_raw(SYS_futex, (long)&t->command, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
}

/* Return whether a tracer that was killed was killed by its alarm, because the lock of the task's memory was held. */
static int iobmd_tracer_was_held(const struct iobmd_tracer *t)
{
    return t->alarm_ns && iobmd_now() >= t->alarm_ns;
}

/* Wait briefly for the end of a command. Returns 1: it is done, 0: not yet, or a signal arrived, -1: the tracer was
   killed. */
static int iobmd_tracer_wait(struct iobmd_tracer *t)
{
    struct timespec moment = { 0, (t->is_thread ? 10 : 50) * IOBMD_MS };
    siginfo_t end = { 0 };
    int command = __atomic_load_n(&t->command, __ATOMIC_ACQUIRE);
    if (command == IOBMD_NOTHING) return 1;
    if (iobmd_raw(SYS_futex, (long)&t->command, FUTEX_WAIT_PRIVATE, command, (long)&moment, 0, 0) != -ETIMEDOUT)
        return 0;
    if (t->is_thread) {
        iobmd_help_seizing(t);
        return 0;
    }
    /* Another thread may have reaped it, like any child. */
    return iobmd_raw(SYS_waitid, P_PID, t->pid, (long)&end, WEXITED | WNOHANG | WNOWAIT | __WALL, 0, 0) || end.si_pid
               ? -1 : 0;
}

/* End the tracer, whatever it is doing; return an upper bound of the time for which a thread of the task was stopped.
   In a forked child, only the child's copy of the parent's data is freed. */
static int64_t iobmd_tracer_end(struct iobmd_tracer *t)
{
    int64_t stopped_ns;
    if (t->maker == getpid()) {
        int64_t until = iobmd_now() + IOBMD_END_NS;
        int waited;
        t->cancelled = 1;
        while (!(waited = iobmd_tracer_wait(t)) && iobmd_now() < until) continue;
        t->cancelled = 0;
        if (waited > 0) {
            iobmd_tracer_begin(t, IOBMD_END);
            while (!(waited = iobmd_tracer_wait(t)) && iobmd_now() < until) continue;
        }
        if (!waited) {
            stopped_ns = t->stopped_ns;
            iobmd_tracer_abandon(t);
            return stopped_ns;
        }
        if (t->is_thread) pthread_join(t->thread, NULL);
        else while (iobmd_raw(SYS_wait4, t->pid, 0, __WALL, 0, 0, 0) == -EINTR) continue;
    }
    stopped_ns = t->stopped_ns;
    iobmd_release(t);
    return stopped_ns;
}

#else  /* another processor */

#define IOBMD_PROCESSOR ""
#define IOBMD_INSTRUCTION ""
#define IOBMD_RETURNING ""
#define IOBMD_CALLING ""
enum { IOBMD_ELF = 0, IOBMD_INSTRUCTION_ALIGNMENT = 1 };
struct iobmd_named_call { const char *name; int number; };
static const struct iobmd_named_call iobmd_made_calls[] = { { NULL, 0 } }, iobmd_calls_ended_by_a_stop[] = { { NULL, 0 } };

static struct iobmd_tracer *iobmd_tracer_start(pid_t task, unsigned long instruction, long options, int is_thread)
{
    (void)task; (void)instruction; (void)options; (void)is_thread;
    errno = ENOSYS;
    return NULL;
}
static void iobmd_tracer_begin(struct iobmd_tracer *t, int command) { (void)t; (void)command; }
static int iobmd_tracer_wait(struct iobmd_tracer *t) { (void)t; return 1; }
static int iobmd_tracer_was_held(const struct iobmd_tracer *t) { (void)t; return 0; }
static int iobmd_tracer_succeed(struct iobmd_tracer *t) { (void)t; return 0; }
static int64_t iobmd_tracer_end(struct iobmd_tracer *t) { (void)t; return 0; }
static void iobmd_tracer_abandon(struct iobmd_tracer *t) { (void)t; }
#endif

#endif
