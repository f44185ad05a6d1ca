"""Models in: a folder, a run, a hub id or random weights become a transformers model with tunelet's attention.

Not for tokenizers (data/render.py). Only safetensors: a pickle can run code when it is opened. What can be wrong with a
folder is checked before anything is computed with it (models/weights.py reads the files' headers).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.models import adapters, device, weights
from tunelet.models.device import Choice

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
]  # of a hub repository: no pickles, no other frameworks' weights


def resolve(path: str | Path, *, weights_too: bool = True) -> Path:
    """The folder that `path` means: "starter", a folder, a run (its model/ or adapter/), or a hub id.

    Without `weights_too` a folder may hold a tokenizer alone. An existing path is never taken for a hub id.
    Raises TuneletError, at once where the hub cannot be asked.
    """
    name = str(path)
    if name == "starter":
        from tunelet import starter

        if not starter.BASE.is_dir():
            raise TuneletError(
                "The base model that ships with tunelet is not in this installation.",
                why=f"there is no folder {starter.BASE}",
                fix="Install tunelet again, or name another model: a folder, a run or a hub id.",
            )
        return _checked(Path(starter.BASE), name, weights_too)
    folder = Path(path)
    if name and folder.exists():
        return _checked(_of_run(folder), name, weights_too)
    if not HUB_ID.fullmatch(name):
        why = "there is no such folder" + ("" if name else ": the name is empty")
        raise TuneletError(
            f"There is no model '{name}'.",
            why=why,
            fix="Give starter, a folder with config.json and model.safetensors, a run, or a hub id (org/name).",
        )
    return _hub(name)


def _of_run(folder: Path) -> Path:
    from tunelet.runs import record

    if not record.is_run(folder):
        return folder
    model = record.Run.open(folder).model_folder()
    if model is None:
        raise TuneletError(
            f"The run {folder} has no model yet.",
            why=f"it is {record.Run(folder).status}",
            fix=f"Finish it with: tunelet train --resume {folder}",
        )
    return model


def _checked(folder: Path, name: str, weights_too: bool) -> Path:
    if not folder.is_dir():
        raise TuneletError(
            f"The model '{name}' is not a folder.",
            why="a model is a folder with config.json, model.safetensors and tokenizer.json",
            fix=f"Give the folder: {folder.parent}",
        )
    if weights_too and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise TuneletError(
            f"The folder {folder} holds no model.",
            why="there is neither config.json nor adapter_config.json in it",
            fix="Give the folder that holds config.json and model.safetensors.",
        )
    return folder


def _hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from tunelet.data.sources import hub_reachable, offline_asked

    asked_off = offline_asked()
    offline = asked_off or not hub_reachable()
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=offline))
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        why = (
            "HF_HUB_OFFLINE asks for no network" if asked_off else "the hub cannot be reached: this machine is offline"
        )
        raise TuneletError(
            f"There is no model '{name}' on this machine.",
            why=f"no folder has that name, it is not in the cache, and {why}",
            fix="Give a folder, use starter, or run once with a network to fetch it.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise TuneletError(
            f"The model '{name}' cannot be fetched.",
            why=first,
            fix="Check the name on the hub (org/name) and whether it asks you to accept terms and log in.",
        ) from error


def load_model(
    path: str | Path,
    choice: Choice,
    *,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    trainable: bool = False,
    quantization: str = "none",
) -> Any:
    """The model at `path`, on the chosen device, in `dtype` (None: the chosen one), in eval mode.

    An adapter's folder gives a PeftModel on its base; `trainable` lets the adapter learn on. quantization "int8" or
    "int4": the linear layers of a base that stays frozen take 1 or 0.6 bytes a weight (models/quantize.py). It is not
    remembered in an adapter: one that was trained on a quantised base loads on the unquantised one unless asked
    otherwise. Raises TuneletError on pickles, missing, damaged or incomplete weights, and weights that are not finite.

    Memory: about one copy in `dtype`. Weights that are stored in it are views of the files until something writes to
    them, so the files must not be changed in place meanwhile.
    """
    folder = resolve(path)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, choice, trust_remote_code, dtype, trainable, quantization)
    weights.check(folder)
    return _load_base(folder, choice, trust_remote_code, dtype, quantization)


def _load_base(folder: Path, choice: Choice, trust_remote_code: bool, dtype: str | None, quantization: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of the keys; what matters in it is said below, as an error
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with torch.device("meta"):  # without memory: which class, and the part of the configuration it is made of
            shape = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        wanted: dict[str, Any] = {}
        if quantization != "none":
            from tunelet.models import quantize

            wanted["quantization_config"] = quantize.config(quantization)
        if (folder / "generation_config.json").is_file():
            wanted["generation_config"] = GenerationConfig.from_pretrained(folder, local_files_only=True)
        dtype = dtype or choice.dtype
        with _one_at_a_time(), device.returning_memory():
            model, info = with_attention(
                lambda implementation: type(shape).from_pretrained(
                    None,  # transformers would map the files, and keep them beside what it converts
                    state_dict=weights.tensors(folder, dtype, mapped=quantization == "none"),
                    config=shape.config,
                    dtype=getattr(torch, dtype),
                    attn_implementation=implementation,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **wanted,
                )
            )
        model.name_or_path = model.config.name_or_path = str(folder)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, TypeError) as error:
        raise cannot_load(folder, error) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise TuneletError(
            f"The weights in {folder} do not fit its config.json.",
            why=f"missing or of another shape: {shown}",
            fix="Get the folder again: weights and config.json must be of one model. Training would go on from random "
            "numbers there.",
        )
    weights.check_finite(model, folder)
    return model.to(choice.device).eval()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """transformers reads ahead in threads, whose allocations the settings of models/device.py scatter: 2 GB more for
    1.7B parameters in float32. This is its own switch for that."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def with_attention(make: Callable[[str | None], Any]) -> Any:
    """make(attention implementation): ours, or the model's own where its code does not ask transformers for one."""
    from tunelet.models import attention

    try:
        return make(attention.register())
    except KeyError as error:
        if error.args != (attention.NAME,):
            raise
        return make(None)


def _reason(error: BaseException) -> str:
    """The one line of a library's error that says what is wrong: the innermost cause's first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cannot_load(folder: Path, error: Exception) -> TuneletError:
    text = str(error).strip()
    first = _reason(error)
    if "trust_remote_code" in text:
        return TuneletError(
            f"The model in {folder} brings its own code.",
            why="that code would run on this machine, so it is off unless asked for",
            fix="If you trust its author: --set model.trust_remote_code=true",
        )
    if "should be one of" in text or "Unrecognized configuration class" in text:
        return TuneletError(
            f"The model in {folder} is not a causal language model.",
            why=first,
            fix="Give a model that writes text, for example of type llama, qwen2, qwen3, gemma3_text, phi3 or gpt2.",
        )
    return TuneletError(
        f"The model in {folder} cannot be loaded.",
        why=first,
        fix="Compare its config.json with the model's page, or get the folder again.",
    )


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder. Raises TuneletError where it, or the weights, cannot be read."""
    import json

    if not (folder / adapters.WEIGHTS).is_file():
        raise TuneletError(
            f"The adapter in {folder} has no weights.",
            why=f"there is no {adapters.WEIGHTS}",
            fix="Save the adapter again as safetensors; pickle files are not opened.",
        )
    weights.check_file(folder / adapters.WEIGHTS)
    try:
        told = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
        return told | {"base_model_name_or_path": told["base_model_name_or_path"] or ""}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise TuneletError(
            f"{folder / adapters.CONFIG} cannot be read.", why=str(error), fix="Get the adapter's folder again."
        ) from error


def peft_config(folder: Path) -> Any:
    """peft's configuration of the adapter in `folder`; None where it holds none."""
    from peft import PeftConfig

    if not (folder / adapters.CONFIG).is_file():
        return None
    adapter_config(folder)
    return PeftConfig.from_pretrained(str(folder))


def tokenizer_folder(path: str | Path) -> Path:
    """Where the tokenizer of a model, run or adapter lies: an adapter made elsewhere has that of its base."""
    folder = resolve(path, weights_too=False)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return folder if own or not (folder / adapters.CONFIG).is_file() else base_of(folder)


def base_of(folder: Path) -> Path:
    """The folder of the base model that the adapter in `folder` names. Raises TuneletError where it is not here."""
    try:
        return resolve(adapter_config(folder)["base_model_name_or_path"])
    except TuneletError as error:
        raise TuneletError(
            f"The base model of the adapter in {folder} is not here.",
            why=error.what,
            fix='Put the right folder in "base_model_name_or_path" of its adapter_config.json.',
        ) from error


def _load_adapter(
    folder: Path, choice: Choice, trust_remote_code: bool, dtype: str | None, trainable: bool, quantization: str
) -> Any:
    from peft import PeftModel

    told, base_folder = adapter_config(folder), base_of(folder)
    weights.check(base_folder)
    adapters.check_base(folder, base_folder)
    untrainable = told.get("peft_type") in adapters.VIRTUAL_TYPES  # which peft refuses to train on
    loaded = _load_base(base_folder, choice, trust_remote_code, dtype, quantization)
    try:
        with adapters.quiet():
            model = PeftModel.from_pretrained(
                loaded,
                str(folder),
                is_trainable=trainable and not untrainable,
                autocast_adapter_dtype=False,
                use_safetensors=True,
            )
        adapters.take_in(model, trainable)
    except (RuntimeError, ValueError) as error:
        raise adapters.does_not_fit(folder, base_folder, error) from error
    weights.check_finite(model, folder)
    return model.to(choice.device).eval()


def new_model(
    architecture: dict[str, Any],
    vocab_size: int,
    special_ids: dict[str, int | None],
    seed: int,
    choice: Choice | None = None,
) -> Any:
    """A model of random weights, a function of `seed`; `choice` None: on the meta device, to look at its shapes only.

    architecture: a transformers config as a dict, with "model_type"; special_ids: {"bos": id, "eos": id, "pad": id}.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tunelet.errors import did_you_mean

    values = {"tie_word_embeddings": True, **architecture}
    kind = values.pop("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        raise TuneletError(
            f"model.architecture: there is no model_type '{kind}'.{did_you_mean(kind, CONFIG_MAPPING.keys())}",
            fix='Use one that transformers knows, for example model_type = "llama".',
        )
    ids = {f"{name}_token_id": number for name, number in special_ids.items()}
    try:
        config = CONFIG_MAPPING[kind](**{**values, **ids, "vocab_size": vocab_size})
        torch.manual_seed(seed)
        with torch.device("meta" if choice is None else "cpu"):
            model = with_attention(
                lambda implementation: AutoModelForCausalLM.from_config(
                    config, attn_implementation=implementation, dtype=torch.float32
                )
            )
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, RuntimeError, StrictDataclassError) as error:
        raise TuneletError(
            "model.architecture does not describe a model.",
            why=_reason(error),
            fix="Compare it with the config.json of a model of that type.",
        ) from error
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        special_ids.get("eos"),
        special_ids.get("pad"),
    )
    return model if choice is None else model.to(device=choice.device, dtype=getattr(torch, choice.dtype))


def check_tokenizer(model: Any, tokenizer: Any, name: str) -> None:
    """Raises TuneletError where the tokenizer has more entries than the model has embeddings: indexing would fail
    mid-training."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise TuneletError(
            f"The tokenizer of '{name}' has {len(tokenizer)} entries, its model only {rows}.",
            why="tokens were added to the tokenizer and the embeddings not resized, or the two are of different models",
            fix="Use the tokenizer that came with the model.",
        )
