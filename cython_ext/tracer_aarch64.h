/* aarch64 in the tracer (`tracer.h`, which describes what each of these declares): registers, the system call
   instruction, how calls restart after a stop, and the notes of a core file.

   Unlike on x86-64, the kernel itself sets the registers back to the start of a call that it restarts, before the stop,
   and remembers why only until the thread continues (arch/arm64/kernel/signal.c). The thread is then stopped at its
   `svc` instruction, with the arguments of the call. The kernel forgets the reason if other calls are made, and does
   not show whether the call is to be continued (restart_syscall(2)). A thread that is to make other calls is therefore
   first run to the start of its own call, where the kernel shows which call it makes; that call is skipped, and begun
   again at the end.

   A call that returned EINTR because of the stop has lost its first argument, which /proc shows before (`syscall`). */
#ifndef IOBMD_TRACER_AARCH64_H
#define IOBMD_TRACER_AARCH64_H
#include <elf.h>
#include <linux/audit.h>
#include <sys/auxv.h>
#include <sys/user.h>

#define IOBMD_PROCESSOR "aarch64"
#define IOBMD_INSTRUCTION "\x01\0\0\xd4"  /* svc #0 */
#define IOBMD_RETURNING ""
#define IOBMD_CALLING ""
/* Notes that older headers lack. */
enum { IOBMD_SYSTEM_CALL = 0x404, IOBMD_SVE = 0x405, IOBMD_PAC_MASK = 0x406, IOBMD_TAGGED_CONTROL = 0x409,
       IOBMD_PAC_KEYS = 0x40a, IOBMD_SSVE = 0x40b, IOBMD_ZA = 0x40c, IOBMD_ZT = 0x40d, IOBMD_FPMR = 0x40e };
enum {
    IOBMD_AUDIT = AUDIT_ARCH_AARCH64, IOBMD_ELF = EM_AARCH64, IOBMD_INSTRUCTION_ALIGNMENT = 4,
    IOBMD_NUMBER = 8, IOBMD_LINK = 30,       /* registers: the number of a call, and the return address */
    IOBMD_TIMEOUT = 3,                       /* the one with the timeout of epoll_pwait */
    IOBMD_VECTORS_HEADER = 16,               /* struct user_sve_header */
    IOBMD_VECTORS = 9 << 10,                 /* of 2048 bits: 32 registers, 17 predicates, and their header */
    IOBMD_SETS_SIZE = 96 << 10,              /* the matrix of SME has 64 KiB */
};
#define IOBMD_BTYPE (3ul << 10)              /* in pstate: an indirect jump was the last instruction */
#define IOBMD_HAS_SVE (1ul << 22)            /* in AT_HWCAP */
#define IOBMD_PEEKSIGINFO 0x4209

enum iobmd_interrupted {
    IOBMD_NO_CALL,      /* the thread is not in a system call */
    IOBMD_BEGINS_CALL,  /* its next instruction is a system call, which the kernel begins again; `number` */
};

struct iobmd_state {
    struct user_regs_struct regs;
    enum iobmd_interrupted interrupted;
    unsigned long number;                    /* of the interrupted call */
    unsigned int vectors_type;               /* IOBMD_SVE, or IOBMD_SSVE in streaming mode; 0: nothing is saved */
    struct iovec vectors_area;
    char vectors[IOBMD_VECTORS] __attribute__((aligned(8)));
};

static int iobmd_load(pid_t tid, struct iobmd_state *state)
{
    struct iovec area = { &state->regs, sizeof state->regs };
    state->interrupted = IOBMD_NO_CALL;
    state->vectors_type = 0;
    if (iobmd_ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &area)) return IOBMD_ENDED;
    return area.iov_len == sizeof state->regs ? IOBMD_DONE : IOBMD_32_BIT;
}

/* Set what the kernel considers the number of the call that the thread makes, or has just made; -1: none. */
static void iobmd_set_number(pid_t tid, int number)
{
    struct iovec area = { &number, sizeof number };
    iobmd_ptrace(PTRACE_SETREGSET, tid, IOBMD_SYSTEM_CALL, &area);
}

/* The kernel must not consider the registers those of an interrupted call, and change them. */
static int iobmd_store(pid_t tid, const struct iobmd_state *state)
{
    struct iovec area = { (void *)&state->regs, sizeof state->regs };
    if (iobmd_ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &area)) return IOBMD_ENDED;
    iobmd_set_number(tid, -1);
    return IOBMD_DONE;
}

static unsigned long iobmd_position(const struct iobmd_state *state) { return state->regs.pc; }
static void iobmd_move(struct iobmd_state *state, unsigned long address) { state->regs.pc = address; }

/* With BTYPE, an instruction that is no target of jumps would fault where the code is guarded (BTI). A guest whose tracer
   dies must not return to code of the task: its stack pointer is invalid, but a return uses only this register. */
static void iobmd_set_call(struct iobmd_state *state, const struct iobmd_call *call)
{
    for (int i = 0; i < 6; i++) state->regs.regs[i] = call->arguments[i];
    state->regs.regs[IOBMD_NUMBER] = (unsigned long)call->number;
    state->regs.regs[IOBMD_LINK] = 0;
    state->regs.pstate &= ~IOBMD_BTYPE;
}

static void iobmd_skip(pid_t tid) { iobmd_set_number(tid, -1); }

/* Record the call in which a thread sleeps, and its first argument, before the thread is stopped. */
static void iobmd_before_stopping(struct iobmd_tracer *t, struct iobmd_thread *thread)
{
    char text[256], *at = text;
    long size, file;
    thread->call = -1;
    if ((file = iobmd_open(t, thread->tid, "syscall", O_RDONLY)) < 0) return;
    thread->slept = iobmd_status_field(t, thread->tid, "voluntary_ctxt_switches:");
    size = iobmd_raw(SYS_read, file, (long)text, sizeof text - 1, 0, 0, 0);
    iobmd_close(file);
    if (size <= 0 || *text < '0' || *text > '9') return;  /* it runs */
    text[size] = 0;
    for (thread->call = 0; *at >= '0' && *at <= '9'; at++) thread->call = 10 * thread->call + (*at - '0');
    if (at[0] != ' ' || at[1] != '0' || at[2] != 'x') thread->call = -1;
    for (thread->argument = 0, at += 3; (*at >= '0' && *at <= '9') || (*at >= 'a' && *at <= 'f'); at++)
        thread->argument = thread->argument << 4 | (unsigned long)(*at <= '9' ? *at - '0' : *at - 'a' + 10);
}

/* Set the thread back to the start of its call, like the kernel does with others. It must have slept only once more since
   the call was recorded: for this stop. A thread whose handler has just returned, and whose call returned EINTR because of
   that, cannot be distinguished if it is stopped before its next instruction: its call starts again too. */
static void iobmd_undo_eintr(struct iobmd_tracer *t, struct iobmd_thread *thread)
{
    struct iobmd_state state;
    int found;
    if (iobmd_load(thread->tid, &state) || (long)state.regs.regs[0] != -EINTR ||
        (long)state.regs.regs[IOBMD_NUMBER] != thread->call || !iobmd_is_ended_by_a_stop((unsigned long)thread->call) ||
        iobmd_is_at(t, thread->tid, state.regs.pc - sizeof IOBMD_INSTRUCTION + 1, &found) || !found ||
        iobmd_status_field(t, thread->tid, "voluntary_ctxt_switches:") != thread->slept + 1)
        return;
    state.regs.regs[0] = thread->argument;
    if (thread->call == SYS_epoll_pwait)
        state.regs.regs[IOBMD_TIMEOUT] = iobmd_remaining(t, thread, state.regs.regs[IOBMD_TIMEOUT]);
    state.regs.pc -= sizeof IOBMD_INSTRUCTION - 1;
    thread->restarts = !iobmd_store(thread->tid, &state);
}

/* A call resets the predicates and the upper parts of the vectors, and ends streaming mode; a thread that is about to make
   a call expects that. */
static void iobmd_save_vectors(pid_t tid, struct iobmd_state *state)
{
    static const unsigned int types[] = { IOBMD_SVE, IOBMD_SSVE };
    for (int i = 0; i < 2; i++) {
        struct iovec area = { state->vectors, sizeof state->vectors };
        int has_vectors;
        if (iobmd_ptrace(PTRACE_GETREGSET, tid, types[i], &area)) continue;  /* the processor has none */
        has_vectors = ((unsigned short *)state->vectors)[6] & 1;  /* flags: SVE_PT_REGS_SVE */
        if (area.iov_len <= IOBMD_VECTORS_HEADER || !has_vectors) continue;
        state->vectors_type = types[i];
        state->vectors_area = area;
        return;
    }
}

static int iobmd_leave_call(struct iobmd_tracer *t, const struct iobmd_thread *thread, struct iobmd_state *state)
{
    struct iobmd_syscall_info info;
    pid_t tid = thread->tid;
    int status, found;
    if ((status = iobmd_is_at(t, tid, state->regs.pc, &found))) return status;
    if (!found) {
        iobmd_save_vectors(tid, state);
        return IOBMD_DONE;
    }
    if ((status = iobmd_begin(t, tid, &info))) return status;
    iobmd_skip(tid);
    state->interrupted = IOBMD_BEGINS_CALL;
    state->number = info.entry.number;
    /* The kernel resumes a sleep with a relative timeout by this call. */
    if (state->number == SYS_restart_syscall) state->regs.regs[IOBMD_NUMBER] = SYS_restart_syscall;
    return iobmd_run_to(t, tid, IOBMD_EXIT, iobmd_now() + IOBMD_BEGIN, 0, &info);
}

/* Make the kernel consider a thread as interrupted in a call that it restarts when the thread continues, or ends with
   EINTR if a handler runs then: at the end of another call, whose number and result are replaced. The kernel restores the
   first argument from that call, which must therefore be the same. */
static int iobmd_pretend_interrupted(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *state, long result)
{
    struct iobmd_state interrupted = *state;
    struct iobmd_call nothing = { .number = SYS_getpid };
    pid_t made = t->made;
    int status;
    for (int i = 0; i < 6; i++) nothing.arguments[i] = state->regs.regs[i];
    status = iobmd_make(t, tid, state, state->regs.pc, &nothing, 0, 0);
    t->made = made;  /* by the calls before this one */
    if (status) return status;
    interrupted.regs.regs[0] = (unsigned long)result;
    interrupted.regs.pc += sizeof IOBMD_INSTRUCTION - 1;
    if ((status = iobmd_store(tid, &interrupted))) return status;
    iobmd_set_number(tid, (int)state->regs.regs[IOBMD_NUMBER]);
    return IOBMD_DONE;
}

/* A call that a stop ends with EINTR must not begin yet, because detaching the thread would end it too. Any other one is
   begun: if a signal arrived since the stop, it is interrupted by the signal, as it would have been without the stop, and
   not begun after the handler. */
static void iobmd_reenter_call(struct iobmd_tracer *t, struct iobmd_thread *thread, struct iobmd_state *state, int made,
                               unsigned long mask)
{
    struct iobmd_syscall_info info;
    pid_t tid = thread->tid;
    if (state->interrupted == IOBMD_NO_CALL) {
        iobmd_store(tid, state);
        if (state->vectors_type) iobmd_ptrace(PTRACE_SETREGSET, tid, state->vectors_type, &state->vectors_area);
    } else if (!made) {
        iobmd_store(tid, state);
    } else if (iobmd_is_ended_by_a_stop(state->number)) {
        int result = thread->restarts ? -IOBMD_ERESTARTNOHAND : -IOBMD_ERESTARTSYS;
        if (iobmd_pretend_interrupted(t, tid, state, result)) iobmd_store(tid, state);
    } else if (!iobmd_store(tid, state) && iobmd_begin(t, tid, &info)) {
        iobmd_store(tid, state);
    }
    iobmd_ptrace(IOBMD_SETSIGMASK, tid, sizeof mask, &mask);
    thread->restarts = 0;
}

static void iobmd_know_processor(void) {}

/* A frame on the stack would not be enough here: a thread is first run to the start of its own call, which cannot be
   skipped, and the thread sent to the frame, at once. */
static int iobmd_protect(struct iobmd_tracer *t, const struct iobmd_thread *thread, struct iobmd_state *before,
                         unsigned long mask)
{
    (void)t, (void)thread, (void)before, (void)mask;
    return IOBMD_DONE;
}

static int iobmd_start_call(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *base,
                            unsigned long instruction, const struct iobmd_call *call)
{
    return iobmd_begin_call(t, tid, base, instruction, call);
}

/* Return whether a signal is queued for a stopped thread. */
static int iobmd_has_signals(pid_t tid)
{
    for (unsigned int shared = 0; shared < 2; shared++) {
        struct { uint64_t from; uint32_t flags; int32_t count; } wanted = { 0, shared, 1 };
        siginfo_t first = { 0 };
        if (iobmd_ptrace(IOBMD_PEEKSIGINFO, tid, (unsigned long)&wanted, &first) > 0) return 1;
    }
    return 0;
}

/* A handler that runs now ends the call with EINTR, as it would have without the stop. */
static void iobmd_before_detaching(struct iobmd_tracer *t, struct iobmd_thread *thread)
{
    struct iobmd_state state;
    unsigned long mask, all = ~0ul;
    pid_t tid = thread->tid;
    if (!thread->restarts || !iobmd_has_signals(tid) || iobmd_load(tid, &state) ||
        iobmd_ptrace(IOBMD_GETSIGMASK, tid, sizeof mask, &mask) ||
        iobmd_ptrace(PTRACE_SETOPTIONS, tid, 0, (void *)(t->options | PTRACE_O_TRACESYSGOOD)))
        return;
    iobmd_ptrace(IOBMD_SETSIGMASK, tid, sizeof all, &all);
    if (iobmd_pretend_interrupted(t, tid, &state, -IOBMD_ERESTARTNOHAND)) iobmd_store(tid, &state);
    iobmd_ptrace(IOBMD_SETSIGMASK, tid, sizeof mask, &mask);
}

static size_t iobmd_sets_expected(void)
{
    size_t vectors = getauxval(AT_HWCAP) & IOBMD_HAS_SVE ? IOBMD_VECTORS : 0;
    return sizeof(struct user_regs_struct) + sizeof(struct user_fpsimd_struct) + vectors + 128;
}

static int iobmd_save_sets(pid_t tid, struct iobmd_sets *sets)
{
    static const struct { unsigned int type; size_t empty; } types[] = {
        { NT_PRFPREG, 0 }, { NT_ARM_TLS, 0 }, { IOBMD_SVE, IOBMD_VECTORS_HEADER }, { IOBMD_PAC_MASK, 0 },
        { IOBMD_PAC_KEYS, 0 }, { IOBMD_TAGGED_CONTROL, 0 }, { IOBMD_SSVE, IOBMD_VECTORS_HEADER },
        { IOBMD_ZA, IOBMD_VECTORS_HEADER }, { IOBMD_ZT, 0 }, { IOBMD_FPMR, 0 },
    };
    if (!iobmd_add_regset(sets, tid, NT_PRSTATUS, 0)) return IOBMD_ENDED;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)  /* without those that the processor lacks */
        iobmd_add_regset(sets, tid, types[i].type, types[i].empty);
    return IOBMD_DONE;
}

#endif
