/* A process that computes with vector registers.
 *
 * vectors FILE widest|base|streaming
 *     fills all vector registers, prints "ready", spins until the first byte of FILE is not zero, and prints
 *         kept NAME BYTES    NAME: the kind of registers; BYTES: the size of one
 *     if they are unchanged, otherwise "changed". Prints only "none" if the processor has no such registers.
 *
 * The only thread makes no system call while it spins, so that it is stopped between two of its instructions.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 256, NUMBER = 32 };  /* bytes of a register at most (SVE), and of the predicates; registers */
static unsigned char kept[NUMBER * MOST], predicates[16 * MOST / 8];
static const volatile unsigned char *go;
static const char *kind = "none";
static int width, number, masks;  /* bytes of a register; registers; predicates */

static void announce(const char *name)
{
    kind = name;
    puts("ready");
    fflush(stdout);
}

/* Each register contains its number plus one, in each byte. */

#ifdef __x86_64__
#define ALL ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n\t"
#define CHANGED "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

static void compute(const char *how)
{
    number = 16;
    width = !strcmp(how, "widest") && __builtin_cpu_supports("avx") ? 32 : 16;
    for (int i = 0; i < number * width; i++) kept[i] = (unsigned char)(1 + i / width);
    if (!strcmp(how, "streaming")) return;
    announce(width == 32 ? "AVX" : "SSE");
    if (width == 32)
        __asm__ volatile(ALL "vmovdqu \\n*32(%0), %%ymm\\n\n\t.endr\n\t"
                         "1: cmpb $0, (%1)\n\tje 1b\n\t"
                         ALL "vmovdqu %%ymm\\n, \\n*32(%0)\n\t.endr\n\tvzeroupper"
                         :: "r"(kept), "r"(go) : CHANGED, "cc");
    else
        __asm__ volatile(ALL "movdqu \\n*16(%0), %%xmm\\n\n\t.endr\n\t"
                         "1: cmpb $0, (%1)\n\tje 1b\n\t"
                         ALL "movdqu %%xmm\\n, \\n*16(%0)\n\t.endr"
                         :: "r"(kept), "r"(go) : CHANGED, "cc");
}
#else
#define EACH(text) ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, " \
                   "25, 26, 27, 28, 29, 30, 31\n\t" text "\n\t.endr\n\t"
#define MASK(text) ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n\t" text "\n\t.endr\n\t"
#define SPIN "1: ldrb w9, [%1]\n\tcbz w9, 1b\n\t"
#define CHANGED "memory", "x9", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", \
                "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", \
                "v29", "v30", "v31"
/* A predicate has its number plus one set bits. */
#define FILL EACH("mov w9, #(\\n + 1)\n\tdup z\\n\\().b, w9") MASK("mov x9, #(\\n + 1)\n\twhilelo p\\n\\().b, xzr, x9")
#define STORE EACH("str z\\n, [%3, #\\n, mul vl]") MASK("str p\\n, [%2, #\\n, mul vl]")

static void compute(const char *how)
{
    int has_sve = getauxval(AT_HWCAP) >> 22 & 1, has_sme = getauxval(AT_HWCAP2) >> 23 & 1;
    long size = 16;
    number = NUMBER;
    if (!strcmp(how, "streaming") ? !has_sme : !has_sve || !strcmp(how, "base")) {
        width = 16;
        if (!strcmp(how, "streaming")) return;
        announce("NEON");
        __asm__ volatile(EACH("mov w9, #(\\n + 1)\n\tdup v\\n\\().16b, w9") SPIN EACH("str q\\n, [%0, #(16 * \\n)]")
                         :: "r"(kept), "r"(go) : CHANGED);
        return;
    }
    masks = 16;
    announce(strcmp(how, "streaming") ? "SVE" : "SME");
    if (strcmp(how, "streaming"))
        __asm__ volatile(".arch armv8.2-a+sve\n\t" FILL SPIN STORE "cntb %0"
                         : "+r"(size) : "r"(go), "r"(predicates), "r"(kept) : CHANGED);
    /* smstart, smstop (0xd503477f, 0xd503467f): streaming mode, and the matrix. */
    else
        __asm__ volatile(".arch armv8.2-a+sve\n\t.inst 0xd503477f\n\t" FILL SPIN STORE "cntb %0\n\t.inst 0xd503467f"
                         : "+r"(size) : "r"(go), "r"(predicates), "r"(kept) : CHANGED);
    width = (int)size;
}
#endif

static int is_unchanged(void)
{
    for (int i = 0; i < number * width; i++)
        if (kept[i] != 1 + i / width) return 0;
    for (int i = 0; i < masks * width / 8; i++) {
        int bits = 1 + i / (width / 8) - 8 * (i % (width / 8));
        if (predicates[i] != (bits <= 0 ? 0 : bits >= 8 ? 255 : (1 << bits) - 1)) return 0;
    }
    return 1;
}

int main(int argc, char **argv)
{
    int file = argc == 3 ? open(argv[1], O_RDONLY) : -1;
    go = mmap(NULL, 1, PROT_READ, MAP_SHARED, file, 0);
    if (go == MAP_FAILED) return 3;
    compute(argv[2]);
    if (!strcmp(kind, "none")) puts("none");
    else if (is_unchanged()) printf("kept %s %d\n", kind, width);
    else puts("changed");
    return 0;
}
