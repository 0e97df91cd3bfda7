"""Threads of BLAS libraries: one inside a run, and as many as before around it."""

import os
import subprocess
import sys

import pytest

_IMPORT = """
import os, numpy, scipy.linalg
from threadpoolctl import threadpool_info

def state():
    return dict(os.environ), {each["filepath"]: each["num_threads"] for each in threadpool_info()}

before = state()
import spap_jax.api, spap_jax.numerics
assert state() == before, (state(), before)
with spap_jax.numerics.one_blas_thread():
    assert {*state()[1].values()} == {1}
assert state() == before
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one thread is all there is")
def test_an_import_leaves_the_process_as_it_is():
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", _IMPORT], env=environment, check=True)
