"""Prompts to token ids: CLIP's byte-pair encoding in the two variants that Stable Diffusion 2 is used with.

Everything that distinguishes one vocabulary from another (tokens, merges, special tokens, padding) is data in one text,
in the format of the `tokenizers` library: the `tokenizer.json` of a converted checkpoint.
"""

import functools
import gzip
import html
import importlib.resources
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

Dialect = Literal["open_clip", "transformers"]

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # CLIP uses the first of the file's 262,144 merges

# Words as open_clip finds them in cleaned text: its pattern ignores case, by which a long s counts as s, and leaves out
# the one mark (U+0345) that has a letter for its other case. A special string counts only where a word can start: in
# "!<end_of_text>" the run of punctuation takes the "<".
OPEN_CLIP_WORDS = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
OPENAI_WORDS = OPEN_CLIP_WORDS.replace("<[sſ]tart_of_text>|<end_of_text>", r"<\|[sſ]tartoftext\|>|<\|endoftext\|>")


class Tokenizer:
    """Converts prompts to sequences of token ids: start, at most `context_length` - 2 tokens, end, padding.

    Dialect "open_clip" repairs the text with ftfy, unescapes HTML twice, collapses white space and lower-cases in
    Python, as open_clip's SimpleTokenizer does, and with it Stability's code. The start and end strings typed in a
    prompt are the special tokens. Dialect "transformers" is the fast CLIPTokenizer, whose cleaning (NFC, white space,
    lower case) is part of `json`. Every added token typed in a prompt is that token. That includes the padding token:
    with Stable Diffusion 2's folders a "!" becomes id 0.

    Args:
        text: A tokenizer.json.
        dialect: "open_clip" or "transformers".
        context_length: Ids per prompt.
    """

    def __init__(self, text: str, dialect: Dialect, context_length: int):
        if dialect not in get_args(Dialect):
            raise ValueError(f"dialect is {dialect!r}; accepted: {', '.join(map(repr, get_args(Dialect)))}")
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}; want at least 2, for the start and end tokens")
        _check_model(text)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
            padding = tokenizer.padding
            tokenizer.no_padding()
            tokenizer.no_truncation()
            ends = tokenizer.encode("").ids
        except BaseException as error:  # the library raises plain Exception, and a BaseException where it panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"tokenizer.json: not a tokenizer of the tokenizers library: {_line(error)}") from error
        if padding is None or tokenizer.pre_tokenizer is None or len(ends) != 2:
            raise ValueError(
                "tokenizer.json lacks padding, a pre_tokenizer, or a start and an end token; want one made for CLIP"
            )
        self.json = text
        self.dialect = dialect
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._start, self._end = ends
        self._pad = padding["pad_id"]
        self._specials = {tokenizer.id_to_token(i): i for i in ends}
        words = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if i not in ends}
        longest_first = sorted(map(re.escape, words), key=len, reverse=True)
        self._words = words
        self._lower = {word.lower(): i for word, i in words.items()}  # case counts as little as in the rest of a prompt
        self._word = re.compile(f"({'|'.join(longest_first)})", re.IGNORECASE) if words else None

    @classmethod
    def from_json(cls, text: str, dialect: Dialect, context_length: int = 77) -> "Tokenizer":
        """Builds the tokenizer from the text of a tokenizer.json, as the functions below make it.

        Args:
            text: The JSON text.
            dialect: "open_clip" or "transformers".
            context_length: The number of ids in a sequence, which is the text encoder's number of positions.

        Returns:
            The tokenizer.

        Raises:
            ValueError: The text is not a tokenizer or lacks padding or special tokens, or the dialect is unknown.
        """
        return cls(text, dialect, context_length)

    @property
    def vocabulary_size(self) -> int:
        """One more than the highest id: the least number of rows in the text encoder's embedding."""
        return max(self._pad, *self._tokenizer.get_vocab().values()) + 1

    @property
    def known_tokens(self) -> set[str]:
        """Every token that has an id."""
        return set(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def added_tokens(self) -> set[str]:
        """The tokens added to the vocabulary, except start and end; textual inversion tokens are among them."""
        return set(self._words)

    def tokens(self, text: str) -> list[int]:
        """A text's own ids, without start, end and padding, in any number."""
        return self._encode(text, 0)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Converts prompts to token ids.

        A prompt that does not fit is cut to `context_length` - 2 tokens, with a UserWarning that quotes the rest.

        Args:
            prompts: B strings, each of any length.

        Returns:
            (B, context_length) int32.

        Raises:
            ValueError: It is a single string, or an entry is not a string or not valid Unicode.
        """
        return self._rows(prompts)[0]

    def with_mask(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids, and a mask (B, context_length) bool that is true up to and including the end token."""
        return self._rows(prompts)

    def _rows(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts!r}; want a sequence of strings")
        mask = np.zeros((len(prompts), self.context_length), np.bool_)
        rows = np.full((len(prompts), self.context_length), self._pad, np.int32)
        room = self.context_length - 2
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            if not isinstance(prompt, str):
                raise ValueError(f"prompts[{index}] is of type {type(prompt).__name__}; want a string")
            tokens = self._encode(prompt, index)
            if len(tokens) > room:
                dropped = self._tokenizer.decode(tokens[room:], skip_special_tokens=False).strip()
                warnings.warn(
                    f"the prompt is {len(tokens)} tokens long and only {room} fit; dropped: {dropped!r}", stacklevel=3
                )
            ids = [self._start, *tokens[:room], self._end]
            row[: len(ids)] = ids
            mask[index, : len(ids)] = True
        return rows, mask

    def _encode(self, prompt: str, index: int) -> list[int]:
        """The ids of a prompt's own tokens, in any number."""
        if self.dialect == "transformers":
            try:
                return self._tokenizer.encode(prompt, add_special_tokens=False).ids
            except Exception as error:
                raise ValueError(f"prompts[{index}] {prompt!r}: cannot be encoded: {_line(error)}") from error
        # Word by word: the library's own `encode` would find special strings before it splits words.
        model, ids = self._tokenizer.model, []
        for part in [prompt] if self._word is None else self._word.split(prompt):
            if part.lower() in self._lower:  # a textual inversion, see `unclip_jax.adapters.textual_inversion`
                ids.append(self._words.get(part, self._lower[part.lower()]))
                continue
            for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(clean(part)):
                if word in self._specials:
                    ids.append(self._specials[word])
                else:
                    ids.extend(token.id for token in model.tokenize(word))
        return ids


def clean(text: str) -> str:
    """A prompt as open_clip reads it: repaired (ftfy), HTML unescaped twice, white space collapsed, in lower case."""
    if not (text.isascii() and text.isprintable()) or "&" in text:
        import ftfy  # here, since it takes a while, and most prompts have nothing to repair

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.cache
def clip_tokenizer_json() -> str:
    """The tokenizer.json of CLIP's own vocabulary (49,408 ids), which ships with the package, for dialect open_clip."""
    return open_clip_tokenizer_json(_clip_merges())


@functools.cache
def openai_tokenizer_json() -> str:
    """The same vocabulary as OpenAI's own code reads it, and Karlo's with it, for dialect open_clip.

    The start and end tokens have other names, and padding is the end token. (Karlo pads with 0. Its prior masks
    padding, so the id does not matter, and transformers' CLIP-L has this one.)
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    return _openai_json(_clip_merges(), OPENAI_WORDS, start, end, pad=end)


def _clip_merges() -> list[tuple[str, str]]:
    packed = importlib.resources.files("unclip_jax.conditioning").joinpath("data", VOCABULARY).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : MERGES + 1]  # the first line is a title
    return [(left, right) for left, right in map(str.split, lines)]


def open_clip_tokenizer_json(merges: Sequence[tuple[str, str]]) -> str:
    """The tokenizer.json of the vocabulary that a list of merges implies, in open_clip's order.

    The ids are the 256 byte symbols, the same at the end of a word ("</w>"), one for each merge, then the start and end
    tokens. Padding is id 0.

    Raises:
        ValueError: A merge joins tokens that no earlier line made.
    """
    return _openai_json(merges, OPEN_CLIP_WORDS, "<start_of_text>", "<end_of_text>", pad=None)


def _openai_json(merges: Sequence[tuple[str, str]], pattern: str, start: str, end: str, pad: str | None) -> str:
    """pad: None for id 0."""
    # Bytes that print in Latin-1 stand for themselves and come first; the others borrow the letters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, start, end])}
    tokenizer = tokenizers.Tokenizer(byte_pairs(vocabulary, list(merges), None, "merges"))
    tokenizer.pre_tokenizer = words(pattern, split_again=False)
    specials = [AddedToken(start, special=True), AddedToken(end, special=True)]
    return completed(tokenizer, specials, start, end, pad=symbols[0] if pad is None else pad)


def words(pattern: str, *, split_again: bool) -> pre_tokenizers.PreTokenizer:
    """Cuts text into words and writes their bytes as symbols. split_again: by GPT-2's pattern after this one."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_again),
        ]
    )


def byte_pairs(vocabulary: Any, merges: list[Any], unknown: str | None, source: str) -> models.BPE:
    """The model of a vocabulary. source: what a message calls it. Raises ValueError where the two do not fit."""
    try:
        return models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=unknown)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{source}: not a byte-pair vocabulary and its merges: {_line(error)}") from error


def completed(tokenizer: tokenizers.Tokenizer, added: list[AddedToken], start: str, end: str, pad: str) -> str:
    """Adds what follows the vocabulary: added tokens, start and end, padding, decoding. Returns the whole as text."""
    tokenizer.add_tokens(added)
    vocabulary = tokenizer.get_vocab()
    start_id, end_id, pad_id = (vocabulary[token] for token in (start, end, pad))
    tokenizer.post_processor = processors.RobertaProcessing((end, end_id), (start, start_id), False, False)
    tokenizer.enable_padding(pad_id=pad_id, pad_token=pad)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return tokenizer.to_str()


def _check_model(text: str) -> None:
    """Refuses a model at which the tokenizers library would panic: it cuts a prefix off every merge, there or not."""
    try:
        model = json.loads(text)["model"]
        prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the library's own refusal says more
    if prefix and merges:
        raise ValueError(f"tokenizer.json: continuing_subword_prefix is {prefix!r:.40}; want none, as in CLIP's")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
