"""The torch engine: batched and streamed generation on transformers models, with a KV cache; the reference for every
other engine.

Not for templates (data/render.py) and not for scoring (evals/). Exactness: greedy fp32 gives transformers' own ids;
what shares the batch with a prompt changes its logits by rounding only (other GEMM shapes), so equal up to exact ties
in fp32, a little less in bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tunelet.infer import stops
from tunelet.infer.request import Completion, check_prompt
from tunelet.infer.sampling import Sampler, Sampling
from tunelet.infer.text import TextStream
from tunelet.models import virtual

CACHE_MB = 1024  # rows of a batch are cut so that its KV cache stays below this


class TorchEngine:
    """Generation with a loaded transformers (or peft) model.

    `renderer` (data.render.Renderer) gives the stop tokens of the chat template; `stop_ids` overrides them.
    """

    def __init__(self, model: Any, tokenizer: Any, renderer: Any = None, *, stop_ids: Sequence[int] = ()):
        self.model, self.tokenizer, self.renderer = model, tokenizer, renderer
        eos = tokenizer.eos_token_id
        stops = stop_ids or (renderer.stop_ids if renderer is not None else ())
        self.stop_ids = frozenset(stops) or frozenset([eos] if eos is not None else [])

    @property
    def max_length(self) -> int:
        """How many tokens a prompt and its answer may have; 0: no limit."""
        most, own = context_length(self.model.config), virtual.of(self._causal())
        return max(1, most - own.number) if most and own else most

    def _causal(self) -> Any:
        """The transformers model inside, with what an adapter has put into its layers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    # -- many prompts -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        stop: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt (lists of token ids), in their order. temperature 0 is greedy.

        Prompts are answered in batches of about equal length, at most `batch_size` rows; a row that stops leaves its
        batch. Sampling draws from (seed, index of the prompt), whatever the batch. `stop`: texts before which an answer
        ends (stops.cut). `progress` is called with the number of prompts finished so far.
        Raises TuneletError where a prompt is empty or longer than the model reads.
        """
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
        for number, prompt in enumerate(prompts, 1):
            check_prompt(prompt, self.max_length, f"Prompt {number}")
        done: list[Completion | None] = [None] * len(prompts)
        finished, watch = 0, stops.Watch(self.tokenizer, stop)
        with self._inference():
            # longest first: the largest cache is needed at once, so a lack of memory shows at the start
            order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
            while order:
                rows = self._rows_that_fit(len(prompts[order[0]]), max_new_tokens, batch_size)
                batch, order = order[:rows], order[rows:]
                answers: dict[int, list[int]] = {index: [] for index in batch}
                asked = {index: prompts[index] for index in batch}
                for tokens in self._steps(asked, max_new_tokens, sampling, watch):
                    for index, token, finish in tokens:
                        if token is not None:
                            answers[index].append(token)
                        if finish:
                            ids = tuple(answers.pop(index))
                            text = stops.cut(self.tokenizer.decode(ids, skip_special_tokens=True), stop)
                            done[index] = Completion(text, ids, finish)
                            finished += 1
                    if progress is not None:
                        progress(finished)
        return [completion for completion in done if completion is not None]

    # -- one prompt, as it comes --------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer to one prompt in pieces of whole characters, as soon as they are there; together they are the
        answer's text. What may be the beginning of a `stop` text is held back until it is clear.

        The generator's return value is the Completion. Raises TuneletError as `generate` does, at the first piece.
        """
        check_prompt(prompt, self.max_length, "The conversation")
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
        text, ids, finish = TextStream(self.tokenizer, stop), [], "length"
        steps = self._steps({0: prompt}, max_new_tokens, sampling, stops.Watch(self.tokenizer, stop))
        while True:
            with self._inference():  # not around the yield: the caller's own torch work must not run in inference mode
                tokens = next(steps, None)
            if tokens is None:
                break
            _, token, ended = tokens[0]
            finish = ended or finish
            if token is not None:
                ids.append(token)
                if piece := text.push(token):
                    yield piece
        if piece := text.finish():
            yield piece
        return Completion(text.text, tuple(ids), finish)

    # -- the work -----------------------------------------------------------------------------------------------------

    def _steps(
        self, prompts: dict[int, Sequence[int]], max_new_tokens: int, sampling: Sampling, watch: stops.Watch
    ) -> Iterator[list[tuple[int, int | None, str]]]:
        """Decode `prompts` (index -> ids) together. Each step yields (index, token or None, why it ended or "") for
        every row still there; `watch` says which have come to a stop text.
        """
        import torch

        device = next(self.model.parameters()).device
        indices = list(prompts)
        lengths = torch.tensor([len(prompts[index]) for index in indices])
        longest = int(lengths.max())
        ids = torch.zeros(len(indices), longest, dtype=torch.int64)
        seen = torch.zeros(len(indices), longest + max_new_tokens, dtype=torch.int64)
        for row, index in enumerate(indices):  # padded on the left: all rows write the next token at the same place
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            seen[row, longest - len(prompts[index]) :] = 1
        positions = (seen[:, :longest].cumsum(1) - 1).clamp(min=0)
        ids, seen, positions = ids.to(device), seen.to(device), positions.to(device)
        room = [
            max_new_tokens if not self.max_length else min(max_new_tokens, self.max_length - int(n)) for n in lengths
        ]
        causal = self._causal()
        own, name = virtual.of(causal), virtual.cache_name(causal)
        before = own.number if own else 0
        cache = make_cache(self.model.config, before + longest + max_new_tokens)
        if own:
            own.fill(cache, causal, len(indices))
            positions += before
            seen = torch.cat([seen.new_ones(len(indices), before), seen], dim=1)
        sampler = Sampler(sampling, [prompts[index] for index in indices], indices, device)
        alive = list(range(len(indices)))  # row of the cache -> row of `indices`
        here = torch.ones(len(alive), dtype=torch.bool)  # rows of the cache still wanted
        for step in range(max_new_tokens):
            logits = causal(
                input_ids=ids,
                attention_mask=seen[:, : before + longest + step],
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            ).logits[:, -1]
            tokens = sampler.pick(logits.float())
            out: list[tuple[int, int | None, str]] = []
            for place, token in enumerate(tokens.tolist()):
                if not here[place]:
                    continue
                row = alive[place]
                stop = token in self.stop_ids
                finish = (
                    "stop"
                    if stop or watch.push(indices[row], token)
                    else ""
                    if step + 1 < room[row]
                    else "length"
                    if room[row] == max_new_tokens
                    else "context"
                )
                out.append((indices[row], None if stop else token, finish))
                if finish:
                    here[place] = False
            yield out
            left = int(here.sum())
            if not left:
                return
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            if left <= 0.9 * len(alive):  # copying the cache costs about a step: not for every single row
                keep = here.nonzero()[:, 0]
                places = keep.to(device)
                cache.batch_select_indices(places)
                ids, positions, seen = ids[places], positions[places], seen[places]
                sampler.keep(keep)
                alive = [alive[place] for place in keep.tolist()]
                here = torch.ones(left, dtype=torch.bool)

    def _rows_that_fit(self, length: int, max_new_tokens: int, batch_size: int) -> int:
        """How many rows of this length a batch may have: `batch_size`, less where their KV cache would be larger
        than CACHE_MB.
        """
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = next(self.model.parameters()).element_size()
        row = 2 * config.num_hidden_layers * heads * head_dim * size * (length + max_new_tokens)
        return max(1, min(batch_size, int(CACHE_MB * 1e6 / row)))

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients; the model is handed back in the mode it came in."""
        import torch

        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)


def context_length(config: Any) -> int:
    """How many tokens the model reads at most; 0 where its config sets no limit."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    return 0


def make_cache(config: Any, capacity: int) -> Any:
    """transformers' dynamic cache, its full-attention layers written in place instead of copied whole at every step."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from tunelet.infer.cache import RoomyLayer

    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
