"""Inspect the latents of one problem: what they decode to, their norms, what they attend to.

inspect(model, problem)          one problem
match_steps(inspections, ...)    how often latents decode to the results of the steps they replace

The latents are recorded and put into the embeddings.  A separate pass then reads all columns at once with
eager attention, which returns its weights.  With causal attention this equals the latent loop.

Shapes: B rows, T columns, K latents, D hidden size, V vocabulary, L layers, H heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coconut_ds.data.batching import Batch, collate
from coconut_ds.data.curriculum import Sample
from coconut_ds.data.problems import Problem, split_completion
from coconut_ds.evaluation.ablation import record_latents
from coconut_ds.evaluation.frontier import Frontier, frontiers, read_graph
from coconut_ds.evaluation.pretrained import CoconutForCausalLM
from coconut_ds.model.coconut import Coconut
from coconut_ds.objectives.step_result import result_of

MAX_SINGLE_TOKENS = 40  # longer questions are shown by sentence
Tokens = Callable[[str], set[int]]  # text -> its possible first tokens
MAX_ANSWER_TOKENS = 8  # answer tokens that are shown as rows of the attention


@dataclass(frozen=True)
class Guess:
    token_id: int
    token: str
    probability: float


@dataclass(frozen=True)
class LatentView:
    """One latent slot (from 1)."""

    slot: int
    before: tuple[Guess, ...]  # LM head on the newest hidden state before the thought
    after: tuple[Guess, ...]  # LM head on the thought in the slot
    norm: float
    nearest_token: str  # by cosine, among the token embeddings
    cosine: float


@dataclass(frozen=True)
class Inspection:
    problem: Problem
    completion: str
    latents: tuple[LatentView, ...]
    output: tuple[Guess, ...]  # LM head on the last hidden state of the prompt
    embedding_norms: tuple[float, float, float]  # of all tokens: 5 %, median, 95 %
    readers: tuple[str, ...]  # rows of `attention`: the latents (or the prompt's end), <end>, the answer
    spans: tuple[str, ...]  # its columns: parts of the question, special tokens, latents
    attention: tuple[tuple[float, ...], ...]  # mean over layers and heads; rows sum to at most 1
    attention_by_layer: tuple[tuple[tuple[float, ...], ...], ...]
    window_weights: tuple[float, ...] | None
    in_words: tuple[str, ...]  # the answer after 0, 1, ... latents
    frontiers: tuple[Frontier, ...]

    def states(self) -> list[tuple[Guess, ...]]:
        """What the model's state decodes to after 0, 1, ... latents."""
        return [*(view.before for view in self.latents), self.output]


@dataclass(frozen=True)
class StepMatch:
    """rates[k][j]: share of problems whose state after k latents decodes to the result of step j."""

    top: int  # number of most likely tokens that count
    rates: tuple[tuple[float, ...], ...]
    by_chance: tuple[tuple[float, ...], ...]  # with the steps of another problem
    continued: tuple[float | None, ...]  # [k]: correct remaining steps after k latents; None: none
    num_problems: int


@torch.no_grad()
def inspect(model: CoconutForCausalLM, problem: Problem, top: int = 5) -> Inspection:
    """Inspect one problem; its steps and answer may be empty.

    A model without latents has one state: that of the question's last token.
    """
    module, vocabulary, trained = model.model, model.vocabulary, model.trained
    prompts = prompts_by_latents(model, problem)
    device = next(module.parameters()).device
    all_prompts = collate(prompts, vocabulary.pad_id).to(device)
    answers = module.generate(all_prompts, model.max_new_tokens, vocabulary.eos_id)
    full = prompts[-1]
    free = None if module.num_positions is None else module.num_positions - len(full.tokens)
    shown = tuple(answers[-1][:free][:MAX_ANSWER_TOKENS])
    batch = collate([replace(full, tokens=full.tokens + shown)], vocabulary.pad_id).to(device)
    latents_KD = record_latents(module, batch)[0]
    hidden_TD, attention_LTT = _read_at_once(module, batch, latents_KD)
    first, count = batch.first_latent, full.num_latents
    names, columns = _spans(model, full)
    readers = range(first if count else first - 1, batch.shape[1])
    by_layer_LRS = torch.stack(
        [attention_LTT[:, readers][:, :, a:b].sum(-1) for a, b in columns], dim=-1
    ).float()
    graph = read_graph(problem.question)
    weights = module.thought.window_weights()
    return Inspection(
        problem=problem,
        completion=vocabulary.decode(answers[-1]),
        latents=_views(model, hidden_TD[first - 1 : first - 1 + count], latents_KD, top),
        output=_guesses(model, hidden_TD[first + count - 1], top),
        embedding_norms=_embedding_norms(module),
        readers=tuple(
            f"latent {column - first + 1}"
            if first <= column < first + count
            else vocabulary.spell([int(batch.input_ids_BT[0, column])])
            for column in readers
        ),
        spans=tuple(names),
        attention=_nested(by_layer_LRS.mean(0)),
        attention_by_layer=tuple(_nested(layer_RS) for layer_RS in by_layer_LRS),
        window_weights=None if weights is None else tuple(weights),
        in_words=tuple(vocabulary.decode(ids) for ids in answers),
        frontiers=()
        if graph is None
        else tuple(
            frontiers(module, vocabulary, graph, problem.answer, prompts, trained.experiment.c_thought)
        ),
    )


def prompts_by_latents(model: CoconutForCausalLM, problem: Problem) -> list[Sample]:
    """The prompt with 0, 1, ... latents, up to the stage's number."""
    counts = range(model.trained.stage.num_latents + 1)
    return [replace(model.samples([problem.question], count)[0], index=count) for count in counts]


def _read_at_once(model: Coconut, batch: Batch, latents_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm, and attention averaged over heads: hidden_TD, attention_LTT."""
    embeds_1TD = model.embedding(batch.input_ids_BT).clone()
    embeds_1TD[0, batch.first_latent : batch.first_latent + len(latents_KD)] = latents_KD
    with _visible_attention(model):
        output = model.causal_lm.get_decoder()(
            inputs_embeds=embeds_1TD,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            output_attentions=True,
            use_cache=False,
        )
    return output.last_hidden_state[0], torch.stack([layer[0].mean(0) for layer in output.attentions])


@contextmanager
def _visible_attention(model: Coconut) -> Iterator[None]:
    own = model.causal_lm.config._attn_implementation
    model.causal_lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.causal_lm.set_attn_implementation(own)


def _views(
    model: CoconutForCausalLM, before_KD: Tensor, latents_KD: Tensor, top: int
) -> tuple[LatentView, ...]:
    embeddings_VD = _embeddings(model.model)
    views = []
    for index, (before_D, latent_D) in enumerate(zip(before_KD, latents_KD, strict=True)):
        cosines_V = torch.nn.functional.cosine_similarity(embeddings_VD, latent_D[None].float())
        nearest = int(cosines_V.argmax())
        views.append(
            LatentView(
                slot=index + 1,
                before=_guesses(model, before_D, top),
                after=_guesses(model, latent_D, top),
                norm=float(latent_D.float().norm()),
                nearest_token=model.vocabulary.spell([nearest]),
                cosine=float(cosines_V[nearest]),
            )
        )
    return tuple(views)


def _guesses(model: CoconutForCausalLM, state_D: Tensor, top: int) -> tuple[Guess, ...]:
    probabilities_V = model.model.head(state_D[None])[0].float().softmax(-1)
    best = probabilities_V.topk(min(top, len(probabilities_V)))
    return tuple(
        Guess(token_id, model.vocabulary.spell([token_id]), probability)
        for token_id, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def _embeddings(model: Coconut) -> Tensor:
    """The embedding of every token, including adapters and special-token rows."""
    count = model.causal_lm.config.vocab_size
    ids_V = torch.arange(count, device=next(model.parameters()).device)
    return model.embedding(ids_V[None])[0].float()


def _embedding_norms(model: Coconut) -> tuple[float, float, float]:
    norms_V = _embeddings(model).norm(dim=-1)
    low, middle, high = torch.quantile(
        norms_V[:100_000], torch.tensor([0.05, 0.5, 0.95]).to(norms_V)
    ).tolist()
    return low, middle, high


def _spans(model: CoconutForCausalLM, prompt: Sample) -> tuple[list[str], list[tuple[int, int]]]:
    """Names and [start, stop) columns of the question's parts, of <start> and of every latent."""
    texts = [model.vocabulary.spell([token]) for token in prompt.tokens]
    has_special_tokens = prompt.num_prompt > prompt.first_latent
    question = prompt.first_latent - has_special_tokens
    names: list[str] = []
    columns: list[tuple[int, int]] = []
    start = 0
    for column in range(question):
        ends = texts[column].strip().endswith((".", "?", "!")) or column == question - 1
        if question <= MAX_SINGLE_TOKENS or ends:
            names.append("".join(texts[start : column + 1]).strip() or "\u21b5")
            columns.append((start, column + 1))
            start = column + 1
    for column in range(question, prompt.first_latent + prompt.num_latents):
        slot = column - prompt.first_latent
        names.append(texts[column] if slot < 0 else f"latent {slot + 1}")
        columns.append((column, column + 1))
    return names, columns


def _nested(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def first_tokens(model: CoconutForCausalLM, text: str) -> set[int]:
    """The first token of `text`, with and without a leading space."""
    encode = model.vocabulary.tokenizer
    spellings = [encode(spelling, add_special_tokens=False)["input_ids"] for spelling in (text, f" {text}")]
    return {ids[0] for ids in spellings if ids and model.vocabulary.spell([ids[0]]).strip()}


def match_steps(
    inspections: Sequence[Inspection], tokens_of: Tokens, latents_per_step: int, top: int
) -> StepMatch | None:
    """None for fewer than 2 problems with steps.  `tokens_of`: text -> its possible first tokens."""
    with_steps = [inspection for inspection in inspections if inspection.problem.steps]
    if len(with_steps) < 2:
        return None
    solutions = [inspection.problem.steps for inspection in with_steps]
    return StepMatch(
        top,
        _rates(with_steps, solutions, tokens_of, top),
        _rates(with_steps, solutions[1:] + solutions[:1], tokens_of, top),
        _continued(with_steps, latents_per_step),
        len(with_steps),
    )


def _rates(
    inspections: Sequence[Inspection],
    solutions: Sequence[tuple[str, ...]],
    tokens_of: Tokens,
    top: int,
) -> tuple[tuple[float, ...], ...]:
    num_states, num_steps = len(inspections[0].states()), max(map(len, solutions))
    hits = [[0] * num_steps for _ in range(num_states)]
    tried = [0] * num_steps
    for inspection, steps in zip(inspections, solutions, strict=True):
        for j, step in enumerate(steps):
            expected = tokens_of(result_of(step))
            tried[j] += 1
            for k, guesses in enumerate(inspection.states()):
                hits[k][j] += any(guess.token_id in expected for guess in guesses[:top])
    return tuple(tuple(hit / count for hit, count in zip(row, tried, strict=True)) for row in hits)


def _continued(inspections: Sequence[Inspection], latents_per_step: int) -> tuple[float | None, ...]:
    """Of the problems with steps that the latents did not replace, the share with exactly these steps."""
    shares: list[float | None] = []
    for k in range(len(inspections[0].in_words)):
        remaining = [(i.in_words[k], i.problem.steps[-(-k // latents_per_step) :]) for i in inspections]
        right = [split_completion(words)[0] == "\n".join(steps) for words, steps in remaining if steps]
        shares.append(sum(right) / len(right) if right else None)
    return tuple(shares)
