"""Checks a Hugging Face model before anything is loaded from it: what is missing, cut off, or must not be run.

Of a folder, reads only config.json and the headers of the weights, which takes milliseconds for any size.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, list_repo_files
from huggingface_hub.file_download import repo_folder_name
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE
from transformers.utils import cached_file
from transformers.utils.hub import is_offline_mode

from salt_lightning.errors import ConfigError, few

# for transformers' cached_file: gives None for a file that is not there
MAY_LACK = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
_BLOCKS, _BLOCK_BYTES = 256, 4096
_ADAPTER = "adapter_config.json"
_MERGE = (
    f"has an adapter ({_ADAPTER}), as LoRA makes, which is not read; merge it into its model, "
    "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), or give the model "
    "without it"
)


def is_causal(kind: Any) -> bool:
    """Whether transformers has a causal language model of this model_type, built in or registered."""
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return True
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


def check(folder: Path, setting: str, trust_remote_code: bool) -> None:
    """Raises ConfigError, starting with `setting`, unless the folder has a complete causal language model."""
    if (folder / _ADAPTER).is_file():  # beside a whole model, transformers reads it only if peft is installed
        raise ConfigError(f"{setting} {folder} {_MERGE}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting} {folder} is a folder without config.json; {_where_the_model_is(folder)}")
    _check_config(folder / "config.json", setting, folder, trust_remote_code)
    for name in _files(folder, setting):
        if Path(name).name != name:
            raise ConfigError(
                f"{setting} {folder}: {INDEX} names {name!r}, which lies outside of the folder; do not trust it"
            )
        if not (folder / name).is_file():
            raise ConfigError(f"{setting} {folder} lacks {name}, which its {INDEX} names; download the rest")
        _check_header(folder / name, f"{setting} {folder}: {name}", "download it again")


def _check_header(file: Path, said: str, remedy: str) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{said} is cut off or damaged ({error}); {remedy}") from error


def _where_the_model_is(folder: Path) -> str:
    """What to give instead of a folder that some tool wrote but that is no model."""
    if own := sorted([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")]):
        return f"give one of its checkpoints, e.g. {own[-1]}"
    if saved := sorted(folder.glob("checkpoint-*/config.json"), key=lambda path: path.stat().st_mtime_ns):
        return f"give one of its checkpoints, e.g. {saved[-1].parent}"
    if (folder / "lit_model.pth").exists():
        return "convert LitGPT's weights with litgpt convert_from_litgpt, load them into the model and save_pretrained"
    return (
        "give a Hugging Face folder, or a checkpoint of this project, whose name ends in .ckpt; load other weights "
        "into a model of transformers and call its save_pretrained"
    )


# (hub name, revision) -> its folder in the hub's cache, named as the commit: a branch must not move within a start
SNAPSHOTS: dict[tuple[str, str], Path] = {}


@cache  # one start asks several times; an error is not kept
def check_hub(name: str, setting: str, revision: str, trust_remote_code: bool) -> None:
    """The same for a model on the hub, by its config.json, which is downloaded, and the names of its weights.

    Raises:
        ConfigError: as `check`.
        OSError: from transformers, if there is no such repository or revision, or access is denied.
    """
    if "@" in name:  # as in --data.source; the hub's own words do not tell
        where, _, own = name.partition("@")
        more = f", and {setting.removesuffix('path')}revision {own}" if own else ""
        raise ConfigError(f"{setting} {name}: no such folder here; for a model of the hub, give {where}{more}")
    found = cached_file(name, "config.json", revision=revision, **(MAY_LACK if is_offline_mode() else {}))
    if found is None and is_offline_mode():
        raise ConfigError(_not_cached(name, setting, revision))
    if found is None:
        raise ConfigError(
            f"{setting} {name} has no config.json on the hub: it may be an adapter or a GGUF file; give the whole model"
        )
    _check_config(Path(found), setting, name, trust_remote_code)
    SNAPSHOTS[name, revision] = folder = Path(found).parent
    rank_zero_info(f"{setting} {name}: commit {folder.name}")
    _weights_on_hub(name, setting, folder.name)


def _weights_on_hub(name: str, setting: str, commit: str) -> list[str]:
    """The files of weights that loading will read; empty if the hub cannot be asked, and loading says why.

    Raises:
        ConfigError: there are none, or not all.
    """
    try:
        there = set(list_repo_files(name, revision=commit))
    except Exception:  # of many kinds
        if is_offline_mode():
            _check_cached(name, setting, commit)
        return []
    if _ADAPTER in there:
        raise ConfigError(f"{setting} {name} {_MERGE}")
    if SINGLE in there:
        return [SINGLE]
    if INDEX not in there:
        raise ConfigError(
            f"{setting} {name} has neither {SINGLE} nor {INDEX} on the hub; use a revision or model that has, or give "
            "a folder converted with save_pretrained (pickles are not read)"
        )
    files = _named(Path(cached_file(name, INDEX, revision=commit)), setting, name)
    if lost := [file for file in files if file not in there]:
        raise ConfigError(f"{setting} {name} lacks {few(lost)} on the hub, which its {INDEX} names; use another one")
    return files


def _not_cached(name: str, setting: str, revision: str) -> str:
    """That the hub is offline, and its cache has no config.json of this model, or none of this revision."""
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    refs, commits = cache / "refs", cache / "snapshots"
    known = [str(file.relative_to(refs)) for file in sorted(refs.rglob("*")) if file.is_file()]
    if revision in known or (commits / revision).is_dir():
        return (
            f"{setting} {name}: the hub is offline, and its cache here has no config.json of {revision}; download "
            "it first (an adapter or a GGUF file has none: give the whole model)"
        )
    if known := known or [folder.name for folder in sorted(commits.glob("*"))]:
        return (
            f"{setting.removesuffix('path')}revision {revision}: the hub is offline (HF_HUB_OFFLINE), and its cache "
            f"here has {name} at {few(known)}; give one of these or the whole hash of a commit, or download it first"
        )
    return (
        f"{setting} {name}: no such folder here; the hub is offline (HF_HUB_OFFLINE), and its cache here, "
        f"{constants.HF_HUB_CACHE}, has no such model; for a folder, give the path that ls shows; download a model of "
        "the hub first"
    )


def _check_cached(name: str, setting: str, commit: str) -> None:
    """Raises ConfigError unless the hub's cache here has all weights of a model, with whole headers."""
    single, index, adapter = (
        cached_file(name, file, revision=commit, **MAY_LACK) for file in (SINGLE, INDEX, _ADAPTER)
    )
    if adapter:
        raise ConfigError(f"{setting} {name} {_MERGE}")
    named = _named(Path(index), setting, name) if index and not single else []
    files = (
        {SINGLE: single} if single else {each: cached_file(name, each, revision=commit, **MAY_LACK) for each in named}
    )
    if lost := [file for file, path in files.items() if not path] or ([] if files else ["weights in safetensors"]):
        raise ConfigError(
            f"{setting} {name}: the hub is offline, and its cache here has no {few(lost)} of commit {commit}; download "
            "them first"
        )
    for file, path in files.items():
        real = Path(path).resolve()  # where only the link is removed, the hub's client makes it again
        _check_header(real, f"{setting} {name}: {file} in the hub's cache", f"delete {real} and download it again")


def fetch(name: str, setting: str, commit: str) -> None:
    """Downloads what the hub's cache lacks of a model's weights; loading finds them there. Raises the hub's errors."""
    for file in _weights_on_hub(name, setting, commit):
        hf_hub_download(name, file, revision=commit)


def sample_hash(path: Path) -> str | None:
    """A hash of the weights of a model here, folder or checkpoint; None if they cannot be read.

    It reads some blocks of each file, as whole ones can have a hundred gigabytes: training changes all of a file.
    """
    found = hashlib.blake2b(digest_size=8)
    with suppress(OSError, ConfigError):
        if path.is_dir() and (path / "config.json").exists():  # other files beside them are not read
            files = [path / name for name in _files(path, "")]
        else:
            files = [path] if path.is_file() else sorted(path.glob("*.distcp"))
        for file in files:
            size = file.stat().st_size
            found.update(f"{file.name if file != path else ''} {size} ".encode())
            with open(file, "rb") as content:
                for number in range(blocks := max(4, _BLOCKS // len(files))):
                    content.seek(max(0, size - _BLOCK_BYTES) * number // (blocks - 1))
                    found.update(content.read(_BLOCK_BYTES))
        return found.hexdigest() if files else None
    return None


def config_hash(path: Path) -> str | None:
    """A hash of what a Hugging Face folder holds besides its weights that decides what they compute: config.json, and
    the model's own code, if it names some; None for what is no such folder."""
    found = hashlib.blake2b(digest_size=8)
    with suppress(OSError, ConfigError):
        config = _read(path / "config.json", "")
        found.update(json.dumps({k: v for k, v in config.items() if k not in _OF_NO_EFFECT}, sort_keys=True).encode())
        for file in _own_code(path, config.get("auto_map")):
            found.update(file.read_bytes())
        return found.hexdigest()
    return None


def _own_code(folder: Path, auto_map: Any) -> list[Path]:
    """The files that transformers runs of a model's own code. Of others, the hub's cache has some here or there."""
    names = auto_map if isinstance(auto_map, dict) else {}
    named = [str(names.get(name)) for name in ("AutoConfig", "AutoModelForCausalLM")]
    files = [folder / f"{name.partition('.')[0]}.py" for name in named]
    found: set[Path] = set()
    while files:
        file = files.pop()
        if file not in found and file.is_file():
            found.add(file)
            with suppress(ValueError):  # no UTF-8: it cannot be run
                files += [file.parent / f"{name}.py" for name in get_relative_imports(file)]
    return sorted(found)


def names_code(path: Path) -> bool:
    """Whether the config.json of a folder names code that comes with it."""
    with suppress(OSError, ConfigError):
        return bool(_read(path / "config.json", "").get("auto_map"))
    return False


_OF_NO_EFFECT = ("_name_or_path", "transformers_version", "use_cache")


def _check_config(file: Path, setting: str, name: str | Path, trust_remote_code: bool) -> None:
    """Raises ConfigError unless the config.json of the model `name` is that of a causal language model."""
    config = _read(file, setting)
    kind, names = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str | None) or not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise ConfigError(
            f"{setting} {name}: config.json's model_type or architectures are not names; download it again"
        )
    refuse_requests(config, f"{setting} {name}")
    if not is_causal(kind) and not trust_remote_code:
        if config.get("auto_map"):
            own = f"{setting} {name} needs model code that comes with it ({kind!r} is not in this transformers)"
            remedy = f"read that code, and if you trust it set {setting.removesuffix('path')}trust_remote_code true"
            if setting == "--model.student.path":
                remedy = (
                    f"to train it, use a model type of transformers: checkpoints hold no code; to measure it, {remedy}"
                )
            raise ConfigError(f"{own}; {remedy}")
        raise ConfigError(
            f"{setting} {name} is not a causal language model that this transformers knows (model_type {kind!r} in "
            "config.json); use one, e.g. a llama, gpt2 or qwen3"
        )
    if bidirectional := [name for name in names if "MaskedLM" in name]:
        raise ConfigError(
            f"{setting} {name} contains a {bidirectional[0]}, whose tokens see later ones; use a causal language "
            "model, e.g. a llama, gpt2 or qwen3"
        )


def keep_stops(model: PreTrainedModel) -> None:
    """Puts all tokens that end a text by generation_config.json into the config, which checkpoints and exports keep."""
    config = model.config.get_text_config()
    generates = getattr(model, "generation_config", None)  # code of its own may leave out generate()
    stops, own = (getattr(of, "eos_token_id", None) for of in (generates, config))
    if isinstance(stops, list) and (own is None or own in stops):
        with suppress(Exception):  # some families' configs take only one
            config.eos_token_id = stops


def refuse_requests(settings: dict[str, Any], where: str) -> None:
    """Raises ConfigError if a model's settings in a file ask for code or files that only the user may ask for."""
    if "transformers_weights" in settings:
        raise ConfigError(f"{where}: its config names other files of weights (transformers_weights); remove the key")
    nodes, seen = [(settings, False)], set()
    while nodes:
        node, is_kernel = nodes.pop()
        if is_kernel and isinstance(node, str) and "/" in node:
            raise ConfigError(
                f"{where}: its config names {node!r}, compiled code of the hub; remove that key, and if you trust the "
                "code set --model.student.attention or --model.teacher.attention to it"
            )
        node = vars(node) if isinstance(node, PreTrainedConfig) else node
        if isinstance(node, dict | list) and (id(node), is_kernel) not in seen:  # some contain themselves
            seen.add((id(node), is_kernel))
            items = node.items() if isinstance(node, dict) else enumerate(node)
            nodes += [(each, is_kernel or "_implementation" in str(key)) for key, each in items]


def without_code(spec: dict[str, Any], where: str) -> dict[str, Any]:
    """A ModelSpec from a file, without what would run code.

    Raises:
        ConfigError: its config asks for code or for other files.
    """
    if isinstance(config := spec.get("config"), dict):
        refuse_requests(config, where)
    attention = spec.get("attention")
    is_name = isinstance(attention, str) and "/" not in attention  # with "/": a kernel of the hub
    return {**spec, "attention": attention if is_name else None, "trust_remote_code": False}


def _files(folder: Path, setting: str) -> Iterable[str]:
    """Names of the weight files that must be there."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    if (folder / INDEX).exists():
        return _named(folder / INDEX, setting, folder)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    raise ConfigError(
        f"{setting} {folder} has no weights: neither {SINGLE} nor {INDEX}"
        + (f", only {few(others)}" if others else "")
        + "; download them, or convert them with save_pretrained (pickles are not read)"
    )


def _named(index: Path, setting: str, name: str | Path) -> list[str]:
    """The files of weights that the index of the model `name` names."""
    files = _read(index, setting).get("weight_map")
    if isinstance(files, dict) and files:
        return sorted(set(map(str, files.values())))
    raise ConfigError(f"{setting} {name}: {INDEX} names no weight files; download it again")


_MOST_JSON_BYTES = 1 << 28


def _read(path: Path, setting: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError(f"larger than {_MOST_JSON_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        blob = f"delete {path.resolve()} and " if path.is_symlink() else ""  # in the hub's cache, which would keep it
        raise ConfigError(f"{setting} {path} is not valid JSON ({error}); {blob}download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{setting} {path} contains {str(content)[:40]!r} instead of settings; download it again")
    return content
