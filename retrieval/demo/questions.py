"""The real queries that the demo asks.

Pins in many languages; products and ads in English, and in other languages zero-shot.
"""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """One query, its language and the entity type to find."""

    language: str
    query: str
    entity_type: str
    note: str = ""
    gate: bool = False
    """Whether the query gate is asked to answer nothing to nonsense."""


ZERO_SHOT = "zero-shot across languages: tags are English"

QUESTIONS = (
    Question("en", "happy birthday", "pin"),
    Question("de", "Regenschirm im Regen", "pin"),
    Question("fr", "animal de la ferme", "pin"),
    Question("es", "comida rápida", "pin"),
    Question("it", "faccia triste", "pin"),
    Question("pl", "muzyka", "pin"),
    Question("ru", "новый год", "pin"),
    Question("tr", "spor", "pin"),
    Question("ar", "قطة", "pin"),
    Question("hi", "फूल", "pin"),
    Question("ja", "寿司", "pin"),
    Question("ko", "바다", "pin"),
    Question("zh", "医生", "pin"),
    Question("en", "shopping cart checkout", "product"),
    Question("fr", "musique", "product", ZERO_SHOT),
    Question("de", "Kamera", "product", ZERO_SHOT),
    Question("en", "video streaming", "ad"),
    Question("es", "música", "ad", ZERO_SHOT),
    Question("en", "antenna-bars-4", "product", "a name as a part number is"),
    Question("en", "indesign", "ad", "a brand"),
    Question("de", "Regenbogn", "pin", "misspelt"),
    Question("en", "xqzvkw jfpfwd", "pin", "nonsense, with the query gate", gate=True),
    Question("en", "heart", "query", "related queries, all languages"),
    Question("pt", "futebol", "query", "related queries, all languages"),
)
