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
from torch import Tensor

from encoders.errors import BundleError, MissingDependency
from encoders.exact_search import exact_top_k
from encoders.text.query_ngrams import Int32, Int64, padded
from encoders.towers.forms import FORM_FILES
from encoders.towers.query_tower import QueryEncoder, pad

REPORT = "forms.json"
BATCH_SIZES = (1, 8, 64)
"""Batch sizes at which parity is measured; lengths are mixed, so padding is covered."""

FEWEST_TEXTS = 100
"""Parity on fewer texts says too little to write a form."""

MOST_NGRAMS = 1024
"""More buckets than a query of ``MAX_CHARACTERS`` can have."""
_LARGE_TABLE = 1 << 20
"""Tables of this size are made int8."""

_QUANTISED: tuple[tuple[str, ...], ...] = (("MatMul", "Gemm"), ("MatMul",), ())
"""Operators whose products become int8, tried in turn until the form is inside its tolerance.

Gemm is the last linear layer (and every layer of the Universal Sentence Encoder behind its
pooling); with none, the token table alone is int8.
"""

Encode = Callable[["ReadTexts"], np.ndarray]


@dataclass(frozen=True)
class ReadTexts:
    """Texts as a form reads them."""

    token_ids: Sequence[Sequence[int]]
    ngrams: tuple[Int32, Int64] | None = None
    """Buckets of words and n-grams, flat with offsets; None: the tower reads none."""
    buckets: int = 0

    @classmethod
    def of(cls, tower: QueryEncoder, texts: Sequence[str]) -> ReadTexts:
        """Read texts as a tower does."""
        token_ids = tower.tokenize(texts)
        if tower.ngrams is None:
            return cls(token_ids)
        return cls(token_ids, tower.ngrams.read(texts), tower.ngrams.buckets)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.token_ids)

    def take(self, rows: Sequence[int]) -> ReadTexts:
        """Select texts."""
        token_ids = [self.token_ids[row] for row in rows]
        if self.ngrams is None:
            return ReadTexts(token_ids)
        ids, offsets = self.ngrams
        own = [ids[offsets[row] : offsets[row + 1]] for row in rows]
        lengths = np.fromiter((len(buckets) for buckets in own), np.int64, len(own))
        kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return ReadTexts(token_ids, (np.concatenate([ids[:0], *own]), kept), self.buckets)

    def tensors(self, pad_id: int) -> dict[str, Tensor]:
        """Pad to rectangles: ``input_ids``, ``attention_mask`` and, where read, ``ngram_ids``."""
        ids, mask = pad(self.token_ids, pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.ngrams is not None:
            rows = np.arange(len(self))
            inputs["ngram_ids"] = torch.from_numpy(padded(*self.ngrams, rows, self.buckets))
        return inputs


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

    texts: ReadTexts
    vectors: np.ndarray
    """``(N, D)`` unit rows."""
    p50_ms: float
    pad_id: int

    @classmethod
    def of(cls, tower: QueryEncoder, texts: Sequence[str]) -> _Reference:
        """Encode and time texts by the trained tower."""
        read = ReadTexts.of(tower, texts)
        milliseconds = _median_ms(_torch_encode(tower), read)
        return cls(read, tower.encode(texts), milliseconds, tower.pad_id)

    def compare(self, form: str, path: Path) -> FormReport:
        """Measure the exported form in file ``path``."""
        encode = onnx_encode(path, self.pad_id)
        vectors = np.empty_like(self.vectors)
        cosines = []
        for size in BATCH_SIZES:
            for start in range(0, len(self.texts), size):
                rows = range(start, min(start + size, len(self.texts)))
                vectors[start : start + size] = encode(self.texts.take(rows))
            cosines.append(np.einsum("nd,nd->n", vectors, self.vectors))
        overlap = _overlap_at_10(self.vectors, vectors)
        smallest = float(np.min(cosines))
        tolerance = TOLERANCES[form]
        return FormReport(
            form_id=form,
            file=path.name,
            bytes=path.stat().st_size,
            texts=len(self.texts),
            cosine_min=smallest,
            cosine_mean=float(np.mean(cosines)),
            overlap_at_10=overlap,
            p50_ms=_median_ms(encode, self.texts),
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


class _Exported(torch.nn.Module):
    """A tower with the inputs that serving has."""

    def __init__(self, tower: QueryEncoder) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, ngram_ids: Tensor | None = None
    ) -> Tensor:
        """Encode: unit vectors ``(B, D)``."""
        vectors: Tensor = self.tower(input_ids, attention_mask, ngram_ids=ngram_ids)
        return vectors


def _export_fp32(tower: QueryEncoder, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependency("onnxscript", None, "Exporting the query tower to ONNX") from error
    tower.eval()
    example = ReadTexts.of(tower, ["a short query", "another query that is longer"])
    inputs = example.tensors(tower.pad_id)
    batch = torch.export.Dim("batch", min=1, max=4096)
    tokens = torch.export.Dim("tokens", min=2, max=tower.max_tokens)
    ngrams = torch.export.Dim("ngrams", min=1, max=MOST_NGRAMS)
    dynamic = {name: {0: batch, 1: tokens} for name in inputs}
    if "ngram_ids" in inputs:
        dynamic["ngram_ids"] = {0: batch, 1: ngrams}
    with _quiet(), torch.inference_mode():
        torch.onnx.export(
            _Exported(tower),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["query_vector"],
            dynamic_shapes=tuple(dynamic.values()),
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
    """Replace gathered fp32 tables (V, H) by int8 rows and one fp32 scale per row.

    Those of tokens (the largest) and of n-grams; rows are dequantised after the gather.
    """
    initial = {tensor.name: tensor for tensor in model.graph.initializer}
    gathers = [
        node
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[0] in initial
        and len(initial[node.input[0]].dims) == 2
    ]
    sizes = [int(np.prod(initial[gather.input[0]].dims)) for gather in gathers]
    for node, size in zip(gathers, sizes, strict=True):
        if size == max(sizes) or size >= _LARGE_TABLE:
            _quantise_table(model.graph, node, initial[node.input[0]])


def _quantise_table(graph: Any, node: Any, tensor: Any) -> None:
    """Replace one Gather of an fp32 table by one of int8 rows."""
    from onnx import helper, numpy_helper

    table = numpy_helper.to_array(tensor)
    name = f"{tensor.name}_int8"
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-8).astype(np.float32)
    rows = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
    graph.initializer.remove(tensor)
    graph.initializer.extend(
        [numpy_helper.from_array(rows, name), numpy_helper.from_array(scale, f"{name}_scale")]
    )
    position = list(graph.node).index(node)
    ids, output = node.input[1], node.output[0]
    graph.node.remove(node)
    replacement = [
        helper.make_node("Gather", [name, ids], [f"{name}_rows"], axis=0),
        helper.make_node("Cast", [f"{name}_rows"], [f"{name}_floats"], to=1),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{name}_row_scale"], axis=0),
        helper.make_node("Mul", [f"{name}_floats", f"{name}_row_scale"], [output]),
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


def onnx_encode(path: Path, pad_id: int = 0, threads: int = 1) -> Encode:
    """Make a function from texts to vectors (B, D) that runs an exported form on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(texts: ReadTexts) -> np.ndarray:
        inputs = {name: value.numpy() for name, value in texts.tensors(pad_id).items()}
        vectors: np.ndarray = session.run(None, inputs)[0]
        return vectors

    return encode


def _torch_encode(tower: QueryEncoder) -> Encode:
    tower.eval()

    @torch.inference_mode()
    def encode(texts: ReadTexts) -> np.ndarray:
        vectors: np.ndarray = _Exported(tower)(**texts.tensors(tower.pad_id)).numpy()
        return vectors

    return encode


def _median_ms(encode: Encode, texts: ReadTexts, rounds: int = 200) -> float:
    """Measure the median milliseconds of a text of at most 16 tokens, batch 1, on one thread."""
    short = [row for row, ids in enumerate(texts.token_ids) if len(ids) <= 16]
    one_by_one = [texts.take([row]) for row in (short or list(range(len(texts))))[:rounds]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for text in one_by_one:
            start = time.perf_counter_ns()
            encode(text)
            times.append(time.perf_counter_ns() - start)
    finally:
        torch.set_num_threads(threads)
    return round(float(np.median(times)) / 1e6, 4)
