"""What is loaded on a pipeline beside its checkpoint: LoRAs with weights, and textual inversion embeddings.

Everything is a value; nothing changes in place. `Adapters` holds the networks and the tokenizer as opened, and
everything loaded since; `networks` builds from them what runs. To remove something is to build them without it, so
removal is exact.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from unclip_jax.adapters.lora import Lora, merge_loras
from unclip_jax.adapters.textual_inversion import placeholder_tokens, with_placeholder, with_rows
from unclip_jax.checkpoints import foreign
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.tokenizer import Tokenizer

Source = str | os.PathLike[str] | Mapping[str, Any]
WordSource = Source | np.ndarray


@dataclasses.dataclass(frozen=True)
class Word:
    """A textual inversion embedding: its rows (n, width), and the adapter that it came with, if any."""

    rows: np.ndarray
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a pipeline.

    Args:
        opened: The checkpoint's tokenizer and networks.
        tokenizer: The tokenizer with the embeddings' tokens.
        loras: name -> (changes, weight).
        words: word -> textual inversion embedding.
    """

    opened: tuple[Tokenizer, Mapping[str, Network]]
    tokenizer: Tokenizer
    loras: Mapping[str, tuple[Lora, float]] = dataclasses.field(default_factory=dict)
    words: Mapping[str, Word] = dataclasses.field(default_factory=dict)

    def networks(self) -> dict[str, Network]:
        """The opened networks with all LoRAs merged in, and the embeddings' rows.

        Unchanged networks are the same objects.
        """
        tokenizer, base = self.opened
        networks = merge_loras(base, [lora for lora, _ in self.loras.values()], [w for _, w in self.loras.values()])
        if self.words:
            rows = {word: learnt.rows for word, learnt in self.words.items()}
            networks["text_encoder"] = with_rows(networks["text_encoder"], tokenizer.vocabulary_size, rows)
        return networks

    def with_lora(self, name: str, lora: Lora, weight: float, words: Mapping[str, np.ndarray], where: str) -> Self:
        """Adds a LoRA, with the textual inversion embeddings bundled with it.

        Raises:
            ValueError: The name is taken, or an embedding's word is known. `where` names the LoRA in the message.
        """
        if name in self.loras:
            raise ValueError(
                f"{where}: the adapter {name!r} is loaded already; give another name (adapter_name=), "
                "or remove that one first (delete_adapters)"
            )
        more = dataclasses.replace(self, loras={**self.loras, name: (lora, weight)})
        return more.with_words(words, where, name)

    def check_loaded(self, names: Sequence[str]) -> None:
        """Checks that LoRAs of these names are loaded.

        Raises:
            ValueError: One is not.
        """
        if unknown := [name for name in names if name not in self.loras]:
            loaded = ", ".join(map(repr, self.loras)) or "none"
            raise ValueError(f"adapter_names has {unknown[0]!r}; loaded: {loaded}")

    def weighted(self, weights: Mapping[str, float]) -> Self:
        """Sets other weights; LoRAs that are not named get 0."""
        loras = {name: (lora, weights.get(name, 0.0)) for name, (lora, _) in self.loras.items()}
        return dataclasses.replace(self, loras=loras)

    def without_loras(self, names: Sequence[str]) -> Self:
        """Removes LoRAs, and the embeddings that came with them.

        Raises:
            ValueError: One is not loaded.
        """
        self.check_loaded(names)
        loras = {name: value for name, value in self.loras.items() if name not in names}
        words = {word: learnt for word, learnt in self.words.items() if learnt.adapter not in names}
        return dataclasses.replace(self, loras=loras)._with_only(words)

    def with_words(self, words: Mapping[str, np.ndarray], where: str, adapter: str | None = None) -> Self:
        """Adds textual inversion embeddings.

        Raises:
            ValueError: The tokenizer knows the word already. `where` names the file in the message.
        """
        tokenizer = self.tokenizer
        for word, rows in words.items():
            tokens = placeholder_tokens(word, len(rows))
            if known := next((token for token in tokens if token in tokenizer.known_tokens), None):
                raise ValueError(
                    f"{where}: the word {word!r} is not new, the tokenizer has the token {known!r}; "
                    + self._ways_out(word, adapter)
                )
            tokenizer, _ = with_placeholder(tokenizer, word, len(rows))
        learnt = {word: Word(rows, adapter) for word, rows in words.items()}
        return dataclasses.replace(self, tokenizer=tokenizer, words={**self.words, **learnt})

    def _ways_out(self, word: str, adapter: str | None) -> str:
        """Advice for a word that is already known. adapter: the one that the new embedding came with, if any."""
        ways = [] if adapter is not None else ["give it another name (token=)"]
        if (old := self.words.get(word)) is not None:
            how = "unload_textual_inversion" if old.adapter is None else f"delete_adapters({old.adapter!r})"
            ways.append(f"take the old one away first ({how})")
        return ", or ".join(ways) or "it cannot be loaded beside that"

    def without_words(self, tokens: Sequence[str] | None) -> Self:
        """Removes these textual inversion embeddings, or all that came in files of their own.

        Raises:
            ValueError: One is not loaded, or came with an adapter.
        """
        own = [word for word, learnt in self.words.items() if learnt.adapter is None]
        for token in tokens or ():
            if token not in self.words:
                raise ValueError(f"tokens has {token!r}; loaded: {', '.join(map(repr, own)) or 'none'}")
            if (adapter := self.words[token].adapter) is not None:
                raise ValueError(f"tokens has {token!r}, which came with the adapter {adapter!r}; use delete_adapters")
        gone = own if tokens is None else tokens
        return self._with_only({word: learnt for word, learnt in self.words.items() if word not in gone})

    def _with_only(self, words: Mapping[str, Word]) -> Self:
        if words.keys() == self.words.keys():
            return self
        tokenizer, _ = self.opened
        for word, learnt in words.items():
            tokenizer, _ = with_placeholder(tokenizer, word, len(learnt.rows))
        return dataclasses.replace(self, tokenizer=tokenizer, words=words)


def load_lora(
    adapters: Adapters,
    config: CheckpointConfig,
    source: Source,
    name: str | None,
    weight: float,
    weight_name: str | None,
) -> Adapters:
    """Adds the LoRA of a file, a folder, a repository or a state dict; see `convert.adapters.read_adapter`."""
    lora, words = foreign.read_adapter(source, config, weight_name)
    where, stem = _named(source, weight_name)
    if name is None:
        name = f"default_{len(adapters.loras)}" if stem is None else stem
    return adapters.with_lora(name, lora, weight, words, where)


def load_words(
    adapters: Adapters,
    config: CheckpointConfig,
    sources: WordSource | Sequence[WordSource],
    tokens: str | Sequence[str] | None,
    weight_name: str | None,
) -> Adapters:
    """Adds textual inversion embeddings from one source or several; see `convert.adapters.read_textual_inversion`.

    Raises:
        ValueError: There are other numbers of names and sources, or as in `Adapters.with_words`.
    """
    several = isinstance(sources, list | tuple)
    given: Sequence[Any] = sources if isinstance(sources, list | tuple) else [sources]
    names: Sequence[str | None] = (
        [None] * len(given) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
    )
    if not several and len(names) > 1 and hasattr(given[0], "__array__"):
        # As diffusers has it: one array of the vectors of several words.
        given = list(np.asarray(given[0]))
    if len(names) != len(given):
        raise ValueError(f"token has {len(names)} names for {len(given)} sources; want one per source")
    for source, token in zip(given, names, strict=True):
        where, _ = _named(source, weight_name)
        adapters = adapters.with_words(foreign.read_textual_inversion(source, config, token, weight_name), where)
    return adapters


def _named(source: Any, weight_name: str | None) -> tuple[str, str | None]:
    """The name of a source in messages, and the stem of its file name, if it has one."""
    if not isinstance(source, str | os.PathLike):
        return "the state dict", None
    where = os.fspath(source) if weight_name is None else f"{os.fspath(source)}/{weight_name}"
    return where, Path(weight_name or source).stem
