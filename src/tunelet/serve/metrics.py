"""What the server counts, in Prometheus' text format (version 0.0.4). Not for the access log (guard.py).

Names follow Prometheus' conventions: base units, `_total` for counters, `_bucket`, `_sum`, `_count` for histograms.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterable[str]:
        seen = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{le="{bound}"}} {seen}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {seen}"


class Metrics:
    """Counts since the start. All methods are called from the event loop's thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = self.completion_tokens = 0
        self.first, self.each = Histogram(FIRST), Histogram(EACH)

    def token(self, seconds: float, first: bool) -> None:
        """A token came, so long after the request or after the token before it."""
        (self.first if first else self.each).add(seconds)

    def text(self, gauges: Iterable[tuple[str, str, dict[str, float]]]) -> str:
        """gauges: (name, what it is, model -> value)."""
        out = ["# HELP tunelet_requests_total Answered requests.", "# TYPE tunelet_requests_total counter"]
        for (route, status), count in sorted(self.requests.items()):
            out.append(f'tunelet_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, value in (("prompt", self.prompt_tokens), ("completion", self.completion_tokens)):
            full = f"tunelet_{name}_tokens_total"
            out += [f"# HELP {full} Tokens of {name}s.", f"# TYPE {full} counter", f"{full} {value}"]
        for name, what, values in gauges:
            out += [f"# HELP tunelet_{name} {what}", f"# TYPE tunelet_{name} gauge"]
            out += [f'tunelet_{name}{{model="{_escaped(model)}"}} {value:g}' for model, value in values.items()]
        for name, what, histogram in (
            ("time_to_first_token_seconds", "From a request to its first token, waiting included.", self.first),
            ("time_per_output_token_seconds", "From a token to the next.", self.each),
        ):
            out += [f"# HELP tunelet_{name} {what}", f"# TYPE tunelet_{name} histogram"]
            out += histogram.lines(f"tunelet_{name}")
        return "\n".join(out) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
