/* Accesses to memory of devices: one load or store of exactly the requested width, in program order.
 *
 * A compiler may split, repeat or merge accesses to ordinary memory, and so may memcpy(3) and the idioms of Python:
 * ctypes reads a register before it writes it, and struct.pack_into stores zeros first. A device counts every access.
 * Assembly leaves the compiler no choice, not even of an addressing mode that a hypervisor cannot emulate (arm64,
 * writeback).
 */
#ifndef IOBMD_DEVICE_ACCESS_H
#define IOBMD_DEVICE_ACCESS_H

#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)

#define IOBMD_LOAD(type, suffix, from, value)                                                                          \
    __asm__ volatile("mov" suffix " %1, %0" : "=r"(value) : "m"(*(const volatile type *)(from)) : "memory")
#define IOBMD_STORE(type, suffix, to, value)                                                                           \
    __asm__ volatile("mov" suffix " %1, %0" : "=m"(*(volatile type *)(to)) : "r"(value) : "memory")
#define IOBMD_LOAD8(from, value) IOBMD_LOAD(uint8_t, "b", from, value)
#define IOBMD_LOAD16(from, value) IOBMD_LOAD(uint16_t, "w", from, value)
#define IOBMD_LOAD32(from, value) IOBMD_LOAD(uint32_t, "l", from, value)
#define IOBMD_LOAD64(from, value) IOBMD_LOAD(uint64_t, "q", from, value)
#define IOBMD_STORE8(to, value) IOBMD_STORE(uint8_t, "b", to, value)
#define IOBMD_STORE16(to, value) IOBMD_STORE(uint16_t, "w", to, value)
#define IOBMD_STORE32(to, value) IOBMD_STORE(uint32_t, "l", to, value)
#define IOBMD_STORE64(to, value) IOBMD_STORE(uint64_t, "q", to, value)

/* The processor keeps the order of uncached accesses, and of stores before them (Intel SDM volume 3, 9.2 and 12.3):
   the kernel's readl and writel are a mov and a compiler barrier as well (arch/x86/include/asm/io.h). */
static inline void iobmd_after_load(void) {}
static inline void iobmd_before_store(void) {}

/* Write-combined stores remain in buffers of the processor until a fence or an uncached access. */
static inline void iobmd_drain(void) { __asm__ volatile("sfence" : : : "memory"); }

#elif defined(__aarch64__)

#define IOBMD_LOAD(instruction, from, value)                                                                           \
    __asm__ volatile(instruction ", [%1]" : "=r"(value) : "r"(from) : "memory")
#define IOBMD_STORE(instruction, to, value)                                                                            \
    __asm__ volatile(instruction ", [%1]" : : "r"(value), "r"(to) : "memory")
#define IOBMD_LOAD8(from, value) IOBMD_LOAD("ldrb %w0", from, value)
#define IOBMD_LOAD16(from, value) IOBMD_LOAD("ldrh %w0", from, value)
#define IOBMD_LOAD32(from, value) IOBMD_LOAD("ldr %w0", from, value)
#define IOBMD_LOAD64(from, value) IOBMD_LOAD("ldr %0", from, value)
#define IOBMD_STORE8(to, value) IOBMD_STORE("strb %w0", to, value)
#define IOBMD_STORE16(to, value) IOBMD_STORE("strh %w0", to, value)
#define IOBMD_STORE32(to, value) IOBMD_STORE("str %w0", to, value)
#define IOBMD_STORE64(to, value) IOBMD_STORE("str %0", to, value)

/* As in the kernel's readl and writel (arch/arm64/include/asm/io.h): dma_rmb after a load, so that memory that the
   device wrote before is read afterwards, and dma_wmb before a store. */
static inline void iobmd_after_load(void) { __asm__ volatile("dmb oshld" : : : "memory"); }
static inline void iobmd_before_store(void) { __asm__ volatile("dmb oshst" : : : "memory"); }
static inline void iobmd_drain(void) { __asm__ volatile("dsb st" : : : "memory"); }

#else

#define IOBMD_LOAD(type, from, value) ((value) = *(const volatile type *)(from))
#define IOBMD_STORE(type, to, value) (*(volatile type *)(to) = (value))
#define IOBMD_LOAD8(from, value) IOBMD_LOAD(uint8_t, from, value)
#define IOBMD_LOAD16(from, value) IOBMD_LOAD(uint16_t, from, value)
#define IOBMD_LOAD32(from, value) IOBMD_LOAD(uint32_t, from, value)
#define IOBMD_LOAD64(from, value) IOBMD_LOAD(uint64_t, from, value)
#define IOBMD_STORE8(to, value) IOBMD_STORE(uint8_t, to, value)
#define IOBMD_STORE16(to, value) IOBMD_STORE(uint16_t, to, value)
#define IOBMD_STORE32(to, value) IOBMD_STORE(uint32_t, to, value)
#define IOBMD_STORE64(to, value) IOBMD_STORE(uint64_t, to, value)

static inline void iobmd_after_load(void) { __sync_synchronize(); }
static inline void iobmd_before_store(void) { __sync_synchronize(); }
static inline void iobmd_drain(void) { __sync_synchronize(); }

#endif

/* Load a number of 1, 2, 4 or 8 bytes, which devices store with the least significant byte first. */
static inline uint64_t iobmd_load(const void *from, int width)
{
    uint64_t value = 0;
    uint32_t word;
    uint16_t half;
    uint8_t byte;
    if (width == 1) {
        IOBMD_LOAD8(from, byte);
        value = byte;
    } else if (width == 2) {
        IOBMD_LOAD16(from, half);
        value = le16toh(half);
    } else if (width == 4) {
        IOBMD_LOAD32(from, word);
        value = le32toh(word);
    } else {
        IOBMD_LOAD64(from, value);
        value = le64toh(value);
    }
    iobmd_after_load();
    return value;
}

static inline void iobmd_store(void *to, int width, uint64_t value)
{
    iobmd_before_store();
    if (width == 1)
        IOBMD_STORE8(to, (uint8_t)value);
    else if (width == 2)
        IOBMD_STORE16(to, htole16((uint16_t)value));
    else if (width == 4)
        IOBMD_STORE32(to, htole32((uint32_t)value));
    else
        IOBMD_STORE64(to, htole64(value));
}

/* The widest access, 1 to 8 bytes, that is aligned at an address and not longer than the rest. */
static inline size_t iobmd_widest(uintptr_t address, size_t left)
{
    size_t width = 8;
    while (width > left || address & (width - 1))
        width /= 2;
    return width;
}

/* Copy bytes from or to a device by the widest aligned accesses, each byte once, in ascending order. */
static inline void iobmd_copy_from_device(void *to, const void *from, size_t size)
{
    for (size_t done = 0, width; done < size; done += width) {
        const char *at = (const char *)from + done;
        width = iobmd_widest((uintptr_t)at, size - done);
        uint64_t value = iobmd_load(at, (int)width);
        value = htole64(value);
        memcpy((char *)to + done, &value, width);
    }
}

static inline void iobmd_copy_to_device(void *to, const void *from, size_t size)
{
    for (size_t done = 0, width; done < size; done += width) {
        char *at = (char *)to + done;
        uint64_t value = 0;
        width = iobmd_widest((uintptr_t)at, size - done);
        memcpy(&value, (const char *)from + done, width);
        iobmd_store(at, (int)width, le64toh(value));
    }
    iobmd_drain();
}

#endif
