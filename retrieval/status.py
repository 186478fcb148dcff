"""The gRPC status of every error, defined here only; the most specific entry wins."""

from __future__ import annotations

import errno
import os

import grpc

from encoders import errors as encoder_errors
from encoders.errors import OmniError
from index_builder import errors as index_errors
from retrieval import errors

STATUS: dict[type[OmniError], grpc.StatusCode] = {
    OmniError: grpc.StatusCode.INTERNAL,
    errors.ServingError: grpc.StatusCode.INTERNAL,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownRelease: grpc.StatusCode.NOT_FOUND,
    errors.ReleaseNotLoaded: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ReleaseRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NothingToRollBack: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WritesDisabled: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AnswerTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.NotReady: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.EncoderFailed: grpc.StatusCode.INTERNAL,
    errors.CannotListen: grpc.StatusCode.UNAVAILABLE,
    errors.ServerDied: grpc.StatusCode.UNAVAILABLE,
    encoder_errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    encoder_errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    encoder_errors.InvalidVectors: grpc.StatusCode.INVALID_ARGUMENT,
    encoder_errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    encoder_errors.SpaceMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    encoder_errors.MissingDependency: grpc.StatusCode.FAILED_PRECONDITION,
    encoder_errors.CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    encoder_errors.TrainingDiverged: grpc.StatusCode.FAILED_PRECONDITION,
    index_errors.IndexBuildError: grpc.StatusCode.FAILED_PRECONDITION,
    index_errors.InvalidQuery: grpc.StatusCode.INVALID_ARGUMENT,
    index_errors.UnknownEntityType: grpc.StatusCode.NOT_FOUND,
    index_errors.ReleaseError: grpc.StatusCode.FAILED_PRECONDITION,
    index_errors.ReleaseNotFound: grpc.StatusCode.NOT_FOUND,
    index_errors.RemoteUnreachable: grpc.StatusCode.UNAVAILABLE,
    index_errors.PublisherBusy: grpc.StatusCode.UNAVAILABLE,
    index_errors.DiskFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    index_errors.LiveLogError: grpc.StatusCode.UNAVAILABLE,
}

_READ_ONLY = (
    grpc.StatusCode.FAILED_PRECONDITION,
    "this server cannot write to its store ({reason}). Give its process the right to write there,"
    " or write to another server.",
)
_FULL = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    "this server's disk takes no more ({reason}). Nothing of this request was written; free some"
    " space and send it again.",
)
_TOO_MANY_FILES = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    "this server can open no more files ({reason}). Try again later, or raise its limit.",
)
SYSTEM_ERRORS: dict[int, tuple[grpc.StatusCode, str]] = {
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _READ_ONLY,
    errno.EPERM: _READ_ONLY,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EMFILE: _TOO_MANY_FILES,
    errno.ENFILE: _TOO_MANY_FILES,
}
"""Errors of the system that are no fault of the server's code: status, and what to do."""


def code_for_class(cls: type[BaseException]) -> grpc.StatusCode:
    """Return the status of an error class: its nearest ancestor's; INTERNAL outside the tree."""
    for ancestor in cls.__mro__:
        if ancestor in STATUS:
            return STATUS[ancestor]
    return grpc.StatusCode.INTERNAL


def status_for(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Return code and message for a caller.

    Errors outside the tree say only their kind: their text may hold what callers must not see.
    """
    if isinstance(error, OmniError):
        return code_for_class(type(error)), str(error)
    if isinstance(error, UnicodeError):
        return grpc.StatusCode.INVALID_ARGUMENT, "the request holds text that is not valid Unicode."
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        code, text = SYSTEM_ERRORS[error.errno]
        return code, text.format(reason=os.strerror(error.errno))
    if isinstance(error, MemoryError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, "the server is out of memory. Try again later."
    return (
        grpc.StatusCode.INTERNAL,
        f"internal error ({type(error).__name__}). The server's log holds the details.",
    )
