"""SVG files: valid XML, every label a text, pictures inside to the bit, axes that hold the data."""
import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import PIL.Image
import pytest
import torch

from plumbing import UserError, svg
from plumbing.pictures import write_png

NS = "{http://www.w3.org/2000/svg}"
HARD = """<b>"R&D"</b> 'a' → 犬 \x00\x1b\ud800"""
PROMPT = "a picture of a small wooden boat on a quiet lake at sunset, seen from above"
PICTURES = torch.rand(6, 3, 8, 10, generator=torch.Generator().manual_seed(0))


def parsed(drawing, tmp_path):
    svg.write(tmp_path / "a.svg", drawing)
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
    return ET.parse(tmp_path / "a.svg").getroot()


def texts(root):
    """Each text's words, joined: a label may be cut into lines at its spaces."""
    return " ".join(element.text for element in root.iter(f"{NS}text"))


def decoded(root):
    """The pictures in it, as uint8 [H, W, 3]."""
    found = []
    for image in root.iter(f"{NS}image"):
        kind, _, data = image.get("href").partition(",")
        assert kind == "data:image/png;base64"
        found.append(np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data, validate=True)))))
    return found


def as_bytes(pictures):
    return np.round(pictures.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)


def inside(root):
    """Nothing begins outside the picture."""
    width, height = float(root.get("width")), float(root.get("height"))
    for group in root.findall(f"{NS}g"):
        left, top = map(float, re.findall(r"[\d.]+", group.get("transform")))
        for element in group.iter():
            if element.get("y"):
                x, y = left + float(element.get("x")), top + float(element.get("y"))
                x, y = x + float(element.get("width", 0)), y + float(element.get("height", 0))
                assert 0 <= x <= width and 0 <= y <= height, element.attrib


def test_a_sheet_shows_every_label_and_note_and_each_picture_to_the_bit(tmp_path):
    notes = [["airplane 4/4", "mostly sky"], ["ship 4/4", "97\u00a0%"]]
    root = parsed(svg.sheet([[PICTURES[:2], PICTURES[2]], [PICTURES[3:4], PICTURES[4:]]], [PROMPT, "dog"],
                            ["untouched", "closed form (Eq. 7)"], "What is drawn", notes,
                            "mini, seeds 0–1"), tmp_path)
    said = texts(root)
    for label in (PROMPT, "dog", "untouched", "closed form (Eq. 7)", "What is drawn", "mini, seeds 0–1",
                  *notes[0], *notes[1]):
        assert label in said
    assert np.array_equal(decoded(root), as_bytes(PICTURES))
    titles = [element.text for element in root.iter(f"{NS}title")]
    assert titles[0] == "What is drawn" and f"{PROMPT}, closed form (Eq. 7)" in titles
    assert int(root.get("width")) <= svg.WIDTH
    inside(root)


def test_a_cell_may_be_bytes_a_list_or_a_png_file(tmp_path):
    shown = as_bytes(PICTURES)
    (tmp_path / "in").mkdir()
    write_png(tmp_path / "in/a.png", shown[3], {"seed": 0})
    drawing = svg.sheet([[shown[0], shown[1:3], [tmp_path / "in/a.png", PICTURES[4]], PICTURES[5]]],
                        ["row"], [1, 2, 3, 4])
    (tmp_path / "out").mkdir()
    root = parsed(drawing, tmp_path / "out")
    assert np.array_equal(decoded(root), shown)
    assert (tmp_path / "in/a.png").read_bytes() in base64.b64decode(
        list(root.iter(f"{NS}image"))[3].get("href").partition(",")[2])


def test_pictures_of_a_cell_keep_their_form_and_do_not_overlap(tmp_path):
    cells = [[PICTURES[:5], PICTURES[:3], PICTURES[:5]]] * 2
    root = parsed(svg.sheet(cells, ["a", "b"], ["c", "d", "e"]), tmp_path)
    places = [tuple(float(image.get(key)) for key in ("x", "y", "width", "height"))
              for image in root.iter(f"{NS}image")]
    assert len(places) == 26
    for i, (x, y, width, height) in enumerate(places):
        assert width / height == pytest.approx(10 / 8, rel=0.01) and width >= 48
        for a, b, w, h in places[:i]:
            assert x >= a + w or a >= x + width or y >= b + h or b >= y + height


def drawings(label):
    return {"sheet": svg.sheet([[PICTURES]], [label], [label], label, [[label]], label),
            "curve": svg.curve({label: [(0, 1), (1, 2)]}, label, label, label),
            "scatter": svg.scatter({label: [(0, 1)]}, label, label, label),
            "heat_map": svg.heat_map([[1.0]], [label], [label], label, label, label)}


@pytest.mark.parametrize("kind", ["sheet", "curve", "scatter", "heat_map"])
def test_any_label_is_valid_xml_and_is_there_in_full(kind, tmp_path):
    root = parsed(drawings(HARD)[kind], tmp_path)
    assert texts(root).replace(" ", "").count("""<b>"R&D"</b>'a'→犬���""") >= 4
    inside(root)


@pytest.mark.parametrize("kind", ["sheet", "curve", "scatter", "heat_map"])
def test_a_label_of_any_length_is_wrapped_not_cut(kind, tmp_path):
    root = parsed(drawings("mmmmm " * 30 + "W" * 90)[kind], tmp_path)
    said = texts(root).replace(" ", "")
    assert said.count("mmmmm" * 30 + "W" * 90) >= 4
    for element in root.iter(f"{NS}text"):
        assert svg.length(element.text, int(element.get("font-size"))) <= float(root.get("width"))
    inside(root)


def test_drawings_stand_side_by_side_while_a_readme_has_room_and_are_the_same_bytes(tmp_path):
    half = svg.curve({"a": [(0, 1), (1, 2)]}, "x", "y", "half", width=420)
    svg.write(tmp_path / "a.svg", half, half, half)
    root = ET.parse(tmp_path / "a.svg").getroot()
    places = [tuple(map(float, re.findall(r"[\d.]+", g.get("transform")))) for g in root.findall(f"{NS}g")]
    assert places[0][1] == places[1][1] < places[2][1] and places[0][0] == places[2][0] < places[1][0]
    assert int(root.get("width")) <= svg.WIDTH
    first = (tmp_path / "a.svg").read_bytes()
    svg.write(tmp_path / "a.svg", half, half, half)
    assert (tmp_path / "a.svg").read_bytes() == first
    assert half._repr_svg_() == svg.page(half)
    assert repr(half).startswith("<drawing, ") and len(repr(half)) < 80              # in a terminal


@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_round_enclose_the_values_and_are_few(log):
    random = np.random.default_rng(0)
    for _ in range(300):
        sign = 1 if log else random.choice([1, -1])
        values = list(sign * 10 ** random.uniform(-6, 6, random.integers(1, 4)))
        found = svg.ticks(values, log, 5)
        assert found[0] <= min(values) * (1 + 1e-8 * np.sign(min(values))) and found == sorted(set(found))
        assert found[-1] >= max(values) * (1 - 1e-8 * np.sign(max(values)))
        assert len(found) >= 2 and (log or len(found) <= 7)
        step = found[1] - found[0]
        digits = f"{found[1] / found[0] if log else step:e}"[:8]
        assert digits in ("1.000000", "2.000000", "5.000000", "9.999999")


def test_ticks_known():
    assert svg.ticks([0, 100], False, 5) == [0, 20, 40, 60, 80, 100]
    assert svg.ticks([97, 100], False, 5) == [97, 98, 99, 100]
    assert svg.ticks([3, 100], False, 5)[0] == 0                  # near 0: from 0 on
    assert svg.ticks([5, 5], False, 5) == [5, 6]
    assert svg.ticks([0, 0], False, 5)[0] == 0
    assert svg.ticks([0.02, 3], True, 5) == [0.01, 0.1, 1, 10]


def points_of(element):
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def where(root, text):
    """The x and y of the tick of that name."""
    found = [e for e in root.iter(f"{NS}text") if e.text == text and e.get("font-size") == "11"]
    return [(float(e.get("x")), float(e.get("y"))) for e in found]


def test_a_curve_lies_where_its_axes_say(tmp_path):
    root = parsed(svg.curve({"loss": [(0, 20), (50, 10), (100, 40)]}, "steps", "loss"), tmp_path)
    line = points_of(next(root.iter(f"{NS}polyline")))
    x = {value: where(root, str(value))[-1][0] for value in (20, 40, 100)}
    y = {value: where(root, str(value))[0][1] - 4 for value in (10, 20, 40)}
    assert line[0][1] == pytest.approx(y[20], abs=0.11) and line[1][1] == pytest.approx(y[10], abs=0.11)
    assert line[2] == pytest.approx((x[100], y[40]), abs=0.11)
    assert line[1][0] == pytest.approx(x[20] + 1.5 * (x[40] - x[20]), abs=0.3)


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors(tmp_path):
    root = parsed(svg.curve({"": [(0.001, 1), (0.01, 10), (0.1, 100)]}, "λ1", "drift", log="xy"), tmp_path)
    (a, b), (c, d), (e, f) = points_of(next(root.iter(f"{NS}polyline")))
    assert e - c == pytest.approx(c - a, abs=0.2) and f - d == pytest.approx(d - b, abs=0.2) and f < d < b
    assert {"0.001", "0.01", "0.1", "1", "10", "100"} <= set(texts(root).split())


def test_a_band_goes_along_the_lower_and_back_along_the_upper_ends(tmp_path):
    root = parsed(svg.curve({"Acc": [(0, 5, 4, 7), (1, 6, 5, 9)]}, "x", "y"), tmp_path)
    line, band = points_of(next(root.iter(f"{NS}polyline"))), points_of(next(root.iter(f"{NS}polygon")))
    assert [x for x, _ in band] == [line[0][0], line[1][0], line[1][0], line[0][0]]
    assert band[0][1] > line[0][1] > band[3][1] and band[1][1] > line[1][1] > band[2][1]


def test_a_scatter_tells_ten_methods_apart_and_marks_each_point(tmp_path):
    names = [f"method {i}" for i in range(10)]
    points = {name: [(i, 2 * i), (i + 1, i)] for i, name in enumerate(names)}
    root = parsed(svg.scatter(points, "x", "y"), tmp_path)
    assert all(name in texts(root) for name in names)
    marks = [(e.get("fill"), e.get("d")) for e in root.iter(f"{NS}path") if e.get("transform")]
    assert len(marks) == 10 * 3 and len(set(marks)) == 10         # two points and the legend's


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
               for w, c in zip((0.2126, 0.7152, 0.0722), parts))


def test_a_heat_map_prints_readable_numbers_darker_the_higher(tmp_path):
    values = torch.linspace(-30, 90, 60).view(6, 10)
    root = parsed(svg.heat_map(values, list("abcdef"), range(10), "Acc_s − Acc_e", "M", "N"), tmp_path)
    cells = [(rect, group.find(f"{NS}text")) for group in root.iter(f"{NS}g")
             for rect in group.findall(f"{NS}rect")]
    wanted = [f"{value:.1f}".replace("-", "−") for value in values.flatten().tolist()]
    assert [text.text for _, text in cells] == wanted
    light = [luminance(rect.get("fill")) for rect, _ in cells]
    assert light == sorted(light, reverse=True) and light[0] > 3 * light[-1]
    for shade, (_, text) in zip(light, cells):
        ink = {"#fff": 1.0, "#000": 0.0}[text.get("fill")]
        assert (max(ink, shade) + 0.05) / (min(ink, shade) + 0.05) >= 4.5
    for word in ("M", "N", "Acc_s − Acc_e", *"abcdef", *"0123456789"):
        assert word in texts(root)


def test_equal_values_and_a_rounded_minus_zero(tmp_path):
    root = parsed(svg.heat_map([[-0.01, -0.01]], ["a"], ["b", "c"]), tmp_path)
    assert texts(root).count("0.0") == 2 and "−" not in texts(root)


NAN = PICTURES.clone()
NAN[1, 0, 0, 0] = float("nan")


@pytest.mark.parametrize("make, said", [
    (lambda: svg.sheet([], [], []), "0 rows"), (lambda: svg.sheet([[]], ["a"], []), "0 columns"),
    (lambda: svg.sheet([[PICTURES]], ["a"], ["b", "c"]), "2 columns have labels.* rows of 1 "),
    (lambda: svg.sheet([[PICTURES]], ["a"], ["b"], notes=[["x", "y"]]), "notes"),
    (lambda: svg.sheet([[PICTURES[:0]]], ["a"], ["b"], "sky"), "sky: a cell has no picture"),
    (lambda: svg.sheet([[NAN]], ["dog"], ["edited"]), "dog, edited: NaN"),
    (lambda: svg.curve({}, "x", "loss"), "loss: there is nothing"),
    (lambda: svg.curve({"test": []}, "x", "loss"), "loss: test: there is nothing"),
    (lambda: svg.curve({"test": [(0, float("nan"))]}, "x", "loss"), "loss: test: NaN"),
    (lambda: svg.scatter({"UCE": [(float("inf"), 0)]}, "x", "y", "attacks"), "attacks: UCE: NaN and inf"),
    (lambda: svg.curve({"a": [(1, 0)]}, "x", "y", log="y"), "above 0 only, not 0"),
    (lambda: svg.heat_map([[1, float("nan")]], ["a"], ["b", "c"], "M × N"), "M × N: NaN"),
    (lambda: svg.heat_map([[1]], ["a", "b"], ["c"]), "2 rows"), (lambda: svg.heat_map([], [], []), "0 rows")])
def test_what_cannot_be_drawn_says_why(make, said):
    with pytest.raises(UserError, match=said):
        make()
