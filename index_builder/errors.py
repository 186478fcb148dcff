"""Errors of index building, releases and the live log, below ``encoders.errors.OmniError``.

OmniError
├── IndexBuildError        an index cannot be built from this input
│   ├── DuplicateIds       one id names two rows
│   ├── BadAttribute       a column cannot become a filterable attribute
│   └── UnsupportedLibrary an installed library writes files of a layout that cannot be read
├── InvalidQuery           a request that can never succeed (k, ef, min_recall, NaN)
│   ├── DimensionMismatch  the query vector has another dimension or dtype
│   └── FilterError        a filter does not parse or does not fit the attributes
├── UnknownEntityType      the release has no such index
├── ReleaseError           a release is missing, damaged or cannot be made active
│   ├── ReleaseNotFound    no release of that id
│   ├── ReleaseCorrupt     sizes or checksums differ from the manifest
│   │   └── IndexFormatError  index files are missing, damaged or do not fit each other
│   ├── ReleaseVersionError  written by another format version
│   ├── UnsupportedCpu     an index kind needs instructions this CPU lacks
│   ├── RemoteUnreachable  a store at a URL does not answer, or refuses
│   └── PublishError       a release was not published; what was active stays active
│       ├── PublisherBusy  another publisher holds the lock, or the id is taken
│       ├── GateFailed     a measured figure misses its target; the message says what to raise
│       ├── DiskFull       the disk is full or refuses writes
│       └── NotWritable    this user may not write there
├── LiveLogError           the live log cannot be read or written
│   ├── LiveLogCorrupt     an entry inside the log fails its checksum
│   └── LiveLogBusy        another writer owns the log
└── MissingExtension       the compiled extension was not built (also a MissingDependency)
"""

from __future__ import annotations

from encoders.errors import MissingDependency, OmniError


class IndexBuildError(OmniError):
    """An index cannot be built from this input; the message names the row and the fix."""


class DuplicateIds(IndexBuildError):
    """One id names two rows of one entity type."""


class BadAttribute(IndexBuildError):
    """A column cannot become a filterable attribute."""


class UnsupportedLibrary(IndexBuildError):
    """An installed library writes index files of a layout that this version cannot read."""


class InvalidQuery(OmniError):
    """A request can never succeed: k or ef out of range, NaN, or a min_recall beyond reach."""


class DimensionMismatch(InvalidQuery):
    """The query vector has another dimension or dtype than the index."""

    def __init__(self, expected: int, got: object) -> None:
        self.expected = expected
        self.got = got
        super().__init__(
            f"a query must be one float32 vector of dimension {expected}, but got {got}. "
            "Was it encoded by the encoder that the release names?"
        )


class FilterError(InvalidQuery):
    """A filter expression does not parse, or names attributes or types the index does not have.

    Attributes:
        expression: The whole filter.
        position: Offset of the offending character, from 0.
    """

    def __init__(self, message: str, expression: str, position: int) -> None:
        self.expression = expression
        self.position = position
        shown = expression if len(expression) <= 200 else expression[:197] + "..."
        super().__init__(f"filter error at character {position + 1}: {message} In: {shown}")


class UnknownEntityType(OmniError):
    """The release has no index of this entity type."""

    def __init__(self, entity_type: str, known: list[str], where: str = "") -> None:
        self.entity_type = entity_type
        self.known = known
        begin = f"{where}: " if where else ""
        super().__init__(
            f"{begin}no index for entity type {entity_type!r}: this release has"
            f" {', '.join(sorted(known)) or 'none'}."
        )


class ReleaseError(OmniError):
    """A release is missing, damaged or cannot be made active."""


class ReleaseNotFound(ReleaseError):
    """No release of that id in this store."""


class ReleaseCorrupt(ReleaseError):
    """Sizes or checksums of a release's files differ from its manifest."""


class IndexFormatError(ReleaseCorrupt):
    """Index files are missing, damaged or do not fit each other."""


class ReleaseVersionError(ReleaseError):
    """The release was written by another format version."""


class UnsupportedCpu(ReleaseError):
    """An index kind needs CPU instructions that this machine lacks."""

    def __init__(self, kind: str, missing: list[str]) -> None:
        self.kind = kind
        self.missing = missing
        super().__init__(
            f"index kind {kind!r} needs the CPU features {', '.join(missing)}, which this CPU"
            " lacks. Rebuild with --index hnsw, or serve on a machine that has them."
        )


class RemoteUnreachable(ReleaseError):
    """A store at a URL does not answer, or refuses; nothing that was active has changed."""


class PublishError(ReleaseError):
    """A release was not published; what was active stays active."""


class PublisherBusy(PublishError):
    """Another publisher holds the lock, or the release id is taken."""


class GateFailed(PublishError):
    """A measured figure misses its target; the message says what to raise."""


class DiskFull(PublishError):
    """The disk is full or refuses writes; nothing was published."""


class NotWritable(PublishError):
    """This user may not write to the store, or a file in it; nothing was changed."""


class LiveLogError(OmniError):
    """The live log cannot be read or written."""


class LiveLogCorrupt(LiveLogError):
    """An entry inside the log fails its checksum."""


class LiveLogBusy(LiveLogError):
    """Another writer owns the live log."""


class MissingExtension(MissingDependency):
    """The compiled extension was not built when omnisearchsage was installed."""

    def __init__(self, purpose: str) -> None:
        OmniError.__init__(
            self,
            f"{purpose} needs the compiled extension, which was not built when omnisearchsage was"
            " installed. Install a C++ compiler and omnisearchsage again, or use --index hnsw.",
        )
