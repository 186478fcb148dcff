"""The query tower at serving time: tokenise, pad to a length bucket, run the fastest form.

On a GPU: torch in bfloat16, one CUDA graph per (batch, length) bucket. On CPU: ONNX Runtime with
the release's int8 form, else torch. Every form carries its own form id, which is part of the cache
key and of every answer.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from encoders.errors import BundleError, ConfigError, MissingDependency
from encoders.text.ngrams import TEXT_RULES
from encoders.text.normal_forms import normalize_query
from encoders.text.query_ngrams import ngram_buckets, padded
from encoders.towers.forms import FORM_FILES, MAX_TOKENS, NGRAM_SETTINGS
from retrieval.encoding.batcher import LENGTH_BUCKETS, bucket_of

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
log = logging.getLogger(__name__)

KEPT_SHARES = 8192
"""Texts whose share of unknown characters is kept."""

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Batch sizes for which CUDA graphs are captured; a batch is padded up to the next one."""


class QueryEncoding(Protocol):
    """One runtime form of the query tower."""

    form_id: str
    dimension: int

    def encode(self, texts: Sequence[str]) -> Float32:
        """Encode B normalised texts: ``(B, D)`` float32 unit rows.

        Called from one thread at a time.
        """
        ...

    def unknown_share(self, text: str) -> float:
        """Return the share of a text's characters that the tower's tokenizer does not know."""
        ...


class QueryTokenizer:
    """The tower's own tokenizer, cut at 64 tokens, padded to a length bucket.

    Args:
        folder: The release's ``query_encoder/``.

    Raises:
        BundleError: The folder holds no ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        places = (folder / "tokenizer.json", folder / "0_Transformer" / "tokenizer.json")
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise BundleError(
                f"{folder.name}: expected tokenizer.json in the query encoder, but there is none."
                " Build the release again."
            )
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "[CLS]" in a text is text
        tokenizer.enable_truncation(max_length=self._max_length(path.parent))
        self._tokenizer = tokenizer
        self.pad_id = self._pad_id(tokenizer, path.parent)
        self.buckets = self._buckets(folder)
        self._unknown_id = self._unknown(tokenizer, path.parent)
        self.unknown_share = functools.lru_cache(KEPT_SHARES)(self._unknown_share)
        """``text -> float``: see ``QueryEncoding.unknown_share``."""

    @staticmethod
    def _max_length(folder: Path) -> int:
        for name in ("sentence_bert_config.json", "../sentence_bert_config.json"):
            path = folder / name
            if path.is_file():
                length = json.loads(path.read_text(encoding="utf-8")).get("max_seq_length")
                if isinstance(length, int) and length > 0:
                    return min(length, MAX_TOKENS)
        return MAX_TOKENS

    @staticmethod
    def _pad_id(tokenizer: Tokenizer, folder: Path) -> int:
        config = folder / "config.json"
        if config.is_file():
            pad = json.loads(config.read_text(encoding="utf-8")).get("pad_token_id")
            if isinstance(pad, int):
                return pad
        for token in ("[PAD]", "<pad>"):
            found = tokenizer.token_to_id(token)
            if found is not None:
                return int(found)
        return 0

    @staticmethod
    def _unknown(tokenizer: Tokenizer, folder: Path) -> int | None:
        """Return the id of the unknown token; None: the tokenizer spells out every text."""
        names = ["[UNK]", "<unk>"]
        config = folder / "tokenizer_config.json"
        if config.is_file():
            name = json.loads(config.read_text(encoding="utf-8")).get("unk_token")
            names.insert(0, name.get("content", "") if isinstance(name, dict) else str(name))
        found = (tokenizer.token_to_id(name) for name in names)
        return next((int(token) for token in found if token is not None), None)

    def _unknown_share(self, text: str) -> float:
        if self._unknown_id is None:
            return 0.0
        normal = normalize_query(text)
        encoding = self._tokenizer.encode(normal)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        unknown = "".join(normal[a:b] for token, (a, b) in spans if token == self._unknown_id)
        read = normal[: max((end for _, end in encoding.offsets), default=0)].replace(" ", "")
        return min(1.0, len(unknown.replace(" ", "")) / len(read)) if read else 0.0

    @staticmethod
    def _buckets(folder: Path) -> int:
        """Return the number of n-gram buckets; 0: the tower reads no n-grams."""
        settings = folder / NGRAM_SETTINGS
        if not settings.is_file():
            return 0
        described = json.loads(settings.read_text(encoding="utf-8"))
        if described.get("text_rules") != TEXT_RULES:
            raise BundleError(
                f"{folder.name}: n-grams by text rules {described.get('text_rules')!r}, but this"
                f" code reads by {TEXT_RULES}. Serve with the version that built the release, or"
                " build it again."
            )
        return int(described["buckets"])

    def ngram_ids(self, texts: Sequence[str], rows: Sequence[int]) -> tuple[Int64, ...]:
        """Return the n-gram buckets ``(B, G)`` of some texts, if the tower reads them."""
        if not self.buckets:
            return ()
        ids, offsets = ngram_buckets([texts[row] for row in rows], self.buckets)
        return (padded(ids, offsets, range(len(rows)), self.buckets),)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, at most 64."""
        normal = [normalize_query(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch(normal)]

    def pad(self, rows: Sequence[Sequence[int]], length: int) -> tuple[Int64, Int64]:
        """Pad to ``(B, length)`` and return token ids and attention mask, int64."""
        ids = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask


def encode_by_length(
    tokenizer: QueryTokenizer,
    texts: Sequence[str],
    dimension: int,
    forward: Callable[..., Float32],
    pad_to_bucket: bool,
) -> Float32:
    """Tokenise, group by length bucket, run ``forward`` per group and put the rows back in order.

    Args:
        tokenizer: The tower's tokenizer.
        texts: B texts.
        dimension: D.
        forward: ``(token ids (b, L), mask (b, L)) -> (b, D)`` float32; a tower that reads n-grams
            takes their buckets ``(b, G)`` as well.
        pad_to_bucket: Pad to the bucket's length (fixed shapes for CUDA graphs) instead of the
            longest text of the group.
    """
    out = np.empty((len(texts), dimension), dtype=np.float32)
    rows = tokenizer.token_ids(texts)
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(bucket_of(len(row)), []).append(i)
    for bucket, members in groups.items():
        length = bucket if pad_to_bucket else max(1, max(len(rows[i]) for i in members))
        inputs = tokenizer.pad([rows[i] for i in members], length)
        out[members] = forward(*inputs, *tokenizer.ngram_ids(texts, members))
    return out


def probed_dimension(tokenizer: QueryTokenizer, forward: Callable[..., Float32]) -> int:
    """Encode one short text to learn the length of the vectors."""
    inputs = tokenizer.pad(tokenizer.token_ids(["a"]), LENGTH_BUCKETS[0])
    return int(forward(*inputs, *tokenizer.ngram_ids(["a"], [0])).shape[1])


class _TowerForm(ABC):
    """Base of the forms: texts through the tower's tokenizer and, by length, through the tower."""

    form_id: str
    dimension: int
    pads_to_bucket = False

    def __init__(self, folder: Path) -> None:
        self._tokenizer = QueryTokenizer(folder)

    @abstractmethod
    def _forward(self, ids: Int64, mask: Int64, ngrams: Int64 | None = None) -> Float32:
        """Run the tower on one group: ``(b, L)`` ids and mask, ``(b, G)`` buckets of n-grams."""

    def unknown_share(self, text: str) -> float:
        """See ``QueryEncoding.unknown_share``."""
        return self._tokenizer.unknown_share(text)

    def encode(self, texts: Sequence[str]) -> Float32:
        """See ``QueryEncoding.encode``."""
        return encode_by_length(
            self._tokenizer, texts, self.dimension, self._forward, self.pads_to_bucket
        )


class OnnxQueryEncoding(_TowerForm):
    """ONNX Runtime on CPU; imports no torch.

    Args:
        model: The ``.onnx`` file, inputs ``input_ids`` and ``attention_mask`` (B, L), first output
            (B, D).
        folder: The release's ``query_encoder/`` (for the tokenizer).
        form_id: ``onnx-int8`` or ``onnx-fp32``.
        threads: Threads of one forward pass.
    """

    def __init__(self, model: Path, folder: Path, form_id: str, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Idle threads must not burn the search's core
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of any type: they all mean that the file cannot be run
            raise BundleError(
                f"{model.name}: ONNX Runtime cannot load this form: {error}. Export it again (omni"
                " export)."
            ) from error
        self._types = {
            item.name: np.int32 if "int32" in item.type else np.int64
            for item in self._session.get_inputs()
        }
        super().__init__(folder)
        expected = {"input_ids", "attention_mask"}
        if self._tokenizer.buckets or "ngram_ids" in self._types:
            expected.add("ngram_ids")
        missing = expected - set(self._types)
        if missing or ("ngram_ids" in expected and not self._tokenizer.buckets):
            raise BundleError(
                f"{model.name}: expected inputs {', '.join(sorted(expected))}, but it has"
                f" {', '.join(sorted(self._types))}, and the query encoder"
                f" {'reads' if self._tokenizer.buckets else 'does not read'} n-grams. Export it"
                " again."
            )
        self._output = self._session.get_outputs()[0].name
        self.form_id = form_id
        self.dimension = probed_dimension(self._tokenizer, self._forward)

    def _forward(self, ids: Int64, mask: Int64, ngrams: Int64 | None = None) -> Float32:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if ngrams is not None:
            feeds["ngram_ids"] = ngrams
        feeds = {name: value.astype(self._types[name], copy=False) for name, value in feeds.items()}
        for name in self._types:
            if name not in feeds:
                feeds[name] = np.zeros_like(ids, dtype=self._types[name])
        vectors: Float32 = np.asarray(self._session.run([self._output], feeds)[0], dtype=np.float32)
        return vectors


class TorchQueryEncoding(_TowerForm):
    """torch on CPU, float32: the reference form."""

    form_id = "torch-fp32"

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import torch

        from encoders.towers.query_tower import QueryEncoder

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = QueryEncoder.load(folder).eval()
        super().__init__(folder)
        self.dimension = probed_dimension(self._tokenizer, self._forward)

    def _forward(self, ids: Int64, mask: Int64, ngrams: Int64 | None = None) -> Float32:
        tensor = self._torch.from_numpy
        extra = {} if ngrams is None else {"ngram_ids": tensor(ngrams)}
        with self._torch.inference_mode():
            vectors: Float32 = self._model(tensor(ids), tensor(mask), **extra).float().numpy()
        return vectors


class CapturedGraph(NamedTuple):
    """A CUDA graph of the tower for one shape, with the tensors that it reads and writes."""

    graph: Any
    ids: Any  # (B, L)
    mask: Any  # (B, L)
    vectors: Any  # (B, D), before n-grams and normalisation


class CudaQueryEncoding(_TowerForm):
    """torch on a GPU in bfloat16, replaying one CUDA graph per (batch, length) bucket.

    A shape that cannot be captured runs eagerly. Graphs are captured on first use of a bucket,
    those of small batches (``warm``) when the encoder is made.
    """

    form_id = "torch-bf16"
    pads_to_bucket = True

    def __init__(
        self, folder: Path, device: str = "cuda", warm: Sequence[int] = (1, 8, 64)
    ) -> None:
        import torch

        from encoders.towers.query_tower import QueryEncoder

        self._torch = torch
        self._device = torch.device(device)
        self._model = QueryEncoder.load(folder).eval().to(self._device, dtype=torch.bfloat16)
        super().__init__(folder)
        self._stream = torch.cuda.Stream(self._device)
        self._graphs: dict[tuple[int, int], CapturedGraph | None] = {}
        self.dimension = int(
            self._eager(torch.ones((1, 8), dtype=torch.long, device=self._device)).shape[1]
        )
        for size in warm:
            for length in LENGTH_BUCKETS:
                self._graph(size, length)

    def _eager(self, ids: Any, mask: Any = None) -> Any:
        torch = self._torch
        with torch.inference_mode():
            return self._model.project(ids, torch.ones_like(ids) if mask is None else mask)

    def _graph(self, size: int, length: int) -> CapturedGraph | None:
        key = (size, length)
        if key not in self._graphs:
            torch = self._torch
            ids = torch.full(
                (size, length), self._tokenizer.pad_id, dtype=torch.long, device=self._device
            )
            mask = torch.ones_like(ids)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(3):  # allocator and kernels warm up outside the capture
                        self._eager(ids, mask)
                self._stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.inference_mode(), torch.cuda.graph(graph, stream=self._stream):
                    out = self._model.project(ids, mask)
                self._graphs[key] = CapturedGraph(graph, ids, mask, out)
            except RuntimeError as error:
                log.warning(
                    "no CUDA graph for batch %d, length %d (%s); this shape runs eagerly",
                    size,
                    length,
                    error,
                )
                self._graphs[key] = None
        return self._graphs[key]

    def _forward(self, ids: Int64, mask: Int64, ngrams: Int64 | None = None) -> Float32:
        torch = self._torch
        count, length = ids.shape
        if count > BATCH_BUCKETS[-1]:
            half = count // 2
            inputs = (ids, mask) if ngrams is None else (ids, mask, ngrams)
            parts = ([i[:half] for i in inputs], [i[half:] for i in inputs])
            return np.concatenate([self._forward(*part) for part in parts])
        size = next(b for b in BATCH_BUCKETS if b >= count)
        captured = self._graph(size, length)
        with torch.cuda.stream(self._stream):
            if captured is None:
                out = self._eager(
                    torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device)
                )
            else:
                captured.ids[:count].copy_(torch.from_numpy(ids), non_blocking=True)
                captured.mask[:count].copy_(torch.from_numpy(mask), non_blocking=True)
                captured.graph.replay()
                out = captured.vectors
            with torch.inference_mode():
                out = out[:count].float()
                if ngrams is not None and self._model.ngrams is not None:
                    buckets = torch.from_numpy(ngrams).to(self._device)
                    out = out + self._model.ngrams(buckets).float()
                vectors: Float32 = torch.nn.functional.normalize(out, dim=-1).cpu().numpy()
        return vectors


def gpu_available() -> bool:
    """Return whether torch sees a CUDA device.

    Looks for the driver first, so that CPU servers need not import torch.
    """
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/nvidia0").exists():
        return False
    if not torch_installed():
        return False
    import torch

    return bool(torch.cuda.is_available())


def torch_installed() -> bool:
    """Return whether torch is installed, without importing it."""
    return importlib.util.find_spec("torch") is not None


def choose_form(
    device: str, form: str, forms_path: Path, has_gpu: bool, has_torch: bool = True
) -> str:
    """Choose the form to run: ``torch-bf16`` on a GPU; on CPU the requested one.

    On ``auto`` a CPU runs int8 where the release has it, else torch where it is installed, else
    the fp32 form.

    Raises:
        ConfigError: CUDA is requested without a GPU, or a form that the release does not hold.
        MissingDependency: The release holds no form that runs without torch.
    """
    if device == "cuda" and not has_gpu:
        raise ConfigError(
            "--device cuda: torch sees no CUDA device. Use --device cpu, or install a CUDA build of"
            " torch."
        )
    if device == "cuda" or (device == "auto" and has_gpu and form == "auto"):
        return "torch-bf16"
    if form == "auto":
        wanted = ("onnx-int8",) if has_torch else ("onnx-int8", "onnx-fp32")
        form = next((f for f in wanted if (forms_path / FORM_FILES[f]).is_file()), "torch")
    if form == "torch":
        if not has_torch:
            raise MissingDependency(
                "torch",
                "train",
                "Encoding queries of a release without ONNX forms (omni export makes them, before"
                " omni rebuild)",
            )
        return "torch-fp32"
    if not (forms_path / FORM_FILES[form]).is_file():
        raise ConfigError(
            f"--encoder-form {form}: the release has no forms/{FORM_FILES[form]}. Export it (omni"
            " export), or use --encoder-form auto."
        )
    return form


def open_query_encoding(
    query_encoder_path: Path,
    forms_path: Path,
    *,
    device: str = "auto",
    form: str = "auto",
    threads: int = 1,
) -> QueryEncoding:
    """Load the query tower of a release in the fastest form available.

    Args:
        query_encoder_path: The release's ``query_encoder/``.
        forms_path: The release's ``forms/``; may not exist.
        device: ``auto``, ``cuda`` or ``cpu``.
        form: ``auto``, ``onnx-int8``, ``onnx-fp32`` or ``torch``.
        threads: CPU threads of one forward pass.

    Raises:
        ConfigError: The device or form is not available.
        BundleError: The files cannot be loaded.
    """
    has_gpu = device != "cpu" and gpu_available()
    chosen = choose_form(device, form, forms_path, has_gpu, torch_installed())
    if chosen == "torch-bf16":
        return CudaQueryEncoding(query_encoder_path)
    if chosen == "torch-fp32":
        return TorchQueryEncoding(query_encoder_path, threads)
    return OnnxQueryEncoding(forms_path / FORM_FILES[chosen], query_encoder_path, chosen, threads)
