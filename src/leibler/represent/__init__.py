"""Losses and measures on hidden states, and inputs that are no tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leibler.represent.activation import ActivationBand, margin_violation

if TYPE_CHECKING:
    from leibler.represent.compressing import Compressed, Settings, compress
    from leibler.represent.latent import Encoder, Example, Layout, answer_logp, layout, read

__all__ = [
    "ActivationBand",
    "Compressed",
    "Encoder",
    "Example",
    "Layout",
    "Settings",
    "answer_logp",
    "compress",
    "layout",
    "margin_violation",
    "read",
]


def __getattr__(name: str) -> Any:
    """The compression of reasoning trains models; what is trained imports this package for its losses."""
    if name not in __all__:
        raise AttributeError(name)
    from leibler.represent import compressing, latent

    return getattr(compressing if hasattr(compressing, name) else latent, name)
