"""A Modelfile beside a GGUF file, by which Ollama takes it in: ollama create NAME -f Modelfile

Not for the file (gguf_export.py). Ollama renders conversations by a template in Go's language, not by the Jinja one in
the GGUF file, which its importer only compares with those it knows: so the Modelfile says it, where it is ChatML. What
Ollama does with it is not measured here; the facts are those of its documentation and source (template/template.go).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.infer.gguf_text import CONVERSATIONS
from tunelet.runs.files import disk, write_atomically

NAME = "Modelfile"
# Ollama hands a template all messages, a system message among them, and what the answer begins with is the end of it.
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
MOST_CONTEXT = 8192  # tokens: Ollama keeps memory for all of them
DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", re.DOTALL)


def write(file: Path, tokenizer: Any, renderer: Any, stop_ids: Sequence[int], context: int) -> str:
    """Write the Modelfile beside `file`. Returns what its reader has to know, "" where nothing.

    context: tokens that the model reads. A chat template that is not ChatML is left to Ollama's own knowledge.
    """
    chatml = system_of(renderer) if tokenizer.chat_template else None
    lines = [
        "# Made by tunelet export: ollama create NAME -f Modelfile",
        f"FROM ./{file.name}",
    ]
    if chatml is not None:
        lines.append(f'TEMPLATE """{CHATML}"""')
        if chatml:
            lines.append(f'SYSTEM """{chatml}"""')
    lines += [f"PARAMETER stop {_quoted(tokenizer.convert_ids_to_tokens(id_))}" for id_ in stop_ids]
    lines += [
        f"PARAMETER num_ctx {min(context or MOST_CONTEXT, MOST_CONTEXT)}",
        "# As tunelet answers: greedily, without a penalty on repetition (Ollama's own is 1.1)",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
    ]
    with disk(file):
        write_atomically(file.parent / NAME, "\n".join(lines) + "\n")
    if chatml is None:
        what = "is not ChatML" if tokenizer.chat_template else "is missing"
        return (
            f"The model's chat template {what}: the Modelfile has no TEMPLATE. Ollama takes one that it knows "
            "where the model's looks like it, else none: compare its prompts, or use tunelet serve."
        )
    return ""


def system_of(renderer: Any) -> str | None:
    """The system message that a ChatML template puts in front where a conversation has none, "" for none; None where it
    is no ChatML."""
    from tunelet.data.examples import Message

    found = ""
    for conversation in CONVERSATIONS:
        try:
            said = renderer.string([Message(*one) for one in conversation], add_generation_prompt=True)
        except TuneletError:
            return None
        plain = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in conversation)
        plain += "<|im_start|>assistant\n"
        if conversation[0][0] != "system" and said != plain and (match := DEFAULT_SYSTEM.match(said)):
            found, said = match[1], said[match.end() :]
        if said != plain:
            return None
    return found


def _quoted(token: str) -> str:
    return '"' + token.replace("\\", "\\\\").replace('"', '\\"') + '"'
