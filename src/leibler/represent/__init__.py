"""Losses and measures on hidden states, and inputs that are no tokens."""

from leibler.represent.activation import ActivationBand, margin_violation

__all__ = ["ActivationBand", "margin_violation"]
