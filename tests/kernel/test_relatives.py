"""All kinds of descriptors in any order: all bytes match the model after each step, and nothing remains.

2,000 steps, the same in every run; IOBMD_NIGHTLY=1: 50,000 others.
"""

import contextlib
import ctypes
import gc
import mmap
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import kernel, requirements
from support.kernel import physical_ranges
from support.relatives import EMPTY, NON_VOLATILE, VOLATILE, Memory, Piece, Relative

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError, kernel_task
from iobmd._internal.process_local import Fd
from iobmd._native import mman as native
from iobmd.device.region import Region

PAGE, BAD = kernel.PAGE, IOReturn.kIOReturnBadArgument
INOUT = iobmd.kIODirectionInOut
UNIQUE, SMALL, LARGE = IOMapOptions.kIOMapUnique, IOMapOptions.kIOMapGuardedSmall, IOMapOptions.kIOMapGuardedLarge
KINDS = {
    "private": {"wired": False},
    "wired": {},
    "shared": {"wired": False, "shared": True},
    "wired and shared": {"shared": True},
    "purgeable": {"wired": False, "purgeable": True},
    "purgeable and shared": {"wired": False, "purgeable": True, "shared": True},
}
NIGHTLY = "IOBMD_NIGHTLY" in os.environ
STEPS = 50_000 if NIGHTLY else 2_000
MOST = 14  # descriptors at a time
BUS = 0xFEDC_B000_0000  # of the first device's memory
CURSORS = iobmd.IOMemoryCursor, iobmd.IONaturalMemoryCursor, iobmd.IOBigMemoryCursor, iobmd.IOLittleMemoryCursor
DATA = st.binary(min_size=1, max_size=64)


class Family(RuleBasedStateMachine):
    """Descriptors of iobmd, each with its counterpart in the model."""

    steps = 0
    relatives: list[Relative]

    @initialize()
    def begin(self) -> None:
        self.relatives = []
        self.maps: list[tuple[Any, Relative, int, int]] = []
        self.copies: list[tuple[Any, bytes, list[Relative]]] = []
        self.views: list[tuple[memoryview, Relative]] = []
        self.devices: list[tuple[int, Memory]] = []
        self.theirs = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.theirs[:] = os.urandom(4 * PAGE)
        self._held = ctypes.c_char.from_buffer(self.theirs)
        self.foreign = Memory(bytearray(self.theirs), ctypes.addressof(self._held), ours=False)
        self.seen = requirements.missing("frames") is None
        settle()  # a thread of earlier tests may still be ending
        self.before = footprint()

    # --- making them

    @precondition(lambda self: len(self.relatives) < MOST)
    @rule(kind=st.sampled_from([*sorted(KINDS), "guarded"]), size=st.integers(1, 3 * PAGE), data=DATA)
    def allocate(self, kind: str, size: int, data: bytes) -> None:
        how: dict[str, Any] = KINDS.get(kind, {"shared": True})
        if kind == "guarded":
            buffer = iobmd.IOBufferMemoryDescriptor.inTaskWithGuardPages(kernel_task, INOUT, size)
        else:
            buffer = iobmd.allocate(size, **how)
        content = bytearray((data * len(buffer))[: len(buffer)])
        buffer.writeBytes(0, content)
        shared, wired = how.get("shared", False), how.get("wired", True)
        one = Memory(content, buffer.getBytesNoCopy(), shared, wired, how.get("purgeable", False))
        self.relatives.append(Relative(buffer, [Piece(one, 0, len(buffer))]))

    @precondition(lambda self: len(self.relatives) < MOST)
    @rule(data=st.data())
    def describe_addresses(self, data: st.DataObject) -> None:
        """Describe ranges of memory that does not belong to iobmd, and of buffers by their addresses."""
        buffers = [one for one in self.relatives if one.memory]
        ranges, parts = [], []
        for _ in range(data.draw(st.integers(0, 3))):
            of = data.draw(st.sampled_from([None, *buffers]))
            whole, address = (of.length, of.memory.address) if of else (4 * PAGE, self.foreign.address)
            start = data.draw(st.integers(0, whole))
            length = data.draw(st.integers(0, whole - start))
            ranges.append((address + start, length))
            parts.append(Piece(of or self.foreign, start, length))
        md = IOMemoryDescriptor.withAddressRanges(ranges, INOUT, kernel_task)
        self.relatives.append(Relative(md, parts))

    @precondition(lambda self: 0 < len(self.relatives) < MOST)
    @rule(data=st.data())
    def take_part(self, data: st.DataObject) -> None:
        of, offset, length = self.range_of_one(data)
        part = iobmd.IOSubMemoryDescriptor.withSubRange(of.real, offset, length, INOUT)
        self.relatives.append(Relative(part, [Piece(of, offset, length)]))

    @precondition(lambda self: len(self.relatives) < MOST)
    @rule(data=st.data())
    def concatenate(self, data: st.DataObject) -> None:
        some = [one for one in self.relatives if one.length < 8 * PAGE and one.weight < 20]
        chosen = data.draw(st.lists(st.sampled_from(some), max_size=3)) if some else []
        whole = iobmd.IOMultiMemoryDescriptor.withDescriptors([one.real for one in chosen], INOUT)
        self.relatives.append(Relative(whole, [Piece(one, 0, one.length) for one in chosen]))

    @precondition(lambda self: len(self.relatives) < MOST)
    @rule(pages=st.integers(1, 3))
    def guard(self, pages: int) -> None:
        guard = iobmd.IOGuardPageMemoryDescriptor.withSize(pages * PAGE)
        none = Memory(bytearray(pages * PAGE), 0, shared=True, ours=False, inaccessible=True)
        self.relatives.append(Relative(guard, [Piece(none, 0, pages * PAGE)]))

    @precondition(lambda self: len(self.relatives) < MOST)
    @rule(pages=st.integers(1, 3), data=DATA)
    def describe_device_memory(self, pages: int, data: bytes) -> None:
        """Describe a file as a region of a device: this process's own view of the file shows its bytes."""
        file = os.memfd_create("region")
        content = bytearray((data * pages * PAGE)[: pages * PAGE])
        os.pwrite(file, content, 0)
        one = Memory(content, BUS + len(self.devices) * 16 * PAGE, shared=True, ours=False, device=True)
        region = Region("a file", Fd(os.dup(file), "a file"), 0, pages * PAGE, address=one.address)
        self.devices.append((file, one))
        md = iobmd.IODeviceMemory._of_region(region)
        assert [tuple(segment) for segment in md.segments()] == [(one.address, len(md))], "without a pin or privilege"
        self.relatives.append(Relative(md, [Piece(one, 0, len(md))]))

    @precondition(lambda self: len(self.relatives) < MOST)
    @rule(address=st.integers(0, (1 << 64) - 3 * PAGE), length=st.integers(1, 3 * PAGE))
    def describe_addresses_of_another_bus(self, address: int, length: int) -> None:
        md = IOMemoryDescriptor.withAddressRange(address, length, INOUT | iobmd.kIOMemoryRemote, None)
        none = Memory(bytearray(length), address, ours=False, remote=True)
        self.relatives.append(Relative(md, [Piece(none, 0, length)]))

    @precondition(lambda self: len(self.relatives) < MOST)
    @rule()
    def interleave(self) -> None:
        self.relatives.append(Relative(iobmd.IOInterleavedMemoryDescriptor.withCapacity(4, INOUT), []))

    @precondition(lambda self: any(is_interleaved(one) for one in self.relatives) and len(self.relatives) > 1)
    @rule(data=st.data())
    def add_portion(self, data: st.DataObject) -> None:
        """Add a portion of another descriptor; its dependents keep the memory that they describe."""
        whole = data.draw(st.sampled_from([one for one in self.relatives if is_interleaved(one)]))
        others = [one for one in self.relatives if one is not whole and one.length < 8 * PAGE and one.weight < 20]
        if not others:
            return
        of = data.draw(st.sampled_from(others))
        offset = data.draw(st.integers(0, of.length))
        length = data.draw(st.integers(0, of.length - offset))
        expected = {IOReturn.kIOReturnBusy} if whole.is_prepared() or whole.maps else set()
        if whole.portions == 4:
            expected = {IOReturn.kIOReturnNoResources}
        if self.happens(expected, lambda: whole.real.setMemoryDescriptor(of.real, offset, length)):
            self.replace(whole, [*whole.parts, Piece(of, offset, length)], whole.portions + 1)

    @precondition(lambda self: any(is_interleaved(one) for one in self.relatives))
    @rule(data=st.data())
    def clear_portions(self, data: st.DataObject) -> None:
        whole = data.draw(st.sampled_from([one for one in self.relatives if is_interleaved(one)]))
        others = any(child.is_prepared() for child in whole.children)
        expected = {IOReturn.kIOReturnBusy} if whole.maps or others else set()
        if self.happens(expected, whole.real.clearMemoryDescriptors):
            whole.prepared = 0
            self.replace(whole, [], 0)

    def replace(self, old: Relative, parts: list[Piece], portions: int) -> None:
        """Record other parts of an interleaved descriptor; its dependents keep the previous ones."""
        new = Relative(old.real, parts)
        new.portions = portions
        self.relatives[self.relatives.index(old)] = new
        old.real, old.released = None, True  # a dropped descriptor must not remain referenced by the old model

    # --- using them

    def one(self, data: st.DataObject) -> Relative:
        return data.draw(st.sampled_from(self.relatives))

    def range_of_one(self, data: st.DataObject) -> tuple[Relative, int, int]:
        one = self.one(data)
        offset = data.draw(st.integers(0, one.length))
        return one, offset, data.draw(st.integers(0, one.length - offset))

    @precondition(lambda self: self.relatives)
    @rule(data=st.data(), new=DATA)
    def write(self, data: st.DataObject, new: bytes) -> None:
        one, offset, length = self.range_of_one(data)
        too_long = offset + len(new) > one.length
        expected = {IOReturn.kIOReturnBadArgument} if too_long else one.cannot_access(offset, len(new))
        if self.happens(expected, lambda: one.real.writeBytes(offset, new)):
            one.write(offset, new)
        refused = one.cannot_access(offset, length)
        if self.happens(refused, lambda: one.real.readBytes(offset, length)) is not None:
            assert one.real.readBytes(offset, length) == one.read(offset, length)
        self.happens({IOReturn.kIOReturnBadArgument}, lambda: one.real.readBytes(offset, one.length - offset + 1))

    @precondition(lambda self: self.relatives)
    @rule(data=st.data())
    def prepare(self, data: st.DataObject) -> None:
        one = self.one(data)
        if self.happens(one.cannot_prepare(), one.real.prepare):
            one.prepared += 1

    @precondition(lambda self: self.relatives)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        """A descriptor cannot complete what other descriptors have prepared."""
        one = self.one(data)
        if self.happens(set() if one.prepared else {IOReturn.kIOReturnNotReady}, one.real.complete):
            one.prepared -= 1

    @precondition(lambda self: self.relatives)
    @rule(data=st.data())
    def segments(self, data: st.DataObject) -> None:
        one, offset, length = self.range_of_one(data)
        expected = one.cannot_locate(offset, length)
        if not self.seen and one.has_both_kinds_of_addresses():
            return  # whether those of a part are hidden depends on the other parts
        if expected or self.sees(one, offset, length):
            if self.happens(expected, lambda: one.real.segments(offset, length)):
                assert [list(segment) for segment in one.real.segments(offset, length)] == places(one, offset, length)
        elif length:
            self.happens({IOReturn.kIOReturnNotPrivileged}, lambda: one.real.segments(offset, length))

    def sees(self, one: Relative, offset: int, length: int) -> bool:
        """Whether addresses are visible: without privilege, those that are not of page frames."""
        return self.seen or {piece.of.has_fixed_address for piece in one.bytes_at(offset, length)} == {True}

    @precondition(lambda self: self.relatives)
    @rule(data=st.data(), cursor=st.sampled_from(CURSORS))
    def generate_segments(self, data: st.DataObject, cursor: type[iobmd.IOMemoryCursor]) -> None:
        """Generate the segments of a device by a cursor and by a command, which keeps the memory until its end."""
        one, offset, length = self.range_of_one(data)
        if not length or one.cannot_locate(offset, length) or not self.sees(one, offset, length):
            return
        if not self.seen and one.has_both_kinds_of_addresses():
            return
        expected = places(one, offset, length)
        found = cursor.withSpecification(1000).getPhysicalSegments(one.real, offset, 1000, length)
        assert max(segment.length for segment in found) <= 1000
        assert joined_addresses(found) == expected
        options = iobmd.IODMACommand.kUnmapped | iobmd.IODMACommand.kIterateOnly
        command = iobmd.IODMACommand.withSpecification(64, 1000, options)
        command.setMemoryDescriptor(one.real, autoPrepare=False)
        command.prepare(offset, length)
        assert joined_addresses(command.genIOVMSegments()) == expected
        if one.is_accessible(offset, length):
            assert command.readBytes(0, length) == one.read(offset, length)
        self.happens({IOReturn.kIOReturnBusy}, one.real.free)
        command.clearMemoryDescriptor()

    @precondition(lambda self: self.relatives)
    @rule(data=st.data(), options=st.sampled_from([IOMapOptions(0), UNIQUE, SMALL, LARGE]))
    def map(self, data: st.DataObject, options: IOMapOptions) -> None:
        one, offset, length = self.range_of_one(data)
        expected = one.cannot_map(offset, length or one.length - offset, elsewhere=options != 0)
        anywhere = options | IOMapOptions.kIOMapAnywhere
        made = self.happens(expected, lambda: one.real.createMappingInTask(kernel_task, 0, anywhere, offset, length))
        if made:
            one.maps += 1
            self.maps.append((made, one, offset, length or one.length - offset))

    @precondition(lambda self: self.relatives)
    @rule(data=st.data())
    def map_copy_on_write(self, data: st.DataObject) -> None:
        """The copy is compared with the bytes of this moment after every later step."""
        one, offset, length = self.range_of_one(data)
        if any(memory.state == VOLATILE for memory in one.memories()):
            return  # what it contains may be reclaimed between the model's and iobmd's reading
        options = INOUT | iobmd.kIOMemoryMapCopyOnWrite
        md = iobmd.IOSubMemoryDescriptor.withSubRange(one.real, offset, length, options)
        expected = one.cannot_map(offset, length, elsewhere=True, copied=True) if length else {BAD}
        mapped = self.happens(expected, md.map)
        if mapped:
            self.copies.append((mapped, one.read(offset, length), one.origins()))

    @precondition(lambda self: self.copies)
    @rule(new=st.binary(min_size=1, max_size=1))
    def write_to_a_copy(self, new: bytes) -> None:
        mapped, content, origins = self.copies[0]
        memoryview(mapped)[:1] = new
        self.copies[0] = mapped, new + content[1:], origins

    @precondition(lambda self: self.copies)
    @rule()
    def unmap_copy(self) -> None:
        mapped, *_ = self.copies.pop()
        mapped.unmap()

    @precondition(lambda self: self.maps)
    @rule(data=st.data(), new=st.binary(min_size=1, max_size=1))
    def write_by_a_map(self, data: st.DataObject, new: bytes) -> None:
        mapped, one, offset, length = data.draw(st.sampled_from(self.maps))
        at = data.draw(st.integers(0, length - 1))
        if not one.is_accessible(offset, length):
            self.happens({IOReturn.kIOReturnUnsupported}, lambda: memoryview(mapped))
            return
        if any(memory.state == VOLATILE for memory in one.memories()):
            return  # a store through an address makes private volatile memory count as lost
        memoryview(mapped)[at : at + 1] = new
        one.write(offset + at, new)

    @precondition(lambda self: self.maps)
    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.maps))
        self.maps.remove(chosen)
        chosen[0].unmap()
        chosen[1].maps -= 1

    @precondition(lambda self: any(one.memory for one in self.relatives))
    @rule(data=st.data())
    def view(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from([one for one in self.relatives if one.memory]))
        self.views.append((memoryview(one.real), one))
        one.views += 1

    @precondition(lambda self: self.views)
    @rule()
    def end_view(self) -> None:
        seen, one = self.views.pop()
        seen.release()
        one.views -= 1

    @precondition(lambda self: self.relatives)
    @rule(data=st.data(), state=st.sampled_from([1, NON_VOLATILE, VOLATILE, EMPTY]))
    def set_purgeable(self, data: st.DataObject, state: int) -> None:
        one = data.draw(st.sampled_from([one for one in self.relatives if not one.cannot_set(1)] or self.relatives))
        if state == VOLATILE and not all(memory.filled for memory in one.memories()):
            return  # if there are no pages to reclaim, it may remain Empty
        old = self.happens(one.cannot_set(state), lambda: one.real.setPurgeable(state))
        if old is None:
            return
        states = [memory.state for memory in one.memories()]
        assert old == (EMPTY if EMPTY in states else max(states))
        for memory in one.memories():
            if state == EMPTY:
                memory.drop()
            elif state != 1:
                memory.state = state

    @rule()
    def purge(self) -> None:
        iobmd.purge()
        for memory in self.volatile():
            memory.drop()

    def volatile(self) -> list[Memory]:
        known = {id(memory): memory for one in self.relatives for memory in one.memories()}
        return [memory for memory in known.values() if memory.state == VOLATILE]

    def notice_what_was_taken(self) -> None:
        """A host that is short of memory may reclaim volatile memory page by page; in that case, purge all of it."""
        for memory in self.volatile():
            seen, wanted = ctypes.string_at(memory.address, len(memory.content)), bytes(memory.content)
            for page in range(0, len(seen), PAGE):
                assert seen[page : page + PAGE] == wanted[page : page + PAGE] or not any(seen[page : page + PAGE])
            if seen != wanted:
                self.purge()
                return

    # --- their end

    @precondition(lambda self: self.relatives)
    @rule(data=st.data(), forget=st.booleans())
    def free(self, data: st.DataObject, forget: bool) -> None:
        """Free a descriptor by its method or by dropping it, which also completes it; maps and views keep it."""
        one = self.one(data)
        expected = one.cannot_free()
        if forget and not one.maps and not one.views:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                one.real = None
            one.prepared = 0
        elif self.happens(expected, one.real.free) is None and expected:
            return
        one.released = True
        self.relatives.remove(one)
        copied = [origin for *_, origins in self.copies for origin in origins]  # a map retains its descriptor
        for origin in one.origins():
            if origin in copied:
                continue
            if origin.memory and origin.released and not origin.is_kept() and not origin.memory.shares_pages:
                iobmd.trim()  # memory that is kept for reuse
                assert not is_mapped(origin.memory.address), "no user is left"

    @invariant()
    def bytes_are_as_they_should_be(self) -> None:
        Family.steps += 1
        if hasattr(self, "relatives"):
            self.notice_what_was_taken()
        for one in getattr(self, "relatives", []):
            if one.is_accessible(0, one.length):
                assert one.real.readBytes(0, one.length) == one.read(0, one.length)
            assert len(one.real) == one.length
        for mapped, one, offset, length in getattr(self, "maps", []):
            if one.is_accessible(offset, length):
                assert bytes(mapped) == one.read(offset, length)
        for mapped, content, _ in getattr(self, "copies", []):
            assert bytes(mapped) == content
        for file, memory in getattr(self, "devices", []):
            assert os.pread(file, len(memory.content), 0) == memory.content

    def happens(self, expected: set[IOReturn], action: Callable[[], Any]) -> Any:
        """Return the result of an operation (True for None), or None if it was refused as expected."""
        try:
            result = action()
        except IOReturnError as error:
            assert error.code in expected, (error, expected)
            return None
        assert not expected, f"not refused: {expected}"
        return True if result is None or isinstance(result, IOReturn) else result

    def teardown(self) -> None:
        if not hasattr(self, "relatives"):
            return
        for seen, _one in self.views:
            seen.release()
        for mapped, *_ in (*self.maps, *self.copies):
            mapped.unmap()
        for one in self.relatives:
            while one.prepared:
                one.real.complete()
                one.prepared -= 1
        for one in self.relatives:
            one.real.free()
        self.relatives, self.maps, self.copies, self.views = [], [], [], []
        for file, _memory in self.devices:
            os.close(file)
        one = seen = mapped = None  # type: ignore[assignment]
        del self._held
        self.theirs.close()
        settle()
        now = footprint()
        assert now == self.before, (now, self.before, list(mapped_objects()))


def is_interleaved(one: Relative) -> bool:
    return isinstance(one.real, iobmd.IOInterleavedMemoryDescriptor)


def places(one: Relative, offset: int, length: int) -> list[list[int]]:
    """Return the addresses of a range, with adjacent ones joined: physical ones by pagemap, or those of a bus."""
    found: list[tuple[int, int]] = []
    for piece in one.bytes_at(offset, length):
        start = piece.of.address + piece.start
        fixed = piece.of.has_fixed_address
        found += [(start, piece.length)] if fixed else map(tuple, physical_ranges([(start, piece.length)]))
    return joined_addresses(found)


def joined_addresses(ranges: Iterable[tuple[int, int]]) -> list[list[int]]:
    found: list[list[int]] = []
    for address, length in ranges:
        if found and sum(found[-1]) == address:
            found[-1][1] += length
        else:
            found.append([address, length])
    return found


def is_mapped(address: int) -> bool:
    with contextlib.suppress(OSError):
        native.incore(address - address % PAGE, 1, PAGE)
        return True
    return False


def settle() -> None:
    """Collect garbage, and wait for the end of the purger's thread."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "iobmd-purger":
            thread.join(10)


def footprint() -> tuple[int, int, int, int]:
    """Return the kernel resources of this process: mapped objects of iobmd, descriptors, locked and pinned bytes."""
    iobmd.trim()
    ours = sum("iobmd" in line for line in mapped_objects())
    return ours, len(list(Path("/proc/self/fd").iterdir())), kernel.status("VmLck"), kernel.pinned()


def mapped_objects() -> Iterator[str]:
    yield from (line for line in Path("/proc/self/maps").read_text().splitlines() if "deleted" in line)


@pytest.mark.timeout(0.15 * STEPS)  # 5 ms of processor time per step, which is longer on a busy machine
def test_family_in_any_order() -> None:
    """Repeat runs until the number of steps is reached: Hypothesis makes runs of at most this length."""
    how = settings(max_examples=25, stateful_step_count=100, suppress_health_check=list(HealthCheck))
    number = random.getrandbits(32) if NIGHTLY else 0
    while Family.steps < STEPS:
        print("seed", number)
        run_state_machine_as_test(seed(number)(Family), settings=how)
        number += 1
