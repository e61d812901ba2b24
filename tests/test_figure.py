"""mini/figure.py: how mini/ came about, in one picture."""
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from helpers import ROOT


@pytest.mark.slow                                                 # until the next mini moves in
def test_the_figure_has_a_panel_per_stage_and_what_was_drawn_on_the_way(trained, tmp_path):
    command = [sys.executable, ROOT / "mini/figure.py", "--work", trained[1], "--out", tmp_path / "t.svg"]
    subprocess.run(command, check=True)
    drawn = ElementTree.parse(tmp_path / "t.svg").getroot()
    kinds = [element.tag.rsplit("}")[-1] for element in drawn.iter()]
    assert kinds.count("polyline") == 12 and kinds.count("image") == 4   # a curve and its line in the legend
    done = subprocess.run([*command[:3], tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
