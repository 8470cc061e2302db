"""table.py - read the results of experiments.evaluate: Markdown tables over seeds, and a plot.

    python -m experiments.table experiments/results/nano.json
    python -m experiments.table out/sweep.json --plot out/frontier.png      # of runs with --sweep

A model need only become less diverse to look better, so quality is also compared at equal entropy:
each model at the temperature that gives its samples the entropy of held-out data. That needs runs
with --sweep. Rows of different seeds belong together if they are of the same model, steps and T.
"""
import itertools
import math

import numpy as np

from data import files
from data.command import make_parser, printable, run_script
from experiments import common

SHOWN = {"nfe": 1, "disc_calls": 1, "valid": 3, "post": 3, "judge_ppl": 2, "tv": 3, "js3": 3,
         "ks": 3, "entropy": 3, "length": 1, "length_sd": 1, "distinct": 3, "novel": 3,
         "rare": 3, "returns": 3, "hints": 3, "methods": 3, "js1": 4, "js2": 4, "low": 3,
         "bigram": 3, "rep4": 3}  # digits
BEST = ("post", "judge_ppl", "tv", "js3", "ks", "js2")  # at equal entropy
BEGINS = 0.6  # the temperature of the teacher as which distill.py's student begins
GOALS = {"post": 1, "judge_ppl": -1, "tv": -1, "js3": -1}  # what steps are compared by; 1: more
AXES = {"post": "post-stratified validity", "judge_ppl": "perplexity under the judge, per token",
        "tv": "total variation of the features"}
LINES = [("default", "teacher", 8, "C0", ":"), ("default", "teacher", 32, "C0", "--"),
         ("default", "teacher", 256, "C0", "-"), ("default", "student", 4, "C3", ":"),
         ("default", "student", 8, "C3", "-"), ("sdtt", "student", 8, "C1", "-"),
         ("default", "autoregressive", None, "k", "-")]  # run, model, steps, colour, style


# -------------------------------------------------------------------- comparing the rows of a run
def key(row):
    """What a row is: (model, steps, temperature), with None where it has none."""
    return row["row"], row.get("steps"), row.get("T")


def entropy_and(column, rows):
    """(entropy, `column`) of the rows that have both, a list."""
    pairs = [(row.get("entropy"), row.get(column)) for row in rows]
    return [pair for pair in pairs if None not in pair]


def at_one(rows, name, steps, column, T=1):
    """`column` of a model in so many steps at temperature T; NaN where that was not measured."""
    mine = [row.get(column) for row in rows if key(row) == (name, steps, T)]
    mine = [value for value in mine if value is not None]
    return mine[0] if mine else math.nan


def at_entropy(rows, name, steps, column, entropy):
    """`column` of a model in so many steps at the temperature that gives this unigram entropy.

    Linear between the temperatures measured, NaN outside them.
    """
    mine = [row for row in rows if key(row)[:2] == (name, steps)]
    points = sorted(entropy_and(column, mine))
    if not points:
        return math.nan
    return float(np.interp(entropy, *zip(*points), left=math.nan, right=math.nan))


def at_data(rows, name, steps, column):
    """`at_entropy` of the held-out data."""
    return at_entropy(rows, name, steps, column, of_data(rows))


def untrained(rows, name, steps, column):
    """`at_one`, but of the teacher at BEGINS in the student's place: a control."""
    if name == "student":
        return at_one(rows, "teacher", steps, column, BEGINS)
    return at_one(rows, name, steps, column)


def steps_to_match(rows, column, student_steps=8, value=at_one):
    """Steps that the teacher needs for the student's `column` in so many: what those are worth.

    value(rows, name, steps, column): `at_one`, `at_data` or `untrained`. Linear in log steps. The
    fewest steps measured mean at most those; inf more than the most; NaN unknown.
    """
    sign = GOALS[column]
    goal = sign * value(rows, "student", student_steps, column)
    steps = {row.get("steps") for row in rows if row["row"] == "teacher"}
    steps = sorted(steps - {None})
    values = [sign * value(rows, "teacher", n, column) for n in steps]
    enough = [k for k, value in enumerate(values) if value >= goal]
    if not enough:
        known = len(values) > 0 and not math.isnan(values[-1] + goal)
        return math.inf if known else math.nan
    k = enough[0]
    if k == 0:
        return steps[0]
    share = (goal - values[k - 1]) / (values[k] - values[k - 1])
    return steps[k - 1] * (steps[k] / steps[k - 1]) ** share


# -------------------------------------------------------------------------------- tables over seeds
def over_seeds(seeds):
    """{key: rows}, one row of each seed that has it, of one label's {seed: run}."""
    together = {}
    for run in seeds.values():
        for row in run.get("rows", []):
            together.setdefault(key(row), []).append(row)
    return together


def names_of(results):
    """All that was measured, a set of names."""
    groups = [over_seeds(seeds).values() for seeds in results.values()]
    rows = itertools.chain.from_iterable(itertools.chain.from_iterable(groups))
    return set(itertools.chain.from_iterable(rows))


def of_data(rows):
    """The entropy of held-out data, NaN if it was not measured."""
    found = [row.get("entropy") for row in rows if row["row"] == "held-out data"]
    return found[0] if found and found[0] is not None else math.nan


def is_sweep(seeds):
    """Were all runs of a label made with --sweep?"""
    return all(run["flags"].get("sweep") for run in seeds.values())


def markdown(cells):
    """One line of a table."""
    return printable("| " + " | ".join(map(str, cells)) + " |")


def head(names):
    """The first two lines of a table."""
    return markdown(names) + "\n" + "|---" * len(names) + "|"


def print_means(results):
    """Mean +- standard deviation of each row; of a sweep only those at the usual temperature."""
    groups = {label: over_seeds(seeds) for label, seeds in results.items()}
    measured = names_of(results)
    shown = {name: digits for name, digits in SHOWN.items() if name in measured}
    print(head(["run", "seeds", "row", "steps", "T", *shown]))
    for label, rows in groups.items():
        for (name, steps, T), same in rows.items():
            usual = T in (None, 1) or "penalty" in name or (name, steps) == ("teacher", 8)
            if is_sweep(results[label]) and not usual:
                continue
            values = {name: [row.get(name) for row in same] for name in shown}
            cells = [common.spread(values[name], shown[name]) for name in shown]
            about = ["" if cell is None else cell for cell in (name, steps, T)]
            print(markdown([label, len(same), *about, *cells]))


def print_equal_entropy(swept):
    """All models at the entropy of held-out data."""
    runs = {}  # label: of each seed the rows
    for label, seeds in swept.items():
        runs[label] = [run.get("rows", []) for run in seeds.values()]
    measured = names_of(swept)
    best = [name for name in BEST if name in measured]
    print("\nAt the entropy of held-out data (seeds: those whose temperatures reach it):\n")
    print(head(["run", "seeds", "model", "steps", *best]))
    for label, seeds in runs.items():
        rows = itertools.chain.from_iterable(seeds)
        models = dict.fromkeys(key(row)[:2] for row in rows if row.get("T") not in (None, 1))
        for name, steps in models:
            print(markdown(equal_entropy_cells(label, seeds, name, steps, best)))


def print_worth(results):
    """For how many of the teacher's steps the student's stand, by each measure."""
    print("\nWhat the student's steps are worth in teacher's steps, both at temperature 1 (by "
          "seed; inf: more than were measured),\nor both at the entropy of held-out data; "
          f"untrained: what the teacher's own at temperature {BEGINS} are worth:\n")
    ways = {"": at_one, ", equal entropy": at_data, ", untrained": untrained}
    columns = [f"{name} @{steps}" for steps in (4, 8, 16) for name in GOALS]
    print(head(["run", *columns]))
    for (label, seeds), (way, value) in itertools.product(results.items(), ways.items()):
        cells = []
        for steps, name in itertools.product((4, 8, 16), GOALS):
            needed = [steps_to_match(run.get("rows", []), name, steps, value)
                      for run in seeds.values()]
            cells.append(" ".join(f"{n:.0f}" for n in needed))
        if set(" ".join(cells).split()) != {"nan"}:
            print(markdown([label + way, *cells]))


def equal_entropy_cells(label, seeds, name, steps, best):
    """A line of that table; seeds: of each seed the rows."""
    cells, reached = [], 0
    for column in best:
        values = [at_data(rows, name, steps, column) for rows in seeds]
        reached = max(reached, sum(not math.isnan(value) for value in values))
        cells.append(common.spread(values, SHOWN[column]))
    if steps is None:
        steps = ""
    return [label, f"{reached} of {len(seeds)}", name, steps, *cells]


# ----------------------------------------------------------------------------------------- the plot
def curve(seeds, name, steps, column):
    """Mean entropy and mean `column` over seeds, at each temperature that all have: (T, 2)."""
    points = []
    for (row, n, T), same in over_seeds(seeds).items():
        values = entropy_and(column, same)
        if (row, n) == (name, steps) and len(values) == len(seeds):
            points.append(np.mean(values, 0))
    return np.array(points).reshape(-1, 2)


def plot(swept, path):
    """Quality against entropy: each line one model and number of steps at several temperatures."""
    _, plt = common.pyplot()
    if not swept:
        raise ValueError("--plot: no run in that file was made with --sweep")
    measured = names_of(swept)
    columns = [column for column in AXES if column in measured]
    figure, axes = plt.subplots(1, len(columns), figsize=(5.5 * len(columns), 4.5),
                                layout="constrained", squeeze=False)
    for ax, column in zip(axes[0], columns):
        for label, name, steps, color, style in LINES:
            points = curve(swept.get(label, {}), name, steps, column)
            text = f"{label}: {name}"
            if steps:
                text += f", {steps} steps"
            if len(points):
                ax.plot(*points.T, style, color=color, marker=".", label=text)
        held = curve(swept.get("default", {}), "held-out data", None, column)
        ax.plot(*held.T, "g*", markersize=12, label="held-out data")
        ax.set(xlabel="unigram entropy within a sample, nats", ylabel=AXES[column])
        if column == "judge_ppl":
            ax.set_yscale("log")
        ax.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=8)
    with files.whole_file(path, "wb") as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)
    print(f"wrote {path}")


def parse_flags(argv=None):
    p, add = make_parser("Tables and a plot of evaluation results.")
    add("file", help="results of experiments.evaluate --json, {label: {seed: run}}")
    add("--plot", help="draw quality against entropy, of the labels default and sdtt, as PNG")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    results = common.read_results(args.file, "sweep")
    if args.plot:
        files.check_output(args.plot, args.file)
    print_means(results)
    swept = {label: seeds for label, seeds in results.items() if is_sweep(seeds)}
    print_worth(results)
    if swept:
        print_equal_entropy(swept)
    if args.plot:
        plot(swept, args.plot)


if __name__ == "__main__":
    run_script(main)
