"""The claims about transport, bands and spans are refuted by recipes that are broken."""

from __future__ import annotations

import pytest

from claims.breaking import Broken, case, flipped, refute, sourced, with_, without
from leibler.claims import transport as t
from leibler.divergence import ForwardKL, ReverseKL
from leibler.objective import Match, Old, SpanProduct, Transport
from leibler.train import Adaptive, Data, Repair

SLUG = "scrg-dac-kl"
BROKEN = [
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "sign", flipped(Transport)),
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "zero", without(Transport)),
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "eps", eps=0.12),
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "iterations", iterations=2),
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "temperature", temperature=1.9),
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "debiased", debiased=True),
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "no-kl", without(Match)),
    case(t.sinkd_is_the_kernels_scaling, "sinkd", "cold-kl", with_(Match, divergence=ForwardKL())),
    case(t.sinkd_transport_is_blind_to_permutations, "sinkd", "zero", without(Transport)),
    case(t.sinkd_transport_is_blind_to_permutations, "sinkd", "few-sites", sites=3),
    case(t.sinkd_transport_is_blind_to_permutations, "sinkd", "alone", kl=0.0),
    case(t.sinkd_is_biased_unless_debiased, "sinkd", "always-debiased", debiased=True),
    case(t.sinkd_is_biased_unless_debiased, "sinkd", "never-debiased", debiased=False),
    case(t.sinkd_is_biased_unless_debiased, "sinkd", "zero", without(Transport)),
    case(t.sinkd_lies_between_assignment_and_mean, "sinkd", "one-eps", eps=0.1),
    case(t.sinkd_lies_between_assignment_and_mean, "sinkd", "few-iterations", iterations=3),
    case(t.sinkd_lies_between_assignment_and_mean, "sinkd", "zero", without(Transport)),
    case(t.sinkd_needs_overlap_somewhere, "sinkd", "hot", with_(Transport, temperature=50.0)),
    case(t.sinkd_needs_overlap_somewhere, "sinkd", "one-site", sites=1),
    case(t.sinkd_needs_overlap_somewhere, "sinkd", "zero", without(Transport)),
    case(t.sinkd_of_one_row_is_total_variation, "sinkd", "all-sites", sites=256, batch_wise=False),
    case(t.sinkd_of_one_row_is_total_variation, "sinkd", "temperature", temperature=1.0),
    case(t.scrg_band_has_its_limits, SLUG, "sign", flipped(Match)),
    case(t.scrg_band_has_its_limits, SLUG, "zero", without(Match)),
    case(t.scrg_band_has_its_limits, SLUG, "no-band", with_(Match, divergence=ForwardKL())),
    case(t.scrg_band_has_its_limits, SLUG, "reverse", with_(Match, divergence=ReverseKL())),
    case(t.scrg_band_has_its_limits, SLUG, "bucket", tail="bucket"),
    case(t.scrg_band_has_its_limits, SLUG, "renormalise", tail="renormalise"),
    case(t.scrg_band_has_its_limits, SLUG, "least-mass", least_mass=0.9999),
    case(t.scrg_span_compares_products, SLUG, "sign", flipped(SpanProduct)),
    case(t.scrg_span_compares_products, SLUG, "zero", without(SpanProduct)),
    case(t.scrg_span_compares_products, SLUG, "norm", with_(SpanProduct, norm=2)),
    case(t.scrg_span_compares_products, SLUG, "normalised", with_(SpanProduct, normalised=True)),
    case(t.scrg_span_compares_products, SLUG, "double", span=2.0),
    case(t.scrg_repairs_what_is_worst, SLUG, "by-itself", sourced(Adaptive(Data(), Repair(by=Old())))),
    case(t.scrg_repairs_what_is_worst, SLUG, "twice", times=3),
]  # fmt: skip
BROKEN_FULL = [
    case(t.sinkd_alone_mixes_contexts_up, "sinkd", "sign", flipped()),
    case(t.scrg_band_alone_leaves_the_tail, SLUG, "sign", flipped(Match)),
    case(t.scrg_band_alone_leaves_the_tail, SLUG, "bucket", tail="bucket"),
    case(t.scrg_band_alone_leaves_the_tail, SLUG, "renormalise", tail="renormalise"),
    case(t.sinkd_alone_mixes_contexts_up, "sinkd", "no-kl", with_(Match, coefficient=1e-9)),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_method_refutes_its_claim(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)
