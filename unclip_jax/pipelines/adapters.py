"""The methods by which a pipeline takes LoRAs and textual inversions, and gives them back."""

from collections.abc import Sequence

from unclip_jax.adapters import loaded
from unclip_jax.adapters.loaded import Adapters
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.models.freeu import FreeU
from unclip_jax.pipelines.checks import MAX_SCALE, check_number
from unclip_jax.pipelines.parts import Residency


class Adaptable:
    """A pipeline whose networks can be changed. `adapters` is a value; every method puts another in its place."""

    config: CheckpointConfig
    tokenizer: Tokenizer
    networks: dict[str, Network]
    adapters: Adapters
    residency: Residency | None
    _freeu: FreeU | None = None

    @property
    def freeu(self) -> FreeU | None:
        """How the UNet's way up is reweighted, a `FreeU`; None: as it was trained. Raises ValueError when it is set."""
        return self._freeu

    @freeu.setter
    def freeu(self, value: FreeU | None) -> None:
        if value is not None:
            if not isinstance(value, FreeU):
                raise ValueError(f"freeu is {value!r:.80}; want a FreeU or None")
            # Floats, whatever was given: numbers of another type would compile the network anew.
            value = FreeU(*(check_number(name, number, 0, 100) for name, number in value._asdict().items()))
        self._freeu = value

    def load_lora_weights(
        self,
        source: loaded.Source,
        adapter_name: str | None = None,
        weight: float = 1.0,
        weight_name: str | None = None,
    ) -> None:
        """Adds a LoRA, or a related kind of adapter, to the UNet and the text encoder, beside those already there.

        Args:
            source: a file, or a folder or a hub id with diffusers' `pytorch_lora_weights`, peft's `adapter_model`, or
                the file `weight_name`; or a state dict of arrays. docs/adapters.md lists the forms that are read.
                Textual inversions that are bundled with it are loaded, too.
            adapter_name: the name for `set_adapters`. None: the file's own (of a folder or a repository, that one's),
                without its suffix.
            weight: how strongly it acts; 1 is as trained.

        Raises:
            FileNotFoundError: when there is nothing at `source`.
            ValueError: in one line, for a file that is not understood or of another model.
            OSError: what `unclip_jax.checkpoints.hub.download` raises.
        """
        self._check_adaptable()
        weight = check_number("weight", weight, -MAX_SCALE, MAX_SCALE)
        self._adapt(loaded.load_lora(self.adapters, self.config, source, adapter_name, weight, weight_name))

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Sets how strongly each loaded LoRA acts; those that are not named get 0. Raises ValueError."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        self.adapters.check_loaded(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights has {len(weights)} numbers for {len(names)} names; want one for each")
        weights = [check_number("adapter_weights", weight, -MAX_SCALE, MAX_SCALE) for weight in weights]
        self._adapt(self.adapters.weighted(dict(zip(names, weights, strict=True))))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Removes LoRAs, with the textual inversions that came with them. Raises ValueError for an unknown name."""
        self._adapt(self.adapters.without_loras([adapter_names] if isinstance(adapter_names, str) else adapter_names))

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs: the networks are those that were opened, bit for bit, but for textual inversions."""
        self._adapt(self.adapters.without_loras(list(self.adapters.loras)))

    def load_textual_inversion(
        self,
        source: loaded.WordSource | Sequence[loaded.WordSource],
        token: str | Sequence[str] | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Adds embeddings of new tokens, from files of diffusers, A1111 or the original, to the text encoder.

        Args:
            source: a file, or a folder or a hub id with diffusers' `learned_embeds`, or with the file `weight_name`; a
                state dict of arrays, or an array of a token's vectors; or a list of these. If one of a list is refused,
                none is added.
            token: how prompts write it, a list for a list. None: the file's own name of it.

        Raises:
            FileNotFoundError: when there is nothing at `source`.
            ValueError: for a file that is not understood or of another text encoder, and for a known token.
            OSError: what `unclip_jax.checkpoints.hub.download` raises.
        """
        self._check_adaptable()
        self._adapt(loaded.load_words(self.adapters, self.config, source, token, weight_name))

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Removes these textual inversions, or all. Raises ValueError for one that is not loaded."""
        self._adapt(self.adapters.without_words([tokens] if isinstance(tokens, str) else tokens))

    def _check_adaptable(self) -> None:
        if self.residency is not None:
            raise ValueError("adapters need networks that stay in memory: open the pipeline without free_networks")

    def _adapt(self, adapters: Adapters) -> None:
        self.networks, self.tokenizer, self.adapters = adapters.networks(), adapters.tokenizer, adapters
