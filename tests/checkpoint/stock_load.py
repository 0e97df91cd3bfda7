"""Loads checkpoints with only torch and transformers: `python stock_load.py FOLDER...`; each contains its logits."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

for folder in map(Path, sys.argv[1:]):
    loader: Any = transformers.AutoModelForCausalLM
    model, told = loader.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: names for kind, names in told.items() if names}
    assert not wrong, f"{folder}: {wrong}"
    tokens = torch.tensor(np.load(folder / "tokens.npy"), dtype=torch.long)
    with torch.no_grad():
        found = model.eval()(tokens).logits.float().numpy()
    expected = np.load(folder / "logits.npy")
    assert expected.std() > 1, f"{folder}: there is nothing to compare"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=str(folder))
    prompt = tokens[:, :8]
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert written.shape == (len(tokens), 12), f"{folder}: {tuple(written.shape)}"
    assert np.array_equal(written[:, 8].numpy(), expected[:, 7].argmax(axis=1)), f"{folder}: another first token"
versions = {"transformers": transformers.__version__, "torch": torch.__version__}
print(json.dumps({"loaded": len(sys.argv) - 1} | versions))
