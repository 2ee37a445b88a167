/* A process that does one kind of work, and prints the result at the end.
 *
 * busy wait              waits for a line on the standard input; exit code 5
 * busy leaderless        the same, in a second thread; the first one has exited
 * busy threads N         the same, while N other threads compute and sleep
 * busy timerfd|sleep|signal
 *                        a tick each millisecond until a line arrives; prints the numbers of ticks and of lost ticks
 * busy executes N        runs itself N times, by a thread other than the first, while others compute; exit code 9
 * busy executes_then N   runs itself with N 0 when a line arrives, by a thread other than the first, which sleeps; then
 *                        the same as wait
 * busy compute N         four threads; prints a checksum
 * busy rseq N            two threads count N each on one processor in restartable sequences (rseq(2)); prints the sum
 * busy filter N          sleeps N times and waits for a line, behind a seccomp filter that kills it for most calls
 * busy strict            waits for a line in strict seccomp
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__) && __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#define HAVE_RSEQ 1
#endif

#define MS 1000000LL

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 * MS + now.tv_nsec;
}

/* --- ticks */

static long long began, ticks, lost, worst;

/* A tick each millisecond. The first is due 1 ms after `began`, whenever this process runs again to start the timer.
   */
static struct itimerspec each_ms(void)
{
    long long first = began + MS;
    return (struct itimerspec){.it_interval = {.tv_nsec = MS},
                               .it_value = {.tv_sec = first / (1000 * MS), .tv_nsec = first % (1000 * MS)}};
}

/* Return how many ticks are due and have not arrived. */
static long long missing(void)
{
    return (now_ns() - began) / MS - ticks;
}

static void gap(long long *last)
{
    long long now = now_ns();
    if (now - *last > worst)
        worst = now - *last;
    *last = now;
}

static int is_told_to_end(void)
{
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) > 0;
}

/* Return whether to wait for another tick: until a line arrives, and then until none is missing. A lost tick remains
   missing. A tick that becomes due between a wait and reading the clock, as on a busy machine, is handled by the next
   wait. */
static int goes_on(void)
{
    static int waits;
    lost = missing();
    return !is_told_to_end() || (lost > 0 && ++waits < 10000);
}

static int said(int errors)
{
    printf("ticks %lld lost %lld errors %d worst_us %lld\n", ticks, lost, errors, worst / 1000);
    return 0;
}

static int by_timerfd(void)
{
    int timer = timerfd_create(CLOCK_MONOTONIC, 0), errors = 0;
    long long last = began = now_ns();
    struct itimerspec start = each_ms();
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &start, NULL);
    puts("ready");
    do {
        uint64_t expired;
        if (read(timer, &expired, sizeof expired) != sizeof expired) {
            errors++;
            continue;
        }
        ticks += expired;
        errors += missing() < 0;
        gap(&last);
    } while (goes_on());
    return said(errors);
}

static int by_sleep(void)
{
    long long last = began = now_ns();
    int errors = 0;
    puts("ready");
    do {
        long long due = began + (ticks + 1) * MS;
        struct timespec until = {.tv_sec = due / (1000 * MS), .tv_nsec = due % (1000 * MS)};
        errors += clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) != 0;
        ticks++;
        errors += missing() < 0;
        gap(&last);
    } while (goes_on());
    return said(errors);
}

static void tick(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)context;
    ticks += 1 + info->si_overrun;
}

static int by_signal(void)
{
    struct sigaction action = {.sa_sigaction = tick, .sa_flags = SA_SIGINFO};
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
    struct itimerspec start;
    sigset_t blocked, none;
    timer_t timer;
    int errors = 0;
    sigemptyset(&none);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    sigaction(SIGRTMIN, &action, NULL);
    timer_create(CLOCK_MONOTONIC, &event, &timer);
    long long last = began = now_ns();
    start = each_ms();
    timer_settime(timer, TIMER_ABSTIME, &start, NULL);
    puts("ready");
    do {
        long long before = ticks;
        sigsuspend(&none);
        errors += errno != EINTR || ticks == before;
        errors += missing() < 0;
        gap(&last);
    } while (goes_on());
    return said(errors);
}

/* --- threads */

static int rounds;

static void *checksum(void *argument)
{
    uint64_t sum = 1469598103934665603u + (uintptr_t)argument;
    for (int i = 0; i < rounds; i++) {
        unsigned char *bytes = malloc(4096);
        memset(bytes, i, 4096);
        for (int k = 0; k < 4096; k++)
            sum = (sum ^ bytes[k]) * 1099511628211u;
        if (sched_getcpu() < 0)
            sum++;
        free(bytes);
    }
    return (void *)sum;
}

static int compute(void)
{
    pthread_t threads[4];
    uint64_t all = 0;
    puts("ready");
    for (uintptr_t i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, checksum, (void *)i);
    for (int i = 0; i < 4; i++) {
        void *sum;
        pthread_join(threads[i], &sum);
        all ^= (uint64_t)sum;
    }
    printf("checksum %llx\n", (unsigned long long)all);
    return 0;
}

#ifdef HAVE_RSEQ
static volatile long counter;

static void count_one(struct rseq *area)
{
again:
    /* If a thread is interrupted between labels 1 and 2, the kernel restarts it at label 4. The middle part is slow.
       */
    __asm__ volatile goto(".pushsection __rseq_cs, \"aw\"\n\t"
                          ".balign 32\n\t"
                          "3: .long 0, 0\n\t"
                          ".quad 1f, 2f - 1f, 4f\n\t"
                          ".popsection\n\t"
                          "leaq 3b(%%rip), %%rax\n\t"
                          "movq %%rax, %0\n\t"
                          "1: movq %1, %%rax\n\t"
                          "movl $20000, %%ecx\n\t"
                          "5: decl %%ecx\n\t"
                          "jnz 5b\n\t"
                          "incq %%rax\n\t"
                          "movq %%rax, %1\n\t"
                          "2:\n\t"
                          ".pushsection __rseq_failure, \"ax\"\n\t"
                          ".byte 0x0f, 0xb9, 0x3d\n\t"
                          ".long 0x53053053\n\t"
                          "4: jmp %l[again]\n\t"
                          ".popsection\n\t"
                          :
                          : "m"(area->rseq_cs), "m"(counter)
                          : "memory", "cc", "rax", "rcx"
                          : again);
}

static void *count(void *argument)
{
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    for (int i = 0; i < rounds; i++)
        count_one(area);
    return argument;
}

static int in_sequences(void)
{
    pthread_t other;
    cpu_set_t one;
    if (__rseq_size == 0)
        return puts("none"), 0;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    puts("ready");
    pthread_create(&other, NULL, count, NULL);
    count(NULL);  /* the main thread is one of the two, and is the one that is stopped */
    pthread_join(other, NULL);
    printf("counted %ld\n", counter);
    return 0;
}
#else
static int in_sequences(void)
{
    return puts("none"), 0;
}
#endif

/* --- seccomp */

static int behind_filter(int count)
{
    static const int allowed[] = {SYS_read,      SYS_write,        SYS_exit_group,     SYS_nanosleep,
                                  SYS_rt_sigreturn, SYS_clock_nanosleep, SYS_restart_syscall};
    enum { CALLS = sizeof allowed / sizeof *allowed };
    struct sock_filter filter[CALLS + 3];
    struct sock_fprog program = {.len = CALLS + 3, .filter = filter};
    const struct timespec pause_for = {.tv_nsec = 20 * MS};
    int errors = 0;
    char line[64];

    filter[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < CALLS; i++)
        filter[i + 1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], CALLS - i, 0);
    filter[CALLS + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    filter[CALLS + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    puts("ready");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
        return 1;
    for (int i = 0; i < count; i++)
        errors += syscall(SYS_nanosleep, &pause_for, NULL) != 0;
    errors += read(0, line, 1) < 0;  /* the exercise may take longer than the sleeps */
    int length = snprintf(line, sizeof line, "slept %d errors %d\n", count, errors);
    return write(1, line, length) == length ? 6 : 1;
}

static int strictly(void)
{
    static const char answer[] = "strict\n";
    char byte;
    puts("ready");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
        return 1;
    if (read(0, &byte, 1) == 1 && write(1, answer, sizeof answer - 1) > 0)
        syscall(SYS_exit, 8);
    syscall(SYS_exit, 1);
    return 1;
}

static int wait_for_line(void)
{
    char line[64];
    puts("ready");
    if (read(0, line, sizeof line) <= 0)
        return 1;
    puts("woken");
    return 5;
}

static void *wait_in_thread(void *argument)
{
    exit(wait_for_line());
    return argument;
}

static int without_first_thread(void)
{
    pthread_t other;
    pthread_create(&other, NULL, wait_in_thread, NULL);
    pthread_exit(NULL);
}

static void *compute_and_sleep(void *argument)
{
    const struct timespec moment = {.tv_nsec = MS};
    for (;;) {
        checksum(argument);
        nanosleep(&moment, NULL);
    }
    return argument;
}

static int beside_threads(int count)
{
    pthread_t other;
    for (int i = 0; i < count; i++)
        pthread_create(&other, NULL, compute_and_sleep, NULL);
    return wait_for_line();
}

static char *next_command[4];

static void *execute_next(void *argument)
{
    const struct timespec moment = {.tv_nsec = 2 * MS};
    nanosleep(&moment, NULL);
    execv(next_command[0], next_command);
    return argument;
}

static int execute_repeatedly(char **argv, int count)
{
    static char left[16];
    pthread_t other;
    if (!count)
        return 9;
    if (!getenv("AGAIN"))
        puts("ready");
    setenv("AGAIN", "", 1);
    snprintf(left, sizeof left, "%d", count - 1);
    next_command[0] = argv[0], next_command[1] = argv[1], next_command[2] = left;
    pthread_create(&other, NULL, execute_next, NULL);
    for (int i = 0; i < 4; i++)
        pthread_create(&other, NULL, compute_and_sleep, NULL);
    pause();
    return 1;
}

static void *execute_then(void *argument)
{
    getchar();
    return execute_next(argument);
}

static int execute_when_told(char **argv, int count)
{
    static char zero[] = "0";
    pthread_t other;
    if (!count)
        return wait_for_line();
    next_command[0] = argv[0], next_command[1] = argv[1], next_command[2] = zero;
    pthread_create(&other, NULL, execute_then, NULL);
    puts("ready");
    pause();
    return 1;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    int count = argc > 2 ? atoi(argv[2]) : 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    rounds = count;
    if (!strcmp(what, "wait"))
        return wait_for_line();
    if (!strcmp(what, "threads"))
        return beside_threads(count);
    if (!strcmp(what, "executes"))
        return execute_repeatedly(argv, count);
    if (!strcmp(what, "executes_then"))
        return execute_when_told(argv, count);
    if (!strcmp(what, "leaderless"))
        return without_first_thread();
    if (!strcmp(what, "timerfd"))
        return by_timerfd();
    if (!strcmp(what, "sleep"))
        return by_sleep();
    if (!strcmp(what, "signal"))
        return by_signal();
    if (!strcmp(what, "compute"))
        return compute();
    if (!strcmp(what, "rseq"))
        return in_sequences();
    if (!strcmp(what, "filter"))
        return behind_filter(count);
    if (!strcmp(what, "strict"))
        return strictly();
    return 2;
}
