#!/usr/bin/env bash
# reproduce.sh - remake every file in experiments/results/ and the pictures in assets/.
#
#     bash experiments/reproduce.sh signatures                       # a night and a day, AVX2
#     bash experiments/reproduce.sh text wikinews.train.txt.xz       # seven hours
#     bash experiments/reproduce.sh proteins cath_S40.fa.xz          # an hour and a half
#     bash experiments/reproduce.sh first_run                        # a quarter of an hour
#
# Everything is written to out/results first, so that the files in git stay whole until it is done:
# then copy the files to experiments/results/, frontier.png and orders.png to assets/. Pictures
# need `pip install matplotlib`. After Ctrl-C the ablation resumes; the rest starts again. If
# something else keeps a core busy, set OMP_NUM_THREADS=1.
set -e
cd "$(dirname "$0")/.."
results=out/results
mkdir -p $results

# Stop unless $1 is a file.
need() {
    if [ ! -f "$1" ]; then
        echo "error: name the file to read, as in the examples at the top of $0" >&2
        exit 2
    fi
}

# Print the minutes of each training, the means of its log's last 180 rows, and its last table.
log_means() {
    python - "$@" <<'EOF'
import json
import sys
for path in sys.argv[1:]:
    with open(path) as f:
        log = [json.loads(line) for line in f]
    rows = [row for row in log if "seconds" in row][-180:]  # the others are tables
    names = [name for name in rows[-1] if name not in ("step", "seconds")]
    means = {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in names}
    print(f"{path}: {rows[-1]['seconds'] / 60:.1f} minutes; last {len(rows)} rows: {means}")
    for table in [row for row in log if "seconds" not in row][-1:]:
        print("   ", {name: round(value, 3) for name, value in table.items()})
EOF
}

# Run five seeds of teacher and student, two with other arithmetic: seed 3 in float32, seed 4 with
# two threads. One causal model judges all. $1: one seed, or all; run 0 first. 40 minutes each.
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

# Train other teachers and other students, measured by one causal model. $1: one seed, or three.
# An hour and a half each.
others() {
    export OMP_NUM_THREADS=1
    for s in ${1:-0 1 2}; do
        flags="--seed $s --teacher out/$s/teacher.pt"
        evaluate="python -m experiments.evaluate --causal out/0/causal.pt --json $results/nano.json"

        # random masks alone; then the same teacher in our order and grid, a student that stays
        python train_teacher.py --seed $s --order random --out out/$s/random.pt
        $evaluate --rows teacher --teacher out/$s/random.pt --steps 8 16 256 --label "random masks"
        python distill.py --seed $s --teacher out/$s/random.pt --temperature 1 --exponent 1.5 \
            --disc_warmup 0 --updates 1 --lr 1e-9 --out out/$s/random_interlaced.pt
        $evaluate --rows student --student out/$s/random_interlaced.pt --steps 4 8 \
            --label "random masks, interlaced"

        # the time of distillation spent on the teacher
        python train_teacher.py --seed $s --updates 2550 --out out/$s/longer.pt
        $evaluate --rows teacher --teacher out/$s/longer.pt --steps 4 8 --label "longer teacher"

        python -m experiments.sdtt $flags --out out/$s/sdtt.pt
        $evaluate --rows student --student out/$s/sdtt.pt --label sdtt
        python distill.py $flags --paper --out out/$s/paper.pt
        $evaluate --rows student --student out/$s/paper.pt --label paper
        python distill.py $flags --paper --order interlaced --out out/$s/paper_interlaced.pt
        $evaluate --rows student --student out/$s/paper_interlaced.pt --label "paper, interlaced"
    done
}

# Measure each component, 20 rows from 18 runs. $1: one seed, or three. 3 hours each.
ablation() {
    OMP_NUM_THREADS=1 python -m experiments.ablate $results/ablation.json --seeds ${1:-0 1 2} \
        --causal out/0/causal.pt
}

# Measure speed on an otherwise idle machine: a quarter of an hour.
speed() {
    models="--teacher out/0/teacher.pt --student out/0/default.pt --causal out/0/causal.pt"
    python -m experiments.bench models $models --json $results/bench.json
    python -m experiments.bench sampler > $results/sampler.txt
    for flags in "--bf16" "--no-bf16" "--bf16 --compile"; do
        echo "training $flags"
        python -m experiments.bench training --flags="$flags"
    done > $results/bench.txt
    for parts in 1 4; do
        echo "distillation --accumulate $parts"
        python -m experiments.bench distillation --teacher out/0/teacher.pt \
            --flags="--accumulate $parts"
    done >> $results/bench.txt
}

signatures() {
    few_steps
    others
    ablation
    speed
    # the front page: samples, the figures
    for model in teacher default; do
        python sample.py --model out/0/$model.pt --steps 4 --num 8
    done > $results/samples.txt
    log_means out/[0-4]/{teacher,default}.jsonl out/[012]/{random,longer,sdtt}.jsonl \
        out/[012]/{paper,paper_interlaced}.jsonl > $results/logs.txt
    python -m experiments.evaluate --table $results/nano.json --plot $results/frontier.png
    python -m experiments.orders $results/orders.png
}

# Run 36 MB of English Wikinews in passages of 128 tokens; $1 is the file, $2 bytes, gpt2 or, if it
# is missing, both. One thread per process.
text() {
    need "$1"
    export OMP_NUM_THREADS=1
    # GPT-2's vocabulary makes large tensors: a step takes a third less if glibc keeps their memory
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    GLIBC_TUNABLES+=:glibc.malloc.mmap_threshold=8000000000
    GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=16000000000
    for tokens in ${2:-bytes gpt2}; do
        how="--data out/news_$tokens --length 128" teacher=60 both=86 judge=12
        groups=16 rows="--batch 128"
        if [ $tokens = gpt2 ]; then
            how+=" --batch 16" teacher=80 both=113 judge=45
            groups=8 rows="--batch 64 --steps 4 8 16 32 64 256"
        fi
        out=out/text_$tokens
        models="--teacher $out/teacher.pt --causal $out/causal.pt"
        python -m data.text "$1" --tokenizer $tokens --out out/news_$tokens
        python train_teacher.py $how --minutes $teacher --out $out/teacher.pt
        python train_teacher.py $how --minutes $judge --causal --out $out/causal.pt
        python distill.py --groups $groups --teacher $out/teacher.pt --out $out/student.pt
        python -m experiments.evaluate --samples 256 $rows $models \
            --student $out/student.pt --json $results/text_$tokens.json --label wikinews
        for model in teacher student; do
            python sample.py --model $out/$model.pt --steps 8 --num 5
        done > $results/samples_text_$tokens.txt
        python sample.py --model $out/teacher.pt --steps 64 --num 3 \
            >> $results/samples_text_$tokens.txt
        log_means $out/{teacher,causal,student}.jsonl > $results/logs_text_$tokens.txt

        # at last the time of distillation is spent on the teacher
        python train_teacher.py --minutes $both --resume --out $out/teacher.pt
        python -m experiments.evaluate --samples 256 $rows $models --steps 4 8 --rows teacher \
            --json $results/text_$tokens.json --label "longer teacher"
    done
}

# Run the CATH v4.1 S40 domains; $1 is the FASTA file. One thread.
proteins() {
    need "$1"
    export OMP_NUM_THREADS=1
    how="--data out/cath --batch 32"
    models="--teacher out/protein/teacher.pt --causal out/protein/causal.pt"
    python -m data.fasta "$1" --out out/cath
    python train_teacher.py $how --minutes 20 --out out/protein/teacher.pt
    python train_teacher.py $how --minutes 8 --causal --out out/protein/causal.pt
    python distill.py --teacher out/protein/teacher.pt --out out/protein/student.pt
    python -m experiments.evaluate --steps 4 8 16 --samples 500 $models \
        --student out/protein/student.pt --json $results/protein.json --label protein
    python sample.py --model out/protein/student.pt --num 100 --out out/designs.txt
    log_means out/protein/{teacher,causal,student}.jsonl > $results/logs_protein.txt
}

# Time the front page's one command in a fresh folder, including the installation.
first_run() {
    if ! mkdir out/first; then
        echo "error: out/first already exists: delete it" >&2
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
    signatures | few_steps | others | ablation | speed) "$@" ;;
    text | proteins | first_run) "$@" ;;
    *) sed -n '2,/^set -e/s/^# \{0,1\}//p' experiments/reproduce.sh ;;
esac
