#!/usr/bin/env bash
# Builds the C++ with address and undefined-behaviour sanitisers and runs the tests and a fuzz of it
# on every kernel that this CPU has: `scripts/sanitize.sh [seconds of fuzzing per kernel]`.
# `--short` fuzzes a few seconds and runs the tests on the best kernel only (what CI does).
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=300
short=
case "${1:-}" in
--short) seconds=6 short=1 ;;
"") ;;
*) seconds=$1 ;;
esac
python=${PYTHON:-.venv/bin/python}
python=$(realpath -s "$python")
compiler=${CXX:-g++}
target=build/sanitized

cross=aarch64-linux-gnu-g++
if command -v "$cross" >/dev/null; then
    echo "== aarch64 compiles"
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    for source in index_builder/native/*.cpp; do
        "$cross" -std=c++17 -O3 -Wall -Wextra -I"$include" -fsyntax-only "$source"
    done
else
    echo "== aarch64 is not compiled: no $cross (Debian: apt-get install g++-aarch64-linux-gnu)"
fi

echo "== build in $target"
rm -rf "$target"
mkdir -p "$target"
git ls-files -z pyproject.toml README.md LICENSE 'encoders/*' 'protos/*' 'index_builder/*' \
    'benchmarks/*' 'tests/conftest.py' 'tests/helpers/*' 'tests/index_builder/*' 'scripts/*' |
    xargs -0 cp --parents -t "$target"
cd "$target"
export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1 -w"
export LDFLAGS="-fsanitize=address,undefined"
CC=$compiler CXX=$compiler "$python" -c 'from setuptools import setup; setup()' -q build_ext --inplace
unset CFLAGS LDFLAGS

preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
sanitized() {
    # PYTHONMALLOC: small objects get their own red zones. Leaks, and new[] with delete in hnswlib, are not ours.
    LD_PRELOAD="$preload $("$compiler" -print-file-name=libstdc++.so)" PYTHONPATH="$PWD" \
        PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
        OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$@"
}
sanitized "$python" -c 'import index_builder.native as n; assert n.Engine and n.live_scan and n.link_records and n.Postings'

kernels=()
for kernel in plain avx2 avx512vnni; do
    found=$(OMNI_SIMD=$kernel PYTHONPATH=$PWD sanitized "$python" -c 'import index_builder.native as n; print(n.SIMD)')
    if [[ $found == "$kernel" ]]; then kernels+=("$kernel"); else echo "== this CPU has no $kernel kernels"; fi
done

tests=(tests/index_builder/ann tests/index_builder/storage tests/index_builder/search tests/index_builder/lexical)
for kernel in "${kernels[@]}"; do
    echo "== kernel $kernel: fuzz for $seconds s"
    OMNI_SIMD=$kernel sanitized "$python" scripts/fuzz_native.py --seconds "$seconds" --seed "$RANDOM"
done
[[ -z $short ]] || { kernels=("${kernels[-1]}") tests=(tests/index_builder/ann/test_engine_limits.py tests/index_builder/storage tests/index_builder/lexical); }
for kernel in "${kernels[@]}"; do
    echo "== kernel $kernel: tests"
    OMNI_SIMD=$kernel sanitized "$python" -m pytest -q -p no:cacheprovider --timeout=1200 "${tests[@]}" \
        -m "${short:+not slow}"
done
echo "== no memory error, no undefined behaviour, no wrong answer"
