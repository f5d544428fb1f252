#!/usr/bin/env bash
# The most evidence that a GPU of compute capability 9.0 gives in ten minutes, its build made beforehand.
#
#   benchmarks/gpu_window.sh pack          here: build for sm_90a alone, into build/gpu_window
#   OUT=window benchmarks/gpu_window.sh run        there, in a copy of this tree with build/gpu_window
#   REHEARSAL=1 benchmarks/gpu_window.sh run       here: the same stages on the CPU, with tiny inputs
#
# The other machine needs torch >= 2.10 with CUDA, transformers, typer, scipy, pytest, pytest-xdist and pytest-timeout,
# for any version of Python. No stage stops the next one, each has its own limit, and the most important come first.
# $OUT holds summary.txt and record.tar.gz with all logs, CSVs and JUnit files, both renewed after every stage. The
# script fails if a stage failed.
# Settings, all optional:
#   PYTHON    interpreter                    (python3)
#   OUT       folder of the results          (build/gpu_window_out)
#   SECONDS_LEFT   limit of all stages       (560)
#   STAGES    stages to run                  (all)

set -uo pipefail
cd "$(dirname "$0")/.."
packed=build/gpu_window
python=${PYTHON:-python3}

pack() {
    set -e
    local torch_root
    torch_root=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
    TORCH_CUDA_ARCH_LIST=9.0a cmake -S . -B "${packed}_build" -G Ninja -DSPLADE_FAST_CUDA=1 -DSPLADE_FAST_TESTS=OFF \
        -DTORCH_ROOT="$torch_root"
    cmake --build "${packed}_build"
    rm -rf "$packed"
    mkdir -p "$packed"
    cp "${packed}_build"/_ops_c*.so "$packed"
    strip --strip-unneeded "$packed"/*.so
    # torch.library.opcheck needs this package; the stages before it do not.
    "$python" -m pip install --quiet --no-deps --target "$packed/site" expecttest
    du -sh "$packed"
}

unpack() {
    rm -f splade_fast/_C*.so
    cp "$packed"/*.so splade_fast/
}

# stage NAME SECONDS COMMAND...: run the command within the seconds, and renew the record.
stage() {
    local name=$1 limit=$(($2 * slack)) started=$SECONDS left=$((deadline - SECONDS)) status
    shift 2
    [[ -z ${STAGES:-} || " $STAGES " == *" $name "* ]] || return 0
    ((limit <= left)) || limit=$left
    if ((limit <= 0)); then
        echo "$name: left out, no time" | tee -a "$out/summary.txt"
        failed=1
        return 0
    fi
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1
    status=$?
    echo "$name: exit $status, $((SECONDS - started)) s of $limit" | tee -a "$out/summary.txt"
    ((status == 0)) || failed=1
    tail -n 12 "$logs/$name.log" | cut -c -200
    tar -C "$logs" -czf "$out/record.tar.gz" .
}

# tests NAME SECONDS ARGUMENTS...: run CUDA tests, none of them for longer than a minute.
tests() {
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$python" -m pytest -q -m cuda --timeout 60 --junitxml="$logs/$name.xml" "$@"
}

# Without torch's caching, each tensor is an allocation of its own, so that a step over its end is seen.
sanitized() {
    local name=$1 limit=$2 tool=$3
    shift 3
    stage "$name" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "${sanitizer[@]}" ${sanitizer:+--tool "$tool" --error-exitcode 1 --print-limit 20} "$python" "$@"
}

run() {
    out=${OUT:-build/gpu_window_out}
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    logs=$(mktemp -d)
    : >"$out/summary.txt"
    failed=0
    slack=1
    sanitizer=(compute-sanitizer)
    profiler=(ncu --clock-control none --set basic --launch-count 6 --kernel-name 'regex:head|screen')
    workers=8
    seconds=2  # for each row of the table
    device=cuda
    export BENCHMARK_COMMIT=${BENCHMARK_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null)}
    export PYTHONPATH=$PWD/$packed/site${PYTHONPATH:+:$PYTHONPATH}
    if [[ -n ${REHEARSAL:-} ]]; then
        # Packages that the other machine may lack cannot be imported here either.
        export PYTHONPATH=$PWD/benchmarks/window/other_machine:$PYTHONPATH
        sanitizer=() profiler=()
        slack=20 # any machine may rehearse
        workers=0
        seconds=0
        device=cpu
    else
        unpack
        nvidia-smi >"$logs/nvidia-smi.log" 2>&1
    fi
    deadline=$((SECONDS + ${SECONDS_LEFT:-560} * slack))

    if [[ -n ${REHEARSAL:-} ]]; then
        # CUDA tests are skipped without a GPU; these are the same tests of one op on the CPU.
        stage twins 60 "$python" -m pytest -q -m 'not cuda' tests/ops/test_gather.py -k 'not compile and not opcheck'
    fi

    local fused=tests/ops/head/test_hopper.py
    local all=(tests/ops tests/test_library.py tests/negative_cache tests/encoders/test_batching.py)
    local few='test_tie or test_positions_that_do_not_count or (test_packed and lengths2)'
    stage first_calls 40 "$python" -m benchmarks.window.first_calls
    stage selftest 60 "$python" -m splade_fast selftest --device "$device" --json "$logs/selftest.json"
    tests fused 60 -x "$fused"
    tests all 120 -n "$workers" "${all[@]}" -k 'not compile and not opcheck'
    stage table 130 "$python" -m benchmarks study gpu_window --seconds $seconds --out "$logs"
    sanitized racecheck 45 racecheck -m pytest -q -m cuda "$fused" -k "$few"
    sanitized synccheck 25 synccheck -m pytest -q -m cuda "$fused" -k "$few"
    sanitized memcheck 30 memcheck -m benchmarks study gpu_window tiny --seconds $seconds --out "$logs/memcheck"
    stage counters 60 "${profiler[@]}" "$python" -m benchmarks.window.first_calls fused screened
    tests compiled 300 -n "$workers" "${all[@]}" -k 'compile or opcheck'
    cat "$out/summary.txt"
    return "$failed"
}

case ${1:-} in
pack) pack ;;
run) run ;;
*)
    sed -n '2,17p' "$0"
    exit 2
    ;;
esac
