"""Draw ProsQA-like problems, check every one, and measure a file of them.

    Tom is a terpus. Every terpus is a brimpus. Every brimpus is a lempus. ... Is Tom a lempus or scrompus?

Two roots, 0 and 1, each with a family of descendants.  The target is a leaf of the queried root's family
alone, the decoy a leaf of the other family alone.  Algorithm 1 of the Coconut paper (appendix A.2) as printed
gives other statistics than the released files; `Recipe` holds the numbers that give the released ones.

Knows: graphs and their wording.  Does not know: files.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coconut_ds.errors import DataError

_NAMES = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
_CONCEPTS = """
wumpus yumpus zumpus dumpus rompus numpus tumpus vumpus impus jompus gorpus shumpus lempus sterpus grimpus
lorpus brimpus timpus yimpus rempus fompus worpus terpus gerpus kerpus scrompus zhorpus bompus jelpus felpus
chorpus hilpus storpus yerpus boompus gwompus rorpus quimpus
"""
NAMES = tuple(_NAMES.split())
CONCEPTS = tuple(_CONCEPTS.split())

_MAX_GRAPHS = 50_000  # drawn for one problem; 8 hops need some 200

Adjacency = list[list[int]]


@dataclass(frozen=True)
class Recipe:
    """How graphs are drawn; the defaults give the statistics of the released files."""

    slots: int = 28  # nodes drawn, of which those without any edge are dropped
    parents_mean: float = 1.5  # a node asks for Poisson(parents_mean) parents
    only_first: float = 0.35  # chance that they come from outside the second root's family
    only_second: float = 0.455  # chance that they come from outside the first root's family
    depth_weight: float = 1.5  # a candidate at depth d is drawn with weight 1 + depth_weight * d
    orphan_chance: float = 0.6  # of drawing a node without parents once the others are used up
    min_hops: int = 3
    max_hops: int = 6
    depth_matched: bool = False  # the decoy as deep under its root as the target under its own


@dataclass(frozen=True)
class _Graph:
    parents: Adjacency
    families: list[int]  # 1: reached from root 0, 2: from root 1, 3: from both, 0: from neither


def draw_problem(rng: random.Random, recipe: Recipe) -> dict[str, Any]:
    """One problem with the fields of the released files.

    Raises DataError when the recipe asks for something that hardly any graph has.
    """
    for _ in range(_MAX_GRAPHS):
        graph = _draw_graph(rng, recipe)
        query = _draw_query(rng, graph, recipe)
        if query is None:
            continue
        root, target, decoy = query
        children = _children(graph.parents)
        kept = [node for node, parents in enumerate(graph.parents) if parents or children[node]]
        entities = sum(1 for node in kept if not graph.parents[node])
        if entities <= len(NAMES) and len(kept) - entities <= len(CONCEPTS):
            index = {node: position for position, node in enumerate(kept)}
            parents = [[index[parent] for parent in graph.parents[node]] for node in kept]
            return _word(rng, parents, index[root], index[target], index[decoy])
    raise DataError(
        f"none of {_MAX_GRAPHS:,} graphs had a problem of {recipe.min_hops} to {recipe.max_hops} hops"
        f"{' with a decoy as deep' if recipe.depth_matched else ''}; allow fewer hops or other decoys"
    )


def _draw_graph(rng: random.Random, recipe: Recipe) -> _Graph:
    parents: Adjacency = [[], []]
    families = [1, 2]
    depths = [0, 0]
    for node in range(2, recipe.slots):
        draw = rng.random()
        if draw < recipe.only_first:
            allowed: tuple[int, ...] = (0, 1)
        elif draw < recipe.only_first + recipe.only_second:
            allowed = (0, 2)
        else:
            allowed = (0, 1, 2, 3)
        rooted = [
            other for other in range(node) if families[other] in allowed and (parents[other] or other < 2)
        ]
        orphans = [other for other in range(2, node) if families[other] in allowed and not parents[other]]
        chosen: list[int] = []
        for _ in range(_poisson(rng, recipe.parents_mean)):
            if rooted:
                weights = [1 + recipe.depth_weight * depths[other] for other in rooted]
                chosen.append(rooted.pop(_weighted(rng, weights)))
            elif orphans and rng.random() < recipe.orphan_chance:
                chosen.append(orphans.pop(rng.randrange(len(orphans))))
        family = 0
        for parent in chosen:
            family |= families[parent]
        parents.append(sorted(chosen))
        families.append(family)
        depths.append(1 + min(depths[parent] for parent in chosen) if chosen else 0)
    return _Graph(parents, families)


def _draw_query(rng: random.Random, graph: _Graph, recipe: Recipe) -> tuple[int, int, int] | None:
    """(root, target, decoy): the deepest exclusive leaf, and a leaf of the other family; None when unfit."""
    children = _children(graph.parents)
    distances = [distances_from(root, children) for root in (0, 1)]
    leaves = [
        [node for node in range(2, len(children)) if graph.families[node] == family and not children[node]]
        for family in (1, 2)
    ]
    found = [(distances[root][leaf], rng.random(), root, leaf) for root in (0, 1) for leaf in leaves[root]]
    if not found:
        return None
    hops, _, root, target = max(found)
    other = 1 - root
    decoys = [leaf for leaf in leaves[other] if not recipe.depth_matched or distances[other][leaf] == hops]
    if not decoys or not recipe.min_hops <= hops <= recipe.max_hops:
        return None
    return root, target, rng.choice(decoys)


def _word(rng: random.Random, parents: Adjacency, root: int, target: int, decoy: int) -> dict[str, Any]:
    names, concepts = rng.sample(NAMES, len(NAMES)), rng.sample(CONCEPTS, len(CONCEPTS))
    symbols = [(concepts if parents[node] else names).pop() for node in range(len(parents))]
    edges = [[parent, node] for node in range(len(parents)) for parent in parents[node]]
    facts = [_fact(symbols, parent, node, parents) for parent, node in edges]
    rng.shuffle(facts)
    first, second = (target, decoy) if rng.random() < 0.5 else (decoy, target)
    distances = distances_from(root, _children(parents))
    path = [target]
    while path[-1] != root:
        nearer = [node for node in parents[path[-1]] if distances.get(node) == distances[path[-1]] - 1]
        path.append(rng.choice(nearer))
    path.reverse()
    return {
        "question": f"{' '.join(facts)} Is {symbols[root]} a {symbols[first]} or {symbols[second]}?",
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": [_fact(symbols, *step, parents) for step in zip(path, path[1:], strict=False)],
        "idx_to_symbol": symbols,
        "edges": edges,
        "root": root,
        "target": target,
        "neg_target": decoy,
    }


def _fact(symbols: Sequence[str], parent: int, node: int, parents: Adjacency) -> str:
    subject = f"Every {symbols[parent]}" if parents[parent] else symbols[parent]
    return f"{subject} is a {symbols[node]}."


def _children(parents: Adjacency) -> Adjacency:
    children: Adjacency = [[] for _ in parents]
    for node, above in enumerate(parents):
        for parent in above:
            children[parent].append(node)
    return children


def distances_from(root: int, children: Adjacency) -> dict[int, int]:
    """Edges from the root to every node that it reaches."""
    distances, queue = {root: 0}, [root]
    for node in queue:
        for child in children[node]:
            if child not in distances:
                distances[child] = distances[node] + 1
                queue.append(child)
    return distances


def _poisson(rng: random.Random, mean: float) -> int:
    draw, count = rng.random(), 0
    probability = total = math.exp(-mean)
    while draw > total and probability > 1e-12:
        count += 1
        probability *= mean / count
        total += probability
    return count


def _weighted(rng: random.Random, weights: Sequence[float]) -> int:
    rest = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        rest -= weight
        if rest < 0:
            return index
    return len(weights) - 1


def violations(
    item: Mapping[str, Any], min_hops: int = 3, max_hops: int = 6, depth_matched: bool = False
) -> list[str]:
    """What keeps a problem from being a ProsQA problem; empty for every released one."""
    symbols, edges = item["idx_to_symbol"], [tuple(edge) for edge in item["edges"]]
    root, target, decoy = item["root"], item["target"], item["neg_target"]
    size = len(symbols)
    if not all(0 <= parent < child < size for parent, child in edges):
        return ["an edge does not go from a lower to a higher node"]
    parents: Adjacency = [[] for _ in symbols]
    for parent, child in edges:
        parents[child].append(parent)
    children = _children(parents)
    if root not in (0, 1) or not parents[target] or not parents[decoy]:
        return ["the root is not node 0 or 1, or an answer is an entity"]
    mine, other = distances_from(root, children), distances_from(1 - root, children)
    facts = Counter(_fact(symbols, parent, child, parents) for parent, child in edges)
    body, _, query = item["question"].rpartition(" Is ")
    options = {
        f"{symbols[root]} a {symbols[a]} or {symbols[b]}?" for a, b in ((target, decoy), (decoy, target))
    }
    nodes = {symbol: node for node, symbol in enumerate(symbols)}
    path = [root, *(nodes.get(step.rstrip(".").rpartition(" ")[2], root) for step in item["steps"])]
    checks = {
        "edges are not sorted by child, or one occurs twice": [child for _, child in edges]
        == sorted(child for _, child in edges)
        and len(set(edges)) == len(edges),
        "a node has no edge": all(parents[node] or children[node] for node in range(size)),
        "node 0 or 1 has a parent": not parents[0] and not parents[1],
        "a symbol occurs twice": len(set(symbols)) == size,
        "names are not exactly the nodes without parents": all(
            symbol in (CONCEPTS if above else NAMES) for symbol, above in zip(symbols, parents, strict=True)
        ),
        "the facts are not the edges, each once": Counter(s + "." for s in body[:-1].split(". ")) == facts,
        "the question does not offer target and decoy": query in options,
        "the answer does not name the target": item["answer"] == f"{symbols[root]} is a {symbols[target]}.",
        "target or decoy is not a leaf": not children[target] and not children[decoy],
        "the target is not reached from the queried root alone": target in mine and target not in other,
        "the decoy is not reached from the other root alone": decoy in other and decoy not in mine,
        "the steps are not facts of the question": all(step in facts for step in item["steps"]),
        "the steps are not a path to the target": path[-1] == target
        and [_fact(symbols, *step, parents) for step in zip(path, path[1:], strict=False)] == item["steps"],
        "the steps are not a shortest path": len(item["steps"]) == mine.get(target),
        f"the path has not {min_hops} to {max_hops} hops": min_hops <= len(item["steps"]) <= max_hops,
        "the decoy is not as deep as the target": not depth_matched or other.get(decoy) == mine.get(target),
    }
    return [text for text, holds in checks.items() if not holds]


def statistics(items: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means over problems, by the name of what is measured."""
    rows = [_measures(item) for item in items]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _measures(item: Mapping[str, Any]) -> dict[str, float]:
    symbols, root = item["idx_to_symbol"], item["root"]
    parents: Adjacency = [[] for _ in symbols]
    for parent, child in item["edges"]:
        parents[child].append(parent)
    children = _children(parents)
    mine, other = distances_from(root, children), distances_from(1 - root, children)
    hops = len(item["steps"])
    return {
        "nodes": len(symbols),
        "edges": len(item["edges"]),
        "hops": hops,
        "entities": sum(not above for above in parents),
        "decoy depth": other[item["neg_target"]],
        "nodes reached from the root": len(mine),
        "children of the root": len(children[root]),
        "words": len(item["question"].split()),
        **{f"share with {count} hops": float(hops == count) for count in range(3, 9)},
        **{f"share with the decoy at depth {d}": float(other[item["neg_target"]] == d) for d in range(1, 5)},
        "share asking about node 1": root,
        "share of nodes in both families": len(mine.keys() & other.keys()) / len(symbols),
        "share naming the target first": float(_target_first(item)),
    }


def _target_first(item: Mapping[str, Any]) -> bool:
    return item["question"].endswith(f" or {item['idx_to_symbol'][item['neg_target']]}?")


def generate(
    count: int, recipe: Recipe, rng_for: Callable[[int], random.Random], seen: set[str]
) -> Iterator[dict[str, Any]]:
    """`count` checked problems; number i follows from rng_for(i), unless its question was `seen` before."""
    for index in range(count):
        rng = rng_for(index)
        item = draw_problem(rng, recipe)
        while item["question"] in seen:
            item = draw_problem(rng, recipe)
        seen.add(item["question"])
        wrong = violations(item, recipe.min_hops, recipe.max_hops, recipe.depth_matched)
        if wrong:
            raise AssertionError(f"problem {index} of {recipe}: {wrong}")
        yield item
