"""The probability simplex: where every expectation is a sum and every optimum has a closed form.

A *tabular policy* is a table of logits, one row per context. Over it every action (or every short sequence) can be
listed, so an expectation is a weighted sum, a gradient has no noise, and the optimum that a method claims can be
compared with the one that mathematics gives. Claims and tests judge recipes with the functions here. Everything is
computed in the dtype of its inputs; use float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence import Divergence
from leibler.objective import LogProb, Need, Objective, Rows, Target, Term, TokenDivergence, TokenEntropy, View
from leibler.objective.rows import SAMPLE

# ---- optima in closed form -----------------------------------------------------------------------------------------


def tilt(
    log_ref: Float[Tensor, "*contexts actions"], reward: Float[Tensor, "*contexts actions"], beta: float
) -> Float[Tensor, "*contexts actions"]:
    """Log-probabilities of ``argmax_p E_p[reward] - beta KL(p || ref)``: ``ref exp(reward / beta)``, normalised.

    Examples:
        >>> import math
        >>> even = torch.zeros(2, dtype=torch.float64).log_softmax(-1)
        >>> p = tilt(even, torch.tensor([0.0, 1.0]), beta=0.5).exp()
        >>> round(float(p[1] / p[0]), 4) == round(math.exp(2.0), 4)
        True
    """
    return (log_ref + reward / beta).log_softmax(dim=-1)


def f_optimum(
    log_ref: Float[Tensor, "*contexts actions"],
    reward: Float[Tensor, "*contexts actions"],
    beta: float,
    divergence: Divergence,
) -> Float[Tensor, "*contexts actions"]:
    """Log-probabilities of ``argmax_p E_p[reward] - beta D_f(p || ref)`` for an f-divergence.

    Where mass remains, ``u = p / ref`` solves ``beta f'(u) = reward - multiplier``; ``f'`` increases, so ``u`` is found
    by bisection in log space, and so is the multiplier that makes the masses sum to 1. Where ``f'(0+)`` is finite, an
    action whose reward is too low gets no mass (-inf).
    """
    low_u, high_u = log_ref.new_full(log_ref.shape, -80.0), log_ref.new_full(log_ref.shape, 80.0)
    at_one = beta * divergence.f_prime(log_ref.new_zeros(()))
    # All ratios are at most 1 above the upper end, at least 1 below the lower one; between them masses sum to 1.
    low, high = reward.amin(-1, keepdim=True) - at_one, reward.amax(-1, keepdim=True) - at_one

    def log_ratio(multiplier: Tensor) -> Tensor:
        wanted = (reward - multiplier) / beta
        below, above = low_u.clone(), high_u.clone()
        for _ in range(100):
            middle = (below + above) / 2
            too_small = divergence.f_prime(middle) < wanted
            below, above = torch.where(too_small, middle, below), torch.where(too_small, above, middle)
        ratio = (below + above) / 2
        return torch.where(divergence.f_prime(low_u) >= wanted, ratio.new_full((), -torch.inf), ratio)

    for _ in range(100):
        middle = (low + high) / 2
        too_much = (log_ref + log_ratio(middle)).logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return log_ref + log_ratio((low + high) / 2)


def minimise(
    loss: Callable[[Tensor], Tensor],
    logits: Float[Tensor, "*shape"],
    *,
    tolerance: float = 1e-9,
    iterations: int = 2000,
) -> Float[Tensor, "*shape"]:
    """The logits at which a smooth loss is least, from a start, by L-BFGS with a line search in float64.

    Args:
        loss: logits to one number.
        logits: where to start (not changed).
        tolerance: the largest gradient entry at which to stop.
        iterations: at most so many.

    Examples:
        >>> target = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        >>> found = minimise(lambda z: -(target * z.log_softmax(-1)).sum(), torch.zeros(3))
        >>> torch.allclose(found.softmax(-1), target)
        True
    """
    x = logits.detach().to(torch.float64).clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [x], max_iter=iterations, tolerance_grad=tolerance, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimiser.step(closure)
    return x.detach()


# ---- listing everything --------------------------------------------------------------------------------------------


def enumerate_sequences(
    vocab: int, length: int, eos: int | None = None
) -> tuple[Int[Tensor, "sequences time"], Bool[Tensor, "sequences time"]]:
    """Every sequence of a vocabulary, and which of its positions count.

    Args:
        vocab: number of symbols.
        length: positions of the longest.
        eos: the symbol that ends a sequence; None: all have the full length.

    Returns:
        ``[sequences time]`` symbols (0 after the end), and true at the symbols up to and with the end.

    Examples:
        >>> symbols, mask = enumerate_sequences(2, 2, eos=0)
        >>> [row[keep].tolist() for row, keep in zip(symbols, mask)]
        [[0], [1, 0], [1, 1]]
    """
    found: dict[tuple[int, ...], None] = {}
    for sequence in itertools.product(range(vocab), repeat=length):
        end = sequence.index(eos) + 1 if eos is not None and eos in sequence else length
        found[sequence[:end]] = None
    mask = torch.tensor([[t < len(s) for t in range(length)] for s in found])
    return torch.tensor([[*s, *[0] * (length - len(s))] for s in found]), mask


def contexts(sequences: Int[Tensor, "sequences time"], vocab: int) -> Int[Tensor, "sequences time"]:
    """The row of a table of ``prefixes`` logits that predicts each position: prefixes in order of length, then symbols.

    Examples:
        >>> contexts(torch.tensor([[1, 0, 1]]), vocab=2).tolist()
        [[0, 2, 5]]
    """
    index = torch.zeros_like(sequences)
    for t in range(1, sequences.shape[1]):
        # The children of prefix i are i * vocab + 1, ..., i * vocab + vocab: numbers without gaps, level by level.
        index[:, t] = index[:, t - 1] * vocab + 1 + sequences[:, t - 1]
    return index


def prefixes(vocab: int, length: int) -> int:
    """How many contexts an autoregressive table needs: ``1 + vocab + ... + vocab ** (length - 1)``.

    Examples:
        >>> prefixes(vocab=3, length=3)
        13
    """
    return sum(vocab**t for t in range(length))


def sequence_logprobs(
    logits: Float[Tensor, "prefixes vocab"],
    sequences: Int[Tensor, "sequences time"],
    mask: Bool[Tensor, "sequences time"] | None = None,
) -> Float[Tensor, "sequences time"]:
    """Log-probability of each symbol of each sequence under a table of logits (0 where the mask is false)."""
    table = logits.log_softmax(dim=-1)
    logp = table[contexts(sequences, logits.shape[-1]), sequences]
    return logp if mask is None else logp.masked_fill(~mask, 0.0)


# ---- objectives on tables ------------------------------------------------------------------------------------------


def tabular_view(
    tables: Mapping[str, Float[Tensor, "contexts vocab"]],
    needs: Iterable[Need],
    context: Int[Tensor, "rows time"],
    token: Int[Tensor, "rows time"],
    mask: Bool[Tensor, "rows time"] | None = None,
    *,
    group: Int[Tensor, " rows"] | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> View:
    """What the terms of an objective see, computed from tables of logits in place of models.

    Args:
        tables: logits by model name (``policy``, ``old``, ``teacher``, ...).
        needs: what to compute, as the terms and signals list it.
        context, token, mask: for each row and position, the table's row, the symbol, and whether it counts.
        group: rows that belong together (by default, those with the same first context).
        columns: numbers per row or per position, such as ``reward``.
    """
    mask = torch.ones_like(token, dtype=torch.bool) if mask is None else mask
    rows = Rows(
        tokens=torch.cat([context[:, :1], token], dim=1),
        attention=torch.cat([mask[:, :1], mask], dim=1),
        mask=mask,
        group=context[:, 0] if group is None else group,
        role=torch.full_like(context[:, 0], SAMPLE),
        columns=columns or {},
    )
    at, label = context[mask], token[mask]
    return View(rows, {need: _need(need, tables, at, label) for need in dict.fromkeys(needs)})


def _need(need: Need, tables: Mapping[str, Tensor], at: Tensor, label: Tensor) -> Tensor:
    if isinstance(need, LogProb):
        return tables[need.of.name].log_softmax(dim=-1)[at, label]
    if isinstance(need, TokenEntropy):
        logp = tables["policy"].log_softmax(dim=-1)
        return -(logp.exp() * logp).sum(dim=-1)[at]
    if isinstance(need, TokenDivergence):
        return need.divergence(tables["policy"], target_table(need.to, tables))[at]  # type: ignore[operator]
    raise TypeError(f"{need} has no meaning on a table")


def target_table(target: Target, tables: Mapping[str, Tensor]) -> Float[Tensor, "contexts vocab"]:
    """The (unnormalised) natural log-scores of a target expression, from tables of logits."""
    leaves = tuple(tables[handle.name].log_softmax(dim=-1) for handle in target.handles)
    if target.combine is None:
        return leaves[0]
    base2 = 1.0 / torch.tensor(2.0, dtype=leaves[0].dtype).log()
    return target.combine(tuple(leaf * base2 for leaf in leaves)) / base2


def all_needs(objective: Objective | Term) -> tuple[Need, ...]:
    """The needs of an objective's terms and of every signal inside them."""
    objective = Objective(objective) if isinstance(objective, Term) else objective
    own = [need for term in objective.terms for need in term.needs()]
    return tuple(dict.fromkeys([*own, *(need for signal, _ in objective.walk() for need in signal.needs())]))


def expected_loss(
    objective: Objective | Term, view: View, probability: Float[Tensor, " rows"], starts: int = 1
) -> Float[Tensor, ""]:
    """The exact expectation of an objective over listed rows: each row counts with its probability, not once.

    For objectives of terms per event. Constant coefficients only; the probabilities carry no gradient, as samples
    carry none.

    Args:
        objective: one term, or a sum of them.
        view: every row that can occur, from `tabular_view`.
        probability: of each row; sums to 1 within each start context.
        starts: how many start contexts there are (the expectation is their mean).
    """
    objective = Objective(objective) if isinstance(objective, Term) else objective
    total = probability.new_zeros(())
    for term in objective.terms:
        value, weight = term.loss(view)
        coefficient = term.coefficient if isinstance(term.coefficient, (int, float)) else view.signal(term.coefficient)
        per_row = view.sum_rows(value * weight.to(value.dtype))
        total = total + coefficient * (probability.detach() * per_row).sum() / starts
    return total
