"""Pictures as PNG files that say what they are, and as grids of many. No picture library is needed."""
import json
import struct
import zlib
from pathlib import Path
from typing import Iterable

import numpy as np
import torch
from torch import Tensor

from plumbing import UserError
from plumbing.disk import whole


def as_png(picture, text: dict | None = None) -> bytes:
    """`picture`, uint8 [H, W, 3] or its rows, as a PNG: header, texts, rows deflated behind filter byte 1:
    each pixel less the one to its left, modulo 256. `mini`'s pictures are a third smaller for it.

    text: what the file says of itself, {"prompt": "a photo of the dog", "seed": 0, …}. A key is a keyword of
    PNG: 1 to 79 ASCII characters, no space at its ends. A value that is no string is written as JSON.
    """
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate, data = zlib.compressobj(), bytearray()
    for height, row in enumerate(picture, 1):
        data += deflate.compress(b"\1" + np.diff(row, axis=0, prepend=np.zeros_like(row[:1])).tobytes())
    data += deflate.flush()
    header = struct.pack(">IIBBBBB", len(row), height, 8, 2, 0, 0, 0)         # 8 bits, RGB, no interlace
    said = b""
    for key, value in (text or {}).items():
        if not (key.isascii() and key.isprintable() and key == key.strip() and 1 <= len(key) <= 79):
            raise ValueError(f"{key!r} is not a PNG keyword")
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # Plain UTF-8 (iTXt), neither compressed nor in a named language. A zero byte would end the text.
        said += chunk(b"iTXt", key.encode() + b"\0" * 5 + value.replace("\0", "").encode(errors="replace"))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + said + chunk(b"IDAT", data)
            + chunk(b"IEND", b""))


def write_png(path: str | Path, picture, text: dict | None = None) -> None:
    """`picture`, uint8 [H, W, 3], as the file `path`, with `text` as in as_png: all of it or nothing."""
    with whole(path) as temporary:
        temporary.write_bytes(as_png(picture, text))


def read_png(path: str | Path) -> Tensor:
    """A file of `write_png`, by nobody else -> [3, H, W] in [0, 1].

    Raises UserError if its lines are not as as_png writes them.
    """
    data, at, rows = Path(path).read_bytes(), 8, b""
    width, height = struct.unpack(">II", data[16:24])
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        rows += data[at + 8:at + 8 + length] * (kind == b"IDAT")
        at += length + 12
    rows = np.frombuffer(zlib.decompress(rows), np.uint8).reshape(height, 1 + 3 * width)
    if (rows[:, 0] != 1).any():
        raise UserError(f"{path} was not written by this version: draw it again")
    picture = rows[:, 1:].reshape(height, width, 3).cumsum(1, np.uint8)
    return torch.from_numpy(picture).permute(2, 0, 1) / 255


def pixels(pictures: Tensor):
    """pictures [N, 3, H, W] in [0, 1] -> uint8 [N, H, W, 3]."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def write_sheet(path: str | Path, *columns: Tensor, text: dict | None = None) -> None:
    """Pictures side by side as one PNG: each block [rows, n, 3, H, W] in [0, 1], small ones enlarged."""
    rows = (torch.cat(row) for row in zip(*columns))
    n = sum(block.shape[1] for block in columns)
    write_png(path, sheet_lines(rows, n, max(1, 96 // columns[0].shape[-1])), text)


def grid(pictures: Tensor, columns: int, zoom: int = 1):
    """pictures [N, 3, H, W] in [0, 1] -> uint8 [height, width, 3], row by row, 2 white pixels between."""
    return np.stack(list(sheet_lines(pictures.split(columns), columns, zoom)))


def sheet_lines(rows: Iterable[Tensor], columns: int, zoom: int):
    """Rows of pictures [n, 3, H, W] -> the lines of their sheet, uint8 [width, 3], of thousands, too."""
    for i, row in enumerate(rows):
        white = np.full((2 + columns * (row.shape[-1] * zoom + 2), 3), 255, np.uint8)
        yield from [white] * (2 if i == 0 else 0)
        for line in pixels(row).swapaxes(0, 1):                   # [n, W, 3]
            shown = np.pad(line.repeat(zoom, 1), ((0, 0), (0, 2), (0, 0)), constant_values=255).reshape(-1, 3)
            yield from [np.concatenate([white[:2], shown, white[2 + len(shown):]])] * zoom
        yield from [white] * 2
