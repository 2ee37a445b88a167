/* Counts in the first word of every page of 16 MiB, in a thread; "alone": the main thread exits before. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile char *area;
static void *count(void *unused) {
    (void)unused;
    for (uint64_t round = 1;; round++)
        for (size_t at = 0; at < 16 << 20; at += 4096) *(volatile uint64_t *)(area + at) = round;
    return 0;
}
static void *wait_(void *unused) { (void)unused; for (;;) pause(); return 0; }
int main(int argc, char **argv) {
    pthread_t thread;
    area = mmap(0, 16 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset((char *)area, 'x', 16 << 20);
    pthread_create(&thread, 0, strcmp(argv[1], "alone") ? count : wait_, 0);
    printf("ready\n%lu\n", (unsigned long)area);
    fflush(stdout);
    if (!strcmp(argv[1], "alone")) pthread_exit(0);
    for (;;) pause();
    return argc;
}
