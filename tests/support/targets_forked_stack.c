/* A program that shares unused pages of its stack with a child since a fork, directly below its stack pointer.

   It prints "ready", and waits for a signal, as its child does. Link it with -z now: the resolution of a symbol would
   write to those pages. */
#include <alloca.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

static void touch(void)
{
    volatile char used[1 << 16];
    for (size_t at = 0; at < sizeof used; at += 512) used[at] = 1;
}

static void wait_for_signals(void) { for (;;) pause(); }

int main(void)
{
    touch();
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        wait_for_signals();
    }
    puts("ready");
    fflush(stdout);
    char here;
    /* Its stack pointer is then in the lower half of a page that it has written to. */
    volatile char *low = alloca((1 << 15) + (((uintptr_t)&here - 0x700) & 0xfff));
    *low = 0;
    wait_for_signals();
}
