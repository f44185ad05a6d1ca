"""What the names in requests stand for: a model or an adapter, and its desk. Not for opening them (opening.py)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tunelet.serve.desk import Desk
from tunelet.serve.refusal import Refusal
from tunelet.serve.scoring import Scorer
from tunelet.serve.tokens import Words


@dataclass(frozen=True)
class Served:
    """name: in requests; desk: of its engine, which a base shares with its adapters; renderer: data.render.Renderer of
    its own template; adapter: its name in the engine, "" for a base; scorer: torch on the same model, loaded when it is
    first asked."""

    name: str
    desk: Desk
    renderer: Any
    scorer: Scorer
    adapter: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer

    @cached_property
    def words(self) -> Words:
        return Words(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        from tunelet import __version__

        return f"tunelet-{__version__}-{self.desk.engine.name}"

    def as_dict(self) -> dict[str, Any]:
        length = self.desk.engine.max_length
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tunelet",
            "max_model_len": length,
        }


class Models:
    """All that is served, by name."""

    def __init__(self, served: list[Served]):
        self.by_name = {one.name: one for one in served}

    @property
    def desks(self) -> dict[str, Desk]:
        """The name of the first who sits at it -> desk."""
        found: dict[int, tuple[str, Desk]] = {}
        for one in self.by_name.values():
            found.setdefault(id(one.desk), (one.name, one.desk))
        return dict(found.values())

    def get(self, name: str) -> Served:
        if name not in self.by_name:
            known = ", ".join(self.by_name)
            raise Refusal(
                404, f"There is no such model here. There are: {known}.", param="model", code="model_not_found"
            )
        return self.by_name[name]

    def close(self) -> None:
        for one in self.by_name.values():
            one.scorer.close()
        for desk in self.desks.values():
            desk.engine.close()
