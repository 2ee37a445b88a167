# cython: language_level=3, auto_pickle=False, autotestdict=False
"""What /proc/PID/maps and smaps say (proc_pid_maps(5)): tens of thousands of areas, a line or 26 lines each."""

from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcmp

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


def parse_details(bytes text):
    """Return what whole entries of smaps say, each of which begins with a line of maps.

    Each as (area, counters, flags): the area as of `parse`; what is counted in kB, in bytes, by name; the words of
    VmFlags. Raises ValueError where a line is none of smaps.
    """
    cdef const char *at = text
    cdef const char *end = at + len(text)
    cdef const char *stop
    cdef const char *colon
    cdef const char *behind
    cdef uint64_t value
    areas, found = [], []
    names, words = {}, {}  # the same ones come again and again
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
