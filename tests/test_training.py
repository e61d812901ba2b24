"""Float32 copies learn beside the network, which stays the teacher."""
import copy
import math

import diffusers
import pytest
import torch

from diffusion import Scheduler
from helpers import random
from plumbing import UserError
from plumbing.training import descend, learnable, predict
from unet import UNet, UNetConfig

NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def small_unet():
    torch.manual_seed(0)
    return UNet(UNetConfig(4, 4, (8, 8), ("CrossAttnDownBlock2D", "DownBlock2D"),
                           ("UpBlock2D", "CrossAttnUpBlock2D"), 1, 6, 2, norm_num_groups=4)
                ).requires_grad_(False)


@pytest.fixture
def inputs(small_unet):
    z, c = random(2, 4, 8, 8, seed=0), random(2, 7, small_unet.config.cross_attention_dim, seed=1)
    return z, torch.tensor([3, 900]), c


def test_copies_predict_as_weights_of_a_network_would_and_have_their_gradients(small_unet, inputs):
    z, t, c = inputs
    W = learnable(small_unet, [NAME])
    plain = small_unet(z.float(), t, c.float())
    assert torch.equal(predict(small_unet, z, t, c, W), plain)
    assert torch.equal(predict(small_unet, z, t, c), plain)
    with torch.no_grad():
        W[NAME] += 0.1
    other = copy.deepcopy(small_unet)
    other.get_parameter(NAME).data.copy_(W[NAME].detach())
    other.get_parameter(NAME).requires_grad_()
    other(z.float(), t, c.float()).square().sum().backward()
    predict(small_unet, z, t, c, W).square().sum().backward()
    assert torch.equal(W[NAME].grad, other.get_parameter(NAME).grad)
    assert torch.equal(small_unet(z.float(), t, c.float()), plain)     # the teacher is as it was


def test_of_a_network_that_predicts_velocity_training_sees_the_noise(small_unet, inputs):
    """And so does every other caller: the scheduler of diffusers finds the same z_0 in v as we in ε."""
    z, t, c = inputs
    v, W = small_unet(z.float(), t, c.float()), learnable(small_unet, [NAME])
    theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     clip_sample=False, prediction_type="v_prediction")
    theirs.set_timesteps(1000)
    small_unet.alphas_cumprod = Scheduler().alphas_cumprod
    for noise in (predict(small_unet, z, t, c, W), small_unet(z.float(), t, c.float())):
        for i, time in enumerate(t):
            z0 = theirs.step(v[i:i + 1], time, z[i:i + 1].float()).pred_original_sample
            again = theirs.add_noise(z0, noise[i:i + 1], time[None])
            assert (again - z[i:i + 1].float()).abs().max() < 1e-5
    predict(small_unet, z, t, c, W).square().sum().backward()
    assert W[NAME].grad.abs().max() > 0
    half = copy.deepcopy(small_unet).to(torch.bfloat16)
    assert half(z.float(), t, c.bfloat16()).dtype == torch.float32       # z is not rounded before it is added


def test_a_bfloat16_networks_copies_learn_what_bfloat16_would_lose(small_unet, inputs):
    z, t, c = inputs
    unet = copy.deepcopy(small_unet).to(torch.bfloat16)
    W, before = learnable(unet, [NAME]), unet.get_parameter(NAME).float()
    losses = descend(W.values(), lambda step: predict(unet, z, t, c, W).square().mean(), 3,
                     torch.optim.Adam(W.values(), 1e-6), "learning")
    moved = W[NAME].detach() - before
    assert len(losses) == 3 and 0 < moved.abs().max() < 4e-6
    assert torch.equal(W[NAME].detach().bfloat16(), before.bfloat16())


def test_descend_takes_the_optimizers_steps_clips_and_names_the_step_that_is_not_finite():
    x = torch.tensor([3.0, 4.0], requires_grad=True)              # gradient of x²/2 is x, of length 5
    assert descend([x], lambda step: x.square().sum() / 2, 1, torch.optim.SGD([x], 1.0), "", clip=1) == [12.5]
    assert torch.allclose(x.detach(), torch.tensor([2.4, 3.2]))
    with pytest.raises(UserError, match="NaN at step 2: try a smaller lr"):
        descend([x], lambda step: x.sum() * (1 if step == 1 else math.nan), 3, torch.optim.SGD([x], 0.1), "")
    assert descend([x], lambda step: x.sum(), 0, torch.optim.SGD([x], 0.1), "") == []


@pytest.mark.parametrize("method, flags, match", [
    (method, flags, match) for method in ("ac", "esd", "fmn", "sa") for flags, match in (
        (["--preview", "prompts.txt"], "no closed form.*tools/preview.py"),
        (["--export-lora", 4], "a LoRA holds changes of matrices alone"))
    if (method, flags[0]) != ("ac", "--export-lora")])             # AC's are matrices
def test_what_cannot_be_done_is_refused_before_training(refused, tmp_path, monkeypatch, method, flags, match):
    monkeypatch.setattr("plumbing.training.descend", None)
    (tmp_path / "prompts.txt").write_text("a prompt")
    refused(f"baselines/{method}.py", "--concept", "airplane", "--anchor", "sky", *flags, cwd=tmp_path,
            match=match)
