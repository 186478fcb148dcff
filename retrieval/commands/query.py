"""``omni query``: ask a running server from the shell and see the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from encoders.commands.console import fail, handle_errors, json_option, print_json, print_table, say
from retrieval.client import ClientConfig, RetrievalClient, TlsConfig
from retrieval.client.config import require_target
from retrieval.client.results import Hit, RetrieveResult

SHOWN_ATTRIBUTES = ("character", "title")


def rows_of(hits: Sequence[Hit], extra: Sequence[str]) -> tuple[list[str], list[list[object]]]:
    """Lay out hits as a table.

    Args:
        hits: Best first.
        extra: Attributes to show besides the emoji ``character`` and the title.

    Returns:
        Column names, and a row per hit: rank, score, character and title where a hit has one, id,
        and the attributes.
    """
    with_character = any(hit.attributes.get("character") for hit in hits)
    with_title = any(hit.attributes.get("title") for hit in hits)
    names = [name for name in extra if name not in SHOWN_ATTRIBUTES]
    columns = [
        "#",
        "score",
        *([""] if with_character else []),
        *(["title"] if with_title else []),
        "id",
        *names,
    ]
    rows: list[list[object]] = []
    for rank, hit in enumerate(hits, 1):
        row: list[object] = [rank, hit.score]
        row += [hit.attributes.get("character") or " "] if with_character else []
        row += [hit.attributes.get("title", "")] if with_title else []
        row += [hit.id, *(_shown(hit.attributes.get(name)) for name in names)]
        rows.append(row)
    return columns, rows


def _shown(value: Any) -> object:
    if isinstance(value, list):
        text = ", ".join(map(str, value[:6]))
        return text + (" …" if len(value) > 6 else "")
    return "" if value is None else value


def summary(result: RetrieveResult) -> str:
    """Say in one line how the answer was found."""
    timings = result.timings
    recall = (
        ""
        if result.estimated_recall is None
        else f", expected recall {result.estimated_recall:.3f}"
    )
    share = "" if result.selectivity is None else f", filter passes {result.selectivity:.1%}"
    encode = f"encode {timings.encode_ns / 1e6:.2f} ms"
    if result.answer_cached:
        encode = "answer cached"
    elif result.cache_hit:
        encode = "cached"
    plan = f"{result.plan}, ef {result.ef}" if result.ef else result.plan
    where = (
        f"{encode}, search {timings.search_ns / 1e6:.2f} ms, server {timings.total_ns / 1e6:.2f} ms"
    )
    return f"{where} · {plan}{recall}{share} · release {result.release_id}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("text", required=False, default="")
@click.option(
    "--type",
    "entity_type",
    help="Entity type. Default: pin, or where the release has no pins the largest but query.",
)
@click.option("-k", default=10, show_default=True, help="Results wanted.")
@click.option(
    "--server",
    default="localhost:50051",
    show_default=True,
    metavar="HOST:PORT",
    envvar="OMNI_SERVER",
    help="Server to ask.",
)
@click.option(
    "--filter",
    "filter_text",
    default="",
    help="""Only entities that match, e.g. 'price < 20 and brand == "Acme"'.""",
)
@click.option(
    "--exclude", multiple=True, metavar="ID", help="Never return this id; repeat for more."
)
@click.option("--min-score", type=float, help="Drop results with a smaller cosine.")
@click.option(
    "--min-recall",
    type=float,
    help="Wanted share of the exact top k; the server chooses how to search.",
)
@click.option("--exact", is_flag=True, help="Scan every entity: the reference answer, slower.")
@click.option(
    "--fused/--no-fused",
    "fused",
    default=None,
    help="Whether words and known queries count beside vectors. [default: the release decides]",
)
@click.option(
    "--gate/--no-gate",
    "gate",
    default=None,
    help="Whether a fused answer to nonsense is empty. [default: the server decides]",
)
@click.option(
    "--diversity", type=float, help="Maximal marginal relevance, 0 (variety) to 1 (relevance)."
)
@click.option(
    "--collapse-above", type=float, help="Keep one of results whose cosine is above this."
)
@click.option(
    "--attribute",
    "attributes",
    multiple=True,
    help="Also show this attribute; repeat, or '*' for all (with --json).",
)
@click.option("--release", "release_id", default="", help="Answer from this release or fail.")
@click.option(
    "--language",
    default="",
    help="Language of the user, e.g. de: a label for the server's metrics.",
)
@click.option(
    "--country", default="", help="Country of the user, e.g. AT: a label for the server's metrics."
)
@click.option(
    "--embedding",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A .npy file with one ready vector instead of text; needs --space-id.",
)
@click.option("--space-id", default="", help="Embedding space of --embedding.")
@click.option(
    "--deadline",
    default=5.0,
    show_default=True,
    help="Seconds until the call, with its retries, gives up.",
)
@click.option("--token", envvar="OMNI_TOKEN", help="Bearer token (also read from OMNI_TOKEN).")
@click.option("--tls", is_flag=True, help="Encrypt, trusting the system's authorities.")
@click.option(
    "--tls-ca",
    type=click.Path(path_type=Path),
    help="PEM file of the authority to trust; implies --tls.",
)
@click.option(
    "--tls-cert",
    type=click.Path(path_type=Path),
    help="Client certificate (PEM) for mutual TLS; needs --tls-key.",
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Key of --tls-cert.")
@json_option
@handle_errors
def command(
    text: str,
    entity_type: str | None,
    k: int,
    server: str,
    filter_text: str,
    exclude: tuple[str, ...],
    min_score: float | None,
    min_recall: float | None,
    exact: bool,
    fused: bool | None,
    gate: bool | None,
    diversity: float | None,
    collapse_above: float | None,
    attributes: tuple[str, ...],
    release_id: str,
    language: str,
    country: str,
    embedding: Path | None,
    space_id: str,
    deadline: float,
    token: str | None,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    as_json: bool,
) -> None:
    """Ask a running server for the entities nearest to TEXT.

    Prints a table (or, with --json, everything the server said); one line on standard error tells
    how the answer was found.

    Example: omni query "happy birthday" --type pin -k 5
    """
    if bool(text.strip()) == bool(embedding):
        raise click.UsageError("Give either TEXT or --embedding.")
    require_target(server)
    for given in (text, filter_text, *exclude):
        _require_text(given)
    with_tls = tls or tls_ca or tls_cert or tls_key
    security = (
        TlsConfig(root_certificates=tls_ca, client_certificate=tls_cert, client_key=tls_key)
        if with_tls
        else None
    )
    config = ClientConfig(deadline_seconds=deadline, token=token, tls=security)
    with RetrievalClient(server, config) as client:
        entity_type = entity_type or _usual_type(client, release_id, deadline)
        result = client.retrieve(
            text,
            entity_type,
            k,
            filter=filter_text,
            exclude_ids=exclude,
            min_score=min_score,
            min_recall=min_recall,
            exact=exact,
            fusion=fused,
            gate=gate,
            diversity=diversity,
            collapse_above=collapse_above,
            attributes=list(dict.fromkeys((*SHOWN_ATTRIBUTES, *attributes))),
            release_id=release_id,
            language=language,
            country=country,
            embedding=_read_vector(embedding) if embedding else None,
            space_id=space_id,
        )
    if as_json:
        print_json(
            {
                **asdict(result),
                "hits": [hit._asdict() for hit in result.hits],
                "timings": result.timings._asdict(),
                "fused": result.fused and [score._asdict() for score in result.fused],
            }
        )
        return
    extra = [name for name in attributes if name != "*"]
    if "*" in attributes:
        extra = list(
            dict.fromkeys([*extra, *(name for hit in result.hits for name in hit.attributes)])
        )
    columns, rows = rows_of(result.hits, extra)
    if result.fused is not None:
        columns[1:1] = ["fused", "words", "votes"]
        for row, scores in zip(rows, result.fused, strict=True):
            row[1:1] = [scores.fused, scores.lexical, scores.votes]
    print_table(f"{entity_type}: {len(rows)} of at most {k}", columns, rows)
    say(summary(result))


def usual_type(counts: Mapping[str, int]) -> str:
    """Choose what is asked for where nothing is said: pins, or the largest type.

    Known queries, which ``omni start`` indexes beside the catalogue, are what people ask for only
    where there is nothing else.

    Args:
        counts: Entities of a release by type.
    """
    if "pin" in counts or not counts:
        return "pin"
    return max(counts, key=lambda name: (name != "query", counts[name]))


def _usual_type(client: RetrievalClient, release_id: str, deadline: float) -> str:
    entities = client.describe_release(release_id, deadline_seconds=deadline).entities
    return usual_type({name: entity.count for name, entity in entities.items()})


def _require_text(given: str) -> None:
    """Refuse an argument whose bytes are no UTF-8: the shell hands them over as half characters."""
    try:
        given.encode()
    except UnicodeEncodeError:
        shown = given.encode("utf-8", "surrogateescape")
        fail(f"expected text in UTF-8, got {shown!r}. Is the terminal set to another encoding?", 2)


def _read_vector(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False)).reshape(-1)
    except (OSError, ValueError) as error:
        fail(
            f"--embedding: {path} is not a .npy file with one vector ({error}). Write one with"
            " numpy.save.",
            2,
        )
