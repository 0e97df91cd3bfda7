"""Plans: whether a run fits, what would make it fit, and the sizes of a run."""

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from loads import LLAMA, config_of

from spap_jax.data.tokens import POOL, new_blocks
from spap_jax.errors import UserError
from spap_jax.models import cost
from spap_jax.models.registry import FAMILIES, family_of
from spap_jax.parallel import mesh
from spap_jax.planning import memory
from spap_jax.planning.accelerators import Mesh, mesh_named
from spap_jax.planning.plan import Request, corrected, notes, plan, verdict
from spap_jax.planning.programs import work
from spap_jax.planning.workload import workload
from spap_jax.pruning.run import calibration_chunks
from spap_jax.settings import FinetuneSettings, FloatDtype, PruneSettings, Schedule

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))


def theirs(name: str) -> dict:
    return json.loads(next(file for file in CONFIGS if file.stem == name).read_text())


def request_of(name: str, **changes) -> Request:
    whole = Request(config_of(theirs(name)), PruneSettings(), sequences=128, length=2048, weight_bytes=2)
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize("held_out", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("sequences", "count"), [(64, 8), (24, 2), (13, 4), (8, 8), (1, 1)])
def test_sequences_are_divided_as_the_pipeline_divides_them(sequences: int, count: int, held_out: float):
    settings = PruneSettings(held_out=held_out, batch_tokens=32)
    load = workload(config_of(LLAMA), settings, sequences, 16, count)
    own, more = (np.zeros((number * sequences, 16), int) for number in (1, POOL - 1))
    tokens = new_blocks(own, "", len(own), further=new_blocks(more, "", len(more)))
    with mesh.use_mesh(count):
        for part, chunks in zip(load.parts, calibration_chunks(tokens, settings), strict=True):
            assert (part.count, part.sequences, part.length) == chunks.tokens.shape
            assert part.real == chunks.real
            assert part.divided == mesh.shards_evenly(chunks.tokens)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_weights_are_counted_once(file: Path):
    found = family_of(json.loads(file.read_text()))
    config = found.read_config(json.loads(file.read_text()))
    total = config.layers * memory.block_elements(config) + memory.outer_elements(config)
    assert total == cost.parameters(found, config).total


@pytest.mark.parametrize(
    ("sizes", "tried", "more"),
    [
        ((1,), "Fewer sequences do not make it fit", " or more, or more devices that share the weights."),
        ((1, 2), "Neither fewer sequences nor more devices make it fit", " or more."),
    ],
)
def test_the_largest_model_fits_no_single_chip_and_no_setting_helps(sizes: tuple[int, ...], tried: str, more: str):
    """The devices of this machine cannot become more here, but may be on another."""
    one = mesh_named("v6e-1")
    planned = plan(request_of("llama-3.1-405b"), one._replace(accelerator=one.accelerator._replace(sizes=sizes)))
    assert not planned.fits
    assert planned.memory["selection"]["weights"] > 600e9  # all pruned blocks, for the joint steps
    expected = f"{tried}: even with --effort low --batch-tokens 2048 and 2 sequences the phase 'joint steps'"
    assert expected in verdict(planned)
    assert re.search(r"It takes devices with [\d.]+ GB" + re.escape(more) + "$", verdict(planned))


def test_groups_and_not_devices_need_a_sequence_each():
    mesh = mesh_named("v5e-8").shared_among(8)
    planned = plan(request_of("llama-3.1-70b", sequences=8, settings=PruneSettings(joint_blocks=0)), mesh)
    assert not planned.fits
    larger = re.search(r"(v5e-\d+) in place of v5e-8", verdict(planned))
    assert larger
    assert plan(planned.request, mesh_named(larger[1]).shared_among(8)).fits


def test_low_effort_is_no_remedy_for_passes_that_were_asked_for():
    """They stay when --effort low is added to the command."""
    settings = PruneSettings(joint_passes=16, joint_blocks=0)
    planned = plan(request_of("llama-3.1-8b", settings=settings), mesh_named("h100x1"))
    assert "It would fit with --sequences 16, or with h100x2 in place of h100x1." in verdict(planned)


def changed(request: Request, mesh: str, words: str) -> tuple[Request, Mesh]:
    """Apply a suggested remedy to a request and a mesh."""
    number = {name: int(value) for name, value in re.findall(r"--([a-z-]+) (\d+)", words)}
    settings = request.settings.replace(batch_tokens=number.get("batch-tokens", request.settings.batch_tokens))
    settings = settings.replace(round_to=number.get("round-to", settings.round_to))
    settings = settings.replace(joint_blocks=number.get("joint-blocks", request.settings.joint_blocks))
    settings = settings.replace(joint_weights="mlp") if "--joint-weights mlp" in words else settings
    if effort := re.search(r"--effort (\w+)", words):
        settings = settings.replace(effort=effort[1])
    settings = settings.replace(stream_dtype="bfloat16") if "--stream-dtype bfloat16" in words else settings
    request = dataclasses.replace(request, settings=settings, sequences=number.get("sequences", request.sequences))
    larger = re.search(r"(\S+) in place of", words)
    return request, mesh_named(larger[1] if larger else mesh).shared_among(number.get("model-devices", 1))


@pytest.mark.parametrize(
    ("name", "mesh", "sequences", "expected"),
    [
        ("llama-3.1-8b", "v5e-4", 128, ["--joint-blocks 16", "--effort low", "v5e-8 in place of v5e-4"]),
        ("llama-3.1-70b", "h100x8", 128, ["--joint-weights mlp", "--effort low"]),
        (
            "llama-3.1-70b",
            "v5e-8",
            128,
            [
                "--model-devices 2 and v5e-64 in place of v5e-8",
                "--effort low --batch-tokens 2048 --model-devices 2 and v5e-16 in place of v5e-8",
            ],
        ),
        ("llama-3.1-8b", "h100x2", 4096, ["--sequences 1024", "h100x8 in place of h100x2"]),
        (
            "llama-3.1-8b",
            "v5e-8",
            1536,
            ["--stream-dtype bfloat16", "--sequences 768", "v5e-16 in place of v5e-8"],
        ),
        ("llama-3.1-70b", "h100x8", 4096, ["--effort low --batch-tokens 2048 --sequences 2048"]),
        (
            "qwen2.5-0.5b",
            "v5e-4",
            4096,
            ["--stream-dtype bfloat16", "--sequences 2048", "v5e-8 in place of v5e-4"],
        ),
    ],
)
def test_what_would_make_it_fit_does(name: str, mesh: str, sequences: int, expected: list[str]):
    check_remedy(name, mesh, sequences, expected, PruneSettings(batch_tokens=16384 if "qwen" in name else 4096))


def check_remedy(name: str, mesh: str, sequences: int, expected: list[str], settings: PruneSettings):
    request = request_of(name, sequences=sequences, settings=settings.replace(joint_blocks=0))
    planned = plan(request, mesh_named(mesh))
    assert not planned.fits
    remedy = re.search(r"It would fit with (.*)\.$", verdict(planned))
    assert remedy, verdict(planned)
    assert remedy[1].split(", or with ") == expected
    for words in expected:
        other, larger = changed(request, mesh, words)
        assert plan(other, larger).fits


@pytest.mark.parametrize(
    ("name", "mesh", "together"),
    [("llama-3.1-8b", "v5e-8", None), ("llama-3.1-8b", "v5e-4", 16), ("llama-3.1-70b", "h100x8", 40)],
)
def test_joint_steps_adjust_as_many_blocks_as_fit(name: str, mesh: str, together: int | None):
    request = request_of(name)
    planned = plan(request, mesh_named(mesh))
    assert planned.fits
    assert planned.request.settings == request.settings.replace(joint_blocks=together)
    layers = request.config.layers
    said = f"Joint steps adjust {together} of {layers} blocks at a time (--joint-blocks)."
    assert (said in notes(planned)) == (together is not None)
    if together:  # as its user may also ask for
        more = next(count for count in range(together + 1, layers + 1) if layers % count == 0)
        given = request.settings.replace(joint_blocks=more)
        assert not plan(dataclasses.replace(request, settings=given), mesh_named(mesh)).fits


def test_what_a_compiler_says_takes_the_place_of_the_count():
    counted = plan(request_of("llama-3.1-8b"), mesh_named("v5e-8"))
    assert counted.fits
    known = corrected(counted, {"selection": 20e9, "errors": 1e9})  # errors are not counted
    assert sum(known.memory["selection"].values()) == pytest.approx(20e9)
    assert {name: parts for name, parts in known.memory.items() if name != "selection"} == {
        name: parts for name, parts in counted.memory.items() if name != "selection"
    }
    assert verdict(known).startswith("it does not fit: a device needs 20 GB in the phase 'selection' and has 14.4 GB")
    remedy = re.search(r"v5e-(\d+) in place of v5e-8", verdict(known))
    assert remedy
    larger = plan(known.request, mesh_named(f"v5e-{remedy[1]}"))
    assert larger.fits
    assert sum(larger.memory["selection"].values()) > sum(counted.memory["selection"].values())


def test_moments_are_planned_in_bfloat16_so_that_an_8b_model_fits_one_gpu():
    default, exact = (
        plan(
            request_of("llama-3.1-8b", settings=PruneSettings(moment_dtype=dtype, joint_blocks=0)), mesh_named("h100x1")
        )
        for dtype in (PruneSettings().moment_dtype, "float32")
    )
    assert default.fits
    assert not exact.fits
    steps = [each.memory["joint steps"]["gradients"] for each in (default, exact)]
    assert steps[0] == pytest.approx(steps[1] * 12 / 16)


def test_training_of_an_8b_model_needs_less_with_updates_than_with_all_weights():
    updates, full = (
        plan(request_of("llama-3.1-8b", training=FinetuneSettings(full=full)), mesh_named("h100x1"))
        for full in (False, True)
    )
    assert {phase.name for phase in updates.phases} == set(updates.memory) == {"steps", "checks"}
    assert updates.fits
    assert 1.05 < full.phases[0].operations / updates.phases[0].operations < 1.3  # the gradients of the weights
    assert not full.fits
    assert verdict(full).endswith("It would fit with --finetune lora, or with h100x2 in place of h100x1.")
    divided = plan(full.request, mesh_named("h100x2"))
    assert divided.fits
    assert divided.memory["steps"]["gradients"] == full.memory["steps"]["gradients"] / 2


def test_devices_share_the_tokens_and_the_solver():
    request = request_of("llama-3.1-8b", settings=PruneSettings(joint_passes=0))
    one, eight = (plan(request, mesh_named(name)) for name in ("h100x1", "h100x8"))
    work = [{phase.name: phase for phase in planned.phases} for planned in (one, eight)]
    assert work[0]["selection"].operations > 4 * work[1]["selection"].operations
    assert work[0]["selection"].sent_bytes == 0 < work[1]["selection"].sent_bytes
    assert work[0]["statistics"].operations / work[1]["statistics"].operations == pytest.approx(8, rel=0.1)
    assert work[0]["statistics"].sent_bytes == 0 < work[1]["statistics"].sent_bytes
    assert one.memory["streams"]["streams"] == 8 * eight.memory["streams"]["streams"]
    assert one.memory["selection"]["solver"] > 5 * eight.memory["selection"]["solver"]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_streams_take_half_the_memory_in_bfloat16(schedule: str):
    settings = PruneSettings(schedule=schedule, joint_passes=0)  # type: ignore[arg-type]
    requests = (
        request_of("llama-3.1-8b", settings=settings.replace(stream_dtype=dtype)) for dtype in get_args(FloatDtype)
    )
    exact, half = (plan(request, mesh_named("h100x1")) for request in requests)
    for name, parts in exact.memory.items():
        assert half.memory[name] == parts | {"streams": parts["streams"] / 2}


def test_in_waves_devices_solve_layers_of_their_own():
    settings = PruneSettings(effort="low", joint_passes=0)
    one, two = (
        plan(request_of("llama-3.1-405b", settings=settings.replace(schedule=name)), mesh_named("v5p-64"))
        for name in ("sequential", "parallel")
    )
    work, waves = ({phase.name: phase for phase in planned.phases} for planned in (one, two))
    assert waves["selection"].sent_bytes < 1e-5 * work["selection"].sent_bytes  # the channels chosen
    assert waves["streams"].operations > work["streams"].operations
    assert 0 < waves["statistics"].sent_bytes < work["statistics"].sent_bytes  # a layer's moments go to its device
    assert {"alternating", "errors"} <= {name for name in work if work[name] == waves[name]}
    assert two.memory["selection"]["solver"] > 5 * one.memory["selection"]["solver"]


def test_what_is_worth_knowing():
    request, mesh = request_of("llama-3.1-8b"), mesh_named("v5p-64")
    assert notes(plan(request, mesh)) == []
    low = request.settings.replace(effort="low")
    assert notes(plan(dataclasses.replace(request, settings=low), mesh)) == []
    [note] = notes(plan(request_of("llama-3.1-8b", sequences=7, settings=low), mesh))
    assert note.startswith("6 sequences to fit are fewer than the 32 devices")
    full = dataclasses.replace(request, sequences=760, settings=request.settings.replace(joint_passes=0))
    [note] = notes(plan(full, mesh_named("h100x1")))
    assert "XLA_CLIENT_MEM_FRACTION=0.95" in note


def test_no_device_is_started_for_a_plan(monkeypatch: pytest.MonkeyPatch):
    """On a GPU it would take three quarters of the memory, beside a run that is going on."""
    monkeypatch.setattr(jax, "device_count", lambda: pytest.fail("JAX would start the devices"))
    assert plan(request_of("llama-3.1-8b", length=1920), mesh_named("h100x1")).seconds > 0


def test_methods_and_updates_leave_out_what_they_do_not_do():
    def phases(**settings) -> dict[str, float]:
        found = work(workload(config_of(LLAMA), PruneSettings(**settings), 16, 64))
        return {phase: each.operations for phase, each in found.items() if each.operations}

    own, wanda, obs, low = phases(), phases(method="wanda"), phases(method="obs"), phases(effort="low")
    assert set(wanda) == {"streams", "statistics", "selection", "refit", "errors"}  # whose moments give errors as well
    assert set(obs) == set(wanda)
    assert set(own) == set(low) == {*obs, "alternating", "joint steps", "joint checks"}
    assert low["joint steps"] < own["joint steps"] / 4  # of the last block alone, on a fourth of the text
    assert own["selection"] == low["selection"]
    assert own["statistics"] > low["statistics"]  # of the text that joint steps read
    assert wanda["selection"] < own["selection"]
    assert wanda["refit"] < obs["refit"]
    heads = phases(attention_sparsity=0.5)
    assert all(heads[name] > own[name] for name in ("statistics", "selection", "refit", "errors"))
    assert heads["streams"] < own["streams"]


@pytest.mark.parametrize(
    ("name", "count", "memory_"),
    [("v5e-8", 8, 16e9), ("v5litepod-16", 16, 16e9), ("v5p-64", 32, 95e9), ("H100x8", 8, 80e9), ("a100x1", 1, 80e9)],
)
def test_names_of_meshes(name: str, count: int, memory_: float):
    mesh = mesh_named(name)
    assert (mesh.devices, mesh.accelerator.memory) == (count, memory_)
    if count > 1:
        assert mesh_named(mesh.with_devices(count // 2).name) == mesh.with_devices(count // 2)


@pytest.mark.parametrize("name", ["", "tpu", "v5e", "v5e-0", "v5e-257", "v5p-7", "h100x16", "h100x-1", "k80x8"])
def test_meshes_that_are_not_there(name: str):
    with pytest.raises(UserError, match=f"there is no mesh '{name}': "):
        mesh_named(name)


_FEW_CHIPS = "v5p-8, v5p-16, v5p-32, v5p-64, v5p-128, v5p-256, v5p-384, v5p-512, ..., v5p-12288"


@pytest.mark.parametrize(
    ("name", "there_are"),
    [
        ("v5e-7", "TPU v5e comes as v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256."),
        ("v5litepod-2", "TPU v5e comes as v5litepod-1, v5litepod-4, "),
        ("v6e-12", "TPU v6e comes as v6e-1, v6e-4, v6e-8, v6e-16, v6e-32, v6e-64, v6e-128, v6e-256."),
        ("v5p-72", f"TPU v5p comes as {_FEW_CHIPS} (the names count TensorCores, two in a chip)."),
        ("v5p-4", "TPU v5p comes as v5p-8, "),
        ("h100x9", "H100 SXM comes as h100x1, h100x2, h100x3, h100x4, h100x5, h100x6, h100x7, h100x8."),
    ],
)
def test_sizes_that_there_are_none_of(name: str, there_are: str):
    with pytest.raises(UserError, match=re.escape(there_are)):
        mesh_named(name)


@pytest.mark.parametrize("name", ["v5p-8", "v5p-32", "v5p-384", "v5p-12288", "v6e-256", "h100x7"])
def test_sizes_that_there_are(name: str):
    assert mesh_named(name).name == name


def test_each_device_writes_its_share_of_the_samples():
    settings = PruneSettings(method="magnitude", sampled=1)
    meshes = mesh_named("h100x1"), mesh_named("h100x8")
    one, eight = (plan(request_of("llama-3.1-8b", settings=settings), mesh) for mesh in meshes)
    work = [next(phase for phase in each.phases if phase.name == "sampling").operations for each in (one, eight)]
    assert work[0] == 8 * work[1]


def test_a_model_that_fits_no_device_fits_those_that_share_it():
    request = request_of("llama-3.1-405b", settings=PruneSettings(round_to=8))
    mesh = mesh_named("v5p-64")
    alone, shared_ = plan(request, mesh), plan(request, mesh.shared_among(8))
    together = [each.request.settings.joint_blocks or 0 for each in (alone, shared_)]
    assert 0 < together[0] < together[1]
    # Along both axes, whichever way they are split.
    assert shared_.memory["joint steps"]["weights"] == pytest.approx(alone.memory["joint steps"]["weights"], rel=0.01)
    assert shared_.memory["statistics"]["weights"] < 0.8 * alone.memory["statistics"]["weights"]
    assert shared_.memory["selection"]["solver"] == alone.memory["selection"]["solver"]  # divided along both axes
    without_steps = [plan(each.request.changed(joint_passes=0), each.mesh) for each in (alone, shared_)]
    work = [{phase.name: phase for phase in each.phases} for each in without_steps]
    assert work[0]["streams"].sent_bytes == 0 < work[1]["streams"].sent_bytes
    assert work[0]["selection"].operations == work[1]["selection"].operations


def test_what_cannot_be_divided_is_said():
    request = request_of("llama-3.1-8b", settings=PruneSettings(round_to=1))
    planned = plan(request, mesh_named("v5e-8").shared_among(4))
    assert any("The 10035 channels kept cannot be divided among 4 devices" in note for note in notes(planned))
    note, *_ = notes(plan(request_of("llama-3.1-8b"), mesh_named("h100x6").shared_among(6)))
    assert note.endswith("give --round-to 192.")  # a multiple of the 64 that suit its products
    with pytest.raises(UserError, match="the 8 devices of v5e-8 cannot be divided into groups of 3"):
        mesh_named("v5e-8").shared_among(3)


def test_the_disk_holds_the_result_its_blocks_and_two_states():
    planned = plan(request_of("llama-3.1-8b"), mesh_named("h100x8"))
    narrow = planned.request.on(planned.mesh).narrow
    blocks, result, states = (planned.disk[name] for name in sorted(planned.disk))
    assert result == 2 * cost.parameters(FAMILIES[narrow.family], narrow).total
    assert blocks == result - 2 * memory.outer_elements(narrow)
    assert states == 2 * planned.host["the state, to be stored"]
    without = plan(request_of("llama-3.1-8b", settings=PruneSettings(joint_passes=0)), mesh_named("h100x8"))
    assert without.disk == {"the result": result, "its finished blocks": blocks}
