"""The commands, their options and their help. What they do is imported when they run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from leibler.cli.groups import measure, represent, selection
from leibler.cli.registering import command

app = typer.Typer(
    name="leibler",
    help="Learning that leans on a divergence: distil, align, reinforce and measure language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: importing a renderer would take longer than printing
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_command = partial(command, app)


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


for group in (measure, selection, represent):
    app.add_typer(group)
