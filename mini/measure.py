"""The model card's numbers: what `mini/` knows and what it draws, seen by two judges of different kinds.

    python mini/measure.py --data emoji --parts vae judges              # of real compositions
    python mini/measure.py --data emoji --model out/mini                # all parts

Each part prints a piece of the card, in Markdown, and writes it to --work. One judge is `mini/clip`; the
other a small ResNet that never read a word: trained here on compositions of its own, kept in --work. Neither
chooses a picture. Both answer among all things that the U-Net learns.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
import vae  # noqa: E402
from eval_clip import CLIP
from mini.emoji import Book, Icons, compose
from mini.train import Run
from plumbing import svg
from plumbing.cli import command_line, pick_device
from plumbing.pictures import grid, write_png
from plumbing.stats import frechet
from sample import Model


class Judge(nn.Module):
    """A small ResNet: pictures [B, 3, H, W] in [0, 1] -> logits of each question, answers[k] of them."""

    def __init__(self, answers: tuple[int, ...], widths: tuple[int, ...]):
        super().__init__()
        self.answers, self.stem = answers, nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for c_in, c in zip((widths[0], *widths), widths):
            stride = 1 if c_in == c else 2
            self.blocks.append(nn.ModuleDict({
                "conv1": nn.Conv2d(c_in, c, 3, stride, 1, bias=False), "norm1": nn.GroupNorm(8, c),
                "conv2": nn.Conv2d(c, c, 3, 1, 1, bias=False), "norm2": nn.GroupNorm(8, c),
                "skip": nn.Conv2d(c_in, c, 1, stride, bias=False)}))
        self.head = nn.Linear(widths[-1], sum(answers))

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem((x - 0.5) / 0.25))
        for block in self.blocks:
            h = F.relu(block["norm1"](block["conv1"](x)))
            x = F.relu(block["norm2"](block["conv2"](h)) + block["skip"](x))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.features(x)).split(self.answers, dim=1)

    @torch.no_grad()
    def look(self, x: Tensor) -> Tensor:
        """Features [N, F] of any number of pictures, on the CPU."""
        return torch.cat([self.features(part.to(self.head.weight)).cpu() for part in x.split(250)])


class Eyes:
    """Both judges. An answer is a set of emoji: clip's the owners of the name that it found nearest, the
    ResNet's one emoji. It is right if one of them is wanted."""

    def __init__(self, args):
        self.book = Book()
        self.icons = Icons(args.data, self.book)
        self.weight = self.icons.weight * self.icons.drawn
        self.emoji = sorted({h for (h, _), drawn in zip(self.icons.which, self.icons.drawn) if drawn})
        self.styles = [name for name in self.book.styles if name in {s for _, s in self.icons.which}]
        self.own = sorted({self.book.things[h]["names"][0] for h in self.emoji})
        self.clip = CLIP.from_pretrained(args.model / "clip", device=args.device)
        self.judge = self.trained(args)

    def trained(self, args) -> Judge:
        torch.manual_seed(1)
        answers = len(self.emoji), len(self.book.scenes), len(self.styles)
        judge = Judge(answers, (32, 64, 128, 192)).to(args.device, memory_format=torch.channels_last)

        def loss(rng: torch.Generator, step: int) -> Tensor:      # not one composition that CLIP has seen
            x, which, scene = compose(self.icons, 128, torch.Generator().manual_seed(10 ** 7 + step),
                                      self.weight * ~self.icons.kept)
            emoji, place, style = judge(x.to(args.device, memory_format=torch.channels_last))
            there = (which >= 0).nonzero()[:, 0]
            h, s = zip(*(self.icons.which[w] for w in which[there]))
            wanted = [torch.tensor(list(map(all.index, one))).to(args.device)
                      for all, one in ((self.emoji, h), (self.styles, s))]
            there = there.to(args.device)
            return (F.cross_entropy(emoji[there], wanted[0]) + F.cross_entropy(style[there], wanted[1])
                    + F.cross_entropy(place, scene.to(args.device)))

        run = Run("judge", judge, args.steps, 3e-3, 0.05, args, decays=(0.995,))
        run.train(loss)
        return run.average.eval()

    def wanted(self, name: str) -> set[str]:
        """The emoji that a name may be a picture of; those of the whole class, if it is of one."""
        for word, entry in self.book.classes.items():
            if name in (word, *entry["synonyms"], *entry["associated"]):
                return {h for h in self.emoji if self.book.things[h].get("class") == word}
        return {h for h in self.emoji if name in self.book.called[h]}

    def things(self, x: Tensor, emoji: Tensor, among: list[str] | None = None) -> dict[str, list[set[str]]]:
        """What both see in pictures [n, 3, 64, 64], among the things with these names, or all. emoji: the
        ResNet's logits of them."""
        among = among or self.own
        owners = [self.wanted(name) for name in among]
        found = self.clip.classify(x, [self.book.caption(name, 1) for name in among]).argmax(1)
        known = torch.tensor([any(h in some for some in owners) for h in self.emoji])
        mine = emoji.masked_fill(~known, -torch.inf).argmax(1)
        return {"clip": [owners[i] for i in found], "judge": [{self.emoji[i]} for i in mine]}

    @torch.no_grad()
    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """The ResNet's, of emoji, scene and style, of any number of pictures, on the CPU."""
        logits = self.judge.head(self.judge.look(x).to(self.judge.head.weight))
        return logits.cpu().split(self.judge.answers, dim=1)

    def right(self, x: Tensor, name: str, place: str = "", style: str = "") -> dict[str, Tensor]:
        """Which pictures [n, 3, 64, 64] show the name, and the scene and the style, if they are asked for."""
        wanted, book, (emoji, places, styles) = self.wanted(name), self.book, self.logits(x)
        right = {who: torch.tensor([bool(one & wanted) for one in said])
                 for who, said in self.things(x, emoji).items()}
        places, styles = places.argmax(1), styles.argmax(1)
        if place:
            right["judge"] &= places == book.scenes.index(place)
            some = [book.caption(name, 1, book.places[scene]) for scene in book.scenes]
            right["clip"] &= self.clip.classify(x, some).argmax(1) == book.scenes.index(place)
        if style:
            right["judge"] &= styles == self.styles.index(style)
            some = [book.caption(name, 1, "", book.styles[one]) for one in self.styles]
            right["clip"] &= self.clip.classify(x, some).argmax(1) == self.styles.index(style)
        return right


def share(hits: list[Tensor], names: list[str]) -> str:
    """Mean and least of shares that are right: "95.0 (deer 80)"."""
    shares = torch.stack([100 * hit.float().mean() for hit in hits])
    return f"{shares.mean():.1f} ({names[shares.argmin()]} {shares.min():.0f})"


def picture(args) -> list[str]:
    """What the autoencoder keeps."""
    model = vae.VAE.from_pretrained(args.model / "vae")
    x, _, _ = compose(Icons(args.data, Book()), 400, torch.Generator().manual_seed(2 * 10 ** 6))
    with torch.no_grad():
        back = torch.cat([model.decode(model.encode(2 * part - 1)[0]) for part in x.split(40)]) / 2 + 0.5
    psnr = -10 * (back.clamp(0, 1) - x).square().mean((1, 2, 3)).log10()
    return [f"PSNR on 400 held-out compositions: {psnr.mean():.1f} dB (least {psnr.min():.1f})"]


def judges(args) -> list[str]:
    """How well the judges know real compositions: held-out ones, and icons that neither was trained on."""
    eyes = Eyes(args)
    book, icons = eyes.book, eyes.icons
    lines = ["| real pictures | `mini/clip` | judge |", "|---|---|---|"]
    ten = torch.tensor(["class" in book.things[h] for h, _ in icons.which])
    for what, some, among in (("all things", ~icons.kept, eyes.own),
                              ("the ten classes, among these", ten & ~icons.kept, list(book.classes)),
                              ("icons that neither was trained on", icons.kept, eyes.own)):
        x, which, _ = compose(icons, 1000, torch.Generator().manual_seed(3 * 10 ** 6), eyes.weight * some)
        x, which = x[which >= 0], which[which >= 0]
        said = eyes.things(x, eyes.logits(x)[0], among)
        shown = [book.things[icons.which[w][0]] for w in which]
        wanted = [eyes.wanted(thing.get("class", thing["names"][0])) for thing in shown]
        right = [[bool(a & b) for a, b in zip(said[who], wanted)] for who in ("clip", "judge")]
        lines.append(f"| {what} | " + " | ".join(f"{100 * sum(r) / len(r):.1f} %" for r in right) + " |")
    return lines


def words(args) -> list[str]:
    """Are the pictures what the prompts say?"""
    eyes, model = Eyes(args), Model(args.model, args.device)
    book, n, few = eyes.book, args.n, max(1, args.n // 5)
    kinds = {c: {book.things[h]["scenes"] for h in eyes.wanted(c)} for c in book.classes}
    likely = {c: [s for i, s in enumerate(book.scenes)
                  if any(book.likely[book.kinds.index(kind)][i] >= 0.1 for kind in kinds[c])] for c in kinds}
    known = [c for c in book.characters if eyes.wanted(c)]
    kinds_of_prompts = {
        "class words | ≥ 92, least ≥ 80": (n, [(c, "", "") for c in book.classes]),
        "synonyms | ≥ 88": (n, [(s, "", "") for c in book.classes.values() for s in c["synonyms"]]),
        "phrases | ≥ 80": (n, [(s, "", "") for c in book.classes.values() for s in c["associated"]]),
        "class and scene, both | ≥ 80": (few, [(c, place, "") for c in likely for place in likely[c]]),
        "class and style, both | ≥ 75": (few, [(c, "", s) for c in book.classes for s in eyes.styles
                                               if any((h, s) in eyes.icons.which for h in eyes.wanted(c))]),
        "characters | –": (few, [(c, "", "") for c in known]),
        "their phrases | –": (few, [(p, "", "") for c in known for p in book.characters[c]["associated"]]),
        "weapons | –": (few, [(w, "", "") for w in book.weapons]),
        "all things, once | –": (1, [(name, "", "") for name in eyes.own])}
    lines = ["| prompts (how many) | goal, % | `mini/clip` (least) | judge (least) |", "|---|---|---|---|"]
    for kind, (n, asked) in kinds_of_prompts.items():
        prompts = [book.caption(name, 1, book.places.get(place, ""), book.styles.get(style, ""))
                   for name, place, style in asked]
        x = model.draw([p for p in prompts for _ in range(n)], list(range(n)) * len(prompts))
        right = [eyes.right(some, *one) for some, one in zip(x.split(n), asked)]
        label, goal = kind.split(" | ")
        cells = [share([r[who] for r in right], prompts) for who in ("clip", "judge")]
        lines.append(f"| {label} ({len(asked)} × {n}) | {goal} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def sheets(args) -> list[str]:
    """Pictures for the eye: ten classes × ten in order, and both sheets for somebody who is not told what is
    on them, shuffled, with their keys beside them."""
    book, model = Book(), Model(args.model, args.device)
    lot = torch.randperm(len(book.own), generator=torch.Generator().manual_seed(0))
    some = [book.own[i] for i in lot[:100]]
    tens = [c for c in book.classes for _ in range(10)]
    for name, asked, seeds in (("things", some, list(range(100))), ("classes", tens, list(range(10)) * 10)):
        x = model.draw([book.caption(one, 1) for one in asked], seeds)
        if name == "classes":
            write_png(args.work / "samples.png", grid(x, 10))
        svg.write(args.work / f"{name}.svg", svg.sheet(
            [x[i:i + 10] for i in range(0, 100, 10)], [""] * 10, [""] * 10, name,
            notes=[asked[i:i + 10] for i in range(0, 100, 10)]))
        order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
        write_png(args.work / f"stranger-{name}.png", grid(x[order], 10, zoom=2))
        (args.work / f"stranger-{name}.json").write_text(json.dumps([asked[i] for i in order]) + "\n",
                                                         encoding="utf-8")
    return [f"sheets are in {args.work}"]


def spread(features: Tensor) -> float:
    """Mean distance of two different members of a cloud [n, F]."""
    return (torch.cdist(features, features).sum() / (len(features) * (len(features) - 1))).item()


def cloud(args) -> list[str]:
    """How far the drawn pictures lie from held-out compositions, in the judge's features, and how varied the
    pictures of a class are; real pictures give the floor."""
    eyes, model, n = Eyes(args), Model(args.model, args.device), args.frechet
    book, look = eyes.book, eyes.judge.look
    rng = torch.Generator().manual_seed(4 * 10 ** 6)
    held, which, scene = compose(eyes.icons, n, rng, eyes.weight)
    other = compose(eyes.icons, n, rng, eyes.weight)[0]
    captions = [book.words_of(eyes.icons, w, s, rng) for w, s in zip(which.tolist(), scene.tolist())]
    drawn, ratios = model.draw(captions, list(range(n))), []
    for c in book.classes:
        mine = torch.tensor([book.things[h].get("class") == c for h, _ in eyes.icons.which])
        real = compose(eyes.icons, args.n, rng, eyes.weight * mine)[0]
        x = model.draw([book.caption(c, 1)] * args.n, list(range(args.n)))
        ratios.append(spread(look(x)) / spread(look(real)))
    apart = [f"{frechet(look(x), look(held)):.2f}" for x in (drawn, other)]
    return [f"Fréchet distance of {n} pictures to {n} held-out compositions: {apart[0]}; of {n} other "
            f"compositions: {apart[1]}",
            f"mean distance of two pictures of a class, over that of compositions: "
            f"{100 * sum(ratios) / len(ratios):.0f} % (least {100 * min(ratios):.0f})"]


def eight_pictures(args) -> tuple[float, float]:
    """Seconds and GiB of one command as a user runs it: eight pictures, on a CPU."""
    # its own peak, as Linux counts it: a child's ru_maxrss starts from its parent's
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    root = HERE.parent
    out = args.work / "cost.png"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", code, root / "sample.py", "a photo of the ship", "--n", "8",
               "--device", "cpu", "--model", args.model.resolve(), "--out", out.resolve()]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, cwd=root,
                          env=os.environ | {"PYTHONPATH": str(root)})
    printed, _, peak = done.stdout.strip().splitlines()           # the PNG's line, the SVG's, ours
    return 8 * float(printed.split()[-4]), int(peak) / 2 ** 20


def cost(args) -> list[str]:
    """A command's time and memory, and what is on the disk."""
    seconds, peak = eight_pictures(args)
    weights = sum(path.stat().st_size for path in args.model.glob("*/*model.safetensors"))
    return [f"8 pictures: {seconds:.1f} s, {peak:.2f} GiB; "
            f"{weights / 2 ** 20:.1f} MiB of weights"]


PARTS = {"vae": picture, "judges": judges, "words": words, "sheets": sheets, "cloud": cloud,
         "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="model folder (default: this one)")
    parser.add_argument("--data", type=Path, required=True, help="emoji mosaics: render.mjs makes them")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="for the judge, pieces and sheets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--n", type=int, default=20, help="pictures per prompt (default 20)")
    parser.add_argument("--frechet", type=int, default=1000,
                        help="pictures for the Fréchet distance (default 1000)")
    parser.add_argument("--steps", type=int, default=4000, help="the judge's training steps (default 4000)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args()
    args.device, args.minutes = pick_device(args.device), 1e9
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        piece = "\n".join(PARTS[part](args)) + "\n"
        print(piece, flush=True)
        (args.work / f"measured-{part}.md").write_text(piece, encoding="utf-8")


if __name__ == "__main__":
    command_line(main)
