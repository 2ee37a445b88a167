/* Two threads count in every page of their half, page after page: a copy of one moment holds at most two neighbouring
   numbers in each half, and the larger before the smaller. */
#include <pthread.h>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char *base; static size_t half;
static void *count(void *which) {
    char *start = base + (which ? half : 0);
    for (uint64_t round = 2;; round++)
        for (size_t page = 0; page < half; page += 4096) *(volatile uint64_t *)(start + page) = round;
    return 0;
}
int main(int argc, char **argv) {
    (void)argc;
    size_t size = strtoull(argv[1], 0, 0);
    int shared = !strcmp(argv[2], "shared");
    half = size / 2;
    base = mmap(0, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | (shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
    if (!strcmp(argv[2], "small")) madvise(base, size, MADV_NOHUGEPAGE);
    if (!strcmp(argv[2], "huge")) madvise(base, size, MADV_HUGEPAGE);
    if (!strcmp(argv[2], "dontfork")) madvise(base, size, MADV_DONTFORK);
    if (!strcmp(argv[2], "wipeonfork")) madvise(base, size, MADV_WIPEONFORK);
    for (size_t page = 0; page < size; page += 4096) *(uint64_t *)(base + page) = 1;
    pthread_t other;
    pthread_create(&other, 0, count, (void *)1);
    printf("%lu\n", (unsigned long)base); fflush(stdout);
    count(0);
}
