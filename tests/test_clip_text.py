"""Tokenizer and text encoder against transformers': ids of hard strings, rows of each layer."""
import gzip
import importlib
import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from clip_text import BOS, EOS, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from helpers import (MERGES, OFFICIAL_TEXT, OFFICIAL_TEXT_21, TEXTS, edit_json, edit_tensors, merge, near,
                     norms, reference, same_at_full_size, shapes, symbols, theirs_text, write_padding,
                     write_vocabulary)
from plumbing import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("tokenizer"))


# ---- hard strings ----

STRINGS = [
    # nothing, and kinds of space
    "", " ", "  ", "\n", "\t", "\r\n", " \t\n ", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028\u2029",
    "\x85", "a  photo", " a photo ", "a\nphoto", "a\tphoto", "a\r\nphoto", "a\u00a0photo", "a\u3000photo",
    "a\u200bphoto",
    # too long
    "a photo of a cat " * 20, "cat " * 75, "cat " * 76, "cat " * 77, "x" * 300, "é" * 100, "日本" * 60,
    "1234567890" * 9, "!" * 200, "antidisestablishmentarianism" * 5, "a" * 2000,
    # words, case, contractions, digits, signs
    "a photo of a cat", "A PHOTO OF A CAT", "An Oil Painting by Vincent van Gogh", "don't", "DON'T",
    "they've we'll", "it's i'm you'd we're", "'s", "''s", "'t'll", "rock'n'roll", "don\u2019t", "'S 'LL",
    "o'clock", "1984", "3.14159", "8k", "4k,uhd", "x2y3", "1/2 ½ ²", "Ⅳ ⅷ", "٣٤٥", "१२३", "a,b;c:d", "wow!!!",
    "???!?!", "...", "…", "#hashtag", "@name", "foo_bar", "snake_case_word", "CamelCase", "hyphen-ated",
    "a--b", "(cat:1.3)", "[cat|dog]", "{x}", "a\\b", "C:\\dir", "a/b", "50% off", "$5", "€5", "£5", "~`^",
    "a=b+c", "<b>bold</b>", "``quoted''", "“quoted”", "«quoted»", "—–-", "http://example.org/?a=1&b=2",
    "user@example.org", "cat</w>", "</w>", "#version: 0.2",
    # accents, combining marks, case rules
    "café", "cafe\u0301", "CAFÉ", "CAFE\u0301", "naïve façade", "Åström", "A\u030astro\u0308m", "\u0301",
    "e\u0301\u0302", "n\u0303o", "straße", "STRASSE", "ẞ", "ΕΛΛΆΣ", "ΣΑΣ ΣΑΣ.", "Σ", "ς", "İstanbul",
    "ISTANBUL", "ı", "I\u0307", "ŉ", "ǅ Ǆ", "ﬁne ﬀ", "\u2126 Ω", "\u212a \u212b", "ªº", "№", "x̲y̲",
    "Việt Nam", "क्षत्रिय", "ด้วย", "한국어", "\u1112\u1161\u11ab",
    # scripts, full width, emoji
    "日本語の写真", "日本 語", "中文，测试。", "привет, МИР", "مرحبا بالعالم", "שלום", "\u202eabc\u202c", "Ｆｕｌｌ　Ｗｉｄｔｈ",
    "１２３", "ｶﾀｶﾅ", "😀", "😀😀", "a😀b", "👍🏽", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "1️⃣", "❤️", "☃", "\u200d", "\ufe0f", "𝒜𝓑",
    "𐍈",
    # control characters, marks of byte order, what is no character
    "\x00", "a\x00b", "\x01\x02", "\x1b[0m", "\x07", "\x7f", "\x1c", "a\x1cb", "a\x1db", "a\x1eb", "a\x1fb",
    "\x0b\x0c", "a\x0bb\x0cc", "\ufeff", "\ufeffa photo", "a\ufeffb", "\ufffd", "\uffff", "\U0010ffff",
    "\ue000", "\xad", "soft\xadhyphen",
    # the special tokens as text, entities
    BOS, EOS, f"{BOS}a{EOS}", f"a {EOS} b", f"a{EOS}b", f"{EOS}{EOS}", f"{BOS}{BOS}", BOS.upper(),
    EOS.upper(), "<|StartOfText|>", "<|EndOfText|>", "<|EndOfText|>x", "x<|EndOfText|>", "<|StartOfText|>x",
    "<|STARTOFTEXT|> x", "<|endoftext|", "|endoftext|>", "<|endoftext |>", "< |endoftext|>", "<|endoftext|>s",
    "<|end\u200boftext|>", "<|startoftext|><|endoftext|>'s", "<|pad|>", "[UNK]", "<s>", "&amp; &lt;b&gt;",
    "&#39;", "&amp;amp;", "&nbsp;x", "<|ſtartoftext|>", "<|endofte\u0078\u0301t|>"]


def test_the_strings_are_many():
    assert len(set(STRINGS)) == len(STRINGS) >= 200


def agree(ours, theirs):
    expected = theirs(STRINGS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    found = ours(STRINGS)
    assert found.shape == (len(STRINGS), 77) and found.dtype == torch.long
    different = [text for text, a, b in zip(STRINGS, found.tolist(), expected) if a != b]
    assert not different
    for text in STRINGS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.count(text) == len(ids), repr(text)
        assert ours.cut(text) == theirs.decode(ids[75:], skip_special_tokens=True), repr(text)


def test_ids_equal_transformers(folder):
    agree(CLIPTokenizer.from_pretrained(folder), reference(folder))


def test_ids_equal_transformers_with_the_real_vocabulary(tmp_path):
    """OpenAI's own merges come with the open_clip package. It must be installed, but need not import."""
    spec = importlib.util.find_spec("open_clip")
    path = spec and Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    if not path or not path.exists():
        pytest.skip("open_clip is not installed")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1:48895]
    write_vocabulary(tmp_path, [tuple(line.split()) for line in lines])
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    assert ours(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    agree(ours, reference(tmp_path))
    edit_json(tmp_path / "special_tokens_map.json", pad_token="!")               # as in SD 2.1-base
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    assert ours(["a cat!"])[0, :6].tolist() == [49406, 320, 2368, 0, 49407, 0]
    agree(ours, reference(tmp_path))


def test_plain_words_follow_the_merges(folder):
    """transformers and we stand on the same library, so here is byte-pair encoding once more, by hand."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    text = "A photo of the river, they've pictured 1984 résumé 日本語 unseen!?"
    expected = []
    for word in re.findall(r"'ve|[^\W\d_]+|\d|[^\s\w]+", text.lower()):
        pieces = symbols(word)
        for pair in MERGES:
            pieces = merge(pieces, pair)
        expected += [vocabulary[piece] for piece in pieces]
    ids = CLIPTokenizer.from_pretrained(folder)([text])[0].tolist()
    bos, eos = vocabulary[BOS], vocabulary[EOS]
    assert ids == [bos, *expected, eos] + [eos] * (75 - len(expected))


def test_both_forms_of_folder_agree(folder, tmp_path):
    """transformers 5 saves a tokenizer as one tokenizer.json, without vocab.json and merges.txt."""
    reference(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "merges.txt").exists()
    one, other = CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(tmp_path)
    assert torch.equal(one(STRINGS), other(STRINGS))
    assert [one.cut(text) for text in STRINGS] == [other.cut(text) for text in STRINGS]
    agree(other, reference(tmp_path))


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("style", ["SD 2.1-base", "one file", "full entry", "listed", "listed last"])
def test_padding_with_exclamation_marks(style, saved_again, tmp_path):
    """SD 2 pads with "!", id 0, and so every ! of a prompt becomes that token as well."""
    path = write_padding(tmp_path, style)
    theirs = reference(path)
    if saved_again:
        theirs.save_pretrained(path := tmp_path / "again")
    ours = CLIPTokenizer.from_pretrained(path)
    assert ours(["a cat!"])[0, -60:].unique().tolist() == [0] and theirs.pad_token_id == 0
    agree(ours, theirs)
    assert ours.count("a cat!!") == ours.count("a cat") + 2


@pytest.mark.parametrize("pad", [None, ["!"], {}, "<|nothing|>"], ids=str)
def test_odd_padding(pad, tmp_path):
    edit_json(write_vocabulary(tmp_path) / "special_tokens_map.json", pad_token=pad)
    if pad:
        refuses(tmp_path, "padding", "not a CLIP tokenizer")
    else:
        assert CLIPTokenizer.from_pretrained(tmp_path)(["a cat"])[0, -1] == reference(tmp_path).eos_token_id


def test_saved_limits_do_not_reach_count_and_cut(folder, tmp_path):
    """A tokenizer.json may carry truncation and padding; what does not fit must be found all the same."""
    theirs = reference(folder)
    theirs(["x"], padding="max_length", truncation=True, max_length=20)        # which the library remembers
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    assert ours.count("a " * 100) == 100 and ours.count("a") == 1
    assert ours(["a"]).shape == (1, 77)
    assert ours.cut("a " * 78) == "a a a"


def test_cut_returns_what_does_not_fit(folder):
    ours = CLIPTokenizer.from_pretrained(folder)
    assert ours.count("a of") == 2
    text = "a " * 74 + "of"
    assert ours.count(text) == 75 and ours.cut(text) == ""
    assert ours.cut(text + " the river, at night") == "the river , at night"
    assert ours.cut("") == ""
    assert ours([text])[0, -1] == ours.eos and ours([text])[0, 75] != ours.eos
    long = "an unusually zigzagging sentence with words that no merge has ever seen, for certain; " * 2
    rest = ours.cut(long)
    assert rest and long.replace(" ", "").replace(",", "").endswith(rest.replace(" ", "").replace(",", ""))
    assert ours.count(long) == 75 + ours.count(rest)


def test_length_comes_from_the_settings(folder, tmp_path):
    def length(**changes):
        write_vocabulary(tmp_path)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | changes
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return CLIPTokenizer.from_pretrained(tmp_path)(["a cat " * 99]).shape[1]
    assert length(model_max_length=16) == 16
    assert length(model_max_length=1000000000000000019884624838656) == 77      # "no limit"
    assert length(model_max_length=None) == length(model_max_length=8192) == 77
    for bad in (0, -1, 2, "77", True, [77]):
        with pytest.raises(UserError, match="model_max_length"):
            length(model_max_length=bad)
    (tmp_path / "tokenizer_config.json").unlink()
    assert CLIPTokenizer.from_pretrained(tmp_path)(["a cat " * 99]).shape[1] == 77


# ---- words that textual inversion added ----

ADDED = {"<toy>": 664, "<toy>_1": 665, "<Van-Gogh>": 666, "kitty": 667}


def write_added(folder, style):
    """A vocabulary and four words of its owner, as different libraries and versions save them."""
    write_vocabulary(folder)
    if style.startswith("added_tokens.json"):
        (folder / "added_tokens.json").write_text(json.dumps(ADDED))
        if style.endswith("special"):
            edit_json(folder / "special_tokens_map.json", additional_special_tokens=["<Van-Gogh>", "<toy>"])
        return folder
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    listed = {str(i): {"content": word, "normalized": word != "<Van-Gogh>", "special": word == "kitty",
                       **flags} for word, i in ADDED.items()}
    if style != "decoder, new words alone":
        listed |= {"662": {"content": BOS, "normalized": True, "special": True} | flags,
                   "663": {"content": EOS, "normalized": False, "special": True} | flags}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    return folder


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("style", ["added_tokens.json", "added_tokens.json, special", "decoder",
                                   "decoder, new words alone"])
def test_added_words_have_the_ids_of_transformers(style, saved_again, tmp_path):
    theirs = reference(folder := write_added(tmp_path, style))
    if saved_again:
        theirs.save_pretrained(folder := tmp_path / "again")
    ours = CLIPTokenizer.from_pretrained(folder)
    texts = ["a <toy> on the moon", "<TOY>", "a<toy>_1b", "<toy><toy>_1!", "by <Van-Gogh>", "by <van-gogh>",
             "kitty kittykitty KITTY", " <toy>", "<toy> " * 50]
    assert ours(texts).tolist() == theirs(texts, padding="max_length", truncation=True,
                                          max_length=77)["input_ids"]
    assert ours(["a <toy>"])[0, 2] == 664
    agree(ours, theirs)


@pytest.mark.parametrize("added", [{"<toy>": 700}, {"<toy>": "x"}, {"<toy>": None}], ids=str)
def test_added_words_that_do_not_fit_are_refused(added, tmp_path):
    (write_vocabulary(tmp_path) / "added_tokens.json").write_text(json.dumps(added))
    refuses(tmp_path, str(tmp_path) if added["<toy>"] != 700 else "cannot have the id 700")


def test_tokenizer_json_without_begin_and_end_gets_them(folder, tmp_path):
    """Its post-processor, which adds them, may be lacking; transformers builds its own, too."""
    reference(folder).save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer.json", post_processor=None)
    agree(CLIPTokenizer.from_pretrained(tmp_path), reference(tmp_path))


# ---- bad folders of a tokenizer ----

@pytest.mark.parametrize("kept", [149, 75, 0])
def test_merges_cut_off_at_the_end_of_a_line(kept, tmp_path):
    """Every line left is whole, but words fall into other tokens."""
    path = write_vocabulary(tmp_path) / "merges.txt"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:1 + kept]), "utf-8")
    refuses(tmp_path, "merges.txt", "cut off", repr("".join(MERGES[kept])))



def refuses(folder, *words):
    with pytest.raises(UserError) as caught:
        CLIPTokenizer.from_pretrained(folder)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("content, words", [
    (b"a b c\n", "is damaged"), (b"onlyone\n", "is damaged"), (b"zzz qqq\n", "do not fit"),
    (b"\xff\xfe \xff\n", "")],
    ids=["three pieces", "one piece", "unknown pieces", "not UTF-8"])
def test_damaged_merges(content, words, tmp_path):
    (write_vocabulary(tmp_path) / "merges.txt").write_bytes(b"#version: 0.2\n" + content)
    refuses(tmp_path, "merges.txt", words)


def test_merges_cut_off_in_the_middle_of_a_line(tmp_path):
    path = write_vocabulary(tmp_path) / "merges.txt"
    path.write_bytes(path.read_bytes()[:len("#version: 0.2\n") + 2])
    refuses(tmp_path, "merges.txt")


@pytest.mark.parametrize("special", [BOS, EOS])
def test_vocabulary_without_specials(special, tmp_path):
    path = write_vocabulary(tmp_path) / "vocab.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))
    del tokens[special]
    path.write_text(json.dumps(tokens), encoding="utf-8")
    refuses(tmp_path, special)


@pytest.mark.parametrize("special", [[], [BOS], [EOS]], ids=str)
def test_tokenizer_of_another_model(special, tmp_path):
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.add_special_tokens(special)
    other.save(str(tmp_path / "tokenizer.json"))
    refuses(tmp_path, "not a CLIP tokenizer")


@pytest.mark.parametrize("content", ['{"a": 0', "[]", "{}"], ids=["cut off", "a list", "empty"])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_damaged_json(name, content, tmp_path):
    write_vocabulary(tmp_path)
    if name == "tokenizer.json":
        (tmp_path / "merges.txt").unlink()
    (tmp_path / name).write_text(content)
    refuses(tmp_path, name)


def test_missing_files(tmp_path):
    write_vocabulary(tmp_path)
    (tmp_path / "vocab.json").unlink()
    refuses(tmp_path, "vocab.json")
    (tmp_path / "merges.txt").unlink()
    refuses(tmp_path, str(tmp_path), "merges.txt", "tokenizer.json")


# ---- the text encoder ----

def theirs_of(official):
    return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(official))


def test_full_size_names_shapes_and_norms(tmp_path):
    config, ours, _ = same_at_full_size(CLIPTextModel, CLIPTextConfig, OFFICIAL_TEXT, theirs_of, 123_060_480,
                                        tmp_path)
    assert config == CLIPTextConfig() and len(shapes(ours)) == 196                  # our defaults are SD v1.4


def test_full_size_names_shapes_and_norms_of_sd_2_1_base(tmp_path):
    same_at_full_size(CLIPTextModel, CLIPTextConfig, OFFICIAL_TEXT_21, theirs_of, 340_387_840, tmp_path)


@pytest.mark.parametrize("name", TEXTS)
def test_text_numbers_in_every_layer(name, tmp_path):
    theirs = theirs_text(**TEXTS[name])
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextModel.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    rows = []
    for module in (ours.embeddings, *ours.encoder.layers):
        module.register_forward_hook(lambda module, inputs, output: rows.append(output))
    length = theirs.config.max_position_embeddings
    for ids in (torch.randint(theirs.config.vocab_size, (3, length)), torch.randint(50, (2, 5))):
        rows.clear()
        expected = theirs(ids, output_hidden_states=True)
        near(ours(ids), expected.last_hidden_state)
        assert len(rows) == len(expected.hidden_states) == theirs.config.num_hidden_layers + 1
        for row, other in zip(rows, expected.hidden_states):
            near(row, other)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("counter", [True, False])
def test_text_prefix_and_counter(prefix, counter, text_folder):
    path = text_folder / "model.safetensors"
    expected = load_file(path)

    def as_official(tensors):
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)
        if counter:
            tensors[prefix + "embeddings.position_ids"] = torch.arange(16)[None]
    edit_tensors(path, as_official)
    ours = CLIPTextModel.from_pretrained(text_folder).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
