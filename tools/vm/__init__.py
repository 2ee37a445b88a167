"""Guests under QEMU's software emulation, in which the tests run: other kernels, and devices that do real DMA.

`python -m iobmd.tools.vm run` runs them (`make test-vm`), `… shell` opens a shell in one (`make vm-shell`).

`kernels` fetches Debian's kernels and `image` packs what a guest needs into initramfs archives; both keep theirs in
a cache outside of the tree. `machine` says what a guest is made of, `profiles` which tests run in which, `guest`
boots it and judges what came out, and `table` writes down what each kernel can do.
"""
