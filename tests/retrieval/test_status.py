import errno
import os

import grpc
import pytest

import encoders.errors
import index_builder.errors
import retrieval.errors
from encoders.errors import OmniError
from retrieval.status import STATUS, code_for_class, status_for


def subclasses(cls: type) -> list[type]:
    return [cls] + [found for child in cls.__subclasses__() for found in subclasses(child)]


TREE = [
    cls
    for cls in subclasses(OmniError)
    if cls.__module__
    in (m.__name__ for m in (encoders.errors, index_builder.errors, retrieval.errors))
]
EXPECTED_INTERNAL = {"OmniError", "ServingError", "EncoderFailed"}


@pytest.mark.parametrize("cls", TREE, ids=lambda c: c.__name__)
def test_code_for_class_every_error_has_a_status(cls: type[OmniError]) -> None:
    code = code_for_class(cls)
    assert (code is grpc.StatusCode.INTERNAL) == (cls.__name__ in EXPECTED_INTERNAL)
    assert code is not grpc.StatusCode.OK


def test_code_for_class_most_specific_entry_wins() -> None:
    assert code_for_class(index_builder.errors.ReleaseNotFound) is grpc.StatusCode.NOT_FOUND
    assert (
        code_for_class(index_builder.errors.ReleaseCorrupt) is grpc.StatusCode.FAILED_PRECONDITION
    )
    assert code_for_class(index_builder.errors.FilterError) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_for_class(encoders.errors.SpaceMismatch) is grpc.StatusCode.FAILED_PRECONDITION


def test_status_for_foreign_error_does_not_leak_its_text() -> None:
    code, message = status_for(ValueError("secret query text"))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in message


def test_status_table_holds_only_errors_of_the_tree() -> None:
    assert set(STATUS) <= set(subclasses(OmniError))
    doc = retrieval.errors.__doc__ or ""
    for cls in subclasses(retrieval.errors.ServingError):
        assert cls.__name__ in doc


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EROFS, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.EACCES, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.ENOSPC, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errno.EDQUOT, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errno.EMFILE, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_status_for_error_of_the_system_says_what_to_do(number: int, code: grpc.StatusCode) -> None:
    found, message = status_for(OSError(number, os.strerror(number), "/secret/path"))
    assert found is code
    assert os.strerror(number) in message and "secret" not in message
