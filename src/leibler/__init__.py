"""Learning that leans on a divergence: distil, align, reinforce, decode and measure language models."""

__version__ = "0.1.0"
