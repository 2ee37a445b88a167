/* A process with memory of every kind, for tests to copy from. It executes the commands that it reads on stdin, and
 * answers "ok" to each:
 *   dump KIND PATH          write the memory to a file, by write(2), for comparison with a copy
 *   unmap KIND OFFSET SIZE  make a hole
 *   flap KIND OFFSET SIZE   from now on unmap and map these bytes repeatedly
 *   leader-exit             end the main thread only
 *   exec                    become `sleep 60`
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

#define HUGE (2UL << 20)
enum { MOST = 16 };

static struct { const char *kind; char *address; size_t size; } regions[MOST];
static int kinds;
static struct { char *address; size_t size; } flapped;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void *map(size_t size, int flags, int fd)
{
    void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    return address == MAP_FAILED ? NULL : address;
}

static void add(const char *kind, void *address, size_t size, int fill)
{
    uint64_t state = 88172645463325252UL + kinds;
    if (address && fill)
        for (size_t at = 0; at + 8 <= size; at += 8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            memcpy((char *)address + at, &state, 8);
        }
    regions[kinds].kind = kind;
    regions[kinds].address = address;
    regions[kinds++].size = size;
}

static int find(const char *kind)
{
    for (int index = 0; index < kinds; index++)
        if (!strcmp(regions[index].kind, kind))
            return index;
    fprintf(stderr, "no kind %s\n", kind);
    exit(2);
}

static void *flap(void *unused)
{
    for (;;) {
        munmap(flapped.address, flapped.size);
        usleep(50);
        if (mmap(flapped.address, flapped.size, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
            die("flap");
        memset(flapped.address, 0x55, flapped.size);
        usleep(50);
    }
    return unused;
}

static void *wait_long(void *unused)
{
    sleep(60);
    return unused;
}

static void execute(char *line)
{
    char verb[32] = "", kind[32] = "", path[512] = "";
    size_t offset = 0, size = 0;
    pthread_t thread;
    sscanf(line, "%31s %31s %511s", verb, kind, path);
    sscanf(line, "%*s %*s %zu %zu", &offset, &size);
    if (!strcmp(verb, "dump")) {
        int index = find(kind), fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        for (size_t done = 0; done < regions[index].size;) {
            ssize_t wrote = write(fd, regions[index].address + done, regions[index].size - done);
            if (wrote <= 0)
                die("dump");
            done += wrote;
        }
        close(fd);
    } else if (!strcmp(verb, "unmap")) {
        if (munmap(regions[find(kind)].address + offset, size))
            die("unmap");
    } else if (!strcmp(verb, "flap")) {
        flapped.address = regions[find(kind)].address + offset;
        flapped.size = size;
        /* The previous memory is unmapped when this is reported, even if the thread starts later. */
        if (munmap(flapped.address, flapped.size))
            die("flap");
        pthread_create(&thread, NULL, flap, NULL);
    } else if (!strcmp(verb, "leader-exit")) {
        pthread_create(&thread, NULL, wait_long, NULL);
        puts("ok");
        fflush(stdout);
        pthread_exit(NULL);
    } else if (!strcmp(verb, "exec")) {
        execlp("sleep", "sleep", "60", NULL);
        die("exec");
    } else {
        fprintf(stderr, "what is %s?\n", verb);
        exit(2);
    }
    puts("ok");
    fflush(stdout);
}

int main(int count, char **arguments)
{
    size_t size = count > 1 ? strtoul(arguments[1], NULL, 0) : 4UL << 20;
    char stack[1 << 20], line[1024], name[] = "/tmp/iobmd-regions-XXXXXX", *guarded;
    void *anonymous, *huge;
    int fd;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    anonymous = map(size, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    madvise(anonymous, size, MADV_NOHUGEPAGE);
    add("anonymous", anonymous, size, 1);
    if (count <= 2 || strcmp(arguments[2], "only-anonymous")) {
        huge = map(size + HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        huge = (void *)(((uintptr_t)huge + HUGE - 1) & ~(HUGE - 1));
        madvise(huge, size, MADV_HUGEPAGE);
        add("thp", huge, size, 1);
        add("hugetlb", map(HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1), HUGE, 1);
        fd = memfd_create("source", MFD_CLOEXEC);
        if (ftruncate(fd, size))
            die("ftruncate");
        add("memfd", map(size, MAP_SHARED, fd), size, 1);
        fd = mkstemp(name);
        unlink(name);
        if (ftruncate(fd, size))
            die("ftruncate");
        add("file", map(size, MAP_SHARED, fd), size, 1);
        /* Its last page is past the end of the file: mapped but not readable. */
        add("past-end", map(size + 4096, MAP_SHARED, fd), size + 4096, 0);
        add("readonly", map(size, MAP_PRIVATE | MAP_ANONYMOUS, -1), size, 1);
        mprotect(regions[find("readonly")].address, size, PROT_READ);
        add("stack", stack, sizeof stack, 1);
        add("untouched", map(size, MAP_PRIVATE | MAP_ANONYMOUS, -1), size, 0);
        guarded = map(size, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        add("no-access", guarded, size, 1);
        mprotect(guarded, size, PROT_NONE);
    }
    for (int index = 0; index < kinds; index++)
        printf("%s %lu %zu\n", regions[index].kind, (unsigned long)regions[index].address, regions[index].size);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin))
        execute(line);
    return 0;
}
