"""The effort of the TPU's compiler: ``python -m benchmarks.compilation``; needs the extra ``tpu``, but no TPU.

The programs of a run on LLaMA-3.1-8B are compiled for eight chips of TPU v5e, at the compiler's usual effort and at
that of a run (``backend.quick_compilation``).
"""

import jax
from cyclopts import App
from rich.console import Console
from rich.table import Table

from benchmarks.plans import request_of
from spap_jax.planning import absent
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.compiled import Compiled, compile_program
from spap_jax.planning.programs import Program, programs
from spap_jax.settings import PruneSettings

out = Console(highlight=False, width=100)
app = App(name="compilation", help=__doc__)


def at_effort(effort: float, program: Program) -> Compiled:
    """Compiles a program at an effort of the compiler, from -1 to 1."""
    jax.clear_caches()  # an executable of another effort would do
    jax.config.update("jax_exec_time_optimization_effort", effort)
    return compile_program(program)


@app.default
def show(*names: str) -> None:
    """Compiles programs and prints a table.

    Args:
        names: Those to compile; all by default.
    """
    mesh = mesh_named("v5e-8")
    load = request_of("llama-3.1-8b", PruneSettings()).on(mesh)
    table = Table("program", "seconds", "TFLOP", "GB moved", "GB of temporaries", title="usual effort / that of a run")
    with absent.described(mesh) as device:
        for program in programs(load, device):
            if names and program.name not in names:
                continue
            both = [
                (found.compiling, found.operations / 1e12, found.moved / 1e9, found.temporaries / 1e9)
                for found in (at_effort(0.0, program), at_effort(-1.0, program))
            ]
            table.add_row(program.name, *(f"{a:.3g} / {b:.3g}" for a, b in zip(*both, strict=True)))
    out.print(table)


if __name__ == "__main__":
    app()
