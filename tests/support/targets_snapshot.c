/* A program with memory of several kinds, which it writes to on request. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile sig_atomic_t children_reported;
static void count(int number) { (void)number; children_reported++; }
static void *idle(void *unused) { pause(); return unused; }

static char *map(size_t size, int flags, int advice)
{
    char *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    if (memory == MAP_FAILED) exit(2);
    madvise(memory, size, MADV_NOHUGEPAGE);
    if (advice) madvise(memory, size, advice);
    for (size_t at = 0; at < size; at += 4096) memory[at] = 1;
    return memory;
}

int main(int argc, char **argv)
{
    size_t size = argc > 1 ? strtoull(argv[1], 0, 0) : 4 << 20;
    char *own = map(size, MAP_PRIVATE, 0), *shared = map(1 << 20, MAP_SHARED, 0);
    char *kept = map(1 << 16, MAP_PRIVATE, MADV_DONTFORK), *wiped = map(1 << 16, MAP_PRIVATE, MADV_WIPEONFORK);
    char *hidden = map(1 << 16, MAP_PRIVATE, MADV_DONTDUMP), *closed = map(4096, MAP_PRIVATE, 0);
    char command[16];
    unsigned long first, pages, value;
    pthread_t other;
    mprotect(closed, 4096, PROT_NONE);
    signal(SIGCHLD, count);
    for (int i = 2; i < argc; i++) pthread_create(&other, 0, idle, 0);
    printf("ready\n%lu %lu %lu %lu %lu %lu\n", (unsigned long)own, (unsigned long)shared, (unsigned long)kept,
           (unsigned long)wiped, (unsigned long)hidden, (unsigned long)closed);
    fflush(stdout);
    while (scanf("%15s %lu %lu %lu", command, &first, &pages, &value) == 4) {
        char *memory = *command == 's' ? shared : own;
        if (!strcmp(command, "wait")) {
            errno = 0;
            pages = waitpid(-1, 0, WNOHANG) == -1 ? errno : 0;
            first = children_reported;
        } else if (!strcmp(command, "exec")) execl(argv[0], argv[0], argv[1], NULL);
        else if (!strcmp(command, "close")) close((int)first);
        else
            for (size_t page = first; page < first + pages; page++) memory[page * 4096] = (char)value;
        printf("%lu %lu\n", first, pages);
        fflush(stdout);
    }
    return 0;
}
