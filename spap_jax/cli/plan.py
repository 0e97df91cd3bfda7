"""``spap plan``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from spap_jax.cli import console
from spap_jax.cli.options import ModelName
from spap_jax.errors import UserError
from spap_jax.settings import FinetuneSettings, PruneSettings

if TYPE_CHECKING:
    from spap_jax.planning.compiled import Compiled
    from spap_jax.planning.plan import Plan

MESHES = ("v5e-8", "v5p-64", "h100x8")
"""Meshes that are compared by default."""


def plan(
    model: ModelName,
    /,
    *,
    mesh: str | None = None,
    model_devices: int = 1,
    sequences: int = 128,
    sequence_length: int | None = None,
    finetune: Literal["lora", "full"] | None = None,
    compile: bool = False,
    json: Path | None = None,
    settings: Annotated[PruneSettings, Parameter(name="*")] = PruneSettings(),  # noqa: B008 (frozen)
) -> None:
    """Show before any device is rented what pruning a model needs: whether it fits, memory, work, and the least time.

    ```
    spap plan meta-llama/Llama-3.1-8B
    spap plan meta-llama/Llama-3.1-70B --mesh h100x8 --model-devices 8
    ```

    With --finetune the training that may follow is planned in place of the pruning.

    Only config.json is read. What is counted is the program as it runs: the calibration sequences are spread over the
    devices, and so are the rows of the solver, and the weights are divided where --model-devices says so. Times are
    lower bounds (rooflines): the work divided by the peak rates of the data sheets.

    With --compile the compiler for TPUs or GPUs says what it makes of every program of the run: its memory, operations
    and collectives, and whether it fits. That takes minutes, and needs the extra spap-jax[tpu] or
    spap-jax[cuda], but no such device.

    Args:
        model: Folder with a config.json, a hub id, or an address such as gs://bucket/model. No weights are needed.
        mesh: Devices to plan for: a TPU slice (v5e-8, v5p-64, v6e-8) or the GPUs of one server (a100x4, h100x8,
            h200x8). By default a few are compared.
        model_devices: Number of devices among which the weights are divided, as in spap prune.
        sequences: Number of calibration sequences.
        sequence_length: Tokens in each sequence. By default as many as the model's positions allow, at most 2048.
        finetune: Plan recovery training instead, of low-rank updates or of all weights of the pruned model, with the
            model itself as the teacher, in steps as spap finetune makes them by default. --steps, --batch-tokens,
            --compute-dtype, --remat and --held-out then apply to it; --moment-dtype does not.
        compile: Compile every program of the run for the devices named by --mesh, which need not be there.
        json: JSON file to which the results are written as well.
        settings: How to prune, as in spap prune.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.options import check_json_place, write_json
    from spap_jax.cli.texts import chosen_length
    from spap_jax.planning import tables
    from spap_jax.planning.accelerators import mesh_named
    from spap_jax.planning.plan import Request
    from spap_jax.planning.plan import plan as planned_on
    from spap_jax.pruning.narrow import pruned_config, sparsities
    from spap_jax.storage.location import public_name

    if compile and mesh is None:
        raise UserError("--compile compiles for one mesh: name it too, with --mesh v5e-8 for example.")
    if sequences < 1:
        raise UserError("--sequences must be at least 1: give a positive number.")
    check_json_place(json)
    meshes = [mesh_named(name).shared_among(model_devices) for name in ((mesh,) if mesh else MESHES)]
    with console.waiting(f"reading the config of {model}"):
        config, weight_bytes = checkpoint.read_config(checkpoint.locate_config(model), model)
    training = None
    if finetune:
        # They have the same defaults in both, or none.
        names = ("steps", "compute_dtype", "remat", "batch_tokens", "held_out")
        given: dict[str, Any] = {name: getattr(settings, name) for name in names}
        training = FinetuneSettings(full=finetune == "full", **{n: v for n, v in given.items() if v is not None})
    request = Request(config, settings, sequences, chosen_length(sequence_length, config), weight_bytes, training)
    plans = [planned_on(request, each) for each in meshes]
    found = []
    if compile:
        plans[0], found = _compiled(plans[0])
    removed = sparsities(config, pruned_config(config, settings), settings).words
    trained = f", then {training.steps} steps of spap finetune" if training else ""
    console.out.print(f"{model}: {removed} removed{trained}, {sequences} sequences of {request.length} tokens")
    for each in tables.shown(plans, found):
        if isinstance(each, tables.Words):
            console.table(*each)
        else:
            console.out.print(each)
    if json is not None:
        described = {"model": public_name(model), "sequences": sequences, "sequence_length": request.length}
        described |= {"settings": asdict(settings), "weight_bytes": weight_bytes}
        described |= {"training": asdict(training)} if training else {}
        described |= {"programs": [each._asdict() for each in found]} if compile else {}
        write_json(json, "spap plan", described | {"plans": [tables.as_values(each) for each in plans]})


def _compiled(planned: "Plan") -> "tuple[Plan, list[Compiled]]":
    """Compiles the programs of a run, and corrects its plan by what the compiler says of them."""
    import jax

    from spap_jax.planning.compiled import compiled, needs
    from spap_jax.planning.plan import corrected

    jax.config.update("jax_platforms", "cpu")  # arrays are only described: no device has to be started for them
    load = planned.request.on(planned.mesh)
    with console.counting() as watch:
        found = list(compiled(load, planned.mesh, watch))
    return corrected(planned, needs(found)), found
