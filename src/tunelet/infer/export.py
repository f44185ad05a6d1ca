"""An adapter and its base become one model folder that plain transformers loads; it appears once it has been proved.

Not for the proof (merge_gate.py) and not for training. The folder is made beside its place, checked there from the disk
(every weight, logits on real rows, ties, tokenizer, stop ids), and renamed when the gate has held.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunelet.errors import GateError, TuneletError
from tunelet.infer import merge_files, merge_gate
from tunelet.infer.merge_gate import Progress
from tunelet.runs import environment, record
from tunelet.runs.files import disk, finite, in_the_making, sha256

DTYPES = ("auto", "float32", "bfloat16", "float16")
MERGE = "merge.json"  # in the merged folder: where it comes from, the figures and their bounds
# peft's learned prompts and prefixes: inputs and cached keys, not weights
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")


@dataclass(frozen=True)
class Source:
    """What is merged. adapter, base: folders; run: the run that trained it, if it is one's; kind: lora, rslora, dora,
    ia3, or peft's name in small letters; quantization: of the base in training (none, int8, int4)."""

    adapter: Path
    base: Path
    kind: str
    run: Path | None = None
    quantization: str = "none"


@dataclass(frozen=True)
class Merged:
    """The folder and what was measured of it (see merge_gate). rows_from: what the rows were, in words."""

    folder: Path
    dtype: str
    source: Source
    rows_from: str
    figures: dict[str, Any]
    bounds: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON values: what merge.json holds."""
        told = {key: value for key, value in asdict(self).items() if key != "source"}
        source = {key: None if value is None else str(value) for key, value in asdict(self.source).items()}
        return {**told, "folder": str(self.folder), **source, "versions": environment.environment()["packages"]}


def source(path: str | Path) -> Source:
    """What `path` means: a run, or an adapter's folder. Raises TuneletError where there is nothing to merge."""
    from tunelet.models import adapters, load

    folder = load.resolve(path)
    if not (folder / "adapter_config.json").is_file():
        raise TuneletError(
            f"{path}: there is nothing to merge.",
            why=f"{folder} is a whole model, not an adapter",
            fix="Use it as it is, or name the run or folder of an adapter.",
        )
    config = load.adapter_config(folder)
    method = str(config.get("peft_type", ""))
    if method in PROMPTS:
        raise TuneletError(
            f"{path}: there is nothing to merge.",
            why=f"{method.lower().replace('_', ' ')} trains what stands in front of the input; no weight of the model "
            "differs from the base's",
            fix=f"Use it beside its base, which every verb does: tunelet chat {path}",
        )
    base = load.base_of(folder)
    adapters.check_base(folder, base)
    run = next((record.Run.open(place) for place in (Path(path), folder.parent) if record.is_run(place)), None)
    quantization = run.recipe().model.quantization if run else "none"
    return Source(folder, base, adapters.kind_of(load.peft_config(folder)), run.folder if run else None, quantization)


def check_out(out: Path, of: Source) -> None:
    """Raises TuneletError where the merged folder could not be made at `out`: something is there, or it would lie in
    the folder of the adapter, of the base, or where the run keeps its model."""
    kept = [("the adapter's folder", of.adapter), ("the base model's folder", of.base)]
    kept += [("the run's own model folder", of.run / name) for name in record.MODEL_FOLDERS] if of.run else []
    _check_free(out, kept)


def _check_free(out: Path, kept: Sequence[tuple[str, Path]]) -> None:
    place = out.resolve()
    for what, folder in kept:
        if place == folder.resolve() or folder.resolve() in place.parents:
            raise TuneletError(
                f"--out {out} is in {what}.",
                why="a model and an adapter in one folder are taken for each other",
                fix="Choose an --out of its own.",
            )
    with disk(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TuneletError(
                f"--out {out} is there already.", why="nothing is written over", fix="Choose another --out."
            )


def merge(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    rows: Sequence[Sequence[int]] = (),
    rows_from: str = "",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge the adapter at `path` (a run or an adapter's folder) into its base, as the new model folder `out`.

    dtype: what the weights are stored in; auto: what the base's are. rows: token ids to compare on, `rows_from` says
    what they are; too few are filled up with built-in ones. Merging is done in float32, also where the adapter was
    trained over a quantised base: it goes into the unquantised one. Memory: one float32 copy of the model and one as it
    is stored. Raises TuneletError for bad input, GateError where the result is not the adapter on its base: nothing is
    left at `out` then.
    """
    from tunelet.models import load, save, weights

    of, out = source(path), Path(out)
    check_out(out, of)
    if dtype == "auto":
        dtype = weights.stored_dtype(of.base)
    tokenizer = merge_files.open_tokenizer(of.adapter, of.base)
    with in_the_making(out) as folder:
        model = merge_gate.into_weights(merge_gate.on_base(of.adapter, trust_remote_code))
        load.check_tokenizer(model, tokenizer, str(path))
        context = merge_gate.context_length(model.config)
        try:
            with disk(out):
                save.save(model, tokenizer, folder, dtype, stop_ids=merge_files.stop_ids(tokenizer, of.base))
        except ValueError as error:  # transformers loads settings of generation that it then refuses to save
            raise TuneletError(
                f"The settings of {of.base} cannot be saved.",
                why=" ".join(str(error).split()),
                fix='Mend its generation_config.json: temperature, top_p and top_k go with "do_sample": true.',
            ) from error
        del model  # the gate begins with nothing in memory
        merge_gate.give_back()
        rows, rows_from = _enough(rows, rows_from, tokenizer, context)
        found = merge_gate.check(
            folder, of.adapter, of.base, rows, trust_remote_code=trust_remote_code, progress=progress
        )
        if found.findings:
            listed = found.findings[:6] + ([f"and {len(found.findings) - 6} more"] if len(found.findings) > 6 else [])
            raise GateError(
                f"The merged model is not the adapter on its base; nothing was written to {out}.",
                why="; ".join(listed),
                fix="Use the adapter beside its base, which every verb does"
                + ("; or keep all digits: --dtype float32." if found.rounding else "."),
            )
        merged = Merged(out, dtype, of, rows_from, found.figures, found.bounds)
        text = json.dumps(finite(merged.as_dict()), ensure_ascii=False, indent=2) + "\n"
        with disk(out):
            (folder / MERGE).write_text(text, encoding="utf-8")
    return merged


def _enough(
    rows: Sequence[Sequence[int]], rows_from: str, tokenizer: Any, context: int
) -> tuple[Sequence[Sequence[int]], str]:
    given = merge_gate.choose_rows(rows, context)
    if sum(len(row) - 1 for row in given) >= merge_gate.POSITIONS:
        return rows, rows_from
    more = "built-in rows in English and Korean"
    return [*given, *merge_gate.built_in_rows(tokenizer)], f"{rows_from}, and {more}" if given else more


def copy(path: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Copy the whole model at `path` (a run, a folder, a hub id) to the new folder `out`, prove it, and say what of.

    It holds what plain transformers loads, and nothing else. Raises TuneletError for bad input, GateError where the
    copy is not the model byte for byte or plain transformers does not load it: nothing is left at `out` then.
    """
    from tunelet.models import load, weights

    model, out = load.resolve(path), Path(out)
    weights.check(model)
    _check_free(out, [("the model's folder", model)])
    tokenizer = merge_files.open_tokenizer(model, model)
    with in_the_making(out) as folder:
        names = sorted({file for pattern in load.WANTED for file in model.glob(pattern) if file.is_file()})
        with disk(out):
            for file in names:
                shutil.copy2(file, folder / file.name)
        told = {file.name: sha256(folder / file.name) for file in names}
        findings = [f"{file.name} is another file" for file in names if told[file.name] != sha256(file)]
        loaded, problems = merge_gate.load_plainly(folder, trust_remote_code)
        findings += [problems] if loaded is None else problems
        del loaded
        merge_gate.give_back()
        rows = merge_gate.built_in_rows(tokenizer)
        findings += merge_files.tokenizer(folder, model, model, rows)
        if findings:
            raise GateError(
                f"The copy is not a model that plain transformers runs; nothing was written to {out}.",
                why="; ".join(findings),
                fix=f"Mend {model}, or use it as it is.",
            )
        copied = {"folder": str(out), "model": str(model), "sha256": told, "dtype": weights.stored_dtype(model)}
        with disk(out):
            (folder / MERGE).write_text(json.dumps(copied, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return copied
