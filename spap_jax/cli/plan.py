"""``spap plan``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from spap_jax.cli import console
from spap_jax.cli.options import Count, JsonFile, ModelName
from spap_jax.cli.prune import BlocksOption
from spap_jax.quantities import bytes_text, duration_text
from spap_jax.settings import PruneSettings

if TYPE_CHECKING:
    from spap_jax.models import DecoderConfig
    from spap_jax.planning.accelerators import Mesh
    from spap_jax.planning.plan import Plan


def plan(
    model: ModelName,
    /,
    *,
    mesh: str | None = None,
    model_devices: int = 1,
    sequences: Count = 128,
    sequence_length: Count | None = None,
    json: JsonFile = None,
    drop_blocks: BlocksOption = (),
    settings: Annotated[PruneSettings, Parameter(name="*", parse="^(?!drop_blocks$)")] = PruneSettings(),  # noqa: B008
) -> None:
    """Show what pruning a model needs, and whether it fits, before any device is rented or any weight is downloaded.

    ```
    spap plan meta-llama/Llama-3.1-8B --mesh v5e-8
    spap plan meta-llama/Llama-3.1-70B --mesh h100x8 --model-devices 8
    ```

    The run is made without its arrays: each of its programs is compiled for the devices, and the compiler says how much
    memory it needs. Only config.json is read. For other devices than those of this machine it takes their
    compiler, which comes with the extra spap-jax[tpu] or spap-jax[cuda].

    Args:
        model: Folder with a config.json, a hub id, or an address such as gs://bucket/model. No weights are needed.
        mesh: Devices to plan for: a TPU slice (v5e-8, v5p-64, v6e-8) or the GPUs of one server (a100x4, h100x8,
            h200x8). By default those of this machine.
        model_devices: Number of devices among which the weights are divided, as in spap prune.
        sequences: Number of calibration sequences.
        sequence_length: Tokens in each sequence. By default as many as the model's positions allow, at most 2048.
        drop_blocks: Numbers of whole blocks to remove, as in 17,20. By default none.
        settings: How to prune, as in spap prune.
    """
    import jax.numpy as jnp
    import numpy as np

    from spap_jax import checkpoint
    from spap_jax.cli.options import check_json_place, write_json
    from spap_jax.cli.texts import chosen_length
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.planning.absent import use_absent_mesh
    from spap_jax.planning.accelerators import mesh_named
    from spap_jax.planning.plan import USABLE, plan, room_here
    from spap_jax.pruning.dial import reached
    from spap_jax.storage.location import public_name

    check_json_place(json)
    named = mesh_named(mesh) if mesh else None
    with console.waiting(f"reading the config of {model}"):
        config, weight_bytes = checkpoint.read_config(checkpoint.locate_config(model), model)

    def watch(program: str) -> None:
        console.err.print(f"compiling {program} ...")

    shapes = [*reached(config, settings.replace(drop_blocks=drop_blocks), weight_bytes)]
    if settings.target:
        _print_shapes(config, settings.target, shapes)
    settings = shapes[0]
    shape = sequences, chosen_length(sequence_length, config)
    with use_absent_mesh(named, model_devices) if named else use_mesh(None, model_devices):
        room = USABLE * named.accelerator.memory if named else room_here()
        dtype = np.dtype(jnp.bfloat16 if weight_bytes == 2 else np.float32)
        planned = plan(config, settings, shape, dtype, room, watch)
    _print(model, shape, planned, named)
    if json is not None:
        about = {"model": public_name(model), "shape": shape, "mesh": mesh, "settings": asdict(planned.run.settings)}
        programs = {name: each._asdict() for name, each in planned.programs.items()}
        sizes = {"room": planned.room, "result": planned.result, "unfinished": planned.unfinished}
        write_json(json, "spap plan", about | {"fits": planned.fits} | sizes | {"programs": programs})


def _print_shapes(config: "DecoderConfig", target: str, shapes: list[PruneSettings]) -> None:
    """Prints what reaches a target; the plan is that of the first."""
    from spap_jax.models import FAMILIES, cost
    from spap_jax.pruning.run import pruned_config

    rows = []
    for pruned in (pruned_config(config, shape) for shape in shapes):
        total = cost.parameters(FAMILIES[config.family], pruned).total
        rows.append(
            (f"{pruned.layers} of {config.layers}", f"{pruned.intermediate} of {config.intermediate}", f"{total:,}")
        )
    title = f"what reaches {target}; spap prune measures which is best, and this plan is for the first"
    console.table(title, ("blocks", "channels", "parameters"), rows)


def _print(model: str, shape: tuple[int, int], planned: "Plan", mesh: "Mesh | None") -> None:
    from spap_jax.pruning.run import sparsities

    run, devices = planned.run, mesh.name if mesh else "this machine"
    removed = sparsities(run.config, run.pruned, run.settings).words
    rows = [
        (name, str(each.calls), bytes_text(each.memory), f"{each.operations.full / 1e12:.3g}",
         f"{each.operations.quick / 1e12:.3g}", *([duration_text(mesh.seconds(*each.operations))] if mesh else []))
        for name, each in planned.programs.items()
    ]  # fmt: skip
    columns = ("program", "calls", "memory", "TFLOP in float32", "TFLOP in less", *["at the peak rate"] * bool(mesh))
    whole = " (the decoder alone is counted)" if run.config.in_tower else ""
    console.out.print(f"{model}: {removed} removed{whole}, {shape[0]} sequences of {shape[1]} tokens")
    console.table(f"each device of {devices}: the most memory in use, and the operations of all calls", columns, rows)
    if run.joint:
        console.out.print(f"joint steps change the last {run.tail.layers} of {run.pruned.layers} blocks")
    name, need = planned.peak
    room = f"and may use {bytes_text(planned.room)}"
    if planned.fits:
        console.out.print(f"{devices}: it fits: a device needs at most {bytes_text(need)} (in {name}) {room}")
    else:
        console.out.print(
            f"{devices}: it does not fit: a device needs {bytes_text(need)} (in {name}) {room}. Try --effort low, "
            "fewer --batch-tokens or --sequences, more devices, or --model-devices."
        )
    more = f"; until it is complete, a run keeps {bytes_text(planned.unfinished)}" if not planned.refused else ""
    console.out.print(f"weights on disk: {bytes_text(planned.result)}{more}")
