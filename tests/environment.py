"""Environment of the test processes and their children: ``conftest.py`` imports it first, before JAX is loaded."""

import os

WORKER = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this process inherits its settings from the one that started it."""

if not WORKER:
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.03"  # storing others takes longer than it saves
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Compilation takes most of the tests' time: machine code that is not optimized, fusions that are not lowered
    # through MLIR, and programs that are compiled in one piece, not in 32 for many cores, save more than half of it.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    cheap = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cheap}"
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # programs without the lines that their operations come from
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["PJRT_NPROC"] = "8"  # the threads among which work is divided decide on last bits
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that accesses the network fails at once instead of after 46 seconds
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
