"""Every recipe has a claim that is run on the recipe, and each such claim is refuted by a recipe that is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from claims.breaking import Broken, case, flipped, refute, refuted, sourced, with_, without
from leibler import claims, recipes
from leibler.claims import bandits as b
from leibler.claims import distillation as d
from leibler.claims import policy as pol
from leibler.claims import preference as pref
from leibler.claims import small_models as small
from leibler.claims import targets as tg
from leibler.claims import theory as th
from leibler.claims import vocabulary as voc
from leibler.divergence import AdaptiveKL, ForwardKL, Jeffreys, JensenShannon, ReverseKL
from leibler.estimate import K3
from leibler.objective import (
    AgainstHardest,
    Clip,
    Column,
    Fit,
    Hinge,
    Imitate,
    ImplicitReward,
    Logistic,
    Match,
    PolicyGradient,
    Preference,
    Ratio,
    Reference,
    Reward,
    Squared,
    Teacher,
    Whitened,
)
from leibler.objective.terms import Term
from leibler.train import Data, OnPolicy, Recipe


def immediate(recipe: Recipe) -> Recipe:
    """Without the log-ratios still to come: plain on-policy distillation."""
    return without(PolicyGradient)(recipe)


BROKEN = [
    case(d.sft_finds_the_law_of_the_data, "sft", "sign", flipped()),
    case(d.sft_finds_the_law_of_the_data, "sft", "zero", without(Term)),
    # kd
    case(d.kd_descends_student_minus_teacher, "kd", "sign", flipped()),
    case(d.kd_descends_student_minus_teacher, "kd", "zero", without(Match)),
    case(d.kd_descends_student_minus_teacher, "kd", "reverse", divergence=ReverseKL()),
    case(d.kd_descends_student_minus_teacher, "kd", "labels", imitate=0.1),
    case(d.kd_descends_student_minus_teacher, "kd", "on-policy", sourced(OnPolicy())),
    case(d.kd_matches_logits_when_hot, "kd", "sign", flipped()),
    case(d.kd_matches_logits_when_hot, "kd", "half", with_(Match, coefficient=0.5)),
    # gkd
    case(d.gkd_trains_where_the_student_goes, "gkd", "sign", flipped()),
    case(d.gkd_trains_where_the_student_goes, "gkd", "off-policy", sourced(Data())),
    case(d.gkd_trains_where_the_student_goes, "gkd", "skewed", divergence=JensenShannon(0.4)),
    case(d.gkd_trains_where_the_student_goes, "gkd", "forward", divergence=ForwardKL()),
    case(d.gkd_lies_between_both_kls, "gkd", "sign", flipped()),
    case(d.gkd_lies_between_both_kls, "gkd", "fixed", divergence=JensenShannon(0.5)),
    # minillm
    case(d.minillm_splits_the_sequence_gradient, "minillm", "sign", flipped()),
    case(d.minillm_splits_the_sequence_gradient, "minillm", "sign-ahead", flipped(PolicyGradient)),
    case(d.minillm_splits_the_sequence_gradient, "minillm", "sign-now", flipped(Match)),
    case(d.minillm_splits_the_sequence_gradient, "minillm", "without-ahead", immediate),
    case(d.minillm_splits_the_sequence_gradient, "minillm", "without-now", without(Match)),
    case(d.minillm_splits_the_sequence_gradient, "minillm", "twice", start=0),
    case(d.minillm_splits_the_sequence_gradient, "minillm", "forward", with_(Match, divergence=ForwardKL())),
    case(d.minillm_clips_against_the_mixture, "minillm", "twice", start=0),
    case(d.minillm_clips_against_the_mixture, "minillm", "student-only", teacher_share=0.0),
    case(d.minillm_clips_against_the_mixture, "minillm", "unclipped", clip=10.0),
    case(d.minillm_clips_against_the_mixture, "minillm", "weighted-twice", with_(Match, coefficient=2.0)),
    case(d.minillm_clips_against_the_mixture, "minillm", "sign", flipped(PolicyGradient)),
    # distillm
    case(d.distillm_is_bounded, "distillm", "unskewed", lam=0.0),
    case(d.distillm_is_bounded, "distillm", "skewed-more", lam=0.2),
    case(d.distillm_is_bounded, "distillm", "sign", flipped()),
    case(d.distillm_forgives_lost_modes, "distillm", "unskewed", lam=0.0),
    case(d.distillm_forgives_lost_modes, "distillm", "sign", flipped()),
    case(d.distillm_becomes_forward_kl, "distillm", "fixed", lam=0.1),
    case(d.distillm_becomes_forward_kl, "distillm", "sign", flipped()),
    case(d.distillm_adapts_its_source, "distillm", "data-only", sourced(Data())),
    # akl
    case(d.akl_weighs_head_and_tail, "akl", "constant", with_(Match, divergence=Jeffreys(), coefficient=0.5)),
    case(d.akl_weighs_head_and_tail, "akl", "other-head", head_mass=0.9),
    case(d.akl_weighs_head_and_tail, "akl", "exchanged", with_(Match, divergence=AdaptiveKL().swapped())),
    case(d.akl_weighs_head_and_tail, "akl", "sign", flipped()),
    # kdrl
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "sign-teacher", flipped(Match)),
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "sign-reward", flipped(PolicyGradient)),
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "without-teacher", without(Match)),
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "without-reward", without(PolicyGradient)),
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "constant", coefficient=5e-3),
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "guided", guided=True),
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "k3", with_(Match, estimator=K3())),
    case(d.kdrl_joins_rewards_and_teacher, "kdrl", "reference", with_(Match, to=Reference())),
    # g-opd
    case(d.g_opd_descends_to_the_extrapolation, "g-opd", "sign", flipped()),
    case(d.g_opd_descends_to_the_extrapolation, "g-opd", "plain", scale=1.0),
    case(d.g_opd_descends_to_the_extrapolation, "g-opd", "clipped", clip=0.05),
    case(d.g_opd_at_scale_one_forgets_the_base, "g-opd", "fixed", scale=1.25),
    case(d.g_opd_at_scale_one_forgets_the_base, "g-opd", "always-one", scale=1.0),
    case(d.g_opd_at_scale_one_forgets_the_base, "g-opd", "sign", flipped()),
    case(b.g_opd_pays_while_reward_and_ratio_agree, "g-opd", "fixed", scale=1.25),
    case(b.g_opd_pays_while_reward_and_ratio_agree, "g-opd", "clipped", clip=0.05),
    case(b.g_opd_is_myopic, "g-opd", "always-one", scale=1.0),
    case(tg.dpkd_prefers_the_teachers_response, "dpkd", "sign", flipped(Preference)),
    case(
        tg.dpkd_prefers_the_teachers_response,
        "dpkd",
        "summed",
        with_(Preference, score=ImplicitReward(beta=3.0, to=Teacher())),
    ),
    case(tg.dpkd_prefers_the_teachers_response, "dpkd", "squared", with_(Preference, link=Squared(1.0))),
    case(tg.g_opd_keeps_two_references, "g-opd", "sign", flipped()),
    case(tg.g_opd_keeps_two_references, "g-opd", "one", anchor=None),
    case(tg.g_opd_keeps_two_references, "g-opd", "plain", scale=1.0),
    # rlad
    case(tg.rlad_gates_by_the_teacher, "rlad", "sign", flipped()),
    case(tg.rlad_gates_by_the_teacher, "rlad", "grpo", alpha=1.0),
    case(tg.rlad_gates_by_the_teacher, "rlad", "teacher-only", alpha=0.0),
    case(tg.rlad_gates_by_the_teacher, "rlad", "unclipped", clip=10.0),
    case(tg.rlad_contains_grpo, "rlad", "sign", flipped()),
    case(tg.rlad_contains_grpo, "rlad", "no-teacher", with_(PolicyGradient, surrogate=Clip(0.2))),
    # delta-kd
    case(tg.delta_kd_shifts_the_students_own_law, "delta-kd", "sign", flipped()),
    case(tg.delta_kd_shifts_the_students_own_law, "delta-kd", "fixed", alpha=1.0),
    case(tg.delta_kd_shifts_the_students_own_law, "delta-kd", "reverse", with_(Match, divergence=ReverseKL())),
    case(tg.delta_kd_shifts_the_students_own_law, "delta-kd", "to-teacher", with_(Match, to=Teacher())),
    case(tg.delta_kd_at_its_limits, "delta-kd", "to-reference", with_(Match, to=Reference())),
    case(tg.delta_kd_at_its_limits, "delta-kd", "half", alpha=0.5),
    # dpkd
    case(tg.dpkd_moves_first_choices_only, "dpkd", "sign", flipped()),
    case(tg.dpkd_moves_first_choices_only, "dpkd", "sharper", beta=1.0),
    case(tg.dpkd_moves_first_choices_only, "dpkd", "labels", share=0.5),
    case(tg.dpkd_copies_first_choices_not_laws, "dpkd", "forward", with_(Match, divergence=ForwardKL())),
    case(tg.dpkd_copies_first_choices_not_laws, "dpkd", "sign", flipped()),
    # paced
    case(th.paced_weighs_by_competence, "paced", "sign", flipped()),
    case(th.paced_weighs_by_competence, "paced", "unweighted", with_(Match, weight=1.0)),
    case(th.paced_weighs_by_competence, "paced", "by-rate", with_(Match, weight=Column("pass_rate"))),
    case(th.paced_weighs_by_competence, "paced", "reverse", with_(Match, divergence=ReverseKL())),
    case(th.paced_turns_from_forward_to_reverse, "paced", "never", turn=None),
    case(th.paced_turns_from_forward_to_reverse, "paced", "early", turn=5),
    # recursive-meta-distillation
    case(th.generations_are_drawn_to_the_teacher, "recursive-meta-distillation", "no-anchor", anchor=0.0),
    case(th.generations_are_drawn_to_the_teacher, "recursive-meta-distillation", "geometric", geometric=True),
    case(
        th.generations_are_drawn_to_the_teacher,
        "recursive-meta-distillation",
        "reverse-roles",
        with_(Match, to=Teacher()),
    ),
    case(th.generations_contract, "recursive-meta-distillation", "no-anchor", anchor=0.0),
    case(th.generations_contract, "recursive-meta-distillation", "always-anchored", anchor=0.4),
    # transfer-limits
    case(
        th.transfer_copies_what_it_was_shown, "transfer-limits", "likelihood", lambda r: replace(r, objective=Imitate())
    ),
    case(
        th.transfer_copies_what_it_was_shown,
        "transfer-limits",
        "nothing",
        with_(Fit, target=Column("label_logp", reach="token") + Column("label_logp", reach="token")),
    ),
    case(
        th.transfer_is_faster_with_probabilities,
        "transfer-limits",
        "likelihood",
        lambda r: replace(r, objective=Imitate()),
    ),
    # vocabulary-expansion
    case(voc.expansion_lifts_the_old_law, "vocabulary-expansion", "pushed", with_(Match, to=Teacher())),
    case(voc.expansion_lifts_the_old_law, "vocabulary-expansion", "sign", flipped()),
    case(voc.expansion_lifts_the_old_law, "vocabulary-expansion", "reverse", with_(Match, divergence=ReverseKL())),
    case(voc.expansion_lifts_the_old_law, "vocabulary-expansion", "pieces-only", threshold=0.999),
    # ppo
    case(pol.ppo_climbs_the_penalised_reward, "ppo", "sign", flipped(PolicyGradient)),
    case(pol.ppo_climbs_the_penalised_reward, "ppo", "without", without(PolicyGradient)),
    case(pol.ppo_climbs_the_penalised_reward, "ppo", "no-penalty", initial=0.0),
    case(pol.ppo_climbs_the_penalised_reward, "ppo", "half-penalty", initial=0.05),
    case(
        pol.ppo_climbs_the_penalised_reward,
        "ppo",
        "unpenalised",
        with_(PolicyGradient, advantage=Reward() >> Whitened()),
    ),
    case(pol.ppo_climbs_the_penalised_reward, "ppo", "discounted", decay=0.5),
    case(pol.ppo_clips, "ppo", "unclipped", clip=100.0),
    case(pol.ppo_clips, "ppo", "ratio", with_(PolicyGradient, surrogate=Ratio())),
    case(pol.ppo_clips, "ppo", "clip-higher", with_(PolicyGradient, surrogate=Clip(0.2, 0.28))),
    case(pol.ppo_clips, "ppo", "sign", flipped(PolicyGradient)),
    case(pol.ppo_fits_its_critic, "ppo", "sign", flipped(Fit)),
    case(pol.ppo_fits_its_critic, "ppo", "without", value_coefficient=0.0),
    case(pol.ppo_fits_its_critic, "ppo", "to-the-reward", with_(Fit, target=Reward())),
    case(pol.ppo_steers_its_coefficient, "ppo", "other-target", target=3.0),
    case(pol.ppo_steers_its_coefficient, "ppo", "deaf", horizon=1e12),
    case(
        pol.ppo_steers_its_coefficient,
        "ppo",
        "uncontrolled",
        lambda recipe: with_(Fit, target=Reward())(with_(PolicyGradient, advantage=Reward() >> Whitened())(recipe)),
    ),
    # grpo
    case(pol.grpo_climbs_and_is_held, "grpo", "sign-reward", flipped(PolicyGradient)),
    case(pol.grpo_climbs_and_is_held, "grpo", "sign-reference", flipped(Match)),
    case(pol.grpo_climbs_and_is_held, "grpo", "without-reward", without(PolicyGradient)),
    case(pol.grpo_climbs_and_is_held, "grpo", "without-reference", coefficient=0.0),
    case(pol.grpo_climbs_and_is_held, "grpo", "k3", with_(Match, estimator=K3())),
    case(pol.grpo_climbs_and_is_held, "grpo", "raw", with_(PolicyGradient, advantage=Reward())),
    case(pol.grpo_stays_exact_when_stale, "grpo", "sign", flipped(Match)),
    case(pol.grpo_stays_exact_when_stale, "grpo", "forward", with_(Match, divergence=ForwardKL(), estimator=K3())),
    case(pol.grpo_stays_exact_when_stale, "grpo", "raw", with_(PolicyGradient, advantage=Reward())),
    case(pol.grpo_stays_exact_when_stale, "grpo", "unweighted", minibatches=1),
    # disco
    case(pol.disco_has_no_difficulty_bias, "disco", "sign", flipped(Preference)),
    case(pol.disco_has_no_difficulty_bias, "disco", "without", without(Preference)),
    case(pol.disco_has_no_difficulty_bias, "disco", "logistic", with_(Preference, link=Logistic())),
    case(pol.disco_has_no_difficulty_bias, "disco", "implicit", with_(Preference, score=ImplicitReward())),
    case(pol.disco_looks_at_the_hardest, "disco", "sign", flipped(Preference)),
    case(pol.disco_looks_at_the_hardest, "disco", "fixed", with_(Preference, contrast=AgainstHardest(10.0))),
    case(pol.disco_keeps_its_distance, "disco", "sign", flipped(Match)),
    case(pol.disco_keeps_its_distance, "disco", "without", without(Match)),
    case(pol.disco_keeps_its_distance, "disco", "never-silent", with_(Match, coefficient=Hinge(0.0, 1e3))),
    case(pol.disco_keeps_its_distance, "disco", "penalty", with_(Match, coefficient=10.0)),
    case(pol.disco_keeps_its_distance, "disco", "slope", slope=100.0),
    # dpo
    case(pref.dpo_finds_the_tilted_reference, "dpo", "sign", flipped()),
    case(pref.dpo_finds_the_tilted_reference, "dpo", "zero", without(Preference)),
    case(pref.dpo_finds_the_tilted_reference, "dpo", "other-beta", beta=0.4),
    case(pref.dpo_finds_the_tilted_reference, "dpo", "smoothed", smoothing=0.1),
    case(pref.dpo_finds_the_tilted_reference, "dpo", "squared", with_(Preference, link=Squared(1.0))),
    case(pref.dpo_weighs_pairs_by_their_error, "dpo", "sign", flipped()),
    case(pref.dpo_weighs_pairs_by_their_error, "dpo", "squared", with_(Preference, link=Squared(1.0))),
    case(pref.dpo_weighs_pairs_by_their_error, "dpo", "other-beta", beta=0.2),
    # f-dpo
    case(pref.f_dpo_finds_the_optimum, "f-dpo", "reverse", divergence=ReverseKL()),
    case(pref.f_dpo_finds_the_optimum, "f-dpo", "sign", flipped()),
    case(pref.f_dpo_finds_the_optimum, "f-dpo", "clipped", clip=0.1),
    case(pref.f_dpo_tails, "f-dpo", "reverse", divergence=ReverseKL()),
    case(pref.f_dpo_tails, "f-dpo", "sign", flipped()),
    # inpo
    case(pref.inpo_takes_the_mirror_step, "inpo", "sign", flipped()),
    case(pref.inpo_takes_the_mirror_step, "inpo", "zero", without(Preference)),
    case(pref.inpo_takes_the_mirror_step, "inpo", "no-reference", tau=0.0),
    case(pref.inpo_takes_the_mirror_step, "inpo", "no-margin", with_(Preference, link=Squared())),
    case(
        pref.inpo_takes_the_mirror_step,
        "inpo",
        "anchored-to-the-reference",
        with_(Preference, score=ImplicitReward(beta=1.0, to=Reference())),
    ),
    case(b.inpo_reaches_the_nash_policy, "inpo", "no-reference", tau=0.0),
    case(b.inpo_reaches_the_nash_policy, "inpo", "small-steps", eta=10.0),
    case(b.inpo_reaches_the_nash_policy, "inpo", "no-margin", with_(Preference, link=Squared())),
    case(b.inpo_reaches_the_nash_policy, "inpo", "sign", flipped()),
]

BROKEN_FULL = [
    case(b.minillm_keeps_to_a_mode, "minillm", "single-step-only", without(PolicyGradient)),
    case(b.distillm_does_not_recover_a_lost_mode, "distillm", "unskewed", lam=0.0),
    case(b.distillm_does_not_recover_a_lost_mode, "distillm", "sign", flipped()),
    case(b.akl_against_a_constant_mixture, "akl", "sign", flipped()),
    case(b.akl_against_a_constant_mixture, "akl", "forward", with_(Match, divergence=ForwardKL())),
    case(b.akl_against_a_constant_mixture, "akl", "reverse", with_(Match, divergence=ReverseKL())),
    case(b.kdrl_starts_fast_and_ends_high, "kdrl", "without-teacher", without(Match)),
    case(b.kdrl_starts_fast_and_ends_high, "kdrl", "sign-reward", flipped(PolicyGradient)),
    case(b.g_opd_goes_beyond_its_teachers, "g-opd", "plain", scale=1.0),
    case(b.g_opd_goes_beyond_its_teachers, "g-opd", "sign", flipped()),
    case(tg.rlad_imitates_selectively, "rlad", "sign", flipped()),
    case(tg.rlad_imitates_selectively, "rlad", "no-teacher", with_(PolicyGradient, surrogate=Clip(0.2))),
    case(b.ppo_holds_the_kl_at_its_target, "ppo", "deaf", horizon=1e12),
    case(b.ppo_holds_the_kl_at_its_target, "ppo", "no-reward", without(PolicyGradient)),
    case(b.grpo_climbs_and_stays_near, "grpo", "sign", flipped(PolicyGradient)),
    case(b.grpo_climbs_and_stays_near, "grpo", "without-reference", coefficient=0.0),
    case(b.disco_keeps_steps_short, "disco", "unbound", bound=1e6),
    case(b.disco_keeps_steps_short, "disco", "sign", flipped(Preference)),
    case(b.inpo_selection_is_biased, "inpo", "sign", flipped()),
    case(small.sft_teaches_the_task, "sft", "sign", flipped()),
    case(small.gkd_beats_fixed_data, "gkd", "sign", flipped()),
    case(small.minillm_trades_variety_for_quality, "minillm", "sign", flipped()),
    case(small.distillm_keeps_up, "distillm", "sign", flipped()),
    case(small.grpo_sharpens, "grpo", "sign", flipped(PolicyGradient)),
    case(small.grpo_sharpens, "grpo", "without-reward", without(PolicyGradient)),
    case(small.dpo_ranks, "dpo", "sign", flipped()),
]
"""The same for behaviour: slow, so a selection of what each claim could miss."""


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_method_refutes_its_claim(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)


FAST = [c for c in claims.claims() if c.slug in recipes.names() and not c.full]


@pytest.mark.parametrize("claim", FAST, ids=lambda c: c.experiment.__name__)
def test_the_claim_holds(claim: Any):
    result = claim.run()
    assert result["holds"], result["observed"]


def test_every_recipe_has_a_fast_claim_and_every_claim_has_been_refuted():
    assert {c.slug for c in FAST} == set(recipes.names())
    assert {c.experiment.__name__ for c in claims.claims() if c.slug in recipes.names()} <= refuted()
