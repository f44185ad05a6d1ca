"""Whether other programs want the cores: read off the system's own counters."""

import time
from collections import namedtuple

import psutil
import pytest

from tunelet.machine import Crowding

Linux = namedtuple("Linux", "user nice system idle iowait irq softirq steal guest guest_nice")
Mac = namedtuple("Mac", "user nice system idle")


@pytest.fixture
def machine(monkeypatch):
    """of(cores, [times, ...], own=[...]): the counters of ten seconds, as psutil gives them."""

    def of(cores, times, own):
        clock, times, own = iter((100.0, 110.0)), iter(times), iter(own)
        monkeypatch.setattr(psutil, "cpu_count", lambda: cores)
        monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(time, "process_time", lambda: next(own))

    return of


def linux(user, idle, iowait=0.0, steal=0.0, guest=0.0):
    return Linux(user, 0.0, 0.0, idle, iowait, 0.0, 0.0, steal, guest, 0.0)


CASES = {
    "alone, and its threads wait for each other half of the time": (2, linux(110.0, 10.0), 10.0, 2, 1.0),
    "another program takes a whole core": (2, linux(120.0, 0.0), 10.0, 2, 1.5),
    "another program, and cores are left": (8, linux(150.0, 30.0), 40.0, 4, 5 / 8),
    "the host takes a core away": (2, linux(110.0, 0.0, steal=10.0), 10.0, 2, 1.5),
    "waiting for a disk is no work": (2, linux(110.0, 5.0, iowait=5.0), 10.0, 2, 1.0),
    "guests are counted once": (2, linux(120.0, 0.0, guest=10.0), 10.0, 2, 1.5),
    "without Linux's counters": (2, Mac(120.0, 0.0, 0.0, 0.0), 10.0, 2, 1.5),
}


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_what_is_wanted_of_the_cores(machine, case):
    cores, after, own, threads, wanted = CASES[case]
    before = linux(100.0, 0.0) if isinstance(after, Linux) else Mac(100.0, 0.0, 0.0, 0.0)
    machine(cores, [before, after], [5.0, 5.0 + own])
    with Crowding(threads) as crowd:
        pass
    assert crowd.wanted == pytest.approx(wanted)
