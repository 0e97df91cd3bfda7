"""Assembles the report of a pruning run."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spap_jax.data.tokens import further_of
from spap_jax.models import FAMILIES, architecture_of, cost
from spap_jax.pruning.run import sparsities
from spap_jax.report.account import data_account, versions
from spap_jax.report.advice import advice
from spap_jax.report.schema import (
    Biases,
    Change,
    Check,
    DataAccount,
    LayerReport,
    MethodAccount,
    PrunedModel,
    PruneReport,
    Widths,
)
from spap_jax.solver.methods import update_used
from spap_jax.storage.location import public_name

if TYPE_CHECKING:
    from spap_jax.pruning.run import Run


def new_report(run: "Run", name: str, tokens: Any, steps: Sequence[LayerReport | Check]) -> PruneReport:
    """Assembles the report of a run.

    Args:
        name: The model's name as given by the user; the report contains no path.
        tokens: Calibration tokens: an array [B, T], or ``TokenBlocks`` with a description and a hash.
    """
    config, pruned, settings = run.config, run.pruned, run.settings
    family = FAMILIES[config.family]
    before, after = cost.parameters(family, config), cost.parameters(family, pruned)
    report = PruneReport(
        settings=dataclasses.asdict(settings),
        method=MethodAccount(settings.method, update_used(settings)),
        model=PrunedModel(
            name=public_name(name),
            architecture=architecture_of(family, config),
            in_tower=config.in_tower,
            layers=config.layers,
            intermediate=Change(config.intermediate, pruned.intermediate),
            widths=Widths(config.layer_widths, pruned.layer_widths),
            heads=Change(config.heads, pruned.heads),
            kv_heads=Change(config.kv_heads, pruned.kv_heads),
            mlp_bias=Biases(config.mlp_bias, pruned.mlp_bias),
            parameters=Change(before.total, after.total),
            mlp_parameters=Change(before.mlp, after.mlp),
        ),
        sparsity=sparsities(config, pruned, settings),
        calibration=_fitted(run, tokens),
        versions=versions(),
        layers=tuple(step for step in steps if isinstance(step, LayerReport)),
        joint=tuple(step for step in steps if isinstance(step, Check)),
    )
    return dataclasses.replace(report, advice=advice(report))


def _fitted(run: "Run", tokens: Any) -> DataAccount:
    """Describes the windows that were asked for, and the further ones that were fitted."""
    further, asked = further_of(tokens), data_account(tokens)
    count = run.fitted.real + run.held_out.real - asked.sequences
    if further is None or not count:
        return asked
    words = f"{asked.description}; {count} more for joint steps"
    return dataclasses.replace(asked, description=words, further_sequences=count, further_sha256=further.sha256)
