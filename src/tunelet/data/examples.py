"""The only shapes of data past `formats.py`: what an example is, what tokens are, what a batch is.

Frozen dataclasses; tensors only from `Batch` on. Everything remembers its row, so that any failure can name it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from. `line` is the line of the file for line formats, else the 1-based row (`unit` says)."""

    file: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0 keeps the turn in the context and out of the loss; `thinking` is what came before the
    content."""

    role: str
    content: str
    weight: float = 1.0
    thinking: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking is not None:
            out["reasoning_content"] = self.thinking
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        return out


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; `tools` are JSON-schema function descriptions in transformers' format."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a preferred and a dispreferred continuation."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with one continuation and a verdict on it (unpaired preference data, KTO)."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, trained on as a whole."""

    text: str
    origin: Origin


Example = Chat | Preference | Labelled | Text


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the checks saw. `severity`: "error" (the row cannot be trained on), "warning" (it can, but look),
    "info"."""

    kind: str
    severity: str
    message: str
    origin: Origin | None = None
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.origin}: " if self.origin else ""
        return f"{where}{self.message}" + (f" ({self.fix})" if self.fix else "")


@dataclass(frozen=True)
class Counts:
    """rows in = examples out + rows dropped, each with its reason."""

    rows_in: int
    examples_out: int
    dropped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows_in != self.examples_out + sum(self.dropped.values()):
            counts = f"{self.rows_in} in, {self.examples_out} out, dropped {self.dropped}"
            raise AssertionError(f"counts do not add up: {counts}")

    def as_dict(self) -> dict[str, Any]:
        return {"rows_in": self.rows_in, "examples_out": self.examples_out, "dropped": dict(self.dropped)}


@dataclass(frozen=True, slots=True)
class Tokens:
    """A rendered example. `mask[i]` says whether token i is a target (is trained). `spans` name stretches of tokens:
    (start, end, role), end exclusive, in order and without overlap; together they cover all ids. The role is that of
    the message the tokens were printed for, "template" where it was for none, "text" for plain text. Plain texts and
    windows hold numpy arrays (int32 ids, bool masks) in place of the tuples: a token then takes 4 bytes.

    branches: starts of several ways to go on from one beginning, ids[:branches[0]], which stands there once: the chosen
    and the rejected answer of a prompt, say. Each sees the beginning and itself, in attention and in its positions.
    Empty: one sequence, without branches. label: a verdict on the row (KTO's). reference: log-probability of each
    sequence's targets under the model that the training started from, once that is known."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    spans: tuple[tuple[int, int, str], ...]
    origin: Origin
    branches: tuple[int, ...] = ()
    label: bool = True
    reference: tuple[float, ...] = ()

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """(start, end) in ids of what each sequence has of its own; the first one's holds the beginning."""
        edges = (0, *self.branches[1:], len(self.ids))
        return tuple(itertools.pairwise(edges))

    def only(self, number: int) -> Tokens:
        """The row with one of its sequences alone: what the branches share, and branch `number`."""
        shared, (_, end) = self.branches[0], self.sequences[number]
        start = self.branches[number]
        kept = [(0, shared, 0), (start, end, start - shared)]
        spans = tuple(
            (max(a, low) - moved, min(b, high) - moved, role)
            for low, high, moved in kept
            for a, b, role in self.spans
            if a < high and b > low
        )
        return Tokens(
            self.ids[:shared] + self.ids[start:end],
            self.mask[:shared] + self.mask[start:end],
            spans,
            self.origin,
            label=self.label,
            reference=self.reference[number : number + 1],
        )

    @property
    def trained(self) -> int:
        """How many tokens are targets. The first token never is: nothing predicts it."""
        mask = self.mask[1:]
        return int(mask.sum()) if hasattr(mask, "sum") else sum(mask)


@dataclass(frozen=True)
class Batch:
    """Rows laid one after the other in one flat stream, without padding between them.

    input_ids, position_ids: [T] int64. Positions restart at 0 with every row. T may be a little more than the rows
    need; what stands after the last row takes part in nothing.
    segments: [rows + 1] int64, row r is input_ids[segments[r]:segments[r+1]]; attention never crosses a border.
    branches: for each row where its branches start in the stream, () for a row without (see `Tokens`).
    loss_at: [N] int64, positions in the stream whose *next* token is a target (hidden state there predicts `targets`).
    targets: [N] int64, the tokens to predict: input_ids[loss_at + 1], and at the start of a branch its first token.
    sequence_of: [N] int64, which sequence each target belongs to: a row without branches is one, of a row with branches
    each is. reference: [sequences] fp32, empty where none is known. labels: [rows] bool.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    loss_at: torch.Tensor
    targets: torch.Tensor
    sequence_of: torch.Tensor
    reference: torch.Tensor
    labels: torch.Tensor
    branches: tuple[tuple[int, ...], ...] = ()
    origins: tuple[Origin, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the rows."""
        return int(self.segments[-1])

    @property
    def sequences(self) -> int:
        """How many there are: one for a row without branches, else one for each."""
        return sum(max(1, len(branches)) for branches in self.branches)

    def to(self, device: Any) -> Batch:
        moved = ("input_ids", "position_ids", "loss_at", "targets", "sequence_of", "reference", "labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})
