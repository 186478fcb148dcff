#!/bin/sh
# Generates protos/retrieval_pb2*.py(i) and docs/reference/openapi.json from protos/retrieval.proto; run it after every change of the contract (`make protos`).
# With --check nothing is written: it fails when the committed modules are not what the proto gives.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
out=.
if [ "${1:-}" = --check ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
# The path inside the descriptor is protos/retrieval.proto, so the generated import is `from protos import retrieval_pb2`.
"$python" -m grpc_tools.protoc -I . --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/retrieval.proto
if [ "$out" != . ]; then
    for file in "$out"/protos/*; do
        cmp -s "$file" "protos/${file##*/}" || { echo "protos/${file##*/} is not what protos/retrieval.proto gives; run: make protos"; exit 1; }
    done
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" scripts/generate_openapi.py "$@"
