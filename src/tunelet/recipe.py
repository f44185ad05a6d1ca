"""The recipe: one pydantic tree of everything a run can be told, with the range and the meaning of every key.

Not here: reading and writing TOML and where a value came from (`recipe_io.py`), other tools' names (`recipe_names.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# A list of strings that may also be written as one string: `train = "my.jsonl"`.
Strings = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Section(BaseModel):
    # strict: a quoted "8" is a mistake to report, not a number; inf and nan are never a setting.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)


class MethodSection(Section):
    """What is optimised. 0 in beta or simpo_gamma: the method's known-good default (train/defaults.py)."""

    name: Literal["pretrain", "sft", "dpo", "orpo", "simpo", "kto"] = Field(
        "sft",
        description="pretrain: plain text, every token trained; sft: conversations, the answers trained; dpo, orpo, "
        "simpo: pairs of a better and a worse answer; kto: single answers with a verdict",
    )
    loss_type: Literal["sigmoid", "hinge", "ipo", "cdpo", "robust", "sigmoid_norm"] = Field(
        "sigmoid",
        description="dpo: sigmoid is the paper's; cdpo and robust allow for wrong labels (label_smoothing); ipo and "
        "sigmoid_norm go by the token",
    )
    beta: float = Field(
        0.0,
        ge=0,
        description="dpo, kto: a larger beta holds the model closer to its start; orpo: weight of the odds ratio; "
        "simpo: scale of the reward; 0: chosen",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo with loss_type cdpo or robust: share of pairs that may be labelled wrongly"
    )
    rpo_alpha: float = Field(
        0.0, ge=0, description="dpo: weight of the chosen answers' own loss, which keeps their probability up"
    )
    simpo_gamma: float = Field(
        0.0, ge=0, description="simpo: margin the reward of the better answer has to win by; 0: chosen"
    )
    desirable_weight: float = Field(1.0, ge=0, description="kto: weight of answers with a good verdict")
    undesirable_weight: float = Field(1.0, ge=0, description="kto: weight of answers with a bad verdict")
    guard: Literal["stop", "warn", "off"] = Field(
        "stop",
        description="dpo, orpo, simpo, kto: what happens when the model is being damaged (chosen answers much less "
        "probable, drift from the start): stop the training, warn, or do not look",
    )


# Which keys of [method] are read by which methods; the name is read by all.
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    "loss_type": ("dpo",),
    "beta": ("dpo", "orpo", "simpo", "kto"),
    "label_smoothing": ("dpo",),
    "rpo_alpha": ("dpo",),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "guard": ("dpo", "orpo", "simpo", "kto"),
}
# The kind of examples each method takes (data/formats.py), and the methods that measure from where the model started.
WANTS = {
    "pretrain": "text",
    "sft": "chat",
    "dpo": "preference",
    "orpo": "preference",
    "simpo": "preference",
    "kto": "labelled",
}
# Which kinds of adapter read a key of [adapter], and which beginnings each may have.
LORA = ("lora", "rslora", "dora")
VIRTUAL = ("prompt", "prefix")
ADAPTER_KEYS = {
    "rank": LORA,
    "alpha": LORA,
    "dropout": LORA,
    "lr_ratio": LORA,
    "target_modules": (*LORA, "ia3"),
    "num_virtual_tokens": VIRTUAL,
    "init": (*LORA, *VIRTUAL),
    "init_text": VIRTUAL,
}
INITS = {
    "lora": ("random", "olora", "pissa"),
    "rslora": ("random", "olora", "pissa"),
    "dora": ("random",),
    "prompt": ("random", "vocabulary", "text"),
    "prefix": ("random", "vocabulary", "text"),
}
# Which keys of [eval] are read only where prompts are asked.
BASELINE_KEYS = ("shots", "baseline_items", "instruction")
PREFERENCE = ("dpo", "orpo", "simpo", "kto")
REFERENCED = ("dpo", "kto")


class ModelSection(Section):
    path: str = Field(
        "starter", description="starter, a folder, a hub id or a run; for pretrain: '' starts from random weights"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto: the first of cuda, mps, cpu that is there"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto: bfloat16 where the hardware multiplies it"
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0: all physical cores this process may use")
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="frozen weights under an adapter: int8 takes half of bfloat16's memory, int4 a quarter"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; only for makers you trust"
    )
    chat_template: str = Field(
        "", description="file with a Jinja chat template, chatml, or plain; '': the tokenizer's own"
    )
    architecture: dict[str, Any] = Field(
        default_factory=dict, description="pretrain from random weights: a transformers config (model_type, ...)"
    )


class TokenizerSection(Section):
    """Training of a byte-level BPE tokenizer, for pretrain from random weights."""

    vocab_size: int = Field(3072, ge=300, description="entries of the vocabulary, special tokens included")
    train_rows: int = Field(20000, ge=1, description="rows of text the tokenizer is trained on")


class DataSection(Section):
    train: Strings = Field(default_factory=lambda: ["starter"], description="starter, files, folders or hub ids")
    eval: Strings = Field(
        default_factory=list, description="held-out sources; empty: eval_fraction of the training rows"
    )
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the training rows held out where eval is empty"
    )
    eval_rows: int = Field(200, ge=0, description="at most this many held-out rows are scored")
    limit: int = Field(0, ge=0, description="use at most this many training rows; 0: all")
    format: str = Field("auto", description="auto, or a format's name from `tunelet data convert --help`")
    columns: dict[str, str] = Field(
        default_factory=dict, description="which column has which role, e.g. {prompt = 'Q', completion = 'A'}"
    )
    system: str = Field("", description="system message put before conversations that have none")
    bad_rows: Literal["stop", "drop"] = Field(
        "stop", description="stop: list every bad row and train nothing; drop: go on without them"
    )
    max_length: int = Field(
        1024, ge=8, description="tokens; longer rows are cut on the right, and dropped where no trained token is left"
    )


class TrainSection(Section):
    batch_size: int = Field(8, ge=1, description="rows in one forward and backward")
    gradient_accumulation: int = Field(1, ge=1, description="forwards and backwards in one optimizer step")
    tokens_per_batch: int = Field(
        0, ge=0, description="a forward and backward with more tokens is cut, with the same result; 0: chosen"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="on: compute activations again in the backward instead of keeping them; auto: if need be"
    )
    optimizer_state: Literal["auto", "float32", "bfloat16", "float8"] = Field(
        "auto",
        description="float32: 12 bytes a trained parameter; bfloat16 (4) and float8 (2) round stochastically and keep "
        "no float32 copy of the weights; auto: float32 if it fits",
    )
    compile: bool = Field(
        False, description="torch.compile of the layers: a minute or two at the start, see docs/benchmarks.md"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="several processes (torchrun): ddp: each holds the model; fsdp: its layers are sharded; auto: ddp "
        "if it fits",
    )
    max_steps: int = Field(0, ge=0, description="optimizer steps; 0: as many as epochs needs")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows, where max_steps is 0")
    learning_rate: float = Field(0.0, ge=0, description="peak; 0: the method's known-good default")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="how the learning rate falls; wsd: warm-up, stable, decay in the last fifth"
    )
    warmup: float = Field(0.05, ge=0, description="< 1: share of the steps; >= 1: steps")
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak (cosine, linear, wsd)"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean of squared gradients")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: no clipping")
    seed: int = Field(0, ge=0, description="data order, initial weights, dropout and sampling follow from it")
    log_steps: int = Field(10, ge=1, description="steps between lines of log.jsonl")
    eval_steps: int = Field(
        0,
        ge=0,
        description="steps between held-out evaluations; 0: at the start and the end, and ten times in all where "
        "answers are compared",
    )
    save_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end only (and on Ctrl-C)")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay on disk")
    early_stopping: int = Field(
        0, ge=0, description="stop after this many evaluations without a better held-out loss; 0: never"
    )


class AdapterSection(Section):
    kind: Literal["none", "lora", "rslora", "dora", "prompt", "prefix", "ia3"] = Field(
        "none", description="none: every weight is trained; else a small adapter is, and the model stays as it is"
    )
    rank: int = Field(16, ge=1, description="rank of the adapter's matrices")
    alpha: float = Field(
        32.0, gt=0, description="the adapter's output is scaled by alpha / rank (rslora: alpha / sqrt(rank))"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs dropped in training")
    target_modules: Strings = Field(
        default_factory=list, description="layers that are adapted; empty: every linear layer of the body (ia3: k, v, "
        "and the last of each MLP)"
    )  # fmt: skip
    lr_ratio: float = Field(1.0, gt=0, description="LoRA+: the matrices B learn so many times faster than A")
    num_virtual_tokens: int = Field(16, ge=1, description="trained positions in front of every row")
    init: Literal["auto", "random", "olora", "pissa", "vocabulary", "text"] = Field(
        "auto",
        description="lora: random (A random, B zero), olora or pissa (parts of the weights); prompt, prefix: random, "
        "vocabulary (random tokens) or text (init_text); auto: random; prompt, prefix: text if given, else vocabulary",
    )
    init_text: str = Field("", description="prompt, prefix: the virtual tokens begin as this text")


class EvalSection(Section):
    items: int = Field(500, ge=1, description="starter: held-out items per language for executed match")
    max_new_tokens: int = Field(128, ge=1, description="longest answer, in tokens")
    batch_size: int = Field(128, ge=1, description="prompts answered at the same time")
    prompts: Strings = Field(
        default_factory=list, description="fixed prompts answered before and after; empty: drawn from the held-out rows"
    )
    baselines: bool = Field(
        True,
        description="align: hold the tuned model against zero-shot and few-shot prompts of the model it starts from",
    )
    shots: int = Field(5, ge=1, description="training rows that the few-shot prompt shows as examples")
    baseline_items: int = Field(
        100,
        ge=1,
        description="starter: held-out commands per language that prompts are asked, and as large a part of the rest; "
        "else held-out rows",
    )
    instruction: str = Field(
        "", description="what prompts say of the task; '': the system message that most training rows share"
    )
    forgetting: bool = Field(
        True, description="align: measure general texts and questions before and after, and warn of what got worse"
    )


class Recipe(Section):
    name: str = Field("run", description="what the report calls the run")
    then: Strings = Field(
        default_factory=list,
        description="align: recipes that go on from the result, in turn: files beside this one, or shipped ones",
    )
    # `method = "dpo"` is short for `[method] name = "dpo"`
    method: Annotated[
        MethodSection, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    ] = Field(default_factory=MethodSection)
    model: ModelSection = Field(default_factory=ModelSection)
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    eval: EvalSection = Field(default_factory=EvalSection)
