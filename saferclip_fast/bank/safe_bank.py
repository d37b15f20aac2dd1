"""SafeBank: the aligned safe text and image embeddings that unsafe inputs are redirected to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..ops import Neighbors, backends, nearest_safe
from ..ops.arrays import as_tensor
from ..ops.checks import check_finite, check_matrix, near_one, wide
from ..ops.nearest_safe import version
from ..storage.files import atomic_write, sync
from ..storage.row_file import RowFile

FORMAT = "saferclip_fast.bank.v1"
_SHORT, _LONG = 1e-15, 1e15  # lengths between which squares of float32 entries that count are in range
_NORMALIZE_ROWS = 1 << 16  # rows normalized at a time, so that building from a mapped file stays small in memory


class SafeBank:
    """N aligned safe pairs: row i of `text` and row i of `image` belong to one safe caption and its image.

    Args:
        text, image: [N, d] float64/32, bfloat16 or float16 frozen embeddings T0(t), V0(v) of any scale, same shape,
            dtype and device, tensors or NumPy arrays; they are L2-normalized on entry.
        metadata: what the rows were made from (`model`, `weights_hash`, `data_hash`, ...); saved with the bank and
            compared by `load(expect=...)`.

    Attributes:
        text, image: [N, d] unit rows.
        packed: the copy of `text` that searches screen with (uint8 blob: int8 on a CPU, fp16 on a GPU), or None until
            `pack()`.
        offset: row of the whole bank that row 0 of this one is (non-zero in a shard).

    Raises:
        ValueError: shapes, dtypes or devices that differ, no rows, NaN or Inf, a zero row (naming tensor and row).
        TypeError: `text` or `image` is no tensor and no array.
    """

    def __init__(
        self, text: Tensor | np.ndarray, image: Tensor | np.ndarray, metadata: Mapping[str, str] | None = None
    ) -> None:
        texts: Tensor = as_tensor(text)
        images: Tensor = as_tensor(image)
        check_matrix("text", texts)
        check_matrix("image", images, like=("text", texts), rows=True)
        if texts.dtype != images.dtype:
            raise ValueError(f"text is {texts.dtype} but image is {images.dtype}; cast one of them")
        if texts.shape[0] == 0:
            raise ValueError("the bank is empty: it needs at least one safe pair")
        self.text = _normalize("text", texts)
        self.image = _normalize("image", images)
        self.metadata = {str(key): str(value) for key, value in (metadata or {}).items()}
        self.packed: Tensor | None = None
        self.packed_version = 0  # of `text` when it was packed
        self.offset = 0

    @classmethod
    def from_unit(cls, text: Tensor, image: Tensor, metadata: Mapping[str, str], packed: Tensor | None = None):
        """A bank of rows [N, d] that are of unit length already, unchecked; they are not copied."""
        bank = cls.__new__(cls)
        bank.text, bank.image, bank.packed, bank.packed_version = text, image, packed, version(text)
        bank.metadata, bank.offset = dict(metadata), 0
        return bank

    def __len__(self) -> int:
        return self.text.shape[0]

    @property
    def width(self) -> int:
        """Embedding width d."""
        return self.text.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.text.device

    def __repr__(self) -> str:
        made_from = ", ".join(f"{key}={value[:16]}" for key, value in self.metadata.items())
        kind = f"{len(self)} pairs, d={self.width}, {self.text.dtype}, {self.device}, packed={self.packed is not None}"
        return f"SafeBank({kind}{'; ' + made_from if made_from else ''})"

    def pack(self) -> SafeBank:
        """Makes the copy that the native search screens with (int8, on a GPU fp16), once, and returns self.

        Without it each search quantizes the rows on the fly. A no-op where the native module is not built, and for
        float64 rows, which only the reference searches.
        """
        native = backends()["cuda" if self.device.type == "cuda" else "cpu"]
        searched = native.usable and "nearest_safe" in native.ops and self.text.dtype != torch.float64
        if self.packed is None and searched:
            self.packed_version = version(self.text)  # first: another thread may search as soon as it sees the copy
            self.packed = torch.ops.saferclip_fast.pack_bank(self.text)
        return self

    def to(self, device: torch.device | str) -> SafeBank:
        """The same bank on another device. The packed copy is remade there, since its layout is the device's own."""
        device = torch.device(device)
        if device == self.device:
            return self
        bank = self.from_unit(self.text.to(device), self.image.to(device), self.metadata)
        bank.offset = self.offset
        return bank.pack() if self.packed is not None else bank

    def select(self, index: Tensor) -> SafeBank:
        """The bank of the pairs at `index` (int64 [M], M may be 0), in this order, not packed."""
        return self.from_unit(self.text[index], self.image[index], self.metadata)

    def nearest(self, query: Tensor, k: int = 1, *, backend: str = "auto", check: bool = True) -> Neighbors:
        """The k rows nearest to each query [Q, d]: `nearest_safe(query, self, k)`."""
        return nearest_safe(query, self, k, backend=backend, check=check)

    def search(
        self,
        query: Tensor | np.ndarray,
        k: int = 1,
        *,
        modality: str = "text",
        backend: str = "auto",
        check: bool = True,
    ) -> Neighbors:
        """The k safe pairs nearest to each query by their texts or by their images; exact, as `nearest_safe`.

        Args:
            query: [Q, d] or a single one [d], a tensor or a NumPy array.
            k: neighbors wanted, 1 <= k <= N.
            modality: "text" or "image", the rows that are searched. The packed copy is of the texts.
            backend, check: as in `nearest_safe`.

        Returns:
            `Neighbors(scores, indices)`: [Q, k] float32 cosine and [Q, k] int64 pairs, best first; [k] for a single
            query, and NumPy arrays for one.

        Raises ValueError for another modality, and what `nearest_safe` raises.
        """
        if modality not in ("text", "image"):
            raise ValueError(f"modality={modality!r} must be 'text' or 'image'")
        rows = self if modality == "text" else self.from_unit(self.image, self.text, self.metadata)
        return nearest_safe(query, rows, k, backend=backend, check=check)

    def gather(self, neighbors: Neighbors) -> tuple[SafeBank, Neighbors]:
        """A bank on this device that holds all `neighbors`, and their numbers in it: this bank, since it does."""
        return self, neighbors

    def shard(self, rank: int, world: int) -> SafeBank:
        """Slice `rank` of `world` contiguous slices (views, sizes within one row); `.offset` is its first row.

        Raises ValueError unless 0 <= rank < world <= N.
        """
        if not 0 <= rank < world or world > len(self):
            raise ValueError(f"rank={rank}, world={world} must satisfy 0 <= rank < world <= {len(self)} rows")
        begin, end = (len(self) * r // world for r in (rank, rank + 1))
        bank = self.from_unit(self.text[begin:end], self.image[begin:end], self.metadata)
        bank.offset = self.offset + begin
        return bank.pack() if self.packed is not None else bank

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically: `text`, `image`, `packed` (if made) and the metadata."""
        tensors = {"text": self.text, "image": self.image}
        if self.packed is not None and self.device.type == "cpu":
            tensors["packed"] = self.packed
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header = {**self.metadata, "format": FORMAT, "normalized": "l2"}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    @classmethod
    def build(
        cls,
        path: str | Path,
        text: Tensor,
        image: Tensor,
        index: Tensor | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SafeBank:
        """Writes the bank file of `text` and `image` [N, d] a part at a time, and opens it memory-mapped.

        For banks larger than memory: nothing of size N is held, if `text` and `image` are mapped too. The file is what
        `SafeBank(text[index].float(), image[index].float(), metadata).save(path)` writes, not packed.

        Args:
            index: int64 [M], the rows to take; default all.

        Raises:
            ValueError: as the constructor. OSError: no room, checked before the first row.
        """
        path, count = Path(path), len(text) if index is None else len(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        header = {**(metadata or {}), "format": FORMAT, "normalized": "l2"}
        try:
            tensors = dict.fromkeys(("text", "image"), (torch.float32, (count, text.shape[1])))
            file = RowFile(temporary, tensors, header)
            for begin in range(0, count, _NORMALIZE_ROWS):
                part = slice(begin, begin + _NORMALIZE_ROWS)
                chosen = part if index is None else index[part]
                wide = torch.promote_types(text.dtype, torch.float32)  # else half-precision rows would miss unit length
                bank = cls(text[chosen].to(wide), image[chosen].to(wide))
                file.write("text", begin, bank.text)
                file.write("image", begin, bank.image)
            file.close()
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return cls.load(path)

    @classmethod
    def load(cls, path: str | Path, expect: Mapping[str, str] | None = None) -> SafeBank:
        """Opens a bank file, memory-mapped: rows are read from disk when they are used.

        Args:
            path: what `save` wrote.
            expect: metadata that must agree, for example `{"weights_hash": clip.weights_hash}`.

        Raises:
            FileNotFoundError, ValueError: not a bank file, damaged, or made from another model or data set; the
                message names the field, both values and the remedy.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no bank file at {path}; make one with SafeBank(text, image).save({str(path)!r})")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}); rebuild the bank") from error
        if metadata.pop("format", None) != FORMAT or not {"text", "image"} <= set(tensors):
            raise ValueError(f"{path} is not a SafeBank file (expected format {FORMAT}); it holds {sorted(tensors)}")
        metadata.pop("normalized", None)
        text, image = tensors["text"], tensors["image"]
        if text.shape != image.shape or text.dim() != 2 or not len(text):
            raise ValueError(f"{path}: text {tuple(text.shape)} and image {tuple(image.shape)} are not aligned rows")
        for key, wanted in (expect or {}).items():
            if metadata.get(key) != str(wanted):
                raise ValueError(
                    f"{path} was made with {key}={metadata.get(key)!r}, but {key}={str(wanted)!r} is in use;"
                    " delete the file to rebuild it, or use the model and data that it was made from"
                )
        return cls.from_unit(text, image, metadata, tensors.get("packed"))


def _normalize(name: str, rows: Tensor) -> Tensor:
    unit = torch.empty_like(rows, memory_format=torch.contiguous_format, requires_grad=False)
    for begin in range(0, len(rows), _NORMALIZE_ROWS):
        chunk = rows[begin : begin + _NORMALIZE_ROWS].detach()
        check_finite(name, chunk)
        scaled = chunk.to(wide(chunk.dtype))
        norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        if not ((norms > _SHORT) & (norms < _LONG)).all():  # squares may vanish or overflow
            scaled, _ = near_one(chunk)
            norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        if not norms.all():
            row = begin + int((norms == 0).nonzero()[0, 0])
            raise ValueError(f"{name} row {row} is all zeros and has no direction; drop this pair")
        unit[begin : begin + _NORMALIZE_ROWS] = (scaled / norms).to(rows.dtype)
    return unit
