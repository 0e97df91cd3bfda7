"""Achieved sparsity is shown beside the requested one where they differ, with a warning if hardly anything is left."""

import dataclasses
import warnings

import pytest
from hf_models import VARIANTS

from spap_jax import PruneSettings, SpapWarning
from spap_jax.models.registry import family_of
from spap_jax.pruning.run import pruned_config, sparsities, warn_of_settings

_WIDE = VARIANTS["qwen2_two_kv_heads"] | {"intermediate_size": 320, "architectures": ["Qwen2ForCausalLM"]}
CONFIG = family_of(_WIDE).read_config(_WIDE)


def said(**settings) -> list[str]:
    chosen = PruneSettings(**settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_settings(CONFIG, chosen)
    assert {each.category for each in caught} <= {SpapWarning}
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 0.3}, "30 % of the MLP channels"),
        ({"sparsity": 0.3, "round_to": 32}, "30 % of the MLP channels"),
        ({"sparsity": 0.3, "round_to": 300}, "6.2 % of the MLP channels (30 % asked for)"),
        ({"sparsity": 0.5, "attention_sparsity": 0.5}, "50 % of the MLP channels and 50 % of the attention heads"),
        ({"attention_sparsity": 0.99}, "30 % of the MLP channels and 50 % of the attention heads (99 % asked for)"),
    ],
)
def test_the_words(settings: dict, words: str):
    chosen = PruneSettings(**settings)
    assert sparsities(CONFIG, pruned_config(CONFIG, chosen), chosen).words == words


def test_layers_that_differ_in_width_count_together():
    narrow = pruned_config(CONFIG, PruneSettings(sparsity=0.5)).with_widths([100, 160, 220])
    assert sparsities(CONFIG, narrow, PruneSettings(sparsity=0.5)).channels.achieved == 0.5


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (
            {"round_to": 300},
            "sparsity 0.3 removes 6.2 % of the MLP channels: 300 of 320 stay in a layer, rounded to a m",
        ),
        ({"sparsity": 0.999}, "sparsity 0.999 removes nearly all MLP channels (1 of 320 stay in a layer): "),
        (
            {"attention_sparsity": 0.99},
            "attention sparsity 0.99 removes 50 % of heads, which stay whole",
        ),
    ],
)
def test_warnings(settings: dict, start: str):
    (sentence,) = said(**settings)
    assert sentence.startswith(start)


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.9}, {"attention_sparsity": 0.5}, {"round_to": 32}])
def test_what_was_asked_for_needs_no_warning(settings: dict):
    assert said(**settings) == []


def test_the_warning_names_the_line_of_who_asked():
    with pytest.warns(SpapWarning) as caught:
        warn_of_settings(CONFIG, PruneSettings(sparsity=0.999))
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize(
    ("heads", "sparsity", "lost"), [(8, 0.25, "4 or 8"), (8, 0.5, ""), (4, 0.25, "2 or 4"), (6, 0.5, "2")]
)
def test_heads_that_servers_cannot_divide(heads: int, sparsity: float, lost: str, recwarn: pytest.WarningsRecorder):
    config = dataclasses.replace(CONFIG, heads=2 * heads, kv_heads=heads)
    warn_of_settings(config, PruneSettings(attention_sparsity=sparsity))
    assert [f"among {lost} devices" in str(each.message) for each in recwarn] == [True] * bool(lost)
