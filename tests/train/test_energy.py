"""Energy: counters where they can be read, the stated formula where not, and the word for each."""

from __future__ import annotations

import time

import pytest

from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train import energy


def zone(root, name, value, size=1_000_000):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{size}\n")


def test_rapl_counts_packages_and_survives_running_over(tmp_path):
    zone(tmp_path, "intel-rapl:0", 900_000)
    zone(tmp_path, "intel-rapl:1", 100)
    zone(tmp_path, "intel-rapl:0:0", 5)
    counter = energy.rapl(tmp_path)
    assert counter() == 0
    zone(tmp_path, "intel-rapl:0", 100_000)  # ran over: 200,000 microjoules
    zone(tmp_path, "intel-rapl:1", 300_100)
    zone(tmp_path, "intel-rapl:0:0", 500_000)
    assert counter() == pytest.approx(0.5)
    assert counter() == pytest.approx(0.5)
    assert energy.rapl(tmp_path / "none") is None
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert energy.rapl(tmp_path) is None


def test_measured_reading_says_measured():
    joules = iter([100.0, 3700.0])
    with energy.Meter(counters={"cpu": lambda: next(joules)}) as meter:
        pass
    got = meter.reading()
    assert got["energy_wh"] == pytest.approx(1.0) and got["kind"] == "measured" and "RAPL" in got["method"]
    assert got["co2_g"] == pytest.approx(0.48) and got["co2_kind"] == "estimated"


def test_estimate_follows_its_formula_and_says_so():
    got = energy.reading("cpu", seconds=100.0, cpu=180.0, gb=2.0, measured={})
    assert got["energy_wh"] == pytest.approx((180 * 12 + 100 * 2 * 0.3725) / 3600)
    assert got["kind"] == "estimated" and "Lannelongue" in got["method"]
    gpu = energy.reading("cuda", 10.0, 10.0, 1.0, {"cpu": 1.0})
    assert gpu["kind"] == "estimated" and "not counted" in gpu["method"]
    both = energy.reading("cuda", 10.0, 10.0, 1.0, {"cpu": 1.0, "gpu": 2.0})
    assert both["kind"] == "measured" and both["energy_wh"] == 3.0


def test_meter_counts_cpu_time():
    with energy.Meter(counters={}) as meter:
        end = time.process_time() + 0.15
        while time.process_time() < end:
            pass
    got = meter.reading()
    assert 0.1 < got["cpu_seconds"] < 2 and got["seconds"] >= 0.1 and got["energy_wh"] > 0
    assert meter.reading() == got


def test_parts_add_up_over_stops(tmp_path):
    run = Run.create(tmp_path / "r", Recipe())
    one = energy.reading("cpu", 10.0, 20.0, 1.0, {})
    measured = energy.reading("cpu", 10.0, 20.0, 1.0, {"cpu": 1.0})
    energy.add(run, "training", one)
    energy.add(run, "training", one)
    whole = energy.add(run, "after", measured)
    assert run.read_json("energy.json") == whole
    assert whole["energy_wh"] == pytest.approx(2 * one["energy_wh"] + 1.0)
    assert whole["parts"]["training"]["seconds"] == 20 and whole["seconds"] == 30
    assert whole["kind"] == "estimated" and whole["parts"]["after"]["kind"] == "measured"
    assert sum(whole["parts_wh"].values()) == pytest.approx(whole["energy_wh"])


def test_what_a_kill_lost_is_filled_in_as_an_estimate(tmp_path):
    run = Run.create(tmp_path / "r", Recipe())
    energy.fill_in(run, "training", 100.0)
    assert run.read_json("energy.json") is None
    energy.add(run, "training", energy.reading("cpu", 40.0, 40.0, 1.0, {"cpu": 2.0}))
    energy.fill_in(run, "training", 40.0)
    assert run.read_json("energy.json")["energy_wh"] == 2.0
    energy.fill_in(run, "training", 100.0)
    part = run.read_json("energy.json")["parts"]["training"]
    assert part["seconds"] == pytest.approx(100) and part["energy_wh"] == pytest.approx(5)
    assert part["kind"] == "estimated" and "kill" in part["method"] and "RAPL" in part["method"]


def test_label_always_says_which():
    assert energy.label({"energy_wh": 0.4123, "kind": "estimated"}) == "0.412 Wh (estimated)"
    assert energy.label({"energy_wh": 2500, "kind": "measured"}) == "2.50 kWh (measured)"
    assert energy.label(None) == "not known"
