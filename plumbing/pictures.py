"""Pictures as PNG files, and as sheets of many. No picture library is needed."""
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from plumbing.disk import whole


def write_png(path: str | Path, picture) -> None:
    """`picture`, uint8 [H, W, 3], as a PNG: a header, the deflated rows behind filter byte 0, and an end."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = picture.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)            # 8 bits, RGB, no interlace
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    with whole(path) as temporary:
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                              + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def write_sheet(path: str | Path, *columns: Tensor) -> None:
    """Pictures side by side as one PNG: each block [rows, n, 3, H, W] in [0, 1], small ones enlarged."""
    sheet = torch.cat(columns, dim=1)
    write_png(path, grid(sheet.flatten(0, 1), sheet.shape[1], max(1, 96 // sheet.shape[-1])))


def grid(pictures: Tensor, columns: int, zoom: int = 1):
    """pictures [N, 3, H, W] in [0, 1] -> uint8 [height, width, 3], row by row, 2 white pixels between."""
    pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    sheet = torch.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        y, x = 2 + (i // columns) * (height + 2), 2 + (i % columns) * (width + 2)
        sheet[y:y + height, x:x + width] = picture
    return sheet.numpy()
