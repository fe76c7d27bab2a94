"""The engine: recipes, sources, stages, models, the loop.

Examples:
    >>> from leibler.train import Data, OnPolicy, Recipe, Schedule, fit
"""

from leibler.train.episodes import Demonstrated, Episodes
from leibler.train.latents import Latents
from leibler.train.loop import Run, fit
from leibler.train.masking import Masked
from leibler.train.models import EMA, Frozen, Measured, ModelRule, Snapshot, Trained, ValueHead
from leibler.train.options import Options
from leibler.train.pairs import Paired
from leibler.train.pipeline import Pipeline, TrainingStage, recipes_of
from leibler.train.plan import describe
from leibler.train.recipe import Recipe, Schedule
from leibler.train.repair import Repair
from leibler.train.replay import Adaptive, Fixed, RaiseOnWorse, Replay
from leibler.train.selected import Filtered, PassRate, Selected
from leibler.train.sources import Context, Data, Mixture, OnPolicy, Sampled, Source
from leibler.train.stages import Answer, AnswerJudge, BestAndWorst, Keep, MuteEqual, Score, WinRate
from leibler.train.trajectories import Trajectories

__all__ = [
    "EMA",
    "Adaptive",
    "Answer",
    "AnswerJudge",
    "BestAndWorst",
    "Context",
    "Data",
    "Demonstrated",
    "Episodes",
    "Filtered",
    "Fixed",
    "Frozen",
    "Keep",
    "Latents",
    "Masked",
    "Measured",
    "Mixture",
    "ModelRule",
    "MuteEqual",
    "OnPolicy",
    "Options",
    "Paired",
    "PassRate",
    "Pipeline",
    "RaiseOnWorse",
    "Recipe",
    "Repair",
    "Replay",
    "Run",
    "Sampled",
    "Schedule",
    "Score",
    "Selected",
    "Snapshot",
    "Source",
    "Trained",
    "TrainingStage",
    "Trajectories",
    "ValueHead",
    "WinRate",
    "describe",
    "fit",
    "recipes_of",
]
