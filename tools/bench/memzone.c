/* The peer of `iobmd bench contiguous`: DPDK's physically contiguous memzones.
 *
 * Usage: memzone TRIES MIB... -- EAL-OPTIONS
 * Prints the microseconds of its startup, "start 1234.5", and one line per size: MiB, the number of successful
 * attempts, median microseconds, and whether every memzone was contiguous according to DPDK's own reading of pagemap.
 */
#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_memory.h>
#include <rte_memzone.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int ascending(const void *one, const void *other)
{
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static int is_contiguous(const struct rte_memzone *zone)
{
    for (size_t offset = 0; offset < zone->len; offset += 4096)
        if (rte_mem_virt2phy((char *)zone->addr + offset) != zone->iova + offset)
            return 0;
    return 1;
}

int main(int argc, char **argv)
{
    int options = 2;
    while (options < argc && strcmp(argv[options], "--"))
        options++;
    if (options >= argc)
        return 2;
    int tries = atoi(argv[1]);
    double *took = calloc(tries, sizeof *took);
    struct timespec begin, end;
    argv[options] = argv[0];
    clock_gettime(CLOCK_MONOTONIC, &begin);
    if (!took || rte_eal_init(argc - options, argv + options) < 0) {
        fprintf(stderr, "rte_eal_init: %s\n", rte_strerror(rte_errno));
        return 1;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("start %.1f\n", (end.tv_sec - begin.tv_sec) * 1e6 + (end.tv_nsec - begin.tv_nsec) / 1e3);
    for (int index = 2; index < options; index++) {
        size_t size = strtoul(argv[index], NULL, 10) << 20;
        int found = 0, contiguous = 1;
        for (int attempt = 0; attempt < tries; attempt++) {
            uint64_t begin = rte_rdtsc_precise();
            const struct rte_memzone *zone =
                rte_memzone_reserve_aligned("iobmd", size, SOCKET_ID_ANY, RTE_MEMZONE_IOVA_CONTIG, 4096);
            took[attempt] = (rte_rdtsc_precise() - begin) * 1e6 / rte_get_tsc_hz();
            if (!zone)
                continue;
            found++;
            contiguous &= is_contiguous(zone);
            rte_memzone_free(zone);
        }
        qsort(took, tries, sizeof *took, ascending);
        printf("%s %d %.1f %s\n", argv[index], found, took[tries / 2], contiguous ? "contiguous" : "scattered");
    }
    rte_eal_cleanup();
    return 0;
}
