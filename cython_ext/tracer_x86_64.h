/* x86-64 in the tracer (`tracer.h`, which describes what each of these declares): registers, the system call
   instruction, how calls restart after a stop, and the notes of a core file. */
#ifndef IOBMD_TRACER_X86_64_H
#define IOBMD_TRACER_X86_64_H
#include <cpuid.h>
#include <elf.h>
#include <linux/audit.h>
#include <sys/user.h>
#include <ucontext.h>

#define IOBMD_PROCESSOR "x86-64"
#define IOBMD_INSTRUCTION "\x0f\x05"  /* syscall */
#define IOBMD_RETURNING "\x48\xc7\xc0\x0f\0\0\0\x0f\x05"  /* mov $15, %rax; syscall: in each C library, for signal handlers */
#define IOBMD_CALLING "\x0f\x05\xc3"  /* syscall; ret: in many functions of C libraries */
#define IOBMD_NO_CALL (~0ul)          /* in orig_rax: the registers are not those of an interrupted system call */
enum {
    IOBMD_AUDIT = AUDIT_ARCH_X86_64, IOBMD_ELF = EM_X86_64, IOBMD_INSTRUCTION_ALIGNMENT = 1,
    IOBMD_CODE_32 = 0x23, IOBMD_FXSAVE = 512,
    IOBMD_SOFTWARE = 464,  /* offset in the FXSAVE area of bytes that describe the XSAVE area, which are no registers */
    IOBMD_SETS_SIZE = 16 << 10,  /* with AMX, the XSAVE area has 11 KiB */
    IOBMD_SHADOW_STACK = 0x204,  /* NT_X86_SHSTK */
    IOBMD_RED_ZONE = 128,        /* bytes below the stack pointer that functions use */
    IOBMD_FRAME = 4 << 10,       /* with AVX-512, 3 KiB */
    IOBMD_COMPONENTS = 63, IOBMD_PKRU = 9, IOBMD_HAS_PKRU = 1 << 4 /* OSPKE */,
};

struct iobmd_state {
    struct user_regs_struct regs;
    unsigned long frame;         /* the stack pointer with which the thread can restore these registers; 0: none */
};

static int iobmd_load(pid_t tid, struct iobmd_state *state)
{
    state->frame = 0;
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

static void iobmd_reenter_call(struct iobmd_tracer *t, struct iobmd_thread *thread, struct iobmd_state *state, int made,
                               unsigned long mask)
{
    (void)t, (void)made;
    iobmd_ptrace(IOBMD_SETSIGMASK, thread->tid, sizeof mask, &mask);  /* while the frame still restores it as well */
    iobmd_store(thread->tid, state);
}

/* -- the frame of a signal handler (arch/x86/kernel/signal_64.c), from which rt_sigreturn(2) restores all registers -- */

/* The ends of the components of the XSAVE area; 0: unknown. */
static unsigned int iobmd_component_ends[IOBMD_COMPONENTS];
static uint64_t iobmd_always_used;  /* components that are saved even if their header shows their initial state */

static void iobmd_know_processor(void)
{
    unsigned int low = 0, high = 0, size, offset, ignored, features = 0;
    if (iobmd_component_ends[2] || !__get_cpuid_count(0xd, 0, &low, &ignored, &ignored, &high)) return;
    for (unsigned int i = 2; i < IOBMD_COMPONENTS; i++)
        if (((uint64_t)high << 32 | low) >> i & 1 && __get_cpuid_count(0xd, i, &size, &offset, &ignored, &ignored))
            iobmd_component_ends[i] = offset + size;
    if (__get_cpuid_count(7, 0, &ignored, &ignored, &features, &ignored) && features & IOBMD_HAS_PKRU)
        iobmd_always_used = 1ul << IOBMD_PKRU;
}

/* Turn an XSAVE area of `size` bytes, as ptrace(2) returns it, into that of a signal frame; return its size, or 0 if
   components that are in use are missing. Those that are not are restored to their initial state. */
static size_t iobmd_complete_area(char *area, size_t size)
{
    struct { uint32_t magic, extended_size; uint64_t components; uint32_t size, padding[7]; } software;
    const uint32_t first = 0x46505853, last = 0x46505845;  /* FP_XSTATE_MAGIC1, FP_XSTATE_MAGIC2 */
    uint64_t used;
    size_t end = IOBMD_FXSAVE + 64;  /* of the header */
    if (size < end) return 0;
    __builtin_memcpy(&used, area + IOBMD_FXSAVE, sizeof used);
    used |= iobmd_always_used;
    __builtin_memcpy(area + IOBMD_FXSAVE, &used, sizeof used);
    for (int i = 2; i < 64; i++) {
        if (!(used >> i & 1)) continue;
        if (i >= IOBMD_COMPONENTS || !iobmd_component_ends[i]) return 0;
        if (iobmd_component_ends[i] > end) end = iobmd_component_ends[i];
    }
    if (end > size) return 0;
    __builtin_memset(&software, 0, sizeof software);
    software.magic = first;
    software.extended_size = (uint32_t)(end + sizeof last);
    software.components = used | 3;  /* x87 and SSE */
    software.size = (uint32_t)end;
    __builtin_memcpy(area + IOBMD_SOFTWARE, &software, sizeof software);
    __builtin_memcpy(area + end, &last, sizeof last);
    return end + sizeof last;
}

/* Write to the memory of a stopped thread if that neither allocates nor copies a page, nor waits for a fault handler;
   return whether it was written. As for iobmd_peek(), nothing of the thread has been changed yet. */
static int iobmd_poke(struct iobmd_tracer *t, pid_t tid, unsigned long address, const void *data, size_t size)
{
    long file, written;
    if (!iobmd_all_pages(t, tid, address, size, IOBMD_PROTECTED | IOBMD_SWAPPED, IOBMD_EXCLUSIVE)) return 0;
    if ((file = t->writes >= 0 ? t->writes : iobmd_open(t, tid, "mem", O_WRONLY)) < 0) return 0;
    iobmd_set_alarm(t, IOBMD_BEGIN);
    written = iobmd_raw(SYS_pwrite64, file, (long)data, (long)size, (long)address, 0, 0);
    iobmd_set_alarm(t, 0);
    if (file != t->writes) iobmd_close(file);
    return written == (long)size;
}

/* Return the number of the call that restart_syscall(2) resumes, which the kernel does not report: one of the four that
   it can resume, if the code before the system call sets this number (mov $number, %eax). */
static unsigned long iobmd_resumed_call(struct iobmd_tracer *t, pid_t tid, unsigned long behind)
{
    static const uint32_t resumed[] = { SYS_poll, SYS_nanosleep, SYS_clock_nanosleep, SYS_futex };
    unsigned char code[32];
    uint32_t number;
    if (iobmd_peek(t, tid, behind - sizeof code, code, sizeof code)) return SYS_restart_syscall;
    for (int at = sizeof code - 7; at >= 0; at--) {
        if (code[at] != 0xb8) continue;
        __builtin_memcpy(&number, code + at + 1, sizeof number);
        for (int i = 0; i < 4; i++)
            if (number == resumed[i]) return number;
    }
    return SYS_restart_syscall;
}

/* Return the registers with which a thread continues: an interrupted call begins again. A sleep begins again with its
   whole duration, because the kernel forgets the rest of it (restart_syscall(2)); if its call is unknown, it ends with
   EINTR. */
static struct user_regs_struct iobmd_continuing(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *state)
{
    struct user_regs_struct regs = state->regs;
    long result = (long)regs.rax;
    int restarts = (result <= -IOBMD_ERESTARTSYS && result >= -IOBMD_ERESTARTNOHAND) || result == -IOBMD_ERESTARTBLOCK;
    if (regs.orig_rax == IOBMD_NO_CALL || !restarts) return regs;
    regs.rax = regs.orig_rax;
    if (regs.rax == SYS_restart_syscall) regs.rax = iobmd_resumed_call(t, tid, regs.rip);
    regs.rip -= sizeof IOBMD_INSTRUCTION - 1;
    return regs;
}

static void iobmd_place_frame(struct iobmd_tracer *t, const struct iobmd_thread *thread, struct iobmd_state *state,
                              unsigned long mask)
{
    enum { WORD = 8, AREA = (WORD + offsetof(ucontext_t, uc_sigmask) + sizeof mask + 63) / 64 * 64 };
    char frame[IOBMD_FRAME] __attribute__((aligned(64)));
    ucontext_t *context = (ucontext_t *)(frame + WORD);
    struct user_regs_struct regs = iobmd_continuing(t, thread->tid, state);
    struct iovec area = { frame + AREA, sizeof frame - AREA - 8 };  /* a multiple of 8 */
    unsigned long at, shadow;
    struct iovec shadow_stack = { &shadow, sizeof shadow };
    size_t size;
    long long *saved = context->uc_mcontext.gregs;
    if (!iobmd_ptrace(PTRACE_GETREGSET, thread->tid, IOBMD_SHADOW_STACK, &shadow_stack)) return;  /* needs a token there */
    if (iobmd_ptrace(PTRACE_GETREGSET, thread->tid, NT_X86_XSTATE, &area)) return;
    if (!(size = iobmd_complete_area(area.iov_base, area.iov_len))) return;
    if (regs.rsp < thread->stack_low + sizeof frame + 2 * IOBMD_RED_ZONE || regs.rsp >= thread->stack_high) return;
    at = (regs.rsp - IOBMD_RED_ZONE - AREA - size) & ~63ul;
    __builtin_memset(frame, 0, AREA);
    __builtin_memcpy(frame, &t->returning, WORD);
    context->uc_flags = 7;  /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */
    context->uc_stack.ss_flags = -1;  /* invalid, so that the alternate stack is unchanged */
    saved[REG_R8] = (long long)regs.r8, saved[REG_R9] = (long long)regs.r9, saved[REG_R10] = (long long)regs.r10;
    saved[REG_R11] = (long long)regs.r11, saved[REG_R12] = (long long)regs.r12, saved[REG_R13] = (long long)regs.r13;
    saved[REG_R14] = (long long)regs.r14, saved[REG_R15] = (long long)regs.r15, saved[REG_RDI] = (long long)regs.rdi;
    saved[REG_RSI] = (long long)regs.rsi, saved[REG_RBP] = (long long)regs.rbp, saved[REG_RBX] = (long long)regs.rbx;
    saved[REG_RDX] = (long long)regs.rdx, saved[REG_RAX] = (long long)regs.rax, saved[REG_RCX] = (long long)regs.rcx;
    saved[REG_RSP] = (long long)regs.rsp, saved[REG_RIP] = (long long)regs.rip, saved[REG_EFL] = (long long)regs.eflags;
    saved[REG_CSGSFS] = (long long)(regs.cs | regs.ss << 48);
    context->uc_mcontext.fpregs = (void *)(at + AREA);
    __builtin_memcpy(&context->uc_sigmask, &mask, sizeof mask);
    if (iobmd_poke(t, thread->tid, at, frame, AREA + size)) state->frame = at + WORD;
}

/* Return the state in which a thread makes the call that restores its registers. */
static struct iobmd_state iobmd_returning(const struct iobmd_tracer *t, const struct iobmd_state *base)
{
    const struct iobmd_call returns = { .number = SYS_rt_sigreturn };
    struct iobmd_state state = *base;
    iobmd_move(&state, t->calling);
    iobmd_set_call(&state, &returns);
    state.regs.rsp = base->frame;
    return state;
}

/* Return whether a thread has certain code at an address. */
static int iobmd_has_code(struct iobmd_tracer *t, pid_t tid, unsigned long address, const char *code, size_t size)
{
    char found[sizeof IOBMD_RETURNING];
    return address && !iobmd_peek(t, tid, address, found, size) && !__builtin_memcmp(found, code, size);
}

/* Return whether a thread is about to restore its registers, because a tracer was killed directly before. Another frame
   below that one would need more of its stack. */
static int iobmd_recovers(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *state)
{
    unsigned long at = state->regs.rip, address = 0;
    if (at >= t->returning && at < t->returning + sizeof IOBMD_RETURNING - 1) return 1;
    if (at == t->calling) iobmd_peek(t, tid, state->regs.rsp - 8, &address, sizeof address);
    if (at == t->calling + sizeof IOBMD_INSTRUCTION - 1) iobmd_peek(t, tid, state->regs.rsp, &address, sizeof address);
    return address && address == t->returning;
}

/* If this process is killed, the kernel resumes the thread wherever it is. With the registers of an injected call, the
   task would crash, and its signals would stay blocked. From here on, the thread's next call is therefore that by which
   signal handlers end, with a frame of a handler on the unused part of its stack; if the stack is unknown, or pages of it
   would have to be allocated or copied, it is not protected. */
static int iobmd_protect(struct iobmd_tracer *t, const struct iobmd_thread *thread, struct iobmd_state *before,
                         unsigned long mask)
{
    struct iobmd_state returning;
    if (t->returning && iobmd_recovers(t, thread->tid, before)) return IOBMD_LATE;
    if (!thread->stack_high ||
        !iobmd_has_code(t, thread->tid, t->returning, IOBMD_RETURNING, sizeof IOBMD_RETURNING - 1) ||
        !iobmd_has_code(t, thread->tid, t->calling, IOBMD_CALLING, sizeof IOBMD_CALLING - 1))
        return IOBMD_DONE;
    iobmd_place_frame(t, thread, before, mask);
    if (!before->frame) return IOBMD_DONE;
    returning = iobmd_returning(t, before);
    return iobmd_store(thread->tid, &returning);
}

/* A protected thread begins the call that restores its registers; the injected call takes the place of that one, and
   returns to the code that makes it. The thread can thus be resumed at any time. The injected call is made by an
   instruction that a return follows, and not just by that code, because the kernel may restart the call: it then sets
   the thread back by one system call instruction. */
static int iobmd_start_call(struct iobmd_tracer *t, pid_t tid, const struct iobmd_state *base,
                            unsigned long instruction, const struct iobmd_call *call)
{
    const struct iobmd_call returns = { .number = SYS_rt_sigreturn };
    struct iobmd_state state;
    int status;
    if (!base->frame) return iobmd_begin_call(t, tid, base, instruction, call);
    state = iobmd_returning(t, base);
    if ((status = iobmd_begin_call(t, tid, &state, t->calling, &returns))) return status;
    iobmd_move(&state, t->calling + sizeof IOBMD_INSTRUCTION - 1);
    iobmd_set_call(&state, call);
    state.regs.rsp -= 8;  /* where the address of the code is */
    state.regs.rax = (unsigned long)-ENOSYS;  /* as at the start of any call */
    state.regs.orig_rax = (unsigned long)call->number;
    return iobmd_store(tid, &state);
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
