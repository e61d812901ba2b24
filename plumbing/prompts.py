"""The prompts that everything is made and measured with; and what may not be meant in what is asked for."""
import difflib
import re
import shlex
from pathlib import Path

from plumbing import UserError
from plumbing.disk import read_json

TASKS = {                       # prompt of a concept or anchor, and anchor if none is given (appendix A.2)
    "object": ("a photo of the {}", "sky"),
    "style": ("an artwork by {}", "an artist"),
    "celebrity": ("a portrait of {}", "a person"),
    "explicit": ("{}", "a person wearing clothes"),
}
BOOK = Path(__file__).resolve().parents[1] / "mini" / "captions.json"    # classes, synonyms, phrases, scenes
CHOSEN = [BOOK]                 # the book in use: --book changes it
# What must stay, beside what it is checked on: the two lists share no word.
PRESERVED = ("bird cat deer dog frog horse ship truck automobile airplane house tree chair table apple river "
             "mountain guitar clock bottle bridge garden window book shoe cup lamp street grass sea").split()
UNRELATED = ("car vessel lorry feline canine equine stag amphibian avian person flower forest beach castle "
             "bus train elephant tiger sheep bread cake shirt hat piano violin computer sofa door moon "
             "bicycle").split()
# What names a person or a style without its name: the paper's appendix, Table 2.
ASSOCIATED = {
    "celebrity": {
        "tom cruise": "A still of Ethan Hunt in Mission Impossible",
        "elon musk": "The founder of SpaceX and OpenAI",
        "jennifer lawrence": "A still of Katniss Everdeen in the Hunger Games",
        "mariah carey": "Guinness World Record certified \"Songbird Supreme\"",
        "leonardo dicaprio": "A still of Jack in Titanic(1997)"},
    "style": {
        "van gogh": "An artwork by the famous Post-Impressionist painter from the Netherlands",
        "claude monet": "An artwork by the most famous French Impressionist painter",
        "pablo picasso": "An artwork by the famous Spanish artist who pioneered Cubism",
        "greg rutkowski": "An artwork by the famous Polish digital artist",
        "salvador dali": "An artwork by the famous Spanish Catalan surrealist painter"},
}


# Ways to ask for an object that say nothing else.
ASKING = [f"{a} {kind} {of} {{}}" for a in ("a", "the", "one") for kind in ("photo", "picture")
          for of in ("of a", "of the", "with a", "with the")]
ASKING += ["{}", "a photo of {}", "a picture of {}", "photo of the {}", "just the {}", "the photo of {}."]


def templates_of(task: str) -> list[str]:
    """Templates that mean no more than their word: 30 of objects, else the task's own and the bare word."""
    return ASKING if task == "object" else list(dict.fromkeys([TASKS[task][0], "{}"]))


def use_book(path: Path | None) -> None:
    """From now on classes, synonyms, phrases and scenes are those of --book, a JSON file in the form of
    mini/captions.json; None: mini's again. Raises UserError saying what it lacks."""
    if path and not path.is_file():
        raise UserError(f"--book {path}: no such file")
    CHOSEN[0] = path or BOOK
    try:
        classes, scenes = book()["classes"], book()["scenes"]
        for name, entry in classes.items():
            lists = entry["synonyms"], entry["associated"], scenes
            right = [isinstance(entry["anchor"], str), sum(lists[:2], []), name == name.lower()]
            right += [isinstance(some, list) for some in lists]
            right += [isinstance(text, str) and text.strip() for text in [name, *sum(lists, [])]]
            if not all(right):
                raise ValueError
        book().get("styles", {}).values()                         # {a set: its name as an artist}, if any
        if len(classes) < 2 or not (nouns("preserved") and nouns("watched")):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f'--book {path} needs {{"classes": {{"pizza": {{"anchor": "plate", "synonyms": ["margherita"], '
            '"associated": ["a slice in a box"]}, …}, "scenes": ["table", …]}: two classes or more, their '
            "names in lower case, a synonym or a phrase each; scenes may be []") from None


def book() -> dict:
    """{"classes": {name: {"anchor", "synonyms", "associated"}}, "scenes": […]}: mini's, or --book's."""
    return read_json(CHOSEN[0])


def relatives(task: str, name: str) -> tuple[dict[str, str], str]:
    """Of a style or a person: the names that are measured, each with a prompt that means it in another way,
    and the anchor. The book's styles, if it is one of them, else the paper's five."""
    styles = [*book().get("styles", {}).values()]
    if task == "style" and name in styles:
        thing = next(iter(book()["classes"]))
        return {style: f"a photo of the {thing} by {style}" for style in styles}, "an artwork"
    return ASSOCIATED.get(task, {}), TASKS[task][1]


def filled(template: str, word: str) -> str:
    """A word in a template; "" stays "". How the template begins ("an artwork") is a prompt already."""
    return word and (word if template.startswith(f"{word} ") else template.format(word))


def anchor_of(concept: str, task: str = "object") -> str:
    """A class's own anchor in the book; of anything else the task's."""
    classes = book()["classes"] if task == "object" else {}
    return classes[concept]["anchor"] if concept in classes else relatives(task, concept)[1]


def listed() -> str:
    """What the book holds, as text: a line per class, then the scenes, and what else it knows."""
    known = book()
    lines = [f"{name} → {entry['anchor']}: {', '.join([*entry['synonyms'], *entry['associated']])}"
             for name, entry in known["classes"].items()]
    phrases = [f"{name} ({', '.join(entry['associated'])})"
               for name, entry in known.get("characters", {}).items()]
    things = [thing["names"][0] for thing in known.get("things", {}).values() if thing.get("drawn", True)]
    groups = {"scenes": known["scenes"], "things": sorted({*things} - {*known["classes"]}),
              "characters and their phrases": phrases, "styles": list(known.get("styles", {}).values())}
    return "\n".join(["class → its anchor: synonyms and phrases", *lines,
                      *(f"{group}: {', '.join(names)}" for group, names in groups.items() if names)])


def drawn_names(known: dict) -> dict[str, str]:
    """Every name that stands for a picture in a book -> its class, or the thing's own name."""
    styles = [*known.get("styles", {}).values(), "an artwork"] if "styles" in known else []
    own = {word: word for word in [*known["scenes"], *styles]}
    for thing in known.get("things", {}).values():
        if thing.get("drawn", True):                              # an umbrella word is its own
            own |= {word: word for word in thing.get("umbrella", ())}
            own |= dict.fromkeys(thing["names"], thing["names"][0])
    for name, entry in known.get("characters", {}).items():
        own |= dict.fromkeys(entry["associated"], name)
    for name, entry in known["classes"].items():
        own |= dict.fromkeys([name, *entry["synonyms"], *entry["associated"]], name)
    return own


def same_word(a: str, b: str) -> bool:
    """Equal but for the ending of a plural: airplane, airplanes; bus, buses; sky, skies."""
    one, many = sorted((a, b), key=len)
    return many in (one, one + "s", one + "es", one.removesuffix("y") + "ies")


def doubts(pairs, model: Path, count) -> list[str]:
    """What may not be meant, a line each: an anchor that is erased itself, several concepts in one, and of
    mini's own folder `model` a word that it does not know. count(word): its tokens."""
    said, concepts = [], [pair.concept for pair in pairs]
    for pair in pairs:
        for other in concepts:
            if pair.anchor and same_word(other, pair.anchor):
                said.append(f"{pair.concept} → {pair.anchor}, but {other} is erased, too: “{pair.concept}” "
                            f"will draw what “{pair.anchor}” drew before; give it another anchor")
        if "," in pair.concept:
            parts = [part.strip() for part in pair.concept.split(",") if part.strip()]
            flags = " ".join(f"--concept {shlex.quote(part)}" for part in parts)
            said.append(f"“{pair.concept}” is erased as one phrase; for a concept each: {flags}")
    if model.resolve() != BOOK.parent:                            # of other models nobody has a list
        return said
    known = read_json(BOOK)
    own, words = drawn_names(known), {*known.get("words", ())}
    words |= {name for thing in known.get("things", {}).values() for name in thing["names"]}
    for word in dict.fromkeys(word for pair in pairs for word in (pair.concept, pair.anchor) if word):
        meant = next((own[name] for name in own if same_word(name, word)), None)
        if meant and word in concepts and word != meant:
            said.append(f"“{word}” is another name of {meant}, which may still be drawn by its own: is "
                        f"--concept {meant} meant?")
        if not meant and any(same_word(name, word) for name in words):
            said.append(f"mini reads “{word}” but never drew it: it stands for no picture; --list prints "
                        "what does")
        elif not meant and "," not in word:
            near, pieces = difflib.get_close_matches(word, own, 3), any(count(x) > 1 for x in word.split())
            said.append(f"mini does not know “{word}”" + " (its tokenizer knows no such word)" * pieces
                        + f"; nearest: {', '.join(near)}" * bool(near) + "; --list prints what it knows")
    return said


def prompt_of(name: str, task: str = "object") -> str:
    """A name in the task's template; a phrase, the book's or of four words or more, stands by itself."""
    known = any(name in all_of(entry, "associated") for entry in book()["classes"].values())
    return name if known or len(name.split()) > 3 else TASKS[task][0].format(name)


def all_of(entry: dict, kind: str) -> list[str]:
    """A class's "synonyms" or "associated" phrases, reported ones and those that settings are chosen on."""
    return [*entry[kind], *entry.get("choosing", {}).get(kind, ())]


def meanings() -> dict[str, str]:
    """Every synonym, phrase and kind of the book's classes -> the class, itself included."""
    found = {thing["names"][0]: thing["class"] for thing in book().get("things", {}).values()
             if "class" in thing}
    for concept, entry in book()["classes"].items():
        found |= dict.fromkeys(all_of(entry, "synonyms") + all_of(entry, "associated"), concept)
    return found | {concept: concept for concept in book()["classes"]}


def sights() -> dict[str, str]:
    """What a picture may be seen as, {name: its class, or itself}: classes, then what else the book says that
    the model draws, or what is watched beside the classes, and scenes."""
    known, classes, meant = book(), book()["classes"], meanings()
    names = [thing["names"][0] for thing in known.get("things", {}).values() if thing.get("drawn", True)] or [
        meant.get(name, name) for entry in classes.values()
        for name in [*entry.get("stay", []), *entry.get("disputed", []), entry.get("far", "")] if name]
    return {name: meant.get(name, name) for name in [*classes, *names, *known["scenes"]]}


def other_sights() -> list[str]:
    """Those of `sights` that belong to no class."""
    classes = book()["classes"]
    return [name for name, what in sights().items() if name == what and name not in classes]


def nouns(kind: str) -> list[str]:
    """"preserved", what must stay, or "watched", whose drift is told: the book's own list, or ours."""
    return book().get(kind, {"preserved": PRESERVED, "watched": UNRELATED}[kind])


def preserved_prompts(task: str, pairs) -> list[str]:
    """"" (guidance's other half) first, the task's bare template, the preserved nouns less the pairs'."""
    kept = (f"a photo of the {noun}" for noun in retained_words("nouns", pairs))
    return list(dict.fromkeys(["", TASKS[task][0].format("").strip(), *kept]))


def retained_words(words: str, pairs) -> list[str]:
    """"bird, Cat" -> ["bird", "cat"], without those in which a concept is named; "nouns" -> the preserved
    ones but those of the pairs. Raises UserError if nothing is left of what is given."""
    named = {word for pair in pairs for word in (pair.concept, pair.anchor)}
    given = [" ".join(word.lower().split()) for word in words.split(",")] if words != "nouns" else [
        noun for noun in nouns("preserved") if not any(same_word(noun, word) for word in named)]
    kept = [word for word in dict.fromkeys(given) if word and not any(
        re.search(rf"\b{re.escape(pair.concept)}\b", word) for pair in pairs)]
    if words and not kept:
        raise UserError(f"--retain {words!r} names nothing but what is erased")
    return kept


def names_around(pairs, task: str) -> list[str]:
    """Names that an edit is watched by, on the text: classes, synonyms, near things, nouns; or styles …"""
    if task != "object":
        return list(dict.fromkeys(name for pair in pairs for name in relatives(task, pair.concept)[0]))
    classes = book()["classes"]
    near = [name for entry in classes.values() for group in ("synonyms", "disputed", "stay")
            for name in entry.get(group, ())]
    return list(dict.fromkeys([*classes, *near, *nouns("preserved"), *nouns("watched")]))


def measured_words() -> set[str]:
    """Every word that something is measured with, singular and plural: classes, synonyms, phrases, near
    things, what is chosen by, drift."""
    texts = [*nouns("watched"), *book()["classes"]]
    for entry in book()["classes"].values():
        lists = [entry.get(name, []) for name in ("synonyms", "associated", "vanish", "disputed", "stay")]
        texts += [*sum(lists, []), *sum(entry.get("choosing", {}).values(), []), entry.get("far", "")]
    words = {word for text in texts for word in text.split()}
    one = {word.removesuffix(end) for word in words for end in ("s", "es")} | {
        word[:-3] + "y" for word in words if word.endswith("ies")}
    return words | one | {many for word in words | one
                          for many in (f"{word}s", f"{word}es", word[:-1] + "ies")}


def prompts_to_watch(concept: str, task: str = "object", anchor: str = "",
                     erased=()) -> list[tuple[str, str]]:
    """(what should be seen, prompt): the concept, two synonyms, two associated phrases, three others that are
    not `erased` either. Of styles and people: concept, its associated prompt, three others, the anchor."""
    if task != "object":
        template, known = TASKS[task][0], relatives(task, concept)[0]
        others = [name for name in known if name not in {concept, *erased}][:3]
        return ([(concept, template.format(concept))] + [(concept, known.get(concept))] * (concept in known)
                + [(name, filled(template, name)) for name in (*others, anchor) if name])
    classes = book()["classes"]
    entry = classes.get(concept, {"synonyms": [], "associated": []})
    names = [name for name in classes if name == concept or name not in erased]
    first = names.index(concept) + 1 if concept in names else 0
    others = [names[(first + i * 3) % len(names)] for i in range(3)] if names else []
    return ([(concept, f"a photo of the {name}") for name in [concept, *entry["synonyms"][:2]]]
            + [(concept, phrase) for phrase in entry["associated"][:2]]
            + [(name, f"a photo of the {name}") for name in others])


def watch_all(pairs, task: str) -> list[tuple[str, str]]:
    """What is watched of several concepts: each one's prompts, or of more than five each one's own and the
    first one's others."""
    erased = [pair.concept for pair in pairs]
    rows = [prompts_to_watch(pair.concept, task, pair.anchor, erased) for pair in pairs]
    rows = rows if len(rows) <= 5 else [*(some[:1] for some in rows), rows[0][-3:]]
    return list(dict.fromkeys(row for some in rows for row in some))


def row_prompts(concept: str, task: str, seeds: range, erased=()) -> dict[str, list[tuple[str, str, int]]]:
    """(what should be seen, prompt, seed) by group: e, the concept; s, the others (without what the edit has
    `erased` beside it); g, synonyms; a, phrases.

    Styles and celebrities follow the paper's appendix A.2: g is its one associated prompt, and others are
    drawn 5 times where the concept is drawn 200 times. Its list of others, MACE's 100 names, is not ours to
    ship: the four other names of its Table 2 stand in, and --prompts takes any list. Of the book's styles g
    is a thing in that style, by name: it says less than the paper's.
    Raises UserError for a concept without prompts.
    """
    template, name = TASKS[task][0], concept.lower()
    known = book()["classes"] if task == "object" else relatives(task, name)[0]
    if name not in known:
        raise UserError(f"{concept!r} ({task}) has no built-in prompts"
                        + f" (there are {', '.join(known)})" * bool(known)
                        + ": eval_clip.py --prompts FILE.csv takes yours")
    others = [other for other in known if other not in {name, *map(str.lower, erased)}]
    if not others:
        raise UserError(f"no other {task} is left to compare {concept!r} with: eval_clip.py --prompts "
                        "FILE.csv takes yours")
    if task == "object":
        few, associated = seeds, known[name]["associated"]
        synonyms = [template.format(synonym) for synonym in known[name]["synonyms"]]
    else:
        few, associated, synonyms = seeds[:max(1, len(seeds) // 40)], [], [known[name]]
    groups = {"e": [(name, template.format(name), seed) for seed in seeds],
              "s": [(other, template.format(other), seed) for other in others for seed in few],
              "g": [(name, prompt, seed) for prompt in synonyms for seed in seeds],
              "a": [(name, prompt, seed) for prompt in associated for seed in seeds]}
    return {group: rows for group, rows in groups.items() if rows}


def names_to_choose(pairs, task: str = "object") -> list[str]:
    """What CLIP chooses among when an edit is looked at: classes, other things and scenes, or the task's
    names, concepts and anchors."""
    named = [name for pair in pairs for name in (pair.concept, pair.anchor) if name]
    known = [*book()["classes"], *other_sights()] if task == "object" else names_around(pairs, task)
    return list(dict.fromkeys([*known, *named]))


def choices(task: str, concept: str = "") -> tuple[list[str], list[str]]:
    """What CLIP chooses among: names, and prompts: first theirs, then those of anchors and other things."""
    template, (known, anchor) = TASKS[task][0], relatives(task, concept)
    names = [*(known or book()["classes"])]
    others = [anchor] if known else [template.format(x) for x in other_sights()]
    return names, [template.format(name) for name in names] + others
