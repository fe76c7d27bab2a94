"""The table of methods: what each is called, where it was published, and where its recipe stands.

Nothing here imports a tensor library, so listing methods takes no time. One row per method; the slugs and families
of the two columns are the ones that `leibler methods` prints and `leibler train` accepts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

FAMILIES = ("distillation", "policy", "preference", "measurement")
"""The families that have a method."""


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        slug: the name on the command line.
        title, year: of the paper (the year it was first made public).
        family: what kind of learning it belongs to.
        kind: how it is used; ``"recipe"``: trained by ``leibler train``; ``"measurement"``: measures, by
            ``leibler measure``.
        summary: what it is for, in one line.
        where: ``"module:function"``; for a recipe inside `leibler.recipes`, and the function returns it.
        command: what runs it on the command line, where that is not ``leibler train SLUG``; of a recipe, what does its
            part without training.
    """

    slug: str
    title: str
    year: int
    family: str
    kind: str
    summary: str
    where: str
    command: str = ""

    def to_dict(self) -> dict[str, str | int]:
        """As plain data, in the order of the fields."""
        return asdict(self)


def _table(*methods: Method) -> dict[str, Method]:
    table = {method.slug: method for method in methods}
    if len(table) != len(methods):
        raise ValueError("two methods share a slug")
    return table


METHODS: dict[str, Method] = _table(
    Method(
        "sft",
        "Training language models to follow instructions with human feedback",
        2022,
        "distillation",
        "recipe",
        "Maximum likelihood of given completions: the baseline, and the first stage of nearly everything else.",
        "distillation:sft",
    ),
    Method(
        "kd",
        "Distilling the Knowledge in a Neural Network",
        2015,
        "distillation",
        "recipe",
        "Match the teacher's next-token law on given completions by the forward KL.",
        "distillation:kd",
    ),
    Method(
        "gkd",
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        2023,
        "distillation",
        "recipe",
        "Match the teacher on the student's own samples, so that training sees the student's mistakes.",
        "distillation:gkd",
    ),
    Method(
        "minillm",
        "Knowledge Distillation of Large Language Models",
        2023,
        "distillation",
        "recipe",
        "Descend the reverse KL of whole responses, so that a small student keeps to what it can do well.",
        "distillation:minillm",
    ),
    Method(
        "distillm",
        "DistiLLM: Towards Streamlined Distillation for Large Language Models",
        2024,
        "distillation",
        "recipe",
        "Skewed KL, stable where plain KL explodes, on student samples reused from a buffer.",
        "distillation:distillm",
    ),
    Method(
        "akl",
        "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
        2024,
        "distillation",
        "recipe",
        "Weigh forward and reverse KL at each token by where the student is off: the teacher's head or its tail.",
        "distillation:akl",
    ),
    Method(
        "kdrl",
        "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
        2025,
        "distillation",
        "recipe",
        "Rewards and a teacher in one objective: GRPO joined with on-policy distillation.",
        "distillation:kdrl",
    ),
    Method(
        "g-opd",
        "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        2026,
        "distillation",
        "recipe",
        "On-policy distillation to a target extrapolated beyond the teacher, away from its base model.",
        "distillation:g_opd",
    ),
    Method(
        "rlad",
        "Reinforcement-aware Knowledge Distillation for LLM Reasoning",
        2026,
        "distillation",
        "recipe",
        "Rewards with the teacher inside the clipped ratio: imitate it only where that serves the reward.",
        "distillation:rlad",
    ),
    Method(
        "delta-kd",
        "Delta Knowledge Distillation for Large Language Models",
        2025,
        "distillation",
        "recipe",
        "Match the student's own initial law, shifted as fine-tuning shifted the teacher's.",
        "distillation:delta_kd",
    ),
    Method(
        "adpa",
        "Advantage-Guided Distillation for Preference Alignment in Small Language Models",
        2025,
        "distillation",
        "recipe",
        "Align a small model by what preferences changed in a large one, at every token of the vocabulary.",
        "stages:adpa",
    ),
    Method(
        "erpd",
        "Extreme Region Policy Distillation",
        2026,
        "distillation",
        "recipe",
        "Learn recklessly from fixed responses, then distil back what little divergence buys.",
        "stages:erpd",
    ),
    Method(
        "dpkd",
        "Direct Preference Knowledge Distillation for Large Language Models",
        2024,
        "distillation",
        "recipe",
        "At each token prefer the teacher's first choice to the student's own.",
        "distillation:dpkd",
    ),
    Method(
        "paced",
        "PACED: Distillation at the Frontier of Student Competence",
        2026,
        "distillation",
        "recipe",
        "Weigh problems by how often the student solves them: most where that is sometimes.",
        "distillation:paced",
    ),
    Method(
        "recursive-meta-distillation",
        "Recursive Meta-Distillation: An Axiomatic Framework for Iterative Knowledge Refinement",
        2026,
        "distillation",
        "recipe",
        "Distil generation after generation, each drawn back to the first teacher, so that errors do not add up.",
        "distillation:recursive_meta_distillation",
    ),
    Method(
        "transfer-limits",
        "Towards the Fundamental Limits of Knowledge Transfer over Finite Domains",
        2023,
        "distillation",
        "recipe",
        "Learn from the log-probabilities of the labels alone, at the best rate that is possible.",
        "distillation:transfer_limits",
    ),
    Method(
        "sinkd",
        "Sinkhorn Distance Minimization for Knowledge Distillation",
        2024,
        "distillation",
        "recipe",
        "Carry the student's laws over a batch to the teacher's by entropic transport, beside the KL at each token.",
        "transport:sinkd",
    ),
    Method(
        "scrg-dac-kl",
        "Multi-Granularity Semantic Revision for Large Language Model Distillation",
        2024,
        "distillation",
        "recipe",
        "Match the teacher's likely tokens and their neighbours on responses that it put right at their worst token.",
        "revision:scrg_dac_kl",
    ),
    Method(
        "vocabulary-expansion",
        "KL-based self-distillation for large language models",
        2025,
        "distillation",
        "recipe",
        "Teach a model new tokens by what it said about their pieces before.",
        "distillation:vocabulary_expansion",
    ),
    Method(
        "miniplm",
        "MiniPLM: Knowledge Distillation for Pre-Training Language Models",
        2024,
        "distillation",
        "recipe",
        "Pre-train on the texts that a teacher reads well and a small model does not.",
        "selection:miniplm",
        "leibler select difference",
    ),
    Method(
        "llkd",
        "Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data",
        2024,
        "distillation",
        "recipe",
        "Learn from the labels that the teacher is sure of and the student is not.",
        "selection:llkd",
        "leibler select confident",
    ),
    Method(
        "tcod",
        "TCOD: Exploring Temporal Curriculum in On-Policy Distillation for Multi-turn Autonomous Agents",
        2026,
        "distillation",
        "recipe",
        "On-policy distillation of agents on dialogues that grow longer, from the front or from the back.",
        "agents:tcod",
    ),
    Method(
        "gere",
        "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay",
        2025,
        "distillation",
        "recipe",
        "Learn a task without forgetting: replay a few general texts, and keep hidden states where they were there.",
        "replay:gere",
    ),
    Method(
        "ppo",
        "Proximal Policy Optimization Algorithms",
        2017,
        "policy",
        "recipe",
        "Rewards with a critic, a clipped ratio, and a KL penalty to the reference inside the reward.",
        "policy:ppo",
    ),
    Method(
        "grpo",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        2024,
        "policy",
        "recipe",
        "Rewards without a critic: each response is judged against the others to the same prompt.",
        "policy:grpo",
    ),
    Method(
        "disco",
        "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization",
        2025,
        "policy",
        "recipe",
        "Score right answers above wrong ones, with the KL to the old policy held as a constraint.",
        "policy:disco",
    ),
    Method(
        "dpo",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        2023,
        "preference",
        "recipe",
        "Learn from pairs of responses without a reward model.",
        "preference:dpo",
    ),
    Method(
        "f-dpo",
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        2023,
        "preference",
        "recipe",
        "DPO with another f-divergence in place of the reverse KL, to trade alignment against diversity.",
        "preference:f_dpo",
    ),
    Method(
        "inpo",
        "Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning",
        2024,
        "preference",
        "recipe",
        "Self-play towards the Nash policy of a preference that no reward explains.",
        "preference:inpo",
    ),
    Method(
        "llada",
        "Large Language Diffusion Models",
        2025,
        "distillation",
        "recipe",
        "Teach a masked language model to fill in completions: the first stage of a diffusion language model.",
        "diffusion:llada",
    ),
    Method(
        "tad",
        "TAD: Temporal-Aware Trajectory Self-Distillation for Fast and Accurate Diffusion LLM",
        2026,
        "distillation",
        "recipe",
        "Teach a diffusion language model to reveal several tokens in one forward pass, from its own decoding.",
        "diffusion:tad",
    ),
    Method(
        "latent-sft",
        "Latent Reasoning in LLMs as a Vocabulary-Space Superposition",
        2025,
        "distillation",
        "recipe",
        "Teach a model to think in laws over its vocabulary instead of words, in fewer steps than its reasoning has.",
        "latent:latent_sft",
    ),
    Method(
        "memorization-dynamics",
        "Memorization Dynamics in Knowledge Distillation for Language Models",
        2026,
        "measurement",
        "measurement",
        "What a distilled model recites of its training texts, and from whom it has it.",
        "leibler.measure.memorisation:inheritance",
        "leibler measure memorisation",
    ),
    Method(
        "kd-fidelity",
        "On the Generalization vs Fidelity Paradox in Knowledge Distillation",
        2025,
        "measurement",
        "measurement",
        "What distillation gained, how often student and teacher agree, and which errors were taken over.",
        "leibler.measure.fidelity:fidelity",
        "leibler measure agreement",
    ),
)
"""Every method by its slug, in the order in which `leibler methods` lists them."""
