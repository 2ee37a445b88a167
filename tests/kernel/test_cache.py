"""`PurgeableCache`: contents are loaded, reclaimed and loaded again, and remain intact while in use."""

import array
import ctypes
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
from support import kernel
from support.child import in_child
from support.purging import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE, discard
from support.threads import run_all

import iobmd
from iobmd import BadArgumentError, BusyError, IOPurgeable, IOReturn, PurgeableCache
from iobmd.cache import CacheItem

MIB = 1 << 20
SIZE = 64 << 10


class Loader:
    """Return 64 KiB of one byte for a number, and count the calls."""

    def __init__(self, size: int = SIZE) -> None:
        self.calls: Counter[int] = Counter()
        self.size = size

    def __call__(self, key: int) -> bytes:
        self.calls[key] += 1
        return bytes([key]) * self.size


@pytest.mark.usefixtures("nothing_left")
def test_hit_purge_and_rebuild() -> None:
    loader = Loader()
    with PurgeableCache(loader) as cache:
        for key in (1, 2, 1):
            with cache[key] as item:
                assert bytes(item) == bytes([key]) * SIZE
                assert item._use.entry.buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE
            assert (len(cache), key in cache, 3 in cache) == (min(len(loader.calls), 2), True, False)
        buffer = cache[1]._use.entry.buffer
        gc.collect()
        assert buffer.setPurgeable(KEEP_CURRENT) is VOLATILE
        assert buffer.lazily_freed == SIZE
        discard(buffer, 0, kernel.PAGE)
        with cache[1] as item:
            assert bytes(item) == b"\1" * SIZE
        found = cache.statistics
        assert found == (2, 2, 1, 1, 2, 0, 2 * SIZE, 0)
        assert loader.calls == {1: 2, 2: 1}
        assert list(cache) == [1, 2]


def test_contents_come_from_the_loader() -> None:
    with PurgeableCache(Loader()) as cache:
        with pytest.raises(TypeError, match="loader"):
            cache[1] = b"other"
        assert 1 not in cache


@pytest.mark.usefixtures("nothing_left")
def test_content_in_use_stays() -> None:
    """Contents remain intact while the item, or a view of it, exists."""
    with PurgeableCache(Loader()) as cache:
        item, again = cache[5], cache[5]
        view = memoryview(item)
        part = view[100:200]
        assert cache.statistics.held_bytes == SIZE
        for gone in ("again", "view", "item"):
            with pytest.raises(BufferError) as caught:
                item.release()
            assert caught.value.code == IOReturn.kIOReturnBusy
            if gone == "again":
                again.release()
                again.release()
            elif gone == "view":
                view.release()
            else:
                del item, caught
            iobmd.purge()
            assert bytes(part) == b"\5" * 100
            if gone == "view":
                item = part.obj
        assert cache.statistics.held == 1
        with pytest.raises(BufferError):
            del cache[5]
        with pytest.raises(BufferError):
            cache.close()
        part.release()
        gc.collect()
        assert cache.statistics.held == 0
        assert iobmd.purge() == SIZE


def test_released_item() -> None:
    with PurgeableCache(Loader()) as cache:
        with cache[1] as item:
            assert repr(item) == f"<CacheItem of {SIZE} bytes>"
            assert len(item) == SIZE
        for use in (lambda: memoryview(item), lambda: item.view, item.__enter__):
            with pytest.raises(ValueError, match="released"):
                use()
        assert repr(item) == "<CacheItem released>"
        assert repr(cache) == "<PurgeableCache of 1 keys>"


class ViewedDuringRelease(CacheItem):
    """An item that another thread views between a check of `exports` and the next step."""

    made: memoryview | None = None

    @property
    def exports(self) -> int:
        before: int = super().exports
        if self.made is None:
            self.made = memoryview(self)
        return before


def test_a_view_that_overtakes_release_keeps_the_contents() -> None:
    with PurgeableCache(Loader()) as cache, cache[1] as other:
        buffer = other._use.entry.buffer
        item = ViewedDuringRelease(other._use)
        other._use = None
        with pytest.raises(BusyError):
            item.release()
        assert buffer.lazily_freed == 0
        assert item.made is not None
        assert item.made == b"\1" * SIZE
        item.made.release()
        item.release()
        assert buffer.lazily_freed == SIZE


def test_a_release_that_overtakes_a_view_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another thread, while the view is being created."""
    with PurgeableCache(Loader()) as cache:
        item = cache[1]
        buffer = item._use.entry.buffer
        exported = type(buffer)._exported

        def overtaken(self: iobmd.IOBufferMemoryDescriptor) -> object:
            item.release()
            return exported(self)

        monkeypatch.setattr(type(buffer), "_exported", overtaken)
        with pytest.raises(iobmd.NotOpenError):
            memoryview(item)
        monkeypatch.undo()
        assert buffer.lazily_freed == SIZE


@pytest.mark.usefixtures("nothing_left")
def test_shapes_and_formats() -> None:
    made = {
        "doubles": array.array("d", [1.5, -2.5, 3.5]),
        "grid": memoryview(array.array("i", range(6))).cast("B").cast("i", (2, 3)),
        "number": memoryview(array.array("d", [1.5])).cast("B").cast("d", ()),
        "bytes": b"abc",
        "none": b"",
        "stepped": memoryview(b"a-b-c-")[::2],
        "bool": memoryview(bytearray(b"\0\1")).cast("?"),
    }
    with PurgeableCache(made.__getitem__) as cache:
        for _ in range(2):
            for name, source in made.items():
                expected = memoryview(source)
                with cache[name] as item, item.view as view:
                    assert view.tolist() == expected.tolist()
                    assert (view.format, view.shape) == (expected.format, expected.shape)
                    assert len(item) == expected.nbytes
        iobmd.purge()
        with cache["grid"] as item, item.view as view:
            assert view.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.usefixtures("nothing_left")
def test_content_that_changes_its_size() -> None:
    sizes = iter([100, 3 * kernel.PAGE, 10, 50 * kernel.PAGE])
    with PurgeableCache(lambda _key: b"x" * next(sizes)) as cache:
        for size in (100, 3 * kernel.PAGE, 10, 50 * kernel.PAGE):
            with cache["k"] as item:
                assert bytes(item) == b"x" * size
            iobmd.purge()
        assert cache.statistics.rebuilt == 3


@pytest.mark.usefixtures("nothing_left")
def test_loader_that_fails() -> None:
    broken = True

    def loader(key: str) -> bytes:
        if broken:
            raise LookupError(key)
        return b"made"

    with PurgeableCache(loader) as cache:
        with pytest.raises(LookupError):
            cache["a"]
        assert (len(cache), cache.statistics.entries) == (0, 0)
        broken = False
        assert bytes(cache["a"]) == b"made"
        gc.collect()
        iobmd.purge()
        broken = True
        with pytest.raises(LookupError):
            cache["a"]
        assert "a" not in cache, "empty contents do not count as complete"
        broken = False
        assert bytes(cache["a"]) == b"made"
        with pytest.raises(TypeError):
            PurgeableCache(lambda _key: 7)["k"]  # type: ignore[arg-type, return-value]
        with pytest.raises(KeyError):
            del cache["b"]


@pytest.mark.usefixtures("nothing_left")
def test_sweep_forgets_what_was_taken() -> None:
    with PurgeableCache(Loader()) as cache:
        for key in range(5):
            cache[key].release()
        in_use = cache[0]
        for key in (1, 2):
            discard(cache._entries[key].buffer, 0, kernel.PAGE)
        assert cache.sweep() == 2
        assert sorted(cache) == [0, 3, 4]
        assert cache.sweep() == 0
        assert cache.statistics.purged == 2
        in_use.release()


@pytest.mark.usefixtures("nothing_left")
def test_order_of_purge() -> None:
    first = PurgeableCache(Loader(), modifiers=IOPurgeable.kIOMemoryPurgeableVolatileGroup1)
    second = PurgeableCache(Loader(), modifiers=IOPurgeable.kIOMemoryPurgeableVolatileGroup0)
    with first, second:
        for cache in (first, second):
            cache[1].release()
        assert iobmd.purge(1) == SIZE
        assert second.sweep() == 1
        assert first.sweep() == 0


@pytest.mark.usefixtures("nothing_left")
def test_one_load_at_a_time_for_a_key_and_several_for_several() -> None:
    active, most = Counter[int](), Counter[int]()
    guard = threading.Lock()

    def loader(key: int) -> bytes:
        with guard:
            active[key] += 1
            most[key] = max(most[key], active[key])
            most[-1] = max(most[-1], active.total())
        time.sleep(0.02)
        with guard:
            active[key] -= 1
        return bytes([key]) * SIZE

    with PurgeableCache(loader) as cache:

        def use(number: int) -> None:
            for turn in range(30):
                key = (number + turn) % 4
                with cache[key] as item:
                    assert bytes(item) == bytes([key]) * SIZE
                if turn % 10 == 9:
                    iobmd.purge()

        run_all(*(partial(use, number) for number in range(4)))
        assert most[-1] > 1
        del most[-1]
        assert set(most.values()) == {1}
        found = cache.statistics
        assert found.hits + found.loaded + found.rebuilt == 120
        assert found.held == 0


def test_fork() -> None:
    with PurgeableCache(Loader()) as cache:
        item = cache[1]

        def child() -> tuple[bytes, bytes]:
            seen = bytes(item)[:1]
            item.release()
            return seen, bytes(cache[2])[:1]

        assert in_child(child) == (b"\1", b"\2")
        assert bytes(item) == b"\1" * SIZE
        assert 2 not in cache
        item.release()


def test_cache_that_is_never_closed() -> None:
    with pytest.warns(ResourceWarning, match="PurgeableCache of 2 keys> was never closed"):
        cache = PurgeableCache(Loader())
        cache[1].release()
        cache[2].release()
        del cache
        gc.collect()


def test_nothing_but_what_a_mapping_is() -> None:
    with PurgeableCache(Loader()) as cache:
        assert cache == cache  # noqa: PLR0124
        assert cache != {}
        assert hash(cache)
        assert bytes(cache.get(3)) == b"\3" * SIZE
        assert {key: bytes(item)[:1] for key, item in cache.items()} == {3: b"\3"}
    cache.close()
    assert len(cache) == 0


def test_state_is_what_the_kernel_says() -> None:
    """Contents count as resident until the kernel reclaims them, and again after they are rebuilt."""
    with PurgeableCache(Loader(4 * MIB)) as cache:
        buffers = [cache[key]._use.entry.buffer for key in range(8)]
        gc.collect()

        def resident() -> int:
            pages = sum(kernel.present(buffer.getBytesNoCopy(), 4 * MIB) for buffer in buffers)
            return pages * kernel.PAGE

        assert resident() == 32 * MIB
        assert [buffer.setPurgeable(KEEP_CURRENT) for buffer in buffers] == [VOLATILE] * 8
        assert iobmd.purge() == 32 * MIB
        assert resident() == 0
        assert [buffer.setPurgeable(KEEP_CURRENT) for buffer in buffers] == [EMPTY] * 8
        assert bytes(cache[7])[:2] == b"\7\7"


def test_half_made_content_is_no_hit() -> None:
    """A child that is forked while a thread of its parent runs the loader loads the contents itself."""
    inside, go_on = threading.Event(), threading.Event()

    def loader(key: str) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait()
        return b"made" * 1000

    with PurgeableCache(loader) as cache:
        cache["k"].release()
        iobmd.purge()
        thread = threading.Thread(target=lambda: bytes(cache["k"]))
        thread.start()
        inside.wait()

        def child() -> tuple[bytes, int]:
            with cache["k"] as item:
                return bytes(item), cache.statistics.hits

        try:
            assert in_child(child) == (b"made" * 1000, 0)
        finally:
            go_on.set()
            thread.join()


@pytest.mark.usefixtures("nothing_left")
def test_loader_that_asks_for_what_it_makes() -> None:
    def loader(key: int) -> bytes:
        return bytes(cache[key])

    with PurgeableCache(loader) as cache:
        with pytest.raises(BufferError) as caught:
            cache[1]
        assert caught.value.code == IOReturn.kIOReturnBusy
        assert len(cache) == 0


@pytest.mark.usefixtures("nothing_left")
def test_loader_that_asks_for_others() -> None:
    with PurgeableCache(lambda key: bytes(cache[key - 1]) + b"x" if key else b"") as cache:
        assert bytes(cache[20]) == b"x" * 20
        gc.collect()
        assert cache.statistics.held == 0


def test_garbage_collections_everywhere() -> None:
    """Items in reference cycles end at any garbage collection, in any thread, without a deadlock."""

    def churn() -> int:
        gc.set_threshold(5, 2, 2)
        with PurgeableCache(Loader(kernel.PAGE)) as cache:

            def work(number: int) -> None:
                for turn in range(400):
                    item = cache[(number + turn) % 6]
                    item.itself = item  # type: ignore[attr-defined]
                    assert memoryview(item)[0] == (number + turn) % 6
                    del item
                    if turn % 7 == 0:
                        cache.sweep()
                    if turn % 11 == 0:
                        iobmd.purge()
                    assert cache.statistics.held >= 0

            run_all(*(partial(work, number) for number in range(4)))
            gc.collect()
            return cache.statistics.held

    assert in_child(churn) == 0


@pytest.mark.usefixtures("nothing_left")
def test_an_interrupted_hit_takes_nothing_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with PurgeableCache(Loader()) as cache:
        item = cache[1]

        def interrupt(_what: str) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(cache, "_count", interrupt)
            with pytest.raises(KeyboardInterrupt):
                cache[1]
        assert bytes(item) == b"\1" * SIZE
        assert cache.statistics.held == 1
        item.release()
        assert iobmd.purge() == SIZE


class KeyWithAHook:
    """A key whose hash value is computed while another thread runs."""

    other_thread: Callable[[], None] | None = None

    def __hash__(self) -> int:
        if self.other_thread:
            self.other_thread()
        return 5


@pytest.mark.usefixtures("nothing_left")
def test_leaving_frees_no_contents_that_were_loaded_again() -> None:
    """As by another thread that removes a key and requests it again while the cache is left."""
    cache: PurgeableCache[object] = PurgeableCache(lambda _key: b"1" * SIZE)
    hook = KeyWithAHook()
    cache[1].release()
    cache[hook].release()

    def reload() -> None:
        hook.other_thread = None
        del cache[1]
        cache[1].release()

    hook.other_thread = reload
    cache.__exit__()
    assert list(cache) == [1]
    assert bytes(cache[1]) == b"1" * SIZE
    cache.close()


def test_arguments_are_checked_before_anything_is_cached() -> None:
    """Contents with wrong modifiers once never became volatile."""
    for modifiers in (1 << 30, IOPurgeable.kIOMemoryPurgeableEmpty, -1):
        with pytest.raises(BadArgumentError, match="not a purgeable state"):
            PurgeableCache(bytes, modifiers=modifiers)
    for wrong in (0.5, "0"):
        with pytest.raises(TypeError, match="modifiers must be an integer"):
            PurgeableCache(bytes, modifiers=cast("int", wrong))
    with pytest.raises(TypeError, match="loader must be callable"):
        PurgeableCache(cast("Callable[[int], bytes]", b""))


@pytest.mark.usefixtures("nothing_left")
def test_references_to_objects_are_refused() -> None:
    """The format of a buffer shows them; names of fields are not taken for it."""

    class Named(ctypes.Structure):
        _fields_ = (("O", ctypes.c_int), ("x", ctypes.c_int))

    class Referring(ctypes.Structure):
        _fields_ = (("x", ctypes.c_int), ("y", ctypes.py_object))

    results = {1: Named(), 2: (ctypes.py_object * 2)(1, 2), 3: Referring()}
    with PurgeableCache(results.__getitem__) as cache:
        cache[1].release()
        for key in (2, 3):
            with pytest.raises(TypeError, match="references to Python objects"):
                cache[key]
        assert list(cache) == [1]


@pytest.mark.usefixtures("nothing_left")
def test_close_frees_what_is_not_in_use() -> None:
    cache = PurgeableCache(Loader())
    items = {key: cache[key] for key in range(4)}
    for key in (0, 2, 3):
        items.pop(key).release()
    with pytest.raises(BufferError):
        cache.close()
    assert list(cache) == [1]
    items.pop(1).release()
    cache.close()


@pytest.mark.parametrize("in_thread", [False, True], ids=["itself", "another thread"])
def test_a_use_that_ends_while_its_memory_is_busy(*, in_thread: bool) -> None:
    """Its destructor does not wait, and the contents become volatile afterwards, without another use of the cache."""
    with iobmd.PurgeableCache(lambda _key: bytes(range(256)) * 16) as cache:
        items = [cache[1]]
        memory = cache._entries[1].memory
        kernel.set_apart(memory)
        with memory._memory().guard:
            if in_thread:
                thread = threading.Thread(target=items.clear, daemon=True)
                thread.start()
                thread.join(20)
                assert not thread.is_alive()
            else:
                items.clear()
        assert not kernel.smaps(memory.getBytesNoCopy())["Private_Dirty"]
