"""The one exception a user's mistake raises: a sentence that names the thing and the remedy."""

from __future__ import annotations


class LeiblerError(Exception):
    """A mistake that the user can mend.

    The command line prints the message as one sentence and exits with status 2; the library raises it as it is.

    Attributes:
        elsewhere: in a run of several processes, True where another of them says it, False where this one does, None
            where they have not agreed.
    """

    elsewhere: bool | None = None


class RecipeError(LeiblerError):
    """A recipe whose parts do not fit together; raised when the recipe is built."""


class DataError(LeiblerError):
    """Records, tasks or corpora that cannot be used as asked."""


class ModelError(LeiblerError):
    """A model or tokenizer that cannot be loaded, or does not fit the others."""


class RunError(LeiblerError):
    """A run directory that cannot be written, resumed or reported on."""
