"""The peer, TRL, as its user would run it: its own trainer on rows that are tokenised already. Runs in a process of its
own (worker.py), never beside tunelet.

Not a tuned copy of it: "default" changes nothing that has to do with the work of a step; "best" uses public settings
only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows as rows_
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

# settings: of SFTConfig; bucketed: the rows come grouped by length, as train_sampling_strategy="group_by_length" would
# at its best. Found by trying (docs/benchmarks.md): bf16 weights without autocast, nothing recomputed.
SETTINGS: dict[str, dict[str, Any]] = {
    "trl-default": {"settings": {}, "bucketed": False},
    "trl-best": {
        "settings": {
            "model_init_kwargs": {"dtype": "bfloat16"},
            "bf16": False,
            "gradient_checkpointing": False,
        },
        "bucketed": True,
    },
}


def sft(
    spec: dict[str, Any], warm: Sequence[rows_.Row], timed: Sequence[rows_.Row], tell: Callable[[str], None]
) -> tuple[Reading, dict[str, Any]]:
    """Trains on `warm`, then on `timed`; the reading is of the latter. spec: see worker.py; "variant" of SETTINGS."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    variant = SETTINGS[spec["variant"]]
    settings = {**variant["settings"], **spec["peer_set"]}
    batch = spec["batch_size"]
    per_step = settings.get("per_device_train_batch_size", batch) * settings.get("gradient_accumulation_steps", 1)
    if per_step != batch:
        raise SystemExit(f"{per_step} rows a step, not {batch}")
    settings.setdefault("per_device_train_batch_size", batch)
    if variant["bucketed"]:
        timed = rows_.by_length(timed, batch, spec["seed"])
    data = Dataset.from_dict(
        {
            "input_ids": [list(row.ids) for row in (*warm, *timed)],
            "labels": [[-100] * row.prompt + list(row.ids[row.prompt :]) for row in (*warm, *timed)],
        }
    )
    warm_steps, steps = len(warm) // batch, (len(warm) + len(timed)) // batch
    clock, got = Clock(spec["device"]), {}

    class Times(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tell(f"step {state.global_step} of {steps}")
            if state.global_step == warm_steps:
                clock.start()
            if state.global_step == steps:
                got["reading"] = clock.stop()

    config = SFTConfig(
        output_dir=str(Path(spec["scratch"]) / "peer-output"),
        use_cpu=spec["device"] == "cpu",
        seed=spec["seed"],
        **PLUMBING,
        **settings,
    )
    trainer = SFTTrainer(
        model=spec["model"],
        args=config,
        train_dataset=data,
        processing_class=_tokenizer(),
        peft_config=_lora(spec["rank"]) if spec["rank"] else None,
        callbacks=[Times()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    facts = {
        "loss": losses[-1] if losses else trainer.state.log_history[-1].get("train_loss"),
        "weights": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "trained_parameters": sum(p.numel() for p in trained),
        "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
        "settings": {
            name: getattr(trainer.args, name)
            for name in (
                "bf16",
                "gradient_checkpointing",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "torch_compile",
                "padding_free",
                "packing",
            )
        },
        "attention": trainer.model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "optimizer": str(trainer.args.optim).split(".")[-1].lower(),
    }
    return got["reading"], facts


def _lora(rank: int) -> Any:
    """LoRA on all linear layers, everything else as peft and TRL have it by default (fp32 adapter weights)."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _tokenizer() -> Any:
    """TRL asks for one, for its padding token; the rows are tokenised already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<eos>"
    )
