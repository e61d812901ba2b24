"""Our networks against diffusers and transformers on one model folder, mini/ or that of --model.

    python -m pytest --model=FOLDER [--device=cuda]

A difference is the largest between two numbers, in units of the largest number of theirs; of pictures in
units of 1/255. What the folder lacks is skipped. A table comes last. (With a blank in place of the =, pytest
would take the folder for one with tests.)
"""
import os
import time

import diffusers
import pytest
import torch
import transformers

import realera
from clip_text import CLIPTokenizer
from diffusion import SAMPLERS, Scheduler, velocity_of
from erasing import Job, edited
from helpers import CORPUS, MINI
from lora import add_lora, lora_layers, lora_off, save_lora
from plumbing.book import PRESERVED, UNRELATED, book
from plumbing.models import model_folder
from sample import Model, Text
from unet import UNet
from vae import VAE

TOLERANCE = 1e-5                # float32: sums in another order
STRINGS = [*CORPUS.splitlines(), "", " ", "!", "a cat!!", "it's <|endoftext|> here", "😀 café", "日本 語",
           "cat " * 100]
STRINGS += [f"{before} {name}{end}" for name in [*PRESERVED, *UNRELATED]
            for before, end in (("a photo of the", ""), ("An Oil Painting, 8k:", "!"), ("", "s"))]
CALLS = {"ddim": diffusers.DDIMScheduler, "pndm": diffusers.PNDMScheduler}


@pytest.fixture(scope="module")
def device(pytestconfig):
    chosen = pytestconfig.getoption("--device")
    if chosen != "cpu":                                           # both in true float32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(chosen)


@pytest.fixture(scope="module")
def folder(pytestconfig):
    return model_folder(pytestconfig.getoption("--model") or str(MINI))


@pytest.fixture(scope="module")
def need(folder):
    def there(*parts):
        for part in parts:
            if not (folder / part).is_dir():
                pytest.skip(f"{folder} has no {part}/")
    return there


@pytest.fixture(scope="module")
def theirs(folder, device, need):
    """theirs("unet"): that part as the reference library reads it, once."""
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
             "text_encoder": transformers.CLIPTextModel}
    read = {}

    def part(name):
        need(name)
        if name not in read:
            half = all("fp16" in path.name for path in (folder / name).glob("*.safetensors"))
            read[name] = kinds[name].from_pretrained(folder / name, variant="fp16" if half else None,
                                                     use_safetensors=True, torch_dtype=torch.float32)
            read[name].to(device).eval().requires_grad_(False)
        return read[name]
    return part


@pytest.fixture(scope="module")
def unet(folder, device, need):
    need("unet")
    return UNet.from_pretrained(folder / "unet", device=device)


@pytest.fixture(scope="module")
def vae(folder, device, need):
    need("vae")
    return VAE.from_pretrained(folder / "vae", device=device)


@pytest.fixture(scope="module")
def text(folder, device, need):
    need("tokenizer", "text_encoder")
    return Text(folder, device)


@pytest.fixture
def compare(request, device, record_property):
    """compare(what, ours, theirs, …): run both, note the difference and the seconds, and judge it."""
    def seconds(function):
        if device.type != "cpu":
            function()                                            # a GPU's first run loads its programs
            torch.cuda.synchronize() if device.type == "cuda" else None
        start = time.perf_counter()
        with torch.no_grad():
            found = function()
            torch.cuda.synchronize() if device.type == "cuda" else None
        return found, time.perf_counter() - start

    def judge(what, ours, theirs, tolerance=TOLERANCE, scale=None):
        (a, ours_took), (b, theirs_took) = seconds(ours), seconds(theirs)
        assert a.shape == b.shape and b.std() > 0
        difference = ((a - b).abs().max() / (scale or b.abs().max())).item()
        record_property("parity", (what, difference, tolerance, ours_took, theirs_took))
        assert difference <= tolerance
    return judge


def noise(*shape, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def test_tokens(folder, need, compare):
    need("tokenizer")
    classes = book()["classes"].values()
    strings = STRINGS + [phrase for entry in classes for phrase in [*entry["synonyms"], *entry["associated"]]]
    ours, reference = CLIPTokenizer.from_pretrained(folder / "tokenizer"), transformers.CLIPTokenizer
    reference = reference.from_pretrained(folder / "tokenizer")
    assert len(set(strings)) >= 200

    def ids():
        return torch.tensor(reference(strings, padding="max_length", truncation=True,
                                      max_length=ours.length).input_ids)

    found, expected = ours(strings), ids()
    assert [text for text, a, b in zip(strings, found.tolist(), expected.tolist()) if a != b] == []
    compare(f"tokens of {len(strings)} strings", lambda: ours(strings).double(), lambda: ids().double(), 0)


def test_text_states(text, theirs, device, compare):
    prompts = STRINGS[:3] + ["", "a photo of the cat", "cat " * 100]
    ids = text.tokenizer(prompts).to(device)
    reference = theirs("text_encoder")
    compare("text states", lambda: text.encoder(ids), lambda: reference(ids).last_hidden_state)


def unet_input(unet, device):
    side = unet.config.sample_size
    return (noise(2, unet.config.in_channels, side, side, device=device),
            noise(2, 77, unet.config.cross_attention_dim, device=device, seed=1))


@pytest.mark.parametrize("t", [1, 500, 981] if "OWN_MODEL" in os.environ else [500])
def test_unet(unet, theirs, device, compare, t):
    x, context = unet_input(unet, device)
    reference = theirs("unet")
    compare(f"U-Net, t = {t}", lambda: unet(x, t, context), lambda: reference(x, t, context).sample)


def test_vae_encoder(vae, theirs, device, compare):
    side, reference = vae.config.sample_size, theirs("vae")
    x = noise(1, vae.config.in_channels, side, side, device=device).clamp(-1, 1)
    compare("VAE, encoder", lambda: vae.encode(x)[0], lambda: reference.encode(x).latent_dist.mean)


def test_vae_decoder(vae, theirs, device, compare):
    side, reference = vae.config.sample_size // vae.factor, theirs("vae")
    z = noise(1, vae.config.latent_channels, side, side, device=device)
    compare("VAE, decoder", lambda: vae.decode(z), lambda: reference.decode(z).sample)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(folder, need, device, compare, name):
    """All steps from the same noise; the "network" is cheap, but depends on z and t."""
    need("scheduler")
    ours, start = Scheduler.from_pretrained(folder / "scheduler"), noise(2, 4, 64, 64, device=device)
    config = diffusers.PNDMScheduler.load_config(folder / "scheduler") | {"clip_sample": False}

    def predict(z, t):
        share, t = (1 - ours.alpha(int(t))).sqrt(), int(t)
        return share * z + 0.2 * torch.tanh(z.roll(1, dims=1)) * (0.5 + t / 1000)

    def reference():
        scheduler, z = CALLS[name].from_config(config), start
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            said = predict(z, t)
            if scheduler.config.prediction_type == "v_prediction":
                said = velocity_of(z, said, ours.alpha(int(t)))
            z = scheduler.step(said, t, z).prev_sample
        return z

    compare(f"{name.upper()}, 50 steps", lambda: SAMPLERS[name](predict, start, ours, 50), reference)


def test_a_picture_with_guidance(folder, need, text, theirs, device, compare):
    """DDIM; on a CPU in 4 steps, which take long at Stable Diffusion's size."""
    need("unet", "vae", "scheduler")
    model = Model(folder, device, text=text)
    scheduler = diffusers.DDIMScheduler.from_config(
        diffusers.DDIMScheduler.load_config(folder / "scheduler") | {"clip_sample": False})
    pipe = diffusers.StableDiffusionPipeline(
        vae=theirs("vae"), text_encoder=theirs("text_encoder"), unet=theirs("unet"), scheduler=scheduler,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    steps, prompt = 4 if device.type == "cpu" else model.defaults["steps"], "a photo of the cat"
    how = {"num_inference_steps": steps, "guidance_scale": model.defaults["guidance"]}
    size = model.defaults["size"]
    compare(f"a picture, {steps} steps, in 1/255", lambda: model.draw([prompt], [1], steps),
            lambda: pipe(prompt, latents=model.noise([1]).to(device), height=size, width=size,
                         output_type="pt", **how).images.float().cpu(), tolerance=1, scale=1 / 255)


def test_closed_form(folder, need, compare):
    """Eq. (7) as one matrix for all layers, against the paper's formula solved for each of them."""
    need("tokenizer", "text_encoder", "unet")
    s, job = realera.Settings(M=20, N=10), Job(folder, ["airplane"], ["sky"])
    pair, stay = job.pairs[0], job.stay(real_prompts=True)
    E, E_star, P = realera.mine(pair, s)
    P = torch.cat([P, stay.flatten(0, 1)])
    B = E.T @ E + s.lambda1 * P.T @ P
    ridge = s.lambda2 * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype)

    def flat(W):
        return torch.cat([W[name].double().flatten() for name in sorted(job.W0)])

    def solved(W0):                                               # its minimum, without the shared factor
        right = W0 @ E_star.T @ E + s.lambda1 * W0 @ P.T @ P + W0 @ ridge
        return torch.linalg.solve(B + ridge, right, left=False)

    compare(f"closed form, {len(job.W0)} matrices",
            lambda: flat(edited(job.W0, realera.erase_in_closed_form([pair], stay, s)[0])),
            lambda: flat({name: solved(W0.double()) for name, W0 in job.W0.items()}))


def test_a_lora_file(unet, theirs, device, compare, tmp_path):
    """A file of ours, loaded by diffusers, acts in every layer. Last, as both networks keep it."""
    (x, context), reference, names = unet_input(unet, device), theirs("unet"), add_lora(unet, rank=4)
    for i, layer in enumerate(lora_layers(unet).values()):
        layer.lora_B.data = 0.1 * noise(*layer.lora_B.shape, device=device, seed=i)
    save_lora(unet, tmp_path / "lora.safetensors")
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        unet=reference, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    taken = {name for name, module in reference.named_modules() if len(getattr(module, "lora_A", []))}
    assert taken == set(names)
    with torch.no_grad(), lora_off(unet):
        without = unet(x, 500, context)
        assert (without - reference(x, 500, context).sample).abs().max() > 100 * TOLERANCE
    compare(f"LoRA file, {len(names)} layers", lambda: unet(x, 500, context),
            lambda: reference(x, 500, context).sample)
