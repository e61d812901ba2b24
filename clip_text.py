"""CLIP's tokenizer and text transformer: what turns a prompt into the rows that cross-attention reads.

    ids = CLIPTokenizer.from_pretrained("mini/tokenizer")(["a photo of an airplane"])     # [1, T]
    e = CLIPTextModel.from_pretrained("mini/text_encoder")(ids)                           # [1, T, D]

Stable Diffusion v1 uses the *last hidden state after the final layer norm*, one row per token, T = 77 rows of
D = 768. The mask is causal, so row 0 (begin of text) is the same for every prompt, and row i knows only the
tokens up to i. Padding is the end-of-text token again, and it is not masked: its rows carry meaning too.
SD 2.1-base differs in numbers only: OpenCLIP's encoder, D = 1024, whose padding is "!", id 0.

Papers: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision";
Cherti et al. 2022, "Reproducible scaling laws for contrastive language-image learning" (OpenCLIP).
"""
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from plumbing import UserError
from plumbing.disk import read_json
from plumbing.weights import load_network, read_config

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's word splitter: special tokens, contractions, runs of letters, single digits, runs of other signs.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """CLIP's byte-pair encoding: lower case, a word's last piece ends in `</w>`, always `length` ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, length: int = 77, pad: str = EOS):
        self.length, self.eos = length, tokenizer.token_to_id(EOS)
        self.size = 1 + max(tokenizer.get_vocab().values())       # the rows that an encoder has
        self._plain = tokenizer                                   # no cutting, no padding: see `cut`
        self._fixed = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._fixed.enable_truncation(length)
        self._fixed.enable_padding(length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)

    @classmethod
    def from_pretrained(cls, folder: str | Path, positions: int = 77) -> "CLIPTokenizer":
        """Read `vocab.json` + `merges.txt` (official) or `tokenizer.json` (what newer libraries save), and
        the words that were added to them. positions: the encoder's, so the most that `length` can be."""
        folder = Path(folder)
        settings, specials, older, whole = (
            read_json(folder / name) if (folder / name).exists() else {} for name in (
                "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"))
        length = settings.get("model_max_length")
        length = positions if length is None else length          # "no limit" is also written as 8192 or 1e30
        if not isinstance(length, (int, float)) or not length >= 3 or positions < length < 1000:
            raise UserError(f"{folder / 'tokenizer_config.json'}: model_max_length = {length!r} is not "
                            f"supported (from 3 to the encoder's {positions} positions)")
        try:
            if (folder / "merges.txt").exists():
                vocab, merges = read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
            elif (folder / "tokenizer.json").exists():
                vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
                merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
            else:
                raise UserError(f"{folder} has neither vocab.json + merges.txt nor tokenizer.json")
            listed = settings.get("added_tokens_decoder")
            if listed is None:                                    # an older folder: its older files decide
                settings |= specials                              # (in SD 2.1-base they differ in pad_token)
                listed = {i: {"content": word} for word, i in older.items()}
                listed |= {token["id"]: token for token in whole.get("added_tokens", [])}
            roles = {"bos": BOS, "eos": EOS, "unk": EOS, "pad": EOS}
            named = [settings.get(f"{role}_token") or usual for role, usual in roles.items()]
            tokenizer = clip_bpe(vocab, merges, named, {int(i): token for i, token in listed.items()})
            return cls(tokenizer, int(min(length, positions)), added_token(named[-1]).content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: tokenizer.json or a file beside it is damaged, or this is not a CLIP "
                            f"tokenizer ({type(error).__name__}: {error})") from None

    def __call__(self, texts: list[str]) -> Tensor:
        """texts: B strings -> ids [B, T], int64. Longer prompts lose their end; `cut` says which part."""
        return torch.tensor([e.ids for e in self._fixed.encode_batch(list(texts))], dtype=torch.long)

    def count(self, text: str) -> int:
        """How many tokens `text` has by itself, without the begin and end tokens."""
        return len(self._plain.encode(text, add_special_tokens=False).ids)

    def vocabulary(self) -> list[str]:
        """All tokens, as vocab.json spells them: the last piece of a word ends in `</w>`."""
        return list(self._plain.get_vocab())

    def words(self, ids) -> str:
        """Token ids as text."""
        return self._plain.decode(list(ids)).replace("</w>", " ").strip()

    def cut(self, text: str) -> str:
        """The end of `text` that does not fit into T tokens (usually "")."""
        ids = self._plain.encode(text, add_special_tokens=False).ids[self.length - 2:]
        return self.words(ids)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """`merges.txt`: a version line, then two pieces per line, best merge first."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[1:]
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{path} is damaged: every line after the first must hold two pieces")
    return pairs


def added_token(token: str | dict, **changes) -> tokenizers.AddedToken:
    """A token as the files spell it: by its fields, or as a string, which is a special token then."""
    fields = {"content": token, "special": True} if isinstance(token, str) else token
    known = {"lstrip", "normalized", "rstrip", "single_word", "special"} & fields.keys()
    return tokenizers.AddedToken(fields["content"], **{key: fields[key] for key in known} | changes)


def clip_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], named: list = (BOS, EOS),
             listed: dict = {}) -> tokenizers.Tokenizer:
    """CLIP's pipeline on the `tokenizers` library: equals transformers' CLIPTokenizer on every code point.

    listed: {id: token}, words that are looked for before all else, as textual inversion adds them; named:
    tokens with a role, the last one pads. A UserError names what does not fit together.
    """
    if len({*vocab.values()}) < len(vocab) or not all(type(i) is int for i in vocab.values()):
        raise UserError("vocab.json: each word needs an id of its own")
    try:
        bpe = tokenizers.models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="",
                                    end_of_word_suffix="</w>", fuse_unk=False, unk_token=EOS)
    except Exception as error:                                    # the library raises bare Exceptions
        raise UserError(f"vocab.json and merges.txt do not fit together: {error}") from None
    roles = [added_token(token, special=True) for token in named]
    tokens = {i: added_token(listed[i]) for i in sorted(listed)}
    words = {token.content for token in tokens.values()}
    for token in (BOS, EOS, roles[-1].content):
        if token not in words and token not in vocab:
            raise UserError(f"the tokenizer's vocabulary lacks {BOS}, {EOS} or the padding {token!r}: "
                            "this is not a CLIP tokenizer")
    built = words | {token.content for token in roles} | {"".join(pair) for pair in merges}
    if lost := [word for word in vocab if len(word.removesuffix("</w>")) > 1 and word not in built]:
        raise UserError(f"merges.txt has no line that makes {lost[0]!r}, and vocab.json has {len(lost)} such "
                        "words: is merges.txt cut off?")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # Special tokens with `normalized` are looked for after lower-casing, others before: in the official files
    # BOS is, and what pads (in SD v1 EOS) is not. In SD 2, whose padding is "!", every ! of a prompt becomes
    # a token of its own.
    tokenizer.add_tokens(list(tokens.values()))
    tokenizer.add_tokens([token for token in roles if token.content in vocab and token.content not in words])
    if wrong := [i for i, token in tokens.items() if tokenizer.token_to_id(token.content) != i]:
        raise UserError(f"the added token {tokens[wrong[0]].content!r} cannot have the id {wrong[0]}: ids go "
                        f"on from the vocabulary's {len(vocab)}")
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, tokenizer.token_to_id(EOS)), (BOS, tokenizer.token_to_id(BOS)), trim_offsets=False,
        add_prefix_space=False)
    return tokenizer


@dataclass(frozen=True)
class CLIPTextConfig:
    """Widths; the defaults are the text half of openai/clip-vit-large-patch14, which is SD v1.4's encoder."""
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if width % heads:
            raise UserError(f"CLIP: hidden_size {width} must be divisible by num_attention_heads {heads}")
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)          # [B, heads, T, D/heads]
        y = F.scaled_dot_product_attention(split(self.q_proj(x)), split(self.k_proj(x)),
                                           split(self.v_proj(x)), is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))                    # [B, T, D]


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, act: str):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(width, hidden), nn.Linear(hidden, width), ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer, [B, T, D] -> [B, T, D]. CLIP's image tower has the same, unmasked."""

    def __init__(self, config, causal: bool):
        super().__init__()
        width = config.hidden_size
        self.self_attn = SelfAttention(width, config.num_attention_heads, causal)
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]      # [B, T, D]


class CLIPTextModel(nn.Module):
    """ids [B, T] -> last hidden state after the final norm [B, T, D]: the context of SD's cross-attention."""

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "CLIPTextModel":
        """Read a `text_encoder` folder. Raises UserError naming what is missing, extra or not supported."""
        config = read_config(Path(folder), CLIPTextConfig, SUPPORTED)
        return load_network(cls, config, folder, "model", dtype, device, rename=official_name)


SUPPORTED = {"hidden_act": tuple(ACTIVATIONS)}


def official_name(key: str) -> str | None:
    """The official file puts `text_model.` before every key and stores a counter that is no weight."""
    key = key.removeprefix("text_model.")
    return None if key == "embeddings.position_ids" else key
