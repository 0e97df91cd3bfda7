"""Checkpoints in llama.cpp: `python llama_cpp_client.py FOLDER...`, with a Python created by `.ci/llama_cpp`.

llama.cpp's own script converts each folder to `F32.gguf`, which is quantised to `FORMAT.gguf` for each of `FORMATS`.
Each file continues the prompts [B, T] in the folder's `prompts.npy` greedily; `FORMAT.npz` receives the generated
tokens [B, N] and their logits [B, N, v]. The last line of output describes the contents of every file.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import ffi, get_lib  # pyright: ignore[reportMissingImports]

FORMATS = ("Q4_0", "Q8_0", "Q4_K_M")
NEW = 48

SOURCES = Path(sys.prefix) / "llama.cpp"
sys.path[:0] = [str(SOURCES), str(SOURCES / "gguf-py")]

library: Any = get_lib()
messages: list[str] = []


@ffi.callback("ggml_log_callback")
def keep_message(level: int, text: Any, data: Any) -> None:
    messages.append(ffi.string(text).decode("utf-8", "replace"))


def done(success: Any, what: object) -> Any:
    if not success:
        raise RuntimeError(f"llama.cpp failed at {what}:\n{''.join(messages[-30:])}")
    return success


def convert(folder: Path, file: Path) -> None:
    from conversion import TextModel  # pyright: ignore[reportMissingImports]

    # The script identifies tokenizers by a hash of their behaviour; those of the tests are not in its list.
    TextModel.get_vocab_base_pre = lambda *_: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(file), "--outtype", "f32"]
    runpy.run_path(str(SOURCES / sys.argv[0]), run_name="__main__")


def quantise(source: Path, file: Path, kind: str) -> None:
    settings = library.llama_model_quantize_default_params()
    settings.nthread = 1
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    done(library.llama_model_quantize(bytes(source), bytes(file), ffi.addressof(settings)) == 0, file)


def generate(file: Path, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model = done(library.llama_model_load_from_file(bytes(file), library.llama_model_default_params()), file)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    settings = library.llama_context_default_params()
    settings.n_ctx = 256
    settings.n_threads = settings.n_threads_batch = 1
    # float32 throughout, for the comparison: by default the cache is float16.
    settings.type_k = settings.type_v = library.GGML_TYPE_F32
    settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    tokens = np.zeros((len(prompts), NEW), int)
    logits = np.zeros((len(prompts), NEW, size), np.float32)
    for sequence, prompt in enumerate(prompts):
        context = done(library.llama_init_from_model(model, settings), file)
        unread = prompt.tolist()
        for step in range(NEW):
            batch = ffi.new("llama_token[]", unread)
            done(library.llama_decode(context, library.llama_batch_get_one(batch, len(unread))) == 0, file)
            row = ffi.buffer(library.llama_get_logits_ith(context, -1), 4 * size)
            logits[sequence, step] = np.frombuffer(row, np.float32)
            unread = [int(logits[sequence, step].argmax())]
            tokens[sequence, step] = unread[0]
        library.llama_free(context)
    library.llama_model_free(model)
    return tokens, logits


def contents(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    reader = GGUFReader(file)
    family = reader.fields["general.architecture"].contents()
    return {
        "architecture": family,
        "width": reader.fields[f"{family}.feed_forward_length"].contents(),
        "types": {tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
        "bytes": file.stat().st_size,
    }


def main() -> None:
    library.llama_log_set(keep_message, ffi.NULL)
    library.llama_backend_init()
    found: dict[str, dict[str, Any]] = {}
    for folder in map(Path, sys.argv[1:]):
        prompts = np.load(folder / "prompts.npy")
        files = {kind: folder / f"{kind}.gguf" for kind in ("F32", *FORMATS)}
        convert(folder, files["F32"])
        for kind, file in files.items():
            if kind != "F32":
                quantise(files["F32"], file, kind)
            tokens, logits = generate(file, prompts)
            np.savez(file.with_suffix(".npz"), tokens=tokens, logits=logits)
        found[folder.name] = {kind: contents(file) for kind, file in files.items()}
    print(json.dumps(found))


main()
