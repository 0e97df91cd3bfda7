"""The tokenizer of the data tests."""

from pathlib import Path

import pytest
from data_cases import VOCABULARY


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a word-level tokenizer: w0 is 1, w1 is 2, ...; it would add <s> if asked for special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(VOCABULARY - 2)} | {"<s>": VOCABULARY - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", VOCABULARY - 1)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=16
    ).save_pretrained(folder)
    return folder
