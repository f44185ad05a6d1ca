"""Several adapters on one base, by name: switched between prompts, stacked, weighted, or off. Not for training on them
(models/adapters.py) and not for merging (infer/export.py).

Adapters in layers (LoRA and its kin, IA3) are peft's, and stay in the base's layers, where those that are not in use
are passed by: the base then computes what it did, bit for bit. Virtual tokens stand in front of the rows while they are
in use. Each adapter takes memory for its own weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError, did_you_mean
from tunelet.infer.engine import TorchEngine
from tunelet.models import adapters, load, virtual, weights
from tunelet.models.device import Choice
from tunelet.recipe import LORA

OFF = "off"
PART = re.compile(r"(?:([0-9.]+)\s*\*\s*)?([^*+]+)")
FROM_WEIGHTS = ("pissa", "olora", "corda", "eva", "loftq")  # beginnings of LoRA that change the base as they load


class AdapterEngine(TorchEngine):
    """A base model with adapters: `use("english")`, `use({"english": 0.7, "korean": 0.3})`, `use("off")`; `generate`
    and `stream` then answer with these.

    names: of the adapters, in the order they came; used: what `use` was given last, as text.
    """

    def __init__(self, model: Any, base: Path, tokenizer: Any, renderer: Any):
        super().__init__(model, tokenizer, renderer)
        self.base = base
        self.names: list[str] = []
        self.used = OFF
        self._layers: Any = None  # the PeftModel that keeps what stands in layers
        self._inside: dict[str, str] = {}  # name -> what peft calls it: a name of ours, as some mean something to it
        self._kinds: dict[str, str] = {}
        self._virtual: dict[str, virtual.Virtual] = {}
        self._renderers: dict[str, Any] = {OFF: renderer}
        self._scales: dict[str, list[tuple[dict[str, float], float]]] = {}

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        named: Mapping[str, str | Path],
        choice: Choice,
        *,
        template: str = "",
        trust_remote_code: bool = False,
    ) -> AdapterEngine:
        """`model` (None: the base of the first adapter; an adapter: its base, and it comes first) with the adapters
        name -> folder or run. The first is in use. Raises TuneletError where one is for another base."""
        from tunelet.data.render import Renderer, load_tokenizer

        named = dict(named)
        folder = load.resolve(model if model is not None else next(iter(named.values())))
        if (folder / adapters.CONFIG).is_file():
            if model is not None:
                named = {name_of(model): model, **named}
            folder = load.base_of(folder)
        tokenizer = load_tokenizer(folder, template)
        base = load.load_model(folder, choice, trust_remote_code=trust_remote_code)
        load.check_tokenizer(base, tokenizer, str(folder))
        made = cls(base, folder, tokenizer, Renderer(tokenizer))
        for name, path in named.items():
            made.add(name, path, template)
        made.use(next(iter(named), OFF))
        return made

    def add(self, name: str, path: str | Path, template: str = "") -> None:
        """Load an adapter and call it `name`; what is in use stays in use. Raises TuneletError where it is none, is for
        another base, or does not go beside those that are there."""
        from peft import PeftModel

        from tunelet.data.render import Renderer, load_tokenizer

        if name in self.names or name == OFF or not re.fullmatch(r"[^*+=\s.][^*+=\s.]*", name):
            why = "there is one of that name" if name in self.names else "off, *, +, =, dots and spaces mean something"
            raise TuneletError(
                f"An adapter cannot be called '{name}'.", why=why, fix="NAME=FOLDER gives it another name"
            )
        folder = load.resolve(path)
        if not (folder / adapters.CONFIG).is_file():
            raise TuneletError(
                f"'{path}' is not an adapter.",
                why=f"there is no {adapters.CONFIG} in {folder}",
                fix="Give a run that trained an adapter, or an adapter's folder.",
            )
        told = load.adapter_config(folder)
        adapters.check_base(folder, self.base)
        begun = str(told.get("init_lora_weights", ""))
        if begun.startswith(FROM_WEIGHTS):
            raise TuneletError(
                f"The adapter in {folder} changes its base as it loads.",
                why=f"init_lora_weights is {begun}: the base would not be what it was once it is off",
                fix="Save it for the base as it was: peft's save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...).",
            )
        here = self._inside[name] = f"adapter{len(self._inside)}"
        try:
            with adapters.quiet():
                if told.get("peft_type") in adapters.VIRTUAL_TYPES:
                    wrapped = PeftModel.from_pretrained(self.model, str(folder), here, use_safetensors=True)
                    self._virtual[name] = virtual.made(wrapped, here)
                elif self._layers is None:
                    self._layers = PeftModel.from_pretrained(
                        self.model, str(folder), here, autocast_adapter_dtype=False, use_safetensors=True
                    )
                else:
                    self._layers.load_adapter(str(folder), here, autocast_adapter_dtype=False, use_safetensors=True)
        except (RuntimeError, ValueError) as error:
            if "different peft types" not in str(error):
                raise adapters.does_not_fit(folder, self.base, error) from error
            raise TuneletError(
                f"The adapter in {folder} does not go beside {', '.join(self._kinds)}.",
                why="LoRA and IA3 cannot stand in the same layers",
                fix="Load it alone, or beside adapters of its own kind.",
            ) from error
        adapters.in_dtype(self._layers or self.model, self.model.dtype)
        tokenizer = load_tokenizer(folder, template) if (folder / "tokenizer.json").is_file() else self.tokenizer
        load.check_tokenizer(self.model, tokenizer, str(path))
        self._renderers[name] = Renderer(tokenizer)
        inside = name not in self._virtual
        self._kinds[name] = adapters.kind_of(self._layers.peft_config[here]) if inside else "virtual tokens"
        if self._kinds[name] in LORA:
            layers = [layer for _, layer in adapters.lora_layers(self._layers) if here in layer.scaling]
            self._scales[name] = [(layer.scaling, layer.scaling[here]) for layer in layers]
        weights.check_finite(self._layers or self.model, folder)
        self.names.append(name)
        self.model.to(next(self.model.parameters()).device).eval()
        self._set(self._mix(self.used))

    # -- which are in use ---------------------------------------------------------------------------------------------

    def use(self, mix: str | Mapping[str, float]) -> None:
        """Answer with one adapter ("english"), several ("english+korean", "0.7*english+0.3*korean", or a mapping name
        -> weight: the sum of what they add to the base) or none ("off"). Raises TuneletError for an unknown name, and
        for kinds that cannot be weighted or stacked."""
        parts = self._mix(mix)
        self._refuse(parts)
        self._set(parts)
        self.used = mix if isinstance(mix, str) else "+".join(f"{weight:g}*{name}" for name, weight in mix.items())

    def _mix(self, mix: str | Mapping[str, float]) -> dict[str, float]:
        if not isinstance(mix, str):
            return {name: float(weight) for name, weight in mix.items()}
        parts: dict[str, float] = {}
        for part in mix.split("+") if mix.strip() not in ("", OFF) else ():
            found = PART.fullmatch(part.strip())
            try:
                weight = float(found[1]) if found and found[1] else 1.0
            except ValueError:
                found = None
            if found is None or found[2].strip() in parts:
                raise TuneletError(f"'{mix}' names no adapters.", fix="Write NAME, A+B, 0.7*A+0.3*B, or off.")
            parts[found[2].strip()] = weight
        return parts

    def _refuse(self, parts: Mapping[str, float]) -> None:
        for name in parts:
            if name not in self.names:
                raise TuneletError(
                    f"There is no adapter '{name}' here.{did_you_mean(name, self.names)}",
                    why=f"those loaded are: {', '.join(self.names) or 'none'}",
                    fix="Name one of these, or off; load another with --adapter NAME=FOLDER.",
                )
        fixed = [name for name, weight in parts.items() if weight != 1 and self._kinds[name] not in ("lora", "rslora")]
        if fixed:
            raise TuneletError(
                f"The adapter '{fixed[0]}' cannot be weighted.",
                why=f"it is {self._kinds[fixed[0]]}: what it adds is not a sum that can be scaled",
                fix="Use it with weight 1, or weigh adapters of kind lora.",
            )
        if len([name for name in parts if name in self._virtual]) > 1:
            raise TuneletError(
                "Two adapters of virtual tokens cannot be in use at once.",
                why="each was trained as the beginning of a row",
                fix="Use one of them; it can be stacked on one in layers.",
            )
        texts = {renderer.tokenizer.chat_template for name in parts for renderer in [self._renderers[name]]}
        if len(texts) > 1:
            raise TuneletError(
                f"{', '.join(parts)} cannot be used together.",
                why="they were trained with different chat templates",
                fix="Give one template for all: --template FILE.",
            )

    def _set(self, parts: Mapping[str, float]) -> None:
        inside = [name for name in parts if name not in self._virtual]
        if self._layers is not None:
            tuner = self._layers.base_model
            if inside:
                tuner.set_adapter([self._inside[name] for name in inside], inference_mode=True)
                tuner.enable_adapter_layers()
                for p in self._layers.parameters():
                    p.requires_grad_(False)
            else:
                tuner.disable_adapter_layers()
        for name in inside:
            for scaling, whole in self._scales.get(name, ()):
                scaling[self._inside[name]] = parts[name] * whole
        setattr(self.model, virtual.PLACE, next((self._virtual[name] for name in parts if name in self._virtual), None))
        self.renderer = self._renderers[next(iter(parts), OFF)]
        self.tokenizer = self.renderer.tokenizer
        stops = self.renderer.stop_ids or [self.tokenizer.eos_token_id]
        self.stop_ids = frozenset(stop for stop in stops if stop is not None)


def name_of(path: str | Path) -> str:
    """What an adapter is called where no name is given: its folder's name; of a run's adapter/, the run's."""
    folder = Path(path).resolve()
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return re.sub(r"[*+=\s.]+", "-", name).strip("-") or "adapter"


def named(given: Sequence[str]) -> dict[str, str]:
    """`--adapter NAME=FOLDER` or `--adapter FOLDER`, repeated -> name -> folder. Raises TuneletError for a name that
    comes twice."""
    out: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = name_of(text), text
        if name in out or not path:
            raise TuneletError(
                f"--adapter {text}: " + (f"two adapters are called '{name}'" if path else "names no folder"),
                fix="Give each a name of its own: --adapter NAME=FOLDER",
            )
        out[name] = path
    return out
