"""Virtual tokens: trained positions in front of every row, for prompt tuning and prefix tuning. Not for how they are
trained, and not for adapters inside layers (adapters.py).

Prompt tuning (Lester et al., arXiv:2104.08691) trains embeddings; prefix tuning (Li & Liang, arXiv:2101.00190) the keys
and values of every layer. The parameters are peft's own modules, so that peft saves and loads them; its forward, which
pads rows and knows nothing of a flat stream, is not used: rows are widened here instead, and a generation's cache is
filled with them before its first token.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tunelet.data.examples import Batch
from tunelet.data.pack import MULTIPLE

PLACE = "_tunelet_virtual"


@dataclass(frozen=True)
class Prefix:
    """Keys and values that take the place of a model's own at some positions of a flat stream.

    where: [rows * n] positions in the stream; layers: for each layer keys and values, [n, KV, D] each."""

    where: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values: [T, KV, D], without change; the same with this layer's own in place."""
        k, v = (own.repeat(len(self.where) // len(own), 1, 1) for own in self.layers[layer])
        return keys.index_copy(0, self.where, k), values.index_copy(0, self.where, v)


@dataclass
class Virtual:
    """The virtual tokens of an adapter.

    encoder: peft's module, whose `embedding.weight` is what is trained: [n, hidden] for a prompt, [n, layers * 2 * KV *
    D] for a prefix; heads: (layers, KV, D) of a prefix, None for a prompt; begun: a copy of the weight as it began.
    """

    encoder: nn.Module
    heads: tuple[int, int, int] | None
    begun: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.encoder.embedding.weight

    @property
    def number(self) -> int:
        return self.weight.shape[0]

    def norm(self) -> float:
        """Mean Euclidean length of a virtual token."""
        return float(self.weight.detach().float().norm(dim=1).mean())

    def moved(self) -> float:
        """How far training has come: the length of the change, as a share of where it began."""
        begun = self.begun.float()
        return float((self.weight.detach().float().cpu() - begun).norm() / begun.norm().clamp(min=1e-12))

    def layers(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Of a prefix: keys and values of each layer, [n, KV, D] each, as peft lays them out."""
        layers, heads, dim = self.heads
        parts = self.weight.view(self.number, layers, 2, heads, dim)
        return tuple((parts[:, layer, 0], parts[:, layer, 1]) for layer in range(layers))

    def widened(self, batch: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """(the batch with n positions before every row, [tokens] where each of its tokens went, [rows * n] where the
        virtual tokens are). Their ids mean nothing."""
        n, device = self.number, batch.input_ids.device
        rows = len(batch.segments) - 1
        lengths = batch.segments.diff()
        tokens = int(batch.segments[-1])
        owner = torch.repeat_interleave(torch.arange(rows), lengths).to(device)
        real = torch.arange(tokens, device=device) + n * (owner + 1)
        segments = batch.segments + n * torch.arange(rows + 1)
        where = (segments[:-1, None] + torch.arange(n)).flatten().to(device)
        size = -(-int(segments[-1]) // MULTIPLE) * MULTIPLE
        ids, positions = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        ids[real] = batch.input_ids[:tokens]
        positions[real] = batch.position_ids[:tokens] + n
        positions[where] = torch.arange(n, device=device).repeat(rows)
        wide = replace(
            batch,
            input_ids=ids,
            position_ids=positions,
            segments=segments,
            loss_at=real[batch.loss_at],
            branches=tuple(
                tuple(start + n * (row + 1) for start in starts) for row, starts in enumerate(batch.branches)
            ),
        )
        return wide, real, where

    def embedded(self, lm: Any, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[T, hidden]: the embeddings of a widened stream's ids; a prompt's own where its virtual tokens are."""
        embeddings = lm.get_input_embeddings()(ids)
        if self.heads:
            return embeddings
        return embeddings.index_copy(0, where, self.weight.to(embeddings.dtype).repeat(len(where) // self.number, 1))

    def before(self, lm: Any, ids: torch.Tensor) -> torch.Tensor:
        """[n + L, hidden]: a prompt and the embeddings of one row's ids."""
        embeddings = lm.get_input_embeddings()(ids)
        return torch.cat([self.weight.to(embeddings.dtype), embeddings])

    def fill(self, cache: Any, lm: Any, rows: int) -> None:
        """Put the virtual tokens into the empty cache of `rows` rows."""
        if self.heads:
            for layer, pair in enumerate(self.layers()):
                cache.update(*(x.transpose(0, 1).expand(rows, -1, -1, -1).contiguous() for x in pair), layer)
            return
        dtype = lm.get_input_embeddings().weight.dtype
        lm(
            inputs_embeds=self.weight.to(dtype).expand(rows, -1, -1),
            position_ids=torch.arange(self.number, device=self.weight.device).expand(rows, -1),
            use_cache=True,
            logits_to_keep=1,
            **{cache_name(lm): cache},
        )


def of(lm: Any) -> Virtual | None:
    """The virtual tokens in front of a transformers model's rows, if it has any."""
    return getattr(lm, PLACE, None)


def made(model: Any, name: str) -> Virtual:
    """The virtual tokens that a PeftModel's adapter consists of, in its model's dtype. Raises ValueError where they are
    not of the model's sizes."""
    config, encoder = model.peft_config[name], model.prompt_encoder[name]
    lm = model.get_base_model()
    base, text = lm.get_input_embeddings().weight, lm.config.get_text_config()
    encoder.to(device=base.device, dtype=base.dtype)
    heads = None
    wanted, there = base.shape[1], encoder.embedding.weight.shape[1]
    if config.peft_type == "PREFIX_TUNING":
        heads = (config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)
        own = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        wanted, there = (text.num_hidden_layers, own, dim), heads
    if wanted != there:
        raise ValueError(f"size mismatch: its virtual tokens have {there} numbers, the model's {wanted}")
    return Virtual(encoder, heads, encoder.embedding.weight.detach().clone().float().cpu())


def attach(model: Any) -> Virtual | None:
    """Put the virtual tokens of a PeftModel's adapter in front of its base model's rows; None for an adapter of another
    kind."""
    name = model.active_adapter
    if not model.peft_config[name].is_prompt_learning:
        return None
    own = made(model, name)
    setattr(model.get_base_model(), PLACE, own)
    return own


def cache_name(lm: Any) -> str:
    """What the model's forward calls its cache: transformers 5.24 says cache, and will forget the older name."""
    return "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """`with switched_off(model):` its rows have no virtual tokens in front."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = of(lm)
    setattr(lm, PLACE, None)
    try:
        yield
    finally:
        setattr(lm, PLACE, kept)


@torch.no_grad()
def first_weights(lm: Any, ids: torch.Tensor | None, number: int, prefix: bool) -> torch.Tensor:
    """[number, ...] fp32: where virtual tokens begin. ids: tokens whose embeddings (for a prefix: keys and values) they
    take, repeated or cut to `number`; None: random numbers as large as those of random tokens."""
    embedding = lm.get_input_embeddings()
    device = embedding.weight.device
    chosen = (
        torch.randint(0, embedding.weight.shape[0], (number,)) if ids is None else ids.repeat(-(-number // len(ids)))
    )
    chosen = chosen[:number].to(device)
    if prefix:
        from transformers import DynamicCache

        cache = DynamicCache(config=lm.config.get_text_config())
        lm(input_ids=chosen[None], use_cache=True, logits_to_keep=1, **{cache_name(lm): cache})
        layers = [torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2) for layer in cache.layers]
        found = torch.stack(layers).float().permute(2, 0, 1, 3, 4)  # [n, layers, 2, KV, D]
        scale = found.std(dim=(0, 3, 4), keepdim=True)
    else:
        found = embedding(chosen).float()
        scale = found.std()
    if ids is None:
        found = torch.randn(found.shape).to(device) * scale
    return found.flatten(1)
