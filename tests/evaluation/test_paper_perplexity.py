"""Perplexity on WikiText-2 and C4, against the loop of GPTQ, SparseGPT and Wanda on files of the same layout."""

import functools
import gzip
import json
from pathlib import Path

import hf_models
import pandas
import pytest
import torch
import transformers

import spap_jax as spap

EXAMPLES = Path(__file__).parents[2] / "examples"
STORIES = EXAMPLES / "llama-stories"


def rows() -> list[str]:
    """Return lines as in WikiText-2: empty lines, headings, and texts that end with their own newline."""
    lines = (EXAMPLES / "stories_evaluation.txt").read_text("utf-8").splitlines()
    return [f" = {line[:20]} = \n" if number % 7 == 3 else line and f" {line} \n" for number, line in enumerate(lines)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files like the test split of WikiText-2 and a validation file of C4, with the bundled stories as text."""
    folder = tmp_path_factory.mktemp("sets")
    found = {"wikitext2": folder / "test-00000-of-00001.parquet", "c4": folder / "c4-validation.json.gz"}
    pandas.DataFrame({"text": rows()[:120]}).to_parquet(found["wikitext2"])
    entries = [{"text": row[-30:], "timestamp": "2019-04-25T12:57:54Z", "url": "x"} for row in (rows() * 2)[:1110]]
    found["c4"].write_bytes(gzip.compress("\n".join(map(json.dumps, entries)).encode()))
    return found


@functools.cache
def torch_model() -> torch.nn.Module:
    assert hf_models.POSITIONS  # importing hf_models limits torch to one thread
    return transformers.AutoModelForCausalLM.from_pretrained(STORIES).eval()


def paper_perplexity(testenc: torch.Tensor, seqlen: int) -> float:
    """Compute perplexity with the loop of those papers' code; testenc: [1, N]."""
    model, nlls = torch_model(), []
    nsamples = testenc.numel() // seqlen
    for i in range(nsamples):
        batch = testenc[:, (i * seqlen) : ((i + 1) * seqlen)]
        with torch.no_grad():
            lm_logits = model(batch).logits
        shift_logits = lm_logits[:, :-1, :]
        shift_labels = batch[:, 1:]
        loss = torch.nn.functional.cross_entropy(shift_logits.reshape(-1, 512), shift_labels.reshape(-1))
        nlls.append(loss.float() * seqlen)
    return float(torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)))


def ours(data: str, length: int) -> tuple[float, int]:
    blocks = spap.load_tokens(data, tokenizer=STORIES, sequence_length=length, sequences=None, role="evaluation")
    return spap.perplexity(spap.load(STORIES), blocks), blocks.available


def test_wikitext2(files: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    texts = list(pandas.read_parquet(files["wikitext2"])["text"])
    testenc = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids
    found, windows = ours(f"wikitext2:{files['wikitext2']}", 256)
    assert windows == testenc.numel() // 256 > 20
    assert found == pytest.approx(paper_perplexity(testenc, 256), rel=1e-5)


@pytest.mark.parametrize(("seqlen", "most"), [(8, 256), (256, None)])
def test_c4(files: dict[str, Path], seqlen: int, most: int | None) -> None:
    """The first 1100 texts are used, as many windows as they fill, but at most 256."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    texts = [json.loads(line)["text"] for line in gzip.decompress(files["c4"].read_bytes()).splitlines()]
    valenc = tokenizer(" ".join(texts[:1100]), return_tensors="pt").input_ids[:, : (256 * seqlen)]
    found, windows = ours(f"c4:{files['c4']}", seqlen)
    assert windows == valenc.numel() // seqlen
    assert (windows == most) if most else (20 < windows < 256)
    assert found == pytest.approx(paper_perplexity(valenc, seqlen), rel=1e-5)


def test_other_texts_get_no_special_token(files: dict[str, Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(rows()[:120]), "utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    stream = tokenizer(plain.read_text("utf-8"), return_tensors="pt", add_special_tokens=False).input_ids
    found, _ = ours(str(plain), 256)
    assert found == pytest.approx(paper_perplexity(stream, 256), rel=1e-5)
    assert found != pytest.approx(ours(f"wikitext2:{files['wikitext2']}", 256)[0], rel=1e-5)
