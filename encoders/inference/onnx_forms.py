"""Export the query tower to ONNX, fp32 and int8, and measure each form against the trained tower.

The int8 form quantises every matrix product by weights (symmetric, per output channel, activations
scaled per batch by ONNX Runtime's dynamic quantisation) and the token embeddings row by row; scores
between the two halves of attention stay fp32. Which products are quantised is decided on
calibration texts: as many as keep the form inside its tolerance.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoders.errors import BundleError, MissingDependency
from encoders.exact_search import exact_top_k
from encoders.towers.forms import FORM_FILES
from encoders.towers.query_tower import QueryEncoder, pad

REPORT = "forms.json"
BATCH_SIZES = (1, 8, 64)
"""Batch sizes at which parity is measured; lengths are mixed, so padding is covered."""

FEWEST_TEXTS = 100
"""Parity on fewer texts says too little to write a form."""

_QUANTISED: tuple[tuple[str, ...], ...] = (("MatMul", "Gemm"), ("MatMul",), ())
"""Operators whose products become int8, tried in turn until the form is inside its tolerance.

Gemm is the last linear layer (and every layer of the Universal Sentence Encoder behind its
pooling); with none, the token table alone is int8.
"""

Encode = Callable[[Sequence[Sequence[int]]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What a form must keep of the trained tower's vectors."""

    cosine: float
    """Smallest cosine between a text's two vectors, over all texts and batch sizes."""
    overlap: float
    """Share of the exact top 10 among the texts that stays, on average."""


TOLERANCES = {
    "onnx-fp32": Tolerance(cosine=0.999, overlap=0.999),
    "onnx-int8": Tolerance(cosine=0.99, overlap=0.95),
}


@dataclass(frozen=True, kw_only=True)
class FormReport:
    """How one exported form differs from the trained tower."""

    form_id: str
    file: str
    bytes: int
    texts: int
    cosine_min: float
    cosine_mean: float
    overlap_at_10: float
    p50_ms: float
    """Median of one text at batch 1 on one thread, tokenising excluded."""
    torch_p50_ms: float
    """The same for the trained tower in eager torch fp32, in the same run."""
    within_tolerance: bool


@dataclass(frozen=True)
class _Reference:
    """The texts of a parity measurement under the trained tower."""

    token_ids: Sequence[Sequence[int]]
    vectors: np.ndarray
    """``(N, D)`` unit rows."""
    p50_ms: float

    @classmethod
    def of(cls, tower: QueryEncoder, texts: Sequence[str]) -> _Reference:
        """Encode and time texts by the trained tower."""
        token_ids = tower.tokenize(texts)
        vectors = tower.encode(texts)
        return cls(token_ids, vectors, _median_ms(_torch_encode(tower), token_ids))

    def compare(self, form: str, path: Path) -> FormReport:
        """Measure the exported form in file ``path``."""
        encode = onnx_encode(path)
        vectors = np.empty_like(self.vectors)
        cosines = []
        for size in BATCH_SIZES:
            for start in range(0, len(self.token_ids), size):
                vectors[start : start + size] = encode(self.token_ids[start : start + size])
            cosines.append(np.einsum("nd,nd->n", vectors, self.vectors))
        overlap = _overlap_at_10(self.vectors, vectors)
        smallest = float(np.min(cosines))
        tolerance = TOLERANCES[form]
        return FormReport(
            form_id=form,
            file=path.name,
            bytes=path.stat().st_size,
            texts=len(self.token_ids),
            cosine_min=smallest,
            cosine_mean=float(np.mean(cosines)),
            overlap_at_10=overlap,
            p50_ms=_median_ms(encode, self.token_ids),
            torch_p50_ms=self.p50_ms,
            within_tolerance=smallest >= tolerance.cosine and overlap >= tolerance.overlap,
        )


def export_forms(
    tower: QueryEncoder,
    folder: Path,
    texts: Sequence[str],
    forms: Sequence[str] = tuple(FORM_FILES),
) -> list[FormReport]:
    """Write the forms and ``forms.json`` into ``folder``.

    Args:
        tower: The trained query tower.
        folder: Usually the bundle's ``forms/``.
        texts: At least 100 real queries of many lengths, for calibration and parity.
        forms: Any of ``onnx-fp32``, ``onnx-int8``.

    Returns:
        One report per form, also written to ``forms.json``.

    Raises:
        BundleError: A form misses its tolerance; it is not written.
        ValueError: Fewer than 100 texts.
    """
    if len(texts) < FEWEST_TEXTS:
        raise ValueError(f"parity needs at least {FEWEST_TEXTS} texts, but got {len(texts)}")
    folder.mkdir(parents=True, exist_ok=True)
    reference = _Reference.of(tower, texts)
    reports = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
        fp32 = Path(scratch) / FORM_FILES["onnx-fp32"]
        _export_fp32(tower, fp32)
        for form in forms:
            path = Path(scratch) / FORM_FILES[form]
            if form == "onnx-int8":
                report = _quantise_within_tolerance(fp32, path, reference)
            else:
                report = reference.compare(form, path)
            if not report.within_tolerance:
                other = (
                    "--encoder-form torch of omni serve"
                    if form == "onnx-fp32"
                    else "another form, or export with --form onnx-fp32 only"
                )
                raise BundleError(
                    f"{form}: smallest cosine {report.cosine_min:.4f} and top-10 overlap"
                    f" {report.overlap_at_10:.3f}, but it needs {TOLERANCES[form].cosine} and"
                    f" {TOLERANCES[form].overlap}. Serve with {other}."
                )
            reports.append(report)
        for report in reports:
            (Path(scratch) / report.file).replace(folder / report.file)
        summary = Path(scratch) / REPORT
        summary.write_text(
            json.dumps({report.form_id: asdict(report) for report in reports}, indent=2) + "\n",
            encoding="utf-8",
        )
        summary.replace(folder / REPORT)
    return reports


def measure_parity(
    tower: QueryEncoder, folder: Path, form: str, texts: Sequence[str]
) -> FormReport:
    """Measure an exported form against the trained tower, on any texts."""
    return _Reference.of(tower, texts).compare(form, folder / FORM_FILES[form])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' advice, which does not concern this model; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _export_fp32(tower: QueryEncoder, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependency("onnxscript", None, "Exporting the query tower to ONNX") from error
    tower.eval()
    example = tower.tokenize(["a short query", "another query that is longer"])
    ids, mask = pad(example, int(tower.tokenizer.pad_token_id))
    batch = torch.export.Dim("batch", min=1, max=4096)
    tokens = torch.export.Dim("tokens", min=2, max=tower.max_tokens)
    dynamic = {0: batch, 1: tokens}
    with _quiet(), torch.inference_mode():
        torch.onnx.export(
            tower,
            (ids, mask),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["query_vector"],
            dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
            dynamo=True,
            verbose=False,
            external_data=False,
        )


def _quantise_within_tolerance(fp32: Path, int8: Path, reference: _Reference) -> FormReport:
    """Write the int8 form with as many int8 products as stay inside its tolerance."""
    for operators in _QUANTISED:
        _quantise(fp32, int8, operators)
        report = reference.compare("onnx-int8", int8)
        if report.within_tolerance:
            break
    return report


def _quantise(fp32: Path, int8: Path, operators: Sequence[str]) -> None:
    """Write the int8 form of an fp32 export.

    The token table becomes int8 always, and the products of these operators.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = onnx.load(fp32)
    # Shapes from the exporter go stale when the quantiser transposes a Gemm.
    del plain.graph.value_info[:]
    if operators:
        with _quiet():
            quantize_dynamic(
                plain,
                int8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=list(operators),
                extra_options={"MatMulConstBOnly": True},
            )
        plain = onnx.load(int8)
    _quantise_embeddings(plain)
    onnx.save(plain, int8)


def _quantise_embeddings(model: Any) -> None:
    """Replace the largest gathered fp32 table (V, H) by int8 rows and one fp32 scale per row.

    Rows are dequantised after the gather.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    initial = {tensor.name: tensor for tensor in graph.initializer}
    gathers = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in initial]
    node = max(gathers, key=lambda gather: int(np.prod(initial[gather.input[0]].dims)))
    table = numpy_helper.to_array(initial[node.input[0]])
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-8).astype(np.float32)
    rows = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
    graph.initializer.remove(initial[node.input[0]])
    graph.initializer.extend(
        [numpy_helper.from_array(rows, "table_int8"), numpy_helper.from_array(scale, "table_scale")]
    )
    position = list(graph.node).index(node)
    ids, output = node.input[1], node.output[0]
    graph.node.remove(node)
    replacement = [
        helper.make_node("Gather", ["table_int8", ids], ["table_rows_int8"], axis=0),
        helper.make_node("Cast", ["table_rows_int8"], ["table_rows"], to=1),
        helper.make_node("Gather", ["table_scale", ids], ["table_row_scale"], axis=0),
        helper.make_node("Mul", ["table_rows", "table_row_scale"], [output]),
    ]
    for offset, new in enumerate(replacement):
        graph.node.insert(position + offset, new)


def _overlap_at_10(expected: np.ndarray, got: np.ndarray) -> float:
    """Average the share of each text's ten nearest other texts that its other form finds as well.

    Among fewer texts it is the share of all others; a text that is alone has none to lose, and
    counts as 1.
    """
    depth = min(11, len(expected))
    before = exact_top_k(expected, expected, depth)[0].tolist()
    after = exact_top_k(got, expected, depth)[0].tolist()
    shares = []
    for own in range(len(expected)):
        wanted = [row for row in before[own] if row != own][:10]
        found = [row for row in after[own] if row != own][:10]
        shares.append(len(set(wanted) & set(found)) / len(wanted) if wanted else 1.0)
    return float(np.mean(shares))


def onnx_encode(path: Path, threads: int = 1) -> Encode:
    """Make a function from token ids to vectors (B, D) that runs an exported form on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        ids, mask = pad(token_ids, 0)
        vectors: np.ndarray = session.run(
            None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        )[0]
        return vectors

    return encode


def _torch_encode(tower: QueryEncoder) -> Encode:
    tower.eval()

    @torch.inference_mode()
    def encode(token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        vectors: np.ndarray = tower(*pad(token_ids, int(tower.tokenizer.pad_token_id))).numpy()
        return vectors

    return encode


def _median_ms(encode: Encode, token_ids: Sequence[Sequence[int]], rounds: int = 200) -> float:
    """Measure the median milliseconds of a text of at most 16 tokens, batch 1, on one thread."""
    short = [ids for ids in token_ids if len(ids) <= 16][:rounds] or list(token_ids[:rounds])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for ids in short:
            start = time.perf_counter_ns()
            encode([ids])
            times.append(time.perf_counter_ns() - start)
    finally:
        torch.set_num_threads(threads)
    return round(float(np.median(times)) / 1e6, 4)
