#!/usr/bin/env bash
# gpu.sh - what a quarter of an hour of one GPU can show, the most important first.
#
#     bash experiments/gpu.sh wiki.txt.xz                  # all of: tests speed default text
#     bash experiments/gpu.sh wiki.txt.xz tests speed      # some
#     MINUTES="20 5 10" bash experiments/gpu.sh wiki.txt.xz text    # instead of 3 1 2
#     TOY=1 bash experiments/gpu.sh any.txt                # the same commands, minutes on a CPU
#
# MINUTES: teacher, judge, student. Results go to out/results/gpu*. Nothing else may use the machine
# meanwhile. TOY uses folders of its own, out/toy_*.
set -eo pipefail
cd "$(dirname "$0")/.."
if [ ! -f "$1" ]; then
    echo "error: name a text to train on, as in the examples at the top of $0" >&2
    exit 2
fi
file=$1
shift

results=out/results out=out/gpu device="--device cuda" tokenizer=gpt2 samples=256 measured=1000
read -r for_teacher for_judge for_student <<< "${MINUTES:-3 1 2}"
small="--size small" parts=16 mini="--size mini" default="" distil=""
if [ -n "$TOY" ]; then
    results=out/toy_results out=out/toy_gpu device="--device cpu" tokenizer=bytes
    samples=8 measured=8 for_teacher=.1 for_judge=.1 for_student=.1
    small="--n_layer 2 --n_head 2 --n_embd 32 --length 64 --batch 16 --lr 1e-3" parts=2
    mini="--n_layer 1 --n_head 2 --n_embd 32 --length 32 --batch 16"
    default="--updates 4" distil="--updates 4 --disc_warmup 2 --groups 2"
fi
corpus=$out/$(basename "$file")
bench="python -m experiments.bench $device --json $results/gpu_bench.json"
mkdir -p $results $out

prepare() {
    if [ ! -d "$corpus" ]; then
        python -m data.text "$file" --tokenizer $tokenizer --out "$corpus"
    fi
}

# Run the tests for a GPU; the README's second command runs the others. If one fails, the rest is
# still measured, and this script fails at its end.
tests() {
    python -m pytest -q -rs experiments/test_gpu.py | tee $results/gpu_tests.txt ||
        failed=1
}

# Time and profile a training step of the paper's network, with and without --compile, and an
# update of its student. That needs a teacher; its quality doesn't matter.
speed() {
    prepare
    flags="--data $corpus $small --accumulate $parts"
    $bench training --label training --times 8 --flags="$flags"
    $bench training --label compiled --times 8 --flags="$flags --compile" || failed=1
    $bench training --label profiled --times 2 --flags="$flags" \
        --profile $results/gpu_profile_training.txt
    python train_teacher.py $device --data "$corpus" $small --batch 32 --updates 1 \
        --out $out/small.pt
    for accumulate in 1 4; do
        $bench distillation --label update_$accumulate --times 8 --teacher $out/small.pt \
            --flags="--paper --reference data --groups 4 --disc_blocks 4 --accumulate $accumulate"
    done
    $bench distillation --label profiled_update --times 2 --teacher $out/small.pt \
        --flags="--paper --reference data --groups 4 --disc_blocks 4" \
        --profile $results/gpu_profile_update.txt
}

# Time the README's default and measure it: does it match CPUs within the spread of seeds?
default() {
    models="--teacher $out/teacher.pt --student $out/student.pt --causal $out/causal.pt"
    time python train_teacher.py $device $default --out $out/teacher.pt
    time python distill.py $device $distil --teacher $out/teacher.pt --out $out/student.pt
    python train_teacher.py $device $default --causal --out $out/causal.pt
    python -m experiments.evaluate $device $models --samples $measured \
        --json $results/gpu_nano.json --label gpu | tee $results/gpu_nano.txt
}

# Compare student and teacher on English in GPT-2's tokens: measures, also at equal entropy; texts.
text() {
    prepare
    models="--teacher $out/text.pt --student $out/text_student.pt --causal $out/text_causal.pt"
    python train_teacher.py $device --data "$corpus" $mini --minutes $for_teacher --out $out/text.pt
    python train_teacher.py $device --data "$corpus" $mini --minutes $for_judge --causal \
        --out $out/text_causal.pt
    python distill.py $device $distil --teacher $out/text.pt --minutes $for_student \
        --out $out/text_student.pt
    for model in text text_student; do
        python sample.py $device --model $out/$model.pt --steps 8 --num 3
    done > $results/gpu_samples.txt
    python sample.py $device --model $out/text.pt --steps 256 --num 3 >> $results/gpu_samples.txt
    python -m experiments.evaluate $device $models --samples $samples \
        --json $results/gpu_text.json --label text | tee $results/gpu_text.txt
    $bench models --label models $models
}

if [ $# = 0 ]; then
    set -- tests speed default text
fi
for stage in "$@"; do
    case $stage in
        prepare | tests | speed | default | text) time $stage ;;
        *) echo "error: no stage $stage: use prepare tests speed default text" >&2; exit 2 ;;
    esac
done
exit ${failed:-0}
