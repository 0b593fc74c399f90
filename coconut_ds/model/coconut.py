"""The latent loop: a causal language model whose last hidden state becomes its next input embedding.

    columns   0 ............ first_latent   +1   +2 ................ T
    pass 0    [ the question and <start>  )
    pass 1                                [L0)
    pass 2                                     [L1, <end>, the labels)

Knows: batches, thoughts, Hugging Face models.  Does not know: stages, ranks, DeepSpeed.
Source: Coconut, arXiv 2412.06769, section 3; the passes are cut as in its released code.

Shapes: B rows, T columns, N supervised positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from coconut_ds.batching import Batch
from coconut_ds.ds_config import LatentMemory
from coconut_ds.model.techniques import Techniques
from coconut_ds.thoughts import History, Thought


class Coconut(nn.Module):
    """A Hugging Face causal LM that fills its latent slots with thoughts.

    `forward` gives the training loss of a batch, `generate` answers its prompts.
    """

    def __init__(
        self, base: PreTrainedModel | PeftModel, thought: Thought, latent_memory: LatentMemory
    ) -> None:
        super().__init__()
        self.base = base
        self.thought = thought
        self.techniques = Techniques(self.causal_lm, latent_memory)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model, adapters inside it."""
        return self.base.get_base_model() if isinstance(self.base, PeftModel) else self.base

    @property
    def embedding(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses of `batch` over `batch.loss_denominator`: a scalar, fp32."""
        with self.techniques.training_forward() as cache:
            hidden_BTD = torch.cat(list(self._passes(batch, cache)), dim=1)
            return self.techniques.loss(hidden_BTD, batch, self.head) / batch.loss_denominator

    def hidden_states(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm of every column, hidden_BTD."""
        with self.techniques.training_forward() as cache:
            return torch.cat(list(self._passes(batch, cache)), dim=1)

    def _passes(self, batch: Batch, cache: Cache) -> Iterator[Tensor]:
        """Yield the hidden states of each pass; `cache` holds the keys and values of all of them."""
        token_embeds_BTD = self.embedding(batch.input_ids_BT)
        columns = batch.shape[1]
        if batch.num_latents == 0:
            yield self._advance(token_embeds_BTD, batch, 0, cache)
            return
        history = History()
        embeds_BTD, start = token_embeds_BTD[:, : batch.first_latent], 0
        last = batch.first_latent + batch.num_latents - 1
        for column in range(batch.first_latent, last + 1):
            hidden_BTD = self._advance(embeds_BTD, batch, start, cache)
            history.append(hidden_BTD, batch.attention_mask_BT[:, start:column])
            yield hidden_BTD
            thought_BD = self.thought(history)
            slot_BD = torch.where(batch.is_latent_B(column)[:, None], thought_BD, token_embeds_BTD[:, column])
            stop = column + 1 if column < last else columns
            embeds_BTD = torch.cat([slot_BD[:, None], token_embeds_BTD[:, column + 1 : stop]], dim=1)
            start = column
        yield self._advance(embeds_BTD, batch, start, cache)

    def _advance(self, embeds_BTD: Tensor, batch: Batch, start: int, cache: Cache) -> Tensor:
        """One pass of the backbone over the columns from `start` on."""
        stop = start + embeds_BTD.shape[1]
        return self._read(
            embeds_BTD, batch.attention_mask_BT[:, :stop], batch.position_ids_BT[:, start:stop], cache
        )

    def _read(self, embeds_BTD: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Cache) -> Tensor:
        return self.causal_lm.get_decoder()(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            # The cache is written all the same; the flag would only have the model make one, or warn.
            use_cache=False,
        ).last_hidden_state

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        max_new_tokens: int,
        eos_id: int,
        agree: Callable[[bool], bool] = lambda done: done,
    ) -> list[list[int]]:
        """Greedy answers to a batch of prompts, each cut before its eos token.

        `agree` turns "my rows are done" into "everybody's are": under ZeRO-3 all ranks must run the same
        number of passes.
        """
        cache = DynamicCache(config=self.causal_lm.config)
        hidden_BTD = torch.cat(list(self._passes(batch, cache)), dim=1)
        mask_BT = batch.attention_mask_BT
        last_B = (mask_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).argmax(dim=1)
        rows_B = torch.arange(len(last_B), device=last_B.device)
        hidden_BD = hidden_BTD[rows_B, last_B]
        position_B = batch.position_ids_BT[rows_B, last_B]
        done_B = torch.zeros_like(last_B, dtype=torch.bool)
        new_tokens: list[Tensor] = []
        while True:
            token_B = self.head(hidden_BD).argmax(dim=-1).masked_fill(done_B, eos_id)
            new_tokens.append(token_B)
            done_B = done_B | (token_B == eos_id)
            if len(new_tokens) == max_new_tokens or agree(bool(done_B.all())):
                break
            position_B = position_B + 1
            mask_BT = F.pad(mask_BT, (0, 1), value=1)
            hidden_BD = self._read(
                self.embedding(token_B[:, None]), mask_BT, position_B[:, None], cache
            )[:, -1]
        answers = torch.stack(new_tokens, dim=1).tolist()
        return [row[: row.index(eos_id)] if eos_id in row else row for row in answers]
