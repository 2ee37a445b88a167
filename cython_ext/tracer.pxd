# A process that traces another task for this one
from libc.stdint cimport int64_t

cdef extern from "tracer.h" nogil:
    enum: IOBMD_NOTHING
    enum: IOBMD_STOP
    enum: IOBMD_RUN
    enum: IOBMD_FREEZE
    enum: IOBMD_THAW
    enum: IOBMD_STAND_ALONE
    enum: IOBMD_COLLECT
    enum: IOBMD_CALLS
    enum: IOBMD_NO_PROCESS
    enum: IOBMD_GUEST
    enum: IOBMD_SNAPSHOT
    enum: IOBMD_DONE
    enum: IOBMD_GONE
    enum: IOBMD_REFUSED
    enum: IOBMD_FOREIGN_THREAD
    enum: IOBMD_LATE
    enum: IOBMD_HELD
    enum: IOBMD_CHANGED
    enum: IOBMD_32_BIT
    enum: IOBMD_DIVERTED
    enum: IOBMD_SIGNALLED
    enum: IOBMD_FAILED
    enum: IOBMD_ENDED
    enum: IOBMD_STUCK
    enum: IOBMD_UNSEEN
    enum: IOBMD_UNREADABLE
    enum: IOBMD_NO_MEMORY
    enum: IOBMD_UNCOPIED
    struct iobmd_call:
        long number
        unsigned long arguments[6]
        unsigned char of[6]
        unsigned char made
        long result
    struct iobmd_thread:
        int tid
        int cpu
        int64_t since_ns
        unsigned long switches
        unsigned long stack_low
        unsigned long stack_high
    struct iobmd_object:
        char *path
        unsigned long inode
        unsigned long device
        unsigned long offset
        unsigned long size
        char *to
        int has_holes
        int file
    struct iobmd_registers:
        int tid
        unsigned int size
        unsigned long blocked
    struct iobmd_register_set:
        unsigned int type
        unsigned int size
    struct iobmd_named_call:
        const char *name
        int number
    const char *IOBMD_PROCESSOR
    const char *IOBMD_INSTRUCTION
    const char *IOBMD_RETURNING
    const char *IOBMD_CALLING
    enum: IOBMD_INSTRUCTION_ALIGNMENT
    enum: IOBMD_ELF
    const iobmd_named_call *iobmd_made_calls
    const iobmd_named_call *iobmd_calls_ended_by_a_stop
    struct iobmd_tracer:
        unsigned long instruction
        unsigned long returning
        unsigned long calling
        int64_t patience_ns
        int64_t short_ns
        int command
        int cancelled
        iobmd_call *calls
        int count
        const iobmd_thread *known
        int knows
        int64_t deadline_ns
        int may_wait
        int wanted
        int records
        iobmd_object *objects
        int object_count
        int failed_session
        int status
        int error
        int failed
        int refused
        int64_t stopped_ns
        int guest
        int child
        char *registers
        size_t recorded
    iobmd_tracer *iobmd_tracer_start(int task, unsigned long instruction, long options, int is_thread)
    void iobmd_tracer_begin(iobmd_tracer *tracer, int command)
    int iobmd_tracer_wait(iobmd_tracer *tracer)
    int iobmd_tracer_was_held(const iobmd_tracer *tracer)
    int iobmd_tracer_succeed(iobmd_tracer *tracer)
    void iobmd_tracer_abandon(iobmd_tracer *tracer)
    int64_t iobmd_tracer_end(iobmd_tracer *tracer)
