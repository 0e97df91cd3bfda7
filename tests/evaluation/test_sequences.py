"""Batches over devices: likelihoods as in transformers, tokens as for single prompts, and few compiled shapes."""

import dataclasses

import hf_models
import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spap_jax.errors import UserError
from spap_jax.evaluation import sequences
from spap_jax.evaluation.generation import generate
from spap_jax.evaluation.sequences import Score, batches, continuations, log_likelihoods
from spap_jax.models import decoder
from spap_jax.models.model import Model, Source
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params

NAME = "opt_125m_like"  # learned positions would reveal padding that counts
LENGTHS = (2, 3, 33, 9, 40, 64, 5, 31, 32, 17, 12)
PREDICTED = (1, 2, 32, 1, 7, 20, 0, 30, 3, 1, 1)


def ported() -> Model:
    return Model(*hf_models.port(hf_models.hf_model(NAME)), Source("test", None, "{}"))


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draw = np.random.default_rng(4)
    return [draw.integers(2, 97, length).tolist() for length in lengths]


def placed(model: Model) -> Model:
    return model.replace(params=shard_params(model.config, model.params))


def scored(model: Model, batch_tokens: int) -> list[Score]:
    found = list(log_likelihoods(model, texts(), PREDICTED, batch_tokens))
    assert sum(map(len, found)) == len(LENGTHS)
    return [score for _, score in sorted(item for part in found for item in part.items())]


@pytest.mark.parametrize(("devices", "batch_tokens"), [(1, 128), (8, 64)])
def test_likelihoods_are_those_of_transformers_one_by_one(devices: int, batch_tokens: int) -> None:
    theirs = hf_models.hf_model(NAME)
    with mesh.use_mesh(devices):
        found = scored(placed(ported()), batch_tokens)
    likeliest = []
    for text, count, score in zip(texts(), PREDICTED, found, strict=True):
        tokens = torch.tensor(text)
        with torch.no_grad():
            values = theirs(tokens[None, :-1]).logits[0].double().log_softmax(-1)
        places = torch.arange(len(text) - 1 - count, len(text) - 1)
        expected = float(values[places, tokens[1:][places]].sum())
        likeliest.append(bool((values.argmax(-1) == tokens[1:])[places].all()))
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert [score.is_greedy for score in found] == likeliest


def test_what_the_model_would_write_is_greedy() -> None:
    model = ported()
    text = generate(model, np.array([[5, 9]]), 6, eos=())[0].tolist()
    wrong = [*text[:-2], (text[-2] + 1) % 97, text[-1]]
    both = dict(enumerate([text, wrong]))
    (found,) = log_likelihoods(model, list(both.values()), [6, 6], 4096)
    assert [found[index].is_greedy for index in both] == [True, False]


def of_ones(rows: int, length: int, predicted: int) -> list[np.ndarray]:
    """Arguments of the program that scores, with two choices."""
    shapes = (rows, length), (rows, predicted), (rows, predicted, 2), (rows, predicted)
    return [np.ones(shape, bool if number == 3 else np.int32) for number, shape in enumerate(shapes)]


def test_choices_of_one_token_pass_through_the_model_once() -> None:
    model, [text, other] = ported(), texts((40, 40))
    asked = [text, [*text[:-1], 7], other, [*text[:-1], 8], text]
    (one, two) = log_likelihoods(model, asked, [1] * 4 + [3], 48 * 2)
    assert [sorted(one), sorted(two)] == [[0, 1, 2, 3], [4]]
    for number, sequence in enumerate(asked[:4]):
        ((score,),) = [part.values() for part in log_likelihoods(model, [sequence], [1], 48)]
        assert one[number].log_likelihood == pytest.approx(score.log_likelihood, abs=1e-5)
        assert one[number].is_greedy == score.is_greedy


def test_every_device_scores_its_own_share() -> None:
    with mesh.use_mesh(8):
        model = placed(ported())
        arrays = [*map(mesh.shard_chunks, of_ones(16, 32, 4))]
        compiled = sequences._score.lower(model.config, model.params, *arrays).compile()
        words = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        assert not [word for word in words if word in (compiled.as_text() or "")]
        sums, _ = compiled(model.params, *arrays)
    assert {shard.data.shape for shard in sums.addressable_shards} == {(2, 2)}
    assert len({shard.device for shard in sums.addressable_shards}) == 8


def test_new_lengths_compile_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def compiled(*lengths: int) -> bool:
        caplog.clear()
        with jax.log_compiles():
            list(log_likelihoods(model, texts(lengths), [1] * len(lengths), 4096))
        return any("Compiling jit(_score)" in record.getMessage() for record in caplog.records)

    with mesh.use_mesh(2):  # for which no other test compiles anything
        model = placed(ported())
        assert compiled(20, 20, 20)
        assert not compiled(2, 7, 21, 33)
        assert compiled(2, 7, 21, 34)
        assert not compiled(40, 49)


def test_the_logits_of_a_few_tokens_are_held_at_once() -> None:
    config = dataclasses.replace(ported().config, vocabulary=6000)
    params = decoder.init(config, jax.random.key(0))
    sizes = sequences._score.lower(config, params, *of_ones(1, 1024, 1024)).compile().memory_analysis()
    assert sizes is not None
    assert sizes.temp_size_in_bytes < 1024 * 6000 * 4 / 2


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    batch_tokens=st.integers(1, 300),
    devices=st.sampled_from([1, 3, 8]),
    following=st.integers(0, 50),
)
def test_batches(lengths: list[int], batch_tokens: int, devices: int, following: int) -> None:
    found = list(batches(lengths, 100, batch_tokens, devices, following))
    assert sorted(member for batch in found for member in batch.members) == list(range(len(lengths)))
    for batch in found:
        assert 0 < len(batch.members) <= batch.rows
        assert batch.rows % devices == 0
        assert max(lengths[member] for member in batch.members) <= batch.length
        assert batch.length in (32, 48, 64, 96, 100)
        share = batch.rows // devices
        assert share == 1 or share * (batch.length + following) <= batch_tokens
    assert len({batch[1:] for batch in found}) == len({batch.length for batch in found})
    assert [batch.length for batch in found] == sorted((batch.length for batch in found), reverse=True)


@pytest.mark.parametrize("devices", [1, 8])
def test_continuations_are_those_of_one_prompt_at_a_time(devices: int) -> None:
    model, prompts = ported(), texts((3, 40, 33, 1, 12, 20, 31, 2, 5))
    with mesh.use_mesh(devices):
        parts = list(continuations(placed(model), prompts, 40, lambda tokens: False, 256))
    assert len(parts) == (4 if devices == 1 else 2)  # two or three sequences at a time, counting new tokens
    found = {index: tokens for part in parts for index, tokens in part.items()}
    for index, prompt in enumerate(prompts):
        together = np.pad(prompt, (40 - len(prompt), 0))[None, :]
        alone = generate(model, together, 40, valid=np.arange(40)[None, :] >= 40 - len(prompt), eos=())
        assert found[index] == alone[0, 40:].tolist()


def test_writing_stops_when_all_texts_have_ended() -> None:
    prompts, seen = texts((3, 4)), []

    def ended(tokens: list[int]) -> bool:
        seen.append(len(tokens))
        return len(tokens) > 32

    (found,) = continuations(ported(), prompts, 96, ended, 4096)
    assert [len(found[index]) for index in range(2)] == [64, 64]
    assert set(seen) == {32, 64}


def test_a_token_that_the_model_does_not_know() -> None:
    with pytest.raises(UserError, match="token ids from 97 to 97, but the model's go from 0 to 96"):
        list(log_likelihoods(ported(), [[3, 97]], [1], 4096))
