"""The budgets that one student is trained and judged at."""

from __future__ import annotations

import dataclasses

from sparsifiner_edge.config import SparsityConfig, parse_merge, parse_token_keep
from sparsifiner_edge.distill.recipe import Budgets, parse_point
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.plan import LayerPlan


def judged_budgets(given: Budgets, own: SparsityConfig, plan: LayerPlan) -> list[SparsityConfig]:
    """Every keep with every merge, and where pruning is learnt, with and without; `plan` is of `own`.

    Layers that are dense in the student have no predictor, and stay dense.

    Raises:
        ConfigError: other pruning than the student's own is to be learnt.
    """
    if given.keep and own.keep != 1:
        dense = tuple(layer for layer, share in enumerate(plan.keep) if share == 1)
        kept = [dataclasses.replace(own, keep=keep, dense_layers=dense) for keep in given.keep]
    else:
        kept = [own]
    merges = tuple(map(parse_merge, given.merge)) or (own.merge,)
    configs = [dataclasses.replace(config, merge=merge) for merge in merges for config in kept]
    if given.points:
        points = map(parse_point, given.points)
        configs = [dataclasses.replace(own, merge=merge, keep=keep, dense_layers=()) for merge, keep in points]
    pruned = parse_token_keep(given.token_keep)
    if pruned and own.token_keep not in ((), pruned):
        raise ConfigError(
            f"budgets.token_keep is {given.token_keep}, but this student prunes tokens by itself.",
            "Leave it out, or begin with a student that keeps all tokens.",
        )
    if pruned and not own.token_keep:
        configs += [dataclasses.replace(config, token_keep=pruned) for config in configs]
    return configs
