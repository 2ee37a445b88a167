"""Property tests of untrusted input: the same few examples in the suite, random ones for a time with `make fuzz`."""

import functools
import inspect
import os
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from iobmd.units import PAGE_SIZE
from support import requirements
from support.kernel import Footprint

SECONDS = float(os.environ.get("IOBMD_FUZZ_SECONDS", "0"))
"""Total time for all properties in seconds; 0: a fixed number of examples each, the same in every run."""
_ROUND = 50  # examples between two checks of the clock
_BUSY = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]

_properties = 0


def fuzzed(
    examples: int, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with values of strategies, `examples` times or for its share of `SECONDS`.

    It also fails if descriptors, locked memory or mappings are left behind. Each random round begins with a seed that
    is printed so that pytest shows it if the test fails.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        global _properties  # noqa: PLW0603
        _properties += 1
        common = settings(deadline=None, database=None, suppress_health_check=_BUSY, print_blob=True)

        def run(*args: object, **kwargs: object) -> None:
            if not SECONDS:
                settings(common, max_examples=examples, derandomize=True)(given(**strategies)(test))(*args, **kwargs)
                return
            # Modules are imported, and properties thereby counted, before the first test runs.
            end = time.monotonic() + SECONDS / _properties
            while time.monotonic() < end:
                number = random.getrandbits(32)
                print("seed", number)
                seed(number)(settings(common, max_examples=_ROUND)(given(**strategies)(test)))(*args, **kwargs)

        @functools.wraps(test)
        def without_leaks(*args: object, **kwargs: object) -> None:
            # The first example imports modules that are loaded on demand, which maps native modules.
            settings(common, max_examples=1, derandomize=True)(given(**strategies)(test))(*args, **kwargs)
            before = Footprint.settled()
            run(*args, **kwargs)
            after = Footprint.settled()
            end = time.monotonic() + 60  # iobmd's threads close their descriptors when they end
            while after.descriptors > before.descriptors and time.monotonic() < end:
                time.sleep(0.1)
                after = Footprint.settled()
            assert after.descriptors <= before.descriptors
            assert after.locked <= before.locked
            if not requirements.missing("own_footprint"):
                assert after.mappings - before.mappings < max(40, examples // 2), "malloc creates some, a leak many"

        # The other parameters are fixtures, which pytest finds by the signature.
        del without_leaks.__wrapped__  # type: ignore[attr-defined]
        signature = inspect.signature(test)
        kept = [one for name, one in signature.parameters.items() if name not in strategies]
        without_leaks.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return without_leaks

    return decorate


def numbers(*bases: int) -> st.SearchStrategy[int]:
    """Return numbers at and around limits: of types, of pages, and of `bases`."""
    limits = [
        0,
        1,
        PAGE_SIZE,
        2 << 20,
        1 << 31,
        1 << 32,
        1 << 47,
        1 << 61,
        1 << 62,
        1 << 63,
        1 << 64,
        1 << 200,
        *bases,
    ]
    near = st.tuples(st.sampled_from(limits), st.sampled_from([0, 0, -1, 1, -PAGE_SIZE, PAGE_SIZE])).map(sum)
    return near | near.map(lambda number: -number) | st.integers()


def anything(*bases: int) -> st.SearchStrategy[Any]:
    """Return values of any type that JSON has."""
    leaves = st.none() | st.booleans() | numbers(*bases) | st.floats() | st.text(max_size=8)
    lists = st.lists(leaves | st.lists(leaves, max_size=3), max_size=6)
    return leaves | lists | st.dictionaries(st.text(max_size=5), leaves, max_size=5)


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Return the bytes of `whole` with up to four pieces replaced, removed, doubled or inserted."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        data[start:end] = draw(st.binary(max_size=12) | st.just(bytes(data[start:end]) * 2) | st.just(b""))
    return bytes(data)
