"""Rollouts per second: ``leibler.policy.sample`` beside ``transformers.generate``, same model, same prompts, one run.

    python benchmarks/rollouts.py [--threads 1] [--repeats 5] [--wall]

Both sides sample exactly as many tokens: the end token is switched off, so every row runs to the limit. The sides are
timed in turn, and the fastest of the repeats counts. In the group case (8 prompts, 8 completions each) ``generate`` is
given each prompt 8 times, as trainers do.

``limit`` is the rate if there were nothing but the matrix products with the weights that no sampler avoids: every
different prompt token and every new token but the last once through the layers, but in the last layer only keys and
values of the prompt tokens before the last; every row through the head, each prompt's first once for all its
completions. What lies above ``limit / generate`` no implementation of this model reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import _clock as shared
from leibler.policy import CausalLM, character_tokenizer, sample, tiny_llama, uniforms

Products = list[tuple[torch.Tensor, int]]
"""Weights, each with the number of tokens that it is multiplied with."""


def reading(model: CausalLM, tokens: int, answered: int) -> Products:
    """Products of the layers for ``tokens``, of which only ``answered`` are carried beyond the last layer's keys."""
    base: Any = model.causal.base_model
    last = f"layers.{len(base.layers) - 1}."
    return [
        (m.weight, answered if name.startswith(last) and not name.endswith(("k_proj", "v_proj")) else tokens)
        for name, m in base.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]


def sampling(model: CausalLM, prompts: list[list[int]], rows: int, new: int) -> Products:
    """Products of a draw; the prompts are read once for all their completions."""
    head = model.head()[0]
    first = [*reading(model, sum(map(len, prompts)), len(prompts)), (head, len(prompts))]
    return first + [*reading(model, rows, rows), (head, rows)] * (new - 1)


def alone(products: Products) -> Callable[[], None]:
    """The products and nothing else, on numbers of no meaning."""
    sizes = {(tokens, weight.shape[1]) for weight, tokens in products}
    inputs = {size: torch.randn(size) for size in sorted(sizes)}

    def run() -> None:
        with torch.inference_mode():
            for weight, tokens in products:
                torch.nn.functional.linear(inputs[tokens, weight.shape[1]], weight)

    return run


def compare(
    model: CausalLM, prompts: list[list[int]], group: int, new: int, repeats: int, clock: Callable[[], float]
) -> list[float]:
    """Tokens per second of (generate, sample, products alone)."""
    rows = len(prompts) * group
    longest = max(map(len, prompts))
    repeated = [prompt for prompt in prompts for _ in range(group)]
    tokens = torch.tensor([[model.pad_id] * (longest - len(prompt)) + prompt for prompt in repeated])
    attention = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in repeated])
    numbers = uniforms(0, "benchmark", 0, rows=rows, n=new)

    def transformers_side() -> object:
        with torch.inference_mode():
            return model.causal.generate(
                input_ids=tokens, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=model.pad_id,
            )  # fmt: skip

    def leibler_side() -> object:
        return sample(model, prompts, uniforms=numbers, group_size=group)

    sides = [transformers_side, leibler_side, alone(sampling(model, prompts, rows, new))]
    return [rows * new / seconds for seconds in shared.fastest(sides, repeats, clock)]


def never_ending(vocabulary: int, hidden: int, layers: int) -> CausalLM:
    tokenizer = character_tokenizer("".join(chr(0x4E00 + number) for number in range(vocabulary - 4)))
    model = tiny_llama(tokenizer, hidden=hidden, layers=layers, heads=4)
    head = torch.nn.Linear(hidden, vocabulary)
    with torch.no_grad():
        head.weight.copy_(model.head()[0])
        head.bias.zero_()
        head.bias[list(model.stop_ids)] = -1e9  # neither side may stop early
    model.causal.set_output_embeddings(head)
    return model


def main() -> None:
    arguments = shared.options(__doc__, repeats=5).parse_args()
    clock = shared.started(arguments)
    print("batch 64, new tokens per second")
    print(f"{'model':<18}{'case':<16}{'new':>4}{'generate':>11}{'sample':>11}{'ratio':>8}{'limit':>11}{'ratio':>8}")
    for vocabulary, hidden, layers in ((4096, 64, 2), (4096, 128, 4), (4096, 256, 4), (128, 128, 4)):
        model = never_ending(vocabulary, hidden, layers)
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, 17, (64,), generator=draw).tolist()
        prompts = [torch.randint(4, vocabulary, (length,), generator=draw).tolist() for length in lengths]
        for new in (8, 32):
            for case, given, group in (("64 prompts", prompts, 1), ("8 prompts x 8", prompts[:8], 8)):
                theirs, ours, limit = compare(model, given, group, new, arguments.repeats, clock)
                name = f"h{hidden} L{layers} V{vocabulary}"
                print(
                    f"{name:<18}{case:<16}{new:>4}{theirs:>11,.0f}{ours:>11,.0f}{ours / theirs:>8.2f}"
                    f"{limit:>11,.0f}{limit / theirs:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
