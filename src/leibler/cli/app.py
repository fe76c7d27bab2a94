"""The commands, their options and their help. What they do is imported when they run."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from leibler.cli import INTERRUPTED

app = typer.Typer(
    name="leibler",
    help="Learning that leans on a divergence: distil, align, reinforce and measure language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: importing a renderer would take longer than printing
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(name: str, example: str, to: typer.Typer = app, runs_models: bool = False) -> Any:
    """Register a command with an example under its help; Ctrl-C in it exits with 130."""

    def register(function: Any) -> Any:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if runs_models:
                from leibler import memory

                memory.keep()
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt:
                typer.echo("interrupted", err=True)
                raise typer.Exit(INTERRUPTED) from None

        lines = "\n".join(f"  {line}" for line in example.strip().splitlines())
        # \b keeps the lines of an example as they are
        to.command(name, epilog=f"\b\nExample:\n{lines}")(guarded)
        return function

    return register


def _version(wanted: bool) -> None:
    if wanted:
        import leibler

        typer.echo(leibler.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@_command("methods", "leibler methods --family distillation")
def methods(
    family: Annotated[str | None, typer.Option(help="Only one family.")] = None,
    json: Annotated[bool, typer.Option("--json", help="A list of objects, for programs.")] = False,
) -> None:
    """List the methods and what each is for."""
    from leibler.cli.methods import list_methods

    list_methods(family, json)


@_command("show", "leibler show kdrl\nleibler show gkd recipe.objective.terms.0.divergence=jensen_shannon")
def show(
    slug: Annotated[str, typer.Argument(help="A method, as `leibler methods` lists it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="recipe.KEY=VALUE ...", metavar="KEY=VALUE")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Also every key that can be set, with its value.")] = False,
) -> None:
    """Print a method's recipe and its plan.

    Parameters, terms, models, how each term will be computed, and what in it is biased.
    """
    from leibler.cli.methods import show_method

    show_method(slug, overrides or [], keys)


@_command(
    "train",
    "leibler train gkd student=models/small teacher=models/large data=prompts.jsonl out=runs/gkd steps=500\n"
    "leibler train grpo student=models/small data=task:addition:digits=2 out=runs/grpo recipe.group_size=4\n"
    "leibler train --resume runs/grpo\n"
    "leibler train runs/grpo/run.yaml out=runs/grpo-again seed=1\n"
    "leibler train --sweep --out sweep\n"
    "leibler train --sweep kd gkd minillm --out sweep student=models/small teacher=models/large data=train.jsonl",
    runs_models=True,
)
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A method, or the run.yaml of a run to repeat; with --sweep, any number of methods.",
            metavar="RECIPE|RUN.YAML",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="student=DIR_OR_ID teacher=DIR_OR_ID|cache:DIR models.NAME=DIR data=FILE_OR_TASK out=DIR steps= "
            "batch_size= learning_rate= seed= save_every= max_new_tokens= recipe.KEY=VALUE ...",
            metavar="KEY=VALUE",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this directory.")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Compare the methods named, or a whole family, at equal tokens.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="The same as out=DIR.")] = None,
    family: Annotated[str | None, typer.Option(help="Of a sweep without methods named: distillation.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Of a sweep: runs of each method, for mean and spread: 1.")] = None,
    steps_scale: Annotated[
        float | None, typer.Option(help="Of a sweep on the embedded task: multiplies all steps, for a quick look: 1.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of each process of a sweep.")] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Of a sweep: 1e-3,2e-4 tries both with each method; the better on tuning problems counts."),
    ] = None,
) -> None:
    """Train a model by a recipe, or compare many with --sweep.

    Ctrl-C saves; --resume goes on exactly where the run stopped. Several processes: torchrun -m leibler train ..., or
    accelerate launch with a file that `leibler config` names.

    A sweep trains every method on the same student, data and number of tokens, each in a process of its own, and writes
    one table and one picture: sweep.json, report.html and figure.svg. Without student=, on a small task and models made
    on the spot. The same command goes on with a sweep that was interrupted.
    """
    arguments = [*(overrides or []), *([f"out={out}"] if out is not None else [])]
    knobs = {"--family": family, "--seeds": seeds, "--steps-scale": steps_scale, "--threads": threads}
    knobs["--learning-rates"] = learning_rates
    if sweep and resume is None:
        from leibler.cli.sweep import sweep_command

        named = [*([recipe] if recipe is not None else []), *arguments]
        if not sweep_command(named, family, seeds, steps_scale, threads, learning_rates):
            raise typer.Exit(1)
        return
    from leibler.cli.train import train_command
    from leibler.errors import RunError

    given = [name for name, value in knobs.items() if value is not None]
    if sweep or given:
        why = "--sweep goes on by itself where it stopped; leave out --resume" if sweep else "add --sweep"
        raise RunError(f"{given[0]} is an option of a sweep; {why}." if given else f"{why}.")
    train_command(recipe, arguments, resume)


@_command("config", "accelerate launch --config_file $(leibler config fsdp2) -m leibler train gkd ...\nleibler config")
def config(
    name: Annotated[str | None, typer.Argument(help="A configuration; without it, all are listed.")] = None,
) -> None:
    """Print where a configuration for several processes lies.

    They are files for `accelerate launch --config_file`: several GPUs (ddp), weights shared out among them (fsdp2), and
    the same with two processes on the CPU, for trying out.
    """
    from leibler import configs

    for found in [name] if name else configs.names():
        typer.echo(configs.path(found))


@_command(
    "cache",
    "leibler cache --teacher models/large --data train.jsonl --top-k 64 --out caches/train\n"
    "leibler train kd student=models/small teacher=cache:caches/train data=train.jsonl out=runs/kd\n"
    "leibler cache --teacher models/large --student models/small --samples 4 --data prompts.jsonl --out caches/own",
    runs_models=True,
)
def cache(
    teacher: Annotated[str | None, typer.Option(help="The model to run: a directory or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Records with completions; with --student, prompts.")] = None,
    out: Annotated[Path | None, typer.Option(help="The directory of the cache.")] = None,
    top_k: Annotated[int, typer.Option(help="Entries kept per token.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the laws; training has to take the same.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the log-probs: float32 or float16.")] = "float32",
    student: Annotated[str | None, typer.Option(help="Cache this model's own completions of the prompts.")] = None,
    samples: Annotated[int, typer.Option(help="Completions of each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="The longest completion that is sampled.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Read at most so many records.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a forward pass, at most.")] = 16_384,
    check: Annotated[Path | None, typer.Option(help="Only verify every file of this cache.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Run a teacher once and keep its top-k log-probs.

    Training then needs no teacher in memory: teacher=cache:DIR. Ctrl-C keeps what is finished, and the same command
    goes on.
    """
    from leibler.cli.cache import Rollouts, cache_command

    own = Rollouts(student, samples, max_new_tokens, seed)
    cache_command(teacher, data, out, top_k, temperature, dtype, own, limit, batch_tokens, check, quiet)


@_command("verify", "leibler verify minillm kdrl\nleibler verify --family preference --full --json", runs_models=True)
def verify(
    slugs: Annotated[list[str] | None, typer.Argument(help="Methods; all, when none is named.")] = None,
    family: Annotated[str | None, typer.Option(help="Only one family.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Also the claims about behaviour, which train models.")] = False,
    json: Annotated[bool, typer.Option("--json", help="A list of objects, for programs.")] = False,
) -> None:
    """Run the claims of the methods.

    The exit status is 1 when one does not hold.
    """
    from leibler.cli.verify import verify_command

    if not verify_command(slugs or [], family, full, json):
        raise typer.Exit(1)


@_command("report", "leibler report runs/gkd --open")
def report(
    run_dir: Annotated[Path, typer.Argument(help="What `leibler train` or `leibler demo` wrote.", metavar="RUN_DIR")],
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write report.html into a run directory.

    Curves, drift from the target token by token, calibration, samples, and how to repeat the run; one file that needs
    nothing else.
    """
    from leibler.cli.report import report_command

    report_command(run_dir, open_it)


@_command("demo", "leibler demo --out demo", runs_models=True)
def demo(
    out: Annotated[Path, typer.Option(help="Where to; finished stages of an earlier demo there are kept.")] = Path(
        "demo"
    ),
    steps_scale: Annotated[float, typer.Option(help="Multiplies the steps of every stage.")] = 1.0,
) -> None:
    """Train small models from nothing, and report.

    A teacher, a student distilled under several divergences, rewards, measurements and a report; some minutes on two
    cores.
    """
    from leibler.cli.report import demo_command

    demo_command(out, steps_scale)


measure = typer.Typer(
    name="measure",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure models.",
    epilog="\b\nExample:\n  leibler measure divergence --model runs/kd/final --target models/large --data test.jsonl",
)
app.add_typer(measure)

_Limit = Annotated[int | None, typer.Option(help="Read at most so many records.")]
_Json = Annotated[bool, typer.Option("--json", help="An object, for programs.")]


@_command(
    "divergence",
    "leibler measure divergence --model runs/kd/final --target models/large --data test.jsonl --divergence renyi",
    to=measure,
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


@_command(
    "accuracy",
    "leibler measure accuracy --model runs/grpo/final --data task:addition:digits=2 --limit 200",
    to=measure,
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


@_command(
    "success",
    "leibler measure success --model runs/tcod/final --data env:textworld:rooms=6,part=heldout,n=100",
    to=measure,
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


@_command(
    "memorisation",
    "leibler measure memorisation --student runs/kd/final --teacher models/large --baseline runs/sft/final "
    "--data train.jsonl",
    to=measure,
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


@_command(
    "agreement",
    "leibler measure agreement --student runs/kd/final --base models/small --teacher models/large "
    "--data task:addition:digits=2,n=200",
    to=measure,
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
app.add_typer(selection)

_Data = Annotated[str, typer.Option(help="A file, task:NAME or corpus:stdlib.")]
_Out = Annotated[Path, typer.Option(help="The file of the kept records; NAME.reasons.jsonl is written beside it.")]


@_command(
    "difference",
    "leibler select difference --data corpus:stdlib --teacher models/large --reference models/tiny --out kept.jsonl",
    to=selection,
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


@_command(
    "confident",
    "leibler select confident --data labelled.jsonl --teacher models/large --student models/small --out kept.jsonl",
    to=selection,
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


@_command(
    "pass-rate",
    "leibler select pass-rate --data task:addition:digits=2 --model models/small --samples 8 --out rated.jsonl\n"
    "leibler train paced student=models/small teacher=models/large data=rated.jsonl out=runs/paced",
    to=selection,
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
app.add_typer(represent)

_Open = Annotated[str, typer.Option("--open", help="The token before the thoughts.")]
_Close = Annotated[str, typer.Option("--close", help="The token after them.")]


@_command(
    "latent",
    "leibler represent latent --model models/small --data reasoned.jsonl --out latents --rate 4\n"
    "leibler train latent-sft student=latents/decoder data=latents/latents.jsonl out=runs/latent",
    to=represent,
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


@_command(
    "latent",
    "leibler measure latent --model runs/latent/final --data questions.jsonl",
    to=measure,
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
