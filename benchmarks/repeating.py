"""Text that repeats, for a model that learns to repeat: `speculation.py` measures on it.

    python benchmarks/repeating.py --out repeating.jsonl

Numbered lists, code, passages of Shakespeare and rows of words, each repeated within its document,
and stories with a refrain. `repeating.yaml` says how the model is trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from flags import benchmark_parser

from gpt_dist.errors import run_main
from gpt_dist.text.bundled import shakespeare

WORDS = """
apple big bird blue book boat bread bright cat chair cloud cold cup dark day deep dog door egg fast
fire fish flower fox friend game garden girl glad gold good green hand happy hat hill home horse
house ice jar key kind king lake leaf light lion little long map milk moon morning mouse new night
nose old orange owl park pig plate queen quiet rain red river road rock room sad sea shoe silver
slow small snow song star stone story strong sun sweet table tall tea tiger tired top town toy tree
walk warm water white wind window wise wolf yellow
""".split()  # noqa: SIM905
NAMES = """
Anna Ben Clara Dan Ella Finn Grace Hugo Ida Jack Lily Max Nora Otto Rosa Sam Tom
""".split()  # noqa: SIM905
LENGTH = 1500
"""Characters of a document, about."""


def repeated(text: str) -> str:
    """``text`` again and again, up to `LENGTH`."""
    return (text * (LENGTH // len(text) + 1))[:LENGTH]


def a_list(dice: Random, plays: str) -> str:
    words = dice.choices(WORDS, k=dice.randint(1, 4))
    first, last = dice.choice(WORDS).title(), dice.choice([*WORDS, *map(str, range(40))])
    start = dice.randint(1, 60)
    lines = (f"{i}. {first} {words[i % len(words)]} {last}.\n" for i in range(start, start + 100))
    return "".join(lines)[:LENGTH]


def code(dice: Random, plays: str) -> str:
    indent, prefix = dice.choice(["    ", "  "]), dice.choice(["get_", "read_", "is_", ""])
    ending = dice.choice(["", *map(str, range(40))])
    names = (f"{dice.choice([*WORDS, *'abcdefgh'])}{ending}" for _ in range(40))
    methods = (f"def {prefix}{name}(self):\n{indent}return self.{name}\n\n" for name in names)
    return "".join(methods)[:LENGTH]


def passage(dice: Random, plays: str) -> str:
    length = dice.randint(60, 500)
    start = dice.randrange(len(plays) - length)
    return repeated(plays[start : start + length] + "\n\n")


def row_of_words(dice: Random, plays: str) -> str:
    return repeated(" ".join(dice.choices(WORDS, k=dice.randint(4, 60))) + "\n")


def story(dice: Random, plays: str) -> str:
    def word() -> str:
        return dice.choice(WORDS)

    name, place = dice.choice(NAMES), word()
    refrain = f'"Come to the {place}," said the {word()} {word()}. "I have a {word()} for you." '
    text = f"Once upon a time there was a {word()} girl with {dice.randint(0, 40)} {word()}s. "
    text += f"She was called {name}. "
    while len(text) < LENGTH:
        text += f"{name} met a {word()} {word()}. {refrain}But {name} had to go on. "
    return text[:LENGTH]


KINDS: tuple[Callable[[Random, str], str], ...] = (a_list, code, passage, row_of_words, story)


def documents(count: int, seed: int) -> list[str]:
    """``count`` documents of all kinds."""
    dice, plays = Random(seed), shakespeare()
    return [dice.choice(KINDS)(dice, plays) for _ in range(count)]


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with arguments.out.open("w") as file:
        for text in documents(arguments.documents, arguments.seed):
            print(json.dumps({"text": text}), file=file)


if __name__ == "__main__":
    run_main(main)
