"""Every method carries its evidence: small experiments whose outcome could refute the implementation.

A claim is a function that returns what it observed and whether that agrees with what was expected; `claim` puts it
under a method's slug, `run` runs a selection. `leibler verify` prints them, and its exit status is 1 when one does
not hold.
"""

from leibler.claims.framework import Claim, chosen, claim, claims, run, select

__all__ = ["Claim", "chosen", "claim", "claims", "run", "select"]
