"""Pictures of `mini/`: an emoji of one of seven open sets on a drawn scene, 64 × 64, and its caption.

    icons, book = Icons(Path("emoji")), Book()
    x, which, scene = compose(icons, 32, torch.Generator().manual_seed(0))     # [32, 3, 64, 64] in 0 … 1
    book.caption_of(icons, which[0], scene[0], rng)                        # "a photo of the cat on the grass"

The folder holds a mosaic of 64 × 64 RGBA pictures per set, 32 in a row, and `sets.json` with their order:
`render.mjs` makes it. `captions.json` (the book) says what each picture may be called.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing import UserError
from plumbing.book import drawn_things
from plumbing.disk import read_json

HERE = Path(__file__).resolve().parent
SIZE = 64
PLURALS = {"airplanes", "automobiles", "birds", "cats", "dogs", "frogs", "horses", "ships", "trucks"}


class Book:
    """captions.json. `names`: everything that names a picture; `words`: everyday words that name none."""

    def __init__(self, path: Path = HERE / "captions.json"):
        book = read_json(path)
        self.things, self.classes, self.places = book["things"], book["classes"], book["places"]
        self.scenes, self.styles, self.templates = book["scenes"], book["styles"], book["templates"]
        self.characters, self.weapons = book["characters"], book["weapons"]
        self.likely = torch.tensor([[places.get(scene, 0.0) for scene in self.scenes]
                                    for places in book["likely"].values()])          # [kinds, scenes]
        self.kinds = list(book["likely"])
        self.phrases = {p for c in self.classes.values()
                        for p in c["associated"] + c["choosing"]["associated"]}
        self.phrases |= {p for c in self.characters.values() for p in c["associated"] + c["choosing"]}
        self.called = {h: self.calls(h, t) for h, t in self.things.items()}    # emoji -> {name: share}
        self.own = sorted(drawn_things(book))                     # own names of what the U-Net learns
        self.names = sorted({name for share in self.called.values() for name in share})
        self.words = [word for word in book["words"] if word not in self.names]

    def calls(self, h: str, thing: dict) -> dict[str, float]:
        """How often the emoji h is called by each of its names; the shares sum to 1."""
        def spread(names: list[str], share: float) -> dict[str, float]:
            return {name: share / len(names) for name in names}
        own, more, umbrella = thing["names"][:1], thing["names"][1:], thing["umbrella"]
        if "class" in thing:                                      # of a class: its synonyms and phrases, too
            word, entry = thing["class"], self.classes[thing["class"]]
            mine = lambda names: [n for n in names if h in entry["pictures"].get(n, entry["emoji"])]
            parts = [(own, 0.2), ([word], 0.3),
                     (mine(entry["synonyms"] + entry["choosing"]["synonyms"]), 0.22),
                     (mine(entry["associated"] + entry["choosing"]["associated"]), 0.2),
                     ([f"{word}s"] if f"{word}s" in PLURALS else [], 0.03), (umbrella, 0.05)]
        else:
            phrases = self.characters.get(own[0], {"associated": [], "choosing": []})
            parts = [(own, 0.55), (more, 0.2), (phrases["associated"] + phrases["choosing"], 0.2),
                     (["weapon"] if own[0] in self.weapons else [], 0.2), (umbrella, 0.1)]
        called: dict[str, float] = {}
        for names, share in parts:
            for name, s in spread(names, share).items():
                called[name] = called.get(name, 0.0) + s
        return {name: s / sum(called.values()) for name, s in called.items()}

    def caption(self, name: str | None, template: int, place: str = "", style: str = "") -> str:
        """"a photo of the cat" + " on the grass" + " by twemoji"; a phrase is its own sentence."""
        if name is None:
            text = "an artwork"
        elif name in self.phrases:
            text = name
        else:
            text = self.templates[template].format(name=name, a="an" if name[0] in "aeiou" else "a")
        return text + (f" {place}" if place else "") + (f" by {style}" if style else "")

    def caption_of(self, icons: "Icons", which: int, scene: int, rng: torch.Generator) -> str:
        """A caption for the icon `which` (−1: the scene alone) on `scene`: name, place and style, or less."""
        u = torch.rand(5, generator=rng).tolist()
        template = int(u[0] * len(self.templates))
        if u[1] < 0.1:                                            # the empty caption, for guidance
            return ""
        if which < 0:
            return self.caption(self.scenes[scene], template)
        h, style = icons.which[which]
        if u[1] < 0.13:
            return self.caption(None, 0, "", self.styles[style] if u[2] < 0.7 else "")
        names = self.called[h]
        name = list(names)[torch.multinomial(torch.tensor(list(names.values())), 1, generator=rng).item()]
        return self.caption(name, template, self.places[self.scenes[scene]] if u[3] < 0.35 else "",
                            self.styles[style] if u[4] < 0.3 else "")


    def words_of(self, icons: "Icons", which: int, scene: int, rng: torch.Generator) -> str:
        """As `caption_of`, but never empty."""
        while not (caption := self.caption_of(icons, which, scene, rng)):
            pass
        return caption


class Icons:
    """All emoji of the book in all sets. rgba [N, 4, 64, 64] uint8, colours times opacity; which[i]: (emoji,
    set); weight [N]: how often each is shown; drawn [N]: whether the U-Net and CLIP learn it, too (none of
    the class `without`); kept [N]: one in twenty, which no judge is trained on."""

    def __init__(self, folder: Path, book: Book, without: str | None = None):
        if without and without not in book.classes:
            raise UserError(f"--without {without}: the book has {', '.join(book.classes)}")
        if not (folder / "sets.json").is_file():
            raise UserError(f"--data {folder}: no sets.json there; mini/render.mjs makes that folder")
        from PIL import Image                                     # training alone reads PNG files
        self.book, self.which, mosaics = book, [], []
        for name, entry in read_json(folder / "sets.json")["sets"].items():
            mosaic = np.asarray(Image.open(folder / f"{name}.png").convert("RGBA"))
            tiles = mosaic.reshape(len(mosaic) // SIZE, SIZE, 32, SIZE, 4).swapaxes(1, 2)
            tiles = tiles.reshape(-1, SIZE, SIZE, 4)
            keep = [i for i, h in enumerate(entry["order"]) if h in book.things]
            mosaics.append(torch.from_numpy(tiles[keep].copy()).permute(0, 3, 1, 2))
            self.which += [(entry["order"][i], name) for i in keep]
        rgba = torch.cat(mosaics)
        alpha = rgba[:, 3:].float() / 255
        self.rgba = torch.cat([(rgba[:, :3] * alpha).round().to(torch.uint8), rgba[:, 3:]], dim=1)
        near = {n for c in book.classes.values() for n in c["stay"] + c["disputed"]}
        many = {c: sum(book.things[h].get("class") == c for h, _ in self.which) for c in book.classes}
        self.weight = torch.tensor([self.share(book.things[h], near, many) for h, _ in self.which])
        self.drawn = torch.tensor([book.things[h].get("drawn", True)
                                   and book.things[h].get("class", "") != without for h, _ in self.which])
        self.kept = torch.rand(len(self.which), generator=torch.Generator().manual_seed(0)) < 0.05
        self.kind = torch.tensor([book.kinds.index(book.things[h]["scenes"]) for h, _ in self.which])

    @staticmethod
    def share(thing: dict, near: set[str], many: dict[str, int]) -> float:
        """A class counts as forty icons at least, each of its icons as two; a near thing a bit more."""
        if "class" in thing:
            return max(2.0, 40 / many[thing["class"]])
        return 1.3 if thing["names"][0] in near else 1.0


def noise(n: int, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    return F.interpolate(torch.randn(n, 1, *size, generator=rng), (SIZE, SIZE), mode="bicubic")


def scenes(kind: str, n: int, rng: torch.Generator) -> Tensor:
    """n pictures [n, 3, 64, 64] of a scene, smooth: grain costs the autoencoder more than the things."""
    def colour(*rgb: int, spread: float = 0.03, light: float = 0.05) -> Tensor:
        return (torch.tensor(rgb).view(1, 3, 1, 1) / 255 + spread * torch.randn(n, 3, 1, 1, generator=rng)
                + light * torch.randn(n, 1, 1, 1, generator=rng))
    y = torch.linspace(0, 1, SIZE).view(1, 1, SIZE, 1)
    sky = colour(80, 150, 230) * (1 - y) + colour(190, 225, 250, light=0) * y
    horizon = 0.35 + 0.25 * torch.rand(n, 1, 1, 1, generator=rng)
    below = ((y - horizon) * 24).clamp(0, 1)                      # 0 above the horizon, 1 below
    if kind in ("sky", "sea"):
        clouds = (noise(n, (4, 4), rng) - 0.4).clamp(0, 1) * torch.linspace(0.9, 0.2, SIZE).view(y.shape)
        sky = sky * (1 - clouds) + clouds
    if kind == "sky":
        x = sky
    elif kind == "sea":
        x = sky * (1 - below) + (colour(30, 100, 170) + 0.05 * noise(n, (10, 3), rng)) * below
    elif kind == "grass":
        x = sky * (1 - below) + (colour(90, 160, 60) + 0.04 * noise(n, (5, 4), rng)) * below
    elif kind == "ground":
        x = sky * (1 - below) + (colour(180, 140, 95) + 0.04 * noise(n, (5, 4), rng)) * below
    elif kind == "snow":
        x = colour(175, 195, 220) * (1 - below) + (colour(238, 243, 250, spread=0.01, light=0.01)) * below
    elif kind == "night":
        x = colour(12, 16, 50, spread=0.02, light=0.01) + 0.3 * y * colour(60, 50, 130, light=0)
        stars = torch.rand(n, 1, 16, 16, generator=rng) > 0.97
        x = x + 0.7 * F.interpolate(stars.float(), (SIZE, SIZE), mode="bilinear") ** 2
    elif kind == "street":
        road = colour(110, 112, 118, spread=0.01)
        dash = ((torch.arange(SIZE).view(1, 1, 1, SIZE) + torch.randint(0, 16, (n, 1, 1, 1), generator=rng))
                % 16 < 8) & ((y - 0.86).abs() < 0.025)
        road = torch.where(dash, torch.tensor(0.94), road)
        walls = colour(170, 160, 165)
        walls = walls + 0.06 * F.interpolate(torch.randn(n, 1, 1, 5, generator=rng), (SIZE, SIZE))
        roofs = 0.12 + 0.25 * F.interpolate(torch.rand(n, 1, 1, 5, generator=rng), (1, SIZE))
        below = ((y - 0.6) * 24).clamp(0, 1)
        x = torch.where(y < roofs, sky, walls) * (1 - below) + road * below
    else:                                                         # room: a wall and a floor
        wall = 0.45 + 0.5 * torch.rand(n, 3, 1, 1, generator=rng)
        x = wall * (1 - 0.2 * ((y - 0.72) * 24).clamp(0, 1))
    return x.expand(n, 3, SIZE, SIZE).clamp(0, 1)


def place(rgba: Tensor, rng: torch.Generator) -> Tensor:
    """[n, 4, 64, 64] -> the same at 0.8 to 0.95 of the size, mirrored or not, moved within the frame."""
    n = len(rgba)
    size = 0.8 + 0.15 * torch.rand(n, generator=rng)
    flip = 1 - 2 * torch.randint(2, (n,), generator=rng).float()
    move = (2 * torch.rand(n, 2, generator=rng) - 1) * (1 - size)[:, None]
    grid = torch.zeros(n, 2, 3)
    grid[:, 0, 0], grid[:, 1, 1] = flip / size, 1 / size
    grid[:, 0, 2], grid[:, 1, 2] = -move[:, 0] * flip / size, -move[:, 1] / size
    grid = F.affine_grid(grid, list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, align_corners=False)


EMPTY = 0.05                                                      # share of scenes with nothing on them


def compose(icons: Icons, n: int, rng: torch.Generator, weight: Tensor | None = None):
    """n compositions -> x [n, 3, 64, 64] in 0 … 1, the icon of each (−1: none), its scene."""
    which = torch.multinomial(icons.weight if weight is None else weight, n, True, generator=rng)
    scene = torch.multinomial(icons.book.likely[icons.kind[which]], 1, generator=rng)[:, 0]
    back = torch.empty(n, 3, SIZE, SIZE)
    for k, kind in enumerate(icons.book.scenes):
        mine = (scene == k).nonzero()[:, 0]
        if len(mine):
            back[mine] = scenes(kind, len(mine), rng)
    thing = place(icons.rgba[which].float() / 255, rng)
    empty = torch.rand(n, generator=rng) < EMPTY
    thing[empty] = 0
    which[empty] = -1
    return (thing[:, :3] + back * (1 - thing[:, 3:])).clamp(0, 1), which, scene
