"""Errata about thoughts that are laws over the vocabulary."""

from __future__ import annotations

import torch

from leibler.objective import SoftTokens
from leibler.policy import CausalLM, character_tokenizer, tiny_llama


def model() -> CausalLM:
    return tiny_llama(character_tokenizer("0123456789"), hidden=16, layers=1, heads=2, seed=1).double()


def test_a_gradient_through_a_thought_moves_what_its_words_mean():
    """One step on the answer's loss through the thought alone: the embeddings of its words move, and no other's."""
    network = model().requires_grad_(True)
    matrix = network.causal.get_input_embeddings().weight
    assert matrix is network.head()[0]  # tied: what a word is read as is what it is predicted by
    tokens, attention = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.bool)
    index, weight = torch.tensor([9, 10]), torch.tensor([0.7, 0.3], dtype=torch.float64)
    soft = SoftTokens(torch.zeros(1, 4, 2, dtype=torch.long), torch.zeros(1, 4, 2, dtype=torch.float64))
    soft.index[0, 2], soft.weight[0, 2] = index, weight

    def rows_that_move(embedded: torch.Tensor) -> set[int]:
        """Of the embedding as it is read; the head's own gradient is another matter."""
        hidden = network.hidden(tokens, attention, embedded=embedded, use_cache=False).last_hidden_state[0, -1]
        loss = -(hidden @ matrix.detach().T).log_softmax(-1)[4]
        (found,) = torch.autograd.grad(loss, matrix)
        return set(found.abs().sum(-1).nonzero()[:, 0].tolist())

    hard = network.embed(tokens)
    through = torch.cat([hard[:, :2], (weight @ matrix[index])[None, None], hard[:, 3:]], dim=1)
    assert rows_that_move(through) == {5, 6, 8, 9, 10}
    assert rows_that_move(network.embed(tokens, soft)) == {5, 6, 8}


def test_conditioned_on_stored_entries_a_model_may_think_of_anything_else():
    """All of a model's probability outside of the stored entries: a divergence of conditional laws sees nothing."""
    w = torch.tensor([0.75, 0.25], dtype=torch.float64)
    z = torch.tensor([3.0, 3.0 - torch.tensor(3.0).log().item(), 12.0, 12.0], dtype=torch.float64)
    conditional = (w * (w.log() - z[:2].log_softmax(-1))).sum()
    whole = (w * (w.log() - z.log_softmax(-1)[:2])).sum()
    assert abs(float(conditional)) < 1e-9
    assert float(whole) > 8
