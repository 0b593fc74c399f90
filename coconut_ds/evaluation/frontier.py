"""Probability that continuous thoughts give to each node of a graph of facts (paper, section 5.3).

Tom is a terpus. Every terpus is a brimpus. ... Is Tom a lempus or scrompus?
after 1 latent, "Every" is followed by a node at distance 1 from Tom, after 2 latents at distance 2, ...
"""

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from coconut_ds.data.batching import collate, refuse_long_prompts
from coconut_ds.data.curriculum import Sample
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.model.coconut import Coconut

RULE = re.compile(r"\bEvery (\w+) is an? (\w+)\.")
FACT = re.compile(r"\b(?!Every\b)([A-Z]\w*) is an? (\w+)\.")
QUERY = re.compile(r"\bIs (\w+) an? (\w+) or (?:an? )?(\w+)\?")
BEGINNING = "Every"  # forced after the latents; a node follows


@dataclass(frozen=True)
class Graph:
    root: str
    choices: tuple[str, str]
    edges: tuple[tuple[str, str], ...]

    def distances(self, start: str) -> dict[str, int]:
        """Steps from `start` to every reachable node."""
        distances = {start: 0}
        queue = deque([start])
        while queue:
            node = queue.popleft()
            for parent, child in self.edges:
                if parent == node and child not in distances:
                    distances[child] = distances[node] + 1
                    queue.append(child)
        return distances

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes that a rule can have, in the order of the question."""
        return tuple(dict.fromkeys(node for edge in self.edges for node in edge if node[0].islower()))


def read_graph(question: str) -> Graph | None:
    """The graph of a question in the wording of ProsQA, or None."""
    query = QUERY.search(question)
    edges = (*RULE.findall(question), *FACT.findall(question))
    if query is None or len(edges) < 2:
        return None
    return Graph(query[1], (query[2], query[3]), tuple(edges))


@dataclass(frozen=True)
class Candidate:
    node: str
    distance: int | None  # steps from the root; None if not reachable
    leads_to_answer: bool
    probability: float


@dataclass(frozen=True)
class Frontier:
    """Probabilities of the nodes after some latents and "Every"."""

    num_latents: int
    distance: int  # of the nodes from which the next step starts
    candidates: tuple[Candidate, ...]  # all nodes, the most likely first

    @property
    def mass(self) -> float:
        """Probability of all nodes at the frontier's distance."""
        return sum(c.probability for c in self.candidates if c.distance == self.distance)

    @property
    def mass_of_answer(self) -> float:
        """Probability of those nodes from which the answer is reachable."""
        return sum(
            c.probability for c in self.candidates if c.distance == self.distance and c.leads_to_answer
        )

    @property
    def size(self) -> int:
        return sum(c.distance == self.distance for c in self.candidates)


@torch.no_grad()
def frontiers(
    model: Coconut,
    vocabulary: Vocabulary,
    graph: Graph,
    answer: str,
    prompts: Sequence[Sample],
    latents_per_step: int,
) -> list[Frontier]:
    """One per prompt with latents; `prompts` differ only in their number of latents."""
    distances = graph.distances(graph.root)
    target = next((choice for choice in graph.choices if re.search(rf"\b{choice}\b", answer)), None)
    result = []
    for prompt in prompts:
        if prompt.num_latents == 0:
            continue
        probabilities = _probabilities(model, vocabulary, prompt, graph.nodes)
        candidates = [
            Candidate(node, distances.get(node), target in graph.distances(node), probability)
            for node, probability in zip(graph.nodes, probabilities, strict=True)
        ]
        candidates.sort(key=lambda c: -c.probability)
        result.append(
            Frontier(prompt.num_latents, math.ceil(prompt.num_latents / latents_per_step), tuple(candidates))
        )
    return result


def _probabilities(
    model: Coconut, vocabulary: Vocabulary, prompt: Sample, nodes: Sequence[str]
) -> list[float]:
    """Probability of each node's tokens after the prompt and "Every"."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"])

    beginning = encode(BEGINNING)
    samples = []
    for row, node in enumerate(nodes):
        name = encode(f"{BEGINNING} {node}")[len(beginning) :]
        context = prompt.tokens + beginning
        samples.append(replace(prompt, index=row, tokens=context + name, num_prompt=len(context)))
    refuse_long_prompts([len(sample.tokens) for sample in samples], model.num_positions, "candidate")
    batch = collate(samples, vocabulary.pad_id).to(next(model.parameters()).device)
    hidden_ND = model.hidden_states(batch).flatten(0, 1)[batch.target_positions_N]
    scores_NV = model.head(hidden_ND).float().log_softmax(-1)
    scores_N = scores_NV.gather(1, batch.target_ids_N[:, None]).squeeze(1)
    rows_N = batch.target_positions_N // batch.shape[1]
    logs_B = torch.zeros(len(nodes), device=scores_N.device).index_add_(0, rows_N, scores_N)
    return logs_B.exp().tolist()
