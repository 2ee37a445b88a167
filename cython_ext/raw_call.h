/* System calls without the C library: its wrappers store errno in thread-local data, which a child created by
   clone(CLONE_VM) shares with the thread that created it. */
#ifndef IOBMD_RAW_CALL_H
#define IOBMD_RAW_CALL_H
#include <errno.h>
#include <stddef.h>
#include <unistd.h>
#include <sys/syscall.h>

/* Declare memory as new, because it is the stack of a child. With the address sanitizer, a child that was killed, or
   that called exit_group(2), leaves marks for its variables, and the kernel may map other memory at the addresses
   later. */
#ifdef __SANITIZE_ADDRESS__
void __asan_unpoison_memory_region(void const volatile *address, size_t size);
#define IOBMD_UNMARK(memory, size) __asan_unpoison_memory_region(memory, size)
#else
#define IOBMD_UNMARK(memory, size) ((void)0)
#endif

/* Return the kernel's result; errors are negative error numbers. */
static inline long iobmd_raw(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile ("syscall" : "=a"(result)
                      : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                      : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile ("svc 0" : "+r"(x0)
                      : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
#else
    long result = syscall(number, a, b, c, d, e, f);
    return result < 0 ? -errno : result;
#endif
}

#endif
