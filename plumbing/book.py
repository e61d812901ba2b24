"""The book: by which names a model knows what, what stands for a picture, and what may not be meant."""
import difflib
import shlex
from pathlib import Path

from plumbing import UserError
from plumbing.disk import read_json

BOOK = Path(__file__).resolve().parents[1] / "mini" / "captions.json"    # classes, synonyms, phrases, scenes
CHOSEN = [BOOK]                 # the book in use: --book changes it
# What must stay, beside what it is checked on: the two lists share no word.
PRESERVED = ("bird cat deer dog frog horse ship truck automobile airplane house tree chair table apple river "
             "mountain guitar clock bottle bridge garden window book shoe cup lamp street grass sea").split()
UNRELATED = ("car vessel lorry feline canine equine stag amphibian avian person flower forest beach castle "
             "bus train elephant tiger sheep bread cake shirt hat piano violin computer sofa door moon "
             "bicycle").split()


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
        if not (len(classes) > 1 and nouns("preserved") and nouns("watched")
                and isinstance(book().get("styles", {}), dict)):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f'--book {path} needs {{"classes": {{"pizza": {{"anchor": "plate", "synonyms": ["margherita"], '
            '"associated": ["a slice in a box"]}, …}, "scenes": ["table", …]}: two classes or more, their '
            "names in lower case, a synonym or a phrase each; scenes may be []") from None


def book() -> dict:
    """{"classes": {name: {"anchor", "synonyms", "associated"}}, "scenes": […]}: mini's, or --book's."""
    return read_json(CHOSEN[0])


def drawn_things(known: dict) -> list[str]:
    """The own names of the things that a book says are drawn, each once; [] of a book without things."""
    return list(dict.fromkeys(thing["names"][0] for thing in known.get("things", {}).values()
                              if thing.get("drawn", True)))


def listed() -> str:
    """What the book holds, as text: a line per class, then the scenes, and what else it knows."""
    known = book()
    lines = [f"{name} → {entry['anchor']}: {', '.join([*entry['synonyms'], *entry['associated']])}"
             for name, entry in known["classes"].items()]
    phrases = [f"{name} ({', '.join(entry['associated'])})"
               for name, entry in known.get("characters", {}).items()]
    groups = {"scenes": known["scenes"], "things": sorted({*drawn_things(known)} - {*known["classes"]}),
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
    names = drawn_things(known) or [
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


def bystanders() -> list[str]:
    """Things that the book says are drawn and nothing is measured with, for methods that draw what must stay;
    of a book without things the preserved nouns."""
    measured = measured_words()
    return [name for name in drawn_things(book()) if not {*name.split()} & measured] or nouns("preserved")
