"""Rollouts per second: ``leibler.policy.sample`` beside ``transformers.generate``, same model, same prompts, one run.

    python benchmarks/rollouts.py [--threads 2] [--repeats 5]

Both sides sample exactly as many tokens: the end token is switched off, so every row runs to the limit. The two are
timed in turn, and the fastest of the repeats counts. The last two columns are the group case (8 prompts, 8 completions
each), where ``generate`` is given each prompt 8 times, as trainers do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from leibler.policy import CausalLM, character_tokenizer, sample, tiny_llama, uniforms


def fastest(sides: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each side, the best of ``repeats``, interleaved so that a slow moment strikes both."""
    best = [float("inf")] * len(sides)
    for side in sides:
        side()
    for _ in range(repeats):
        for number, side in enumerate(sides):
            start = time.perf_counter()
            side()
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def compare(model: CausalLM, prompts: list[list[int]], group: int, new: int, repeats: int) -> tuple[float, float]:
    """Tokens per second of (generate, sample)."""
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

    seconds = fastest([transformers_side, leibler_side], repeats)
    return rows * new / seconds[0], rows * new / seconds[1]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch 64, tokens per second")
    print(f"{'model':<18}{'case':<22}{'new':>4}{'generate':>11}{'sample':>11}{'ratio':>8}")
    for vocabulary, hidden, layers in ((4096, 64, 2), (4096, 128, 4), (4096, 256, 4), (128, 128, 4)):
        model = never_ending(vocabulary, hidden, layers)
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, 17, (64,), generator=draw).tolist()
        prompts = [torch.randint(4, vocabulary, (length,), generator=draw).tolist() for length in lengths]
        for new in (8, 32):
            for case, given, group in (("64 prompts", prompts, 1), ("8 prompts x 8", prompts[:8], 8)):
                theirs, ours = compare(model, given, group, new, arguments.repeats)
                name = f"h{hidden} L{layers} V{vocabulary}"
                print(f"{name:<18}{case:<22}{new:>4}{theirs:>11,.0f}{ours:>11,.0f}{ours / theirs:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
