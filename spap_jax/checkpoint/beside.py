"""The tensors of a model beside its decoder, such as those that read images: copied as they are, a file at a time."""

from collections.abc import Iterator

from spap_jax.checkpoint import weight_files
from spap_jax.checkpoint.ranged import AtAddress
from spap_jax.checkpoint.tensors import DTYPES, TensorFiles
from spap_jax.errors import UserError
from spap_jax.models import DecoderConfig
from spap_jax.models.model import Source


class Beside:
    """The tensors beside the decoder in the checkpoint that a model came from; none for a decoder by itself.

    Attributes:
        files: Name of a file among those that are kept of a run -> names of the tensors that it will hold.
        bytes: Number of bytes of all tensors.
    """

    def __init__(self, source: Source, config: DecoderConfig):
        """Reads the headers of the weight files.

        Raises:
            UserError: The checkpoint is gone, or holds tensors that cannot be copied.
        """
        self.files: dict[str, list[str]] = {}
        self.bytes = 0
        if not config.in_tower:
            return
        if source.folder is None or not source.folder.is_dir():
            raise UserError(
                f"the checkpoint of {source.name} is gone, and the parts of the model beside its decoder are copied "
                "from there: load the model from a folder that has them."
            )
        self._tensors = TensorFiles(source.folder, AtAddress.of(source.folder))
        names, filled = self.files.setdefault("beside-00000.safetensors", []), 0
        for name, tensor in self._tensors.tensors.items():
            if name.startswith((config.prefix, config.head_name)):
                continue
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{name} of {source.name} has the dtype {tensor.dtype}, which cannot be copied: get a checkpoint "
                    f"in {', '.join(DTYPES)}."
                )
            if names and filled + tensor.bytes > weight_files.JOINED_BYTES:
                names, filled = self.files.setdefault(f"beside-{len(self.files):05d}.safetensors", []), 0
            names.append(name)
            filled += tensor.bytes
            self.bytes += tensor.bytes

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Yields the name and the content of each file, of which one is in memory at a time."""
        for file, names in self.files.items():
            shapes = ((name, self._tensors.tensors[name].shape) for name in names)
            yield (
                file,
                weight_files.encode({n: self._tensors.read(n, tuple(map(slice, shape))) for n, shape in shapes}),
            )
