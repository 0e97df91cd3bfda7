"""Published configs: which are accepted, which of their fields are ignored, and why the others are refused."""

import ast
import copy
import dataclasses
import importlib
import inspect
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import transformers
from hf_models import VARIANTS, hf_logits, hf_model
from transformers import cache_utils, masking_utils

from spap_jax import checkpoint
from spap_jax.errors import UserError
from spap_jax.models import cost
from spap_jax.models.families import Family
from spap_jax.models.registry import FAMILIES, decoder_of, family_of
from spap_jax.models.towers import text_part

CONFIGS = Path(__file__).parents[1] / "configs"

SMOLLM2 = ("is_llama_config", "rope_interleaved")
FOR_JAVASCRIPT = "transformers.js_config"

ACCEPTED = {
    "code-llama-34b-instruct": (33_743_970_304, ()),
    "code-llama-7b": (6_738_546_688, ()),
    "deepseek-coder-6.7b-instruct": (6_740_512_768, ()),
    "deepseek-r1-distill-llama-8b": (8_030_261_248, ()),
    "deepseek-r1-distill-qwen-7b": (7_615_616_512, ("use_mrope",)),
    "galactica-125m": (125_030_400, ("learned_embeddings", "scale_embeddings")),
    "galactica-30b": (29_968_103_424, ("learned_embeddings", "scale_embeddings")),
    "gemma-2-27b": (27_227_128_320, ()),  # sizes alone
    "gemma-2-2b": (2_614_341_888, ("cache_implementation", "hidden_act")),  # sizes alone
    "gemma-3-12b-it": (11_766_034_176, ()),  # sizes alone
    "gemma-3-1b-it": (999_885_952, ("cache_implementation",)),
    "gemma-3-270m": (268_098_176, ("_sliding_window_pattern",)),
    "gemma-3-27b-it": (27_009_346_304, ()),  # sizes alone
    "gemma-3-4b-it": (3_880_263_168, ()),  # sizes alone
    "glm-4-9b-0414": (9_400_094_720, ()),  # sizes alone
    "granite-3.1-2b-base": (2_533_525_504, ()),  # sizes alone
    "llama-1-13b": (13_015_864_320, ("max_sequence_length",)),
    "llama-1-7b-decapoda": (6_738_415_616, ("max_sequence_length",)),
    "llama-2-13b-chat": (13_015_864_320, ()),
    "llama-2-70b": (68_976_648_192, ()),
    "llama-2-7b": (6_738_415_616, ()),
    "llama-3-8b": (8_030_261_248, ()),
    "llama-3.1-405b": (405_853_388_800, ()),
    "llama-3.1-70b": (70_553_706_496, ()),
    "llama-3.1-8b": (8_030_261_248, ()),
    "llama-3.2-1b": (1_235_814_400, ()),
    "llama-3.2-3b": (3_212_749_824, ()),
    "ministral-3-8b-base-2512": (8_489_553_920, ()),  # sizes alone
    "mistral-7b-instruct-v0.1": (7_241_732_096, ()),
    "mistral-nemo-base-2407": (12_247_782_400, ()),
    "mistral-small-3.1-24b-instruct": (23_572_403_200, ()),  # sizes alone
    "olmo-2-7b-instruct": (7_298_617_344, ()),
    "olmo-3-7b": (7_298_011_136, ()),  # sizes alone
    "opt-125m": (125_239_296, ()),
    "opt-13b": (12_853_473_280, ("output_projection",)),
    "opt-30b": (29_974_540_288, ()),
    "opt-350m": (331_196_416, ()),
    "opt-6.7b": (6_658_473_984, ()),
    "opt-66b": (65_719_701_504, ()),
    "phi-4": (14_659_507_200, ("attention_bias",)),  # sizes alone
    "qwen2-0.5b": (494_032_768, ()),
    "qwen2-7b-instruct": (7_615_616_512, ()),
    "qwen2.5-0.5b": (494_032_768, ("use_mrope",)),
    "qwen2.5-72b": (72_706_203_648, ("use_mrope",)),
    "qwen2.5-7b": (7_615_616_512, ("use_mrope",)),
    "qwen2.5-7b-instruct-1m": (7_615_616_512, ("dual_chunk_attention_config",)),
    "qwen2.5-7b-instruct-yarn": (7_615_616_512, ()),
    "qwen2.5-coder-1.5b": (1_543_714_304, ("use_mrope",)),
    "qwen2.5-math-1.5b": (1_543_714_304, ("use_mrope",)),
    "qwen3-0.6b": (596_049_920, ()),
    "qwen3-4b-thinking-2507": (4_022_468_096, ()),
    "qwen3-vl-2b-instruct": (1_720_574_976, ()),  # sizes alone
    "qwen3-vl-8b-instruct": (8_190_735_360, ()),  # sizes alone
    "smollm-1.7b": (1_711_376_384, ()),
    "smollm-135m": (134_515_008, ()),
    "smollm-360m-instruct": (361_821_120, ()),
    "smollm2-1.7b": (1_711_376_384, ()),
    "smollm2-1.7b-instruct": (1_711_376_384, (FOR_JAVASCRIPT,)),
    "smollm2-135m": (134_515_008, SMOLLM2),
    "smollm2-135m-instruct": (134_515_008, (*SMOLLM2, FOR_JAVASCRIPT)),
    "smollm2-360m": (361_821_120, SMOLLM2),
    "smollm2-360m-instruct": (361_821_120, (*SMOLLM2, FOR_JAVASCRIPT)),
    "smollm3-3b": (3_075_098_624, ()),  # sizes alone
    "tinyllama-1.1b-chat-v1.0": (1_100_048_384, ()),
    "unsloth-llama-3.2-1b-instruct": (1_235_814_400, ("unsloth_fixed",)),
    "vicuna-13b-v1.5-16k": (13_015_864_320, ("max_sequence_length",)),
    "vicuna-7b-v1.5": (6_738_415_616, ()),
    "yi-6b": (6_061_035_520, ()),
}
"""File in tests/configs -> number of parameters of the decoder, and the fields that are ignored."""

REFUSED = {
    "fsfairx-llama3-rm": "the architecture LlamaForSequenceClassification is not supported; the supported ones are ",
    "llama-2-7b-gptq": "this checkpoint is quantised (quantization_config is set), and pruning needs the weights ",
    "yarn-llama-2-7b-64k": "this checkpoint brings code of its own (auto_map is set), which is never run, so what ",
}
"""File in tests/configs/refused -> start of the error message."""


def config_class(family: Family) -> type[transformers.PreTrainedConfig]:
    return type(transformers.AutoConfig.for_model(family.name))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str):
    parameters, ignored = ACCEPTED[name]
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        config, _ = checkpoint.read_config(CONFIGS / f"{name}.json", name)
    family = FAMILIES[config.family]
    assert cost.parameters(family, config).total == parameters
    said = f"config.json of {name}: ignoring {', '.join(ignored)}, which transformers' {family.architecture} "
    assert [str(notice.message) for notice in notices] == [f"{said}does not read"][: len(ignored)]

    theirs = json.loads((CONFIGS / f"{name}.json").read_text())
    rewritten = transformers.AutoConfig.for_model(**theirs).to_dict()
    if "tie_word_embeddings" not in theirs and "text_config" in theirs:
        del rewritten["tie_word_embeddings"]  # where it says nothing, the weights that a file holds decide
    assert decoder_of(rewritten)[1] == config


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    with pytest.raises(UserError) as raised:
        checkpoint.read_config(CONFIGS / "refused" / f"{name}.json", name)
    assert str(raised.value).startswith(REFUSED[name])


def test_every_config_has_a_verdict():
    assert {file.stem for file in CONFIGS.glob("*.json")} == ACCEPTED.keys()
    assert {file.stem for file in CONFIGS.glob("refused/*.json")} == REFUSED.keys()


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"sliding_window": 4096}, "sets sliding_window=4096, which"),
        ("llama", {"is_causal": False}, "sets is_causal=False, which"),
        ("llama", {"is_encoder_decoder": True, "layer_types": ["sliding_attention"] * 3}, "=True, layer_types=["),
        ("llama", {"per_layer_config": {"0": {"mlp_bias": True}}}, "sets per_layer_config={"),
        ("llama", {"quantization_config": {}}, "this checkpoint is quantised"),
        ("llama", {"hidden_act": "gelu_new"}, "the activation 'gelu_new' is not supported"),
        ("llama", {"hidden_act": ["silu"]}, "gives hidden_act = ['silu'], which must be a name"),
        ("llama", {"max_position_embeddings": 2048.0}, "max_position_embeddings = 2048.0"),
        ("llama", {"head_dim": 5}, "heads of width 5, which must be positive, and even for rotary"),
        ("llama", {"rope_theta": 0}, "gives rope_theta = 0, which must be positive"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "gives factor = 0, which must be positive"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' lacks factor."),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'default' sets {'partial_rotary_factor': 0.5}"),
        ("qwen2", {"use_sliding_window": True}, "sets use_sliding_window=True, which"),
        ("mistral", {"sliding_window": 0}, "gives sliding_window = 0, which must be a positive whole number"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "sets final_logit_softcapping=30.0, which"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 3}, "must be sliding_attention or full_attention"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "gives rope_theta in rope_parameters, which must"),
        ("gemma3_text", {"rope_scaling": {"type": "dynamic"}}, "rope scaling 'dynamic' is not implemented"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "'yarn' lacks factor, original_max_position_embeddings."),
        ("glm4", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 of heads of width 12"),
        ("ministral3", {"rope_parameters": None}, "gives rope_parameters = None, which must be an object"),
        ("olmo3", {"rope_theta": 10000.0}, "sets rope_theta=10000.0, which"),
        ("smollm3", {"no_rope_layers": [1, 2, 1]}, "must be 0 or 1 for each of the 3 layers"),
        ("opt", {"do_layer_norm_before": None}, "config.json has no do_layer_norm_before"),
    ],
    ids=str,
)
def test_values_that_change_what_is_computed(family: str, changes: dict, expected: str):
    theirs = VARIANTS[{"opt": "opt_125m_like", "gemma3_text": "gemma3"}.get(family, family)] | changes
    with pytest.raises(UserError) as raised:
        FAMILIES[family].read_config(theirs)
    assert expected in str(raised.value)


def test_what_is_said_twice_counts_as_in_transformers():
    linear, llama3 = {"type": "linear", "factor": 2.0}, VARIANTS["llama_llama3_rope_v4"]["rope_scaling"]
    for changes in (
        {"rope_scaling": linear, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_scaling": linear | {"rope_theta": 500.0}, "rope_theta": 700.0},
        {"rope_scaling": linear | {"rope_type": "default", "factor": None}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": True}, "original_max_position_embeddings": 96},
        {"rope_scaling": llama3, "original_max_position_embeddings": 16},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 700.0, "partial_rotary_factor": 1.0},
    ):
        theirs = VARIANTS["llama"] | changes
        stock = transformers.AutoConfig.for_model(**copy.deepcopy(theirs))
        stock.standardize_rope_params()  # as models do when they compute the frequencies
        rewritten = VARIANTS["llama"] | {"rope_parameters": stock.rope_parameters}
        assert FAMILIES["llama"].read_config(theirs) == FAMILIES["llama"].read_config(rewritten), changes


@pytest.mark.parametrize("variant", ["llama", "gemma3", "opt_125m_like"])
def test_ignored_and_inert_fields_change_nothing_that_transformers_computes(variant: str):
    model, tokens = hf_model(variant), np.arange(40, dtype=np.int32).reshape(2, 20)
    family = FAMILIES[VARIANTS[variant]["model_type"]]
    published = [json.loads(file.read_text()) for file in CONFIGS.glob("*.json")]
    ignored: dict[str, Any] = {
        name: theirs[name] for theirs in map(text_part, published) for name in family_of(theirs).ignored(theirs)
    }
    ignored = {name: value for name, value in ignored.items() if name not in family.known} | {"clip_qkv": 0.01}
    inert: dict[str, Any] = {
        "attention_dropout": 0.5,
        "pretraining_tp": 4,
        "chunk_size_feed_forward": 2,
        "is_decoder": True,
    }
    inert |= {"tie_last_hidden_states": True, "use_cache": False, "prefix": "</s>", "temperature": 0.1}
    theirs = VARIANTS[variant] | ignored | inert
    assert family.ignored(theirs) == sorted(ignored)
    assert family.read_config(theirs) == family.read_config(VARIANTS[variant])

    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**theirs)).eval()
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(hf_logits(other, tokens), hf_logits(model, tokens))


OF_OTHER_MODELS = {
    "number_of_conv_states",  # of layers that these decoders lack
    # Of Gemma 3 models that see.
    *("image_size", "image_token_id", "layer_norm_eps", "mm_tokens_per_image", "patch_size", "vision_config"),
    # Of Qwen3-VL.
    *("deepstack_visual_indexes", "depth", "in_channels", "num_heads", "num_position_embeddings", "out_hidden_size"),
    *("spatial_merge_size", "temporal_patch_size", "video_token_id", "vision_start_token_id", "text_config"),
}
"""Fields read in the same files of transformers."""


def names_read(module: ModuleType) -> set[str]:
    """Return the config fields that a module reads: `config.name`, or `getattr` and `hasattr` with a literal."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        match node:
            case ast.Attribute(value=of, attr=name):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[of, ast.Constant(value=name), *_]):
                pass
            case _:
                continue
        if ast.unparse(of).endswith("config"):
            found.add(name)
    return found


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_tables_know_every_field_that_transformers_reads(family: Family):
    theirs = config_class(family)
    declared = {field.name for field in dataclasses.fields(theirs)} | theirs.attribute_map.keys()
    models = importlib.import_module(theirs.__module__.replace("configuration", "modeling"))
    read = set().union(*map(names_read, (models, masking_utils, cache_utils)))
    read = {name for name in read if not hasattr(theirs, name)}  # the class' own methods
    assert {"hidden_size", "vocab_size"} <= declared
    assert "is_causal" in read
    assert declared | read <= family.known | OF_OTHER_MODELS


def test_mistral_with_kinds_of_layers_is_another_model():
    """For transformers it is Ministral, whose layers have windows as this list says, and not as sliding_window does."""
    theirs = json.loads((CONFIGS / "mistral-7b-instruct-v0.1.json").read_text()) | {
        "layer_types": ["full_attention"] * 32
    }
    with pytest.raises(UserError, match="layer_types"):
        FAMILIES["mistral"].read_config(theirs)
