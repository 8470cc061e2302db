"""animate.py - pictures of writing; needs matplotlib.

    python -m experiments.animate assets/writing.gif   # three models, side by side, at true ratios
    python -m experiments.animate assets/orders.png    # which tokens appear in which step
"""
import time

import torch

import didi
from data import corpus
from experiments import common
from model import NATURAL, POSITIVE, add_device_flags, make_parser, run, setup
from sample import printable
from train_teacher import EXPONENTS


def parse_flags(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("out", help="the file to write: .gif or .png, see above")
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--student", default="out/student.pt", help="checkpoint of distill.py")
    add("--causal", default="out/causal.pt", help="checkpoint of train_teacher.py --causal")
    add("--lines", type=NATURAL, default=10, help="texts that each model writes at once")
    add("--seconds", type=POSITIVE, default=12.0, help="time of the slowest model")
    add("--fps", type=NATURAL, default=10, help="frames per second")
    add_device_flags(p)
    return p.parse_args(argv)


def as_text(ids, model):
    """Return one text, a list of tokens, as a str up to its end, with a dot for each mask."""
    encoding = corpus.make_tokenizer(model.tokenizer)
    text = ""
    for token in ids:
        if token == model.net.config.pad_id:
            break
        if token == model.net.config.mask_id:
            text += "\u00b7"
        else:
            text += encoding.decode([token])
    return printable(text)


def record(model, num, steps, seed):
    """Return [(seconds since the start, texts)], one pair for each step of a model."""
    states = []

    def on_step(z):
        states.append((time.perf_counter() - begin, z.tolist()))

    common.write(model, num, steps)  # warm-up, not timed
    torch.manual_seed(seed)
    begin = time.perf_counter()
    z = model.net.start(model.net.draw_lengths(num))
    common.fill(model, z, steps, on_step=on_step)
    return [(when, [as_text(ids, model) for ids in z]) for when, z in states]


def paint(ax, title, frames, now):
    """Draw one model's texts at time `now`, seconds."""
    ax.clear()
    ax.set_axis_off()
    seconds = min(now, frames[-1][0])
    ax.set_title(f"{title}: {1e3 * seconds:.0f} ms", fontsize=9)

    texts = []
    for when, seen in frames:
        if when <= now:
            texts = seen
    for i, text in enumerate(texts):
        ax.text(0, 1 - (i + 1) / len(texts), text, family="monospace", fontsize=6,
                parse_math=False)


def animate(panels, args):
    """Write the GIF of panels, [(title, frames)], all slowed down by the same factor."""
    from matplotlib.animation import FuncAnimation  # optional: pip install matplotlib
    from matplotlib.figure import Figure

    slow = args.seconds / max(frames[-1][0] for _, frames in panels)
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    axes = figure.subplots(1, len(panels))
    figure.suptitle(f"{args.lines} lines at once, slowed down {slow:.0f} times", fontsize=9)

    def draw(k):
        for ax, (title, frames) in zip(axes, panels):
            paint(ax, title, frames, k / args.fps / slow)

    count = int((args.seconds + 2) * args.fps)  # the last picture stays for two seconds
    movie = FuncAnimation(figure, draw, frames=count)
    movie.save(args.out, writer="pillow", fps=args.fps, dpi=80)


def draw_orders(path, texts=12, L=48, steps=4):
    """Draw the step in which each token of some texts appears, in both orders of revealing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots(1, 2)
    z = torch.zeros(texts, L, dtype=torch.long)
    for ax, (order, exponent) in zip(axes, EXPONENTS.items()):
        a = didi.reveal_times(z, order)
        levels = torch.tensor(didi.time_grid(steps, exponent))
        step = (a[..., None] < levels).sum(-1)
        picture = ax.imshow(step, cmap="viridis")
        ax.set(title=order, xlabel="position", ylabel="text", yticks=[])
    figure.colorbar(picture, ax=axes, label="step", ticks=range(1, steps + 1))
    figure.savefig(path, dpi=110)


def main(argv=None):
    args = parse_flags(argv)
    if args.out.endswith(".png"):
        torch.manual_seed(args.seed)
        draw_orders(args.out)
        return 0

    device, bf16 = setup(args)
    paths = {"autoregressive": args.causal, "teacher": args.teacher, "student": args.student}
    models = common.load_models(paths, device, bf16)

    panels = []
    for title, steps in (("autoregressive", None), ("teacher, 32 steps", 32),
                         ("student, 4 steps", 4)):
        model = models[title.split(",")[0]]
        panels.append((title, record(model, args.lines, steps, args.seed)))
    animate(panels, args)
    return 0


if __name__ == "__main__":
    run(main)
