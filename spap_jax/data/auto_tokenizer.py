"""The class of transformers that loads tokenizers, imported without PyTorch, which they do not need.

A notebook that has imported PyTorch or transformers before gets all of it.
"""

import os
import sys
from typing import Any

_alone = False


def leave_pytorch_out() -> None:
    """Makes transformers believe in this process that PyTorch is not installed, unless either is imported already."""
    global _alone
    _alone = True


def auto_tokenizer() -> Any:
    """Returns ``AutoTokenizer`` of transformers."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing PyTorch
    hidden = _alone and not {"torch", "transformers"} & sys.modules.keys()
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from transformers import AutoTokenizer
    finally:
        if hidden:
            del sys.modules["torch"]
    return AutoTokenizer
