"""The peer, TRL, as its user would run it: its own trainer on rows that are tokenised already. Runs in a process of its
own (worker.py), never beside tunelet.

Not a tuned copy of it: "default" changes nothing that has to do with the work of a step; "best" uses public settings
only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows as rows_
from benchmarks import shapes
from benchmarks.measure import Clock, Reading

# What every run needs and no step depends on. "sequential": rows come in the order this benchmark put them in, which is
# random for the default, so that warm-up and timed steps see the same rows for every contestant.
PLUMBING = {
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
    "num_train_epochs": 1,
}

# What is told of the trainer's settings, beside everything it was given.
SHOWN = (
    "bf16",
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "torch_compile",
    "padding_free",
    "use_liger_kernel",
)

# settings: of SFTConfig and DPOConfig. micro: rows of one forward and backward by kind of rows (none: all of a step's);
# the rest of the step is accumulated.
# bucketed: the rows come grouped by length, as well as train_sampling_strategy="group_by_length" could.
# "trl-best" was found by trying (docs/benchmarks.md).
SETTINGS: dict[str, dict[str, Any]] = {
    "trl-default": {"settings": {}, "micro": {}, "bucketed": False},
    "trl-best": {
        "settings": {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": False, "gradient_checkpointing": False},
        "micro": {"long": 2, "short": 4},
        "bucketed": True,
    },
}


def settings(variant: str, kind: str, batch_size: int, given: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """All settings of a variant for a step of `batch_size` rows of a kind; `given` (--peer-set) comes last.

    On a GPU the best is one stream without padding where flash-attn is installed, and Liger's kernels where they are.
    """
    chosen = SETTINGS[variant]
    if device == "cuda" and variant == "trl-best":
        best = dict(chosen["settings"])
        if importlib.util.find_spec("flash_attn"):
            flash = {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
            best |= {"model_init_kwargs": flash, "padding_free": True, "max_length": None}
        if importlib.util.find_spec("liger_kernel"):
            best["use_liger_kernel"] = True
        return {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 1, **best, **given}
    micro = chosen["micro"].get(kind, batch_size)
    if batch_size % micro:
        micro = batch_size
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": batch_size // micro}
    return {**split, **chosen["settings"], **given}


def sft(
    spec: dict[str, Any], warm: Sequence[rows_.Row], timed: Sequence[rows_.Row], tell: Callable[[str], None]
) -> tuple[Reading, dict[str, Any]]:
    """Trains on `warm`, then on `timed`; the reading is of the latter. spec: see worker.py."""
    from trl import SFTConfig, SFTTrainer

    def columns(rows: Sequence[rows_.Row]) -> dict[str, list[Any]]:
        return {
            "input_ids": [list(row.ids) for row in rows],
            "labels": [[-100] * row.prompt + list(row.ids[row.prompt :]) for row in rows],
        }

    return _train(SFTTrainer, SFTConfig, columns, spec, warm, timed, tell)


def dpo(
    spec: dict[str, Any], warm: Sequence[rows_.Row], timed: Sequence[rows_.Row], tell: Callable[[str], None]
) -> tuple[Reading, dict[str, Any]]:
    """The same on preferences. TRL tokenises these itself, before its clock starts: words here are names of ids."""
    from trl import DPOConfig, DPOTrainer

    def columns(rows: Sequence[rows_.Row]) -> dict[str, list[Any]]:
        def text(ids: Sequence[int]) -> str:
            return " ".join(f"t{number}" for number in ids)

        return {
            "prompt": [text(row.ids[: row.prompt]) + " " for row in rows],
            "chosen": [text(row.ids[row.prompt : -1]) + "<eos>" for row in rows],
            "rejected": [text(row.rejected[:-1]) + "<eos>" for row in rows],
        }

    return _train(DPOTrainer, DPOConfig, columns, spec, warm, timed, tell)


def _train(
    trainer_class: Any,
    config_class: Any,
    columns: Callable[[Sequence[rows_.Row]], dict[str, list[Any]]],
    spec: dict[str, Any],
    warm: Sequence[rows_.Row],
    timed: Sequence[rows_.Row],
    tell: Callable[[str], None],
) -> tuple[Reading, dict[str, Any]]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    batch = spec["batch_size"]
    if SETTINGS[spec["variant"]]["bucketed"]:
        timed = rows_.by_length(timed, batch, spec["seed"])
    warm_steps, steps = len(warm) // batch, (len(warm) + len(timed)) // batch
    clock, got = Clock(spec["device"]), {}

    class Times(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tell(f"step {state.global_step} of {steps}")
            if state.global_step == warm_steps:
                clock.start()
            if state.global_step == steps:
                got["reading"] = clock.stop()

    trainer = trainer_class(
        model=spec["model"],
        args=config_class(
            output_dir=str(Path(spec["scratch"]) / "peer-output"),
            use_cpu=spec["device"] == "cpu",
            seed=spec["seed"],
            **PLUMBING,
            **settings(spec["variant"], spec["rows"], batch, spec["peer_set"], spec["device"]),
        ),
        train_dataset=Dataset.from_dict(columns([*warm, *timed])),
        processing_class=_tokenizer(shapes.SHAPES[spec["shape"]]["vocab_size"]),
        peft_config=_lora(spec["rank"]) if spec["rank"] else None,
        callbacks=[Times()],
    )
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    facts = {
        "loss": next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry),
        "weights": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "trained_parameters": sum(p.numel() for p in trained),
        "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
        "settings": {name: getattr(trainer.args, name) for name in SHOWN},
        "attention": trainer.model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "optimizer": str(trainer.args.optim.value),
    }
    return got["reading"], facts


def _lora(rank: int) -> Any:
    """LoRA on all linear layers, everything else as peft and TRL have it by default (fp32 adapter weights)."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _tokenizer(vocabulary: int) -> Any:
    """TRL asks for one: token n is the word "tn"; 0, 1 and 2 are padding, end and unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words = models.WordLevel(special | {f"t{n}": n for n in range(3, vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<eos>"
    )
