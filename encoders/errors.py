"""The error tree of the project; each package adds its own branch below ``OmniError``.

OmniError
├── DataError            a table, file or row is not what the schema says
│   ├── SchemaError      a column is missing or has the wrong type
│   └── RowError         one row holds an impossible value (names file, row, column)
├── ConfigError          a configuration value or key is wrong
├── BundleError          a model bundle is missing, damaged or of another version
│   └── SpaceMismatch    two things made under different space ids met
├── CheckpointError      a training checkpoint is missing, damaged or of another run
├── TrainingDiverged     the loss became NaN or infinite
├── InvalidVectors       embeddings with NaN, Inf, wrong shape, dtype or norm
└── MissingDependency    an optional extra is not installed
"""

from __future__ import annotations


class OmniError(Exception):
    """Root of every error this project raises on purpose.

    The message says what was expected, what it got and what to do next.
    """


class DataError(OmniError):
    """A table, file or row does not hold what its schema says."""


class SchemaError(DataError):
    """A column is missing, unknown or has the wrong type."""


class RowError(DataError):
    """One row holds an impossible value; the message names file, row, column, value and fix."""


class ConfigError(OmniError):
    """A configuration key or value is wrong."""


class BundleError(OmniError):
    """A model bundle is missing, damaged or was written by another format version."""


class SpaceMismatch(BundleError):
    """Vectors or models of two different embedding spaces were about to be mixed."""

    def __init__(self, expected: str, got: str, where: str) -> None:
        self.expected, self.got = expected, got
        super().__init__(
            f"{where}: expected space id {expected[:16]}, but got {got[:16]}. Vectors are"
            " comparable only under one space id: embed again with this bundle, or use the bundle"
            " that made them."
        )


class CheckpointError(OmniError):
    """A training checkpoint is missing, damaged or belongs to another run."""


class TrainingDiverged(OmniError):
    """The training loss became NaN or infinite; the batch was saved for inspection."""


class InvalidVectors(OmniError):
    """Embeddings contain NaN or Inf, or have the wrong shape, dtype or norm.

    The message names the first bad row.
    """


class MissingDependency(OmniError):
    """An optional dependency is not installed; the message says what to install.

    Args:
        package: Name of the distribution.
        extra: Extra of omnisearchsage that brings it; None where none does.
        purpose: What needs it; begins the message.
    """

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        what = package if extra is None else f"'omnisearchsage[{extra}]'"
        super().__init__(
            f"{purpose} needs the package {package!r}. Install it with: pip install {what}"
        )
