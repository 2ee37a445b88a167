/* A program that serves its own page faults in a thread, as virtual machines and lazy loaders do (userfaultfd(2)).

   Usage: userfault HANDLER MAIN MODE
   HANDLER  how its handler waits: "poll" or "read"
   MAIN     what its main thread does: "read" executes the commands of its input, "spin" computes
   MODE     "serve" answers faults of missing pages; "stall" does so only after the line "serve"; "protect" answers
            faults of write-protected pages, which are all present; "drop" serves, and then drops the page that it
            served before, so that one is present at most; "fork" also reads reports of forks, and the range "plain"
            is not registered

   It prints "ready", and the addresses of the registered range and of a plain one, of 1 MiB each. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIZE (1 << 20)
#define PAGE 4096

static char *area, *plain;
static char content[PAGE] __attribute__((aligned(PAGE)));
static int faults, waits_by_poll, protects, drops;
static volatile int serves = 1;

static void fail(const char *what) { perror(what); exit(1); }

static void *handle(void *unused)
{
    (void)unused;
    uint64_t served = 0;
    for (;;) {
        struct uffd_msg message;
        if (waits_by_poll) {
            struct pollfd one = { .fd = faults, .events = POLLIN };
            poll(&one, 1, -1);
        }
        while (!serves) usleep(1000);
        if (read(faults, &message, sizeof message) != sizeof message) continue;
        if (message.event != UFFD_EVENT_PAGEFAULT) {
            if (message.event == UFFD_EVENT_FORK) close(message.arg.fork.ufd);
            continue;
        }
        uint64_t at = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
        if (protects) {
            struct uffdio_writeprotect open = { .range = { at, PAGE }, .mode = 0 };
            ioctl(faults, UFFDIO_WRITEPROTECT, &open);
        } else {
            struct uffdio_copy copy = { .dst = at, .src = (uint64_t)content, .len = PAGE };
            if (ioctl(faults, UFFDIO_COPY, &copy) && errno == EEXIST) {
                struct uffdio_range range = { at, PAGE };
                ioctl(faults, UFFDIO_WAKE, &range);
            }
            if (drops && served && served != at) madvise((void *)(uintptr_t)served, PAGE, MADV_DONTNEED);
            served = at;
        }
    }
    return 0;
}

static char *map(void)
{
    char *at = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) fail("mmap");
    madvise(at, SIZE, MADV_NOHUGEPAGE);
    return at;
}

int main(int argc, char **argv)
{
    if (argc != 4) return 2;
    const char *mode = argv[3];
    waits_by_poll = !strcmp(argv[1], "poll");
    protects = !strcmp(mode, "protect");
    drops = !strcmp(mode, "drop");
    serves = strcmp(mode, "stall") != 0;
    memset(content, 'u', PAGE);
    area = map(), plain = map();
    memset(plain, 'p', SIZE);
    if (protects) memset(area, 'u', SIZE);
    faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = { .api = UFFD_API, .features = !strcmp(mode, "fork") ? UFFD_FEATURE_EVENT_FORK : 0 };
    if (faults < 0 || ioctl(faults, UFFDIO_API, &api)) fail("userfaultfd");
    struct uffdio_register range = { .range = { (uint64_t)area, SIZE } };
    range.mode = protects ? UFFDIO_REGISTER_MODE_WP : UFFDIO_REGISTER_MODE_MISSING;
    if (ioctl(faults, UFFDIO_REGISTER, &range)) fail("UFFDIO_REGISTER");
    struct uffdio_writeprotect closed = { .range = { (uint64_t)area, SIZE }, .mode = UFFDIO_WRITEPROTECT_MODE_WP };
    if (protects && ioctl(faults, UFFDIO_WRITEPROTECT, &closed)) fail("UFFDIO_WRITEPROTECT");
    pthread_t thread;
    pthread_create(&thread, 0, handle, 0);
    printf("ready\n%lu %lu\n", (unsigned long)area, (unsigned long)plain);
    fflush(stdout);
    if (!strcmp(argv[2], "spin")) for (;;) __asm__ volatile ("");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "serve\n")) serves = 1;
        int intact = 1;
        if (!strcmp(line, "check\n"))
            for (size_t at = 0; at < SIZE; at += PAGE) {
                if (area[at] != 'u') intact = 0;
                ((volatile char *)area)[at + 1] = 'w';
            }
        puts(intact ? "intact" : "damaged");
        fflush(stdout);
    }
    return 0;
}
