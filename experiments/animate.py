"""animate.py - a GIF of three models that write side by side, in real time. Needs matplotlib.

    python -m experiments.animate assets/writing.gif --teacher out/teacher.pt \
        --student out/student.pt --causal out/causal.pt
"""
import itertools
import time

from data import corpus, files
from data.command import SIZE, RATE, add_device_flags, make_parser, printable, run_script, setup
from experiments import common


def parse_flags(argv=None):
    p, add = make_parser("Three models writing side by side, as a GIF.")
    add("out", help="the GIF to write")
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--student", default="out/student.pt", help="checkpoint of distill.py")
    add("--causal", default="out/causal.pt", help="checkpoint of train_teacher.py --causal")
    add("--lines", type=SIZE, default=10, help="texts that each model writes at once")
    add("--seconds", type=RATE, default=12.0, help="that the slowest model takes in the GIF")
    add("--fps", type=SIZE, default=10, help="frames a second")
    add_device_flags(add)
    return p.parse_args(argv)


def as_text(ids, model):
    """The tokens of one text up to its end, masks as dots."""
    encoding, text = corpus.make_tokenizer(model["tokenizer"]), ""
    for i in itertools.takewhile(lambda i: i != model["config"].pad_id, ids):
        piece = "\u00b7"
        if i != model["config"].mask_id:
            piece = encoding.decode([i])
        text += printable(piece)  # matplotlib has no sign for what can't be printed
    return text


def record(model, args, steps, sampler):
    """[(seconds since the beginning, texts)] after each step of one model, and its mean calls."""
    frames = []

    def on_step(z):
        frames.append((time.perf_counter() - begin, z.tolist()))
    common.write(model, args.lines, steps, sampler, seed=args.seed)  # warm-up
    begin = time.perf_counter()
    _, cost = common.write(model, args.lines, steps, sampler, seed=args.seed, on_step=on_step)
    frames = [(when, [as_text(ids, model) for ids in z]) for when, z in frames]
    return frames, cost["nfe"]


def paint(ax, title, frames, nfe, now):
    """One model's texts at the second `now`."""
    ax.clear()
    ax.set_axis_off()
    title = f"{title}: {1e3 * min(now, frames[-1][0]):.0f} ms"
    if now >= frames[-1][0]:
        title += f", {nfe:.0f} network calls"
    ax.set_title(title, fontsize=9)
    texts = []
    for when, seen in frames:
        if when <= now:
            texts = seen
    for i, text in enumerate(texts):
        ax.text(0, 1 - (i + 1) / len(texts), text, family="monospace", fontsize=6,
                parse_math=False)


def animate(panels, args):
    """Write the GIF of panels, [(title, frames, calls)], all slowed down by one factor."""
    matplotlib, plt = common.pyplot()
    slow = args.seconds / max(frames[-1][0] for _, frames, _ in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 2.6), layout="constrained")
    figure.suptitle(f"{args.lines} lines at once, slowed down {slow:.0f} times", fontsize=9)

    def draw(k):
        for ax, (title, frames, nfe) in zip(axes, panels):
            paint(ax, title, frames, nfe, k / args.fps / slow)
    count = int((args.seconds + 2) * args.fps)  # the last picture stays for two seconds
    movie = matplotlib.animation.FuncAnimation(figure, draw, frames=count)
    movie.save(args.out, writer="pillow", fps=args.fps, dpi=80)
    plt.close(figure)


def main(argv=None):
    args = parse_flags(argv)
    files.check_output(args.out, args.teacher, args.student, args.causal)
    common.pyplot()  # or say at once that it is missing
    device, bf16 = setup(args)
    paths = {"teacher": args.teacher, "student": args.student, "autoregressive": args.causal}
    models, panels = common.load_models(paths, device, bf16), []
    for name, steps in (("autoregressive", None), ("teacher", 256), ("student", 8)):
        title, sampler = f"{name}, {steps} steps", "ancestral"
        if steps is None:
            title, sampler = name, "autoregressive"
        panels.append((title, *record(models[name], args, steps, sampler)))
    animate(panels, args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
