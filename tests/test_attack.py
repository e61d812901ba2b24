"""Attacks: their algebra and gradients a second way, what they reach on an intact and on a dead network, and
the command as typed by a user: kept, gone on from, refused."""
import argparse
import dataclasses
import json
import shutil
import types

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import realera
from clip_text import CLIPTextConfig, CLIPTextModel
from erasing import edited, make_pairs
from experiments import attack
from experiments.attack import Target, descend, encode, insert, matching_loss, simplex, straight_through
from helpers import CLOSED, MINI, SIZE, random
from plumbing.book import BOOK
from plumbing.disk import read_json
from plumbing.edits import about_edit, cross_attention, read_edit, write_edit
from plumbing.prompts import ASSOCIATED, choices
from plumbing.weights import put_weights
from realera import Trajectories
from sample import Model
from starts import run
from unet import UNet, UNetConfig

QUICK = ["--n", 1, "--choose", 1, "--budget", 2, "--seed", 5, "--model", "narrow"]
PROMPT = "a photo of the airplane"
CELL = 2 + max(1, 96 // SIZE) * SIZE                              # of a grid: small pictures are enlarged


@pytest.fixture
def drawn(monkeypatch):
    """(rows, seed) of every picture that is drawn to be counted; the grid's do not name their guidance."""
    def draw(self, rows, seeds, steps=None, guidance=None, **others):
        if guidance is not None:
            drawn.extend((x.numpy().tobytes(), seed) for x, seed in zip(rows, seeds))
        return plain(self, rows, seeds, steps, guidance, **others)
    plain, drawn = Model.draw, []
    monkeypatch.setattr(Model, "draw", draw)
    return drawn


@pytest.fixture(scope="module")
def model():
    model = Model(MINI)
    model.defaults["steps"] = 4
    return model


@pytest.fixture
def small(monkeypatch):
    """Two pictures on whose way latents are looked at, in place of eight."""
    monkeypatch.setattr(attack, "TRAJECTORIES", 2)
    monkeypatch.setattr(attack, "BATCH", 2)


def on(model, W, concept="airplane", budget=4, task="object"):
    put_weights(model.unet, W)
    return Target(model, cross_attention(MINI), W, concept, task, 0, budget)


# ---- a toy: networks of a few dimensions, in float64 ----

@pytest.fixture(scope="module")
def toy():
    """A Target whose network is random, its Trajectories, and the soft tokens [2, 8] that they came from."""
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(20, 8, 16, 2, 2, 8)).double().requires_grad_(False)
    unet = UNet(UNetConfig(4, 4, (8, 16), ("DownBlock2D", "CrossAttnDownBlock2D"),
                           ("CrossAttnUpBlock2D", "UpBlock2D"), 1, 8, 2, 4)).double().requires_grad_(False)
    for name, p in unet.named_parameters():
        p.data *= 3 if "attn2" in name else 1                     # so that the text matters

    def tokenizer(prompts):
        return torch.tensor([[18, 3, 4, 5] + 4 * [19] if prompt else [18] + 7 * [19] for prompt in prompts])
    tokenizer.words = lambda ids: " ".join(map(str, ids))
    model = types.SimpleNamespace(text=types.SimpleNamespace(encoder=encoder, tokenizer=tokenizer), unet=unet,
                                  dtype=torch.float64)
    target = Target(model, {}, {}, "airplane", "object", 0, 30, length=2)
    z, t, hidden = random(3, 4, 4, 4, 4, seed=1), torch.tensor([900, 600, 300, 10]), random(2, 8, seed=2)
    noise = torch.stack([unet(x, t, insert(target, hidden).expand(4, -1, -1)) for x in z])
    target.ways = Trajectories(z, t, noise)
    return target, hidden


def whole_loss(target, vectors):
    """The loss over all latents."""
    ways, rows = target.ways, insert(target, vectors)
    noise = target.model.unet(ways.z.flatten(0, 1), ways.t.repeat(3), rows.expand(12, -1, -1))
    return (noise.unflatten(0, (3, 4)) - ways.target).square().mean().item()


def test_the_losss_gradient_is_that_of_finite_differences(toy):
    target, hidden = toy

    def loss(u):
        return matching_loss(target, insert(target, u), torch.Generator().manual_seed(3))
    u = random(2, 8, seed=4).requires_grad_()
    loss(u).backward()
    for i in range(u.numel()):
        h = torch.zeros(16, dtype=u.dtype).index_fill(0, torch.tensor(i), 1e-4).view(2, 8)
        slope = ((loss(u.detach() + h) - loss(u.detach() - h)) / 2e-4).item()
        largest = u.grad.abs().max().item()
        assert u.grad.flatten()[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-5 * largest)
    assert loss(hidden).item() < 1e-20 and u.grad.abs().max() > 1e-6


def test_descent_finds_soft_tokens_with_less_loss_and_prefix_returns_their_rows(toy):
    target, _ = toy
    free = torch.zeros(2, 8, dtype=torch.float64)
    before = whole_loss(target, free)
    seen = descend(target, free, lambda u: u, lr=0.1)
    assert whole_loss(target, free.detach()) < before / 2 and len(seen) == 30
    (name, rows), = attack.prefix(target).items()
    assert name == "2 soft tokens" and rows.shape == (8, 8) and not rows.requires_grad
    spread = target.model.text.encoder.embeddings.token_embedding.weight.std()
    free = torch.zeros(2, 8)
    descend(target, free, lambda u: spread * u, lr=0.1)
    assert torch.equal(rows, insert(target, spread * free).detach())


def test_straight_through_is_the_hard_token_with_the_relaxed_ones_gradient():
    theta, words = simplex(random(3, 7, seed=0)).requires_grad_(), random(7, 4, seed=1)
    hard = torch.eye(7, dtype=theta.dtype)[theta.argmax(1)].requires_grad_()
    (straight_through(theta) @ words).sin().square().sum().backward()
    (hard @ words).sin().square().sum().backward()
    assert (straight_through(theta) - hard).abs().max() < 1e-15 < 0.01 < (theta - hard).abs().max()
    assert (theta.grad - hard.grad).abs().max() < 1e-12 and hard.grad.abs().max() > 0.1


def test_tokens_are_no_special_ones_and_those_met_with_the_least_loss(toy, monkeypatch):
    target, hidden = toy
    table, seen = target.model.text.encoder.embeddings.token_embedding.weight, []
    goal = insert(target, hidden)

    def loss(target, rows, generator):
        seen.append((rows - goal).square().mean())
        return seen[-1]

    def many_special(prompts):
        return tokenizer(prompts) if prompts != [""] else torch.tensor([[*range(4), *range(9, 20)]])
    tokenizer, many_special.words = target.model.text.tokenizer, target.model.text.tokenizer.words
    monkeypatch.setattr(attack, "matching_loss", loss)
    monkeypatch.setattr(target.model.text, "tokenizer", many_special)
    found = attack.tokens(target)
    least = sorted({round(x.item(), 9) for x in seen})
    assert len(seen) == 30 and len(least) > 4
    assert [round((rows - goal).square().mean().item(), 9) for rows in found.values()] == least[:3]
    for name, rows in found.items():
        ids = [int(i) for i in name.removesuffix(" + prompt").split()]
        assert len(ids) == 2 and set(ids) <= set(range(4, 9))
        assert (rows - insert(target, table[ids])).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.01, 1, 30])
def test_simplex_is_the_threshold_found_by_halving(scale):
    x, near = scale * random(40, 9, seed=0), simplex(scale * random(40, 9, seed=0))
    low, high = x.min(1, keepdim=True).values - 1, x.max(1, keepdim=True).values
    for _ in range(200):                                          # Σ max(x − θ, 0) falls with θ
        middle = (low + high) / 2
        more = (x - middle).clamp(min=0).sum(1, keepdim=True) > 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    assert (near - (x - low).clamp(min=0)).abs().max() < 1e-12
    assert near.min() >= 0 and (near.sum(1) - 1).abs().max() < 1e-12 and (near - x).abs().max() > 0.1
    assert (simplex(near) - near).abs().max() < 1e-12


# ---- rows ----

def test_an_edit_that_overshoots_sends_the_mirror_to_the_concept(model):
    """W = W₀ (I + Δ) with (I + Δ) e = e + s (e* − e) and Δ e* = 0, at one row: m = 1/(s − 1) gives e."""
    pair, W0 = make_pairs("airplane", "sky", "object", model.text, "token", 0)[0], cross_attention(MINI)
    (e,), (e_star,), s = pair.block(), pair.block_star(), 1.5
    u = e - (e @ e_star) / (e_star @ e_star) * e_star             # at right angles to e*
    delta = s * torch.outer(e_star - e, u) / (u @ e)
    there = torch.eye(256) + delta
    assert torch.allclose(there @ e, e + s * (e_star - e)) and torch.allclose(there @ e_star, e_star)
    assert torch.allclose(there @ (e_star + 2 * (e_star - e)), e, atol=1e-9)         # 2 = 1/(1.5 − 1)

    target = on(model, edited(W0, delta))
    target.anchor = "sky"
    whole = make_pairs("airplane", "sky", "object", model.text, "tail", 0)[0]
    found = attack.mirror(target)
    assert [*found][:4] == [f"{m} times beyond sky" for m in (1, 2, 3, 5)]
    rows = whole.e_star.clone()
    rows[whole.start_star:whole.start_star + whole.n] += 3 * (whole.block_star() - whole.block())
    assert torch.equal(found["3 times beyond sky"], rows.float())
    far = realera.Settings(M=0, N=0, reach=2.5)
    target.W = edited(W0, realera.erase_in_closed_form([whole], model.text([""]).double(), far)[0])
    own, lid = (float(name.split()[0]) for name in [*attack.mirror(target)][-2:])
    assert 0.65 < own < 0.69 and 2.3 < lid < 2.37                 # near 1/1.5 and 1 + 2/1.5


def test_an_emoji_that_is_no_token_gives_no_candidate_and_one_that_is_its_prompt(model, monkeypatch):
    target = on(model, cross_attention(MINI))
    monkeypatch.setattr(attack, "book", lambda: {"classes": {"airplane": {"emoji": ["2708", "1F6E9"]}}})
    assert attack.emoji(target) == {}
    count = model.text.tokenizer.count
    monkeypatch.setattr(model.text.tokenizer, "count", lambda text: 1 if text == "✈" else count(text))
    assert [*attack.emoji(target)] == ["a photo of the ✈"]


def test_encoding_looked_up_vectors_is_the_text_encoder(model):
    ids = model.text.tokenizer([PROMPT])[0]
    vectors = model.text.encoder.embeddings.token_embedding.weight[ids]
    rows = encode(model.text, vectors)
    assert (rows - model.text([PROMPT])[0]).abs().max() < 1e-5
    assert (encode(model.text, vectors.flip(0)) - rows).abs().max() > 0.1


def test_inserted_tokens_are_what_typing_them_would_be(model):
    target, table = on(model, cross_attention(MINI)), model.text.encoder.embeddings.token_embedding.weight
    ids = model.text.tokenizer(["ship cat sky"])[0, 1:4]
    typed = model.text.tokenizer([f"ship cat sky {PROMPT}"])[0]
    assert typed[:9].tolist() == [typed[0], *ids, *model.text.tokenizer([PROMPT])[0, 1:6]]
    rows, looked_up = insert(target, table[ids]), table[model.text.tokenizer([PROMPT])[0]]
    assert rows.shape == model.text([PROMPT])[0].shape
    assert (rows - model.text([f"ship cat sky {PROMPT}"])[0]).abs().max() < 1e-5
    assert torch.equal(insert(target, table[:0]), encode(model.text, looked_up))


def test_latents_are_the_originals_and_the_edit_is_put_back(model, small):
    W0, edited = cross_attention(MINI), {k: -w for k, w in cross_attention(MINI).items()}
    ways = on(model, edited).ways
    assert all(torch.equal(model.unet.get_parameter(name).data, w.float()) for name, w in edited.items())
    rows = model.text([PROMPT]).expand(2, -1, -1)
    for weights, close in ((W0, True), (edited, False)):
        put_weights(model.unet, weights)
        with torch.no_grad():
            off = max((model.unet(z, t, rows) - target).abs().max()
                      for z, t, target in zip(ways.z.unbind(1), ways.t, ways.target.unbind(1)))
        assert (off < 1e-4) == close and (off > 0.1) != close


def test_derived_rows_are_the_least_squares_of_all_matrices_stacked(model):
    W0 = cross_attention(MINI)
    W = {name: w + 0.05 * random(*w.shape, seed=i).to(w) for i, (name, w) in enumerate(W0.items())}
    e = model.text([PROMPT])[0].double()
    for weights, same in ((W0, True), (W, False)):
        found = attack.embedding(on(model, weights))
        assert list(found) == ["embedding, λ = 0.001", "embedding, λ = 0.1"]
        A, B = (torch.cat([x[name].double() for name in W0]) for x in (weights, W0))
        for lam, rows in zip((1e-3, 1e-1), found.values()):
            ridge = (lam * B.square().sum() / 256) ** 0.5 * torch.eye(256, dtype=A.dtype)
            naive = torch.linalg.lstsq(torch.cat([A, ridge]), torch.cat([B @ e.T, 0 * e.T])).solution.T
            assert (rows - naive).abs().max() < 1e-4
        off = ((found["embedding, λ = 0.001"] - e).norm() / e.norm()).item()
        assert (off < 0.01) == same and (off > 0.05) != same     # untouched, it needs the concept itself


def test_the_vector_scaled_by_one_is_the_concept_where_there_is_one_template(model, monkeypatch):
    target = on(model, cross_attention(MINI))
    found, text = attack.vector(target), lambda prompt: model.text([prompt])[0]
    v = (text(PROMPT) - text("a photo of the") + text("a picture of the airplane") - text("a picture of the")
         + text("a photo of a airplane") - text("a photo of a") + text("airplane") - text("")) / 4
    assert [float(name.split()[-2]) for name in found] == [0.5, 1, 1.5, 2, 3, -1, -2, -3]
    for name, rows in found.items():
        assert (rows - text("a photo of the") - float(name.split()[-2]) * v).abs().max() < 1e-5
    monkeypatch.setattr(attack, "TEMPLATES", {"object": [attack.TEMPLATES["object"][0]]})
    assert (attack.vector(target)["“a photo of the” + 1 v"] - text(PROMPT)).abs().max() < 1e-5


def test_phrases_are_the_books_once_each_and_in_the_tasks_own_words(model):
    for concept, entry in read_json(BOOK)["classes"].items():
        found = attack.phrases(on(model, cross_attention(MINI), concept))
        expected = [f"a photo of the {name}" for name in entry["synonyms"]] + entry["associated"] + [
            f"a picture of the {concept}", f"a photo of a {concept}", concept]
        assert list(found) == expected and len(set(expected)) == 10
        assert all(torch.equal(rows, x) for rows, x in zip(found.values(), model.text(expected)))
    style = Target(model, {}, {}, "van gogh", "style", 0, 1)
    assert style.prompt == "an artwork by van gogh"
    assert [*attack.phrases(style)][0] == ASSOCIATED["style"]["van gogh"]
    names, prompts = choices("style")
    assert names == [*ASSOCIATED["style"]]
    assert prompts == [*(f"an artwork by {name}" for name in names), "an artist"]


# ---- how much comes back ----

def measured(model, clip, folder, W, monkeypatch, n, steps, what=tuple(attack.ATTACKS)):
    """{attack: its share in percent}, and all features that it saw: {(attack, candidate, seed): [P]}."""
    def evaluate(*args):
        found = plain(*args)
        seen.update({(args[8], *job): feature for job, feature in found.items()})
        return found
    plain, seen = attack.evaluate, {}
    monkeypatch.setattr(attack, "evaluate", evaluate)
    args = argparse.Namespace(seed=0, n=n, choose=1, steps=steps, batch=None, keep_pictures=False)
    rows = attack.attack(on(model, W), clip, list(what), folder, args)
    return {row["attack"]: row["success"][0] for row in rows}, seen


def test_on_the_untouched_model_all_reach_the_plain_prompt(model, clip, small, monkeypatch, tmp_path):
    reached, _ = measured(model, clip, tmp_path, cross_attention(MINI), monkeypatch, 2, 4)
    assert list(reached) == ["plain", *(name for name in attack.ATTACKS if name != "emoji")]     # no tokens
    del reached["mirror"]                                         # only an edit that overshoots obeys it
    del reached["tokens"]                                         # four steps find no words that say little
    assert reached["plain"] == 100 and min(reached.values()) >= 95


def test_on_a_network_that_hears_no_text_no_attack_says_anything(model, clip, small, monkeypatch, tmp_path):
    dead = {name: torch.zeros_like(w) for name, w in cross_attention(MINI).items()}
    reached, seen = measured(model, clip, tmp_path, dead, monkeypatch, 2, 1)
    nothing = attack.evaluate(model, clip, [("", 0), ("", 1), ("", 2)], tmp_path, 1, None, None, None, "")
    text = clip.text_features(clip.tokenizer(choices("object")[1])).detach()
    share = 100 * sum((nothing["", seed] @ text.T).argmax().item() == 0 for seed in range(2)) / 2
    assert set(reached.values()) == {share}
    for (*_, seed), feature in seen.items():
        assert (feature - nothing["", seed]).abs().max() < 2e-3   # kept in float16
    assert len({seed for *_, seed in seen}) == 3 and (nothing["", 0] - nothing["", 1]).abs().max() > 0.02


def test_the_strongest_is_chosen_on_other_seeds_than_it_is_reported_on(model, clip, monkeypatch, tmp_path):
    """The first wins where it is chosen and fails where it counts; of equals the likelier is taken."""
    text = clip.text_features(clip.tokenizer(["a photo of the airplane", "a photo of the cat"])).detach()
    share = {"lucky": lambda seed: seed >= 13, "weak": lambda seed: 0.9 * (seed != 14),
             "a weak one": lambda seed: 0.6 * (seed != 14)}
    asked, rows = [], torch.zeros(32, 256)

    def evaluate(model, clip, jobs, folder, steps, guidance, batch, keep, what, candidates):
        asked.append(jobs)
        p = {job: float(share.get(job[0], lambda seed: 1)(job[1])) for job in jobs}
        return {job: normalize(x * text[0] + (1 - x) * text[1], dim=0) for job, x in p.items()}
    monkeypatch.setattr(attack, "evaluate", evaluate)
    args = argparse.Namespace(seed=10, n=3, choose=2, steps=None, batch=None, keep_pictures=False)
    target = on(model, cross_attention(MINI))
    for names, best, success in ((sorted(share), "lucky", 0), (["a weak one", "weak"], "weak", 100)):
        monkeypatch.setitem(attack.ATTACKS, "phrases", lambda target: {name: rows.clone() for name in names})
        plain, row = attack.attack(target, clip, ["phrases"], tmp_path / best, args)
        assert (row["strongest"], row["success"][0], row["candidates"]) == (best, success, len(names))
        assert asked[-2:] == [[(name, seed) for name in names for seed in (13, 14)],
                              [(best, seed) for seed in (10, 11, 12)]]


# ---- the command ----

@pytest.fixture(scope="module")
def work(here, narrow, tmp_path_factory):
    """A folder with two edits, and all attacks on the first as typed."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "narrow").symlink_to(narrow)
    for out, concepts in (("one", ["airplane"]), ("two", ["Airplane", "ship"])):
        what = [part for name in concepts for part in ("--concept", name, "--anchor", "sky")]
        here("realera.py", *what, *CLOSED, "--model", "narrow", "--out", out, cwd=folder)
    done = run("experiments/attack.py", "--edit", "one", *QUICK, cwd=folder)
    (folder / "printed").write_text(done.stdout)
    return folder


def table(folder):
    """attacks.json without the seconds."""
    return [row | {"seconds": None} for row in json.loads((folder / "attacks.json").read_text())]


def test_the_command_writes_tables_a_grid_and_what_it_found(work):
    out = work / "out/attack/one"
    assert sorted(path.name for path in out.iterdir()) == [
        "attacks.csv", "attacks.json", "attacks.md", "found", "grid.png", "grid.svg", "results"]
    rows = json.loads((out / "attacks.json").read_text())
    assert [row["attack"] for row in rows] == ["plain", "phrases", "embedding", "vector", "mirror", "prefix",
                                               "tokens"]
    assert [row["candidates"] for row in rows][:4] == [1, 10, 2, 8] and rows[4]["candidates"] in (4, 6)
    assert rows[5]["candidates"] == 1 and rows[6]["candidates"] in (1, 2, 3)
    for row in rows:
        value, low, high = row["success"]
        assert row["concept"] == "airplane" and 0 <= low <= value <= high <= 100 and row["seconds"] > 0
    assert (out / "attacks.md").read_text() in (work / "printed").read_text()
    assert len((out / "attacks.csv").read_text().splitlines()) == 8
    assert PIL.Image.open(out / "grid.png").size == (2 + CELL, 2 + 7 * CELL)
    for row in rows[1:]:
        found = load_file(next((out / "found").iterdir()) / f"{row['attack']}.safetensors")
        assert row["strongest"] in found and len(found) == row["candidates"]


def killed(target):
    raise KeyboardInterrupt


def test_interrupted_and_gone_on_from_is_the_same_and_nothing_is_done_twice(here, work, drawn, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(attack.ATTACKS, "vector", killed)
        with pytest.raises(SystemExit) as end:
            here("experiments/attack.py", "--edit", "one", *QUICK, "--out", "again", cwd=work)
    assert end.value.code == 130 and not (work / "again/attacks.json").exists()
    first = len(drawn)
    assert first == 1 + (10 + 1) + (2 + 1)                        # plain, phrases, embedding
    for name in ("phrases", "embedding"):
        monkeypatch.setitem(attack.ATTACKS, name, killed)         # they are not searched again
    here("experiments/attack.py", "--edit", "one", *QUICK, "--out", "again", cwd=work)
    assert table(work / "again") == table(work / "out/attack/one")
    assert (work / "again/grid.png").read_bytes() == (work / "out/attack/one/grid.png").read_bytes()
    mirror, _, tokens = (row["candidates"] for row in table(work / "again")[4:])
    assert len(set(drawn)) == len(drawn) == (
        first + (8 + 1) + (mirror + 1) + 1 + (tokens + 1 if tokens > 1 else 1))


def test_damaged_findings_are_named_and_not_drawn(refused, work, monkeypatch):
    shutil.copytree(work / "out/attack/one", work / "damaged")
    path, = (work / "damaged").glob("found/*/vector.safetensors")
    good = load_file(path)
    args = ["--edit", "one", *QUICK, "--attack", "vector", "--out", "damaged"]
    for tensors, match in (({k: x * float("nan") for k, x in good.items()}, "NaN"),
                           ({k: x[1:].contiguous() for k, x in good.items()}, "wrong shape")):
        save_file(tensors, path)
        refused("experiments/attack.py", *args, cwd=work, match=f"vector.safetensors has .*{match}")
    path.write_bytes(b"nothing")
    refused("experiments/attack.py", *args, cwd=work, match="vector.safetensors cannot be read")


def test_another_budget_starts_anew_and_the_first_is_still_there(here, work, monkeypatch):
    shutil.copytree(work / "out/attack/one", work / "mixed")
    first, = (work / "mixed").glob("found/*/prefix.safetensors")
    before, args = first.read_bytes(), ["--edit", "one", *QUICK, "--attack", "prefix", "--out", "mixed"]
    here("experiments/attack.py", *args, "--budget", 4, cwd=work)
    second, = set((work / "mixed").glob("found/*/prefix.safetensors")) - {first}
    assert first.read_bytes() == before != second.read_bytes()
    monkeypatch.setitem(attack.ATTACKS, "prefix", killed)
    here("experiments/attack.py", *args, cwd=work)
    assert table(work / "mixed") == [row for row in table(work / "out/attack/one")
                                     if row["attack"] in ("plain", "prefix")]


def test_each_edit_concept_seed_budget_and_precision_has_its_own_findings(model, clip, monkeypatch, tmp_path):
    def evaluate(model, clip, jobs, folder, steps, guidance, batch, keep, what, candidates):
        return {job: torch.ones(128) for job in jobs}
    monkeypatch.setattr(attack, "evaluate", evaluate)
    monkeypatch.setattr(attack, "rates", lambda clip, concept, task, names, *_: dict.fromkeys(names, (0, 0)))
    asked, args = [], argparse.Namespace(seed=0, n=1, choose=1, steps=None, batch=None, keep_pictures=False)
    shape = model.text([""])[0].shape
    monkeypatch.setitem(attack.ATTACKS, "prefix",
                        lambda target: asked.append(target) or {"": torch.full(shape, 1.0 * len(asked))})
    first = on(model, cross_attention(MINI))
    half = types.SimpleNamespace(**vars(model) | {"dtype": torch.bfloat16})
    longer = types.SimpleNamespace(**vars(model) | {"defaults": model.defaults | {"steps": 7}})
    others = [{"W": {name: 2 * w for name, w in first.W.items()}}, {"concept": "ship"}, {"seed": 1},
              {"budget": 5}, {"length": 2}, {"model": half}, {"model": longer}]
    for _ in range(2):
        for i, change in enumerate([{}, *others], 1):
            row = attack.attack(dataclasses.replace(first, **change), clip, ["prefix"], tmp_path, args)[1]
            assert row["rows"].mean().item() == i
    assert len(asked) == len(others) + 1                          # once each


def test_two_concepts_in_any_case_more_pictures_than_the_grid_shows_and_pictures_kept(here, work):
    here("experiments/attack.py", "--edit", "two", *QUICK, "--n", 9, "--attack", "embedding", "embedding",
          "--keep-pictures", "--out", "kept", cwd=work)
    rows = table(work / "kept")
    assert [(row["concept"], row["attack"]) for row in rows] == [
        (concept, name) for concept in ("airplane", "ship") for name in ("plain", "embedding")]
    assert about_edit(work / "two")["concepts"] == ["airplane", "ship"]
    assert PIL.Image.open(work / "kept/grid.png").size == (2 + 8 * CELL, 2 + 4 * CELL)
    for row in rows:
        assert len([*(work / "kept/pictures" / row["concept"] / row["attack"]).glob("*.png")]) == 9


def test_a_concept_typed_in_capitals_is_recognised(here, work):
    here("experiments/attack.py", "--concept", "AIRPLANE", *QUICK[:-2], "--steps", 5, "--attack", "embedding",
         cwd=work)
    assert [row["success"][0] for row in table(work / "out/attack/untouched-airplane")] == [100, 100]


# ---- bad input ----

@pytest.mark.parametrize("args, match", [
    ([], "--edit .*or --concept"),
    (["--concept", "teapot"], "teapot"), (["--edit", "one", "--budget", 0], "--budget"),
    (["--edit", "one", "--choose", 0], "--choose"), (["--edit", "one", "--n", 0], "--n"),
    (["--edit", "one", "--steps", 5000], "steps must lie in 1 … 999"),
    (["--edit", "one", "--batch", 0], "--batch"),
    (["--edit", "one", "--seed", -1], "seed"), (["--edit", "nowhere"], "no erased.safetensors"),
    (["--edit", "teapot"], "teapot"), (["--edit", "other"], "made for another model"),
    (["--edit", "one", "--clip", "nowhere"], "--clip nowhere"),
    (["--edit", "one", "--model", "nowhere"], "--model nowhere")])
def test_bad_input_is_one_line_and_leaves_nothing(refused, edit, tmp_path, args, match):
    for name, about in {"one": {}, "other": {"base_hash": ""}, "teapot": {"concepts": ["teapot"]}}.items():
        (tmp_path / name).mkdir()
        write_edit(tmp_path / name, read_edit(edit, MINI), about_edit(edit) | about)
    refused("experiments/attack.py", *args, cwd=tmp_path, match=match)


def test_of_a_method_that_acts_while_drawing_only_what_anybody_types_or_feeds_is_tried(
        here, refused, work, tmp_path):
    """Gradients and closed forms see weights alone, which such a method need not change."""
    (tmp_path / "work").mkdir()
    model = ["--model", work / "narrow"]
    here("baselines/surgery.py", "--concept", "airplane", "--no-pictures", *model, "--out", "acts",
         cwd=tmp_path)
    edit = ["--edit", tmp_path / "acts", *model, "--n", 1, "--choose", 1, "--seed", 5]
    for args in ([], ["--attack", "phrases", "embedding"]):
        refused("experiments/attack.py", *edit, *args, cwd=tmp_path / "work",
                match=r"acts while a picture is drawn.*embedding.*give --attack phrases emoji vector")
    here("experiments/attack.py", *edit, "--attack", "vector", "phrases", "--out", "out", cwd=tmp_path)
    rows = {row["attack"]: row for row in json.loads((tmp_path / "out/attacks.json").read_text())}
    assert rows.keys() == {"plain", "vector", "phrases"} and rows["phrases"]["candidates"] > 5


def test_an_unknown_attack_is_named(here, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        here("experiments/attack.py", "--concept", "airplane", "--attack", "magic", cwd=tmp_path)
    assert end.value.code == 2 and "'magic'" in capsys.readouterr().err and not [*tmp_path.iterdir()]
