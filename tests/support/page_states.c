/* A process with the requested kinds of memory: page_states FILE KIND... For each it prints "KIND ADDRESS SIZE"
 * on stdout, then "ready". FILE is a file of 4 MiB. It executes the commands of its input, and answers "ok" to each:
 *   grow     touch 2 MiB more of the stack
 *   flap     from now on map, unmap, protect, split and free memory of the first kind repeatedly
 *   exec     become `sleep 60`
 *   exit     end
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define POPULATE_WRITE 23
#define GUARD_INSTALL 102
#define WP_UNPOPULATED (1 << 13)
#define PAGE 4096UL
#define KB (1UL << 10)
#define MB (1UL << 20)
#define GB (1UL << 30)
#define HUGE (2 * MB)
enum { RW = PROT_READ | PROT_WRITE, PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS, SHARED = MAP_SHARED | MAP_ANONYMOUS };

static char *next = (char *)(1UL << 44); /* where nothing else is mapped */
static const char *file;
static volatile char sink;
static struct { char *address; size_t size; } first;

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

/* Map at a multiple of the huge page size plus `offset`, followed by a gap so that no two areas merge. */
static char *map_at(size_t offset, size_t size, int flags, int fd)
{
    char *address = next + offset;
    next += (offset + size + 2 * HUGE - 1) / HUGE * HUGE;
    must(mmap(address, size, RW, flags | MAP_FIXED_NOREPLACE, fd, 0) == address, "mmap");
    return address;
}

static char *map(size_t size, int flags, int fd) { return map_at(0, size, flags, fd); }

static void announce(const char *kind, void *address, size_t size)
{
    if (!first.address)
        first.address = address, first.size = size;
    printf("%s %lu %zu\n", kind, (unsigned long)address, size);
}

static void write_every(char *address, size_t size, size_t step)
{
    for (size_t at = 0; at < size; at += step)
        memset(address + at, (int)(at / PAGE % 251 + 1), 64);
}

static void read_every(const char *address, size_t size, size_t step)
{
    for (size_t at = 0; at < size; at += step)
        sink += address[at];
}

static char *small(size_t size)
{
    char *address = map(size, PRIVATE, -1);
    must(!madvise(address, size, MADV_NOHUGEPAGE), "NOHUGEPAGE");
    return address;
}

static char *huge_at(size_t offset, size_t size)
{
    char *address = map_at(offset, size, PRIVATE, -1);
    must(!madvise(address, size, MADV_HUGEPAGE), "HUGEPAGE");
    return address;
}

static char *populated(char *address, size_t size)
{
    must(!madvise(address, size, POPULATE_WRITE), "POPULATE_WRITE");
    return address;
}

static char *memfd(size_t size)
{
    int fd = memfd_create("page-states", MFD_CLOEXEC);
    must(fd >= 0 && !ftruncate(fd, size), "memfd");
    return map(size, MAP_SHARED, fd);
}

static char *small_pages_of(size_t size) { return populated(small(size), size); }

/* Pages are touched in a different order, so that the order of frames differs from that of pages; some never are. */
static void anonymous(void)
{
    size_t size = 20 * MB, pages = size / PAGE;
    char *address = small(size);
    for (size_t index = 0; index < pages; index++) {
        size_t page = index * 7919 % pages;
        if (page > pages / 4 || page % 13)
            address[page * PAGE] = 1;
    }
    announce("anonymous", address, size);
}

/* Huge pages that are mapped page by page, because parts of them are unmapped or have another protection. */
static void split(void)
{
    char *address = populated(huge_at(0, 4 * HUGE), 4 * HUGE);
    must(!munmap(address + MB, 64 * KB) && !mprotect(address + HUGE + MB, 12 * KB, PROT_READ), "split");
    must(!madvise(address + 2 * HUGE + 40 * KB, 8 * KB, MADV_DONTNEED), "DONTNEED");
    announce("split", address, 4 * HUGE);
}

static void zero(void)
{
    char *address = small(20 * MB);
    read_every(address, 18 * MB, PAGE);
    write_every(address, 18 * MB, 37 * PAGE);
    announce("zero", address, 20 * MB);
}

static void hugezero(void)
{
    char *address = huge_at(0, 4 * HUGE);
    read_every(address, 3 * HUGE, HUGE);
    address[2 * HUGE] = 1; /* a huge page of memory in the middle */
    announce("hugezero", address, 4 * HUGE);
}

/* One area with a huge page, and with small zero pages where no huge page fits. */
static void hugetail(void)
{
    char *address = huge_at(0, HUGE + MB);
    address[0] = 1;
    read_every(address + HUGE, MB, PAGE);
    announce("hugetail", address, HUGE + MB);
}

static void guard(void)
{
    char *address = small_pages_of(2 * MB);
    must(!madvise(address + 64 * KB, 64 * KB, GUARD_INSTALL), "GUARD_INSTALL");
    must(!madvise(address + MB, PAGE, GUARD_INSTALL), "GUARD_INSTALL");
    announce("guard", address, 2 * MB);
}

static void hugetlb(void)
{
    char *address = map(3 * HUGE, PRIVATE | MAP_HUGETLB, -1);
    address[0] = address[2 * HUGE] = 1;
    announce("hugetlb", address, 3 * HUGE);
    address = map(2 * HUGE, SHARED | MAP_HUGETLB, -1);
    address[HUGE] = 1;
    announce("hugetlb-shared", address, 2 * HUGE);
}

static void giga(void)
{
    next = (char *)(((unsigned long)next + GB - 1) & ~(GB - 1));
    char *address = map(GB, PRIVATE | MAP_HUGETLB | 30 << MAP_HUGE_SHIFT, -1);
    address[0] = 1;
    announce("giga", address, GB);
}

static void files(void)
{
    int fd = open(file, O_RDWR | O_CLOEXEC);
    must(fd >= 0, file);
    /* Aligned, a file system with large folios may be mapped by huge pages. */
    char *address = map(4 * MB, MAP_SHARED, fd);
    read_every(address, 4 * MB, PAGE);
    announce("file-aligned", address, 4 * MB);
    address = map_at(64 * KB, 4 * MB, MAP_SHARED, fd);
    read_every(address, 3 * MB, PAGE);
    announce("file", address, 4 * MB);
    address = map_at(64 * KB, 4 * MB, MAP_PRIVATE, fd);
    read_every(address, 3 * MB, PAGE);
    write_every(address, 3 * MB, 5 * PAGE);
    announce("file-private", address, 4 * MB);
}

static void paged_out(void)
{
    size_t size = 20 * MB;
    char *address = small(size), *shared = memfd(MB);
    write_every(address, size, PAGE);
    write_every(shared, MB, PAGE);
    must(!madvise(address, size, MADV_PAGEOUT) && !madvise(shared, MB, MADV_PAGEOUT), "PAGEOUT");
    read_every(address, MB, 3 * PAGE);
    read_every(shared, MB / 4, PAGE);
    announce("swapped", address, size);
    announce("swapped-shared", shared, MB);
}

static void lazy(void)
{
    char *address = small_pages_of(4 * MB);
    must(!madvise(address + MB, MB, MADV_FREE), "FREE");
    announce("lazy", address, 4 * MB);
}

static void locked(void)
{
    char *address = small(MB);
    must(!mlock(address, MB / 2), "mlock");
    announce("locked", address, MB);
}

/* Markers represent the protection of absent pages. */
static void watched(void)
{
    struct uffdio_api api = {.api = UFFD_API, .features = WP_UNPOPULATED};
    struct uffdio_register registered = {.mode = UFFDIO_REGISTER_MODE_WP};
    struct uffdio_writeprotect protected = {.mode = UFFDIO_WRITEPROTECT_MODE_WP};
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    char *address = small(MB);
    write_every(address, MB / 4, PAGE);
    registered.range.start = protected.range.start = (unsigned long)address;
    registered.range.len = MB;
    protected.range.len = MB / 2;
    must(fd >= 0 && !ioctl(fd, UFFDIO_API, &api) && !ioctl(fd, UFFDIO_REGISTER, &registered)
         && !ioctl(fd, UFFDIO_WRITEPROTECT, &protected), "userfaultfd");
    announce("watched", address, MB);
}

static void sparse(void)
{
    size_t size = 8 * GB;
    char *address = map(size, PRIVATE | MAP_NORESERVE, -1);
    must(!madvise(address, size, MADV_NOHUGEPAGE), "NOHUGEPAGE");
    write_every(address + 3 * GB, MB, PAGE);
    write_every(address, size, 157 * MB);
    announce("sparse", address, size);
}

/* `many` areas of one page each; every second one is touched. */
static void areas(const char *kind, size_t many)
{
    char *address = small(many * PAGE);
    write_every(address, many * PAGE, 2 * PAGE);
    for (size_t index = 0; index < many; index += 2)
        must(!mprotect(address + index * PAGE, PAGE, PROT_READ), "mprotect");
    announce(kind, address, many * PAGE);
}

/* Shared with two children: by a memfd, which one of them maps at another address; by fork; and half of a huge page.
   */
static void forked(void)
{
    char *shared = memfd(64 * KB), *small_pages = small_pages_of(MB);
    char *own, *huge = populated(huge_at(0, 4 * HUGE), 4 * HUGE);
    char *volatile *said = (char *volatile *)map(PAGE, SHARED, -1);
    pid_t children[2];
    write_every(shared, 64 * KB, PAGE);
    for (int child = 0; child < 2; child++) {
        children[child] = fork();
        if (children[child])
            continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        must(!munmap(huge + (child ? 0 : HUGE / 2), 4 * HUGE - (child ? 0 : HUGE / 2)), "munmap");
        if (child)
            shared = mremap(shared, 64 * KB, 64 * KB, MREMAP_MAYMOVE | MREMAP_FIXED, next);
        read_every(shared, 64 * KB, PAGE);
        said[child] = shared;
        for (;;)
            pause();
    }
    while (!said[0] || !said[1])
        usleep(1000);
    own = small_pages_of(16 * KB);
    announce("shared", shared, 64 * KB);
    announce("forked", small_pages, MB);
    announce("half-shared", huge, 4 * HUGE);
    announce("own", own, 16 * KB);
    announce("child", said[0], children[0]);
    announce("moved-child", said[1], children[1]);
}

static void ring(void)
{
    struct io_uring_params parameters = {0};
    int fd = syscall(SYS_io_uring_setup, 256, &parameters);
    size_t size = 256 * sizeof(struct io_uring_sqe);
    char *address = mmap(NULL, size, RW, MAP_SHARED, fd, IORING_OFF_SQES);
    must(fd >= 0 && address != MAP_FAILED, "io_uring");
    read_every(address, size, PAGE);
    announce("ring", address, size);
}

static void memfds(void)
{
    char *address = memfd(4 * MB);
    write_every(address, 4 * MB, 3 * PAGE);
    announce("memfd", address, 4 * MB);
}

static void memfd_huge(void)
{
    char *address = memfd(2 * HUGE);
    must(!madvise(address, 2 * HUGE, MADV_HUGEPAGE), "HUGEPAGE");
    announce("memfd-huge", populated(address, 2 * HUGE), 2 * HUGE);
}

static void no_access(void)
{
    char *address = small_pages_of(MB);
    must(!mprotect(address, MB, PROT_NONE), "mprotect");
    announce("no-access", address, MB);
}

static void untouched(void) { announce("untouched", small(4 * MB), 4 * MB); }
static void thp(void) { announce("thp", populated(huge_at(0, 4 * HUGE), 4 * HUGE), 4 * HUGE); }
/* No huge page that a PMD maps fits: the next smaller enabled size is used. */
static void mthp(void) { announce("mthp", populated(huge_at(64 * KB, MB), MB), MB); }
static void tiny(void) { areas("tiny", 1200); }
static void many(void) { areas("many", 20000); }

static const struct { const char *kind; void (*build)(void); } kinds[] = {
    {"untouched", untouched}, {"anonymous", anonymous}, {"thp", thp}, {"split", split}, {"mthp", mthp},
    {"zero", zero}, {"hugezero", hugezero}, {"hugetail", hugetail}, {"guard", guard}, {"hugetlb", hugetlb},
    {"giga", giga}, {"memfd", memfds}, {"memfd-huge", memfd_huge}, {"file", files}, {"no-access", no_access},
    {"swapped", paged_out}, {"lazy", lazy}, {"locked", locked}, {"watched", watched}, {"sparse", sparse},
    {"tiny", tiny}, {"many", many}, {"forked", forked}, {"ring", ring},
};

static void build(const char *kind)
{
    for (size_t index = 0; index < sizeof kinds / sizeof *kinds; index++)
        if (!strcmp(kinds[index].kind, kind)) {
            kinds[index].build();
            return;
        }
    must(0, kind);
}

static void *flap(void *unused)
{
    size_t half = first.size / 2 / PAGE * PAGE;
    for (unsigned round = 0;; round++) {
        munmap(first.address, half);
        mmap(first.address, half, RW, PRIVATE | MAP_FIXED, -1, 0);
        madvise(first.address, half, round & 1 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        write_every(first.address, half, round & 2 ? PAGE : 3 * PAGE);
        mprotect(first.address + half / 2, PAGE, PROT_READ);
        madvise(first.address + half / 4, half / 8, MADV_DONTNEED);
        munmap(first.address, half / 8);
    }
    return unused;
}

static void grow(int depth)
{
    volatile char frame[16 * KB];
    frame[0] = frame[8 * KB] = (char)depth;
    if (depth)
        grow(depth - 1);
    sink += frame[0];
}

int main(int count, char **arguments)
{
    char line[64];
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    file = arguments[1];
    for (int index = 2; index < count; index++)
        build(arguments[index]);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "grow\n"))
            grow(2 * MB / (16 * KB));
        else if (!strcmp(line, "flap\n"))
            must(!pthread_create(&thread, NULL, flap, NULL), "pthread_create");
        else if (!strcmp(line, "exec\n"))
            must(execlp("sleep", "sleep", "60", NULL), "exec");
        else
            return 0;
        puts("ok");
        fflush(stdout);
    }
    return 0;
}
