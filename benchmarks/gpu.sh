#!/usr/bin/env bash
# Tests the package on this machine's GPU and measures it beside diffusers there, in at most 15 minutes:
#
#     OUT=results bash benchmarks/gpu.sh [WHEELS]
#
# WHEELS is a folder of wheels that the machine lacks (default .gpu_wheels; installed beside what there is, without a
# network). OUT gets gpu.json and gpu.md, which grow with each figure, and gpu.log. Each stage has a time limit and none
# depends on another, so that a run that is cut off leaves what it had. Ends with status 1 if a stage failed.
#
# STAGES chooses among the stages, BUDGET is the number of seconds for all of them, PYTHON the interpreter.
# Without a GPU everything but the tests is a toy and takes about a minute.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

wheels=${1:-.gpu_wheels}
out=${OUT:-gpu_results}
python=${PYTHON:-python3}
budget=${BUDGET:-880}
stages=" ${STAGES:-tests training_unet training_dit sampling profile loop graphs compiled_loop} "
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
log=$out/gpu.log
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" \
        "$wheels"/*.whl >>"$log" 2>&1 || { echo "the wheels of $wheels could not be installed:" >&2; tail "$log" >&2; exit 1; }
fi
export PYTHONPATH=$PWD:$PWD/training:$PWD/benchmarks:$work/site
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor HF_HOME=$work/hf
command -v nvidia-smi >/dev/null && nvidia-smi >>"$log" 2>&1
has_gpu=0
if [[ -n ${CUDA_VISIBLE_DEVICES-some} ]]; then # else all are hidden, and torch, which takes seconds to import, need not be asked
    "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>>"$log" && has_gpu=1
fi

failed=()
# stage NAME SECONDS COMMAND...: runs the command if the stage was chosen, for at most so many seconds.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    [[ $stages == *" $name "* ]] || return 0
    ((has_gpu)) || limit=$budget # a toy, for which a busy machine may take long
    ((limit <= budget - SECONDS)) || limit=$((budget - SECONDS))
    if ((limit < 5)); then
        failed+=("$name (no time was left)")
        return 0
    fi
    echo "== $name" | tee -a "$log"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
    if ((status)); then
        ((status == 124 || status == 137)) && failed+=("$name (cut off after $limit s)") || failed+=("$name (status $status)")
        tail -n 12 "$log"
    fi
    "$python" benchmarks/gpu_results.py "$out" seconds "$name" $((SECONDS - start)) >>"$log" 2>&1
}

# What torch.compile has to do for the stages is done during the tests, four at a time, and kept in its caches.
compilations() {
    local whose network
    for whose in diffusers diffusers_ext; do
        for network in unet dit; do
            [[ $stages == *" training_$network "* ]] && echo "bench_gpu_training.py $out --compile_once $network $whose compiled"
        done
    done
    [[ $stages == *" sampling "* ]] && echo "bench_gpu_sampling.py $out --compile_once"
    [[ $stages == *" compiled_loop "* ]] && echo "bench_gpu_loop.py $out --compile_once"
    [[ $stages == *" graphs "* ]] && printf "bench_gpu_training.py $out --compile_once unet %s graphs\n" diffusers_ext diffusers
}
if ((has_gpu)); then
    (
        cd benchmarks && export TORCHINDUCTOR_COMPILE_THREADS=3
        compilations | timeout --kill-after=5 280 xargs -L 1 -P 4 "$python" >"$work/compile.log" 2>&1
    ) &
fi
stage tests 150 "$python" -m pytest -v -n 4 -rfE --tb=short -p no:cacheprovider --confcutdir=tests/device -m device --durations=8 \
    tests/device
wait
[[ -f $work/compile.log ]] && cat "$work/compile.log" >>"$log"
echo "tested and compiled by second $SECONDS" >>"$log"

stage training_unet 200 "$python" benchmarks/bench_gpu_training.py "$out" unet
stage training_dit 90 "$python" benchmarks/bench_gpu_training.py "$out" dit
stage sampling 80 "$python" benchmarks/bench_gpu_sampling.py "$out"
stage profile 90 "$python" benchmarks/bench_gpu_training.py "$out" profile
stage loop 140 "$python" benchmarks/bench_gpu_loop.py "$out"
stage graphs 60 "$python" benchmarks/bench_gpu_training.py "$out" graphs
stage compiled_loop 110 "$python" benchmarks/bench_gpu_loop.py "$out" --compile

grep -E "^(FAILED|ERROR) | (FAILED|ERROR) +\[|\] (FAILED|ERROR) |[0-9] (passed|failed)" "$log" | tail -n 40
"$python" benchmarks/gpu_results.py "$out"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" | tee -a "$log" >&2
    exit 1
fi
echo "all stages done in $SECONDS s"
