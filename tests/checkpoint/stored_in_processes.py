"""Runs one of two processes that shard a layer's weights: FOLDER PORT ID."""

import os
import socket
import sys


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def main(folder: str, port: str, process_id: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    from spap_jax.checkpoint import Reader
    from spap_jax.errors import UserError
    from spap_jax.parallel import mesh, placement, processes

    processes.join(f"localhost:{port}", 2, int(process_id))
    reader = Reader(folder)
    with mesh.use_mesh(None, 2):
        try:
            placement.shard_params(reader.config, reader.layer(0))
            print("reads its part")
        except UserError as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
