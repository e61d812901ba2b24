"""course/explore.html: what it is made of, and that it works in a browser."""
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import realera
from course import explore
from erasing import make_pairs
from helpers import write_plain_book
from plumbing.book import book, use_book
from plumbing.drift import edited_rows, share
from plumbing.prompts import preserved_prompts, prompt_of
from realera import erase_in_closed_form

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


SETTINGS, METHODS = realera.Settings(), explore.methods
CLASSES = (("cat", "ground", "feline", "purring in the dark"),
           ("dog", "ground", "hound", "beagle on a leash"),
           ("ship", "street", "boat", "ferry in the harbour"))
BOOK = {"classes": {name: {"anchor": anchor, "synonyms": [synonym], "associated": [phrase]}
                    for name, anchor, synonym, phrase in CLASSES},
        "scenes": ["ground", "street"], "preserved": ["bird", "tree"], "watched": ["forest", "person"]}
FLAGS = ["--classes", "cat", "--n", 1, "--work", "work", "--out", "page.html", "--book"]


def few_methods():
    """Of each method's sliders the first, of RealEra's three."""
    return [one | {"sliders": one["sliders"][:1 + 2 * (one["id"] == "realera")]} for one in METHODS()]


@pytest.fixture(autouse=True)
def restore():
    yield
    use_book(None)


@pytest.fixture(scope="module")
def tiny(here, once, model):
    """A page of one class of a small book, with few sliders, one picture a prompt, one step."""
    def make(folder):
        (folder / "book.json").write_text(json.dumps(BOOK))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(explore, "methods", few_methods)
            patch.setattr(explore, "Model", lambda *args: model)
            here("course/explore.py", *FLAGS, "book.json", "--steps", 1, cwd=folder)
    return once("explore", make)


@pytest.fixture(scope="module")
def data(tiny):
    text = (tiny / "page.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_each_slider_has_four_steps_and_the_defaults_are_the_methods_own(monkeypatch):
    for method in explore.methods():
        assert len(explore.states(method)) == 1 + 3 * len(method["sliders"])
        for slider in method["sliders"]:
            assert len(slider["values"]) == len(slider["set"]) == 4
    monkeypatch.setattr(realera, "Settings", lambda: replace(SETTINGS, M=40, lambda2=0.5))
    sliders = {one["setting"]: one for one in explore.methods()[1]["sliders"]}
    assert sliders["M"]["values"] == ["0", "2", "40", "120"] and sliders["M"]["default"] == 2
    assert sliders["lambda2"]["set"][2] == "lambda2=5"


def test_the_page_holds_every_state_and_its_shares_are_those_of_the_method(tiny, data, text):
    use_book(tiny / "book.json")
    cat, s = data["classes"]["cat"], realera.Settings(M=5, lora_steps=0)
    keys = [key for method in data["methods"] for key in explore.states(method)]
    assert [*cat["states"]] == ["", *keys] and len(keys) == 18 and len(data["classes"]) == 1
    pair = make_pairs("cat", None, "object", text, "tail", 0)[0]
    delta = erase_in_closed_form([pair], text(preserved_prompts("object", [pair])), s)[0]
    rows = edited_rows([prompt_of(name) for _, name in cat["names"]], text)
    assert cat["states"]["realera/M/1"]["shares"] == [round(share(delta, pair, x), 3) for x in rows]


def test_nothing_is_loaded_from_a_network(tiny):
    text = (tiny / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) <= explore.MOST
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?http|@import|url\(|fetch\(|XMLHttpRequest""", text)
    assert "default-src 'none'" in text and "<!--" not in text.split("<body>")[1]


def test_a_second_run_draws_nothing_and_another_setting_does_not_use_it(tiny, here, tmp_path, monkeypatch):
    def no_maker(args):
        raise AssertionError("drawn again")
    shutil.copytree(tiny / "work", tmp_path / "work")
    monkeypatch.setattr(explore, "Maker", no_maker)
    monkeypatch.setattr(explore, "methods", few_methods)
    here("course/explore.py", *FLAGS, tiny / "book.json", "--steps", 1, cwd=tmp_path)
    assert (tmp_path / "page.html").read_bytes() == (tiny / "page.html").read_bytes()
    with pytest.raises(AssertionError, match="drawn again"):
        here("course/explore.py", *FLAGS, tiny / "book.json", "--steps", 2, cwd=tmp_path)


def test_bad_flags_are_one_line(refused, tmp_path):
    refused("course/explore.py", "--classes", "cat,unicorn", cwd=tmp_path, match="--classes unicorn")
    refused("course/explore.py", "--n", 0, cwd=tmp_path, match="--n must be at least 1")
    (tmp_path / "notes.html").write_text("precious")
    refused("course/explore.py", "--out", "notes.html", cwd=tmp_path, match="exists and is no page")
    assert (tmp_path / "notes.html").read_text() == "precious"


def test_pictures_stand_in_the_mosaic_in_their_order(tiny):
    with safe_open(next((tiny / "work").glob("*.safetensors")), "pt") as file:
        pictures, found = file.get_tensor("pictures"), json.loads(file.metadata()["found"])
    last = list(found["states"].values())[-1]
    assert len(pictures) == last["at"] + last["n"] * len(found["shown"]) and pictures.dtype == torch.uint8
    whole = explore.mosaic(pictures[:7], 3)
    side = pictures.shape[-2]
    assert whole.shape == (3 * side, 3 * side, 3)
    assert torch.equal(whole[side:2 * side, 2 * side:], pictures[5])
    assert (whole[2 * side:, side:] == 255).all()


def test_a_page_that_cannot_be_small_enough_says_so(tiny, monkeypatch):
    monkeypatch.setattr(explore, "MOST", 1000)
    files = {"cat": next((tiny / "work").glob("*.safetensors"))}
    with pytest.raises(explore.UserError, match="larger than 3 MiB"):
        explore.assemble(files, {"n": 1, "methods": []})


def test_the_canary_and_the_near_are_the_books_where_it_has_some(model, tmp_path):
    pair = make_pairs("cat", None, "object", model.text, "tail", 0)[0]
    write_plain_book(tmp_path / "book.json")
    use_book(tmp_path / "book.json")
    groups = {name: group for group, name in explore.watched(pair, model.text)}
    assert groups["dog"] == "canary" and "near" not in groups.values()
    use_book(None)
    names, entry = explore.watched(pair, model.text), book()["classes"]["cat"]
    shown = [group for group, _ in explore.drawn_of(names, pair, model.text)]
    groups = {name: group for group, name in names}
    assert {name for name in groups if groups[name] in ("canary", "near")} == {*entry["stay"]}
    assert groups[entry["far"]] == "far" and len(names) == len(groups)
    assert shown == ["concept", "synonym", "synonym", "phrase", "phrase", "canary", "far"]


def test_in_its_plane_the_anchor_is_right_of_the_concept_and_the_edit_moves_rows():
    rows = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            for n in (5, 3, 4, 6)]
    plane = explore.Plane(rows)
    (x, y), (x_star, y_star), *_ = plane.points(rows)
    assert x_star >= x and y_star >= y
    assert plane.points(rows, torch.zeros(4, 4, dtype=torch.float64)) == plane.points(rows)
    flat = torch.stack([e[:3].flatten() for e in rows])
    away = plane.points(rows, -torch.eye(4, dtype=torch.float64))             # all to 0
    assert torch.tensor(away).std(0).max() < 1e-6 and flat.shape == (4, 12)


# ---- in a browser ----

CHECK = """<script>
const problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));
console.error = (...words) => problems.push(words.join(" "));
</script>"""
PRESS = """<pre id="found"></pre><script>
addEventListener("load", async () => {
  const say = id => document.getElementById(id), found = {};
  const parts = ["summary", "pictures", "numbers", "shares", "map", "sliders"];
  const seen = () => Object.fromEntries(parts.map(id => [id, say(id).innerHTML]).concat([
    ["colours", [...document.querySelectorAll("canvas")].map(c => c.toDataURL()).join()],
    ["address", location.hash],
    ["values", [...document.querySelectorAll("#sliders input")].map(i => i.value).join()]]));
  const press = async (name, act, wait = 60) => {
    const before = seen();
    act();
    await new Promise(go => setTimeout(go, wait));
    const after = seen();
    found[name] = Object.keys(after).filter(part => after[part] !== before[part]);
  };
  await new Promise(go => setTimeout(go, 300));
  for (const radio of document.querySelectorAll("#methods input")) {
    if (!radio.checked) await press(`method ${radio.value}`, () => radio.click());
    for (const input of document.querySelectorAll("#sliders input")) {
      const other = input.value === input.min ? +input.min + 1 : input.min, id = input.id;
      await press(`${radio.value} ${id}`, () => {
        input.value = other;
        input.dispatchEvent(new Event("input"));
      });
      found[`${radio.value} ${id}`].push(`moved ${document.querySelectorAll(".moved").length}`);
    }
  }
  await press("class", () => {
    say("class").value = "dog";
    say("class").dispatchEvent(new Event("change"));
  });
  await press("reset", () => say("reset").click());
  await press("grow", () => { say("grow").value = 0; say("grow").dispatchEvent(new Event("input")); });
  await press("all", () => say("all").click());
  await press("play", () => say("play").click(), 600);
  const names = [...document.querySelectorAll("select, input, button")].filter(one =>
    !(one.labels && one.labels.length) && !one.textContent.trim());
  const canvases = [...document.querySelectorAll("canvas")], page = document.documentElement;
  say("found").textContent = JSON.stringify({found, problems, unnamed: names.length,
    overflow: page.scrollWidth - page.clientWidth, canvases: canvases.length,
    unlabelled: canvases.filter(c => !c.getAttribute("aria-label")).length,
    blank: canvases.filter(c => {
      const colours = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      return new Set(colours).size < 5;
    }).length});
});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("size", ["390,844", "1920,1080"])
def test_every_control_moves_what_it_should_and_nothing_goes_wrong(tiny, data, tmp_path, size):
    file = next((tiny / "work").glob("*.safetensors"))            # as two classes, to choose between
    text = explore.assemble({"cat": file, "dog": file}, {name: data[name] for name in (
        "model", "n", "steps", "guidance", "methods")})
    (tmp_path / "page.html").write_text(text.replace("<body>", f"<body>{CHECK}").replace(
        "</body>", f"{PRESS}</body>"), encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
                           f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
                           "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True,
                          encoding="utf-8", timeout=120)
    said = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    assert said, done.stderr[-2000:]
    said = json.loads(said[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert (said["problems"], said["unnamed"], said["unlabelled"], said["blank"]) == ([], 0, 0, 0)
    assert said["canvases"] == 10
    assert said["overflow"] <= 0                                  # nothing is wider than the screen
    found = {name: set(parts) for name, parts in said["found"].items()}
    for method in data["methods"]:
        for slider in method["sliders"]:
            assert found[f"{method['id']} slider-{slider['setting']}"] >= {
                "summary", "shares", "map", "address", "values", "moved 1"}, slider      # the others return
        assert method["id"] == "closed" or found[f"method {method['id']}"] >= {
            "summary", "shares", "map", "sliders", "colours", "address"}
    assert found["class"] >= {"summary", "pictures", "address"}
    assert found["reset"] >= {"summary", "numbers", "shares", "values", "address"}
    assert found["grow"] == {"map"} and found["all"] == {"map"} and found["play"] == {"map"}
