"""The commands that stand in groups: measure, select and represent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leibler.cli.registering import command

measure = typer.Typer(
    name="measure",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure models.",
    epilog="\b\nExample:\n  leibler measure divergence --model runs/kd/final --target models/large --data test.jsonl",
)

_Limit = Annotated[int | None, typer.Option(help="Read at most so many records.")]
_Json = Annotated[bool, typer.Option("--json", help="An object, for programs.")]


@command(
    measure,
    "divergence",
    "leibler measure divergence --model runs/kd/final --target models/large --data test.jsonl --divergence renyi",
    runs_models=True,
)
def measure_divergence(
    model: Annotated[str, typer.Option(help="The model: a directory or a hub id.")],
    target: Annotated[str, typer.Option(help="What it is compared with; of the same tokenizer.")],
    data: Annotated[str, typer.Option(help="Records with completions: a file, task:NAME or corpus:stdlib.")],
    divergence: Annotated[
        list[str] | None, typer.Option(help="A name, or a part such as 'Renyi(alpha=0.5)'; may be repeated.")
    ] = None,
    limit: _Limit = None,
    batch_size: Annotated[int, typer.Option(help="Completions read at a time; changes no number.")] = 16,
    json: _Json = False,
) -> None:
    """How far a model is from a target, per token of held-out completions.

    By default forward and reverse KL (nats), with perplexity, entropy and calibration of both.
    """
    from leibler.cli.measure import divergence_command

    divergence_command(model, target, data, divergence or [], limit, batch_size, json)


@command(
    measure,
    "accuracy",
    "leibler measure accuracy --model runs/grpo/final --data task:addition:digits=2 --limit 200",
    runs_models=True,
)
def measure_accuracy(
    model: Annotated[str, typer.Option(help="The model: a directory or a hub id.")],
    data: Annotated[str, typer.Option(help="Questions with answers: a file with the column answer, or task:NAME.")],
    samples: Annotated[int, typer.Option(help="Sampled answers to each question; 0: only the greedy one.")] = 8,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    commit: Annotated[int, typer.Option(help="Tokens that a masked language model reveals in a forward pass.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    limit: _Limit = None,
    json: _Json = False,
) -> None:
    """How often a model's answers are right.

    Greedy accuracy, pass@k of sampled answers, their entropy, diversity and length; of a masked language model, with
    --samples 0, the accuracy of the answers that it is surest of.
    """
    from leibler.cli.measure import accuracy_command

    accuracy_command(model, data, samples, temperature, max_new_tokens, commit, seed, limit, json)


@command(
    measure,
    "success",
    "leibler measure success --model runs/tcod/final --data env:textworld:rooms=6,part=heldout,n=100",
    runs_models=True,
)
def measure_success(
    model: Annotated[str, typer.Option(help="The player: a directory or a hub id.")],
    data: Annotated[str, typer.Option(help="Tasks: env:NAME, or a file with the columns environment and task.")],
    samples: Annotated[int, typer.Option(help="Sampled episodes of each task; 0: only the greedy one.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest action.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    limit: _Limit = None,
    json: _Json = False,
) -> None:
    """How many tasks of a multi-turn environment a model solves.

    Greedy success, turns, and pass@k of sampled episodes.
    """
    from leibler.cli.measure import success_command

    success_command(model, data, samples, temperature, max_new_tokens, seed, limit, json)


@command(
    measure,
    "memorisation",
    "leibler measure memorisation --student runs/kd/final --teacher models/large --baseline runs/sft/final "
    "--data train.jsonl",
    runs_models=True,
)
def measure_memorisation(
    student: Annotated[str, typer.Option(help="The distilled model: a directory or a hub id.")],
    teacher: Annotated[str, typer.Option(help="What it was distilled from.")],
    baseline: Annotated[str, typer.Option(help="A model of the student's size, trained on the texts themselves.")],
    data: Annotated[str, typer.Option(help="The texts that were trained on.")],
    prefix: Annotated[int, typer.Option(help="Tokens that are shown.")] = 50,
    suffix: Annotated[int, typer.Option(help="Tokens that must be recited.")] = 50,
    limit: _Limit = None,
    json: _Json = False,
) -> None:
    """What a distilled model recites of its training texts, and from whom it has it.

    Also how well compression, likelihoods and the KL of teacher and baseline foretell it (area under the ROC curve).
    """
    from leibler.cli.measure import memorisation_command

    memorisation_command(student, teacher, baseline, data, prefix, suffix, limit, json)


@command(
    measure,
    "agreement",
    "leibler measure agreement --student runs/kd/final --base models/small --teacher models/large "
    "--data task:addition:digits=2,n=200",
    runs_models=True,
)
def measure_agreement(
    student: Annotated[str, typer.Option(help="The distilled model: a directory or a hub id.")],
    base: Annotated[str, typer.Option(help="The same model before, or trained without a teacher.")],
    teacher: Annotated[str, typer.Option(help="What it was distilled from.")],
    data: Annotated[str, typer.Option(help="Questions whose answers can be checked: a file or task:NAME.")],
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    limit: _Limit = None,
    json: _Json = False,
) -> None:
    """What a distilled model gained, how often it agrees with its teacher, and which errors it took over."""
    from leibler.cli.measure import agreement_command

    agreement_command(student, base, teacher, data, max_new_tokens, limit, json)


selection = typer.Typer(
    name="select",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Choose the data to learn from. Writes the kept records, and why each record was kept or left out.",
    epilog="\b\nExample:\n  leibler select difference --data corpus:stdlib --teacher models/large "
    "--reference models/tiny --share 0.5 --out kept.jsonl",
)

_Data = Annotated[str, typer.Option(help="A file, task:NAME or corpus:stdlib.")]
_Out = Annotated[Path, typer.Option(help="The file of the kept records; NAME.reasons.jsonl is written beside it.")]


@command(
    selection,
    "difference",
    "leibler select difference --data corpus:stdlib --teacher models/large --reference models/tiny --out kept.jsonl",
    runs_models=True,
)
def select_difference(
    data: _Data,
    teacher: Annotated[str, typer.Option(help="The model to learn from: a directory or a hub id.")],
    reference: Annotated[str, typer.Option(help="A small model that has not seen these texts.")],
    out: _Out,
    share: Annotated[float, typer.Option(help="Of the texts to keep.")] = 0.5,
    limit: _Limit = None,
) -> None:
    """Keep the texts that the teacher reads best, compared with a small model (MiniPLM)."""
    from leibler.cli.select import difference_command

    difference_command(data, teacher, reference, share, out, limit)


@command(
    selection,
    "confident",
    "leibler select confident --data labelled.jsonl --teacher models/large --student models/small --out kept.jsonl",
    runs_models=True,
)
def select_confident(
    data: _Data,
    teacher: Annotated[str, typer.Option(help="The model that labelled the data (column completion).")],
    student: Annotated[str, typer.Option(help="The model that is to learn.")],
    out: _Out,
    limit: _Limit = None,
) -> None:
    """Keep what the teacher is sure of and the student is not (LLKD)."""
    from leibler.cli.select import confident_command

    confident_command(data, teacher, student, out, limit)


@command(
    selection,
    "pass-rate",
    "leibler select pass-rate --data task:addition:digits=2 --model models/small --samples 8 --out rated.jsonl\n"
    "leibler train paced student=models/small teacher=models/large data=rated.jsonl out=runs/paced",
    runs_models=True,
)
def select_pass_rate(
    data: _Data,
    model: Annotated[str, typer.Option(help="The model whose answers are checked.")],
    out: _Out,
    samples: Annotated[int, typer.Option(help="Answers to each question.")] = 8,
    least: Annotated[float, typer.Option(help="Keep rates from here ...")] = 0.0,
    most: Annotated[float, typer.Option(help="... to here.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    limit: _Limit = None,
) -> None:
    """Add the column pass_rate: how often a model's own answers are right."""
    from leibler.cli.select import pass_rate_command

    options = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    pass_rate_command(data, model, samples, least, most, out, limit, options)


represent = typer.Typer(
    name="represent",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make inputs that are no text (thoughts).",
    epilog="\b\nExample:\n  leibler represent latent --model models/small --data reasoned.jsonl --out latents",
)

_Open = Annotated[str, typer.Option("--open", help="The token before the thoughts.")]
_Close = Annotated[str, typer.Option("--close", help="The token after them.")]


@command(
    represent,
    "latent",
    "leibler represent latent --model models/small --data reasoned.jsonl --out latents --rate 4\n"
    "leibler train latent-sft student=latents/decoder data=latents/latents.jsonl out=runs/latent",
    runs_models=True,
)
def represent_latent(
    model: Annotated[str, typer.Option(help="The model to start from: a directory or a hub id.")],
    data: Annotated[str, typer.Option(help="Records with prompt, reasoning and completion (the answer).")],
    out: Annotated[Path, typer.Option(help="A directory of its own.")],
    rate: Annotated[int, typer.Option(help="Tokens of reasoning that one thought stands for.")] = 4,
    span: Annotated[int, typer.Option(help="Segments of reasoning that a thought is made of; 0: all so far.")] = 2,
    encoder_steps: Annotated[int, typer.Option(help="Steps of the encoder alone,")] = 300,
    decoder_steps: Annotated[int, typer.Option(help="then of the decoder alone,")] = 100,
    joint_steps: Annotated[int, typer.Option(help="then of both.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Records in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    top_k: Annotated[int, typer.Option(help="Entries of each thought that are written.")] = 64,
    open: _Open = "<think>",
    close: _Close = "</think>",
    seed: Annotated[int, typer.Option(help="Of the order of the records.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    limit: _Limit = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Compress reasoning into laws over the vocabulary: the data of latent-sft.

    Writes latents.jsonl, and the model that answers from such thoughts into decoder/. Ctrl-C saves, and the same
    command goes on.
    """
    from leibler.cli.latent import compress_command

    settings = {"rate": rate, "span": span, "steps": (encoder_steps, decoder_steps, joint_steps), "open": open}
    settings |= {"batch_size": batch_size, "learning_rate": learning_rate, "top_k": top_k, "close": close}
    compress_command(model, data, out, limit, quiet, **settings, seed=seed, save_every=save_every)


@command(
    measure,
    "latent",
    "leibler measure latent --model runs/latent/final --data questions.jsonl",
    runs_models=True,
)
def measure_latent(
    model: Annotated[str, typer.Option(help="A model trained by latent-sft: a directory or a hub id.")],
    data: Annotated[str, typer.Option(help="Questions with answers; also the columns reasoning and paths.")],
    max_latent: Annotated[int, typer.Option(help="Thoughts at most.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    top_k: Annotated[int | None, typer.Option(help="Entries of a thought that are read; all, as published.")] = None,
    open: _Open = "<think>",
    close: _Close = "</think>",
    limit: _Limit = None,
    json: _Json = False,
) -> None:
    """How a model answers that thinks in laws.

    Accuracy, the number of thoughts, the reasoning tokens that each stands for (column reasoning), and how many
    alternative solutions are followed at once (column paths: solutions, each a list of texts).
    """
    from leibler.cli.latent import latent_command

    options = {"max_latent": max_latent, "max_new_tokens": max_new_tokens, "top_k": top_k}
    latent_command(model, data, limit, json, **options, open=open, close=close)
