"""What every method shares: edits of any tensor, methods that change how a model draws, the change of text."""
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import erasing
from diffusion import guided
from plumbing import UserError
from plumbing.edits import about_edit, cross_attention, original, read_edit
from plumbing.models import MINI
from plumbing.results import evaluate
from sample import Model
from unet import UNet

PROMPT = ["a photo of the airplane"]
CONV = '''"""A method that changes a convolution and a bias.

    python conv.py --concept airplane
"""
from dataclasses import dataclass

from erasing import run
from plumbing.edits import original


@dataclass(frozen=True)
class Settings:
    times: float = 2.0


def erase(job, s):
    W = original(job.model_folder, ["conv_out.weight", "conv_out.bias"])
    return {name: s.times * tensor.float() for name, tensor in W.items()}


if __name__ == "__main__":
    run("Conv", __doc__, Settings, erase)
'''
GUIDE = CONV.replace("A method that changes a convolution and a bias", "A method that changes how a model draws").replace(
    '''    W = original(job.model_folder, ["conv_out.weight", "conv_out.bias"])
    return {name: s.times * tensor.float() for name, tensor in W.items()}
''', '''    job.drawing = {"guide": lambda u, c, t: u}
    return {}
''').replace("from plumbing.edits import original\n", "")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Runs a method's text as a file of one's own: own(text, *flags)."""
    monkeypatch.chdir(tmp_path)

    def start(text, *flags):
        (tmp_path / "mine.py").write_text(text)
        monkeypatch.setattr(sys, "argv", ["mine.py", "--concept", "airplane", *map(str, flags)])
        runpy.run_path(str(tmp_path / "mine.py"), run_name="__main__")
    return start


@pytest.fixture(scope="module")
def model():
    model = Model(Path(MINI))
    model.defaults["steps"] = 2
    return model


def test_a_method_may_change_any_tensor_of_the_unet(own, tmp_path, model, capsys):
    own(CONV, "--no-pictures", "--export", "sd")
    out, base = tmp_path / "out/airplane-conv", original(MINI, ["conv_out.weight", "conv_out.bias"])
    assert {path.name for path in out.iterdir()} == {"erased.safetensors", "run.json"}
    W = read_edit(out, MINI)
    assert W.keys() == base.keys() and all(torch.equal(W[name], 2 * base[name]) for name in W)
    assert all(W[name].dtype == base[name].dtype and W[name].shape == base[name].shape for name in W)
    assert torch.equal(load_file(tmp_path / "sd/unet/diffusion_pytorch_model.safetensors")["conv_out.bias"],
                       W["conv_out.bias"])
    numbers = json.loads((out / "run.json").read_text())["numbers"]
    assert numbers == {"‖ΔW‖/‖W‖": pytest.approx(1)} and "edit: ‖ΔW‖/‖W‖ 1" in capsys.readouterr().out
    plain = model.draw(PROMPT, [1])
    model.put(W)
    changed = model.draw(PROMPT, [1])
    model.put({})
    assert torch.equal(model.draw(PROMPT, [1]), plain) and (changed - plain).abs().max() > 0.05


@pytest.mark.parametrize("flags, match", [(["--export-lora", 2], "a LoRA holds"),
                                          (["--preview", "p.txt"], "leaves keys and values alone")])
def test_what_such_an_edit_cannot_give_is_one_line(own, tmp_path, capsys, flags, match):
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(SystemExit) as end:
        own(CONV, "--no-pictures", *flags)
    assert end.value.code == 2 and match in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_method_that_changes_how_a_model_draws_leaves_a_report_alone(own, tmp_path):
    for more in ([], ["--overwrite"]):
        own(GUIDE, "--n", 1, *more)
    out = tmp_path / "out/airplane-conv"
    assert {path.name for path in out.iterdir()} == {"before_after.png", "run.json"}
    assert about_edit(out)["method"] == "Conv" and read_edit(out, MINI) == {}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text("{}")
    with pytest.raises(SystemExit):
        own(GUIDE, "--no-pictures", "--out", "other", "--overwrite")


def test_draw_takes_other_rows_another_guidance_and_a_part_of_an_edit(model):
    plain, seen, scale = model.draw(PROMPT, [1]), [], model.defaults["guidance"]

    def guide(u, c, t, more):
        seen.append((u - more).abs().max().item())
        return guided(u, c, scale)

    assert torch.equal(model.draw(PROMPT, [1], rows=lambda c: c), plain)
    assert torch.equal(model.draw(["a cat"], [1], rows=lambda c: model.text(PROMPT)), plain)
    same = model.draw(PROMPT, [1], guide=guide, beside=model.text([""]))
    assert (same - plain).abs().max() < 1e-3 and len(seen) == 2 and max(seen) < 1e-4
    W = {name: 0.5 * tensor for name, tensor in cross_attention(MINI).items()}
    model.put(W)
    whole = model.draw(PROMPT, [1])
    for m, expected in ((0.0, plain), (1.0, whole)):
        assert torch.equal(model.draw(PROMPT, [1], strength=lambda c: m), expected)
    many = model.draw(["a cat", *PROMPT], [2, 1], strength=lambda c: 1.0 if torch.equal(
        c, model.text(["a cat"])[0]) else 0.0)
    assert torch.equal(many[1], plain[0]) and torch.equal(many[0], model.draw(["a cat"], [2])[0])
    half = model.draw(PROMPT, [1], strength=lambda c: 0.5)
    model.put({name: 0.75 * tensor.float() for name, tensor in cross_attention(MINI).items()})
    assert torch.allclose(half, model.draw(PROMPT, [1]), atol=1e-5)
    model.put({})
    assert torch.equal(model.draw(PROMPT, [1]), plain) and (whole - plain).abs().max() > 0.05


def test_pictures_of_an_edit_beyond_keys_and_values_are_kept_apart(model, tmp_path):
    clip = erasing.CLIP.from_pretrained(f"{MINI}/clip")
    job = [(PROMPT[0], 1)]
    plain = evaluate(model, clip, job, tmp_path)[job[0]]
    model.put({"conv_out.weight": 3 * original(MINI, ["conv_out.weight"])["conv_out.weight"]})
    changed = evaluate(model, clip, job, tmp_path)[job[0]]
    model.put({})
    assert not torch.equal(plain, changed) and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(evaluate(model, clip, job, tmp_path)[job[0]], plain)


def test_the_change_of_text_is_the_closed_forms_own_and_the_best_for_any_other_edit():
    W0 = {str(i): torch.randn(9, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    delta = torch.randn(6, 6, generator=torch.Generator().manual_seed(9)).double()
    assert (erasing.text_change(W0, erasing.edited(W0, delta)) - delta).abs().max() < 1e-5
    W = {"0": W0["0"] + 1, "3": 2 * W0["3"]}                      # "1" and "2" stay
    stacked = torch.cat([W0[name] for name in W0]).double()
    wanted = torch.cat([W.get(name, W0[name]) for name in W0]).double()
    best = torch.linalg.lstsq(stacked, wanted).solution - torch.eye(6).double()
    assert (erasing.text_change(W0, W) - best).abs().max() < 1e-5
    with pytest.raises(UserError, match="keys and values alone"):
        erasing.text_change(W0, {"conv": torch.ones(2)})


def test_attention_probabilities_on_request_are_what_attention_uses():
    unet, kept = UNet.from_pretrained(f"{MINI}/unet"), []
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    layer, inputs = layers[0], []
    layer.register_forward_hook(lambda module, args, y: inputs.append((*args, y)))
    z, c = torch.randn(1, 4, 16, 16), torch.randn(1, 32, 256)
    plain = unet(z, 500, c)
    layer.seen = kept
    assert torch.equal(unet(z, 500, c), plain) and len(kept) == 1
    x, context, y = inputs[-1]
    assert torch.allclose(kept[0].sum(-1), torch.ones(kept[0].shape[:-1])) and kept[0].shape[-1] == 32
    v = layer.to_v(context).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    assert torch.allclose(layer.to_out((kept[0] @ v).transpose(1, 2).flatten(2)), y, atol=1e-5)


def test_uce_is_rece_without_rounds_bit_for_bit(here, tmp_path):
    flags = ["--concept", "airplane", "--anchor", "sky", "--no-pictures"]
    here("baselines/uce.py", *flags, cwd=tmp_path)
    here("rece.py", *flags, "--rounds", 0, cwd=tmp_path)
    a, b = (load_file(tmp_path / f"out/airplane-{name}/erased.safetensors") for name in ("uce", "rece"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
