"""Mutated trees and bytes, for every test that reads what it did not write."""

import copy
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 5  # a reader that takes longer hangs

BILLION_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -1e-320, float("nan"), float("inf"), "", " ",
    "None", "nan", "1e-4", "../../etc/passwd", "/etc/passwd", "a\x00b", "\ud800", "\u202e\u0007", 
    "x" * 10_000,
    [], {}, [[]], {"a": {"b": {}}}, [None], ["x"] * 1000, {"": ""}, "!!python/object/apply:os.system [id]",
    "${HOME}", "%s%n",
]  # fmt: skip
ODD_BYTES = [
    b"", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"\x00" * 64, b"[" * 200_000, b"{" * 200_000,
    b'{"a":' * 100_000,
    b"- " * 50_000, BILLION_LAUGHS.encode(), b"!!python/object/apply:os.system ['id']", b"&a [*a]",
    b"a: &a\n  b: *a\n", b'{"a": 1, "a": 2}', b"9" * 10_000, b"[1e999999999]", b"<<: *x", b"? [a]\n: b",
    b"%YAML 9.9\n---\na", b"\r\n\x85", "naïve: ∑".encode("utf-16"), b"NaN", b"-Infinity", b"null", b"true",
    b'"text"',
]  # fmt: skip


def mutate(draw: random.Random, tree: Any) -> Any:
    """The tree with one to three places changed: a value replaced, a key dropped, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            break
        holder, key = draw.choice(places)
        match draw.randrange(4):
            case 0 | 1:
                holder[key] = copy.deepcopy(draw.choice(ODD_VALUES))
            case 2:
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[draw.choice([f"{key}x", "", "a" * 300, "\u202e", str(key)[1:]])] = draw.choice(
                    ODD_VALUES
                )
            case _:
                holder.insert(0, copy.deepcopy(draw.choice(ODD_VALUES)))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def damage(draw: random.Random, content: bytes) -> bytes:
    """Bytes cut, flipped, doubled, moved, or replaced by something odd."""
    place = draw.randrange(len(content) + 1)
    match draw.randrange(5):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
        case 2:
            return content[:place] + draw.choice(ODD_BYTES) + content[place:]
        case 3:
            return content[place:] + content[:place]
        case _:
            return draw.choice(ODD_BYTES)


def as_bytes(draw: random.Random, tree: Any, dump: Callable[[Any], str]) -> bytes:
    if draw.random() < 0.6:
        return dump(mutate(draw, tree)).encode("utf-8", "surrogatepass")
    return damage(draw, dump(tree).encode())


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"still reading after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
