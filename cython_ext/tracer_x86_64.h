/* x86-64 in the tracer (`tracer.h`, which describes what each of these declares): registers, the system call
   instruction, how calls restart after a stop, and the notes of a core file. */
#ifndef IOBMD_TRACER_X86_64_H
#define IOBMD_TRACER_X86_64_H
#include <cpuid.h>
#include <elf.h>
#include <linux/audit.h>
#include <sys/user.h>

#define IOBMD_PROCESSOR "x86-64"
#define IOBMD_INSTRUCTION "\x0f\x05"  /* syscall */
#define IOBMD_NO_CALL (~0ul)          /* in orig_rax: the registers are not those of an interrupted system call */
enum {
    IOBMD_AUDIT = AUDIT_ARCH_X86_64, IOBMD_ELF = EM_X86_64, IOBMD_INSTRUCTION_ALIGNMENT = 1,
    IOBMD_CODE_32 = 0x23, IOBMD_FXSAVE = 512,
    IOBMD_SOFTWARE = 464,  /* offset in the FXSAVE area of bytes that describe the XSAVE area, which are no registers */
    IOBMD_SETS_SIZE = 16 << 10,  /* with AMX, the XSAVE area has 11 KiB */
};

struct iobmd_state { struct user_regs_struct regs; };

static int iobmd_load(pid_t tid, struct iobmd_state *state)
{
    if (iobmd_ptrace(PTRACE_GETREGS, tid, 0, &state->regs)) return IOBMD_ENDED;
    return state->regs.cs == IOBMD_CODE_32 ? IOBMD_32_BIT : IOBMD_DONE;
}

static int iobmd_store(pid_t tid, const struct iobmd_state *state)
{
    return iobmd_ptrace(PTRACE_SETREGS, tid, 0, &state->regs) ? IOBMD_ENDED : IOBMD_DONE;
}

static unsigned long iobmd_position(const struct iobmd_state *state) { return state->regs.rip; }
static void iobmd_move(struct iobmd_state *state, unsigned long address) { state->regs.rip = address; }

static void iobmd_set_call(struct iobmd_state *state, const struct iobmd_call *call)
{
    struct user_regs_struct *regs = &state->regs;
    const unsigned long *arguments = call->arguments;
    regs->rax = (unsigned long)call->number;
    regs->orig_rax = IOBMD_NO_CALL;
    regs->rdi = arguments[0], regs->rsi = arguments[1], regs->rdx = arguments[2];
    regs->r10 = arguments[3], regs->r8 = arguments[4], regs->r9 = arguments[5];
}

static void iobmd_skip(pid_t tid)
{
    struct user_regs_struct regs;
    if (iobmd_ptrace(PTRACE_GETREGS, tid, 0, &regs)) return;
    regs.orig_rax = IOBMD_NO_CALL;
    iobmd_ptrace(PTRACE_SETREGS, tid, 0, &regs);
}

static void iobmd_before_stopping(struct iobmd_tracer *t, struct iobmd_thread *thread) { (void)t, (void)thread; }

/* The kernel's code for "restart unless a handler runs" replaces EINTR. It acts on that when the thread continues,
   even if other calls were made since, because orig_rax identifies the interrupted call. */
static void iobmd_undo_eintr(struct iobmd_tracer *t, struct iobmd_thread *thread)
{
    struct iobmd_state state;
    struct user_regs_struct *regs = &state.regs;
    if (iobmd_load(thread->tid, &state) || (long)regs->rax != -EINTR || !iobmd_is_ended_by_a_stop(regs->orig_rax))
        return;
    regs->rax = (unsigned long)-IOBMD_ERESTARTNOHAND;
    if (regs->orig_rax == SYS_epoll_wait || regs->orig_rax == SYS_epoll_pwait)
        regs->r10 = iobmd_remaining(t, thread, regs->r10);
    iobmd_store(thread->tid, &state);
}

/* System calls change no other state, and `regs` identifies the interrupted one. */
static int iobmd_leave_call(struct iobmd_tracer *t, const struct iobmd_thread *thread, struct iobmd_state *state)
{
    (void)t, (void)thread, (void)state;
    return IOBMD_DONE;
}

static void iobmd_reenter_call(struct iobmd_tracer *t, struct iobmd_thread *thread, struct iobmd_state *state, int made)
{
    (void)t, (void)made;
    iobmd_store(thread->tid, state);
}

static void iobmd_before_detaching(struct iobmd_tracer *t, struct iobmd_thread *thread) { (void)t, (void)thread; }

static size_t iobmd_sets_expected(void)
{
    unsigned int size = 0, unused, features = 0;  /* size: of the processor's largest XSAVE area */
    if (__get_cpuid(1, &unused, &unused, &features, &unused) && features & bit_OSXSAVE)
        __get_cpuid_count(0xd, 0, &unused, &unused, &size, &unused);
    return size + sizeof(struct user_regs_struct) + IOBMD_FXSAVE;
}

static int iobmd_save_sets(pid_t tid, struct iobmd_sets *sets)
{
    struct user_regs_struct regs;
    char *fxsave, *xsave;
    if (iobmd_ptrace(PTRACE_GETREGS, tid, 0, &regs)) return IOBMD_ENDED;
    __builtin_memcpy(iobmd_add_set(sets, NT_PRSTATUS, sizeof regs), &regs, sizeof regs);
    fxsave = iobmd_add_set(sets, NT_PRFPREG, IOBMD_FXSAVE);
    if ((xsave = iobmd_add_regset(sets, tid, NT_X86_XSTATE, IOBMD_FXSAVE)))
        __builtin_memcpy(fxsave, xsave, IOBMD_SOFTWARE);
    else if (iobmd_ptrace(PTRACE_GETFPREGS, tid, 0, fxsave))  /* a processor without XSAVE */
        return IOBMD_ENDED;
    __builtin_memset(fxsave + IOBMD_SOFTWARE, 0, IOBMD_FXSAVE - IOBMD_SOFTWARE);
    return IOBMD_DONE;
}

#endif
