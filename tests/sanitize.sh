#!/usr/bin/env bash
# The CPU library under a sanitizer: tests/sanitize.sh address|thread [pytest arguments]
# Builds it into build/sanitize-KIND beside a copy of the package, and runs the tests of the ops there. The first fault
# ends the run with a report. FUZZ_MINUTES: begin again until so many have passed.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
shift
build=build/sanitize-$kind
tree=$build/tree

cmake -S . -B "$build" -G Ninja -DSPLADE_FAST_CUDA=0 -DSPLADE_FAST_PYTHON=ON -DSPLADE_FAST_SANITIZE="$kind" \
  -DPython_EXECUTABLE="$(command -v python)" -DTORCH_ROOT= -DCMAKE_INSTALL_PREFIX="$PWD/$tree/splade_fast"
cmake --build "$build"
rm -rf "$tree"
mkdir -p "$tree"
cp -r splade_fast tests benchmarks pyproject.toml README.md "$tree"
rm -f "$tree"/splade_fast/*.so
cmake --install "$build"

runtime=asan
if [ "$kind" = thread ]; then
  runtime=tsan
fi
# Python frees little when it ends; a size that cannot be had is an exception, as in the plain library.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
# Only what was built here is looked at: Python and torch were not.
export TSAN_OPTIONS=allocator_may_return_null=1:ignore_noninstrumented_modules=1:halt_on_error=1:report_signal_unsafe=0
export OMP_NUM_THREADS=1
ctest --test-dir "$build" --output-on-failure
cd "$tree"
# The C++ library is loaded early, for the sanitizer to see its exceptions. Without random places in memory, with which
# the thread sanitizer cannot cope.
preloaded="$(gcc -print-file-name="lib$runtime.so") $(gcc -print-file-name=libstdc++.so.6)"
run() {
  LD_PRELOAD=$preloaded setarch --addr-no-randomize python -m pytest -s -p no:cacheprovider "$@"
}
if [ "$#" = 0 ]; then
  set -- tests/ops tests/fuzz
fi
end=$((SECONDS + ${FUZZ_MINUTES:-0} * 60))
run "$@"
while [ "$SECONDS" -lt "$end" ]; do
  run "$@"
done
