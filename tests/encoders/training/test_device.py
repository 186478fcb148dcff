"""bf16 is used where the device computes in it; elsewhere a run that asks for it is the fp32 run,
and says so.
"""

import logging
from pathlib import Path

import pytest
import torch

from encoders.training import inputs, loop
from encoders.training.device import computes_bf16
from encoders.training.loop import TrainResult, TrainStart, train
from tests.helpers.training_examples import small_config, tiny_query_encoder, world


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu sse avx2 avx512f avx512_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu sse avx2 avx512f amx_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu sse avx2 avx512f\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("vendor: unknown\n", True),
    ],
)
def test_computes_bf16_follows_cpuinfo_flags(tmp_path: Path, content: str, expected: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(content)
    assert computes_bf16("cpu", path) is expected
    assert computes_bf16("cuda", path)


def test_computes_bf16_no_cpuinfo_is_true(tmp_path: Path) -> None:
    assert computes_bf16("cpu", tmp_path / "missing")


def run(precision: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> TrainResult:
    for module in (inputs, loop):
        monkeypatch.setattr(module, "computes_bf16", lambda device_type: native)
    start = TrainStart(tiny_query_encoder(0))
    return train(small_config(steps=3, precision=precision), world(), start=start)


def test_train_bf16_without_instructions_equals_fp32_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "encoders")
    emulated, native, full = (
        run(*case, monkeypatch) for case in (("bf16", False), ("bf16", True), ("fp32", False))
    )
    weights = [result.query_encoder.projection.weight for result in (emulated, native, full)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[1], weights[2])
    assert sum("training in fp32" in line for line in caplog.messages) == 1
