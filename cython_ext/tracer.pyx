# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Tracing another task (ptrace(2)) by a separate process that does not run Python code: `tracer.h`.

A `Tracer` receives commands from the thread that created it, one after another. Each command is one native function;
between commands no thread of the task is stopped, unless all of them are frozen.
"""

cimport cython
from time import monotonic

from libc.errno cimport errno
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strerror, strncpy

from tracer cimport (
    IOBMD_32_BIT, IOBMD_CALLING, IOBMD_CALLS, IOBMD_CHANGED, IOBMD_COLLECT, IOBMD_DIVERTED, IOBMD_DONE, IOBMD_ELF,
    IOBMD_ENDED, IOBMD_FAILED, IOBMD_FOREIGN_THREAD, IOBMD_FREEZE, IOBMD_GONE, IOBMD_GUEST, IOBMD_HELD,
    IOBMD_INSTRUCTION, IOBMD_INSTRUCTION_ALIGNMENT, IOBMD_LATE, IOBMD_NO_MEMORY, IOBMD_NO_PROCESS,
    IOBMD_PROCESSOR, IOBMD_REFUSED, IOBMD_RETURNING, IOBMD_RUN, IOBMD_SIGNALLED, IOBMD_SNAPSHOT,
    IOBMD_STAND_ALONE, IOBMD_STOP, IOBMD_STUCK, IOBMD_THAW, IOBMD_UNCOPIED, IOBMD_UNREADABLE, IOBMD_UNSEEN,
    iobmd_call, iobmd_calls_ended_by_a_stop, iobmd_made_calls, iobmd_named_call, iobmd_object, iobmd_register_set,
    iobmd_registers, iobmd_thread, iobmd_tracer, iobmd_tracer_abandon, iobmd_tracer_begin, iobmd_tracer_end,
    iobmd_tracer_start, iobmd_tracer_succeed, iobmd_tracer_wait, iobmd_tracer_was_held,
)

cdef extern from "<limits.h>":
    enum: PATH_MAX

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1
    unsigned long PyLong_AsUnsignedLongMask(object) except? 0xffffffffffffffff

DONE, GONE, REFUSED, FOREIGN_THREAD = IOBMD_DONE, IOBMD_GONE, IOBMD_REFUSED, IOBMD_FOREIGN_THREAD
LATE, HELD = IOBMD_LATE, IOBMD_HELD
CHANGED, IS_32_BIT, DIVERTED, SIGNALLED = IOBMD_CHANGED, IOBMD_32_BIT, IOBMD_DIVERTED, IOBMD_SIGNALLED
FAILED, ENDED, STUCK, UNSEEN = IOBMD_FAILED, IOBMD_ENDED, IOBMD_STUCK, IOBMD_UNSEEN
UNREADABLE, NO_MEMORY, UNCOPIED = IOBMD_UNREADABLE, IOBMD_NO_MEMORY, IOBMD_UNCOPIED
CALLS = IOBMD_CALLS
LIMIT = 6.0  # seconds for a command, beyond its own deadline
PROCESSOR = IOBMD_PROCESSOR.decode()
"""The processor whose registers the tracer knows; "": it does not know those of this one."""
ELF_MACHINE = IOBMD_ELF
"""Its number in ELF files."""
INSTRUCTION = <bytes>IOBMD_INSTRUCTION[:sizeof(IOBMD_INSTRUCTION) - 1]
INSTRUCTION_ALIGNMENT = IOBMD_INSTRUCTION_ALIGNMENT
"""Its system call instruction, and a divisor of the addresses of instructions."""
RETURNING = <bytes>IOBMD_RETURNING[:sizeof(IOBMD_RETURNING) - 1]
CALLING = <bytes>IOBMD_CALLING[:sizeof(IOBMD_CALLING) - 1]
"""The code that makes the call rt_sigreturn(2), and that which makes any call and returns."""
_abandoned = []  # memory to which a tracer that takes too long may still write: it is never unmapped
NO_PROCESS, GUEST, SNAPSHOT = IOBMD_NO_PROCESS, IOBMD_GUEST, IOBMD_SNAPSHOT


cdef dict _numbers(const iobmd_named_call *calls):
    """Return the numbers of system calls by name."""
    found = {}
    while calls.name != NULL:
        found[calls.name.decode()] = calls.number
        calls += 1
    return found


MADE_CALLS = _numbers(iobmd_made_calls)
"""The numbers of the system calls that are made in other tasks."""
CALLS_ENDED_BY_A_STOP = _numbers(iobmd_calls_ended_by_a_stop)
"""The numbers of those that may return EINTR after a stop although no signal handler ran (signal(7)).

They have then had no effect, and are restarted.
"""


@cython.final
@cython.no_gc
cdef class Tracer:
    """A tracer of a task, which exists until `end`, or until this object or the thread that created it ends.

    Parameters
    ----------
    task : int
        The pid.
    instruction : int
        The address of a system call instruction in the task.
    returning, calling : int
        The addresses of `RETURNING` and `CALLING` in the task; 0: unknown.
    options : int
        Options of ptrace(2) (PTRACE_O_…).
    is_thread : bool
        Whether the tracer is a thread of this process.
    patience, short : float
        Seconds to wait for the stop of all threads, and of one of several.

    Raises
    ------
    OSError
        No process can be created. `ENOSYS`: the tracer does not know this processor (`PROCESSOR`).
    """

    cdef iobmd_tracer *_tracer
    cdef object _objects
    cdef readonly bint was_killed
    """Whether another process has killed it (ChildProcessError)."""
    cdef readonly int64_t stopped_ns
    """Upper bound of the total time for which a thread of the task was stopped, in nanoseconds."""

    def __cinit__(
        self, int task, unsigned long instruction, unsigned long returning, unsigned long calling,
        long options, bint is_thread, double patience, double short
    ):
        self._tracer = iobmd_tracer_start(task, instruction, options, is_thread)
        if self._tracer == NULL:
            raise OSError(errno, f"clone: {strerror(errno).decode()}")
        self._tracer.returning, self._tracer.calling = returning, calling
        self._tracer.patience_ns = <int64_t>(patience * 1e9)
        self._tracer.short_ns = <int64_t>(short * 1e9)
        self._tracer.failed_session = 1

    @property
    def error(self):
        """The error number, or the signal, of the last command."""
        return self._tracer.error if self._tracer else 0

    @property
    def failed(self):
        """The index of the call, or of the object, that failed in the last command."""
        return self._tracer.failed if self._tracer else 0

    @property
    def refused(self):
        """The thread that may not be traced."""
        return self._tracer.refused if self._tracer else 0

    @property
    def guest(self):
        """The process that a thread of the task has created, in the pid namespace of this process; 0: none."""
        return self._tracer.guest if self._tracer else 0

    @property
    def child(self):
        """The snapshot that the guest has created; 0: none, or it has taken the place of the guest."""
        return self._tracer.child if self._tracer else 0

    @property
    def results(self):
        """The results of the calls of the last program."""
        return [self._tracer.calls[index].result for index in range(self._tracer.count)] if self._tracer else []

    def use(self, unsigned long instruction, unsigned long returning, unsigned long calling):
        """Use other code of the task from now on, because it has executed another program."""
        if self._tracer:
            self._tracer.instruction, self._tracer.returning, self._tracer.calling = instruction, returning, calling

    def stop(self, threads, calls):
        """Stop the first of several threads that stops, make system calls in it, and resume it; return the status.

        Parameters
        ----------
        threads
            For each: its id; its processor, or -1; the time since which it has been sleeping in epoll_wait, in ns of
            the monotonic clock, or 0; how often it had slept before; and the addresses between which it has its
            stack, or 0.
        calls
            For each: its number; its arguments; for each argument the index of the previous call to whose result it
            is relative, or -1; and whether it maps a range: 0: no, 1: always unmapped at the end, 2: unmapped only
            after a failure.
        """
        self._set_calls(calls)
        return self._command(IOBMD_STOP, threads)

    def run(self, calls, double deadline, bint may_wait):
        """Make system calls in the guest until a deadline (`time.monotonic`); return the status.

        With `may_wait`, the calls may block for long, must not map memory, and are abandoned if a signal handler
        raises.
        """
        self._set_calls(calls)
        self._tracer.may_wait = may_wait
        self._tracer.deadline_ns = <int64_t>(deadline * 1e9)
        return self._command(IOBMD_RUN, ())

    @property
    def registers(self):
        """The registers of the threads at the last `freeze` with `records`.

        For each: its id; the mask of blocked signals; and its register sets, in the order of a core file: for each
        the type of its note (elf.h, NT_…) and its data.
        """
        cdef iobmd_registers *here
        cdef iobmd_register_set *one
        cdef size_t at = 0, end
        found = []
        while self._tracer != NULL and at < self._tracer.recorded:
            here = <iobmd_registers *>(self._tracer.registers + at)
            at += sizeof(iobmd_registers)
            end = at + here.size
            sets = []
            while at < end:
                one = <iobmd_register_set *>(self._tracer.registers + at)
                at += sizeof(iobmd_register_set)
                sets.append((one.type, (self._tracer.registers + at)[:one.size]))
                at += (one.size + 7) & ~<size_t>7
            found.append((here.tid, here.blocked, sets))
        return found

    def freeze(self, threads, int wanted=0, double deadline=0, bint records=False, objects=()):
        """Stop all threads until `thaw`; return the status.

        Parameters
        ----------
        threads
            The threads that sleep in epoll_wait, as for `stop`.
        wanted : int
            GUEST: create a guest; SNAPSHOT: also create a child of the guest, and then resume the threads.
        deadline : float
            The time by which the snapshot must be created.
        records : bool
            Whether to save the registers of all threads (`registers`).
        objects
            The files to copy to this process after the snapshot was created. For each: its path, inode number and
            device; the offset and size in bytes; the zeroed `Mapping` for the copy; and whether it may have holes,
            which are not copied.
        """
        if self._tracer == NULL:
            raise ValueError("it has ended")
        self._set_objects(objects)
        self._tracer.wanted, self._tracer.records = wanted, records
        self._tracer.deadline_ns = <int64_t>(deadline * 1e9)
        return self._command(IOBMD_FREEZE, threads)

    def thaw(self):
        """Resume all threads."""
        if self._tracer == NULL:  # an abandoned tracer resumes them itself
            return IOBMD_DONE
        return self._command(IOBMD_THAW, ())

    def stand_alone(self, threads, double deadline):
        """End the guest but not the snapshot, and make one of several threads of the task reap it; return the status.

        From the first call on, this object does not depend on the thread that created it. If it is not `DONE`, it can
        be called again, or the guest remains a zombie until the end.

        Parameters
        ----------
        threads
            As for `stop`.
        deadline : float
            The time by which the snapshot must have closed its copies of the task's descriptors.
        """
        if self._tracer == NULL:
            raise ValueError("it has ended")
        self._tracer.deadline_ns = <int64_t>(deadline * 1e9)
        return self._command(IOBMD_STAND_ALONE, threads)

    def collect(self, threads, bint failed):
        """End the guest and its mappings, and make one of several threads of the task reap it; return the status.

        Parameters
        ----------
        threads
            As for `stop`.
        failed : bool
            Whether to unmap all that was mapped.
        """
        if self._tracer == NULL:
            raise ValueError("it has ended")
        self._tracer.failed_session = failed
        return self._command(IOBMD_COLLECT, threads)

    def succeed(self):
        """Start another tracer, for `collect`, in place of one that was killed; return whether it was started."""
        self.was_killed = False
        return self._tracer != NULL and iobmd_tracer_succeed(self._tracer) != 0

    def end(self):
        """End it, and remove what it has created in the task; idempotent."""
        if self._tracer != NULL:
            self._end()

    cdef void _end(self) noexcept:
        cdef iobmd_tracer *tracer = self._tracer
        cdef int64_t stopped_ns = 0
        self._tracer = NULL
        with nogil:
            stopped_ns = iobmd_tracer_end(tracer)
        self.stopped_ns = stopped_ns

    def __dealloc__(self):
        if self._tracer != NULL:
            self._end()

    cdef int _set_calls(self, calls) except -1:
        cdef iobmd_call *call
        cdef int index
        if self._tracer == NULL:
            raise ValueError("it has ended")
        if len(calls) > IOBMD_CALLS:
            raise ValueError(f"more than {IOBMD_CALLS} system calls")
        self._tracer.count = 0
        for number, arguments, of, made in calls:
            call = &self._tracer.calls[self._tracer.count]
            memset(call, 0, sizeof(iobmd_call))
            call.number, call.made = number, made
            for index, argument in enumerate(arguments):
                call.arguments[index] = PyLong_AsUnsignedLongMask(argument)
                call.of[index] = of[index] + 1
            self._tracer.count += 1
        return 0

    cdef int _set_objects(self, objects) except -1:
        cdef iobmd_object *made
        cdef int index = 0
        free(self._tracer.objects)
        self._tracer.objects, self._tracer.object_count = NULL, 0
        made = <iobmd_object *>calloc(len(objects) + 1, sizeof(iobmd_object))
        if made == NULL:
            raise MemoryError()
        self._tracer.objects, self._objects = made, objects
        for path, inode, device, offset, size, memory, has_holes in objects:
            if len(path) >= PATH_MAX or size > memory.size:
                raise ValueError(f"{path} is too long, or its memory is too small")
            strncpy(made[index].path, <const char *>path, PATH_MAX - 1)
            made[index].inode, made[index].device = inode, device
            made[index].offset, made[index].size, made[index].has_holes = offset, size, has_holes
            made[index].to, made[index].file = <char *><size_t>memory.address, -1
            index += 1
        self._tracer.object_count = index
        return 0

    cdef iobmd_thread *_set_threads(self, threads) except NULL:
        cdef iobmd_thread *known = <iobmd_thread *>calloc(len(threads) + 1, sizeof(iobmd_thread))
        cdef int count = 0
        if known == NULL:
            raise MemoryError()
        try:
            for tid, cpu, since_ns, switches, low, high in threads:
                known[count].tid, known[count].cpu = tid, cpu
                known[count].since_ns, known[count].switches = since_ns, switches
                known[count].stack_low, known[count].stack_high = low, high
                count += 1
        except BaseException:
            free(known)
            raise
        self._tracer.known, self._tracer.knows = known, count
        return known

    cdef int _command(self, int command, threads) except -1:
        """Run a command until its end. If a signal handler raises, cancel the command, and still wait for its end.

        A tracer that takes too long is abandoned: it waits for a frozen thread, or for the lock of the address space,
        completes its command when it can, and exits.
        """
        cdef iobmd_tracer *tracer = self._tracer
        cdef iobmd_thread *known
        cdef int done = 0
        cdef bint is_long = command in (IOBMD_RUN, IOBMD_FREEZE)
        cdef double until
        if tracer == NULL:
            raise ValueError("it has ended")
        known = self._set_threads(threads)
        until = monotonic() + LIMIT + (max(0, tracer.deadline_ns * 1e-9 - monotonic()) if is_long else 0)
        try:
            tracer.cancelled = 0
            iobmd_tracer_begin(tracer, command)
            try:
                while True:
                    with nogil:
                        done = iobmd_tracer_wait(tracer)
                    if done:
                        break
                    PyErr_CheckSignals()
                    if monotonic() > until:
                        break
            except BaseException:
                tracer.cancelled = 1
                until = monotonic() + LIMIT
                while not done and monotonic() < until:
                    with nogil:
                        done = iobmd_tracer_wait(tracer)
                raise
            finally:
                if not done:
                    self._tracer = known = NULL
                    if self._objects:
                        _abandoned.append(self._objects)
                    iobmd_tracer_abandon(tracer)
            if not done or (done < 0 and iobmd_tracer_was_held(tracer)):
                return IOBMD_HELD
            if done < 0:
                self.was_killed = True
                raise ChildProcessError("the process that traces another for iobmd was killed")
            self.stopped_ns = tracer.stopped_ns
            return tracer.status
        finally:
            if known != NULL:
                tracer.known, tracer.knows = NULL, 0
                free(known)
