"""Pictures as PNG files that say what they are, and as grids of many. No picture library is needed."""
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plumbing.disk import whole


def as_png(picture, text: dict | None = None) -> bytes:
    """`picture`, uint8 [H, W, 3], as a PNG: header, texts, deflated rows behind filter byte 0, and an end.

    text: what the file says of itself, {"prompt": "a photo of the dog", "seed": 0, …}. A key is a keyword of
    PNG: 1 to 79 ASCII characters, no space at its ends. A value that is no string is written as JSON.
    """
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = picture.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)            # 8 bits, RGB, no interlace
    said = b""
    for key, value in (text or {}).items():
        if not (key.isascii() and key.isprintable() and key == key.strip() and 1 <= len(key) <= 79):
            raise ValueError(f"{key!r} is not a PNG keyword")
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # Plain UTF-8 (iTXt), neither compressed nor in a named language. A zero byte would end the text.
        said += chunk(b"iTXt", key.encode() + b"\0" * 5 + value.replace("\0", "").encode(errors="replace"))
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + said + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def write_png(path: str | Path, picture, text: dict | None = None) -> None:
    """`picture`, uint8 [H, W, 3], as the file `path`, with `text` as in as_png: all of it or nothing."""
    with whole(path) as temporary:
        temporary.write_bytes(as_png(picture, text))


def pixels(pictures: Tensor):
    """pictures [N, 3, H, W] in [0, 1] -> uint8 [N, H, W, 3]."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def write_sheet(path: str | Path, *columns: Tensor, text: dict | None = None) -> None:
    """Pictures side by side as one PNG: each block [rows, n, 3, H, W] in [0, 1], small ones enlarged."""
    sheet = torch.cat(columns, dim=1)
    write_png(path, grid(sheet.flatten(0, 1), sheet.shape[1], max(1, 96 // sheet.shape[-1])), text)


def grid(pictures: Tensor, columns: int, zoom: int = 1):
    """pictures [N, 3, H, W] in [0, 1] -> uint8 [height, width, 3], row by row, 2 white pixels between."""
    shown = pixels(pictures).repeat(zoom, 1).repeat(zoom, 2)
    n, height, width, _ = shown.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(shown):
        y, x = 2 + (i // columns) * (height + 2), 2 + (i % columns) * (width + 2)
        sheet[y:y + height, x:x + width] = picture
    return sheet
