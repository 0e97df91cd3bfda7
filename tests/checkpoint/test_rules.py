"""The families' rule tables: every rule is invertible, and together they give the tensors of the real models."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from spap_jax.checkpoint.inventory import expected_tensors, joined
from spap_jax.models import decoder
from spap_jax.models.registry import FAMILIES, decoder_of
from spap_jax.models.towers import tower_of

CONFIGS = Path(__file__).parents[1] / "configs"
RULES = sorted({rule for family in FAMILIES.values() for rule in family.rules})
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.fixed_dictionaries({letter: st.integers(1, 4) for letter in "vdefnmhp"}),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_every_rule_can_be_inverted(sizes: dict[str, int], dtype: type, seed: int):
    for rule in RULES:
        theirs, ours = rule.shapes(sizes)
        bits = np.random.default_rng(seed).bytes(int(np.prod(theirs)) * np.dtype(dtype).itemsize)
        tensor = np.frombuffer(bits, dtype).reshape(theirs)
        array = rule.read(tensor, sizes)
        again = rule.write(array, sizes)
        assert array.shape == ours
        assert array.dtype == again.dtype == dtype
        assert np.shares_memory(array, tensor)
        assert again.flags.c_contiguous
        assert again.shape == theirs
        assert again.tobytes() == bits
        assert sorted(array.view(f"u{array.itemsize}").flat) == sorted(tensor.view(f"u{array.itemsize}").flat)


def real_models() -> list[str]:
    """Returns names of the published configs, one for each set of tensors."""
    named = {file.stem: json.loads(file.read_bytes()) for file in sorted(CONFIGS.glob("*.json"), reverse=True)}
    return sorted({str(expected_tensors(decoder_of(t)[1])): name for name, t in named.items()}.values())


@pytest.mark.parametrize("name", real_models())
def test_real_models(name: str):
    theirs = json.loads((CONFIGS / f"{name}.json").read_bytes())
    config = decoder_of(theirs)[1]
    shapes = {name: tensor.shape for name, tensor in expected_tensors(config).items()}
    expected = joined(config, shapes, lambda parts: (sum(rows for rows, _ in parts), parts[0][1]))
    auto = transformers.AutoModelForImageTextToText if tower_of(theirs) else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(transformers.AutoConfig.for_model(**theirs))
    stock = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stock = {name: shape for name, shape in stock.items() if name.startswith((config.prefix, config.head_name))}
    if config.tied:
        del stock["lm_head.weight"]
    assert expected == stock

    tree = decoder.shapes(config)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = {jax.tree_util.keystr(at, simple=True, separator="/"): leaf.shape for at, leaf in leaves}
    rules = FAMILIES[config.family].rules_for(config)
    assert {rule.ours for rule in rules} == shapes.keys()
    for rule in rules:
        ours = rule.shapes(config.axes)[1]
        assert shapes[rule.ours] == ((config.layers, *ours) if rule.stacked else ours)
