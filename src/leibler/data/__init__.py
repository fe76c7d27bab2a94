"""Records from files, tasks with exact checkers, and a text corpus that every machine has."""

from __future__ import annotations

from leibler.data.checkers import matches_answer, normalised
from leibler.data.corpus import Document, stdlib, stdlib_documents
from leibler.data.hashing import digest, generator, permutation
from leibler.data.load import load
from leibler.data.records import Checker, Dataset, Record, SetAside
from leibler.data.tasks import TASKS, Addition, Brackets, Countdown, Task, tasks

__all__ = [
    "TASKS",
    "Addition",
    "Brackets",
    "Checker",
    "Countdown",
    "Dataset",
    "Document",
    "Record",
    "SetAside",
    "Task",
    "digest",
    "generator",
    "load",
    "matches_answer",
    "normalised",
    "permutation",
    "stdlib",
    "stdlib_documents",
    "tasks",
]
