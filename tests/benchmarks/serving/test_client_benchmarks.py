"""The client benchmarks' own arithmetic and processes: what they would report must be true."""

import asyncio
from functools import partial
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError

from benchmarks.faults.fuzz import SERVICES, Generator, Tally, fuzz
from benchmarks.quality.diversity import curve, intra_list_similarity
from benchmarks.serving.frames_load import frame_load
from benchmarks.serving.latency import Sample, per_stage
from benchmarks.serving.load import Load, client_load, stub_load
from benchmarks.serving.milvus_peer import mean_recall
from benchmarks.serving.peer_servers import Process, echo_server, omni_server
from benchmarks.serving.serve import more_workers, verdict
from protos import retrieval_pb2 as pb
from retrieval.client.results import RetrieveResult, Timings
from tests.helpers.serving.blocking_clients import failing_client, slow_client
from tests.helpers.serving.real_server import SmallStore


def result(cached: bool, timings: Timings) -> RetrieveResult:
    return RetrieveResult([], "r", "s", cached, "graph", 10, 1.0, None, timings, "")


def test_per_stage_stages_and_rest_add_up_to_client_time() -> None:
    timings = Timings(
        total_ns=4_000_000, queue_ns=1_000_000, encode_ns=2_000_000, search_ns=500_000, rerank_ns=0
    )
    stages = per_stage([Sample(5_000_000, result(False, timings))] * 5)
    assert stages["client"]["p50"] == pytest.approx(5.0)
    assert stages["grpc and network"]["p99"] == pytest.approx(1.0)
    assert stages["encode"]["mean"] == pytest.approx(2.0)


@pytest.mark.slow
def test_stub_load_closed_and_open_loop_count_calls() -> None:
    with echo_server(10) as echo:
        closed = stub_load(
            echo.address,
            "/any/Method",
            [b"x"],
            Load(concurrency=3, seconds=0.5, warmup_seconds=0.1, processes=2),
        )
        assert len(closed.latencies_ms) >= 3
        assert not closed.errors
        assert echo.cpu_seconds() > 0
        paced = stub_load(
            echo.address,
            "/any/Method",
            [b"x"],
            Load(concurrency=8, seconds=1.0, warmup_seconds=0.0, processes=1, rate=40),
        )
        assert len(paced.latencies_ms) == 40


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 7])
def test_frame_load_counts_answers_and_errors(concurrency: int, small_store: SmallStore) -> None:
    load = Load(concurrency=concurrency, seconds=1.0, warmup_seconds=0.0, processes=2)
    with echo_server(70_000) as echo:
        outcome = frame_load(echo.address, "/any/Method", [b"x", b"y" * 40_000], load)
        assert len(outcome.latencies_ms) >= 3 and not outcome.errors
    with omni_server(
        small_store.store.root, ["--encoder-form", "torch", "--metrics-port", "-1"]
    ) as ours:
        good, bad = (
            pb.RetrieveRequest(query="red cat", entity_type=name, k=3).SerializeToString()
            for name in ("pin", "video")
        )
        outcome = frame_load(
            ours.address, "/omnisearchsage.v1.Retrieval/Retrieve", [good, bad], load
        )
        assert len(outcome.latencies_ms) >= 3
        assert outcome.errors.keys() == {"grpc-status 5"}, "NOT_FOUND"


@pytest.mark.slow
def test_more_workers_one_and_two_answer_without_errors(small_store: SmallStore) -> None:
    vectors = small_store.bundle.encoder.encode(["red cat", "old boat"])
    release = SimpleNamespace(
        store=small_store.store.root,
        space_id=small_store.bundle.space_id,
        vectors=SimpleNamespace(queries=vectors),
    )
    found = more_workers(release, 3, 2, (4,), 1, 0.5)
    for name in ("ready_embeddings", "cached_texts"):
        assert found[name]["ratio_at_best"] > 0
        assert all(
            found[name][side][4]["errors"] == 0 and found[name][side][4]["requests_per_second"] > 0
            for side in ("one", "several")
        )


@pytest.mark.slow
def test_client_load_blocking_client_counts_failures() -> None:
    outcome = client_load(
        partial(slow_client, 0.02),
        Load(concurrency=4, seconds=0.5, warmup_seconds=0.0, processes=1),
    )
    assert outcome.summary()["p50_ms"] >= 20
    assert len(outcome.latencies_ms) <= 4 * 26
    failed = client_load(
        failing_client, Load(concurrency=1, seconds=0.2, warmup_seconds=0.0, processes=1)
    )
    assert failed.errors["ValueError"] > 0
    assert failed.requests_per_second == 0


def test_verdict_compares_each_side_at_its_best() -> None:
    def side(*rows: tuple[int, float, float, float]) -> dict[int, dict[str, float]]:
        return {
            c: {
                "requests_per_second": rps,
                "per_server_cpu_second": 2 * rps,
                "p50_ms": p50,
                "p99_ms": p99,
            }
            for c, rps, p50, p99 in rows
        }

    found = verdict(
        side((1, 500, 1, 3), (16, 4000, 4, 9)),
        side((1, 300, 2, 2), (16, 700, 20, 40), (32, 800, 30, 60)),
    )
    assert found["ratio_at_best"] == 5.0
    assert found["best_concurrency"] == {"ours": 16, "theirs": 32}
    assert found["lower"] == {
        "p50_ms at 1": True,
        "p99_ms at 1": False,
        "p50_ms at 16": True,
        "p99_ms at 16": True,
    }


def test_mean_recall_counts_ids_of_rows() -> None:
    assert mean_recall([["1", "2"], ["9", "3"]], np.array([[1, 2], [3, 4]])) == 0.75


def test_intra_list_similarity_is_the_mean_over_pairs() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    slow = np.mean([vectors[i] @ vectors[j] for i in range(7) for j in range(7) if i != j])
    assert intra_list_similarity(vectors) == pytest.approx(slow)
    assert intra_list_similarity(vectors[:1]) == 0.0


def test_curve_smaller_lambda_gives_less_similarity() -> None:
    rng = np.random.default_rng(1)
    pools = []
    for _ in range(20):
        vectors = rng.normal(size=(40, 16)).astype(np.float32) + 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        scores = np.sort(rng.random(40).astype(np.float32))[::-1]
        pools.append(([str(i) for i in range(40)], scores, vectors))
    points = curve(pools, [{"0", "39"}] * 20, 10)
    similarity = [p["intra_list_similarity"] for p in points]
    assert similarity[0] < similarity[-1]
    assert points[-1]["recall"] == 0.5, (
        "plain ranking returns the first but not the last of the pool"
    )


def test_generator_is_replayable_with_valid_and_broken_messages() -> None:
    first, second = (Generator(7, "f" * 64, 32) for _ in range(2))
    requests = [first.request() for _ in range(300)]
    assert requests == [second.request() for _ in range(300)]
    broken = 0
    for method, content in requests:
        service, name = method.split(".")[-1].split("/")
        if name in SERVICES[service]:
            try:
                SERVICES[service][name].FromString(content)
            except DecodeError:
                broken += 1
    assert 30 < broken < 270


def test_tally_untyped_error_is_a_fault_with_bytes() -> None:
    tally = Tally()
    tally.count("/s/M", "OK", b"a", "", 0.1)
    tally.count("/s/M", "INTERNAL", b"\x01\x02", "boom", 0.2)
    assert tally.faults == [
        {"method": "/s/M", "code": "INTERNAL", "details": "boom", "hex": "0102"}
    ]


def test_fuzz_echo_server_is_noticed() -> None:
    with echo_server(0) as echo, pytest.raises((AssertionError, grpc.RpcError)):
        tally = asyncio.run(
            fuzz(
                Process(echo.address, echo.pid),
                Generator(1, "f" * 64, 32),
                50,
                raw_share=0.2,
                concurrency=4,
            )
        )
        assert tally.codes["INVALID_ARGUMENT"] > 0, "an echo refuses nothing"
