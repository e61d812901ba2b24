"""UCE is the start of RECE."""
import torch
from safetensors.torch import load_file


def test_uce_is_rece_without_rounds_bit_for_bit(here, tmp_path):
    flags = ["--concept", "airplane", "--anchor", "sky", "--no-pictures"]
    here("baselines/uce.py", *flags, cwd=tmp_path)
    here("rece.py", *flags, "--rounds", 0, cwd=tmp_path)
    a, b = (load_file(tmp_path / f"out/airplane-{name}/erased.safetensors") for name in ("uce", "rece"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
