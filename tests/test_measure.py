"""mini/measure.py: the tables of the card."""
import json
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.mark.slow                                                 # until the next mini moves in
def test_measuring_fills_the_tables_of_the_card(trained, data, tmp_path):
    shutil.copytree(trained[0], tmp_path / "model")
    (tmp_path / "model/defaults.json").write_text(json.dumps({"guidance": 3.0, "steps": 1, "size": 32}))
    parts = ["cosines", "photos", "class", "diversity", "frechet"]
    command = [sys.executable, ROOT / "mini/measure.py", "--data", data, "--model", tmp_path / "model",
               "--n", 2, "--steps", 2, "--work", tmp_path / "work", "--frechet", 30, "--parts", *parts]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    found = json.loads((tmp_path / "work/measured.json").read_text())
    assert list(found) == parts and found["frechet"]["pictures"] == 30
    assert all(0 <= found["class"][who] <= 100 for who in ("clip", "judge"))
    card = (tmp_path / "work/measured.md").read_text()
    assert "synonyms, thirty" not in card and f"| {found['photos']['PSNR']} dB |" in card
