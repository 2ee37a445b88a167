# cython: language_level=3, auto_pickle=False, autotestdict=False
"""What /proc/PID/maps says (proc_pid_maps(5)): processes have tens of thousands of areas, a line each."""

from libc.stdint cimport uint64_t
from libc.string cimport memchr

cdef extern from "Python.h":
    # Names are those of files, which need not be UTF-8.
    str PyUnicode_DecodeFSDefaultAndSize(const char *text, Py_ssize_t size)
    str PyUnicode_FromStringAndSize(const char *text, Py_ssize_t size)


def parse(bytes text):
    """Return the areas that whole lines of it tell of.

    Each as (start, end, permissions, offset, inode, name, device). The name is as the kernel prints it, "" for none.
    Raises ValueError where a line is not one of maps.
    """
    cdef const char *at = text
    cdef const char *end = at + len(text)
    areas = []
    while at < end:
        at = _add(areas, at, end)
    return areas


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
    # A number ends at whatever is no digit: behind the text there is a zero.
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
    """Return where the word ends that follows the space at `at`, or `stop`."""
    if at >= stop or at[0] != c" ":
        return stop
    at += 1
    while at < stop and at[0] != c" ":
        at += 1
    return at


cdef const char *_number(const char *at, int base, uint64_t *value) noexcept nogil:
    """Add the digits from `at` on to `value`; return where they end."""
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
