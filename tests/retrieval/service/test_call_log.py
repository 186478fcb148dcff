"""Lines about calls, ids of internal errors, rates and deadlines of the server."""

import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import grpc
import pytest

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.observability.call_log import CallLog, FinishedCall
from tests.helpers.serving.real_server import SmallStore, serving

ASK = pb.RetrieveRequest(query="private words", entity_type="pin", k=3, request_id="r-7")


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """Records of the calls' logger."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("retrieval.calls", "retrieval.service")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_access_log_has_a_line_per_call_without_query_text(
    small_store: SmallStore, lines: list[logging.LogRecord], transport: str
) -> None:
    with (
        serving(small_store, access_log=True, transport=transport) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        stub = rpc.RetrievalStub(channel)
        for _ in range(2):
            stub.Retrieve(ASK, timeout=60)
        with pytest.raises(grpc.RpcError):
            stub.Retrieve(pb.RetrieveRequest(query="x", entity_type="pin"), timeout=60)
    first, second, refused = [line.__dict__ for line in lines]
    assert (first["method"], first["code"], first["request_id"]) == ("Retrieve", "OK", "r-7")
    assert first["token"] == "anonymous" and first["peer"].startswith("ipv4:127.0.0.1:")
    assert first["encode_ms"] > 0 and first["ms"] > 0 and not first["answer_cached"]
    assert second["answer_cached"] and refused["code"] == "INVALID_ARGUMENT"
    assert "private" not in str([line.getMessage() for line in lines])


@pytest.mark.slow
def test_slow_calls_have_a_line_and_quick_ones_none(
    small_store: SmallStore, lines: list[logging.LogRecord]
) -> None:
    for slow_ms, count in ((1e-6, 1), (0.0, 0), (1e6, 0)):
        lines.clear()
        with (
            serving(small_store, slow_ms=slow_ms) as running,
            grpc.insecure_channel(running.address) as channel,
        ):
            rpc.RetrievalStub(channel).Retrieve(ASK, timeout=60)
        assert len(lines) == count
        assert all(line.levelno == logging.WARNING for line in lines)


def test_internal_error_names_the_id_under_which_the_log_holds_it(
    small_store: SmallStore, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serving(small_store) as running,
        grpc.insecure_channel(running.address) as channel,
    ):

        async def broken(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(running.server.service.queries, "of_message", broken)
        with pytest.raises(grpc.RpcError) as failed:
            rpc.RetrievalStub(channel).Retrieve(ASK, timeout=60)
    details = failed.value.details()
    assert failed.value.code() is grpc.StatusCode.INTERNAL and "secret" not in details
    error_id = details.rstrip(".").rpartition(" ")[2]
    assert len(error_id) == 12 and any(error_id in line.getMessage() for line in lines)


def test_rate_of_a_token_bounds_all_its_calls(small_store: SmallStore, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{sha256(name.encode()).hexdigest()}"\n{line}\n'
            for name, line in (("slow", "rate = 0.001\nburst = 3"), ("free", ""))
        )
    )
    with (
        serving(small_store, tokens=tokens) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        stub = rpc.RetrievalStub(channel)

        def ask(token: str) -> grpc.StatusCode:
            try:
                stub.Retrieve(ASK, timeout=60, metadata=(("authorization", f"Bearer {token}"),))
            except grpc.RpcError as error:
                assert "retry-after-ms" in dict(error.trailing_metadata())
                return error.code()
            return grpc.StatusCode.OK

        ok, full = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [ask("slow") for _ in range(5)] == [ok, ok, ok, full, full]
        assert [ask("free") for _ in range(5)] == [ok] * 5


@pytest.mark.parametrize("timeout", [None, 50.0])
def test_call_ends_at_the_servers_own_deadline(
    small_store: SmallStore, monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    import asyncio

    settings = {"default_deadline_seconds": 0.3, "max_deadline_seconds": 0.3}
    with (
        serving(small_store, **settings) as running,
        grpc.insecure_channel(running.address) as channel,
    ):

        async def stuck(*_: object) -> None:
            await asyncio.sleep(60)

        monkeypatch.setattr(running.server.service.queries, "of_message", stuck)
        with pytest.raises(grpc.RpcError) as failed:
            rpc.RetrievalStub(channel).Retrieve(ASK, timeout=timeout)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.3 s" in failed.value.details()


def test_call_log_text_of_a_caller_forges_no_line_and_no_value(
    lines: list[logging.LogRecord],
) -> None:
    forged = "a\ncall method=Admin code=OK"
    request = pb.RetrieveRequest(request_id=forged, entity_type="pin")
    call = FinishedCall(
        method="Retrieve",
        code="OK",
        seconds=0.001,
        peer="ipv4:127.0.0.1:9",
        token="web",
        metadata=(),
        request=request,
        response=None,
    )
    CallLog(every=True, slow_seconds=0).write(call)
    (line,) = lines
    text = line.getMessage()
    assert text.startswith("call method=Retrieve code=OK ms=1.0 peer=ipv4:127.0.0.1:9 token=web ")
    assert f"request_id={json.dumps(forged)} entity_type=pin" in text and "\n" not in text
    assert line.__dict__["request_id"] == forged, "a handler that writes JSON escapes by itself"
