"""Programs that were compiled ahead, in files: a later process on the same device compiles, traces and lowers nothing.

    ROOT/KEY/facts.json                  what they hold for: versions, device, settings, the checkpoint's shapes
    ROOT/KEY/PROGRAM-CALL.executable     one program for arguments of one kind

KEY is made of the facts, and CALL of everything that decides about a program: the structure, shapes, dtypes and
placement of its arguments, and what is compiled in. A call that no file fits is compiled as ever.

The files hold pickles and machine code, so whoever writes them decides what this process does. Each is signed with a
secret of the user's that never leaves his machine. Those that are found beside a checkpoint are read with his signature
alone; a folder that is named is trusted.
"""

import dataclasses
import functools
import hashlib
import hmac
import json
import os
import pickle
import platform
import re
import secrets
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import platformdirs
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from unclip_jax.checkpoints.atomic import replaced_file, write_json

FACTS = "facts.json"
# Beside the weights of a converted checkpoint.
FOLDER = "executables"
# What programs are traced and compiled under.
_SETTINGS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_numpy_dtype_promotion", "jax_disable_most_optimizations", "jax_exec_time_optimization_effort"),
)
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "UNCLIP_JAX_PLAIN_ATTENTION")

Facts = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Executables:
    """A folder of programs that fit this process. named: by the user, who trusts it; devices: in a mesh's order."""

    folder: Path
    devices: tuple[jax.Device, ...]
    named: bool = False

    def load(self, program: str, arrays: Any, static: Mapping[str, Any]) -> Any:
        """A program for these arguments, or None where there is none, or where it is refused with a warning.

        Raises ValueError for a broken file in a folder that was named.
        """
        try:
            path = self.folder / f"{call_name(program, arrays, static)}.executable"
        except ValueError:  # a solver that a user made of functions without a name
            return None
        if not path.is_file():
            return None
        try:
            return _open(path, arrays, self.devices, None if self.named else _secret())
        except ValueError as error:
            _refuse(f"{error}; remove it, or run `unclip-jax compile` again", self.named)
            return None


@dataclasses.dataclass(frozen=True)
class Stored:
    """A jitted function of arrays by position, and of what is compiled in by name, that reads `executables` first."""

    name: str
    jitted: Any
    executables: Executables
    found: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        call = tree, tuple(static.items()), tuple(map(_kind, leaves))
        if call not in self.found:
            stored = self.executables.load(self.name, arrays, static)
            self.found[call] = functools.partial(self.jitted, **static) if stored is None else stored
        return self.found[call](*arrays)

    @property
    def lower(self) -> Any:
        """As of the jitted function."""
        return self.jitted.lower


def make_facts(mesh: Mesh, **others: Any) -> Facts:
    """What has to be equal for a program to be used again, in words. others: of the pipeline's."""
    device = mesh.devices.flat[0]
    settings = {name: str(getattr(jax.config, name, None)) for name in _SETTINGS}
    environment = {name: os.environ.get(name, "") for name in _ENVIRONMENT}
    return {
        **{package: version(package) for package in ("jax", "jaxlib")},
        "code": code(),
        "device": device.device_kind,
        "processor": _processor() if device.platform == "cpu" else platform.machine(),
        "platform": " ".join(device.client.platform_version.split()),
        "mesh": f"{dict(mesh.shape)} of devices {[device.id for device in mesh.devices.flat]}",
        **{name: value if isinstance(value, str) else digest(value) for name, value in others.items()},
        **settings,
        **environment,
    }


def find(root: Path, facts: Facts, mesh: Mesh, named: bool) -> Executables | None:
    """The programs below `root` that hold for these facts.

    None where there are none, with a warning that names what differs. Raises ValueError instead for a root that the
    user has named.
    """
    folder = root / digest(facts)
    if (folder / FACTS).is_file():
        return Executables(folder, tuple(mesh.devices.flat), named)
    others = [_read_facts(path) for path in sorted(root.glob(f"*/{FACTS}"))]
    differences = [[name for name in facts if other.get(name) != facts[name]] for other in others]
    if not differences:
        if named:
            _refuse(f"{root} holds none", named)
        return None
    nearest = min(range(len(others)), key=lambda i: len(differences[i]))
    name = differences[nearest][0]
    made = f"{name} {others[nearest].get(name)!r}, and this process has {facts[name]!r}"
    _refuse(f"those in {root} are for {made}; run `unclip-jax compile` to make others", named)
    return None


def write_facts(root: Path, facts: Facts) -> Path:
    """The folder below `root` for programs that hold for these facts, which it makes."""
    folder = root / digest(facts)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FACTS).exists():
        write_json(folder / FACTS, facts)
    return folder


def write(folder: Path, name: str, compiled: Any) -> Path:
    """Writes a compiled program, under the `call_name` of its arguments."""
    serialized, _, out_tree = serialize_executable.serialize(compiled)
    # A treedef with classes of ours cannot be pickled; what it is of can, without its leaves.
    payload = pickle.dumps((serialized, out_tree.unflatten([0] * out_tree.num_leaves)))
    sha256 = _sha256(name, payload)
    header = {"sha256": sha256, "signature": _signature(sha256, _secret())}
    path = folder / f"{name}.executable"
    with replaced_file(path) as partial:
        partial.write_bytes(json.dumps(header).encode() + b"\n" + payload)
    return path


def call_name(program: str, arrays: Any, static: Mapping[str, Any]) -> str:
    """The name of a program for arguments of these kinds, the same in every process.

    Raises ValueError for arguments without a name: functions that are not a module's own.
    """
    leaves, tree = jax.tree.flatten(arrays)
    return f"{program}-{digest((tree, sorted(static.items()), list(map(_kind, leaves))))}"


def digest(value: Any) -> str:
    """16 hexadecimal digits for a value's description."""
    return hashlib.sha256(json.dumps(_described(value)).encode()).hexdigest()[:16]


def _kind(leaf: Any) -> tuple[Any, ...]:
    """Shape, dtype, weakness and placement of an array. One that is nowhere yet has no placement."""
    placed = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
    dtype = getattr(leaf, "dtype", type(leaf))
    return getattr(leaf, "shape", ()), dtype, getattr(leaf, "weak_type", False), placed


def _described(value: Any) -> Any:
    """A value in JSON, without addresses of this process."""
    if isinstance(value, jax.tree_util.PyTreeDef):
        node = value.node_data()
        return "*" if node is None else [_described(node[0]), _described(node[1]), *map(_described, value.children())]
    if isinstance(value, functools.partial):
        return ["partial", *map(_described, (value.func, value.args, value.keywords))]
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_described, value)]
    if callable(value) and hasattr(value, "__qualname__"):
        text = f"{value.__module__}.{value.__qualname__}"
        if "<" in text:
            raise ValueError(f"{text} is not a module's own function")
        return text
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [_described(type(value)), _described(fields)]
    text = repr(value)
    if re.search(r" at 0x[0-9a-f]+", text):
        raise ValueError(f"{text} has no name of its own")
    return text


def _open(path: Path, arrays: Any, devices: tuple[jax.Device, ...], secret: bytes | None) -> Any:
    """The program of a file for these arguments. secret: whose signature it must have; None: nobody's."""
    head, _, payload = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(head)
        sha256, signature = header["sha256"], header["signature"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not an executable of unclip_jax") from None
    if sha256 != _sha256(path.stem, payload):
        raise ValueError(f"{path} is damaged: its SHA-256 is another")
    if secret is not None and not hmac.compare_digest(signature, _signature(sha256, secret)):
        raise ValueError(f"{path} was not written by this user on this machine; name its folder to trust it")
    serialized, made = pickle.loads(payload)
    trees = jax.tree.structure((arrays, {})), jax.tree.structure(made)
    return serialize_executable.deserialize_and_load(
        serialized, *trees, backend=devices[0].client, execution_devices=devices
    )


def _refuse(message: str, named: bool) -> None:
    if named:
        raise ValueError(f"executables: {message}")
    warnings.warn(f"executables are not used: {message}", stacklevel=2)


def _read_facts(path: Path) -> dict[str, str]:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        facts = {}
    return facts if isinstance(facts, dict) else {}


def _sha256(name: str, payload: bytes) -> str:
    return hashlib.sha256(name.encode() + b"\0" + payload).hexdigest()


def _signature(sha256: str, secret: bytes) -> str:
    return hmac.new(secret, sha256.encode(), "sha256").hexdigest()


def _secret() -> bytes:
    """The user's secret, made at its first use. Where it cannot be kept: another one every time."""
    path = Path(platformdirs.user_data_dir("unclip_jax")) / "secret"
    fresh = secrets.token_bytes(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with replaced_file(path) as partial:
                partial.chmod(0o600)  # before there is anything to read
                partial.write_bytes(fresh)
        return path.read_bytes()
    except OSError:
        return fresh


@functools.cache
def code() -> str:
    """A digest of flax's version and the package's source: networks and programs of another release are others."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    contents = [version("flax").encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """The CPU's name, and a digest of its instruction sets (Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    sets = first.get("flags", first.get("Features", ""))
    return f"{first.get('model name', platform.machine())} ({hashlib.sha256(sets.encode()).hexdigest()[:8]})"
