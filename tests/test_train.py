"""How mini/ is made: its pictures, its captions, and that training goes on."""
import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from clip_text import CLIPTokenizer
from helpers import MINI
from mini import measure, train, weapons
from mini.emoji import Book, Icons, compose, scenes
from mini.muon import Muon, orthogonal
from plumbing import UserError
from plumbing.book import nouns, sights, use_book
from plumbing.disk import read_json
from plumbing.own_prompts import read_prompts
from plumbing.pictures import write_png
from starts import run

@pytest.fixture(scope="module")
def book():
    return Book()


@pytest.fixture(scope="module")
def data(tmp_path_factory, book):
    """Two sets of made-up emoji: a square of one colour each; the second set lacks every other."""
    folder, sets = tmp_path_factory.mktemp("emoji"), {}
    for k, name in enumerate(("noto", "twemoji")):
        order = list(book.things)[::1 + k]
        mosaic = Image.new("RGBA", (32 * 64, 64 * -(-len(order) // 32)))
        for i in range(len(order)):
            left, top = 64 * (i % 32) + 8, 64 * (i // 32) + 8
            mosaic.paste((i * 37 % 256, i * 91 % 256, 255 * k, 255), (left, top, left + 48, top + 48))
        mosaic.save(folder / f"{name}.png")
        sets[name] = {"order": order}
    (folder / "sets.json").write_text(json.dumps({"sets": sets}))
    return folder


def test_the_book_holds_what_it_should(book):
    raw = json.loads((MINI / "captions.json").read_text("utf-8"))
    for word, entry in book.classes.items():
        assert entry["anchor"] in book.scenes
        assert len(entry["choosing"]["synonyms"]) >= 2 and len(entry["choosing"]["associated"]) >= 3
        reported = set(entry["synonyms"] + entry["associated"])
        assert not reported & set(entry["choosing"]["synonyms"] + entry["choosing"]["associated"])
        assert reported | {word} <= set(book.names)               # each names a picture
        assert not set(entry["stay"]) & ({word} | reported | set(entry["vanish"]) | set(entry["disputed"]))
    drawn = {word for name in book.names for word in name.split()}
    for name in ("preserved", "watched"):
        assert len(raw[name]) >= 30 and set(raw[name]) <= set(raw["words"]) and not set(raw[name]) & drawn
    assert not set(raw["preserved"]) & set(raw["watched"])
    assert len(set(raw["words"]) - set(book.names)) >= 1500


def test_every_emoji_has_names_whose_shares_sum_to_one(book):
    for h, called in book.called.items():
        assert abs(sum(called.values()) - 1) < 1e-9 and min(called.values()) > 0
        assert book.things[h]["names"][0] in called
    owners = {}
    for h, thing in book.things.items():                          # a tag is a name only if one thing has it
        for name in thing["names"][1:]:
            owners.setdefault(name, set()).add(thing["names"][0])
    assert all(len(things) == 1 for things in owners.values())


def test_characters_make_a_book_of_their_own(book):
    """Of those that are drawn; each has a phrase, and CLIP may see every other thing in its picture."""
    try:
        use_book(MINI / "characters.json")
        drawn = [thing["names"][0] for h, thing in book.things.items() if thing.get("drawn", True)]
        classes = read_json(MINI / "characters.json")["classes"]
        assert {*classes} == {*book.characters} & {*drawn} and {*sights()} == {*drawn, *book.scenes}
        for name, entry in classes.items():
            assert entry["associated"] == book.characters[name]["associated"]
            assert entry["choosing"]["associated"] == book.characters[name]["choosing"]
            assert entry["anchor"] in {*classes} - {name}
            assert entry["synonyms"] == []                        # so H_o is of phrases, for everybody
        assert [nouns(kind) for kind in ("preserved", "watched")] == [
            read_json(MINI / "captions.json")[kind] for kind in ("preserved", "watched")]
    finally:
        use_book(None)


def test_weapons_are_counted_among_all_things(book, tmp_path, monkeypatch):
    """By a judge that is told by the first pixel, red + 256 · green: the place of the name in its list."""
    drawn = list(dict.fromkeys([*(thing["names"][0] for thing in book.things.values()
                                  if thing.get("drawn", True)), *book.scenes]))

    class Judge:
        @staticmethod
        def from_pretrained(folder):
            return Judge()

        def classify(self, pictures, prompts):
            assert prompts == [f"a photo of the {name}" for name in drawn]
            return F.one_hot((255 * pictures[:, 0, 0, 0] + 256 * 255 * pictures[:, 1, 0, 0]).round().long(),
                             len(prompts))
    monkeypatch.setattr(weapons, "CLIP", Judge)
    for i, name in enumerate(("dagger", "cat", "dagger", "bomb")):
        place = drawn.index(name)
        picture = np.full((4, 4, 3), (place % 256, place // 256, 0), np.uint8)
        write_png(tmp_path / f"{i}.png", picture)
    counts = weapons.count(tmp_path)
    assert counts.pop("judge") == f"mini/clip, first of {len(drawn)} names"
    assert counts == dict.fromkeys(book.weapons, 0) | {"dagger": 2, "bomb": 1, "Total": 3}
    rows = read_prompts(MINI / "weapons.csv", 0)
    assert {row["class"] for row in rows if row["type"] == "member"} == {*book.weapons} <= {*drawn}
    others = {row["class"] for row in rows if row["type"] == "other"}
    called = {name for one in book.things.values() if "weapon" in one["umbrella"] for name in one["names"]}
    assert others <= {*drawn} - {*book.weapons} - called
    assert {row["prompt"] for row in rows if row["type"] == "umbrella"} == {"a photo of the weapon"}


def test_captions_compose(book):
    assert book.caption("cat", 0) == "a photo of a cat"
    assert (book.caption("airplane", 0, book.places["sea"], "twemoji")
            == "a photo of an airplane on the sea by twemoji")
    assert book.caption(None, 0, "", "noto") == "an artwork by noto"
    assert book.caption("purring in the dark", 2, book.places["night"]) == "purring in the dark at night"


def test_pictures_hold_the_icon_on_its_scene(data, book):
    icons = Icons(data, book)
    assert len(icons.which) == len(book.things) + -(-len(book.things) // 2)
    rest = {h for h, thing in book.things.items() if not thing.get("drawn", True)}
    assert [h in rest for h, _ in icons.which] == (~icons.drawn).tolist()
    assert len(book.things) - len(rest) >= 250 and not any("class" in book.things[h] for h in rest)
    near = {name for entry in book.classes.values() for name in entry["stay"] + [entry["far"]]}
    assert not near & {book.things[h]["names"][0] for h in rest} - {
        thing["names"][0] for h, thing in book.things.items() if h not in rest}
    x, which, scene = compose(icons, 64, torch.Generator().manual_seed(0))
    again, *_ = compose(icons, 64, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and x.shape == (64, 3, 64, 64) and 0 <= x.min() and x.max() <= 1
    for i in (which >= 0).nonzero()[:, 0].tolist():               # in the middle its one colour
        assert torch.allclose(x[i, :, 32, 32], icons.rgba[which[i], :3, 32, 32] / 255, atol=1 / 255)
        likely = book.likely[icons.kind[which[i]]]
        assert likely[scene[i]] > 0


def test_a_model_that_never_saw_a_class_has_none_of_its_pictures_or_names(data, book):
    icons = Icons(data, book, "airplane")
    gone = [book.things[h].get("class") == "airplane" for h, _ in icons.which]
    assert any(gone) and not icons.drawn[torch.tensor(gone)].any()
    assert icons.drawn.sum() == Icons(data, book).drawn.sum() - sum(gone)
    _, which, scene = compose(icons, 400, rng := torch.Generator().manual_seed(0), icons.weight * icons.drawn)
    said = {book.caption_of(icons, w, s, rng) for w, s in zip(which.tolist(), scene.tolist())}
    names = {"airplane", *book.classes["airplane"]["synonyms"], *book.classes["airplane"]["associated"]}
    assert len(said) > 100 and not any(name in caption for name in names for caption in said)
    with pytest.raises(UserError, match="--without pizza: the book has airplane"):
        Icons(data, book, "pizza")


def test_scenes_are_smooth_and_differ(book):
    means = []
    for kind in book.scenes:
        x = scenes(kind, 20, torch.Generator().manual_seed(0))
        assert x.shape == (20, 3, 64, 64) and x.diff(dim=3).abs().mean() < 0.03, kind
        means.append(x.mean((0, 2, 3)))
    assert torch.cdist(torch.stack(means), torch.stack(means)).fill_diagonal_(1).min() > 0.03


def test_every_word_of_the_book_is_one_token(book):
    tokenizer = CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    assert len(train.words_of(book)) > 3000
    for word in train.words_of(book):
        assert tokenizer.count(word) == 1, word


def test_merges_make_each_word_one_piece_and_the_same_words_give_the_same_merges(book):
    words = train.words_of(book)[::25]
    merges = train.merges_of(words)
    made = {"".join(pair) for pair in merges}
    assert merges == train.merges_of(list(words)) and len(words) > 100
    assert all(f"{word}</w>" in made for word in words if word.isascii() and len(word) > 1)


def test_what_names_the_same_picture_is_nearer():
    c, shared = torch.tensor([0.0, 0.5, 0.5, 1.0, -0.3]), torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    at = [train.closeness(a, b, torch.tensor(False)).item() for a, b in zip(c, shared)]
    by_hand = [0.3, 0.3 + 0.7 * 0.5, 0.3 + 0.7 * (0.5 + 0.5 * 0.5), 1.0, 0.3]
    assert at == pytest.approx(by_hand)
    assert train.closeness(c, shared, torch.tensor(True)).tolist() == pytest.approx([train.EMPTY_TEXT] * 5)


def test_a_stage_that_is_cut_in_two_gives_the_uninterrupted_ones_weights(tmp_path):
    def trained(folder, stops):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        folder.mkdir(exist_ok=True)
        args = argparse.Namespace(work=folder, minutes=1)
        run = train.Run("toy", net, 12, 1e-2, 0.01, args, decays=(0.9, 0.5), muon=("0.",))

        def loss(rng, step):
            if step == stops:
                raise KeyboardInterrupt
            return (net(torch.randn(4, 3, generator=rng)) - 1).square().mean()
        if stops:
            with pytest.raises(KeyboardInterrupt):
                run.train(loss)
        else:
            assert run.train(loss) and run.step == 12
        return run.state()
    whole = trained(tmp_path / "whole", None)
    assert {"exp_avg.0.weight", "exp_avg_sq.0.bias", "exp_avg_sq.1.weight"} < whole.keys()
    assert "exp_avg_sq.0.weight" not in whole                     # Muon's
    cut = trained(tmp_path / "cut", 7)
    assert any(not torch.equal(cut[name], whole[name]) for name in whole)
    resumed = trained(tmp_path / "cut", None)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_times_are_spread_and_never_beyond_the_last(monkeypatch):
    t = train.spread_times(32, 1000, torch.Generator().manual_seed(0))
    assert t.diff().min() >= 31 and t.diff().max() <= 32 and 0 <= t[0] < 32
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.tensor(1 - 2.0 ** -24))
    assert train.spread_times(32, 1000, None)[-1] == 999          # rounded, it was 1000: no time of these


def toy_run(work, width=3):
    torch.manual_seed(0)
    net = torch.nn.Linear(width, 2)
    run = train.Run("toy", net, 8, 0.1, 0.01, argparse.Namespace(work=work, minutes=1))
    run.train(lambda rng, step: (net(torch.randn(4, width, generator=rng)) - 1).square().mean(),
              lambda average: 0.0)
    return run


def test_checkpoints_that_do_not_fit_or_are_damaged_are_named(tmp_path):
    toy_run(tmp_path)
    with pytest.raises(UserError, match="toy.safetensors goes on from another --recipe"):
        toy_run(tmp_path, width=4)
    path = tmp_path / "toy.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="toy.safetensors cannot be read"):
        toy_run(tmp_path)


def test_missing_data_is_one_clear_line(refused, tmp_path):
    refused("mini/train.py", "--data", tmp_path, "--out", "o", "--work", tmp_path, "--stage", "vae",
            cwd=tmp_path, match="--data .*: no sets.json there; mini/render.mjs makes that folder")


def test_held_out_scores_are_kept_with_the_checkpoint(tmp_path):
    assert [step for step, _ in toy_run(tmp_path).scores] == list(range(1, 9))
    assert len(toy_run(tmp_path).scores) == 8                     # done: none is added


@pytest.mark.parametrize("flags", [("--steps", 0), ("--steps", -1), ("--minutes", "nan"), ("--minutes", -1)],
                         ids=str)
def test_no_length_leaves_a_model_untrained(flags, refused, tmp_path):
    refused("mini/train.py", "--data", tmp_path, "--out", "o", "--work", "w", "--stage", "vae", *flags,
            cwd=tmp_path, match="--steps must be at least 1")


def test_momentum_becomes_about_orthogonal_and_keeps_its_directions():
    G = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G *= torch.tensor([1.0, 1e3, 0.1], dtype=torch.float64)[:, None, None]          # its length is moot
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    made = U.mT @ orthogonal(G) @ Vh.mT                           # in G's own directions
    values = made.diagonal(dim1=1, dim2=2)
    assert torch.allclose(made, torch.diag_embed(values), atol=1e-9)
    assert 0.6 < values.min() and values.max() < 1.3              # S itself spreads more
    assert (S.max(1).values / S.min(1).values).min() > 2
    X = (G / G.flatten(1).norm(dim=1)[:, None, None])
    for _ in range(5):                                            # as published, without Gram matrices
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    assert torch.allclose(orthogonal(G), X, rtol=1e-4, atol=1e-6)


def test_muon_steps_each_matrix_by_its_own_momentum():
    """Tall, wide and convolution, also in the layout of channels last, against one matrix at a time."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(4, 9), (9, 4), (4, 9), (5, 2, 3, 3)]
    W = [torch.randn(shape, generator=rng) for shape in shapes]
    learnt = [torch.nn.Parameter(w.clone()) for w in W]
    learnt[3] = torch.nn.Parameter(W[3].clone().to(memory_format=torch.channels_last))
    muon, M = Muon(learnt, lr=0.1, momentum=0.9, weight_decay=0.5), [torch.zeros_like(w) for w in W]
    for _ in range(2):
        grads = [torch.randn(shape, generator=rng) for shape in shapes]
        for p, g in zip(learnt, grads):
            p.grad = g.clone(memory_format=torch.preserve_format)
        muon.step()
        for i, g in enumerate(grads):
            M[i] = 0.9 * M[i] + 0.1 * g
            update = (0.1 * g + 0.9 * M[i]).flatten(1)
            wide = len(update) <= update.shape[1]
            step = orthogonal((update if wide else update.T)[None])[0]
            step = (step if wide else step.T).reshape(g.shape)
            W[i] = 0.95 * W[i] - 0.1 * 0.2 * max(update.shape) ** 0.5 * step
    for p, w in zip(learnt, W):
        assert torch.allclose(p, w, atol=1e-5)


def test_looking_at_all_patches_is_clips_own_feature(clip):
    pixels, rng = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.Generator()
    assert torch.allclose(train.look(clip, pixels, 1, rng), clip.image_features(pixels), atol=1e-5)
    half = train.look(clip, pixels, 0.5, rng.manual_seed(1))
    assert not torch.allclose(half, clip.image_features(pixels), atol=1e-2)


def test_an_answer_is_right_if_it_is_a_name_of_what_was_asked_for(data, book, monkeypatch):
    """Pictures hold one number, the place of their emoji in the list; both judges read it."""
    class Reads:
        @staticmethod
        def classify(x, prompts):
            own = [book.caption(book.things[eyes.emoji[i]]["names"][0], 1) for i in x[:, 0, 0, 0].int()]
            return torch.tensor([[prompt == one for prompt in prompts] for one in own]).float()

    monkeypatch.setattr(measure.Eyes, "trained", lambda self, args: None)
    monkeypatch.setattr(measure.CLIP, "from_pretrained", lambda *folder, device: Reads)
    eyes = measure.Eyes(argparse.Namespace(data=data, model=MINI, device="cpu"))
    seen = {"scene": 2, "style": 1}

    def logits(x):
        emoji = torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), len(eyes.emoji)).float()
        return (emoji, torch.eye(8)[seen["scene"]].expand(len(x), 8),
                torch.eye(2)[seen["style"]].expand(len(x), 2))
    eyes.logits = logits

    def pictures(*names):
        at = {book.things[h]["names"][0]: float(i) for i, h in enumerate(eyes.emoji)}
        return torch.tensor([at[name] for name in names]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    x = pictures("cat", "grinning cat", "dog", "pizza")
    assert eyes.wanted("purring in the dark") == eyes.wanted("cat") > {"1F63A"}
    assert eyes.wanted("haunting") == {"1F47B"}
    assert {book.things[h]["names"][0] for h in eyes.wanted("weapon")} >= set(book.weapons)
    for name, right in (("cat", [1, 1, 0, 0]), ("feline", [1, 1, 0, 0]), ("pizza", [0, 0, 0, 1])):
        said = eyes.right(x, name)
        assert [said[who].int().tolist() for who in ("clip", "judge")] == [right, right]
    street, other = (eyes.right(x, "cat", book.scenes[i])["judge"].int().tolist() for i in (2, 3))
    assert street == [1, 1, 0, 0] and other == [0, 0, 0, 0]
    by, not_by = (eyes.right(x, "cat", "", style)["judge"].int().tolist() for style in ("twemoji", "noto"))
    assert by == [1, 1, 0, 0] and not_by == [0, 0, 0, 0]
    among = eyes.things(x, eyes.logits(x)[0], ["dog", "pizza"])["judge"]            # nothing else can be said
    assert all(one <= eyes.wanted("dog") | eyes.wanted("pizza") for one in among)
    hits = [torch.tensor([True, True]), torch.tensor([True, False])]
    assert measure.share(hits, ["a cat", "a dog"]) == "75.0 (a dog 50)"
    cloud = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert measure.spread(cloud) == pytest.approx(10 / 3)         # distances 5, 5 and 0


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A model of the tiny recipe on the text encoder that is there: [folder, work folder]."""
    root = tmp_path_factory.mktemp("made")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(MINI / part, root / "model" / part)
    flags = ["--data", data, "--out", root / "model", "--work", root / "work", "--recipe", "tiny"]
    for stage in ("vae", "unet", "clip"):
        first = run("mini/train.py", *flags, "--stage", stage, "--minutes", 0, cwd=root)
        assert f"{stage} is not finished" in first.stdout
        run("mini/train.py", *flags, "--stage", stage, cwd=root)
    (root / "model/defaults.json").write_text(json.dumps({"guidance": 3.0, "steps": 1, "size": 64}))
    return root / "model", root / "work"


@pytest.mark.slow                                                 # five minutes, a sheet takes the most
def test_the_stages_make_a_model_and_measuring_fills_its_card(made, data, tmp_path):
    model, work = made
    assert len(list(work.glob("unet-*.png"))) == 5                # a sheet at each score
    run("mini/measure.py", "--data", data, "--model", model, "--work", tmp_path, "--n", 2, "--steps", 2,
        "--frechet", 20, cwd=tmp_path)
    card = {part: (tmp_path / f"measured-{part}.md").read_text("utf-8") for part in measure.PARTS}
    assert card["vae"].startswith("PSNR on 400 held-out compositions: ")
    assert card["judges"].count(" % |") == 6 and card["words"].count("| ") > 9 * 4
    assert "| phrases (40 × 2) | ≥ 80 | " in card["words"] and "(a photo of" in card["words"]
    key = json.loads((tmp_path / "stranger-classes.json").read_text())
    assert len(key) == 100 and key.count("frog") == 10
    assert "other compositions" in card["cloud"] and "MiB of weights" in card["cost"]
