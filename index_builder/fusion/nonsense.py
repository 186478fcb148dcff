"""Queries that no catalogue of things answers: what a query gate is fitted and measured on."""

from __future__ import annotations

import random
from typing import NamedTuple

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Vocabulary(NamedTuple):
    """Parts of sentences and of program text."""

    subjects: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    names: tuple[str, ...]
    calls: tuple[str, ...]
    code: tuple[str, ...]
    """With fields ``a`` and ``b`` (names), ``f`` (a call) and ``n`` (a number)."""


VOCABULARY = Vocabulary(
    subjects=(
        "the arbitration committee",
        "a non-compete covenant",
        "the tangent bundle",
        "each bilinear form",
        "the court of first instance",
        "an accrued pension liability",
        "the null hypothesis",
        "this limitation of damages",
    ),
    verbs=(
        "was adjourned pending",
        "is invariant under",
        "shall survive termination of",
        "may be waived in respect of",
        "cannot be inferred from",
        "vanishes identically on",
        "was amortised over",
    ),
    objects=(
        "the spectral gap of the operator",
        "article 9 of the framework agreement",
        "the residual sum of squares",
        "any antecedent breach of warranty",
        "the consolidated statement of cash flows",
        "a closed subgroup of finite index",
        "the doctrine of sovereign immunity",
    ),
    names=("acc", "req", "self._lock", "tbl", "err", "bufsize", "opts", "iter", "dst", "env"),
    calls=("strncpy", "calloc", "torch.cat", "yaml.dump", "std::swap", "assertTrue", "sprintf"),
    code=(
        "while (({a} = {f}({b}, {n})) != NULL) {{ {b}->next = {a}; }}",
        "if not isinstance({a}, dict): raise TypeError({f}({b}))",
        "UPDATE {a} SET {b} = {n} WHERE id IN (SELECT MAX(id) FROM {a});",
        "let {a} = {b}.map(x => {f}(x)).filter(Boolean)[{n}];",
        "typedef struct {{ int {a}[{n}]; char *{b}; }} {f}_t;",
        "sed -i 's/{a}/{b}/g' $(git ls-files | head -{n})",
    ),
)
"""What gates are fitted on; measure them on another one."""


def nonsense_queries(count: int, seed: int = 0, vocabulary: Vocabulary = VOCABULARY) -> list[str]:
    """Return distinct queries: random letters, sentences of law and algebra, program text.

    Args:
        count: About a third is of each kind.
        seed: Another one gives other queries.
        vocabulary: Of sentences and program text.
    """
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        kind = len(found) % 3
        if kind == 0:
            found.setdefault(_random_letters(draw))
        elif kind == 1:
            found.setdefault(_sentence(draw, vocabulary))
        else:
            found.setdefault(_code(draw, vocabulary))
    return list(found)


def _random_letters(draw: random.Random) -> str:
    words = [
        "".join(draw.choices(LETTERS, k=draw.randint(4, 11))) for _ in range(draw.choice((1, 1, 2)))
    ]
    return " ".join(words)


def _sentence(draw: random.Random, words: Vocabulary) -> str:
    parts = (words.subjects, words.verbs, words.objects)
    return " ".join(draw.choice(part) for part in parts)


def _code(draw: random.Random, words: Vocabulary) -> str:
    name, other = draw.sample(words.names, 2)
    number = draw.randint(1, 999)
    return draw.choice(words.code).format(a=name, b=other, f=draw.choice(words.calls), n=number)
