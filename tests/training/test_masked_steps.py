"""Training and joint steps on text with a mask: the predictions of its tokens count, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import FULL, counting, tiny

import spap_jax as spap
from spap_jax.data.tokens import TokenBlocks
from spap_jax.evaluation.perplexity import compare
from spap_jax.parallel import mesh
from spap_jax.parallel.sequences import Sequences
from spap_jax.settings import PruneSettings
from spap_jax.training.loop import rows_of
from spap_jax.training.optimizers import clipped
from spap_jax.training.step import Frozen, Job, Recipe, begin, measure, step

TOKENS = counting()
MASK = np.random.default_rng(1).random(TOKENS.shape) < 0.4
BLOCKS = TokenBlocks(TOKENS, "", len(TOKENS), MASK)
WHOLE = FULL.replace(steps=1, check_every=1, step_sequences=12, batch_tokens=24)
"""One step on all sequences that are not held out."""


def part(rows: slice) -> spap.TokenBlocks:
    return TokenBlocks(TOKENS[rows], "", len(TOKENS), MASK[rows])


@pytest.mark.parametrize("teacher", [None, "llama_biases"])
def test_recovery_training(teacher: str | None):
    model, dense = tiny(), tiny(teacher) if teacher else None

    def expected(rows: slice) -> tuple[float, float | None]:
        if dense is None:
            return float(np.log(spap.perplexity(model, part(rows)))), None
        found = compare(dense, model, TOKENS[rows], mask=MASK[rows])
        return found.divergence, found.agreement

    report = spap.finetune(model, BLOCKS, teacher=dense, settings=WHOLE).report
    opening, (held_out, agreement) = report.checks[0], expected(slice(12, None))
    assert opening.held_out == pytest.approx(held_out, rel=1e-5)
    assert opening.agreement == (agreement and pytest.approx(agreement, abs=1e-6))
    assert report.losses[0] == pytest.approx(expected(slice(12))[0], rel=1e-4)
    assert report.data.sha256 == BLOCKS.sha256


def test_joint_steps():
    """The prediction after the last token, which counts without a mask, is of no token and so not of the mask's."""
    settings = PruneSettings(sparsity=0.5, rounds=0, held_out=0.25, batch_tokens=48, joint_passes=1)
    model = tiny()
    result = spap.prune(model, BLOCKS, settings=settings.replace(joint_passes=0))
    first, *_ = spap.prune(model, BLOCKS, settings=settings).report.joint
    without, [alone] = result.model, result.report.joint
    expected = spap.divergence(model, without, part(slice(12, None)))
    assert first.held_out == pytest.approx(expected, rel=1e-4)
    assert (alone.held_out, alone.agreement) == pytest.approx((expected, first.agreement), rel=1e-4)
    assert first.held_out != pytest.approx(spap.divergence(model, without, TOKENS[12:]), rel=1e-2)


def test_devices_and_fillers_change_nothing():
    """Of ten sequences, each of eight devices has two, and six fill up; the sequences are on the devices in parts."""
    found = []
    for count in (1, 8):
        with mesh.use_mesh(count):
            params = jax.device_get(tiny().params)
            job = Job(tiny().config, Recipe(clipped, (0.0,)), "float32")
            sequences = Sequences(TOKENS[:, None], len(TOKENS), MASK[:, None]).sharded()
            rows = rows_of(np.arange(10), sequences, 24)
            state = begin(job, jax.tree.map(jnp.asarray, params))
            loss = float(measure(job, Frozen({}), sequences, state.moved, rows).loss)
            after, first = step(job, Frozen({}), sequences, state, rows, np.float32(1e-3))
            assert float(first) == pytest.approx(loss, rel=1e-5)
            found.append((loss, jax.device_get(after.moved)))
    assert found[0][0] == pytest.approx(float(spap.loss(tiny(), part(slice(10)))), rel=1e-5)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
