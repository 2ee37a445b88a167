# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Files of /proc and /sys as text, and parsers of /proc/PID/maps and smaps (proc_pid_maps(5)), for tens of thousands
of areas of one or 26 lines each."""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, ENOENT, errno
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcmp, memset, strerror, strlen
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open
from posix.unistd cimport close, read

from procmap_query cimport (
    C_COVERING_OR_NEXT_VMA, C_VMA_EXECUTABLE, C_VMA_READABLE, C_VMA_SHARED, C_VMA_WRITABLE, IOBMD_PROCMAP_QUERY,
    ioctl, iobmd_procmap_query,
)

cdef extern from "Python.h":
    # File names need not be UTF-8.
    str PyUnicode_DecodeFSDefaultAndSize(const char *text, Py_ssize_t size)
    str PyUnicode_FromStringAndSize(const char *text, Py_ssize_t size)
    bytes PyUnicode_EncodeFSDefault(str text)


cdef enum:
    NAME = 4096  # bytes; PATH_MAX, the most that PROCMAP_QUERY writes
    PART = 8192  # bytes per read: more than most files of /proc and /sys have


def read_text(str path):
    """Return the text of a file of the kernel, which may be empty. Raises OSError.

    It takes less time than Python's `open` and `read`, which also call fstat(2) and lseek(2), and no signal handler
    can leave the file open.
    """
    cdef bytes name = PyUnicode_EncodeFSDefault(path), text
    cdef list parts = []
    cdef const char *place = name
    cdef char part[PART]
    cdef ssize_t found = 1
    cdef int fd
    if strlen(place) != <size_t>len(name):
        raise ValueError("embedded null byte")
    with nogil:
        fd = open(place, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        raise OSError(errno, strerror(errno).decode(), path)
    try:
        while found:
            with nogil:
                found = read(fd, part, PART)
            if found > 0:
                parts.append(part[:found])
            elif found < 0:
                if errno != EINTR:
                    raise OSError(errno, strerror(errno).decode(), path)
                PyErr_CheckSignals()
    finally:
        close(fd)
    text = b"".join(parts)
    return PyUnicode_DecodeFSDefaultAndSize(text, len(text))


def parse(bytes text, uint64_t low=0, uint64_t high=UINT64_MAX):
    """Return the areas in whole lines of maps that overlap `low`…`high`.

    Each area is (start, end, permissions, offset, inode, name, device), with the name as printed by the kernel, ""
    for none. Lines of areas below `low` are skipped without parsing, and parsing stops at the first area that begins
    at `high` or above, which is not returned. Raises ValueError for any other line.
    """
    cdef const char *at = text
    cdef const char *end = at + len(text)
    cdef const char *stop
    cdef const char *number
    cdef uint64_t first, last
    areas = []
    while at < end:
        if low or high < UINT64_MAX:
            first = last = 0
            number = _number(at, 16, &first)
            if number[0] == c"-":
                _number(number + 1, 16, &last)
                if first >= high:
                    break
                if last <= low:
                    stop = <const char *>memchr(at, c"\n", end - at)
                    at = end if stop == NULL else stop + 1
                    continue
        at = _add(areas, at, end)
    return areas


def query(int fd, uint64_t start, uint64_t end, Py_ssize_t most):
    """Return, by PROCMAP_QUERY (Linux 6.11), at most `most` areas that overlap `start`…`end`, in ascending order.

    `fd` is an open /proc/PID/maps. Areas are returned as by `parse`, except that newlines in names are not escaped;
    if fewer than `most` are returned, there are no others. Raises OSError: ENOTTY before Linux 6.11; ESRCH: the
    memory no longer exists; ENAMETOOLONG.
    """
    cdef char name[NAME]
    cdef char device[32]
    cdef char permissions[4]
    cdef iobmd_procmap_query arg
    cdef int failed
    cdef uint64_t flags
    areas = []
    while start < end and len(areas) < most:
        memset(&arg, 0, sizeof(arg))
        arg.size = sizeof(arg)
        arg.query_flags = C_COVERING_OR_NEXT_VMA
        arg.query_addr = start
        arg.vma_name_addr, arg.vma_name_size = <uintptr_t>name, NAME
        with nogil:
            failed = ioctl(fd, IOBMD_PROCMAP_QUERY, &arg)
        if failed and errno == ENOENT:  # nothing is mapped from there on
            break
        if failed:
            raise OSError(errno, f"ioctl(PROCMAP_QUERY): {strerror(errno).decode()}")
        if arg.vma_start >= end or arg.vma_end <= start:
            break
        flags = arg.vma_flags
        permissions[0] = c"r" if flags & C_VMA_READABLE else c"-"
        permissions[1] = c"w" if flags & C_VMA_WRITABLE else c"-"
        permissions[2] = c"x" if flags & C_VMA_EXECUTABLE else c"-"
        permissions[3] = c"s" if flags & C_VMA_SHARED else c"p"
        areas.append((
            arg.vma_start, arg.vma_end, PyUnicode_FromStringAndSize(permissions, 4), arg.vma_offset, arg.inode,
            # The size counts the final zero, and is 0 for no name.
            PyUnicode_DecodeFSDefaultAndSize(name, arg.vma_name_size - 1) if arg.vma_name_size else "",
            PyUnicode_FromStringAndSize(
                device, snprintf(device, sizeof(device), b"%02x:%02x", arg.dev_major, arg.dev_minor)
            ),
        ))
        start = arg.vma_end
    return areas


def parse_details(bytes text):
    """Return the data of whole entries of smaps, which begin with a line of maps.

    Each is (area, counters, flags): the area as from `parse`; the counters by name, those in kB converted to bytes;
    and the words of VmFlags. Raises ValueError for any other line.
    """
    cdef const char *at = text
    cdef const char *end = at + len(text)
    cdef const char *stop
    cdef const char *colon
    cdef const char *behind
    cdef uint64_t value
    areas, found = [], []
    names, words = {}, {}  # the same ones occur repeatedly
    while at < end:
        at = _add(areas, at, end)
        counters, flags = {}, frozenset()
        while at < end and c"A" <= at[0] <= c"Z":  # a line of maps begins with a digit or a small letter
            stop = <const char *>memchr(at, c"\n", end - at)
            if stop == NULL:
                stop = end
            colon = <const char *>memchr(at, c":", stop - at)
            if colon == NULL:
                raise ValueError("not a line of smaps")
            line = at[:colon - at]
            name = names.get(line)
            if name is None:
                name = names[line] = PyUnicode_DecodeFSDefaultAndSize(at, colon - at)
            at = colon + 1
            while at < stop and at[0] == c" ":
                at += 1
            value = 0
            behind = _number(at, 10, &value)
            if stop - behind == 3 and memcmp(behind, <const char *>b" kB", 3) == 0:
                counters[name] = value << 10
            elif behind == stop != at:  # THPeligible, ProtectionKey; VmFlags may be empty
                counters[name] = value
            elif name == "VmFlags":
                line = at[:stop - at]
                flags = words.get(line)
                if flags is None:
                    flags = words[line] = frozenset(PyUnicode_DecodeFSDefaultAndSize(at, stop - at).split())
            at = stop + 1
        found.append((areas.pop(), counters, flags))
    return found


cdef const char *_add(list areas, const char *at, const char *end) except NULL:
    """Add the area of the line that begins at `at`; return where the next one begins."""
    cdef uint64_t first = 0, last = 0, offset = 0, inode = 0
    cdef const char *stop = <const char *>memchr(at, c"\n", end - at)
    cdef const char *permissions
    cdef const char *device
    cdef const char *number
    cdef const char *name
    if stop == NULL:
        stop = end
    # A number ends at the first character that is not a digit; the text is terminated by a null byte.
    at = _number(at, 16, &first)
    if at[0] == c"-":
        permissions = _number(at + 1, 16, &last)
        at = _word(permissions, stop)
        if at - permissions == 5 and at < stop:
            device = _number(at + 1, 16, &offset)
            at = _word(device, stop)
            if at > device + 1 and at < stop:
                number = at
                at = name = _number(number + 1, 10, &inode)
                while name < stop and name[0] == c" ":
                    name += 1
                if at > number + 1 and (name > at or name == stop):
                    areas.append((
                        first, last, PyUnicode_FromStringAndSize(permissions + 1, 4), offset, inode,
                        PyUnicode_DecodeFSDefaultAndSize(name, stop - name),
                        PyUnicode_FromStringAndSize(device + 1, number - 1 - device),
                    ))
                    return stop + 1
    raise ValueError("not a line of maps")


cdef const char *_word(const char *at, const char *stop) noexcept nogil:
    """Return the end of the word after the space at `at`, or `stop`."""
    if at >= stop or at[0] != c" ":
        return stop
    at += 1
    while at < stop and at[0] != c" ":
        at += 1
    return at


cdef const char *_number(const char *at, int base, uint64_t *value) noexcept nogil:
    """Add the digits at `at` to `value`; return their end."""
    cdef int digit
    while True:
        digit = at[0]
        if digit >= c"0" and digit <= c"9":
            digit -= c"0"
        elif base == 16 and digit >= c"a" and digit <= c"f":
            digit -= c"a" - 10
        else:
            return at
        value[0] = value[0] * base + digit
        at += 1
