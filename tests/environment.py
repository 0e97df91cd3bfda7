"""Settings of a test process and of those that it starts: ``conftest.py`` takes them first, before JAX is loaded."""

import os
import tempfile

WORKER = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this process has its settings from the one that started it."""

if not WORKER:
    # The programs that all workers and the commands that tests start have compiled. What one of them has not written
    # whole, or was killed at, another one compiles itself (JAX warns then, which pyproject.toml allows).
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spap-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Compiling takes most of the time of the tests: less effort at it takes a quarter off.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["PJRT_NPROC"] = "8"  # batched factorisations on CPU deadlock when they fill the pool of a small machine
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once instead of after 46 seconds
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
