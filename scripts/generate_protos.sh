#!/bin/sh
# Generates protos/retrieval_pb2*.py(i) from protos/retrieval.proto; run it after every change of the contract (`make protos`).
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
# The path inside the descriptor is protos/retrieval.proto, so the generated import is `from protos import retrieval_pb2`.
"$python" -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/retrieval.proto
