"""Experiments: the tables of the papers, and ours, as data; trained, fused and recorded by one runner.

A *table* (``tables/*.yaml``) at a *scale* is a *study*; a study is made of *cells*, each done in any process; what they
find goes as records into the run's folder (:mod:`weldnet.records`). See ``docs/experiments.md``.
"""

from __future__ import annotations

from weldnet.experiments._cells import Cell, Context, Made, Outcome, hashed
from weldnet.experiments._config import SCALES, Study, Table, load_table, resolve, table_names
from weldnet.experiments._kinds import KINDS, StudyKind
from weldnet.experiments._networks import NetworkSpec, Trained, keep, obtain
from weldnet.experiments._pool import Executor, Here, Local, Watch, available_memory
from weldnet.experiments._ray import RayCluster
from weldnet.experiments._run import Done, Observer, plan, run_study
from weldnet.experiments._summary import Line, summarise

__all__ = [
    "KINDS",
    "SCALES",
    "Cell",
    "Context",
    "Done",
    "Executor",
    "Here",
    "Line",
    "Local",
    "Made",
    "NetworkSpec",
    "Observer",
    "Outcome",
    "RayCluster",
    "Study",
    "StudyKind",
    "Table",
    "Trained",
    "Watch",
    "available_memory",
    "hashed",
    "keep",
    "load_table",
    "obtain",
    "plan",
    "resolve",
    "run_study",
    "summarise",
    "table_names",
]
