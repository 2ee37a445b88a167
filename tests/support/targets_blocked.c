/* A process that blocks in one system call and prints the result of the call.
 *
 * blocked CALL: prints "ready", makes the call, and prints
 *     RESULT ERRNO MILLISECONDS HANDLED
 * where HANDLED counts the runs of its signal handler. A child waits for a line on the standard input, and then does
 * what the call waits for. The child is a process, not a thread, so that the program's only thread is the one that is
 * stopped.
 *
 * blocked signals CALL COUNT: makes the call repeatedly until COUNT signals (SIGRTMIN) have been handled, and prints
 * "RESULT ERRNO HANDLED" after each return, and "done CALLS HANDLED" at the end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(call)                                                                                                   \
    ({                                                                                                                \
        long checked = (long)(call);                                                                                  \
        if (checked == -1) {                                                                                          \
            perror(#call);                                                                                            \
            exit(3);                                                                                                  \
        }                                                                                                             \
        checked;                                                                                                      \
    })

enum { SOON_MS = 800, LONG_S = 60 };  /* no call waits for as long as `LONG_S` */

static const char *name;
static volatile sig_atomic_t handled;
static int channel[2];  /* data is read or received from the second one */
static int pair[2];
static int waited_for;  /* the descriptor for which poll and similar calls wait */
static int epoll;
static int *word;       /* of the futex; shared with the child */
static int semaphore = -1, queue = -1;
static pid_t parent;
static char path[] = "/tmp/blocked-XXXXXX";
static struct sockaddr_un listening = {.sun_family = AF_UNIX};
static char block[1 << 20];

static void handle(int signal)
{
    (void)signal;
    handled++;
}

static int is(const char *other)
{
    return strcmp(name, other) == 0;
}

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static sigset_t only(int signal)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal);
    return set;
}

/* --- preparation */

static void set_timeout(int descriptor, int option, int seconds)
{
    struct timeval timeout = {.tv_sec = seconds};
    CHECK(setsockopt(descriptor, SOL_SOCKET, option, &timeout, sizeof timeout));
}

static void fill(int descriptor)
{
    fcntl(descriptor, F_SETFL, O_NONBLOCK);
    while (write(descriptor, block, 4096) > 0)
        ;
    fcntl(descriptor, F_SETFL, 0);
}

static void prepare(void)
{
    struct sigaction action = {.sa_handler = handle};
    sigset_t usr1 = only(SIGUSR1);

    CHECK(pipe(channel));
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    waited_for = channel[0];
    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGRTMIN, &action, NULL);
    if (strncmp(name, "sigtimedwait", 12) == 0 || is("sigwaitinfo") || is("signalfd"))
        sigprocmask(SIG_BLOCK, &usr1, NULL);
    if (is("sigsuspend") || is("ppoll_signal") || is("epoll_pwait_signal")) {
        sigset_t alarm = only(SIGALRM);
        sigprocmask(SIG_BLOCK, &alarm, NULL);
    }
    if (strncmp(name, "epoll", 5) == 0) {
        struct epoll_event event = {.events = EPOLLIN};
        epoll = CHECK(epoll_create1(0));
        CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, waited_for, &event));
    }
    if (is("recv_waitall"))
        CHECK(send(pair[1], block, 1, 0));
    else if (strncmp(name, "recv", 4) == 0 && !is("recv"))
        set_timeout(pair[0], SO_RCVTIMEO, is("recv_expires") ? 1 : LONG_S);
    if (is("read_socket"))
        set_timeout(pair[0], SO_RCVTIMEO, LONG_S);
    if (is("send"))
        set_timeout(pair[0], SO_SNDTIMEO, LONG_S);
    if (is("send"))
        fill(pair[0]);
    if (is("write"))
        fill(channel[1]);
    if (strncmp(name, "sem", 3) == 0)
        semaphore = CHECK(semget(IPC_PRIVATE, 1, 0600));
    if (strncmp(name, "msg", 3) == 0)
        queue = CHECK(msgget(IPC_PRIVATE, 0600));
    if (is("msgsnd")) {
        struct { long type; char text[512]; } message = {.type = 2};
        while (msgsnd(queue, &message, sizeof message.text, IPC_NOWAIT) == 0)
            ;
    }
    if (is("accept") || is("flock") || is("setlkw"))
        close(CHECK(mkstemp(path)));
    if (is("accept")) {
        unlink(path);
        strcpy(listening.sun_path, path);
        waited_for = CHECK(socket(AF_UNIX, SOCK_STREAM, 0));
        CHECK(bind(waited_for, (struct sockaddr *)&listening, sizeof listening));
        CHECK(listen(waited_for, 1));
    }
}

/* --- the child */

static void wake(void)
{
    char byte = 'x';
    struct { long type; char text[512]; } message = {.type = 1};
    struct sembuf up = {.sem_op = 1};

    if (is("futex") || is("futex_timed")) {
        *word = 1;
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
    } else if (strncmp(name, "sig", 3) == 0 && !is("sigsuspend")) {
        kill(parent, SIGUSR1);
    } else if (is("pause") || is("sigsuspend") || strstr(name, "_signal")) {
        kill(parent, SIGALRM);
    } else if (strncmp(name, "sem", 3) == 0) {
        CHECK(semop(semaphore, &up, 1));
    } else if (is("msgrcv")) {
        CHECK(msgsnd(queue, &message, 1, 0));
    } else if (is("msgsnd")) {
        while (msgrcv(queue, &message, sizeof message.text, 2, IPC_NOWAIT) >= 0)
            ;
    } else if (is("accept")) {
        CHECK(connect(CHECK(socket(AF_UNIX, SOCK_STREAM, 0)), (struct sockaddr *)&listening, sizeof listening));
    } else if (is("wait4") || is("waitid")) {
        _exit(7);
    } else if (is("flock") || is("setlkw")) {
        _exit(0);  /* which unlocks */
    } else if (is("send")) {
        CHECK(recv(pair[1], block, sizeof block, 0));
    } else if (is("write_large")) {
        for (size_t left = sizeof block; left > 0;)
            left -= CHECK(read(channel[0], block, left));
    } else if (is("write")) {
        CHECK(read(channel[0], block, sizeof block));
    } else if (is("read_socket") || strncmp(name, "recv", 4) == 0) {
        CHECK(send(pair[1], &byte, 1, 0));
    } else {
        CHECK(write(channel[1], &byte, 1));
    }
}

static pid_t start_child(void)
{
    int locked[2];
    char byte;
    CHECK(pipe(locked));
    parent = getpid();
    pid_t child = CHECK(fork());
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        struct flock lock = {.l_type = F_WRLCK};
        int file = is("flock") || is("setlkw") ? CHECK(open(path, O_RDWR)) : -1;
        if (is("flock"))
            CHECK(flock(file, LOCK_EX));
        if (is("setlkw"))
            CHECK(fcntl(file, F_SETLK, &lock));
        CHECK(write(locked[1], "", 1));
        if (read(0, &byte, 1) == 1)
            wake();
        for (;;)
            pause();
    }
    CHECK(read(locked[0], &byte, 1));  /* the child holds the lock */
    close(locked[0]);
    close(locked[1]);
    return child;
}

/* --- the calls */

static int ring_entered(int submitted_before)
{
    /* A read of the pipe by io_uring, for which io_uring_enter waits: separately, or together with its submission. */
    struct io_uring_params params = {0};
    int ring = CHECK(syscall(SYS_io_uring_setup, 4, &params));
    size_t size = params.sq_off.array + params.sq_entries * 4;
    char *rings = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entry = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    entry->opcode = IORING_OP_READ;
    entry->fd = channel[0];
    entry->addr = (unsigned long)block;
    entry->len = 1;
    *(unsigned *)(rings + params.sq_off.array) = 0;
    __atomic_store_n((unsigned *)(rings + params.sq_off.tail), 1, __ATOMIC_RELEASE);
    if (submitted_before)
        CHECK(syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0));
    int result = syscall(SYS_io_uring_enter, ring, !submitted_before, 1, IORING_ENTER_GETEVENTS, NULL, 0);
    char *completions = mmap(NULL, params.cq_off.cqes + params.cq_entries * 16, PROT_READ | PROT_WRITE, MAP_SHARED,
                             ring, IORING_OFF_CQ_RING);
    unsigned done = *(unsigned *)(completions + params.cq_off.tail) - *(unsigned *)(completions + params.cq_off.head);
    return result < 0 ? result : (int)(10 * done + result);
}

/* The kernel preserves all registers except that of the result and, on x86-64, rcx and r11; compilers rely on that. */
static long epoll_keeping(int timeout, long *kept)
{
    struct epoll_event event;
#ifdef __x86_64__
    register long fourth __asm__("r10") = timeout;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result), "+r"(fourth)
                     : "a"(SYS_epoll_wait), "D"(epoll), "S"(&event), "d"(1)
                     : "rcx", "r11", "memory");
#else
    register long number __asm__("x8") = SYS_epoll_pwait;
    register long result __asm__("x0") = epoll;
    register void *second __asm__("x1") = &event;
    register long third __asm__("x2") = 1;
    register long fourth __asm__("x3") = timeout;
    register long mask __asm__("x4") = 0, size __asm__("x5") = 8;
    __asm__ volatile("svc 0" : "+r"(result), "+r"(fourth) : "r"(number), "r"(second), "r"(third), "r"(mask), "r"(size)
                     : "memory");
#endif
    *kept = fourth;
    return result;
}

static long make(void)
{
    struct epoll_event event;
    struct pollfd polled = {.fd = waited_for, .events = POLLIN};
    /* `soon` must be exact to the millisecond under stops; `later` starts again with each. */
    struct timespec soon = {.tv_nsec = SOON_MS * 1000000}, later = {.tv_sec = 1, .tv_nsec = 500000000}, until;
    struct timeval soon_us = {.tv_usec = SOON_MS * 1000};
    struct { long type; char text[512]; } message = {.type = 1};
    struct sembuf down = {.sem_op = -1};
    struct timespec far = {.tv_sec = LONG_S};
    struct flock lock = {.l_type = F_WRLCK};
    sigset_t none, usr1 = only(SIGUSR1), usr2 = only(SIGUSR2);
    fd_set set;
    siginfo_t info;
    int status;
    long result;

    sigemptyset(&none);
    FD_ZERO(&set);
    FD_SET(waited_for, &set);
    if (is("nanosleep"))
        return nanosleep(&soon, NULL);
    if (is("clock_nanosleep")) {
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += SOON_MS * 1000000;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    }
    if (is("futex"))
        return syscall(SYS_futex, word, FUTEX_WAIT, 0, NULL, NULL, 0);
    if (is("futex_expires"))
        return syscall(SYS_futex, word, FUTEX_WAIT, 0, &soon, NULL, 0);
    if (is("futex_timed"))
        return syscall(SYS_futex, word, FUTEX_WAIT, 0, &far, NULL, 0);
    if (is("read"))
        return read(channel[0], block, 1);
    if (is("read_socket"))
        return read(pair[0], block, 1);
    if (is("write"))
        return write(channel[1], block, 4096);
    if (is("write_large")) {
        int queued;
        result = write(channel[1], block, sizeof block);
        if (result > 0 && result < (long)sizeof block) {  /* partial: exactly this number of bytes was written */
            CHECK(ioctl(channel[0], FIONREAD, &queued));
            return queued == result ? result : -2;
        }
        return result;
    }
    if (is("recv_waitall"))
        return recv(pair[0], block, 2, MSG_WAITALL);
    if (is("recv") || is("recv_timeout") || is("recv_expires"))
        return recv(pair[0], block, 1, 0);
    if (is("recvmsg_timeout")) {
        struct iovec vector = {block, 1};
        struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
        return recvmsg(pair[0], &header, 0);
    }
    if (is("send"))
        return send(pair[0], block, 1, 0);
    if (is("accept"))
        return accept(waited_for, NULL, NULL) < 0 ? -1 : 1;
    if (is("poll"))
        return poll(&polled, 1, -1);
    if (is("poll_expires"))
        return poll(&polled, 1, SOON_MS);
    if (is("ppoll"))
        return ppoll(&polled, 1, NULL, &usr2);
    if (is("ppoll_expires"))
        return ppoll(&polled, 1, &soon, &usr2);
    if (is("ppoll_signal"))
        return ppoll(&polled, 1, NULL, &none);
    if (is("select"))
        return select(waited_for + 1, &set, NULL, NULL, NULL);
    if (is("select_expires"))
        return select(waited_for + 1, &set, NULL, NULL, &soon_us);
    if (is("pselect"))
        return pselect(waited_for + 1, &set, NULL, NULL, NULL, &usr2);
    if (is("epoll_wait"))
        return epoll_wait(epoll, &event, 1, -1);
    if (is("epoll_wait_expires"))
        return epoll_wait(epoll, &event, 1, SOON_MS);
    if (is("epoll_pwait"))
        return epoll_pwait(epoll, &event, 1, -1, &usr2);
    if (is("epoll_pwait_expires"))
        return epoll_pwait(epoll, &event, 1, SOON_MS, &usr2);
    if (is("epoll_pwait_signal"))
        return epoll_pwait(epoll, &event, 1, -1, &none);
    if (is("epoll_pwait2"))
        return syscall(SYS_epoll_pwait2, epoll, &event, 1, NULL, NULL, 8);
    if (is("epoll_pwait2_expires"))
        return syscall(SYS_epoll_pwait2, epoll, &event, 1, &later, NULL, 8);
    if (is("sigwaitinfo"))
        return sigwaitinfo(&usr1, &info) == SIGUSR1;
    if (is("sigtimedwait") || is("sigtimedwait_expires"))
        return sigtimedwait(&usr1, &info, is("sigtimedwait") ? &far : &later) > 0 ? 1 : -1;
    if (is("signalfd"))
        return read(CHECK(signalfd(-1, &usr1, 0)), block, 128);
    if (is("sigsuspend"))
        return sigsuspend(&none);
    if (is("pause"))
        return pause();
    if (is("semop"))
        return semop(semaphore, &down, 1);
    if (is("semtimedop") || is("semtimedop_expires"))
        return semtimedop(semaphore, &down, 1, is("semtimedop") ? &far : &later);
    if (is("msgrcv"))
        return msgrcv(queue, &message, sizeof message.text, 1, 0);
    if (is("msgsnd"))
        return msgsnd(queue, &message, sizeof message.text, 0);
    if (is("wait4"))
        return wait4(-1, &status, 0, NULL) > 0 ? WEXITSTATUS(status) : -1;
    if (is("waitid"))
        return waitid(P_ALL, 0, &info, WEXITED) == 0 ? info.si_status : -1;
    if (is("flock"))
        return flock(CHECK(open(path, O_RDWR)), LOCK_EX);
    if (is("setlkw"))
        return fcntl(CHECK(open(path, O_RDWR)), F_SETLKW, &lock);
    if (is("io_uring_enter"))
        return ring_entered(1);
    if (is("io_uring_submit_and_wait"))
        return ring_entered(0);
    if (is("epoll_wait_keeps_registers")) {
        long kept;
        result = epoll_keeping(60000, &kept);
        return result == 1 ? kept : result;
    }
    (void)result;
    fprintf(stderr, "no such call: %s\n", name);
    exit(2);
}

/* --- consecutive waits */

/* Wait with a short timeout, then without one for a timer: the timeout of one wait must not affect the other. */
static int alternate(int count)
{
    struct epoll_event event = {.events = EPOLLIN};
    int timer = CHECK(timerfd_create(CLOCK_MONOTONIC, 0)), wrong = 0;
    struct itimerspec in_3_ms = {.it_value = {.tv_nsec = 3000000}};
    long long expired;
    epoll = CHECK(epoll_create1(0));
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event));
    puts("ready");
    for (int i = 0; i < count; i++) {
        double before = now_ms();
        int result = epoll_wait(epoll, &event, 1, 4);
        double short_ms = now_ms() - before;
        if (result != 0 || short_ms < 3.99) {
            printf("wait %d of 4 ms: result %d after %.2f ms\n", i, result, short_ms);
            wrong++;
        }
        CHECK(timerfd_settime(timer, 0, &in_3_ms, NULL));
        result = epoll_wait(epoll, &event, 1, i & 1 ? -1 : 30000);
        if (result != 1) {
            printf("wait %d of %d ms: result %d, errno %d\n", i, i & 1 ? -1 : 30000, result, result < 0 ? errno : 0);
            wrong++;
        }
        CHECK(read(timer, &expired, sizeof expired));
    }
    printf("done %d wrong\n", wrong);
    return 0;
}

static int signals(int count)
{
    struct epoll_event event;
    struct pollfd polled = {.fd = channel[0], .events = POLLIN};
    sigset_t none, blocked = only(SIGRTMIN);
    int calls = 0;
    sigemptyset(&none);
    if (!is("pause") && !is("epoll_wait"))
        sigprocmask(SIG_BLOCK, &blocked, NULL);
    puts("ready");
    while (handled < count) {
        errno = 0;
        int result = is("pause")        ? pause()
                     : is("sigsuspend") ? sigsuspend(&none)
                     : is("epoll_wait") ? epoll_wait(epoll, &event, 1, -1)
                     : is("ppoll")      ? ppoll(&polled, 1, NULL, &none)
                                        : epoll_pwait(epoll, &event, 1, -1, &none);
        calls++;
        printf("%d %d %d\n", result, errno, handled);
    }
    printf("done %d %d\n", calls, handled);
    return 0;
}

int main(int argc, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    name = argc > 1 ? argv[1] : "";
    if (is("alternate"))
        return alternate(atoi(argv[2]));
    if (is("signals")) {
        name = argv[2];
        prepare();
        return signals(atoi(argv[3]));
    }
    prepare();
    pid_t child = start_child();
    puts("ready");
    errno = 0;
    double before = now_ms();
    long result = make();
    int error = result < 0 ? errno : 0;
    printf("%ld %d %.1f %d\n", result, error, now_ms() - before, (int)handled);
    if (semaphore >= 0)
        semctl(semaphore, 0, IPC_RMID);
    if (queue >= 0)
        msgctl(queue, IPC_RMID, NULL);
    if (is("accept") || is("flock") || is("setlkw"))
        unlink(path);
    kill(child, SIGKILL);
    return 0;
}
