"""Adapters: peft's own layers in peft's own format, so that any tool loads what is trained here. Not for merging
(infer/export.py), and not for several at once (infer/adapters.py).

LoRA: Hu et al., arXiv:2106.09685; rsLoRA: Kalajdzievski, arXiv:2312.03732; DoRA: Liu et al., arXiv:2402.09353; IA3: Liu
et al., arXiv:2205.05638; prompt and prefix tuning: virtual.py. The adapter computes in the model's dtype like
everything else; its weights are kept in float32 by the optimizer (train/optimizer.py) and are saved in float32.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tunelet.errors import TuneletError
from tunelet.models import virtual, weights
from tunelet.recipe import ADAPTER_KEYS, LORA, VIRTUAL, AdapterSection

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_embd",
    "n_layer",
)
ALIKE = 0.98  # cosine of two tokens' output embeddings
VIRTUAL_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING")
BEGUN = "_tunelet_begun"  # on a PeftModel whose LoRA began as parts of the weights: layer -> (A, B) as they began


def add(model: Any, section: AdapterSection, seed: int = 0, tokenizer: Any = None) -> Any:
    """`model` with a new adapter, all else frozen: a PeftModel.

    tokenizer: of init_text; without one such virtual tokens begin as random tokens of the vocabulary. Raises
    TuneletError where target_modules fit no layer, or the model has no room for the kind.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)  # the initial values are a function of the seed
    first = None
    if section.kind in VIRTUAL:
        config, first = _virtual_config(model, section, tokenizer)
    else:
        config = _ia3(model, section) if section.kind == "ia3" else _lora(section)
    try:
        with quiet():
            made = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        if "target module" not in str(error).lower():
            raise
        raise _no_such_layer(model, section) from error
    if first is not None:
        made.prompt_encoder[made.active_adapter].embedding.weight.data = first
        made.prompt_encoder.to(model.get_input_embeddings().weight.device)
    take_in(made)
    if section.init in ("olora", "pissa"):
        _begin_from_weights(made, section.init)
    return made


# -- the kinds --------------------------------------------------------------------------------------------------------


def _lora(section: AdapterSection) -> Any:
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(section.target_modules) or "all-linear",
        use_rslora=section.kind == "rslora",
        use_dora=section.kind == "dora",
    )


def _ia3(model: Any, section: AdapterSection) -> Any:
    """Keys, values and the last projection of each MLP, whose *input* is scaled, as in the paper."""
    from peft import IA3Config, TaskType
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    linear = _linear(model)
    targets = list(section.target_modules) or list(KNOWN.get(model.config.model_type, ()))
    if not targets:
        raise _no_such_layer(model, section)
    width = model.config.get_text_config().hidden_size
    inner = [
        name
        for name in targets
        if any(module.weight.shape[_input_axis(module)] > width for at, module in linear if at.endswith(name))
    ]
    return IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=targets, feedforward_modules=inner)


def _virtual_config(model: Any, section: AdapterSection, tokenizer: Any) -> tuple[Any, torch.Tensor]:
    """(peft's configuration, [n, ...] where the virtual tokens begin)."""
    from peft import PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, TaskType

    from tunelet.models import head

    prefix, n = section.kind == "prefix", section.num_virtual_tokens
    if prefix and not head.packs(model):
        raise TuneletError(
            f"adapter.kind = prefix does not go with {type(model).__name__}.",
            why="it puts keys and values into every layer's attention, and not all layers of this model have one",
            fix="--adapter prompt, or --adapter lora",
        )
    ids = None
    if section.init_text and tokenizer is not None:
        ids = torch.tensor(tokenizer(section.init_text, add_special_tokens=False)["input_ids"])
    elif section.init != "random":
        ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (n,))
    first = virtual.first_weights(model, ids, n, prefix)
    shared: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": n}
    if not prefix:
        return PromptTuningConfig(prompt_tuning_init=PromptTuningInit.RANDOM, **shared), first
    text = model.config.get_text_config()
    layers, heads = text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = first.shape[1] // (2 * layers)
    config = PrefixTuningConfig(num_layers=layers, token_dim=width, num_attention_heads=heads, **shared)
    return config, first


@torch.no_grad()
def _begin_from_weights(model: Any, init: str) -> None:
    """A and B begin as parts of each weight, which is taken out of it: the model computes what it did, and the adapter
    learns in the directions of the weight itself.

    olora: rows and columns of its QR decomposition (Buyukakyuz, arXiv:2406.01775); pissa: its largest singular
    directions (Meng et al., arXiv:2404.02948). The weights of the base are changed in memory; `finish` writes such an
    adapter down for the base as it was.
    """
    begun = {}
    for name, layer in lora_layers(model):
        base, key = layer.get_base_layer(), layer.active_adapters[0]
        a, b, scaling = layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key]
        turned = _input_axis(base) == 0
        weight = (base.weight.t() if turned else base.weight).float()
        if init == "olora":
            q, r = torch.linalg.qr(weight)
            first, second = r[: len(a)], q[:, : len(a)]
        else:
            u, s, v = torch.svd_lowrank(weight, q=min(len(a) + 8, *weight.shape), niter=8)
            root = (s[: len(a)] / scaling).sqrt()
            first, second = root[:, None] * v.t()[: len(a)], u[:, : len(a)] * root
        rank = first.shape[0]  # at most the smaller side of the weight
        a.zero_(), b.zero_()
        a[:rank].copy_(first)
        b[:, :rank].copy_(second)
        rest = weight - scaling * b.float() @ a.float()
        base.weight.copy_(rest.t() if turned else rest)
        begun[name] = (a.detach().clone(), b.detach().clone())
    setattr(model, BEGUN, begun)


def finish(model: Any, folder: Path) -> None:
    """Complete what peft has saved of a PeftModel in `folder`: a LoRA that began as parts of the weights is written for
    the base as it was (twice the rank, because what it began as is subtracted again), and the base is marked."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    begun = getattr(model, BEGUN, None)
    if begun is not None:
        state = load_file(folder / WEIGHTS)
        for name, (a, b) in begun.items():
            at_a, at_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            state[at_a] = torch.cat([state[at_a], a.to(state[at_a])])
            state[at_b] = torch.cat([state[at_b], -b.to(state[at_b])], dim=1)
        save_file(state, folder / WEIGHTS, {"format": "pt"})
        config["r"] *= 2
        config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2  # the same scale
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    base = Path(config["base_model_name_or_path"] or "")
    if (base / "config.json").is_file():
        told = {"fingerprint": weights.fingerprint(base), "shapes": shapes(base)}
        (folder / BASE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def shapes(base: Path) -> dict[str, int]:
    """What an adapter depends on: the sizes in a base's config.json."""
    told = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return {key: told[key] for key in SIZES if isinstance(told.get(key), int)}


def check_base(folder: Path, base: Path) -> None:
    """Raises TuneletError where the adapter in `folder` was trained on another base than the one in `base`. One that
    was not made here says nothing of its base but its name."""
    if not (folder / BASE).is_file():
        return
    told = json.loads((folder / BASE).read_text(encoding="utf-8"))
    here = shapes(base)
    other = [
        f"{key} {value} instead of {here.get(key)}" for key, value in told["shapes"].items() if here.get(key) != value
    ]
    if other or told["fingerprint"] != weights.fingerprint(base):
        raise TuneletError(
            f"The adapter in {folder} belongs to another base model than {base}.",
            why=f"it was trained on one with {', '.join(other)}"
            if other
            else "the weights are not those it was trained on",
            fix="Use the base it was trained on (base_model_name_or_path in adapter_config.json), or train it anew.",
        )


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """(name in the PeftModel, layer) of every layer with LoRA."""
    from peft.tuners.lora.layer import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _linear(model: Any) -> list[tuple[str, Any]]:
    from transformers.pytorch_utils import Conv1D

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    ]


def _input_axis(linear: Any) -> int:
    """Of its weight: Conv1D, GPT-2's, is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return 0 if isinstance(linear, Conv1D) else 1


def _no_such_layer(model: Any, section: AdapterSection) -> TuneletError:
    there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, _ in _linear(model)}))
    if not section.target_modules:
        return TuneletError(
            f"adapter.kind = {section.kind} does not know which layers of {type(model).__name__} to adapt.",
            why=f"its linear layers are {there}",
            fix="Name some of these: --set adapter.target_modules=...",
        )
    return TuneletError(
        f"adapter.target_modules = {section.target_modules} fits no layer of this model.",
        why=f"its linear layers are {there}",
        fix="Name some of these, or leave it empty.",
    )


# -- adapters that exist ----------------------------------------------------------------------------------------------


def kind_of(config: Any) -> str:
    """adapter.kind of one of peft's configurations; peft's own name where it is none of ours."""
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if name == "LORA":
        return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    return {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix", "IA3": "ia3"}.get(name, name)


def take_in(model: Any, trainable: bool = True) -> None:
    """A PeftModel that has just got its adapter: its weights in the model's dtype, its virtual tokens in front of every
    row."""
    in_dtype(model, model.get_input_embeddings().weight.dtype)
    own = virtual.attach(model)
    if own:
        own.weight.requires_grad_(trainable)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without peft's remarks on what it asks transformers under an older name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def in_dtype(model: Any, dtype: torch.dtype) -> None:
    """An adapter computes in its model's dtype, like everything else."""
    for name, p in model.named_parameters():
        if ("lora_" in name or "ia3_" in name or "prompt_encoder" in name) and p.dtype != dtype:
            p.data = p.data.to(dtype)


def does_not_fit(folder: Path, base: Path, error: Exception) -> TuneletError:
    """What is said where peft cannot put an adapter on a base."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shape = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
    return TuneletError(
        f"The adapter in {folder} does not fit the base model {base}.",
        why=shape,
        fix="Use the base it was trained on (base_model_name_or_path in its adapter_config.json).",
    )


def check_same(config: Any, section: AdapterSection, name: str) -> None:
    """Raises TuneletError where the adapter in the folder `name`, of which this is peft's configuration, is not the one
    the recipe describes: training goes on with an adapter as it is."""
    kind = kind_of(config)
    if section.kind == "none":
        raise TuneletError(
            f"'{name}' is an adapter.",
            why="full training needs a whole model",
            fix=f"Add --adapter {kind} to train the adapter on, or merge it into its base first.",
        )
    if kind in LORA:
        there = {"rank": config.r, "alpha": float(config.lora_alpha), "dropout": float(config.lora_dropout)}
    else:
        there = {"num_virtual_tokens": config.num_virtual_tokens} if config.is_prompt_learning else {}
    there = {"kind": kind, **there}
    asked = {key: getattr(section, key) for key in there}
    if asked != there or section.target_modules or section.init != "auto" or section.init_text:
        told = ", ".join(f"adapter.{key} = {value}" for key, value in there.items())
        raise TuneletError(
            f"The recipe's adapter is not the one in '{name}'.",
            why=f"that one has {told}, and its own layers and beginning",
            fix=f"Set {told}, and leave adapter.target_modules and adapter.init out.",
        )


def described(model: Any, section: AdapterSection) -> dict[str, Any]:
    """What is trained: {"kind", "trained", "parameters", "share", "mb"}: numbers, of all numbers with the adapter's;
    size of the adapter's file in MB."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of = _numbers(model)
    begun = getattr(model, BEGUN, None)
    written = trained * (2 if begun else 1)
    return {
        "kind": section.kind,
        "trained": trained,
        "parameters": of,
        "share": trained / of,
        "mb": written * 4 / 1e6,
        **{key: getattr(section, key) for key in ("rank", "num_virtual_tokens") if section.kind in ADAPTER_KEYS[key]},
    }


def _numbers(model: torch.nn.Module) -> int:
    """All weights, tied ones once; quantised ones are counted as what they stand for."""
    packed = [module for module in model.modules() if hasattr(module, "codes")]
    inside = {p for module in packed for p in module.parameters(recurse=False)}
    return sum(p.numel() for p in model.parameters() if p not in inside) + sum(m.weight.numel() for m in packed)


def line(told: dict[str, Any]) -> str:
    """`described`, for people."""
    what = {"prompt": "prompt tuning", "prefix": "prefix tuning", "ia3": "IA3"}.get(told["kind"], told["kind"])
    what = what.replace("lora", "LoRA").replace("dora", "DoRA")
    sizes = [f"rank {told['rank']}"] if "rank" in told else []
    sizes += [f"{told['num_virtual_tokens']} virtual tokens"] if "num_virtual_tokens" in told else []
    return (
        f"Adapter: {', '.join([what, *sizes])}; {told['trained']:,} of {told['parameters']:,} weights are trained "
        f"({told['share']:.2%}), {told['mb']:.2f} MB on disk"
    )


@torch.no_grad()
def untrained(model: Any, tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, str]]:
    """Which of the tokens `ids` nothing has trained, each with another token it cannot be told from: the output
    embeddings of unused tokens stay alike (Land & Bartolo, arXiv:2405.05417)."""
    head = model.get_output_embeddings()
    special = sorted(tokenizer.get_added_vocab().values())
    if head is None or len(special) < 2 or max(*special, *ids) >= head.weight.shape[0]:
        return []
    rows = torch.nn.functional.normalize(head.weight[torch.tensor(special)].float(), dim=1)
    found = []
    for token in sorted(set(ids) & set(special)):
        near = rows @ rows[special.index(token)]
        near[special.index(token)] = -1
        if float(near.max()) > ALIKE:
            pair = (token, special[int(near.argmax())])
            found.append(tuple(tokenizer.convert_ids_to_tokens(pair)))
    return found


def rates(section: AdapterSection) -> Sequence[tuple[str, float]]:
    """(part of a parameter's name, factor of its learning rate). LoRA+: Hayou et al., arXiv:2402.12354."""
    return [("lora_B", section.lr_ratio)] if section.lr_ratio != 1 else []
