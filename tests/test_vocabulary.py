"""Neighbors read from the tokenizer's words: what goes, what stays, the file, and the solve a second way."""
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines import vocabulary as module
from baselines.vocabulary import (Settings, Vocabulary, around, cosines, erase_with_words, gram_of,
                                  make_vocabulary, vocabulary_of, whole_words)
from erasing import make_pairs
from helpers import AIRPLANE, MINI, pair
from plumbing import UserError
from plumbing.book import measured_words
from sample import Text

S = Settings()


@pytest.fixture(scope="module")
def text():
    return Text(MINI)


@pytest.fixture(scope="module")
def vocabulary(text):
    """Every fifth word, and some that the tests name."""
    some = "cat dog ship guitar sky kitty kitten puppy tabby".split()
    some = sorted({*some, *whole_words(text.tokenizer)[::5]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "whole_words", lambda tokenizer: some)
        return make_vocabulary(text, "object")


@pytest.fixture(scope="module")
def cat(text):
    return make_pairs("cat", "ground", "object", text, "tail", 0)[0]


def test_words_are_whole_and_one_token_each(text):
    words = whole_words(text.tokenizer)
    assert {"airplane", "sky", "guitar"} <= {*words} and len(words) > 3_000 and words == sorted(words)
    assert all(word.isalpha() and text.tokenizer.count(word) == 1 for word in words)


def test_rows_are_those_of_whole_prompts_and_the_ends_row_stands_for_all_after_it(text, vocabulary):
    """Cut after the end of text, the encoder gives the same rows; later ones are near copies of the end's."""
    names = ["cat", "guitar", "sky"]
    for name, e in zip(names, text([f"a photo of the {name}" for name in names]).double()):
        row = vocabulary.rows[vocabulary.words.index(name)].double()
        assert torch.allclose(row, e[5:7], rtol=2e-3, atol=2e-3)                     # half precision
        copies = torch.cosine_similarity(e[6:], e[6:7])
        assert copies.min() > 0.97
    assert vocabulary.times == len(e) - 6


def test_the_cosine_is_that_of_the_edited_rows_but_for_the_copies(text, vocabulary, cat):
    names = ["dog", "kitty", "guitar", "ship"]
    found = cosines(cat, vocabulary.rows)
    for name in names:
        rows = text(f"a photo of the {name}")[0].double()[5:]
        whole = torch.cosine_similarity(rows.flatten(), cat.block().flatten(), dim=0)
        assert found[vocabulary.words.index(name)].item() == pytest.approx(whole.item(), abs=0.02)
    assert found[vocabulary.words.index("cat")] > 0.999


def test_what_goes_and_what_comes_next_are_the_nearest_words_and_no_named_one(vocabulary, cat):
    found = dict(zip(vocabulary.words, cosines(cat, vocabulary.rows).tolist()))
    order = sorted(found, key=found.get, reverse=True)
    s = Settings(threshold=(found[order[4]] + found[order[5]]) / 2, contrast=3)
    goes, nearest = around(cat, vocabulary, s, {order[1]})
    assert [*goes] == [order[0], *order[2:5]] and [*nearest] == order[5:8]
    assert goes[order[2]] == pytest.approx(found[order[2]], abs=1e-3)


def test_also_goes_with_each_of_several_concepts_of_different_length(vocabulary, cat, text):
    engine = make_pairs("fire engine", "street", "object", text, "tail", 0)[0]
    also, stay = [text("a photo of the tabby")[0].double()[5:]], text("")[0].double()
    assert engine.n < cat.n == len(also[0])
    s = Settings(threshold=0.8, contrast=5)
    both, _ = erase_with_words([cat, engine], vocabulary, stay, s, also)
    assert both.isfinite().all()
    whole, cut = (erase_with_words([engine], vocabulary, stay, s, [x])[0]
                  for x in (also[0], also[0][:engine.n]))
    assert torch.equal(whole, cut)


def test_the_solve_equals_one_with_every_row_written_out_without_the_words_taken_out(vocabulary, cat, text):
    also, named, stay = [text("a photo of the tabby")[0].double()[5:]], {"dog", "tabby"}, text("")[0].double()
    s = Settings(threshold=0.8, contrast=5, mu=0.4, lambda1=3.0, reach=2.0)
    delta, found = erase_with_words([cat], vocabulary, stay, s, also, named)
    goes, nearest = found["cat → ground"]
    assert goes and len(nearest) == 5 and not {*goes, *nearest} & {"cat", "ground", "dog", "tabby"}

    rows = dict(zip(vocabulary.words, vocabulary.rows.double()))
    B, C = torch.zeros_like(delta), torch.zeros_like(delta)

    def add(x, x_star):
        B.add_(torch.outer(x, x)), C.add_(2.0 * torch.outer(x, x_star - x))

    for x, x_star in [*zip(cat.block(), cat.block_star()), *zip(also[0], cat.block_star())]:
        add(x, x_star)
    for word in goes:
        for x, x_star in [(rows[word][0], cat.block_star()[0])] + (
                [(rows[word][1], cat.block_star()[1:].mean(0))] * (cat.n - 1)):
            add(x, x_star)
    for word in nearest:
        for x in [rows[word][0]] + [rows[word][1]] * vocabulary.times:
            B += 0.4 * torch.outer(x, x)
    P = [word for word in rows if word not in {*goes, "cat", "dog", "tabby"}]        # built from scratch
    B += 3.0 * (gram_of(torch.stack([rows[word] for word in P]), vocabulary.times) / len(P) + stay.T @ stay)
    B += 0.01 * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype)
    assert torch.allclose(delta, torch.linalg.solve(B, C).T, rtol=1e-8, atol=1e-10)


def test_neighbors_that_stay_stay_and_without_contrast_they_go_along(vocabulary, cat, text):
    def share(name, s):
        e = text(f"a photo of the {name}")[0].double()[5:]
        way = (cat.block_star() - cat.block())
        delta = erase_with_words([cat], vocabulary, text("")[0].double(), s, named={"kitty"})[0]
        return ((e @ delta.T * way).sum() / way.square().sum()).item()

    kept, plain = Settings(reach=1.0, mu=1.0), Settings(reach=1.0, contrast=0)
    assert share("cat", kept) > 0.85 and share("kitty", kept) > 0.5
    assert abs(share("dog", kept)) < 0.1 < 0.2 < share("dog", plain)


def test_the_file_gives_the_same_bytes_and_refuses_another_encoder_and_task(text, vocabulary, tmp_path, cat,
                                                                            monkeypatch):
    monkeypatch.setattr(module, "whole_words", lambda tokenizer: vocabulary.words)
    path = tmp_path / "v/words.safetensors"
    made, read = (vocabulary_of(path, text, MINI, "object") for _ in range(2))
    assert made.words == read.words == vocabulary.words and torch.equal(made.gram, read.gram)
    assert torch.equal(made.rows, read.rows) and made.times == read.times
    one, two = (erase_with_words([cat], v, text("")[0].double(), S)[0] for v in (made, read))
    assert torch.equal(one, two)
    with pytest.raises(UserError, match="task style"):
        vocabulary_of(path, text, MINI, "style")
    save_file(load_file(path), path, {"about": json.dumps({"text_hash": "another"})})
    with pytest.raises(UserError, match="another --vocabulary, or delete it"):
        vocabulary_of(path, text, MINI, "object")
    path.write_bytes(b"no file of tensors")
    with pytest.raises(UserError):
        vocabulary_of(path, text, MINI, "object")


def test_the_command_says_what_goes_and_takes_the_users_words(here, refused, tmp_path, capsys):
    here("baselines/vocabulary.py", *AIRPLANE, "--no-pictures", "--also", "Boeing 747 on the runway",
         "--keep", "bird", "--set", "measured=false", cwd=tmp_path)
    report = json.loads((tmp_path / "out/airplane-vocabulary/run.json").read_text())
    assert report["also"] == ["boeing 747 on the runway"] and report["keep"] == ["bird"]
    near = {*report["goes"]["airplane → sky"], *report["near and kept"]["airplane → sky"]}
    assert len(report["near and kept"]["airplane → sky"]) == 50 and not near & measured_words()
    assert "airplane → sky: with it" in capsys.readouterr().out
    [file] = (tmp_path / "out/vocabulary").iterdir()
    assert re.fullmatch(r"mini-object-[0-9a-f]{10}\.safetensors", file.name)
    refused("baselines/vocabulary.py", *AIRPLANE, "--set", "threshold=2", cwd=tmp_path,
            match="a threshold from -1 to 1")
    with pytest.raises(SystemExit):
        here("baselines/vocabulary.py", "--concept", "fluent", "--task", "style", "--vocabulary", file,
             cwd=tmp_path)
    said = capsys.readouterr().err
    assert "warning: a reach above 1 ruins" in said and "of the task style" in said


def test_words_are_summed_in_one_order_whatever_the_order_of_a_set(vocabulary, cat, text, monkeypatch):
    """Sets have another order in each process, and sums of another order other bits."""
    summed = []
    monkeypatch.setattr(module, "gram_of", lambda rows, times: summed.append(rows) or gram_of(rows, times))
    named = {*vocabulary.words[::20]}
    found = erase_with_words([cat], vocabulary, text("")[0].double(), S, named=named)[1]["cat → ground"]
    out = {*named, "cat", *found[0]} & {*vocabulary.words}
    for rows, words in zip(summed, (out, found[1]), strict=True):
        assert torch.equal(rows, vocabulary.rows[[i for i, w in enumerate(vocabulary.words) if w in words]])


def test_a_word_that_goes_with_one_concept_is_not_kept_for_another():
    torch.manual_seed(0)
    rows = torch.randn(6, 2, 8).half()
    v = Vocabulary(list("abcdef"), rows, 3, gram_of(rows, 3))
    pairs = []
    for name, base in (("x", 0), ("y", 3)):
        p = pair(name, T=6, D=8, n=4)
        p.e[2:] = torch.cat([rows[base, :1], rows[base, 1:].expand(3, -1)]).double()
        pairs.append(p)
    s = Settings(threshold=0.99, contrast=5)
    delta, found = erase_with_words(pairs, v, torch.zeros(1, 8).double(), s)
    assert [*found["x → sky"][0]] == ["a"] and "a" in found["y → sky"][1]            # near y, goes with x
    assert torch.isfinite(delta).all()
