"""Runs one transformers decoder model: token ids in, the logits of the next token out, keys and values kept between.

What a model must be for this to be exact is checked once, when the runner is made, and again on the first cache that
comes back: a model whose state is more than keys and values is refused, never run wrongly. Costs one forward pass per
call; the cache takes `2 * layers * kv_heads * head_dim * itemsize` bytes a token (see `kv`). Rows of unlike lengths
decode as one batch where a trial has shown that each then computes what it would alone. Taught in chapters 04 and 07.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import ModelError
from sllm_mini.inference.attention import use_product_attention
from sllm_mini.inference.context import context_limit
from sllm_mini.inference.masks import Masks

if TYPE_CHECKING:
    import torch

    from sllm_mini.device.base import Device
    from sllm_mini.inference.attention import DecodeAttention, ProductAttention
    from sllm_mini.inference.kv import SlotCache


class Runner:
    """A decoder model and the facts about it that a generation needs.

    `vocabulary` counts the ids it takes, `context_limit` the positions (None: no limit), `eos_ids` end a text,
    `bos_id` begins one. Puts the model into eval mode, and one in half precision on a CPU onto our own attention (`attention`). Raises ModelError for a model that cannot be run exactly this
    way: one that does not generate, has an encoder, takes more than text, or whose cache holds recurrent state.
    One thread at a time; calls on different caches may be interleaved.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._check_head()
        self.config = model.eval().config
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._check_kind()
        self._check_cache()
        embedding = model.get_input_embeddings()
        self.vocabulary = int(embedding.weight.shape[0])
        self.device: torch.device = embedding.weight.device
        self.context_limit = context_limit(self.config.to_dict())
        generation = getattr(model, "generation_config", None) or self.config
        self.eos_ids = _as_ids(generation.eos_token_id)
        self.bos_id = next(iter(_as_ids(getattr(generation, "bos_token_id", None))), None)
        self.dtype: torch.dtype = embedding.weight.dtype
        self._attention: DecodeAttention | ProductAttention | None = use_product_attention(model)
        self._masks = Masks(model, self.windows, self.dtype, own_attention=self._attention is not None)
        self._can_batch: bool | None = None
        self._positions: torch.Tensor | None = None
        self._cache_proven = False

    def use_decode_kernel(self, device: Device) -> None:
        """From now on a step of one token per row attends by our own kernel. Raises as `use_decode_attention` does, and changes
        nothing then."""
        from sllm_mini.inference.attention import use_decode_attention

        self._attention = use_decode_attention(self.model, device)
        self._masks, self._can_batch = Masks(self.model, self.windows, self.dtype, own_attention=True), None

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def _refuse(self, why: str) -> ModelError:
        return ModelError(f"{self.name} cannot be run by this engine: {why}; use a decoder-only text model such as Llama, Qwen2, GPT-2 or OPT")

    def _check_head(self) -> None:
        can_generate = getattr(self.model, "can_generate", None)
        if not callable(can_generate) or not can_generate():
            raise self._refuse("it has no head that predicts the next token")

    def _check_kind(self) -> None:
        config = self.config
        if getattr(config, "is_encoder_decoder", False):
            raise self._refuse("it has an encoder beside its decoder")
        # An encoder turned decoder (`is_decoder`) counts positions in ways of its own, RoBERTa's from the padding id.
        both_ways = getattr(config, "is_causal", True) is False or getattr(config, "is_decoder", False)
        if both_ways or any(getattr(module, "is_causal", True) is False for module in self.model.modules()):
            raise self._refuse("it is built as an encoder, which reads text in both directions")
        if config.get_text_config(decoder=True) is not config:
            raise self._refuse("it takes more than text")
        if "past_key_values" not in self._parameters:
            raise self._refuse("the state it carries from token to token is not a cache of keys and values")

    def _check_cache(self) -> None:
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        try:
            layers = self.new_cache().layers
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise self._refuse(f"transformers makes no cache for its configuration ({type(error).__name__}: {error})") from error
        for layer in layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise self._refuse(f"its cache has a {type(layer).__name__}, which holds more than keys and values")
        self.windows: list[int | None] = [getattr(layer, "sliding_window", None) for layer in layers]

    def new_cache(self) -> Any:
        """An empty cache of the kind this model needs (full attention or sliding window, layer by layer)."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def check_prompt(self, token_ids: Sequence[int], max_new_tokens: int) -> None:
        """Raises ModelError for an id outside the vocabulary or a text that would outgrow the context, naming both figures."""
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.vocabulary:
                raise ModelError(
                    f"token {index} of the prompt is {token_id}, but this model's ids go from 0 to {self.vocabulary - 1:,}; "
                    "use the tokenizer that belongs to the model"
                )
        total, limit = len(token_ids) + max_new_tokens, self.context_limit
        if limit is not None and total > limit:
            room = limit - len(token_ids)
            advice = f"ask for at most {room:,} new tokens" if room > 0 else f"shorten the prompt to fewer than {limit:,} tokens"
            raise ModelError(
                f"a prompt of {len(token_ids):,} tokens and {max_new_tokens:,} new ones make {total:,}, "
                f"but this model's context is {limit:,} tokens; {advice}"
            )

    def new_slots(self) -> SlotCache:
        """An empty cache in slots, with the windows of this model's layers."""
        from sllm_mini.inference.kv import SlotCache

        return SlotCache(self.windows)

    def extend(self, cache: SlotCache, row: int, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[1, vocabulary]` of the token that follows; one row of a cache grows by `token_ids`, int64 `[1, n]` on `device`.

        Prefill, decode and the recomputation after a move are this one call with different n. Positions are given
        explicitly and nothing is masked, so that a token equal to the padding id counts as any other. Does not wait
        for a GPU. Raises ModelError if the model did not put the tokens into the cache it was given.
        """
        import torch

        ntokens, length = token_ids.shape[1], cache.lengths[row] + token_ids.shape[1]
        # Entered per call: a generator that held the mode across a yield would leave its consumer in it.
        with torch.inference_mode():
            cache.start_pass(row, 1, ntokens)
            positions = self._upto(length)[:, length - ntokens :]
            with self._attending(positions, length) if ntokens == 1 else nullcontext():
                logits = self._forward(token_ids, cache, positions, length, None)
        cache.end_pass(row, 1, ntokens)
        return logits

    def decode(self, cache: SlotCache, token_ids: torch.Tensor) -> torch.Tensor:
        """One token `[rows, 1]` for each of the first rows of a cache: logits `[rows, vocabulary]`.

        Rows of one length need no mask. With unlike lengths each row attends to its own tokens only; use it only if
        `can_batch`.
        """
        import torch

        count = token_ids.shape[0]
        lengths = cache.lengths[:count]
        longest = max(lengths)
        with torch.inference_mode():
            if min(lengths) == longest:
                cache.start_pass(0, count, 1)
                positions, mask = self._upto(longest + 1)[:, longest:].expand(count, 1), None
            else:
                index = torch.tensor(lengths).to(self.device, non_blocking=True)
                seen = self._attention.seen(longest + 1) if self._attention is not None else longest + 1
                counting = self._upto(max(seen, count))
                cache.start_pass(0, count, 1, counting[0, :count], index, seen=seen)
                positions = index.unsqueeze(1)
                mask = self._masks.of(counting[:, None, None, :seen], positions[:, None, None])
            with self._attending(positions, longest + 1):
                logits = self._forward(token_ids, cache, positions, longest + 1, mask)
        cache.end_pass(0, count, 1)
        return logits

    def prefill(self, cache: SlotCache, row: int, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Several prompts in one pass, one after the other without padding: logits `[prompts, vocabulary]`, and their tokens
        in the empty rows from `row` on. Costs one read of the weights where each alone would cost its own, and a mask of
        as many tokens squared. Each prompt attends to itself only; use it only if `can_batch`."""
        import torch

        lengths = [len(prompt) for prompt in prompts]
        with torch.inference_mode():
            token_ids = torch.tensor(list(chain.from_iterable(prompts)))
            owners = torch.tensor([owner for owner, length in enumerate(lengths) for _ in range(length)])
            ends = torch.tensor(lengths).cumsum(0)
            places = torch.cat([torch.arange(length) for length in lengths])
            ids, rows, positions = torch.stack([token_ids, row + owners, places]).to(self.device)  # one copy to the device
            cache.start_packed(lengths, rows, positions)
            mask = self._masks.of(positions[None, None, None, :], positions[None, None, :, None], (rows == rows[:, None])[None, None])
            logits = self._forward(ids[None], cache, positions[None], len(ids), mask, (ends - 1).to(self.device))
        for filled, length in enumerate(lengths, row):
            cache.end_pass(filled, 1, length)
        return logits

    @contextmanager
    def keeping_states(self) -> Iterator[list[torch.Tensor]]:
        """Around passes: the last hidden states of each, after the model's final norm, `[rows, tokens, width]`. Raises ModelError for a model
        that has none apart from its head."""
        body = self.model.get_decoder()
        if body is None or body is self.model:
            raise self._refuse("it tells no hidden states apart from its head, so it has no embeddings")
        states: list[torch.Tensor] = []
        hook = body.register_forward_hook(lambda _module, _args, output: states.append(output[0]))
        try:
            yield states
        finally:
            hook.remove()

    def _attending(self, positions: torch.Tensor, longest: int) -> AbstractContextManager[None]:
        """Around a pass of one token per row at these `positions` `[rows, 1]`."""
        if self._attention is None:
            return nullcontext()
        import torch

        from sllm_mini.inference.attention import decoding

        return decoding(self._attention, (positions[:, 0] + 1).to(torch.int32), longest)

    def _upto(self, length: int) -> torch.Tensor:
        """The positions `[1, length]`, counted once."""
        import torch

        if self._positions is None or self._positions.shape[1] < length:
            self._positions = torch.arange(max(2 * length, 256), device=self.device).unsqueeze(0)
        return self._positions[:, :length]

    def _forward(self, token_ids: torch.Tensor, cache: Any, positions: torch.Tensor, length: int, mask: Any, ends: torch.Tensor | None = None) -> torch.Tensor:
        """Logits after the last token of each row, or after those of the one row that `ends` (int64, on the device) names."""
        kwargs: dict[str, Any] = {"input_ids": token_ids, "past_key_values": cache, "use_cache": True, "return_dict": True}
        if "position_ids" in self._parameters:
            kwargs["position_ids"] = positions
        if mask is not None:
            kwargs["attention_mask"] = mask
        if "logits_to_keep" in self._parameters:
            # Of several tokens, the last one by its index: the number 1 would be a slice that keeps the strides of
            # the whole, for which torch (2.13, on a CPU) copies the head's weights before it multiplies with them.
            n = token_ids.shape[1]
            kwargs["logits_to_keep"] = ends if ends is not None else 1 if n == 1 else self._upto(n)[0, n - 1 :]
        found = self.model(**kwargs).logits
        if ends is None:
            logits: torch.Tensor = found[:, -1]
        else:
            logits = found[0] if found.shape[1] == len(ends) else found[0, ends]
        if not self._cache_proven:
            if cache.get_seq_length() != length:
                raise self._refuse("it does not keep its keys and values in the cache it is given")
            self._cache_proven = True
        return logits

    # --- batches of unlike lengths ------------------------------------------------------------------------------------

    @property
    def can_batch(self) -> bool:
        """Whether rows of unlike lengths can decode, and prompts be read, in one pass. The first look costs six short passes: a
        trial of two texts against each alone. Where not (ALiBi, masks of a model's own), requests are to be run one by one."""
        if self._can_batch is None:
            self._can_batch = self._masks.known and self._trial()
        return self._can_batch

    def _trial(self) -> bool:
        """Two texts of unlike lengths, together and alone, in caches of their own. What goes wrong with one alone, or for want
        of memory, says nothing about masks and is raised."""
        import torch

        if self.context_limit is not None and self.context_limit < 8:
            return False  # no room for the trial
        apart, joint = self.new_slots(), self.new_slots()
        prompts = [[(3 + 7 * step) % self.vocabulary for step in range(n)] for n in (7, 3)]
        token = torch.tensor([[5 % self.vocabulary]], device=self.device)
        ends, nexts = [], []
        for prompt in prompts:
            row = apart.add_row()
            joint.add_row()
            ends.append(self.extend(apart, row, torch.tensor([prompt], device=self.device)))
            nexts.append(self.extend(apart, row, token))
        try:
            together = torch.stack([self.prefill(joint, 0, prompts), self.decode(joint, token.expand(2, 1))]).double()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return False  # it takes no such mask
        expected = torch.stack([torch.cat(ends), torch.cat(nexts)]).double()
        errors = (together - expected).flatten(1).norm(dim=1) / (expected - expected.mean(-1, keepdim=True)).flatten(1).norm(dim=1)
        return bool(errors.max() < (1e-3 if self.dtype == torch.float32 else 0.05))


def _as_ids(value: Any) -> frozenset[int]:
    """Token ids as transformers' configurations write them: one number, several, or None."""
    if value is None:
        return frozenset()
    return frozenset(int(item) for item in value) if isinstance(value, (list, tuple)) else frozenset({int(value)})
