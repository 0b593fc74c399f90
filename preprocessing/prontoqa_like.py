"""Draw ProntoQA-like problems: the 5-hop fictional ontology with distractors of the official generator.

    Max is a vumpus. -> Each vumpus is a brimpus. -> ... -> Numpuses are not wooden. -> Max is not wooden.

Around the chain of concepts that leads to the answer stand, as in the official output: at every level a
second, useless superconcept with a property of its own; a second concept of the entity, with a superconcept;
and one rule that says the opposite about the queried property, for a concept that nothing belongs to.

Knows: the ontology and its wording.  Does not know: files.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NAMES = ("Fae", "Rex", "Sally", "Max", "Alex", "Sam", "Polly", "Stella", "Wren")
_CONCEPTS = """
wumpus yumpus zumpus dumpus rompus numpus tumpus vumpus impus jompus gorpus shumpus lempus sterpus grimpus
lorpus brimpus
"""
CONCEPTS = tuple(_CONCEPTS.split())
FAMILIES = tuple(  # a concept's property is drawn from a family that no other concept of the problem has
    tuple(family.split())
    for family in (
        "blue red brown orange",
        "small large",
        "metallic wooden luminous liquid",
        "transparent opaque",
        "nervous happy feisty shy",
        "bright dull",
        "sweet sour spicy bitter",
        "floral fruity earthy",
        "hot cold temperate",
        "kind mean angry amenable aggressive",
        "melodic muffled discordant loud",
        "slow moderate fast",
        "windy sunny overcast rainy snowy",
    )
)
NEGATED, QUERIED_NEGATED = 0.3, 0.46  # share of properties said not to hold, measured in the official output
_SENTENCE = re.compile(r"(?:(Every|Each) )?(\w+) (?:is|are) (not )?(?:an? )?(\w+)")


@dataclass(frozen=True)
class _Ontology:
    """Every rule once, by the two concepts, or by the concept and (property, whether it holds)."""

    rng: random.Random
    wording: dict[tuple, str] = field(default_factory=dict)

    def belongs(self, concept: str, superconcept: str) -> None:
        article = _article(superconcept)
        self._say(concept, superconcept, f"{article} {superconcept}", f"{superconcept}es")

    def has(self, concept: str, quality: str, holds: bool) -> None:
        text = quality if holds else f"not {quality}"
        self._say(concept, quality, text, text)

    def _say(self, concept: str, what: str, one: str, many: str) -> None:
        quantifier = self.rng.choice(("Every", "Each", None, None))
        single = f"{quantifier} {concept} is {one}."
        self.wording[concept, what] = single if quantifier else f"{concept.capitalize()}es are {many}."


def draw_problem(rng: random.Random, hops: int = 5) -> dict[str, Any]:
    """One problem of `hops` rules, from 1 to 5; steps of two sentences each, as published."""
    concepts = rng.sample(CONCEPTS, 2 * hops + 4)
    chain, sides = concepts[:hops], concepts[hops : 2 * hops]
    spare, second, second_super, opposite = concepts[2 * hops :]
    qualities = [rng.choice(family) for family in rng.sample(FAMILIES, 2 * hops + 1)]
    name, rules = rng.choice(NAMES), _Ontology(rng)
    for lower, upper in zip(chain, chain[1:], strict=False):
        rules.belongs(lower, upper)
    for concept, side in zip(chain, sides, strict=True):
        rules.belongs(concept, side)
    rules.belongs(chain[-1], spare)  # where the chain would go on
    rules.belongs(second, second_super)
    asked, holds = qualities[hops - 1], rng.random() >= QUERIED_NEGATED
    for concept, quality in zip((*chain, *sides, second), qualities, strict=True):
        rules.has(concept, quality, holds if quality == asked else rng.random() >= NEGATED)
    rules.has(opposite, asked, not holds)

    premises = [_is_a(name, chain[0]), _is_a(name, second)]
    rng.shuffle(premises)
    theory = list(rules.wording.values())
    rng.shuffle(theory)
    conclusion = f"{name} is {'' if holds else 'not '}{asked}."
    asks_truth = rng.random() < 0.5
    query = f"True or false: {name} is {'' if asks_truth else 'not '}{asked}."
    proof = []
    for concept, following in zip(chain, (*chain[1:], asked), strict=True):
        proof += [_is_a(name, concept), rules.wording[concept, following]]
    return {
        "question": " ".join((*theory, *premises, query)),
        "steps": [*pairs(proof), conclusion],
        "answer": str(asks_truth == holds),
    }


def pairs(sentences: Sequence[str]) -> list[str]:
    """Two sentences a step; the last step keeps what is left."""
    return [" ".join(sentences[first : first + 2]) for first in range(0, len(sentences), 2)]


def _is_a(name: str, concept: str) -> str:
    return f"{name} is {_article(concept)} {concept}."


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def violations(item: Mapping[str, Any], hops: int = 5) -> list[str]:
    """What keeps a problem from having the form of the official ones; the label itself is not derived."""
    theory, _, query = item["question"].rpartition(" True or false: ")
    sentences = [sentence + "." for sentence in theory.rstrip(".").split(". ")]
    steps, last = item["steps"][:-1], item["steps"][-1]
    rules = [_SENTENCE.fullmatch(sentence[:-1]) for sentence in sentences]
    asked = last.rstrip(".").split()[-1]
    said = [rule.group(4) for rule in rules if rule and not rule.group(4).endswith(("pus", "puses"))]
    families = [next((i for i, family in enumerate(FAMILIES) if quality in family), -1) for quality in said]
    agree = (query == last) == (item["answer"] == "True")
    checks = {
        f"not {4 * hops + 5} different sentences": len(sentences) == len(set(sentences)) == 4 * hops + 5,
        "a sentence has another form": all(rules),
        f"not {hops + 1} steps": len(item["steps"]) == hops + 1,
        "a rule used in the steps is not among the sentences": all(
            any(step.endswith(" " + sentence) for sentence in sentences) for step in steps
        ),
        "the first step does not start from a premise": any(
            steps and steps[0].startswith(sentence + " ") for sentence in sentences
        ),
        "a property occurs in two families' places": -1 not in families
        and len(set(families)) == len(families) - 1 == 2 * hops + 1
        and said.count(asked) == 2,
        "the answer is not what the last step says about the query": item["answer"] in ("True", "False")
        and agree,
    }
    return [text for text, holds in checks.items() if not holds]


def statistics(items: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means over problems, by the name of what is measured."""
    rows = []
    for item in items:
        theory, _, query = item["question"].rpartition(" True or false: ")
        sentences = theory.rstrip(".").split(". ")
        rows.append(
            {
                "sentences": len(sentences) + 1,
                "words": len(item["question"].split()),
                "steps": len(item["steps"]),
                "words in the steps": sum(len(step.split()) for step in item["steps"]),
                "sentences with not": sum(" not " in sentence for sentence in sentences),
                "sentences with Every": sum(sentence.startswith("Every ") for sentence in sentences),
                "sentences with Each": sum(sentence.startswith("Each ") for sentence in sentences),
                "share True": float(item["answer"] == "True"),
                "share of queries with not": float(" not " in query),
                "share of conclusions with not": float(" not " in item["steps"][-1]),
            }
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
