"""The scheduler's signals become a flag, in the main thread only, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from comir_hpc.host.signals import STOP_SIGNALS, stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_the_handler_of_before_comes_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(10)
    assert signal.getsignal(number) == before


@pytest.mark.timeout(60)
def test_a_signal_that_comes_while_another_sets_the_flag_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stop_signals() as stop:
        held = stop._cond  # type: ignore[attr-defined]
        notify = held.notify_all

        def interrupted() -> None:
            signal.raise_signal(signal.SIGUSR2)  # the event's lock is held here
            notify()

        monkeypatch.setattr(held, "notify_all", interrupted)
        signal.raise_signal(signal.SIGUSR2)
        assert stop.is_set()


def test_in_another_thread_nothing_is_touched() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_signals() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
