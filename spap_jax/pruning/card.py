"""The model card: what a stranger who finds the pruned checkpoint should know."""

import json

from spap_jax.pruning.report import PruneReport

_TEXT = """\
---
base_model: {name_yaml}
library_name: transformers
tags:
- pruned
- spap-jax
---

# {name}, {percent:.0f} % of its MLP channels{headline} removed

Made from `{name}` by [SPAP-JAX](https://pypi.org/project/spap-jax/): structured pruning without retraining. Every
layer keeps {after} of {before} MLP channels{heads}; everything else about the architecture ({architecture}) is as it
was{but}, so {loaders}. Channels were chosen by the method `{selection}`; {update}.

| | before | after |
| --- | ---: | ---: |
{rows}

Calibration: {calibration}.
Every setting, the channels kept and each layer's error are in `spap_report.json`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

The licence and the limits of the original model apply. Pruning can change what a model knows and how it behaves: test
it on your own task before you rely on it.
"""

_UPDATES = {
    "none": "the weights of those kept are as they were (update `none`)",
    "bias": "a bias makes up for the mean of those removed (update `bias`)",
    "refit": "the output projection of those kept was solved for in closed form (update `refit`)",
    "alternate": "the weights of those kept were recovered by alternating minimisation (update `alternate`)",
}


_HEADS = ", {heads[after]} of {heads[before]} attention heads and {groups[after]} of {groups[before]} key/value heads"

_LOADERS = (
    "tools that read `head_dim` from `config.json`, as transformers 5 does, load it; those that divide `hidden_size` "
    "by the number of heads do not"
)


def model_card(report: PruneReport) -> str:
    """The README.md of a pruned checkpoint; every figure comes from the report."""
    model, width = report.model, report.model["intermediate"]
    heads, groups = model["heads"], model["kv_heads"]
    fewer_heads = groups["after"] < groups["before"]
    rows = [
        ("parameters", *(f"{count:,}" for count in model["parameters"].values())),
        ("MLP parameters", *(f"{count:,}" for count in model["mlp_parameters"].values())),
    ]
    if size := report.extras.get("bytes"):
        rows.append(("bytes of weights", *(f"{count:,}" for count in size.values())))
    if measured := report.extras.get("perplexity"):
        rows.append((f"perplexity on {measured['data']}", f"{measured['before']:.3f}", f"{measured['after']:.3f}"))
    biases = model["mlp_bias"]
    return _TEXT.format(
        name=model["name"],
        name_yaml=json.dumps(model["name"]),  # a JSON string is a YAML string
        percent=_percent(width),
        headline=f" and {_percent(groups):.0f} % of its attention heads" if fewer_heads else "",
        heads=_HEADS.format(heads=heads, groups=groups) if fewer_heads else "",
        loaders=_LOADERS if fewer_heads else "stock tools load it",
        before=width["before"],
        after=width["after"],
        architecture=model["architecture"],
        but=" but for added biases in the MLP" if biases["after"] and not biases["before"] else "",
        selection=report.method["selection"],
        update=_UPDATES[report.method["update"]],
        rows="\n".join(f"| {' | '.join(row)} |" for row in rows),
        calibration=report.calibration["description"],
    )


def _percent(count: dict[str, int]) -> float:
    return 100 * (1 - count["after"] / count["before"])
