"""Guests under QEMU's software emulation, in which the tests run: other kernels, and devices that do real DMA.

`python -m iobmd.tools.vm run` runs them (`make test-vm`), `… shell` opens a shell in one (`make vm-shell`).

`kernels` fetches Debian's kernels, and `image` packs the files of a guest into initramfs archives; both use a cache
outside the source tree. `machine` describes the hardware of a guest, `profiles` the tests that run in it. `guest`
boots it and evaluates its output, and `table` records what each kernel supports.
"""
