"""Count over many problems how often latents decode to the results of the reasoning steps they replace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coconut_ds.data.problems import split_completion
from coconut_ds.evaluation.inspection.latents import Inspection

Tokens = Callable[[str], set[int]]


@dataclass(frozen=True)
class StepMatch:
    """rates[k][j]: share of problems whose state after k latents decodes to the result of step j."""

    top: int  # number of most likely tokens that count
    rates: tuple[tuple[float, ...], ...]
    by_chance: tuple[tuple[float, ...], ...]  # with the steps of another problem
    continued: tuple[float, ...]  # [k]: share of correct remaining steps in words after k latents
    num_problems: int


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


def result_of(step: str) -> str:
    """The text after the last '=' of a step (`<<3+4=7>>`: 7), else its last word."""
    result = step.rpartition("=")[2] if "=" in step else step.rpartition(" ")[2]
    return result.strip(" .<>\n")


def _rates(
    inspections: Sequence[Inspection], solutions: Sequence[tuple[str, ...]], tokens_of: Tokens, top: int
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


def _continued(inspections: Sequence[Inspection], latents_per_step: int) -> tuple[float, ...]:
    """Share of problems with exactly the steps that the latents did not replace."""
    shares = []
    for k in range(len(inspections[0].in_words)):
        right = [
            split_completion(i.in_words[k])[0] == "\n".join(i.problem.steps[-(-k // latents_per_step) :])
            for i in inspections
        ]
        shares.append(sum(right) / len(right))
    return tuple(shares)
