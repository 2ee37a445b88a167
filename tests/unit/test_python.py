"""What Python programmers and ports of IOKit code expect of calls: return values, argument errors, signatures."""

import pytest

import iobmd


def test_methods_that_return_an_ioreturn_return_success() -> None:
    """`if ret != kIOReturnSuccess` of ported code is true only if the call failed, which raises here."""
    returned: dict[str, object] = {}
    with iobmd.allocate(8192, wired=False, shared=True) as buffer, iobmd.allocate(4096, shared=True) as other:
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
    with iobmd.allocate(4096) as buffer, iobmd.IODMACommand.withSpecification() as command:
        returned["setMemoryDescriptor"] = command.setMemoryDescriptor(buffer, False)
        returned["prepare"] = command.prepare()
        returned["synchronize"] = command.synchronize(iobmd.kIODirectionOut)
        returned["complete"] = command.complete()
        returned["clearMemoryDescriptor"] = command.clearMemoryDescriptor()
        returned["set and prepare"] = command.setMemoryDescriptor(buffer)
        returned["set again"] = command.setMemoryDescriptor(buffer)
    assert {*returned.values()} == {iobmd.kIOReturnSuccess}, returned


def test_errors_are_named_at_the_top_level() -> None:
    """Each subclass of `IOReturnError` that stands for a code."""
    named = iobmd.errors.NamedError.__subclasses__()
    assert {error.__name__ for error in named} <= {*iobmd.__all__}
    assert all(getattr(iobmd, error.__name__) is error for error in named)
    with pytest.raises(iobmd.BadArgumentError):
        iobmd.allocate(0)
    assert iobmd.IOMapper is iobmd.iommu.IOMapper
