#!/usr/bin/env bash
# Everything that only a GPU can tell about the CUDA backend, in one command of at most 10 minutes.
#
#     tools/gpu/check.sh [OUT] [--only STAGE]      OUT: a new folder for logs, default gpu-check
#
# Stages: environment build selftest sanitizer tests bench profile. Each has its own limit and its
# log OUT/STAGE.log; none stops the next. Figures are lines of OUT/results.jsonl; the summary is last.
# Without a GPU the stages that can run do, through the emulation, and the others say so.
#
# Settings: PYTHON (default python3, an environment with torch and dcnlib's requirements); SLOW=4 gives
# every stage four times its limit, for a machine with few cores.
# Never changes clocks, modes or MIG, and never resets a device.
set -u
cd "$(dirname "$0")/../.."

out=gpu-check only=
while [ $# -gt 0 ]; do
    case "$1" in
        --only) only=${2:?a stage}; shift 2 ;;
        *) out=$1; shift ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 GOMP_SPINCOUNT=0
failed=() begin=$SECONDS
: > "$out/summary.txt"
rm -f "$out"/*.jsonl "$out/profile.csv"

gpu=0
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; then gpu=1; fi

# stage NAME SECONDS: runs the function do_NAME; a status of 3 means "not possible here".
stage() {
    local name=$1 limit=$(($2 * ${SLOW:-1})) start=$SECONDS status
    [ -z "$only" ] || [ "$only" = "$name" ] || return 0
    printf '=== %s (limit %d s)\n' "$name" "$limit"
    export -f "do_$name"
    timeout --kill-after=10 "$limit" bash -c "do_$name" > "$out/$name.log" 2>&1
    status=$?
    case $status in
        0) verdict=passed ;;
        3) verdict="not run: $(tail -n 1 "$out/$name.log")" ;;
        124 | 137) verdict="FAILED: over $limit s" ;;
        *) verdict="FAILED: status $status" ;;
    esac
    case $verdict in FAILED*) failed+=("$name") ;; esac
    printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) "$verdict" | tee -a "$out/summary.txt"
    case $verdict in FAILED*) tail -n 15 "$out/$name.log" ;; esac
}

do_environment() {
    git log -1 --format='commit %H %s'
    "$python" tools/gpu/verified.py
    "$python" --version
    "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
    command -v nvcc ptxas compute-sanitizer ncu nsys
    [ "$gpu" = 1 ] || { echo "there is no GPU"; return 3; }
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,mig.mode.current --format=csv
}

do_build() {
    DCNLIB_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps --editable . || return 1
    "$python" -m dcnlib info
    [ "$gpu" = 1 ] || return 0
    "$python" -c 'import dcnlib, sys; s = dcnlib.backends()["cuda"]; print(s); sys.exit(not s.available)'
}

# compiled NAME: builds tools/gpu/NAME.cu with the kernels, prints the program.
compiled() {
    local program=build/gpu-$1 nvcc arch kernels=
    if [ "$gpu" = 0 ]; then
        "$python" -c 'import sys; sys.path.insert(0, "tests/cuda/emulation"); import emulate
print(emulate.program(emulate.ROOT / "tools/gpu" / sys.argv[1], ["-O1"]))' "$1.cu"
        return
    fi
    nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    mkdir -p build
    [ "$1" = rates ] || kernels=csrc/cuda/*.cu
    [ -x "$program" ] && [ -z "$(find csrc tools/gpu -newer "$program" -type f)" ] ||
        "$nvcc" -std=c++17 -O3 -lineinfo -arch="sm_$arch" "-DDCN_CUDA_ARCHS=\"$arch\"" \
            $kernels "tools/gpu/$1.cu" -o "$program" >&2 || return 1
    echo "$program"
}
export -f compiled

do_selftest() {
    local program
    program=$(compiled selftest) && "$program" $((gpu ? 800 : 400)) && "$program" large
}

do_sanitizer() {
    [ "$gpu" = 1 ] || { echo "there is no GPU; the tests run ASan and UBSan on the emulation"; return 3; }
    command -v compute-sanitizer > /dev/null ||
        { echo "no compute-sanitizer; pip install nvidia-cuda-sanitizer-api has it"; return 3; }
    local program bad=0
    program=$(compiled selftest) || return 1
    for tool in memcheck racecheck initcheck synccheck; do
        echo "--- $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" 24 || bad=1
    done
    return $bad
}

do_tests() {
    if [ "$gpu" = 1 ]; then
        "$python" -m pytest -q -m gpu --durations=10 tests/cuda
    else
        "$python" -m pytest -q tests/cuda/test_plan_cuda.py tests/cuda/test_calls_cuda.py \
            tests/cuda/test_gpu.py
    fi
}

# Figures of a rehearsal are no figures: they get a file of another name.
do_bench() {
    local program bad=0 to=$out/results.jsonl rehearse=
    [ "$gpu" = 1 ] || { to=$out/rehearsal.jsonl rehearse=--rehearse; }
    program=$(compiled rates) && "$program" $((gpu ? 22 : 10)) > "$out/rates.log" || bad=1
    cat "$out/rates.log"
    grep '^{' "$out/rates.log" > "$to"
    "$python" asv_bench/gpu/bench.py $rehearse --output "$to" || bad=1
    return $bad
}

do_profile() {
    if [ "$gpu" = 0 ]; then
        "$python" asv_bench/gpu/bench.py --profile --rehearse || return 1
        echo "there is no GPU; the calls were rehearsed"
        return 3
    fi
    command -v ncu > /dev/null || { echo "there is no ncu"; return 3; }
    ncu --clock-control none --csv --log-file "$out/profile.csv" --kernel-name-base function \
        --kernel-name 'regex:^(rows|planar|finish|pack)_|^gather$|^corner_keys$' \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
        "$python" asv_bench/gpu/bench.py --profile
}

export python gpu out
stage environment 20
stage build 120
stage selftest 60
stage sanitizer 80
stage tests 120
stage bench 160
stage profile 40

echo
echo "=== summary (after $((SECONDS - begin)) s)"
cat "$out/summary.txt"
if [ -s "$out/results.jsonl" ]; then
    "$python" asv_bench/gpu/bench.py --table "$out/results.jsonl"
    kept=asv_bench/gpu/results/$(date -u +%F)-$(git rev-parse --short HEAD).jsonl
    mkdir -p asv_bench/gpu/results && cp "$out/results.jsonl" "$kept" && echo "kept as $kept"
fi
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}; logs are in $out"
    exit 1
fi
if [ "$gpu" = 1 ] && [ -z "$only" ]; then
    "$python" tools/gpu/verified.py --record "$out"
fi
