#!/usr/bin/env bash
# gpu.sh - measure on one GPU, the most important first.
#
#     bash experiments/gpu.sh wiki.txt.xz                # all; the text trains for 22 minutes
#     bash experiments/gpu.sh wiki.txt.xz tests speed    # some of: tests default judge speed text
#     MINUTES="4 2 4" bash experiments/gpu.sh wiki.txt.xz text    # instead of 9 5 8
#     SEEDS=0 bash experiments/gpu.sh wiki.txt.xz default judge    # instead of 0 1
#     DISTIL="--kl .1" bash experiments/gpu.sh wiki.txt.xz text    # flags of the student
#     TOY=1 bash experiments/gpu.sh any.txt              # the same commands, minutes on a CPU
#
# MINUTES: teacher, judge, student. Results go to out/results: gpu_bench.json, gpu_nano.json,
# gpu_text.json, gpu_*.txt. After an interruption name the remaining stages. TOY uses its own
# folders, out/toy_*, so that its results are not mistaken for real ones; without TOY and without
# a GPU this script stops at once.
set -eo pipefail
cd "$(dirname "$0")/.."
if [ ! -f "$1" ]; then
    echo "error: name a text to train on, as in the examples at the top of $0" >&2
    exit 2
fi
file=$1
shift

results=out/results out=out/gpu
# Sizes: the paper's network, the parts of its batch, the smaller network for text, the default.
small="--size small" parts=16 mini="--size mini" default="" distil=$DISTIL measured=1000
tokenizer=gpt2 samples=256 device="--device cuda" seeds=${SEEDS:-0 1} times=""
read -r for_teacher for_judge for_student <<< "${MINUTES:-9 5 8}"
if [ -n "$TOY" ]; then
    results=out/toy_results out=out/toy_gpu
    small="--n_layer 2 --n_head 2 --n_embd 32 --length 64 --batch 16 --lr 1e-3" parts=2
    mini="--n_layer 1 --n_head 2 --n_embd 32 --length 32 --batch 16"
    default="--updates 4" distil="--updates 4 --disc_warmup 2 --groups 2"
    tokenizer=bytes samples=8 measured=8 device="--device cpu"
    for_teacher=.1 for_judge=.1 for_student=.1 times="--times 2"
fi
corpus=$out/$(basename "$file")
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

# Time the README's default, and a step of it.
default() {
    for s in $seeds; do
        time python train_teacher.py $device $default --seed $s --out $out/$s/teacher.pt
        time python distill.py $device $distil --seed $s --teacher $out/$s/teacher.pt \
            --out $out/$s/student.pt
    done
    bench="python -m experiments.bench $device $times --json $results/gpu_bench.json"
    $bench training --label nano
    $bench distillation --label nano_update --teacher $out/${seeds%% *}/teacher.pt
}

# Measure it: does it match CPUs within the spread of seeds?
judge() {
    python train_teacher.py $device $default --causal --out $out/causal.pt
    for s in $seeds; do
        models="--teacher $out/$s/teacher.pt --student $out/$s/student.pt --causal $out/causal.pt"
        python -m experiments.evaluate $device $models --samples $measured \
            --json $results/gpu_nano.json --label gpu
    done
    python -m experiments.evaluate --table $results/gpu_nano.json | tee $results/gpu_nano.txt
}

# Time a training step and an update of the paper's network. The update needs a teacher; its quality
# doesn't matter.
speed() {
    prepare
    bench="python -m experiments.bench $device --times 8 --json $results/gpu_bench.json"
    $bench training --label training --flags="--data $corpus $small --accumulate $parts"
    python train_teacher.py $device --data "$corpus" $small --batch 32 --updates 1 \
        --out $out/small.pt
    $bench distillation --label paper_scale --teacher $out/small.pt \
        --flags="--paper --reference data --groups 4 --disc_blocks 4"
    $bench distillation --label default --teacher $out/small.pt --flags="--groups 2"
    if [ -z "$TOY" ]; then  # it has only one size
        $bench sampler --label sampler
    fi
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
        --json $results/gpu_text.json --label text
    python -m experiments.evaluate --table $results/gpu_text.json | tee $results/gpu_text.txt
    python -m experiments.bench $device models $models --json $results/gpu_bench.json --label models
}

if [ $# = 0 ]; then
    set -- tests default judge speed text
fi
for stage in "$@"; do
    case $stage in
        prepare | tests | default | judge | speed | text) time $stage ;;
        *) echo "error: no stage $stage: use prepare tests default judge speed text" >&2; exit 2 ;;
    esac
done
exit ${failed:-0}
