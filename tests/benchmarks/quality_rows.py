"""Made-up result rows and scopes for the tests of the quality benchmark."""

import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.results import Row
from benchmarks.quality.scope import Scope


def row(method: str = "spap", rise: float = 0.01, seed: int = 0, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "model": "llama-stories",
        "sparsity": 0.3,
        "method": method,
        "seed": seed,
        "dense": 4.0,
        "perplexity": 4.0 + rise,
        "rise": rise,
        "divergence": rise / 2,
        "width": 224,
        "seconds": 1.5,
        "processor_seconds": 2.5,
        "teraflops": 1.5,
        "calibration_tokens": 262_144,
        "evaluation_tokens": 51_200,
        "sequences": 1024,
        "windows": "all",
        "settings": "aaaa",
        "files": "bbbb",
        "commit": "0123456789ab",
        "date": "2026-01-02T03:04:05+00:00",
    }
    return Row(**(values | changes))


def scope(
    sparsities: Sequence[float] = (0.3,), methods: Sequence[str] = ("fasp", "obs", "spap"), **changes: Any
) -> Scope:
    values: dict[str, Any] = {
        "models": ("llama-stories",),
        "cells": tuple(itertools.product(sparsities, methods)),
        "seeds": (0, 1, 2),
        "command": "python -m benchmarks.quality --zoo zoo",
    }
    return Scope(**(values | changes))
