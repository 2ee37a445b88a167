# The areas of this process, one after the other, by PROCMAP_QUERY or from the text of /proc/PID/maps
from libc.stdint cimport uint64_t

from procmap_query cimport iobmd_procmap_query

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <inttypes.h>
    #include <pthread.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <sys/sysmacros.h>
    #include <sys/vfs.h>
    #include <unistd.h>

    /*
     * A descriptor of the maps of this process, which remains open; -1: no /proc. In a forked child it would show the
     * parent's areas. The child may have the same pid, in another namespace, and a fork by a bare system call runs no
     * handler.
     */
    static int iobmd_maps = -1;
    static pid_t iobmd_maps_of;

    static void iobmd_close_maps(void)
    {
        if (iobmd_maps >= 0)
            close(iobmd_maps);
        iobmd_maps = -1;
    }

    static int iobmd_own_maps(void)
    {
        if (iobmd_maps >= 0 && iobmd_maps_of == getpid())
            return iobmd_maps;
        if (!iobmd_maps_of)
            pthread_atfork(NULL, NULL, iobmd_close_maps);
        iobmd_close_maps();
        iobmd_maps = open("/proc/thread-self/maps", O_RDONLY | O_CLOEXEC);
        iobmd_maps_of = getpid();
        return iobmd_maps;
    }

    /* Before Linux 6.11: read the text up to the area, tens of microseconds in a program of 200 areas. */
    static int iobmd_search_maps(uint64_t address, struct iobmd_procmap_query *area)
    {
        char *line = NULL, permissions[5] = "";
        size_t room = 0;
        unsigned major, minor;
        int found = 0;
        FILE *file = fopen("/proc/thread-self/maps", "re");
        if (!file)
            return -1;
        while (!found && getline(&line, &room, file) > 0) {
            char *dash;
            area->vma_start = strtoull(line, &dash, 16);
            area->vma_end = *dash == '-' ? strtoull(dash + 1, NULL, 16) : 0;
            if (area->vma_end <= address)
                continue;
            found = sscanf(line, "%*x-%*x %4s %" SCNx64 " %x:%x %" SCNu64, permissions, &area->vma_offset, &major,
                           &minor, &area->inode) == 5 ? 1 : -1;
        }
        if (found == 1) {
            area->vma_flags = (permissions[0] == 'r') | (permissions[1] == 'w') << 1 | (permissions[2] == 'x') << 2
                | (permissions[3] == 's') << 3;
            area->dev_major = major;
            area->dev_minor = minor;
        }
        free(line);
        fclose(file);
        return found;
    }

    /* Find the area that contains an address of this process, or the next one: 1, 0 for none, -1 if unknown. */
    static int iobmd_own_area(uint64_t address, struct iobmd_procmap_query *area)
    {
        int fd = iobmd_own_maps();
        memset(area, 0, sizeof *area);
        area->size = sizeof *area;
        area->query_flags = IOBMD_COVERING_OR_NEXT_VMA;
        area->query_addr = address;
        if (fd < 0)
            return -1;
        if (!ioctl(fd, IOBMD_PROCMAP_QUERY, area))
            return 1;
        return errno == ENOENT ? 0 : iobmd_search_maps(address, area);
    }

    /* The device and inode of an object, as areas show them. */
    static int iobmd_identity(int fd, uint64_t *device, uint64_t *inode)
    {
        struct stat status;
        if (fstat(fd, &status))
            return -1;
        *device = (uint64_t)major(status.st_dev) << 32 | minor(status.st_dev);
        *inode = status.st_ino;
        return 0;
    }

    static int iobmd_is_dma_buf(int fd)
    {
        struct statfs status;
        return !fstatfs(fd, &status) && status.f_type == 0x444d4142;  /* DMA_BUF_MAGIC */
    }
    """
    int iobmd_own_area(uint64_t address, iobmd_procmap_query *area)
    int iobmd_identity(int fd, uint64_t *device, uint64_t *inode)
    int iobmd_is_dma_buf(int fd)
