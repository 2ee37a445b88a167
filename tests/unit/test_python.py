"""Expectations of Python programmers and ports of IOKit code: return values, argument errors, signatures."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import iobmd
from iobmd.units import PAGE_SIZE


def test_methods_that_return_an_ioreturn_return_success() -> None:
    """`if ret != kIOReturnSuccess` of ported code is true only if the call failed, which raises here."""
    returned: dict[str, object] = {}
    with iobmd.allocate(8192, wired=False, shared=True) as buffer, iobmd.allocate(PAGE_SIZE, shared=True) as other:
        with buffer.map(iobmd.kIOMapUnique) as mapped:
            returned["redirect"] = mapped.redirect(buffer, 0, 0)
            returned["unmap"] = mapped.unmap()
            returned["second unmap"] = mapped.unmap()
        returned["performOperation"] = buffer.performOperation(iobmd.kIOMemoryIncoherentIOFlush, 0, 64)
        if other.wiring is iobmd.Wiring.PINNED:
            returned["prepare"] = other.prepare()
            returned["complete"] = other.complete()
    assert {*returned.values()} == {iobmd.kIOReturnSuccess}, returned
    assert all(isinstance(value, iobmd.IOReturn) for value in returned.values())


@pytest.mark.needs("frames")
def test_methods_of_a_dma_command_return_success() -> None:
    returned: dict[str, object] = {}
    with iobmd.allocate(PAGE_SIZE) as buffer, iobmd.IODMACommand.withSpecification() as command:
        returned["setMemoryDescriptor"] = command.setMemoryDescriptor(buffer, False)
        returned["prepare"] = command.prepare()
        returned["synchronize"] = command.synchronize(iobmd.kIODirectionOut)
        returned["complete"] = command.complete()
        returned["clearMemoryDescriptor"] = command.clearMemoryDescriptor()
        returned["set and prepare"] = command.setMemoryDescriptor(buffer)
        returned["set again"] = command.setMemoryDescriptor(buffer)
    assert {*returned.values()} == {iobmd.kIOReturnSuccess}, returned


def test_errors_are_named_at_the_top_level() -> None:
    """Each subclass of `IOReturnError` that represents a code."""
    named = iobmd.errors.NamedError.__subclasses__()
    assert {error.__name__ for error in named} <= {*iobmd.__all__}
    assert all(getattr(iobmd, error.__name__) is error for error in named)
    with pytest.raises(iobmd.BadArgumentError):
        iobmd.allocate(0)
    assert iobmd.IOMapper is iobmd.iommu.IOMapper


class Arguments:
    """Calls of the public interface with one variable argument; their names end with that of its parameter."""

    buffer = iobmd.IOBufferMemoryDescriptor
    descriptor = iobmd.IOMemoryDescriptor
    here = iobmd.kernel_task

    def __init__(self, one: iobmd.IOBufferMemoryDescriptor, wired: iobmd.IOBufferMemoryDescriptor) -> None:
        self.one, self.wired = one, wired
        self.address = one.getBytesNoCopy()

    def integers(self) -> dict[str, Callable[[Any], object]]:
        one, wired, address, here = self.one, self.wired, self.address, self.here
        return {
            "allocate size": iobmd.allocate,
            "allocate alignment": lambda bad: iobmd.allocate(PAGE_SIZE, alignment=bad),
            "allocate physical_mask": lambda bad: iobmd.allocate(PAGE_SIZE, physical_mask=bad),
            "allocate node": lambda bad: iobmd.allocate(PAGE_SIZE, node=bad),
            "allocate address": lambda bad: iobmd.allocate(PAGE_SIZE, address=bad),
            "copy address": lambda bad: iobmd.copy(here, bad, 10),
            "copy size": lambda bad: iobmd.copy(here, address, bad),
            "read address": lambda bad: here.read(bad, 10),
            "read size": lambda bad: here.read(address, bad),
            "readinto address": lambda bad: here.readinto(bad, bytearray(3)),
            "write address": lambda bad: here.write(bad, b"x"),
            "withCopy options": lambda bad: self.buffer.withCopy(here, bad, here, address, 10),
            "withCopy size": lambda bad: self.buffer.withCopy(here, 3, here, address, bad),
            "inTaskWithOptions options": lambda bad: self.buffer.inTaskWithOptions(here, bad, 10),
            "inTaskWithOptions capacity": lambda bad: self.buffer.inTaskWithOptions(here, 3, bad),
            "inTaskWithOptions alignment": lambda bad: self.buffer.inTaskWithOptions(here, 3, 10, bad),
            "inTaskWithOptions tag": lambda bad: self.buffer.inTaskWithOptions(here, 3, 10, 1, bad),
            "inTaskWithPhysicalMask physicalMask": lambda bad: self.buffer.inTaskWithPhysicalMask(here, 3, 10, bad),
            "inTaskWithGuardPages capacity": lambda bad: self.buffer.inTaskWithGuardPages(here, 3, bad),
            "withCapacity direction": lambda bad: self.buffer.withCapacity(10, bad),
            "setLength length": one.setLength,
            "setDirection direction": one.setDirection,
            "setTag tag": one.setTag,
            "setVMTags userTag": lambda bad: one.setVMTags(0, bad),
            "getBytesNoCopy start": one.getBytesNoCopy,
            "getBytesNoCopy withLength": lambda bad: one.getBytesNoCopy(0, bad),
            "withAddressRange address": lambda bad: self.descriptor.withAddressRange(bad, 10, 3, here),
            "withAddressRange options": lambda bad: self.descriptor.withAddressRange(address, 10, bad, here),
            "readBytes offset": lambda bad: one.readBytes(bad, 10),
            "readBytes length": lambda bad: one.readBytes(0, bad),
            "readBytesInto offset": lambda bad: one.readBytesInto(bad, bytearray(3)),
            "writeBytes offset": lambda bad: one.writeBytes(bad, b"x"),
            "performOperation options": lambda bad: one.performOperation(bad, 0, 10),
            "performOperation offset": lambda bad: one.performOperation(1, bad, 10),
            "prepare forDirection": one.prepare,
            "segments offset": wired.segments,
            "map options": one.map,
            "createMappingInTask atAddress": lambda bad: one.createMappingInTask(here, bad, 0),
            "createMappingInTask options": lambda bad: one.createMappingInTask(here, 0, bad),
            "createMappingInTask length": lambda bad: one.createMappingInTask(here, 0, 1, 0, bad),
            "setPurgeable newState": one.setPurgeable,
            "withSubRange length": lambda bad: iobmd.IOSubMemoryDescriptor.withSubRange(one, 0, bad, 3),
            "withDescriptors options": lambda bad: iobmd.IOMultiMemoryDescriptor.withDescriptors([one], bad),
            "withSpecification numAddressBits": iobmd.IODMACommand.withSpecification,
            "withSpecification maxSegmentSize": lambda bad: iobmd.IODMACommand.withSpecification(64, bad),
            "withSpecification boundary": lambda bad: iobmd.IODMACommand.withSpecification(boundary=bad),
            "policy memory_budget": lambda bad: iobmd.policy(memory_budget=bad).__enter__(),
            "purge target_bytes": iobmd.purge,
            "IOMapper address_bits": lambda bad: iobmd.IOMapper("0000:00:03.0", address_bits=bad),
            "pages address": lambda bad: list(iobmd.pagemap.pages(here, bad, PAGE_SIZE)),
            "pages size": lambda bad: list(iobmd.pagemap.pages(here, address, bad)),
        }

    def others(self) -> dict[str, Callable[[Any], object]]:
        one = self.one
        return {
            "allocate cache": lambda bad: iobmd.allocate(PAGE_SIZE, cache=bad),
            "allocate direction": lambda bad: iobmd.allocate(PAGE_SIZE, direction=bad),
            "copy timeout": lambda bad: iobmd.copy(self.here, self.address, 10, timeout=bad),
            "read timeout": lambda bad: self.here.read(self.address, 1 << 20, timeout=bad),
            "policy time_budget": lambda bad: iobmd.policy(time_budget=bad).__enter__(),
            "withSubRange of": lambda bad: iobmd.IOSubMemoryDescriptor.withSubRange(bad, 0, 10, 3),
            "withDescriptors descriptors": lambda bad: iobmd.IOMultiMemoryDescriptor.withDescriptors([bad], 3),
            "setMemoryDescriptor mem": lambda bad: iobmd.IODMACommand().setMemoryDescriptor(bad),
            "share buffer": iobmd.share,
            "share socket": lambda bad: iobmd.share(one, bad),
            "attach source": iobmd.attach,
            "IOMapper device": iobmd.IOMapper,
        }


def test_a_wrong_type_is_a_type_error_that_names_the_parameter() -> None:
    wrong = []
    with iobmd.allocate(2 << 20, wired=False, shared=True) as one, iobmd.allocate(PAGE_SIZE) as wired:
        calls = Arguments(one, wired)
        tried = [(name, call, bad) for name, call in calls.integers().items() for bad in (4096.5, 8.0, "4k", None)]
        tried += [(name, call, [1]) for name, call in calls.others().items()]
        may_be_none = {
            "allocate node",
            "allocate address",
            "policy memory_budget",
            "purge target_bytes",
            "pages address",
            "pages size",
        }
        for name, call, bad in tried:
            if bad is None and name in may_be_none:
                continue
            try:
                returned = call(bad)
            except Exception as error:
                if type(error) is TypeError and str(error).startswith(f"{name.split()[1]} must be "):
                    continue
                returned = error
            wrong.append((name, bad, returned))
    assert not wrong


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with iobmd.allocate(1 << 20, wired=False) as one:
        address = one.getBytesNoCopy()
        for call in (
            lambda: iobmd.kernel_task.read(address, 1 << 20, timeout=timeout),
            lambda: iobmd.kernel_task.write(address, b"x", timeout=timeout),
            lambda: iobmd.copy(iobmd.kernel_task, address, 1, timeout=timeout),
        ):
            with pytest.raises(iobmd.BadArgumentError, match=r"^timeout must be 0 or more seconds"):
                call()


def test_a_map_is_not_a_descriptor() -> None:
    unique = iobmd.IOMapOptions.kIOMapAnywhere | iobmd.IOMapOptions.kIOMapUnique
    with iobmd.allocate(PAGE_SIZE, shared=True) as one, one.createMappingInTask(iobmd.kernel_task, 0, unique) as made:
        calls = Arguments(one, one).others()
        names = ("withSubRange of", "withDescriptors descriptors", "setMemoryDescriptor mem", "share buffer")
        for name, call in [*((name, calls[name]) for name in names), ("redirect newBackingMemory", made.redirect)]:
            parameter = name.split()[1]
            with pytest.raises(TypeError, match=f"^{parameter} must be an IOMemoryDescriptor, not <IOMemoryMap"):
                call(made)


@pytest.mark.parametrize(
    "flag", ["wired", "contiguous", "purgeable", "shared", "overwrite", "freeze", "lazy", "secret"]
)
def test_a_text_is_not_true(flag: str) -> None:
    """As a condition, "no" would be."""

    def call(bad: Any) -> object:
        if flag in ("freeze", "lazy"):
            return iobmd.copy(iobmd.kernel_task, 0, 1, **{flag: bad})
        return iobmd.allocate(PAGE_SIZE, address=1 << 40, **{flag: bad})

    for bad in ("no", None, 0.0, [1]):
        with pytest.raises(TypeError, match=f"^{flag} must be True or False"):
            call(bad)


@pytest.mark.parametrize("bad", ["init", 1.5, b"1", [1]])
def test_a_wrong_type_of_task_is_a_type_error(bad: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: iobmd.Task(bad),
        lambda: iobmd.allocate(PAGE_SIZE, task=bad),
        lambda: iobmd.copy(bad, 0, 1),
        lambda: iobmd.snapshot(bad),
        lambda: iobmd.IOMemoryDescriptor.withAddressRange(0, 1, iobmd.kIODirectionIn, bad),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"^a task must be a Task, a pid or a psutil\.Process, not "):
            call()


def test_a_wrong_type_of_target_is_a_type_error() -> None:
    for function in (iobmd.pagemap.areas, iobmd.pagemap.pages, iobmd.pagemap.runs, iobmd.pagemap.counts):
        with pytest.raises(TypeError, match=r"^target must be a task, a process id or a buffer, not 'init'"):
            list(function("init"))  # type: ignore[operator]


def test_what_operator_index_accepts_is_an_integer() -> None:
    class Number:
        def __index__(self) -> int:
            return PAGE_SIZE

    with iobmd.allocate(Number(), wired=False, alignment=Number()) as buffer:  # type: ignore[arg-type]
        assert len(buffer) == PAGE_SIZE
        assert type(buffer.getCapacity()) is int


def test_a_wrong_keyword_names_the_function() -> None:
    with pytest.raises(TypeError, match=r"^copy\(\) got an unexpected keyword argument 'wird'"):
        iobmd.copy(iobmd.kernel_task, 0, 1, wird=False)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^allocate\(\) got an unexpected keyword argument 'sise'"):
        iobmd.allocate(1, sise=2)  # type: ignore[call-arg]


def test_copy_takes_every_keyword_of_allocate_but_task() -> None:
    """Errors with a position: `address` is that of the source."""
    allocate, copy = (inspect.signature(function).parameters for function in (iobmd.allocate, iobmd.copy))
    only = {"size", "task", "address", "overwrite", "protection"}
    assert {name: allocate[name] for name in allocate if name not in only}.items() <= copy.items()
    with iobmd.allocate(PAGE_SIZE) as source:
        source.writeBytes(0, b"here")
        with iobmd.copy(iobmd.kernel_task, source.getBytesNoCopy(), PAGE_SIZE, node=0) as copied:
            assert copied.readBytes(0, 4) == b"here"


def annotations(owner: object) -> Iterator[tuple[str, str]]:
    """Return the annotations of a public function, or of the public members of a class, with the members' names."""
    if inspect.isfunction(owner):
        yield from ((owner.__name__, str(text)) for text in owner.__annotations__.values())
    if not inspect.isclass(owner):
        return
    yield from ((owner.__name__, str(text)) for text in inspect.get_annotations(owner).values())
    for name, member in vars(owner).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        public = not name.startswith("_") or name in ("__init__", "__new__", "__enter__", "__len__", "__getitem__")
        if public and inspect.isfunction(function):
            yield from ((f"{owner.__name__}.{name}", str(text)) for text in function.__annotations__.values())


PUBLIC = [getattr(iobmd, name) for name in iobmd.__all__] + [
    getattr(module, name)
    for module in (iobmd.pagemap, iobmd.host, iobmd.iommu)
    for name in vars(module)
    if not name.startswith("_") and getattr(getattr(module, name), "__module__", "").startswith("iobmd")
]


def test_no_public_signature_contains_any() -> None:
    """A type checker accepts any use of an argument or a result of type Any."""
    found = [pair for owner in PUBLIC for pair in annotations(owner)]
    assert len(found) > 300
    assert not [pair for pair in found if re.search(r"\bAny\b", pair[1])]
    assert {text for _name, text in found if "psutil" in text} <= {"psutil.Process"}  # the result of Task.process


def test_the_typed_program_runs() -> None:
    """The program behaves at run time as type checkers (tools/lint) infer."""
    program = Path(__file__).parents[1] / "typed" / "program.py"
    done = subprocess.run([sys.executable, "-W", "error", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
