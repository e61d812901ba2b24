"""The preview: what an edit does to prompts, by text alone."""
import pytest
import torch

import erasing
import realera
from erasing import make_pairs
from helpers import AIRPLANE
from plumbing.drift import movement
from plumbing.prompts import preserved_prompts
from unet import UNet


def test_prompts_are_read_in_parts_so_that_memory_stays():
    asked = []

    def text(prompts):
        asked.append(len(prompts))
        return torch.ones(len(prompts), 3, 4)

    assert movement(2 * torch.eye(4).double(), ["x"] * 200, text) == [2] * 200
    assert sum(asked) == 200 and max(asked) <= 64


def test_preview_sorts_prompts_by_what_eq_7_does_to_them_without_a_unet(here, tmp_path, text, monkeypatch,
                                                                        capsys):
    for module, name in ((UNet, "from_pretrained"), (erasing, "whole_folder")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("this needs no U-Net and no folder"))
    prompts = ["a photo of the ship", "a photo of the airplane", "", "jet", "a photo of the ship"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    here("realera.py", *AIRPLANE, "--preview", "prompts.txt", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["‖Δe‖/‖e‖", "prompt"] and len(lines) == 3
    found = {line.split(maxsplit=1)[1]: float(line.split()[0]) for line in lines}
    assert list(found) == sorted(found, key=found.get, reverse=True) and list(found)[0] == prompts[1]
    pairs, s = make_pairs(["airplane"], ["sky"], "object", text, "tail", 0), realera.Settings()
    delta, _ = realera.erase_in_closed_form(pairs, text(preserved_prompts("object", pairs)), s)
    for prompt, value in found.items():
        e = text([prompt])[0].double()
        moved, size = (sum(float((x @ row).square().sum()) for row in e)
                       for x in (delta, torch.eye(len(delta)).double()))
        assert value == pytest.approx((moved / size) ** 0.5, abs=6e-4)
