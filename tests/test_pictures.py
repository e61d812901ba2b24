"""PNG files, read back by Pillow."""
import json
import tracemalloc

import numpy as np
import PIL.Image
import pytest
import torch

from plumbing import UserError
from plumbing.pictures import as_png, grid, pixels, read_png, write_png, write_sheet

NOISE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
SAID = {"prompt": "a photo of the dog, café → 犬", "seed": 2 ** 61, "edit": "", "model": "mini",
        "settings": {"steps": 25, "guidance": 3.0, "name": "λ1"}}


def test_a_png_is_read_back_exactly_and_nothing_else_is_left(tmp_path):
    write_png(tmp_path / "a.png", NOISE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB" and picture.text == {} and np.array_equal(np.asarray(picture), NOISE)


def test_what_a_png_says_of_itself_is_read_back(tmp_path):
    write_png(tmp_path / "a.png", NOISE, SAID)
    with PIL.Image.open(tmp_path / "a.png") as picture:
        picture.load()                                            # Pillow checks each chunk's CRC
        assert np.array_equal(np.asarray(picture), NOISE)
        assert list(picture.text) == list(SAID)
        assert picture.text["prompt"] == SAID["prompt"] and picture.text["edit"] == ""
        assert picture.text["seed"] == str(2 ** 61)
        assert json.loads(picture.text["settings"]) == SAID["settings"]


def test_a_zero_byte_does_not_cut_a_text_off(tmp_path):
    write_png(tmp_path / "a.png", NOISE, {"prompt": "one\0two"})
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.text == {"prompt": "onetwo"}


def test_the_same_picture_and_text_are_the_same_bytes():
    assert as_png(NOISE, SAID) == as_png(NOISE.copy(), dict(SAID))
    assert as_png(NOISE, SAID) != as_png(NOISE, SAID | {"seed": 1})
    assert as_png(NOISE) == as_png(NOISE, {})


@pytest.mark.parametrize("key", ["", " prompt", "prompt ", "x" * 80, "λ1", "a\0b", "a\nb"])
def test_what_png_allows_no_text_to_be_called_is_refused(key):
    with pytest.raises(ValueError, match="keyword"):
        as_png(NOISE, {key: "x"})


def test_pixels_are_rounded_and_cut_off_at_0_and_1():
    picture = torch.tensor([-1, 0, 0.4 / 255, 0.6 / 255, 1, 2]).expand(1, 3, 2, 6)
    assert pixels(picture).shape == (1, 2, 6, 3)
    assert pixels(picture)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_a_picture_comes_back_as_it_was_written(tmp_path):
    picture = torch.rand(3, 5, 7)
    write_png(tmp_path / "x.png", pixels(picture[None])[0], {"prompt": "IDAT"})
    assert (255 * read_png(tmp_path / "x.png") - 255 * picture).abs().max() <= 0.51
    PIL.Image.fromarray(NOISE).save(tmp_path / "theirs.png")
    with pytest.raises(UserError, match="theirs.png was not written by this version"):
        read_png(tmp_path / "theirs.png")


def test_a_sheet_is_written_line_by_line(tmp_path):
    """Its memory is that of its lines: 1,000 pictures are 29 MB of pixels, in one row or in many."""
    pictures = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8).float()
    for columns in (1000, 4):
        tracemalloc.start()
        write_sheet(tmp_path / "sheet.png", pictures.unflatten(0, (-1, columns)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6
        assert PIL.Image.open(tmp_path / "sheet.png").size == (columns * 98 + 2, 1000 // columns * 98 + 2)


def test_a_grid_is_read_row_by_row_and_has_white_between():
    pictures = torch.arange(5)[:, None, None, None].expand(5, 3, 2, 3) / 255
    sheet = grid(pictures, columns=3, zoom=2)
    assert sheet.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, 3)
    where = {(i // 3, i % 3): i for i in range(5)}
    naive = np.full_like(sheet, 255)
    for y in range(sheet.shape[0]):
        for x in range(sheet.shape[1]):
            row, column, down, right = (y - 2) // 6, (x - 2) // 8, (y - 2) % 6, (x - 2) % 8
            if min(y, x) >= 2 and down < 4 and right < 6 and (row, column) in where:
                naive[y, x] = where[row, column]
    assert np.array_equal(sheet, naive)
