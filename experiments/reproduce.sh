#!/usr/bin/env bash
# reproduce.sh - make every file of experiments/results/, and the pictures in assets/, again.
#
#     bash experiments/reproduce.sh signatures                       # 8 hours on two cores
#     bash experiments/reproduce.sh text wikinews.train.txt.xz       # 80 minutes
#     bash experiments/reproduce.sh text_speed wikinews.train.txt.xz # a minute
#     bash experiments/reproduce.sh proteins cath_S40.fa.xz          # half an hour
#     bash experiments/reproduce.sh prepare enwiki.txt               # 10 seconds
#     bash experiments/reproduce.sh first_run                        # 8 minutes
#
# Everything is written to out/results first, so that what is in git stays whole until it is done:
# then copy the files to experiments/results/, frontier.png and writing.gif to assets/. Pictures
# need `pip install matplotlib`. After Ctrl-C the ablation goes on where it was; the rest is made
# again. Where something else keeps a core busy set OMP_NUM_THREADS=1.
set -e
cd "$(dirname "$0")/.."
results=out/results
mkdir -p $results

# Stop unless $1 is a file.
need() {
    if [ ! -f "$1" ]; then
        echo "error: name the file to read, as in the examples on top of $0" >&2
        exit 2
    fi
}

# The minutes that each training took, means of the last 280 rows of its log, and its last table.
log_means() {
    python - "$@" <<'EOF'
import json
import sys
for path in sys.argv[1:]:
    with open(path) as f:
        log = [json.loads(line) for line in f]
    wanted = {"kl", "nelbo"}  # without tables and warm-up
    rows = [row for row in log if wanted & row.keys()][-280:]
    names = ("disc_acc", "r_student", "spread", "norm", "kl", "nelbo")
    names = [name for name in names if name in rows[-1]]
    means = {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in names}
    print(f"{path}: {rows[-1]['seconds'] / 60:.1f} minutes; last {len(rows)} rows: {means}")
    for table in [row for row in log if "seconds" not in row][-1:]:
        print("   ", {name: round(value, 3) for name, value in table.items()})
EOF
}

# Five seeds of teacher and student, two of them with other arithmetic: seed 3 in float32, seed 4
# with two threads. One causal model judges all. $1: one seed, or all; 0 comes first. 90 minutes.
few_steps() {
    for s in ${1:-0 1 2 3 4}; do
        export OMP_NUM_THREADS=1
        how="--seed $s"
        case $s in
            0) python train_teacher.py --causal --out out/0/causal.pt ;;
            3) how="--seed 3 --no-bf16" ;;
            4) export OMP_NUM_THREADS=2 ;;
        esac
        python train_teacher.py $how --out out/$s/teacher.pt
        python distill.py $how --teacher out/$s/teacher.pt --out out/$s/default.pt
        python -m experiments.evaluate --teacher out/$s/teacher.pt --causal out/0/causal.pt \
            --student out/$s/default.pt --json $results/nano.json --label default
    done
}

# Other students of the same teachers. $1: one seed, or all.
others() {
    export OMP_NUM_THREADS=1
    for s in ${1:-0 1 2}; do
        flags="--seed $s --teacher out/$s/teacher.pt"
        python -m experiments.sdtt $flags --out out/$s/sdtt.pt
        python distill.py $flags --paper --out out/$s/paper.pt
        for run in sdtt paper; do
            python -m experiments.evaluate --rows student --student out/$s/$run.pt \
                --causal out/0/causal.pt --json $results/nano.json --label $run
        done
    done
}

# Quality against entropy, of seed 0: all numbers of steps at seven temperatures. 45 minutes.
sweep() {
    python -m experiments.evaluate --sweep --teacher out/0/teacher.pt --causal out/0/causal.pt \
        --student out/0/default.pt --json $results/sweep.json --label default
    python -m experiments.evaluate --sweep --rows student --teacher out/0/teacher.pt \
        --causal out/0/causal.pt --student out/0/sdtt.pt --json $results/sweep.json --label sdtt
}

# What each component does, 29 rows of 27 runs. $1: one seed, or three. 90 minutes each.
ablation() {
    OMP_NUM_THREADS=1 python -m experiments.ablate $results/ablation.json --seeds ${1:-0 1 2} \
        --causal out/0/causal.pt
}

# Learning rates in the measure of the teacher's weights and fixed ones, for teachers with smaller
# weights than the default's: trained for less, and wider. An hour.
rates() {
    export OMP_NUM_THREADS=1
    python train_teacher.py --updates 150 --out out/short/teacher.pt
    python train_teacher.py --n_embd 384 --n_head 6 --lr 4e-3 --updates 300 \
        --out out/wide/teacher.pt
    # the default when these were measured
    before="--temperature 1 --power 0 --no-coupled --reference teacher"
    for t in short wide; do
        slower=8.3e-5  # for the discriminator, then three times the student's
        if [ $t = wide ]; then
            slower=5.8e-5
        fi
        distil="python distill.py --groups 8 --teacher out/$t/teacher.pt --out out/$t"
        measure="python -m experiments.evaluate --samples 500 --json $results/rates.json"
        measure="$measure --teacher out/$t/teacher.pt --causal out/0/causal.pt"
        $distil/fixed.pt $before --lr 1e-4 --disc_lr 3e-4
        $measure --student out/$t/fixed.pt --rows student --label "$t, fixed rates"
        $distil/student.pt $before --disc_lr $slower
        $measure --student out/$t/student.pt --label $t
        $distil/default.pt
        $measure --student out/$t/default.pt --rows student --label "$t, default"
    done
}

# Speed and memory, on an otherwise idle machine: half an hour.
speed() {
    models="--teacher out/0/teacher.pt --student out/0/default.pt --causal out/0/causal.pt"
    python -m experiments.bench models $models --json $results/bench.json
    python -m experiments.bench sampler > $results/sampler.txt
    for how in --bf16 --no-bf16 "--bf16 --compile"; do
        echo "training $how"
        python -m experiments.bench training $how
    done > $results/bench.txt
    for parts in 1 4; do
        echo "distillation --accumulate $parts"
        python -m experiments.bench distillation --teacher out/0/teacher.pt --accumulate $parts
    done >> $results/bench.txt
    # bytes of an update, counted, so the same on any machine: ten minutes
    python -m experiments.bench memory --paper_scale --json $results/memory.json --label paper_scale
    python -m experiments.bench memory --groups 2 --json $results/memory.json --label default
}

signatures() {
    few_steps
    others
    sweep
    ablation
    rates
    speed
    # the front page: samples, the figure, the animation
    python sample.py --model out/0/teacher.pt --steps 8 --num 8 > $results/samples.txt
    python sample.py --model out/0/default.pt --steps 8 --num 8 >> $results/samples.txt
    log_means out/[0-4]/teacher.jsonl out/[0-4]/default.jsonl out/[012]/sdtt.jsonl \
        out/[012]/paper.jsonl > $results/logs.txt
    python -m experiments.table $results/sweep.json --plot $results/frontier.png
    python -m experiments.animate $results/writing.gif --student out/0/default.pt \
        --teacher out/0/teacher.pt --causal out/0/causal.pt
}

# 36 MB of English Wikinews as bytes; $1 is the file. One thread for each process.
text() {
    need "$1"
    export OMP_NUM_THREADS=1
    python -m data.text "$1" --tokenizer bytes --out out/newsbytes
    how="--data out/newsbytes --length 128"
    models="--teacher out/text/teacher.pt --causal out/text/causal.pt"
    python train_teacher.py $how --minutes 30 --out out/text/teacher.pt
    python train_teacher.py $how --minutes 12 --causal --out out/text/causal.pt
    python distill.py --teacher out/text/teacher.pt --out out/text/student.pt
    python -m experiments.evaluate --sweep --samples 256 --batch 128 $models \
        --student out/text/student.pt --json $results/text_cpu.json --label wikinews
    for model in teacher student; do
        python sample.py --model out/text/$model.pt --steps 8 --num 5
    done > $results/samples_text.txt
    python sample.py --model out/text/teacher.pt --steps 64 --num 3 >> $results/samples_text.txt
    log_means out/text/{teacher,causal,student}.jsonl > $results/logs_text.txt
}

# Training on GPT-2's tokens, with and without memory that is kept: see README.md.
text_speed() {
    need "$1"
    export OMP_NUM_THREADS=1
    python -m data.text "$1" --out out/wikinews
    export MALLOC_TRIM_THRESHOLD_=100000000000
    for most in 65536 0; do
        echo "MALLOC_MMAP_MAX_=$most"
        MALLOC_MMAP_MAX_=$most python -m experiments.bench training --data out/wikinews \
            --length 64 --lr 4e-3
    done > $results/bench_text.txt
}

# CATH v4.1 S40 domains; $1 is the FASTA file. One thread.
proteins() {
    need "$1"
    export OMP_NUM_THREADS=1
    python -m data.fasta "$1" --out out/cath
    models="--teacher out/protein/teacher.pt --causal out/protein/causal.pt"
    python train_teacher.py --data out/cath --minutes 4 --out out/protein/teacher.pt
    python train_teacher.py --data out/cath --minutes 2 --causal --out out/protein/causal.pt
    python distill.py --groups 8 --disc_warmup 60 --teacher out/protein/teacher.pt \
        --out out/protein/student.pt
    python -m experiments.evaluate --samples 500 $models --student out/protein/student.pt \
        --json $results/protein.json --label protein
    python distill.py --temperature 1 --groups 8 --disc_warmup 60 \
        --teacher out/protein/teacher.pt --out out/protein/from_1.pt
    python -m experiments.evaluate --rows student --samples 500 $models \
        --student out/protein/from_1.pt --json $results/protein.json \
        --label "protein, from temperature 1"
    python sample.py --model out/protein/student.pt --num 100 --out out/designs.fasta
    log_means out/protein/{teacher,causal,student,from_1}.jsonl > $results/logs_protein.txt
}

# Time and memory of preparing 170 MB of English Wikipedia as plain text; $1 is the file.
prepare() {
    need "$1"
    /usr/bin/time -f "%e s, %M KiB at most" python -m data.text "$1" --out out/prepared 2>&1 \
        | tr '\r' '\n' | grep -E "Mtoken|at most" | tail -2 > $results/prepare.txt
}

# The front page's one command in a fresh folder, with the installation.
first_run() {
    if ! mkdir out/first; then
        echo "error: delete out/first" >&2
        exit 2
    fi
    cp -r ./*.py data requirements.txt out/first
    (
        cd out/first
        time (
            python3 -m venv .venv
            . .venv/bin/activate
            pip install -q -r requirements.txt
            python train_teacher.py
            python distill.py
            python sample.py --steps 8
        )
    ) 2>&1 | tail -21 > $results/first_run.txt
    log_means out/first/out/{teacher,student}.jsonl >> $results/first_run.txt
}

case $1 in
    signatures | few_steps | others | sweep | ablation | rates | speed) "$@" ;;
    text | text_speed | proteins | prepare | first_run) "$@" ;;
    *) sed -n '2,/^set -e/s/^# \{0,1\}//p' experiments/reproduce.sh ;;
esac
