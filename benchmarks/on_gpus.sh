#!/usr/bin/env bash
# The records that need GPUs, made or gone on with: how a machine of four 80 GB cards is kept busy for half an hour.
#
#   benchmarks/on_gpus.sh STAGE SHARED OUT
#
# STAGE   beside     three GPUs compare methods on the 16 M reader, a cell on each; the fourth runs tests/gpu (7 minutes)
#         crowd      eight sites beside training in one place, and loss curves of the engine's precisions beside
#                    autograd's: processes that share all GPUs (15 minutes)
#         plan       one GPU and nothing beside it: the planner's points with all memory free (3 minutes)
#         all        these three, one after another
#         rank       a rank that falls beside what keeps it (9 minutes)
#         sizes      one GPU: what cuts free at an 8B's shapes, streamed layers (6 minutes)
# SHARED  a folder with models/reader-16m, data/imdb, data/gsm8k and bench/gsm8k_lengths.txt
# OUT     gets runs/ and results/, which starts as benchmarks/results is: what is done there is not done again. Copy it
#         back before the machine goes.
#
# Where many processes share a card, NVIDIA's multi-process service is started if it is there, so that their kernels run
# beside each other instead of in turn.
#
# MINUTES, a whole number, ends a stage earlier or later, PYTHON is the interpreter, and DRY=1 only prints the commands.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2; exit 2; }
stage=$1 shared=$(cd "$2" && pwd) out=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
model=$shared/models/reader-16m lengths=$shared/bench/gsm8k_lengths.txt runs=$out/runs results=$out/results
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

mkdir -p "$runs" "$results"
cp -rn "$here/results/." "$results/"

run() {
    echo "+ $*"
    [ -n "${DRY:-}" ] || "$@" || echo "exit $?: $*"
}

share_cards() {
    command -v nvidia-cuda-mps-control >/dev/null || return 0
    export CUDA_MPS_PIPE_DIRECTORY=$out/mps CUDA_MPS_LOG_DIRECTORY=$out/mps
    mkdir -p "$out/mps"
    run nvidia-cuda-mps-control -d
    trap 'echo quit | run nvidia-cuda-mps-control' EXIT
}

gpu_tests() {
    cd "$here/.."
    run "$python" -m pytest -q -rfE tests/gpu
}

case $stage in
beside)
    # Cells of one comparison are of one kind of machine: those of H200s are kept by themselves.
    kept=reader
    if nvidia-smi --query-gpu=name --format=csv,noheader -i 0 2>/dev/null | grep -q H200; then kept=reader-h200; fi
    (CUDA_VISIBLE_DEVICES=3 gpu_tests) >"$out/gpu_tests.log" 2>&1 &
    CUDA_VISIBLE_DEVICES=0,1,2 run "$python" "$here/imdb_reader/run.py" --model "$model" --imdb "$shared/data/imdb" \
        --gsm8k "$shared/data/gsm8k" --output "$runs/$kept" --results "$results/$kept" --parts imdb --at-once 3 \
        --tries-at-once 9 --minutes "${MINUTES:-8}"
    wait
    cat "$out/gpu_tests.log"
    ;;
crowd)
    share_cards
    run "$python" "$here/engine/curves.py" --model "$model" --data "$shared/data/imdb" --output "$runs/curves" \
        --results "$results/engine-curves" --gpus 4 --at-once 6 --seeds 8 --minutes "${MINUTES:-15}" \
        >"$out/curves.log" 2>&1 &
    run "$python" "$here/federated/run.py" --model "$model" --data "$shared/data/imdb" --output "$runs/federated" \
        --results "$results/federated-imdb" --gpus 4 --at-once 24 --minutes "${MINUTES:-15}"
    wait
    cat "$out/curves.log"
    ;;
plan)
    CUDA_VISIBLE_DEVICES=0 run "$python" "$here/plan_points/run_engine.py" --lengths "$lengths" --by-layers \
        --results "$results/plan-again.jsonl" --groups 0,2,1,3,4 --free-only --deadline-s "$((${MINUTES:-4} * 55))"
    ;;
all)
    for each in plan beside crowd; do "$0" "$each" "$shared" "$out"; done
    ;;
rank)
    share_cards
    run "$python" "$here/dynamic_rank/run.py" --model "$model" --data "$shared/data" --output "$runs/dynamic-rank" \
        --results "$results/dynamic-rank" --gpus 4 --at-once 24 --minutes "${MINUTES:-9}"
    ;;
sizes)
    export CUDA_VISIBLE_DEVICES=0
    run "$python" "$here/dynamic_rank/sizes_8b.py" --results "$results/dynamic-rank"
    run "$python" "$here/streaming/run.py" --results "$results/streaming" --lengths "$lengths" \
        --stages equality,70B-caps --deadline-s 240
    ;;
*)
    echo "there is no stage $stage" >&2
    exit 2
    ;;
esac
