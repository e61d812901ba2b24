"""Makes course/explore.html: choose a class, a method, a setting; see what goes and what is taken along.

    python course/explore.py                                  # mini's classes: twenty minutes on two cores
    python course/explore.py --classes cat --n 2 --steps 8 --out out/explore.html

The page needs no network and no installation. Sliders move one at a time, in four steps: the others return to
their default. For each step it holds pictures beside the untouched model's, from the same noise, the share of
the way that prompts go, where their rows lie in a plane before and after, and what CLIP counts. Drawn are --n
pictures a prompt at the defaults and half as many elsewhere, where the other classes are known by text alone.

What is finished of a class is kept in --work: a killed run goes on. A class's pictures are one JPEG, of the
best quality with which the page stays below 3 MiB (by Pillow, which tests install; without it PNGs).
"""
import base64
import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
import realera
from baselines import vocabulary
from erasing import Pair, edited, make_pairs
from eval_clip import judge
from experiments.shares import CLOSED, edit_of, groups_of
from plumbing import UserError
from plumbing.book import book, use_book
from plumbing.cli import BOOK, at_least_1, command_line, parse_settings, pick_device, program
from plumbing.disk import whole
from plumbing.drift import drifts, edited_rows, nearness, share
from plumbing.edits import as_filed, cross_attention
from plumbing.models import defaults, fingerprint, model_folder, model_name
from plumbing.pictures import as_png, pixels
from plumbing.progress import progress
from plumbing.prompts import prompt_of
from plumbing.report import as_data, page
from plumbing.weights import find_weights
from sample import Model

MOST, TITLE = 3 * 2 ** 20, "What goes, and what is taken along"         # bytes of the page
TEMPLATE = Path(__file__).with_name("explorer.html")              # the page's body and script


def slider(setting: str, label: str, default: float, says: str, times=(), plus=()) -> dict:
    """Four values of a setting: the default `times` some factors, or `plus` some differences."""
    values = [default * factor for factor in times] or [round(default + more, 3) for more in plus]
    values = [round(value) for value in values] if isinstance(default, int) else values
    return {"setting": setting, "label": label, "says": says, "default": values.index(default),
            "values": [f"{value:g}" for value in values], "set": [f"{setting}={value:g}" for value in values]}


def methods() -> list[dict]:
    """What can be chosen on the page. Every value comes from the methods' own defaults."""
    r, v = realera.Settings(), vocabulary.Settings()
    limits = [f"{x * r.D1_anchor:g}" for x in (0, 0.5, 1)]
    tolerance = {"setting": "tolerance", "label": "tolerance r′ up to",
                 "says": "how far around the anchor neighbors land; r′ = r: as far as around the concept",
                 "values": [*limits, "r′ = r"], "default": 2 + (r.tolerance == "same"),
                 "set": [*(f"tolerance=own D1_anchor={x}" for x in limits), "tolerance=same"]}
    reach = "how far along the way from concept to anchor the concept itself is sent: 1 is the anchor"
    ridge = "holds the edit small in all directions"
    return [
        {"id": "closed", "name": "closed form", "settings": CLOSED, "says": "Eq. (7) alone: the concept's "
         "rows become the anchor's, a few prompts stay. No neighbors.", "sliders": [
             slider("reach", "reach", r.reach, reach, (1, 1.5, 2, 3)),
             slider("lambda2", "ridge λ2", r.lambda2, ridge, (0.01, 1, 10, 100))]},
        {"id": "realera", "name": "RealEra", "settings": "", "says": "Eq. (7) with neighbors, which are the "
         "concept blended with noise, and beyond-concepts, which stay. No noise alignment.", "sliders": [
             slider("lambda1", "λ1", r.lambda1, "weight of what must stay", (1 / 400, 1 / 40, 1 / 4, 1)),
             slider("reach", "reach", r.reach, reach, (1, 1.5, 2, 3)),
             slider("M", "neighbors M", r.M, "how many neighbors go with the concept", (0, 0.05, 1, 3)),
             tolerance,
             slider("lambda2", "ridge λ2", r.lambda2, ridge, (0.01, 1, 10, 100))]},
        {"id": "vocabulary", "name": "words of the vocabulary", "settings": "vocabulary", "says":
         "Neighbors are the tokenizer's own words: near ones go with the concept, the next ones stay.",
         "sliders": [
             slider("threshold", "threshold", v.threshold, "words at least so near to the concept (cosine) "
                    "go with it", plus=(-0.2, -0.1, 0, 0.05)),
             slider("reach", "reach", v.reach, reach, (1 / 3, 2 / 3, 1, 4 / 3)),
             slider("contrast", "contrast", v.contrast, "so many of the words that come next stay, each with "
                    "a weight of its own", (0, 0.2, 1, 4))]}]


def states(method: dict) -> dict[str, str]:
    """{state: settings} of a method: its defaults, "realera", each slider's other steps, "realera/M/0"."""
    found = {method["id"]: method["settings"]}
    for one in method["sliders"]:
        found |= {f"{method['id']}/{one['setting']}/{i}": f"{method['settings']} {change}".strip()
                  for i, change in enumerate(one["set"]) if i != one["default"]}
    return found


def watched(pair: Pair, text) -> list[tuple[str, str]]:
    """(group, name) of all whose rows are followed: those of experiments/shares.py. The canary is the nearest
    of the book's near things or, where it has none, of the other classes."""
    entry, classes = book()["classes"][pair.concept], [*book()["classes"]]
    names = entry.get("stay") or [name for name in classes if name != pair.concept]
    rows = edited_rows([prompt_of(name) for name in names], text)
    groups = groups_of(pair.concept, "reported", {x: nearness(pair, e) for x, e in zip(names, rows)})
    found = {}                                                    # a name that is in two groups counts once
    for label, group in (("concept", "concept"), ("canary", "canary"), ("synonym", "synonyms"),
                         ("phrase", "phrases"), ("near", "near" if entry.get("stay") else ""),
                         ("far", "far"), ("class", "other classes")):
        for name in groups.get(group, []):
            found.setdefault(name, (label, name))
    return [*found.values()]


def drawn_of(names: list[tuple[str, str]], pair: Pair, text) -> list[tuple[str, str]]:
    """Those of which pictures are shown: concept, two synonyms, two phrases, canary, a far thing or class."""
    far = [row for row in names if row[0] == "far"]
    others = [row for row in names if row[0] == "class"]
    if not far and others:                                        # the class that is least like it
        rows = edited_rows([prompt_of(name) for _, name in others], text)
        far = [min(zip(others, rows), key=lambda both: nearness(pair, both[1]))[0]]
    return [row for group, most in (("concept", 1), ("synonym", 2), ("phrase", 2), ("canary", 1))
            for row in [row for row in names if row[0] == group][:most]] + far[:1]


def neighbors(method: str, settings: str, pair: Pair, text, words) -> tuple[list[str], list[Tensor]]:
    """Six of the neighbors that a state moves, and their edited rows [·, D]: sampled, or words."""
    if method == "realera":
        s = parse_settings(realera.Settings, settings.split())
        few, generator = replace(s, M=min(s.M, 6)), torch.Generator().manual_seed(pair.seed)
        near = realera.neighbor_concepts(pair.block(), pair.block_star(), few, generator)[0]
        return [f"neighbor {i}" for i in range(1, len(near) + 1)], list(near)
    if method == "vocabulary":
        s = parse_settings(vocabulary.Settings, settings.split()[1:])
        goes = [*vocabulary.around(pair, words, s, {pair.concept, pair.anchor})[0]][:6]
        return goes, edited_rows([prompt_of(word) for word in goes], text) if goes else []
    return [], []


class Plane:
    """Two principal directions of prompts' edited rows, each prompt one long vector of n rows."""

    def __init__(self, rows: list[Tensor]):
        self.n = min(map(len, rows))
        X = self.flat(rows)
        self.mean = X.mean(0)
        self.axes = torch.linalg.svd(X - self.mean, full_matrices=False).Vh[:2]      # [2, n D]
        way = (X[1] - X[0]) @ self.axes.T                         # from concept to anchor: to the right
        self.axes = self.axes * torch.where(way < 0, -1.0, 1.0).to(self.axes)[:, None]

    def flat(self, rows: list[Tensor]) -> Tensor:
        return torch.stack([x[:self.n].flatten() for x in rows])

    def points(self, rows: list[Tensor], delta: Tensor | None = None) -> list[list[float]]:
        """Where rows lie, as [x, y] each; with delta: rows (I + Δ)."""
        rows = rows if delta is None else [x + x @ delta.T for x in rows]
        shown = ((self.flat(rows) - self.mean) @ self.axes.T).tolist() if rows else []
        return [[round(x, 3), round(y, 3)] for x, y in shown]


class Maker:
    """Draws and counts one class after another."""

    def __init__(self, args):
        self.args, self.model = args, Model(args.model, pick_device(args.device))
        self.W0 = cross_attention(self.model.folder)
        self.clip = judge(args.clip, self.model.folder, self.model.device)
        self.words = vocabulary.make_vocabulary(self.model.text, "object")
        self.untouched = self.draw([*book()["classes"]], args.n)  # all classes, [classes, n, 3, H, W]

    def draw(self, names: list[str], n: int) -> Tensor:
        """Pictures [names, n, 3, H, W] with the edit that the model wears, seeds 0 … n − 1."""
        seeds = [*range(n)]
        prompts = [prompt_of(name) for name in names for _ in seeds]
        return self.model.draw(prompts, seeds * len(names), self.args.steps).unflatten(0, (len(names), n))

    def choose(self, pictures: Tensor, among: list[str]) -> Tensor:
        """CLIP's first choice for each picture [names, n, …] -> [names, n]."""
        prompts = [prompt_of(name) for name in among]
        return self.clip.classify(pictures.flatten(0, 1), prompts).argmax(1).view(pictures.shape[:2])

    def others(self, concept: str, among: list[str]) -> list[int]:
        """Acc_s as [right, pictures], with the edit that the model wears."""
        names = [name for name in book()["classes"] if name != concept]
        drawn = self.draw(names, self.args.n) if self.model.worn else self.untouched[
            [name != concept for name in book()["classes"]]]
        seen = self.choose(drawn, among)
        return [(seen == torch.tensor([[among.index(name)] for name in names])).sum().item(), seen.numel()]

    def make(self, concept: str) -> tuple[dict, Tensor]:
        """All that the page says of a class, and its pictures, uint8 [pictures, H, W, 3]."""
        text, n = self.model.text, self.args.n
        pair = make_pairs(concept, None, "object", text, "tail", 0)[0]
        names = watched(pair, text)
        shown = drawn_of(names, pair, text)
        among = list(dict.fromkeys([*book()["classes"], *book()["scenes"], *(
            name for group, name in shown if group in ("canary", "far"))]))
        rows = edited_rows([prompt_of(name) for _, name in names], text)
        points, pictures = [pair.block(), pair.block_star(), *rows[1:]], []          # the anchor second
        plane, places = Plane(points), [("concept", concept), ("anchor", pair.anchor), *names[1:]]

        def state(key: str, settings: str) -> dict:
            """What one state shows; its pictures are added to the others."""
            about = {"settings": settings}
            if key:
                delta = edit_of(settings, pair, text, self.words)
                self.model.put(as_filed(edited(self.W0, delta), self.model.folder))
                near, near_rows = neighbors(key.partition("/")[0], settings, pair, text, self.words)
                about |= {"shares": [round(share(delta, pair, x), 3) for x in rows],
                          "drift": round(list(drifts(delta, [pair], text).values())[1], 3),
                          "to": plane.points(points, delta), "near": near,
                          "near from": plane.points(near_rows), "near to": plane.points(near_rows, delta)}
            else:
                self.model.put({})
            default, start = "/" not in key, sum(map(len, pictures))
            drawn = self.draw([name for _, name in shown], n if default else max(1, n // 2))
            seen = self.choose(drawn, among)
            pictures.append(torch.from_numpy(pixels(drawn.flatten(0, 1))))
            counted = {}
            for name, group in (("Acc_e", "concept"), ("Acc_g", "synonym"), ("Acc_a", "phrase"),
                                ("stay", "canary")):
                mine = [i for i, row in enumerate(shown) if row[0] == group]
                wanted = [among.index(shown[i][1] if group == "canary" else concept) for i in mine]
                right = seen[mine] == torch.tensor(wanted)[:, None] if mine else seen[:0]
                counted[name] = [right.sum().item(), right.numel()]
            if default:
                counted["Acc_s"] = self.others(concept, among)
            return about | {"at": start, "n": drawn.shape[1], "seen": seen.tolist(), "counted": counted}

        found = {"": state("", "")}
        for method in methods():
            found |= {key: state(key, settings) for key, settings in states(method).items()}
        self.model.put({})
        return {"anchor": pair.anchor, "among": among, "names": names, "shown": shown, "places": places,
                "cosines": [round(nearness(pair, x), 3) for x in rows], "from": plane.points(points),
                "states": found}, torch.cat(pictures)


# ------------------------------------------------------------------------------------------ files

def work_file(args, concept: str) -> Path:
    """Where a class's results are kept: the name is a hash of all that they depend on."""
    model = model_folder(args.model)
    clip = model_folder(args.clip, "--clip") if args.clip else model / "clip"
    code = [Path(method.__file__).read_text(encoding="utf-8") for method in (realera, vocabulary)]
    asked = [fingerprint(model), fingerprint(find_weights(clip, "model")), book(), [*map(states, methods())],
             args.n, args.steps, code]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return args.work / f"{concept}-{key}.safetensors"


def mosaic(pictures: Tensor, columns: int) -> Tensor:
    """uint8 [N, H, W, 3] -> one picture, row by row, the last row filled with white."""
    more = -len(pictures) % columns
    pictures = torch.cat([pictures, pictures.new_full((more, *pictures.shape[1:]), 255)])
    return pictures.unflatten(0, (-1, columns)).transpose(1, 2).flatten(0, 1).flatten(1, 2).contiguous()


def as_url(picture: Tensor, quality: int) -> str:
    """uint8 [H, W, 3] as a data URL: a JPEG, or a PNG where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return "data:image/png;base64," + base64.b64encode(as_png(picture.numpy())).decode()
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def assemble(files: dict[str, Path], about: dict) -> str:
    """The page of finished classes. Raises UserError if it is larger than 3 MiB at any quality."""
    classes, mosaics = {}, {}
    for concept, path in files.items():
        with safe_open(path, "pt") as file:
            classes[concept] = json.loads(file.metadata()["found"])
            pictures = file.get_tensor("pictures")
        about["size"] = [pictures.shape[2], pictures.shape[1]]
        classes[concept]["columns"] = columns = len(classes[concept]["shown"]) * about["n"]
        mosaics[concept] = mosaic(pictures, columns)
    body = TEMPLATE.read_text(encoding="utf-8")
    for quality in (92, 88, 84, 80, 75, 70, 65, 60, 55, 50, 45, 40, 35, 30):
        for concept in classes:
            classes[concept]["mosaic"] = as_url(mosaics[concept], quality)
        made = page(TITLE, body.replace("<!--data-->", as_data(about | {"classes": classes})), script=True)
        if len(made.encode()) <= MOST:
            print(f"JPEG quality {quality}, {len(made.encode()) / 2 ** 20:.2f} MiB")
            return made
    raise UserError("the page would be larger than 3 MiB: --n 2, fewer --classes, or install Pillow")


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--model", default="mini", help="folder or hub id (default mini)")
    parser.add_argument("--book", type=Path, metavar="FILE", help=BOOK)
    parser.add_argument("--clip", help="CLIP that counts: folder or hub id (default: the model's own clip/)")
    parser.add_argument("--device", default="auto", help="auto (CUDA or CPU), cpu, cuda, mps")
    parser.add_argument("--n", type=int, default=4, help="pictures per prompt at the defaults (default 4)")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps (default 12)")
    parser.add_argument("--classes", help="some of the book's, as cat,dog (default: all)")
    parser.add_argument("--work", type=Path, default=Path("out/explore"),
                        help="what is finished is kept there (default out/explore)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("explore.html"),
                        help="the page, replaced if it exists (default course/explore.html)")
    args = parser.parse_args()
    use_book(args.book)
    at_least_1(args, "n", "steps")
    wanted = args.classes.split(",") if args.classes else [*book()["classes"]]
    if wrong := {*wanted} - book()["classes"].keys():
        raise UserError(f"--classes {min(wrong)}: the book has {', '.join(book()['classes'])}")
    if args.out.exists() and TITLE not in args.out.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"--out {args.out} exists and is no page of this program: choose another")
    maker, files = None, {concept: work_file(args, concept) for concept in wanted}
    for concept, path in progress(list(files.items()), "page", "concept"):
        if path.exists():
            continue
        maker = maker or Maker(args)
        found, pictures = maker.make(concept)
        with whole(path) as temporary:
            save_file({"pictures": pictures}, temporary, {"found": json.dumps(found)})
    guidance = defaults(model_folder(args.model))["guidance"]
    made = assemble(files, {"model": model_name(args.model), "n": args.n, "steps": args.steps,
                            "guidance": guidance, "methods": methods()})
    with whole(args.out) as temporary:
        temporary.write_text(made, encoding="utf-8", newline="\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command_line(main)
