"""The latent loop as it is published, written plainly: what the techniques are measured and proved against.

A DynamicCache that concatenates, logits of every column in every pass, copies of the embeddings to fill in a
thought, one shifted cross-entropy over all columns.

Knows: Hugging Face causal LMs and batches.  Does not know: any technique of coconut_ds/model.
Source: coconut.py of the Coconut release (arXiv 2412.06769), for batches whose latents share their columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coconut_ds.data.batching import Batch


def textbook_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss of `batch` with the last hidden state as thought, fp32."""
    embeds_BTD = model.get_input_embeddings()(batch.input_ids_BT)
    cache = DynamicCache(config=model.config)
    columns = batch.input_ids_BT.shape[1]
    logits = []
    start, stop = 0, batch.first_latent if batch.num_latents else columns
    for index in range(batch.num_latents + 1):
        outputs = model(
            inputs_embeds=embeds_BTD[:, start:stop],
            attention_mask=batch.attention_mask_BT[:, :stop],
            position_ids=batch.position_ids_BT[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        logits.append(outputs.logits)
        if index == batch.num_latents:
            break
        thought_BD = outputs.hidden_states[-1][:, -1]
        is_latent_B1 = batch.is_latent_B(stop)[:, None]
        slot_BD = torch.where(is_latent_B1, thought_BD, embeds_BTD[:, stop])
        embeds_BTD = torch.cat([embeds_BTD[:, :stop], slot_BD[:, None], embeds_BTD[:, stop + 1 :]], dim=1)
        start, stop = stop, stop + 1 if index < batch.num_latents - 1 else columns
    logits_BTV = torch.cat(logits, dim=1)
    shifted_BTV = logits_BTV[:, :-1].contiguous().float()
    total = F.cross_entropy(
        shifted_BTV.view(-1, shifted_BTV.shape[-1]),
        batch.labels_BT[:, 1:].contiguous().view(-1),
        reduction="sum",
    )
    return total / batch.loss_denominator
