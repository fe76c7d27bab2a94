"""A categorical on seven symbols whose every expectation is a finite sum: the judge of all estimators."""

from __future__ import annotations

import torch
from torch import Tensor


class World:
    """Logits of a model (with gradient), a target and a behaviour; ``law`` gives the one that was sampled from."""

    def __init__(self, seed: int, size: int = 7, spread: float = 1.2) -> None:
        g = torch.Generator().manual_seed(seed)
        self.z, self.y, self.x = (spread * torch.randn(size, generator=g, dtype=torch.float64) for _ in range(3))
        self.z.requires_grad_()

    @property
    def p(self) -> Tensor:
        return self.z.log_softmax(0)

    @property
    def q(self) -> Tensor:
        return self.y.log_softmax(0)

    @property
    def s(self) -> Tensor:
        return self.x.log_softmax(0)

    def law(self, name: str) -> Tensor:
        return {"model": self.p, "target": self.q, "behaviour": self.s}[name].detach().exp()

    def exact(self, divergence) -> Tensor:
        """The divergence by its vocabulary sum."""
        return divergence(self.z[None], self.y[None])[0]

    def gradient(self, scalar: Tensor) -> Tensor:
        if not scalar.requires_grad:
            return torch.zeros_like(self.z)
        return torch.autograd.grad(scalar, self.z, retain_graph=True)[0]


def functional(name: str, w: World) -> Tensor:
    """Each functional named in the table, by its definition; differentiable in the model's logits."""
    p, q, s = w.p, w.q, w.s
    u, log_u = (p - q).exp(), p - q
    model, target, behaviour = p.exp(), q.exp(), s.exp()
    reverse, forward = (model * log_u).sum(), -(target * log_u).sum()
    return {
        "ReverseKL": lambda: reverse,
        "ForwardKL": lambda: forward,
        "nothing": lambda: 0.0 * reverse,
        "ReverseKL - ForwardKL": lambda: reverse - forward,
        "2 TotalVariation": lambda: (model - target).abs().sum(),
        "E_model[(log u)^2]/2": lambda: (model * log_u**2).sum() / 2,
        "E_target[(log u)^2]/2": lambda: (target * log_u**2).sum() / 2,
        "E_behaviour[(log u)^2]/2": lambda: (behaviour * log_u**2).sum() / 2,
        "E_behaviour[log u]": lambda: (behaviour * log_u).sum(),
        "E_behaviour[1/u - 1 + log u]": lambda: (behaviour * (1 / u - 1 + log_u)).sum(),
        "E_model[|log u|]": lambda: (model * log_u.abs()).sum(),
        "E_target[|log u|]": lambda: (target * log_u.abs()).sum(),
        "E_behaviour[|log u|]": lambda: (behaviour * log_u.abs()).sum(),
        "E_target[u (log u)^2/2 - u log u + u - 1]": lambda: (target * (u * log_u**2 / 2 - u * log_u + u - 1)).sum(),
        "E_target[sign(log u) (u log u - u + 1)]": lambda: (target * log_u.sign() * (u * log_u - u + 1)).sum(),
        "E_behaviour[(log u)^3]/6": lambda: (behaviour * log_u**3).sum() / 6,
        "E_behaviour[(log u)^2/2 - log u - 1/u]": lambda: (behaviour * (log_u**2 / 2 - log_u - 1 / u)).sum(),
        "E_behaviour[log u |log u|]/2": lambda: (behaviour * log_u * log_u.abs()).sum() / 2,
    }[name]()


def generated(name: str, divergence, w: World) -> tuple[Tensor, Tensor]:
    """The functionals that a table row names through f (its tangent at 1 subtracted): value and gradient."""
    p, q = w.p, w.q
    law = w.law(name[2 : name.index("[")])
    log_u = p - q
    at_one = divergence.f_prime(torch.zeros((), dtype=torch.float64))
    f = (divergence.f(log_u) - at_one * torch.expm1(log_u)).detach()
    slope = (divergence.f_prime(log_u) - at_one).detach()
    u = log_u.exp().detach()
    score = torch.stack([w.gradient(p[v]) for v in range(len(p))])
    kind = name[name.index("[") :]
    if kind.startswith("[f(u)]"):
        return (law * f).sum(), ((law * u * slope)[:, None] * score).sum(0)
    return (law * f / u).sum(), ((law * slope)[:, None] * score).sum(0)
