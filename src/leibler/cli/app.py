"""The commands, their options and their help. What they do is imported when they run."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="leibler",
    help="Learning that leans on a divergence: distil, align, reinforce and measure language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: importing a renderer would take longer than printing
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(name: str, example: str) -> Any:
    """Register a command with an example under its help; Ctrl-C in it exits with 130."""

    def register(function: Any) -> Any:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt:
                typer.echo("interrupted", err=True)
                raise typer.Exit(130) from None

        lines = "\n".join(f"  {line}" for line in example.strip().splitlines())
        # \b keeps the lines of an example as they are
        app.command(name, epilog=f"\b\nExample:\n{lines}")(guarded)
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
) -> None:
    """Print a method's recipe and its plan.

    Parameters, terms, models, how each term will be computed, and what in it is biased.
    """
    from leibler.cli.methods import show_method

    show_method(slug, overrides or [])


@_command(
    "train",
    "leibler train gkd student=models/small teacher=models/large data=prompts.jsonl out=runs/gkd steps=500\n"
    "leibler train grpo student=models/small data=task:addition:digits=2 out=runs/grpo recipe.group_size=4\n"
    "leibler train --resume runs/grpo\n"
    "leibler train runs/grpo/run.yaml out=runs/grpo-again seed=1",
)
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A method, or the run.yaml of a run to repeat.", metavar="RECIPE|RUN.YAML")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="student=DIR_OR_ID teacher=DIR_OR_ID models.NAME=DIR data=FILE_OR_TASK out=DIR steps= batch_size= "
            "learning_rate= seed= save_every= max_new_tokens= recipe.KEY=VALUE ...",
            metavar="KEY=VALUE",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this directory.")] = None,
) -> None:
    """Train a model by a recipe.

    Ctrl-C saves; --resume goes on exactly where the run stopped.
    """
    from leibler.cli.train import train_command

    train_command(recipe, overrides or [], resume)


@_command("verify", "leibler verify minillm kdrl\nleibler verify --family preference --full --json")
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
