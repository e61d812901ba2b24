"""Schedules and samplers against diffusers', step by step; guidance; the sampling loop of sample.py."""
import json

import diffusers
import pytest
import torch

from diffusion import SAMPLERS, Scheduler, SchedulerConfig, guided
from plumbing import UserError

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
          set_alpha_to_one=False)
ALPHAS = Scheduler().alphas_cumprod
THEIRS = {"ddim": lambda **config: diffusers.DDIMScheduler(clip_sample=False, **config),
          "pndm": lambda **config: diffusers.PNDMScheduler(skip_prk_steps=True, **config)}


def predict(z, t):
    """A stand-in U-Net: right for data of unit variance, and a little more, so z stays near unit size."""
    return (1 - ALPHAS[t]).sqrt() * z + 0.2 * torch.tanh(z.roll(1, dims=1)) * (0.5 + t / 1000)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50])
@pytest.mark.parametrize("config", [SD, dict(SD, beta_schedule="linear", set_alpha_to_one=True,
                                             steps_offset=0, beta_end=0.02),
                                    dict(SD, prediction_type="v_prediction")])
def test_every_step_equals_diffusers(name, steps, config):
    theirs = THEIRS[name](**config)
    theirs.set_timesteps(steps)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    z, expected = start, []
    for t in theirs.timesteps:
        expected.append((int(t), z))
        noise, a = predict(z, int(t)), ALPHAS[int(t)]
        z0 = (z - (1 - a).sqrt() * noise) / a.sqrt()
        velocity = config.get("prediction_type") == "v_prediction"           # which is √ᾱ ε − √(1 − ᾱ) z_0
        z = theirs.step(a.sqrt() * noise - (1 - a).sqrt() * z0 if velocity else noise, t, z).prev_sample
    seen = []

    def eps(z, t):
        seen.append((t, z))
        return predict(z, t)

    ours = SAMPLERS[name](eps, start, Scheduler(SchedulerConfig(**config)), steps)
    assert [t for t, _ in seen] == [t for t, _ in expected]
    for (_, a), (_, b) in zip(seen, expected):
        assert (a - b).abs().max() <= 1e-5
    assert (ours - z).abs().max() <= 1e-5


def test_schedule_of_stable_diffusion():
    scheduler = Scheduler()
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(0.99914998, abs=1e-7)
    assert scheduler.alphas_cumprod[999].item() == pytest.approx(0.00466010, abs=1e-7)
    assert scheduler.timesteps(50)[:2] == [981, 961] and scheduler.timesteps(50)[-1] == 1
    assert scheduler.alpha(-19) == scheduler.alphas_cumprod[0]


def test_added_noise_equals_diffusers():
    z, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    assert torch.allclose(Scheduler().add_noise(z, noise, t),
                          THEIRS["ddim"](**SD).add_noise(z, noise, t), atol=1e-6)


@pytest.mark.parametrize("s", [0, 1, 7.5])
def test_guidance_on_all_four_channels(s):
    """s = 0 is the unconditional prediction, 1 the conditional, and beyond 1 it goes on along the line."""
    u, c = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    result = guided(u, c, s)
    for channel in range(4):
        expected = (1 - s) * u[:, channel] + s * c[:, channel]
        assert torch.allclose(result[:, channel], expected, atol=1e-5)


def test_folder_decides_and_unknown_schedules_are_refused(tmp_path):
    def read(**changes):
        (tmp_path / "scheduler_config.json").write_text(json.dumps({**SD, "skip_prk_steps": True, **changes}))
        return Scheduler.from_pretrained(tmp_path)

    assert read(beta_end=0.02).config.beta_end == 0.02
    for key, value in dict(prediction_type="sample", timestep_spacing="trailing",
                           beta_schedule="squaredcos_cap_v2", skip_prk_steps=False, clip_sample=True).items():
        with pytest.raises(UserError, match=key):
            read(**{key: value})


SAVED = ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
         "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep",
         "UniPCMultistep"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SAVED)
def test_whatever_sampler_a_folder_was_saved_with_ours_draws(name, tmp_path, capsys):
    """The noise schedule is the same; only the times between which a sampler goes differ."""
    theirs = getattr(diffusers, f"{name}Scheduler").from_config(SD | {"clip_sample": False})
    theirs.register_to_config(clip_sample=False, skip_prk_steps=True)
    theirs.save_pretrained(tmp_path)
    ours = Scheduler.from_pretrained(tmp_path)
    assert torch.equal(ours.alphas_cumprod, ALPHAS) and ours.timesteps(50) == Scheduler().timesteps(50)
    said = capsys.readouterr().err
    assert ("our own DDIM draws" in said) == (theirs.config.get("timestep_spacing") == "linspace")
    assert said.count("\n") <= 1 and said[:9] in ("", "warning: ")


def test_impossible_step_counts_are_refused():
    for steps in (0, -3, 1001):
        with pytest.raises(UserError, match="steps"):
            Scheduler().timesteps(steps)
