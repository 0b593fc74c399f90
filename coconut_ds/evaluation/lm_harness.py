"""Trained models in EleutherAI's lm-evaluation-harness (`pip install lm_eval`).

    python -m coconut_ds.evaluation.lm_harness --model coconut --model_args pretrained=runs/gsm-coconut \\
        --tasks my_task --include_path my_tasks

The program is lm_eval's own, with `coconut` among its models.  A task's context is the question; the newline
and the latents are added as in training.  Tasks that compare log-likelihoods are refused.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from coconut_ds.evaluation.pretrained import CoconutForCausalLM

Request = tuple[str, Mapping[str, Any]]  # context, generation arguments of the task


def generate_until(
    model: CoconutForCausalLM,
    requests: Sequence[Request],
    batch_size: int = 32,
    num_latents: int | None = None,
) -> list[str]:
    """Answers in the order of `requests`, each cut before the first of its `until` strings.

    `max_gen_toks` limits an answer (default: the limit of the run's evaluation).  Greedy unless `do_sample`
    is true; other arguments go to `model.generate`.  Raises DataError for a context longer than the model.
    """
    answers = [""] * len(requests)

    def key(index: int) -> str:
        return repr(sorted(requests[index][1].items()))

    by_arguments = sorted(range(len(requests)), key=lambda i: (key(i), len(requests[i][0])))
    for _, group in groupby(by_arguments, key):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            contexts = [requests[index][0] for index in batch]
            texts = _answers(model, contexts, dict(requests[batch[0]][1]), num_latents)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
    return answers


def _answers(
    model: CoconutForCausalLM, contexts: Sequence[str], arguments: dict[str, Any], num_latents: int | None
) -> list[str]:
    until = arguments.pop("until", ())
    stops = [until] if isinstance(until, str) else list(until or ())
    limit = arguments.pop("max_gen_toks", model.max_new_tokens)
    if not arguments.get("do_sample"):
        for name in ("temperature", "top_p", "top_k"):
            arguments.pop(name, None)
    prompts = [context.rstrip("\n") + "\n" for context in contexts]
    inputs = model.tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=limit, num_latents=num_latents, **arguments)
    texts = model.tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [min((text.partition(stop)[0] for stop in stops if stop), key=len, default=text) for text in texts]


def harness_model() -> type:
    """The class that lm_eval calls `coconut`.  Registers it; raises ImportError without lm_eval."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    class CoconutLM(LM):
        """`pretrained`: what `CoconutForCausalLM.from_pretrained` reads."""

        def __init__(
            self,
            pretrained: str,
            batch_size: int | str = 32,
            device: str | None = None,
            num_latents: int | None = None,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            self.model = CoconutForCausalLM.from_pretrained(pretrained)
            if device and (torch.cuda.is_available() or not device.startswith("cuda")):
                self.model.to(device)  # lm_eval's default is cuda:0 on any machine
            self.batch_size = 32 if str(batch_size).startswith("auto") else int(batch_size)
            self.num_latents = num_latents

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            pairs = [request.args for request in requests]
            answers = generate_until(self.model, pairs, self.batch_size, self.num_latents)
            for pair, answer in zip(pairs, answers, strict=True):
                self.cache_hook.add_partial("generate_until", pair, answer)
            return answers

        def loglikelihood(self, requests: Sequence[Any]) -> Any:
            raise NotImplementedError("model coconut generates answers: use tasks with `generate_until`")

        loglikelihood_rolling = loglikelihood

    return register_model("coconut")(CoconutLM)


if __name__ == "__main__":
    try:
        harness_model()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install lm_eval")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
