"""What is measured on: groups of a row, and what must stay, apart."""
from types import SimpleNamespace

import pytest

from erasing import make_pairs
from helpers import CLASSES, MINI, write_plain_book
from plumbing import UserError, prompts
from plumbing.book import BOOK, PRESERVED, UNRELATED, bystanders, measured_words, nouns, same_word, use_book
from plumbing.disk import read_json
from plumbing.prompts import (ASSOCIATED, anchor_of, choices, names_around, names_to_choose,
                              preserved_prompts, prompts_to_watch, row_prompts)
from sample import Text


def test_what_is_preserved_and_what_drift_is_measured_on_are_apart():
    assert len(set(PRESERVED)) == len(set(UNRELATED)) == 30 and not set(PRESERVED) & set(UNRELATED)
    assert not set(nouns("preserved")) & set(nouns("watched"))
    pairs = make_pairs(["airplane"], ["grass"], "object", Text(MINI), "tail", 0)
    prompts = preserved_prompts("object", pairs)
    assert prompts[:2] == ["", "a photo of the"]
    assert len(prompts) == 2 + len({*nouns("preserved")} - {"airplane", "grass"})
    assert not {"a picture of the airplane", "a picture of the grass"} & set(prompts)


def test_what_must_stay_leaves_out_plurals_of_what_is_erased(text):
    pairs = make_pairs(["Airplanes", "bridges"], ["sky", "grass"], "object", text, "tail", 0)
    kept = preserved_prompts("object", pairs)
    assert not {f"a picture of the {noun}" for noun in ("airplane", "bridge", "grass")} & set(kept)
    assert len(kept) == 2 + len({*nouns("preserved")} - {"airplane", "bridge", "grass"})
    others = preserved_prompts("object", pairs, ["airplane", "pizza", "grass", "sky"])
    assert others[2:] == ["a picture of the pizza"]               # of another list, too
    for a, b, same in (("bus", "buses", True), ("sky", "skies", True), ("house", "houses", True),
                       ("cat", "car", False), ("sea", "seal", False), ("lamp", "lamp", True)):
        assert same_word(a, b) == same_word(b, a) == same


def test_prompts_to_watch_follow_the_task_and_the_anchor():
    style = prompts_to_watch("van gogh", "style", "art")
    assert style[:2] == [("van gogh", "an artwork by van gogh"),
                         ("van gogh", ASSOCIATED["style"]["van gogh"])]
    assert style[2:] == [(name, f"an artwork by {name}")
                         for name in ("claude monet", "pablo picasso", "greg rutkowski", "art")]
    person = prompts_to_watch("grace hopper", "celebrity", "a person", ["grace hopper", "tom cruise"])
    assert [name for name, _ in person] == ["grace hopper", "elon musk", "jennifer lawrence", "mariah carey",
                                            "a person"]
    assert prompts_to_watch("nudity", "explicit", "clothes") == [("nudity", "nudity"), ("clothes", "clothes")]
    pairs = [SimpleNamespace(concept="van gogh", anchor="art")]
    names = names_to_choose(pairs, "style")
    assert {name for name, _ in style} <= set(names) and not set(names) & set(CLASSES)
    pairs = [SimpleNamespace(concept=name, anchor="sky") for name in CLASSES[:6]]
    objects = prompts.watch_all(pairs, "object")
    assert [name for name, _ in objects[:6]] == CLASSES[:6]
    assert not {name for name, _ in objects[6:]} & set(CLASSES[:6])


def test_groups_of_a_row_are_the_papers():
    groups, entry = row_prompts("ship", "object", range(3, 5)), read_json(BOOK)["classes"]["ship"]
    assert groups["e"] == [("ship", "a photo of the ship", 3), ("ship", "a photo of the ship", 4)]
    assert groups["s"] == [(name, f"a photo of the {name}", seed) for name in CLASSES if name != "ship"
                           for seed in (3, 4)]
    assert groups["g"] == [("ship", f"a photo of the {name}", seed) for name in entry["synonyms"]
                           for seed in (3, 4)]
    assert groups["a"] == [("ship", phrase, seed) for phrase in entry["associated"] for seed in (3, 4)]
    with pytest.raises(UserError, match="teapot.*--prompts"):
        row_prompts("teapot", "object", range(1))
    with pytest.raises(UserError, match="explicit.*--prompts"):
        row_prompts("nudity", "explicit", range(1))


def test_a_csv_says_who_must_stay():
    listed = [{"class": name, "prompt": f"{name} smiling", "seed": seed}
              for name, seed in (("ada lovelace", 7), ("elon musk", 8), ("alan turing", 9))]
    groups = row_prompts("Elon Musk", "celebrity", range(2), ["Alan Turing"], listed)
    assert groups["s"] == [("ada lovelace", "ada lovelace smiling", 7)]
    assert groups["e"] == [("elon musk", "elon musk smiling", 8)] and len(groups["g"]) == 2
    assert row_prompts("tom cruise", "celebrity", range(2), (), listed)["e"][1] == (
        "tom cruise", "a portrait of tom cruise", 1)
    names, texts = choices("celebrity", "tom cruise", listed)
    assert names == ["tom cruise", "ada lovelace", "elon musk", "alan turing"]
    assert texts == [*(f"a portrait of {name}" for name in names), "a person"]


def test_artists_and_celebrities_have_the_appendix_prompts_and_counts():
    """200 pictures of the erased one and of its associated prompt, 5 of each that is kept."""
    for task, name, prompt, other in (("celebrity", "Elon Musk", "a portrait of elon musk", "tom cruise"),
                                      ("style", "Van Gogh", "an artwork by van gogh", "claude monet")):
        groups = row_prompts(name, task, range(200))
        assert {group: len(rows) for group, rows in groups.items()} == {"e": 200, "s": 4 * 5, "g": 200}
        assert groups["e"][199] == (name.lower(), prompt, 199)
        assert groups["g"][0][0] == name.lower() and name.lower() not in groups["g"][0][1].lower()
        others = {row[0] for row in groups["s"]}
        assert other in others and name.lower() not in others
        with pytest.raises(UserError, match=f"banksy.*{other}"):
            row_prompts("banksy", task, range(1))


def test_bystanders_are_drawn_and_measured_by_nobody(tmp_path):
    drawn = {thing["names"][0] for thing in read_json(BOOK)["things"].values() if thing.get("drawn", True)}
    found = bystanders()
    assert len(found) > 100 and {*found} < drawn and "apple" in found
    assert not {"cat", "dog", "tiger", "helicopter", "truck"} & {*found}         # class, stay, disputed, far
    write_plain_book(tmp_path / "book.json")
    try:
        use_book(tmp_path / "book.json")
        assert bystanders() == nouns("preserved") == PRESERVED
    finally:
        use_book(None)


def test_a_style_of_the_book_stands_among_the_books_and_its_anchor_is_no_style(text):
    pair, = make_pairs(["Twemoji"], None, "style", text, "tail", 0)
    assert (pair.anchor, pair.prompt, pair.prompt_star) == (
        "an artwork", "an artwork by twemoji", "an artwork")
    groups = row_prompts("Twemoji", "style", range(40))
    assert {group: len(rows) for group, rows in groups.items()} == {"e": 40, "s": 6, "g": 40}
    assert groups["e"][0] == ("twemoji", "an artwork by twemoji", 0)
    assert groups["g"][0] == ("twemoji", "a photo of the airplane by twemoji", 0)
    assert {prompt for _, prompt, _ in groups["s"]} == {
        f"an artwork by {name}" for name in read_json(BOOK)["styles"].values()
        if name != "twemoji"}
    names, asked = prompts.choices("style", "twemoji")
    assert len(names) == 7 and asked[7:] == ["an artwork"] and names_around([pair], "style") == names
    watched = prompts_to_watch("twemoji", "style", "an artwork")
    assert watched[:2] == [groups["e"][0][:2], groups["g"][0][:2]] and watched[-1] == ("an artwork",) * 2
    assert anchor_of("van gogh", "style") == "an artist"


def test_nothing_to_compare_with_is_one_line():
    """An edit that erases all of what has built-in prompts."""
    for task in ("celebrity", "object"):
        names = list(ASSOCIATED.get(task) or read_json(BOOK)["classes"])
        with pytest.raises(UserError, match=f"no other {task} is left"):
            row_prompts(names[0], task, range(1), [name.title() for name in names])
        assert row_prompts(names[0], task, range(1), names[2:])["s"][0][0] == names[1]


def test_measured_words_are_single_words_in_singular_and_plural():
    words = measured_words()
    assert {"cat", "cats", "kitty", "kitties", "antonov", "runway", nouns("watched")[0]} <= words
    assert not any(" " in word for word in words)
