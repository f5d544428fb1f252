#!/usr/bin/env bash
# The CPU library under a sanitizer, built into build/sanitize-KIND beside a copy of the package:
#   tests/sanitize.sh address|thread [pytest arguments]
#     the tests of the ops; FUZZ_MINUTES: again, with other inputs, until so many have passed
#   tests/sanitize.sh coverage [target [options and folders of libFuzzer]]
#     libFuzzer, and AddressSanitizer, for FUZZ_MINUTES (10) per target; needs Clang 15 or later, and atheris
# The first fault ends the run with a report.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
shift
build=build/sanitize-$kind
tree=$build/tree
tests=ON
if [ "$kind" = coverage ]; then
  export CXX=${CLANG:-clang++}
  tests=OFF
fi

cmake -S . -B "$build" -G Ninja -DSPLADE_FAST_CUDA=0 -DSPLADE_FAST_PYTHON=ON -DSPLADE_FAST_SANITIZE="$kind" \
  -DSPLADE_FAST_TESTS=$tests -DPython_EXECUTABLE="$(command -v python)" -DTORCH_ROOT= \
  -DCMAKE_INSTALL_PREFIX="$PWD/$tree/splade_fast"
cmake --build "$build"
rm -rf "$tree"
mkdir -p "$tree"
cp -r splade_fast tests benchmarks pyproject.toml README.md "$tree"
rm -f "$tree"/splade_fast/*.so
cmake --install "$build"

case $kind in
  address) runtime=$(gcc -print-file-name=libasan.so) ;;
  thread) runtime=$(gcc -print-file-name=libtsan.so) ;;
  coverage) runtime=$(python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so ;;
esac
# Python frees little when it ends; a size that cannot be had is an exception, as in the plain library.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
# Only what was built here is looked at: Python and torch were not.
export TSAN_OPTIONS=allocator_may_return_null=1:ignore_noninstrumented_modules=1:halt_on_error=1:report_signal_unsafe=0
export OMP_NUM_THREADS=1
# The C++ library is loaded early, for the sanitizer to see its exceptions. Without random places in memory, with which
# the thread sanitizer cannot cope.
sanitized_python() {
  LD_PRELOAD="$runtime $(gcc -print-file-name=libstdc++.so.6)" setarch --addr-no-randomize python "$@"
}
seconds=$((${FUZZ_MINUTES:-0} * 60))

if [ "$kind" = coverage ]; then
  found=$PWD/build/fuzz
  seconds=$((${FUZZ_MINUTES:-10} * 60))
  cd "$tree"
  fuzz() {
    # Memory that is asked for and cannot be had is an exception here too; memory that is used counts.
    sanitized_python -m tests.fuzz.guided "$@" -timeout=60 -rss_limit_mb=6000 -malloc_limit_mb=1000000000000 \
      -len_control=0
  }
  if [ "$#" != 0 ]; then
    fuzz "$@"
    exit
  fi
  for target in $(python -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)'); do
    python -m tests.fuzz.seed_files unpack "$target" "$found/$target"
    fuzz "$target" -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$found/$target-" "$found/$target"
  done
  exit
fi

ctest --test-dir "$build" --output-on-failure
cd "$tree"
if [ "$#" = 0 ]; then
  set -- tests/ops tests/fuzz tests/search/test_sparse_index.py
fi
run() {
  sanitized_python -m pytest -s -p no:cacheprovider "$@"
}
if [ "$seconds" = 0 ]; then
  run "$@"
  exit
fi
# The seed says which inputs hypothesis draws: FUZZ_SEED=N runs a round again.
seed=${FUZZ_SEED:-$RANDOM$RANDOM}
end=$((SECONDS + seconds))
while [ "$SECONDS" -lt "$end" ]; do
  echo "FUZZ_SEED=$seed"
  run --hypothesis-seed="$seed" "$@"
  seed=$((seed + 1))
done
