"""Signals that stop a run, and the alarm for checkpoints."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.processes import Clock
from trex_models.data.loading import LoaderStalledError
from trex_models.train import signals
from trex_models.train.signals import STOP_SIGNALS, Alarm, StoppedBySignal, StopSignals


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    """Install a harmless handler for each signal."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    own = {int(number): lambda *_: None for number in STOP_SIGNALS}
    for number, handler in own.items():
        signal.signal(number, handler)
    yield dict(own)
    for number, previous in before.items():
        signal.signal(number, previous)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_first_signal_within_the_block_is_noted(name: str) -> None:
    number = signal.Signals[name]
    signal.raise_signal(number)
    with StopSignals() as stop:
        pass
    signal.raise_signal(number)
    assert stop.received is None
    with StopSignals() as stop:
        signal.raise_signal(number)
        assert stop.received is number
    assert stop.received is number


def test_later_signals_change_nothing_but_a_second_ctrl_c(clock: Clock) -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        clock.now += 0.9  # the copy that Slurm or torchrun sends
        signal.raise_signal(signal.SIGINT)
        clock.now += 0.2  # 1.1 s after the first
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGINT
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGUSR1)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            clock.now += 100
            signal.raise_signal(number)
        assert stop.received is signal.SIGUSR1


@pytest.mark.parametrize("error", [None, ValueError])
def test_handlers_are_restored(handlers: dict[int, object], error: type[Exception] | None) -> None:
    try:
        with StopSignals():
            assert all(signal.getsignal(number) != own for number, own in handlers.items())
            if error:
                raise error
    except ValueError:
        pass
    assert {int(number): signal.getsignal(number) for number in STOP_SIGNALS} == handlers


def test_signals_are_ignored_where_the_process_exits() -> None:
    with StopSignals(exits=True):
        pass
    assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}


@pytest.mark.parametrize("error", [LoaderStalledError(), RuntimeError("/gloo/transport")])
def test_stop_within_a_step(error: Exception) -> None:
    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise error

    with pytest.raises(type(error)), StopSignals():
        raise error
    said = "by SIGTERM within a step; .* from the last checkpoint"
    with pytest.raises(StoppedBySignal, match=said), StopSignals():
        stop()


def test_outside_the_main_thread_nothing_is_touched(handlers: dict[int, object]) -> None:
    seen: list[object] = []

    def work() -> None:
        with StopSignals() as stop:
            seen.append({int(number): signal.getsignal(number) for number in STOP_SIGNALS})
            seen.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handlers, None]
    assert {int(number): signal.getsignal(number) for number in STOP_SIGNALS} == handlers


def test_ignored_signals_stay_ignored() -> None:
    """Such as SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("announce", [True, False])
def test_first_signal_is_announced(announce: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals(announce):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    expected = "SIGINT: stopping once the state is saved; press Ctrl-C again to end at once\n"
    assert capfd.readouterr().out == (expected if announce else "")


def test_alarm_counts_from_when_it_was_last_due(clock: Clock) -> None:
    alarm = Alarm(60)
    clock.now += 59
    assert not alarm.due()
    clock.now += 1
    assert alarm.due()
    assert not alarm.due()
    clock.now += 150  # late: two missed alarms do not fire later
    assert alarm.due()
    clock.now += 59
    assert not alarm.due()
    clock.now += 1
    assert alarm.due()
    alarm = Alarm(0)
    clock.now += 1e9
    assert not alarm.due()
