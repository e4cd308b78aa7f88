"""Assignment: scores in, couplings out. Pure mathematics that knows no network."""

from weldnet.assignment._cluster import cluster
from weldnet.assignment._coupling import Coupling, NestedPlan, Permutation, Plan
from weldnet.assignment._injection import injection, targets_of
from weldnet.assignment._linear import Table, best_permutation, score_table, solve_table
from weldnet.assignment._nested import BlockPlans, as_blocks, as_matrix, best_inside, block_sinkhorn, fit_inside, unfold
from weldnet.assignment._sinkhorn import Potentials, sinkhorn, standardise
from weldnet.assignment._transport import entropic_plan, exact_plan

__all__ = [
    "BlockPlans",
    "Coupling",
    "NestedPlan",
    "Permutation",
    "Plan",
    "Potentials",
    "Table",
    "as_blocks",
    "as_matrix",
    "best_inside",
    "best_permutation",
    "block_sinkhorn",
    "cluster",
    "entropic_plan",
    "exact_plan",
    "fit_inside",
    "injection",
    "score_table",
    "sinkhorn",
    "solve_table",
    "standardise",
    "targets_of",
    "unfold",
]
