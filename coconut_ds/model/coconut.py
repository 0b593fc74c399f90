"""The latent loop of Coconut (chain of continuous thought).

A continuous thought is a hidden state of the model, fed back as the next input embedding in place of a token:

    columns   0 ............ first_latent   +1   +2 ................ T
    pass 0    [ the question and <start>  )
    pass 1                                [L0)
    pass 2                                     [L1, <end>, the labels)

Source: Coconut, arXiv 2412.06769, section 3; the passes are split as in its released code.

Shapes: B rows, T columns, N supervised positions, D hidden size, V vocabulary; in the cache of an answer K
key-value heads, S new columns, E head size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch, refuse_long_prompts
from coconut_ds.distributed import phase
from coconut_ds.model.techniques import Techniques
from coconut_ds.model.techniques.passes import Pass
from coconut_ds.runs.changes import BaseRecord
from coconut_ds.thoughts import History, Thought

if TYPE_CHECKING:  # importing PEFT is slow, and only LoRA runs need it
    from peft import PeftModel

# (logits_BV, the rows of the batch) -> token_B
Choose = Callable[[Tensor, Sequence[int]], Tensor]
# Finished rows are dropped from the cache once at most this share of its rows is unfinished.
WORTH_DROPPING = 0.75


def most_likely(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
    """The greedy choice."""
    return logits_BV.argmax(dim=-1)


class Coconut(nn.Module):
    """A Hugging Face causal LM that fills its latent slots with continuous thoughts.

    `forward` returns the training loss of a batch, `generate` answers its prompts.
    """

    def __init__(
        self, base: "PreTrainedModel | PeftModel", thought: Thought, latent_memory: LatentMemory
    ) -> None:
        super().__init__()
        self.base = base
        self.thought = thought
        self.techniques = Techniques(self.causal_lm, latent_memory)
        self.base_record: BaseRecord | None = None  # of the model before training
        self.latent_weight = 0.0  # of the latents' targets in the loss
        self.latent_loss: Tensor | None = None  # share of the last batch, detached; None without targets

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model, with its adapters."""
        if isinstance(self.base, PreTrainedModel):
            return self.base
        return cast(PreTrainedModel, self.base.get_base_model())

    @property
    def num_positions(self) -> int | None:
        """Limit of tokens and latents in a row; None if the model has no limit."""
        return getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)

    @property
    def embedding(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    def forward(self, batch: Batch) -> Tensor:
        """This batch's share of the loss, a scalar in fp32.

        loss = sum(text losses) / loss_denominator + latent_weight * sum(latent losses) / latent_denominator
        """
        with self.techniques.training_forward(passes_of(batch), batch) as cache:
            hidden_BTD = torch.cat(list(self._passes(batch, cache)), dim=1)
            losses_N = self.techniques.losses(hidden_BTD, batch, self.head)
        num_text, self.latent_loss = len(losses_N) - batch.num_latent_targets, None
        loss = losses_N[:num_text].sum() / batch.loss_denominator
        if batch.latent_denominator:
            latent_loss = losses_N[num_text:].sum() / batch.latent_denominator
            self.latent_loss = latent_loss.detach()
            loss = loss + self.latent_weight * latent_loss
        return loss if batch.num_latents else loss + self._zero_of_thought(hidden_BTD, batch)

    def _zero_of_thought(self, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """0, with a gradient of zeros for a thought that no column uses.

        Without a gradient, DeepSpeed's optimizer offload would apply the one an earlier micro-batch left on
        the host.
        """
        history = History()
        history.append(hidden_BTD[:, :1].detach(), torch.ones_like(batch.attention_mask_BT[:, :1]))
        return self.thought(history)[:0].sum()

    def hidden_states(self, batch: Batch) -> Tensor:
        """Hidden states of every column after the final norm, hidden_BTD."""
        with self.techniques.training_forward(passes_of(batch), batch) as cache:
            return torch.cat(list(self._passes(batch, cache)), dim=1)

    def _passes(self, batch: Batch, cache: Cache | None) -> Iterator[Tensor]:
        """Yield the hidden states of each pass; `cache` holds the keys and values of all passes.

        Without latents there is a single pass and no need for a cache.
        """
        passes = passes_of(batch)
        mask_BT = batch.attention_mask_BT.bool()
        token_embeds = iter(self.embedding(batch.input_ids_BT).split(_pieces(passes), dim=1))
        slots = torch.arange(batch.num_latents, device=mask_BT.device)
        is_latent = iter((batch.latents_per_row_B[:, None] > slots)[..., None, None].unbind(1))
        history = History()
        for run in passes:
            embeds_BTD = next(token_embeds)
            if run.past:
                embeds_BTD = torch.where(next(is_latent), self.thought(history)[:, None], embeds_BTD)
                if run.stop - run.start > 1:
                    embeds_BTD = torch.cat([embeds_BTD, next(token_embeds)], dim=1)
            hidden_BTD = self._advance(embeds_BTD, batch, mask_BT, run, cache)
            history.append(hidden_BTD, mask_BT[:, run.start : run.stop])
            yield hidden_BTD

    def _advance(
        self, embeds_BTD: Tensor, batch: Batch, mask_BT: Tensor, run: Pass, cache: Cache | None
    ) -> Tensor:
        """One pass of the backbone."""
        positions_BT = batch.position_ids_BT[:, run.start : run.stop]
        read = partial(self._read, cache=cache)
        return self.techniques.advance(run, embeds_BTD, mask_BT[:, : run.stop], positions_BT, read)

    def _read(self, embeds_BTD: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Cache | None) -> Tensor:
        return self.causal_lm.get_decoder()(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            # The model writes the given cache anyway; the flag would only make it create one, or warn.
            use_cache=False,
        ).last_hidden_state

    @torch.no_grad()
    @phase("generation")
    def generate(
        self,
        batch: Batch,
        max_new_tokens: int,
        eos_id: int,
        agree: Callable[[bool], bool] = lambda done: done,
        choose: Choose = most_likely,
    ) -> list[list[int]]:
        """Answers to a batch of prompts, each cut before its eos token; greedy unless `choose` is given.

        `agree` turns "this rank is done" into "all ranks are done": under ZeRO-3 all ranks must run the same
        number of passes.
        """
        answers: list[list[int]] = [[] for _ in range(batch.shape[0])]
        for new_tokens in self.stream(batch, max_new_tokens, eos_id, agree, choose):
            for row, token in new_tokens.items():
                answers[row].append(token)
        return answers

    @torch.no_grad()
    def stream(
        self,
        batch: Batch,
        max_new_tokens: int,
        eos_id: int,
        agree: Callable[[bool], bool] = lambda done: done,
        choose: Choose = most_likely,
    ) -> Iterator[dict[int, int]]:
        """Yield {row: token} of the unfinished answers, step by step; arguments as in `generate`.

        An answer also ends when its row has no position left, independently of the other rows.
        Raises DataError, before the first pass, for a prompt longer than the model's positions.
        """
        limits, columns = self._limits(batch, max_new_tokens), batch.shape[1]
        cache = AnswerCache(self.causal_lm.config.num_hidden_layers, columns + max_new_tokens)
        mask_BT = F.pad(batch.attention_mask_BT, (0, max_new_tokens), value=1)
        hidden_BD, position_B = self.read_prompts(batch, cache)
        last_position_B = position_B + torch.tensor(limits, device=mask_BT.device) - 1
        rows, open_rows = list(range(len(limits))), set(range(len(limits)))  # in the cache; not finished
        for step in range(1, max_new_tokens + 1):
            token_B = choose(self.head(hidden_BD), rows)
            tokens = dict(zip(rows, token_B.tolist(), strict=True))
            open_rows -= {row for row, token in tokens.items() if token == eos_id}
            yield {row: tokens[row] for row in rows if row in open_rows}
            open_rows -= {row for row in open_rows if step == limits[row]}
            if step == max_new_tokens or agree(not open_rows):
                return
            if 0 < len(open_rows) <= WORTH_DROPPING * len(rows):
                kept = [index for index, row in enumerate(rows) if row in open_rows]
                kept_B = torch.tensor(kept, device=mask_BT.device)
                cache.keep(kept_B)
                mask_BT, token_B = mask_BT[kept_B], token_B[kept_B]
                position_B, last_position_B = position_B[kept_B], last_position_B[kept_B]
                rows = [rows[index] for index in kept]
            position_B = torch.minimum(position_B + 1, last_position_B)  # a finished row may still run
            columns += 1
            hidden_BD = self.read_tokens(token_B, mask_BT[:, :columns], position_B, cache)

    def read_prompts(self, batch: Batch, cache: "AnswerCache") -> tuple[Tensor, Tensor]:
        """Fill `cache`; return (hidden_BD, position_B) of each row's last token."""
        columns_T = torch.arange(batch.shape[1], device=batch.attention_mask_BT.device)
        last_B = (batch.attention_mask_BT * columns_T).argmax(dim=1)
        all_B = torch.arange(len(last_B), device=last_B.device)
        hidden_BTD = torch.cat(list(self._passes(batch, cache)), dim=1)
        return hidden_BTD[all_B, last_B], batch.position_ids_BT[all_B, last_B]

    def read_tokens(
        self, token_B: Tensor, mask_BT: Tensor, position_B: Tensor, cache: "AnswerCache"
    ) -> Tensor:
        """Read one more token per row; `mask_BT` covers the cached columns and the new one."""
        embeds_B1D = self.embedding(token_B[:, None])
        return self._read(embeds_B1D, mask_BT, position_B[:, None], cache)[:, -1]

    def _limits(self, batch: Batch, max_new_tokens: int) -> list[int]:
        """Limit of answer tokens per row; the last token is never read, so it needs no position."""
        lengths = batch.attention_mask_BT.sum(1).tolist()
        refuse_long_prompts(lengths, self.num_positions, "row")
        if self.num_positions is None:
            return [max_new_tokens] * len(lengths)
        return [min(max_new_tokens, self.num_positions - length + 1) for length in lengths]


def passes_of(batch: Batch) -> list[Pass]:
    """The question, each latent but the last, and the last latent with all columns behind it."""
    if batch.num_latents == 0:
        return [Pass(0, batch.shape[1])]
    first, last = batch.first_latent, batch.first_latent + batch.num_latents - 1
    stops = [*range(first, last + 1), batch.shape[1]]
    later = [Pass(start, stop, past=((0, start),)) for start, stop in zip(stops, stops[1:], strict=False)]
    return [Pass(0, first), *later]


def _pieces(passes: Sequence[Pass]) -> list[int]:
    """Widths of the token embeddings' parts; in a later pass, the latent slot is a part of its own."""
    pieces = []
    for run in passes:
        width = run.stop - run.start
        pieces += [1, width - 1] if run.past and width > 1 else [width]
    return pieces


class AnswerLayer(CacheLayerMixin):
    """One layer's keys and values, [B, K, columns, E]; the first `length` columns are filled."""

    is_sliding = False
    keys: Any  # a Tensor after the first update
    values: Any

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys = _allocate(key_states, self.columns)
        self.values = _allocate(value_states, self.columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, K, S, E]; returns all filled columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers before 5.20."""
        return -1


class AnswerCache(Cache):
    """A cache of `num_layers` layers with room for `columns` columns."""

    def __init__(self, num_layers: int, columns: int) -> None:
        super().__init__(layers=[AnswerLayer(columns) for _ in range(num_layers)])

    def fill(self, columns: int) -> None:
        """Mark the first `columns` as filled, for a run on fake tensors."""
        for layer in self.layers:
            assert isinstance(layer, AnswerLayer)
            layer.length = columns

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for layer in self.layers:
            assert isinstance(layer, AnswerLayer)
            layer.keep(rows)


def _allocate(states_BKSE: Tensor, columns: int) -> Tensor:
    B, K, _, E = states_BKSE.shape
    return torch.empty(B, K, columns, E, dtype=states_BKSE.dtype, device=states_BKSE.device)
