"""Ctrl-C: first a request, then as usual; and none of our business in another thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from linear_moe.training.interrupt import InterruptGuard


@pytest.fixture
def _as_in_the_foreground() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_as_in_the_foreground")
def test_the_second_interrupts() -> None:
    with InterruptGuard() as guard:
        assert not guard.requested
        # To this thread, which has handled it on return: the process's signals may reach another first.
        signal.raise_signal(signal.SIGINT)
        assert guard.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_another_thread_leaves_the_handler() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with InterruptGuard():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
