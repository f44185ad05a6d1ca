"""What `python -m benchmarks serve` asks, and how it compares."""

from __future__ import annotations

import pytest

from benchmarks import serve
from benchmarks.__main__ import parser


def contestant(one: float, many: float) -> dict:
    return {"tokens_per_cpu_second": {"1": one, "32": many}, "start_cpu_seconds": 2.0, "rss_mb": 300.0}


def test_ratios_are_medians_of_pairs():
    pairs = [{"tunelet": contestant(10.0, 300.0 * n), "llama-server": contestant(20.0, 100.0)} for n in (1, 2, 3)]
    found = serve.summary(pairs, "llama-server")
    assert found["ratios"] == {"1": 0.5, "32": 6.0}
    assert found["rates"]["tunelet"] == {"1": 10.0, "32": 600.0} and found["pairs_done"] == 3
    text = serve.table({**found, "peer": "llama-server", "threads": 1})
    assert "6.00" in text and "300 MB" in text and "ready after 2.0 CPU-s" in text
    assert "ratios" not in serve.summary([{"tunelet": contestant(1.0, 2.0)}], None)


def test_clients_share_what_they_are_told_to_and_nothing_else():
    options = parser().parse_args(["serve", "--shared", "50", "--prompt", "6", "--rounds", "3"])
    asked = serve._prompts(4, options, 4)
    assert [len(of) for of in asked] == [3] * 4
    flat = [ids for of in asked for ids in of]
    assert {len(ids) for ids in flat} == {56} and len({tuple(ids[:50]) for ids in flat}) == 1
    assert len({tuple(ids[50:]) for ids in flat}) == 12
    assert asked == serve._prompts(4, options, 4) != serve._prompts(4, options, 1)


def test_a_peer_that_is_none():
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "--peer", "vllm"])
