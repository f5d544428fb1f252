#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, CUDA tests, memory checks, benchmarks; then the
# same of the head with the fused kernel of sm_90a, each in a process of its own: should it hang or
# fault, nothing else is lost.
#
#   OUT=gpu_out benchmarks/gpu.sh
#
# No stage stops the next one. $OUT/summary.txt holds the exit status and seconds of each; the
# script fails if any stage failed; a benchmark stage cut short keeps the cases it has finished.
# Settings, all optional:
#   PYTHON          interpreter with a CUDA build of torch       (python3)
#   OUT             where logs, junit, CSVs and plots go         (./gpu_out)
#   STAGES          which stages to run       (build tests memcheck racecheck benchmarks fused_tests
#                   fused_memcheck fused_racecheck fused_synccheck fused_initcheck fused_benchmarks)
#   STAGE_SECONDS   time limit of a stage                        (420)
#   CASES           benchmark cases                              (pool head prune score encode sample gather negative_cache)
#   BENCHMARK_ARGS  more options for python -m benchmarks        (--seconds 3)

set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-gpu_out}
stages=${STAGES:-build tests memcheck racecheck benchmarks fused_tests fused_memcheck fused_racecheck
    fused_synccheck fused_initcheck fused_benchmarks}
stages=${stages//$'\n'/ }
stage_seconds=${STAGE_SECONDS:-420}
read -ra cases <<<"${CASES:-pool head prune score encode sample gather negative_cache}"
read -ra benchmark_args <<<"${BENCHMARK_ARGS:---seconds 3}"

mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
: >"$summary"
failed=0

stage() {
    local name=$1 started=$SECONDS status
    shift
    [[ " $stages " == *" $name "* ]] || return 0
    timeout --kill-after=10 "$stage_seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: exit $status, $((SECONDS - started)) s" | tee -a "$summary"
    if ((status != 0)); then
        failed=1
        tail -n 30 "$out/$name.log"
    fi
}

# Tiny shapes: a checker slows every kernel down a hundredfold. Without torch's caching, each
# tensor is an allocation of its own, so that a step over its end is seen.
sanitizer() {
    local name=$1 tool=${1#fused_}
    shift
    stage "$name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 "$python" "$@"
}
tiny_benchmarks() {
    sanitizer "$1" -m benchmarks "${cases[@]}" --device cuda --quick \
        --skip compile peer memory --out "$out/$1"
}
fused_tests=(-m pytest tests/ops/head/test_hopper.py -m cuda -x)

nvidia-smi >"$out/nvidia-smi.log" 2>&1
stage build env SPLADE_FAST_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps -e .
stage tests "$python" -m pytest tests/ops tests/test_library.py tests/ops/test_sparse_rows.py -m cuda \
    --ignore tests/ops/head/test_hopper.py --junitxml="$out/junit.xml"
command -v compute-sanitizer >/dev/null && has_sanitizer=1 || has_sanitizer=0
if ((has_sanitizer)); then
    tiny_benchmarks memcheck
    tiny_benchmarks racecheck
else
    echo "memory checks: skipped, no compute-sanitizer" | tee -a "$summary"
fi
stage benchmarks "$python" -m benchmarks "${cases[@]}" --device cuda --out "$out/results" \
    "${benchmark_args[@]}"
[[ -f $out/benchmarks.log ]] && cat "$out/benchmarks.log"

stage fused_tests "$python" "${fused_tests[@]}" --junitxml="$out/junit_fused.xml"
if ((has_sanitizer)); then
    for tool in memcheck racecheck synccheck initcheck; do
        sanitizer "fused_$tool" "${fused_tests[@]}" \
            -k "(fused and (test_packed or tie or not_read)) or screened_packed"
    done
fi
stage fused_benchmarks env SPLADE_FAST_HOPPER=1 "$python" -m benchmarks head head_trained --device cuda \
    --out "$out/fused_results" "${benchmark_args[@]}"
[[ -f $out/fused_benchmarks.log ]] && cat "$out/fused_benchmarks.log"

cat "$summary"
exit "$failed"
