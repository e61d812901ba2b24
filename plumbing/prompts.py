"""The prompts that everything is made and measured with: templates, anchors, what must stay, groups."""
import re

from plumbing import UserError
from plumbing.book import all_of, book, nouns, other_sights, same_word

TASKS = {                       # prompt of a concept or anchor, and anchor if none is given (appendix A.2)
    "object": ("a photo of the {}", "sky"),
    "style": ("an artwork by {}", "an artist"),
    "celebrity": ("a portrait of {}", "a person"),
    "explicit": ("{}", "a person wearing clothes"),
}
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


def relatives(task: str, name: str) -> tuple[dict[str, str], str]:
    """Of a style or a person: the names that are measured, each with a prompt that means it in another way,
    and the anchor. The book's styles, if it is one of them, else the paper's five."""
    if task == "style" and name in (styles := [*book().get("styles", {}).values()]):
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


def prompt_of(name: str, task: str = "object") -> str:
    """A name in the task's template; a phrase, the book's or of four words or more, stands by itself."""
    known = any(name in all_of(entry, "associated") for entry in book()["classes"].values())
    return name if known or len(name.split()) > 3 else TASKS[task][0].format(name)


def preserved_prompts(task: str, pairs, words: str | list[str] = "nouns") -> list[str]:
    """"" (guidance's other half) first, the task's bare template, the preserved nouns less the pairs', in
    a template that no table draws. words: others, as `retained_words` takes them."""
    kept = (f"a picture of the {noun}" for noun in retained_words(words, pairs))
    return list(dict.fromkeys(["", TASKS[task][0].format("").strip(), *kept]))


def retained_words(words: str | list[str], pairs) -> list[str]:
    """"bird, Cat" -> ["bird", "cat"], without those in which a concept is named; "nouns", the preserved ones,
    or a list -> all but the pairs' own words. Raises UserError if nothing is left of what is given."""
    named = {word for pair in pairs for word in (pair.concept, pair.anchor)}
    words = nouns("preserved") if words == "nouns" else words
    given = [" ".join(word.lower().split()) for word in words.split(",")] if isinstance(words, str) else [
        word for word in words if not any(same_word(word, own) for own in named)]
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


def row_prompts(concept: str, task: str, seeds: range, erased=(),
                listed: list[dict] = ()) -> dict[str, list[tuple[str, str, int]]]:
    """(what should be seen, prompt, seed) by group: e, the concept; s, the others (without what the edit has
    `erased` beside it); g, synonyms; a, phrases. listed: rows of a CSV with a class each, in the place of
    other people or styles; those of the concept's class take the place of its own.

    Styles and celebrities follow the paper's appendix A.2: g is its one associated prompt, and others are
    drawn 5 times where the concept is drawn 200 times. Its list of others, MACE's 100 names, is not ours to
    ship: the four other names of its Table 2 stand in, or a CSV's. Of the book's styles g is a thing in that
    style, by name: it says less than the paper's.
    Raises UserError for a concept without prompts.
    """
    template, name = TASKS[task][0], concept.lower()
    known = book()["classes"] if task == "object" else relatives(task, name)[0]
    if name not in known:
        raise UserError(f"{concept!r} ({task}) has no built-in prompts"
                        + f" (there are {', '.join(known)})" * bool(known)
                        + ": eval_clip.py --prompts FILE.csv takes yours")
    few = seeds if task == "object" else seeds[:max(1, len(seeds) // 40)]
    rows = [(row["class"], row["prompt"], row["seed"]) for row in listed] or [
        (other, template.format(other), seed) for other in known if other != name for seed in few]
    others = [row for row in rows if row[0] not in {name, *map(str.lower, erased)}]
    if not others:
        raise UserError(f"no other {task} is left to compare {concept!r} with: eval_clip.py --prompts "
                        "FILE.csv takes yours")
    if task == "object":
        associated = known[name]["associated"]
        synonyms = [template.format(synonym) for synonym in known[name]["synonyms"]]
    else:
        associated, synonyms = [], [known[name]]
    own = [row for row in rows if row[0] == name]
    groups = {"e": own or [(name, template.format(name), seed) for seed in seeds], "s": others,
              "g": [(name, prompt, seed) for prompt in synonyms for seed in seeds],
              "a": [(name, prompt, seed) for prompt in associated for seed in seeds]}
    return {group: rows for group, rows in groups.items() if rows}


def names_to_choose(pairs, task: str = "object") -> list[str]:
    """What CLIP chooses among when an edit is looked at: classes, other things and scenes, or the task's
    names, concepts and anchors."""
    named = [name for pair in pairs for name in (pair.concept, pair.anchor) if name]
    known = [*book()["classes"], *other_sights()] if task == "object" else names_around(pairs, task)
    return list(dict.fromkeys([*known, *named]))


def choices(task: str, concept: str = "", listed: list[dict] = ()) -> tuple[list[str], list[str]]:
    """What CLIP chooses among: names, and prompts: first theirs, then those of anchors and other things.
    listed: as `row_prompts` takes them."""
    template, (known, anchor) = TASKS[task][0], relatives(task, concept)
    names = list(dict.fromkeys([concept, *(row["class"] for row in listed)])) if listed else [
        *(known or book()["classes"])]
    others = [anchor] if known else [template.format(x) for x in other_sights()]
    return names, [template.format(name) for name in names] + others
