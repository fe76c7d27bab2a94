"""The fused pass on a GPU: one generated Triton kernel for the values of a row and one for its gradient.

``forms`` states each functional once, as sums over the vocabulary in plain PyTorch; ``trace`` turns such functions into
Triton statements, ``generate`` puts them into the two kernels, ``kernels`` launches those for a chunk of tokens.
"""

from __future__ import annotations
