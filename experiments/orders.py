"""orders.py - a picture of which tokens appear in which step, in both orders of revealing.

    python -m experiments.orders assets/orders.png         # needs matplotlib
"""
import torch

import didi
from model import make_parser, run


def draw_orders(path, texts=12, L=48, steps=4):
    """Draw the step in which each token of some texts appears, to a file."""
    from matplotlib.figure import Figure  # optional: pip install matplotlib

    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots(1, 2)
    z = torch.zeros(texts, L, dtype=torch.long)
    for ax, order, exponent in zip(axes, ("interlaced", "random"), (1.5, 1)):
        a = didi.reveal_times(z, order)
        levels = torch.tensor(didi.time_grid(steps, exponent))
        step = (a[..., None] < levels).sum(-1)
        picture = ax.imshow(step, cmap="viridis")
        ax.set(title=f"{order}, exponent {exponent}", xlabel="position", ylabel="text", yticks=[])
    figure.colorbar(picture, ax=axes, label="step", ticks=range(1, steps + 1))
    figure.savefig(path, dpi=110)


def main(argv=None):
    p = make_parser(__doc__)
    p.add_argument("out", help="the PNG to write")
    args = p.parse_args(argv)
    torch.manual_seed(0)
    draw_orders(args.out)
    return 0


if __name__ == "__main__":
    run(main)
