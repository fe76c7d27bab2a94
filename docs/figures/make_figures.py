"""The pictures and numbers of docs/choosing.md, computed by the library itself.

    python docs/figures/make_figures.py [FOLDER]

writes one SVG per picture and ``numbers.txt`` into the folder (by default, beside this file). Nothing is sampled:
every mean is a sum over the vocabulary, every fit a search of a grid, so the same numbers come out every time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from leibler.divergence import (
    AdaptiveKL,
    ChiSquared,
    Divergence,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    TotalVariation,
)
from leibler.estimate import K1, K2, K3, ScoreFunction
from leibler.estimate.estimators import Estimator

COLOURS = {
    "ForwardKL": "#0b6e99", "ReverseKL": "#c2410c", "JensenShannon": "#3f7d20", "TotalVariation": "#7a4fb5",
    "Hellinger": "#a16207", "ChiSquared": "#be185d", "Jeffreys": "#475569", "AdaptiveKL": "#0f766e",
}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#64748b", "axes.labelcolor": "#1e293b", "xtick.color": "#475569", "ytick.color": "#475569",
    "axes.grid": True, "grid.color": "#e2e8f0", "legend.frameon": False, "lines.linewidth": 2,
    "svg.hashsalt": "leibler", "figure.constrained_layout.use": True,
}  # fmt: skip
Say = Callable[[str], None]
F64 = torch.float64


def gradients(say: Say) -> Figure:
    """How hard a token is pulled, by how far the model's probability is from the target's."""
    shown: list[Divergence] = [ForwardKL(), ReverseKL(), JensenShannon(), Hellinger()]
    log_u = torch.linspace(-5, 5, 401, dtype=F64)
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.7))
    say("Pull on a token whose probability is u times the target's, in multiples of the target's probability")
    say(f"  {'u':>14} {'1/100':>9} {'1/10':>9} {'10':>9} {'100':>9}")
    for divergence in shown:
        name = type(divergence).__name__
        at_one = divergence.f_prime(torch.zeros(1, dtype=F64))
        pull = log_u.exp() * (divergence.f_prime(log_u) - at_one)
        axes[0].plot(log_u, pull, color=COLOURS[name], label=name)
        axes[1].plot(log_u, divergence.f_prime(log_u) - at_one, color=COLOURS[name], label=name)
        points = torch.tensor([0.01, 0.1, 10.0, 100.0], dtype=F64)
        there = points * (divergence.f_prime(points.log()) - at_one)
        say(f"  {name:>14} " + " ".join(f"{x:>9.3f}" for x in there.tolist()))
    axes[0].set(ylim=(-1.6, 4), title="per unit of the target's probability", ylabel="pull down on the logit")
    axes[1].set(ylim=(-4, 4), title="per unit of the model's probability")
    for axis in axes:
        axis.axhline(0, color="#94a3b8", lw=1)
        axis.set(xlabel="log u = log(model / target)   (nats)")
    axes[0].legend(loc="upper left")
    return figure


def bimodal(say: Say) -> Figure:
    """A target with two modes, and the best Gaussian under each divergence, found on a grid."""
    x = torch.linspace(-6, 6, 121, dtype=F64)
    target = 0.65 * torch.softmax(-((x + 2) ** 2) / (2 * 0.6**2), 0) + 0.35 * torch.softmax(-((x - 2.5) ** 2) / 0.98, 0)
    target = 0.998 * target + 0.002 / len(x)
    means, widths = torch.linspace(-4, 4, 81, dtype=F64), torch.linspace(0.3, 4, 75, dtype=F64)
    m, s = (g.reshape(-1, 1) for g in torch.meshgrid(means, widths, indexing="ij"))
    students = -((x - m) ** 2) / (2 * s**2)
    gap = (x > -0.5) & (x < 1.0)
    say("Best single Gaussian for a target with modes at -2 (mass 0.65) and 2.5 (mass 0.35)")
    say(f"  {'':>14} {'mean':>7} {'width':>7} {'in the gap':>11} {'left mode':>10} {'value':>8}")
    shown = [ForwardKL(), ReverseKL(), JensenShannon(), TotalVariation(), ChiSquared(), AdaptiveKL()]
    figure, axes = plt.subplots(2, 3, figsize=(9.2, 4.8), sharex=True, sharey=True)
    for axis, divergence in zip(axes.flat, shown, strict=True):
        name = type(divergence).__name__
        values = divergence(students, target.log())
        best = int(values.argmin())
        p = students[best].softmax(0)
        axis.fill_between(x, target, color="#cbd5e1", lw=0, label="target")
        axis.plot(x, p, color=COLOURS[name])
        axis.set_title(name)
        numbers = (float(m[best]), float(s[best]), float(p[gap].sum()), float(p[x < -0.5].sum()), float(values[best]))
        say(f"  {name:>14} " + "{:>7.2f} {:>7.2f} {:>11.3f} {:>10.3f} {:>8.3f}".format(*numbers))
    say(f"  {'(target)':>14} {'':>7} {'':>7} {float(target[gap].sum()):>11.3f} {float(target[x < -0.5].sum()):>10.3f}")
    axes[0, 0].set(ylim=(0, 0.085), yticks=[0, 0.04, 0.08])
    for axis in axes[:, 0]:
        axis.set_ylabel("probability")
    return figure


def drift(distance: Tensor, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """A target, a direction, and the logits of models that lie ``distance`` away from it: ``[steps, vocab]``."""
    generator = torch.Generator().manual_seed(0)
    target = (1.5 * torch.randn(vocab, generator=generator, dtype=F64)).log_softmax(0)
    direction = torch.randn(vocab, generator=generator, dtype=F64)
    return target, direction, target + distance[:, None] * direction


def mean_slope(estimator: Estimator, distance: Tensor) -> Tensor:
    """The mean, over the model's own samples, of the derivative of the estimator's loss along the path."""
    target, direction, logits = drift(distance)
    logits = logits.requires_grad_()
    logp = logits.log_softmax(-1)
    losses = estimator.loss(ReverseKL(), logp, target.expand_as(logp), "model")
    (gradient,) = torch.autograd.grad((logp.exp().detach() * losses).sum(), logits)
    return gradient @ direction


def exact_slope(divergence: Divergence, distance: Tensor) -> Tensor:
    target, direction, logits = drift(distance)
    logits = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(logits, target.expand_as(logits)).sum(), logits)
    return gradient @ direction


def value_and_gradient(say: Say) -> Figure:
    """What k1, k2 and k3 average to, and what their gradients average to."""
    t = torch.linspace(0, 1.5, 61, dtype=F64)
    target, _, logits = drift(t)
    logp = logits.log_softmax(-1)
    named: dict[str, Estimator] = {"k1": K1(), "k2": K2(), "k3": K3()}
    colours = {"k1": "#7a4fb5", "k2": "#c2410c", "k3": "#0b6e99"}
    dashes = {"k1": "-", "k2": (0, (6, 3)), "k3": (0, (2, 2))}
    exact = {"ReverseKL": ReverseKL(), "ForwardKL": ForwardKL()}
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.8))
    say("At the far end of the path: mean value, and mean derivative along the path, of each estimator's loss")
    say(f"  {'':>12} {'value':>8} {'derivative':>11}")
    for name, divergence in exact.items():
        value, slope = divergence(logits, target.expand_as(logits)), exact_slope(divergence, t)
        axes[0].plot(t, value, color="#cbd5e1", lw=7)
        axes[1].plot(t, slope, color="#cbd5e1", lw=7)
        for axis, curve in ((axes[0], value), (axes[1], slope)):
            end = (float(t[-1]), float(curve[-1]))
            axis.annotate(name, end, xytext=(6, -3), textcoords="offset points", color="#64748b")
        say(f"  {name:>12} {float(value[-1]):>8.4f} {float(slope[-1]):>11.4f}   (exact)")
    for name, estimator in named.items():
        value = (logp.exp() * estimator.loss(ReverseKL(), logp, target.expand_as(logp), "model")).sum(-1)
        slope = mean_slope(estimator, t)
        axes[0].plot(t, value, color=colours[name], ls=dashes[name], label=name)
        axes[1].plot(t, slope, color=colours[name], ls=dashes[name], label=name)
        say(f"  {name:>12} {float(value[-1]):>8.4f} {round(float(slope[-1]), 4) + 0.0:>11.4f}")  # no -0.0000
    axes[0].set(title="what the numbers average to", ylabel="nats")
    axes[1].set(title="what the gradient descends", ylabel="derivative along the path")
    for axis in axes:
        axis.set(xlabel="distance of the model from the target", xlim=(0, 1.85))
    axes[0].legend(loc="upper left")
    return figure


def spread(say: Say) -> Figure:
    """Standard deviations of single samples: of the value, and of the gradient."""
    t = torch.logspace(-2, 0.4, 61, dtype=F64)
    target, _, logits = drift(t)
    logp = logits.log_softmax(-1)
    p, q = logp.exp(), target.expand_as(logp)
    kl = ReverseKL()(logits, q)
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.8))
    values: dict[str, tuple[Estimator, str]] = {
        "k1": (K1(), "#7a4fb5"), "k2 (biased)": (K2(), "#c2410c"), "k3": (K3(), "#0b6e99"),
    }  # fmt: skip
    at = [int((kl - level).abs().argmin()) for level in (0.001, 0.01, 0.1, 1.0)]
    say("Standard deviation of one sample, as a multiple of the KL itself")
    say(f"  {'KL (nats)':>28} " + " ".join(f"{float(kl[i]):>9.4f}" for i in at))
    for name, (estimator, colour) in values.items():
        one = estimator.value(ReverseKL(), logp, q, "model")
        mean = (p * one).sum(-1)
        deviation = ((p * one.square()).sum(-1) - mean.square()).clamp_min(0).sqrt() / kl
        axes[0].loglog(kl, deviation, color=colour, label=name)
        say(f"  {name:>28} " + " ".join(f"{float(deviation[i]):>9.2f}" for i in at))
    coefficient: dict[str, tuple[Estimator, str]] = {
        "K2 / ScoreFunction": (ScoreFunction(), "#c2410c"),
        "K1(weight='differentiable')": (K1(weight="differentiable"), "#7a4fb5"),
        "K3(weight='differentiable')": (K3(weight="differentiable"), "#0b6e99"),
    }
    say("Noise of one sample's gradient, as a multiple of the gradient's length")
    for name, (estimator, colour) in coefficient.items():
        leaf = logp.detach().requires_grad_()
        (c,) = torch.autograd.grad(estimator.loss(ReverseKL(), leaf, q, "model").sum(), leaf)
        # grad of one sample is c (onehot - p): its mean is p (c - E c), its second moment E c^2 |onehot - p|^2.
        mean = p * (c - (p * c).sum(-1, keepdim=True))
        length = mean.square().sum(-1).sqrt()
        second = (p * c.square() * (1 - 2 * p + p.square().sum(-1, keepdim=True))).sum(-1)
        noise = (second - length.square()).clamp_min(0).sqrt() / length
        axes[1].loglog(kl, noise, color=colour, label=name)
        say(f"  {name:>28} " + " ".join(f"{float(noise[i]):>9.2f}" for i in at))
    axes[0].set(title="value: deviation / KL", xlabel="KL (nats)")
    axes[1].set(title="gradient: noise / length", xlabel="KL (nats)")
    for axis in axes:
        axis.legend()
    return figure


def skew(say: Say) -> Figure:
    """Skewed and mixed divergences stop growing, and with them the pull, when the model is far away."""
    gap = torch.linspace(0, 14, 141, dtype=F64)
    target = torch.tensor([8.0, 0.0, 0.0, 0.0], dtype=F64)
    logits = torch.stack([-gap, gap * 0, gap * 0, gap * 0], -1)
    shown: dict[str, tuple[Divergence, str]] = {
        "ForwardKL": (ForwardKL(), COLOURS["ForwardKL"]),
        "SkewForwardKL(0.01)": (SkewForwardKL(0.01), "#be185d"),
        "SkewForwardKL(0.1)": (SkewForwardKL(0.1), "#a16207"),
        "JensenShannon(0.5)": (JensenShannon(0.5), COLOURS["JensenShannon"]),
        "Jeffreys": (Jeffreys(), COLOURS["Jeffreys"]),
        "TotalVariation": (TotalVariation(), COLOURS["TotalVariation"]),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.8))
    picks = [0, 40, 80, 120]
    say("The target is sure of a token; the model's logit of it lies below the others by")
    say(f"  {'':>20} " + " ".join(f"{float(gap[i]):>9.0f}" for i in picks))
    for name, (divergence, colour) in shown.items():
        leaf = logits.clone().requires_grad_()
        value = divergence(leaf, target.expand_as(leaf))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        pull = -gradient[:, 0]
        axes[0].plot(gap, value.detach(), color=colour, label=name)
        axes[1].semilogy(gap, pull, color=colour, label=name)
        say(f"  {name:>20} " + " ".join(f"{float(pull[i]):>9.1e}" for i in picks))
    axes[0].set(title="value (nats)", ylim=(0, 12))
    axes[1].set(title="pull on the missing token", ylim=(1e-7, 30))
    for axis in axes:
        axis.set(xlabel="how far the model's logit lies below the others")
    axes[0].legend(loc="upper left", fontsize=9)
    return figure


FIGURES = {
    "gradients": gradients,
    "bimodal": bimodal,
    "value-and-gradient": value_and_gradient,
    "spread": spread,
    "skew": skew,
}


def main(folder: Path) -> list[str]:
    """Write the pictures and their numbers into a folder; returns the lines of ``numbers.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            lines.append(f"--8<-- [start:{name}]")
            figure = draw(lines.append)
            lines.append(f"--8<-- [end:{name}]")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
    (folder / "numbers.txt").write_text("\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    print("\n".join(line for line in main(where) if "--8<--" not in line))
