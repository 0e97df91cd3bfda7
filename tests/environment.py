"""Environment of the test processes and their children: ``conftest.py`` imports it first, before JAX is loaded."""

import os
import tempfile

WORKER = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this process inherits its settings from the one that started it."""

if not WORKER:
    # All workers, and the commands that tests start, share their compiled programs. An entry whose writer is not done,
    # or was killed, is compiled again (JAX warns then, which pyproject.toml allows).
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spap-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Compilation takes most of the tests' time; a lower optimization level saves a quarter.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["PJRT_NPROC"] = "8"  # batched factorisations on CPU deadlock when they fill the pool of a small machine
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that accesses the network fails at once instead of after 46 seconds
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
