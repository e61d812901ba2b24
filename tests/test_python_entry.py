"""From Python, in a folder of one's own: Model("mini"), draw, erase_with, show; as in a notebook."""
from safetensors.torch import load_file

from helpers import ROOT, SIZE
from starts import run

NOTEBOOK = """
import sys
sys.path.insert(0, {root!r})
import realera
from baselines import uce
from erasing import erase_with
from plumbing import svg
from sample import Model, show
from safetensors.torch import load_file, save_file
import torch

model = Model("mini")
picture = model.draw("a photo of the dog", steps=2)
assert picture.shape == (1, 3, {size}, {size})
assert model.draw("a photo of the dog", range(3), steps=2).shape[0] == 3
assert (model.draw(["a photo of the dog", "a photo of the cat"], steps=2)[0] - picture[0]).abs().max() < 1e-5

W, numbers = erase_with(realera, model, "dog", "ground", M=20, lora_steps=1, trajectories=2, batch=1)
assert numbers["numbers"]["‖ΔW‖/‖W‖"] > 0 and set(numbers["losses"]) == {{"Eq. 8", "Eq. 9"}}
assert (model.draw("a photo of the dog", steps=2) - picture).abs().max() < 1e-5      # it is untouched
closed, numbers = erase_with(realera, model, "dog", M=20, lora_steps=0)               # its own anchor: ground
save_file(closed, "closed.safetensors")
other, numbers = erase_with(uce, model, "dog", "", lamb=0.4)
assert numbers["numbers"] and other.keys() == W.keys()

drawing = show(model, ["a photo of the dog"], {{"RealEra": W, "UCE": other}}, range(2), steps=2)
text = drawing._repr_svg_()
assert text.count("<image ") == 6 and all(word in text for word in ("untouched", "RealEra", "UCE", "the dog"))
svg.write("shown.svg", drawing)
model.put(W)
assert (model.draw("a photo of the dog", steps=2) - picture).abs().max() > 1e-3
"""


def test_a_notebook_in_another_folder_erases_and_shows(here, tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK.format(root=str(ROOT), size=SIZE), encoding="utf-8")
    run(tmp_path / "notebook.py", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "closed.safetensors", "notebook.py", "shown.svg"]
    here("realera.py", "--concept", "dog", "--anchor", "ground", "--no-pictures", "--set", "M=20",
         "lora_steps=0", cwd=tmp_path)
    files = ("closed.safetensors", "out/dog/erased.safetensors")
    ours, command = (load_file(tmp_path / name) for name in files)
    assert ours.keys() == command.keys() and all((ours[key] == command[key]).all() for key in ours)
