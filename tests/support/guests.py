"""Attacks on a guest in a task (iobmd.remote.guest) by another process of the task's user."""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from iobmd._native import crosstask
from iobmd.remote.guest import Call, Guest, Result


@contextlib.contextmanager
def one_by_one(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[Guest, Call], None], after: Callable[[Guest, Call], None]
) -> Iterator[None]:
    """Make guests execute their calls one by one, and call a function before and after each."""
    real = Guest.run

    def run(self: Guest, *calls: Call, deadline: float | None = None) -> list[int]:
        results: list[int] = []
        for one in calls:
            arguments = tuple(
                results[value.of] + value.plus if isinstance(value, Result) else value for value in one.arguments
            )
            before(self, one)
            results += real(self, one._replace(arguments=arguments), deadline=deadline)
            after(self, one)
        return results

    with monkeypatch.context() as patch:
        patch.setattr(Guest, "run", run)
        yield


@contextlib.contextmanager
def before_call(name: str, attack: Callable[[Guest], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attack immediately before a call of a guest, which is the moment that an attacker must find."""

    def before(guest: Guest, one: Call) -> None:
        if one.name == name and guest._is_isolated:  # before that call, its descriptors are those of its task
            attack(guest)

    with one_by_one(monkeypatch, before=before, after=lambda _guest, _one: None):
        yield


def steal(pid: int, fd: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        return crosstask.fetch_descriptor(pidfd, fd)
    finally:
        os.close(pidfd)
