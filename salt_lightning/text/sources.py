"""What a source setting names: files, folders, globs and hub data sets -> groups of files, in one fixed order."""

import errno
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import yaml
from huggingface_hub import metadata_load
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.errors import ConfigError, few, one_line, printable, refuse
from salt_lightning.text.packed import SUFFIXES

_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".jsonlines": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_TABLES = {".csv", ".tsv"}
_ARCHIVES = {".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar"}
# with an owner: `datasets` takes "text" or "json" alone for every such file in the working directory
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^:]+))?(?:(?::([^:[]+))?:(.*))?")
_SLICE = re.compile(r"([^[+]+)\[(\d*):(\d*)\]")
_HUB_READER = 3  # version: 1 took each line of a .txt for a document, 2 took words of a .csv for numbers


@dataclass(frozen=True)
class Hub:
    """Which part of a hub data set (or of a local folder laid out like one) is read."""

    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    def rows(self) -> tuple[str, int, int | None]:
        """The split's own name, the first of its rows to read, and where to stop (None: at the end)."""
        if sliced := _SLICE.fullmatch(self.split):
            return sliced[1], int(sliced[2] or 0), int(sliced[3]) if sliced[3] else None
        return self.split, 0, None


@dataclass(frozen=True)
class Group:
    """Files of one kind, or one hub data set (no files): read by one reader, under one source name."""

    name: str
    kind: str  # "text" (a file is a document) | "jsonl" (a line is one) | "parquet" (a row is one) | "hub"
    files: tuple[str, ...] = ()
    hub_name: str = ""
    hub: Hub = Hub()

    def read(self) -> dict[Any, str]:
        """What it reads -> a name to show. A file has one key under all its names; each hub split has its name."""
        if self.kind == "hub":
            parts = self.hub.split.split("+")
            revision = f"@{self.hub.revision}" if self.hub.revision else ""
            names = (":".join(filter(None, (f"{self.hub_name}{revision}", self.hub.subset, part))) for part in parts)
            return {name: name for name in names}
        return {_identity(file): file for file in self.files}

    def inputs(self) -> list[Any]:
        """Everything that determines what this group reads, as plain data: file stamps, or the place on the hub."""
        if self.kind == "hub":
            return [self.name, self.hub_name, self.hub.split, self.hub.subset, self.hub.revision, _HUB_READER]
        stats = [(file, os.stat(file)) for file in self.files]
        return [self.name, self.kind, [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]]


def entries(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> list[str]:
    """The entries of a source setting: one or several, strings or paths."""
    several = [source] if isinstance(source, str | os.PathLike) else source or []
    return [name for entry in several if (name := os.fspath(entry))]


def resolve(setting: str, entries: list[str], hub: Hub) -> tuple[Group, ...]:
    """Find what each entry of a source setting names.

    Raises:
        ConfigError: an entry is neither file, folder, glob with a match, nor a possible hub name; a file is an archive.
    """
    if foreign := [entry for entry in entries if _unicode(entry) != entry]:
        raise ConfigError(f"{setting}: {foreign[0]} is not UTF-8; rename it, or give its folder or a glob")
    names = [_unicode(_source_name(entry)) for entry in entries]
    counts, groups, wrong = Counter(names), list[Group](), list[str]()
    for entry, name in zip(entries, names, strict=True):
        try:
            groups += _resolve_one(setting, entry, name if counts[name] == 1 else entry, hub)
        except ConfigError as error:
            wrong += error.problems
    if len(wrong) > (most := 5):
        wrong[most:] = [f"{setting}: {len(wrong) - most} more of its entries cannot be read"]
    refuse(wrong)
    files = [file for group in groups for file in group.files]
    if archives := [file for file in files if _suffix(file) in _ARCHIVES]:
        raise ConfigError(
            f"{setting}: {archives[0]} is an archive of files, which is not read; unpack it, or leave it out with a "
            "narrower glob"
        )
    if tables := [file for file in files if _suffix(file) in _TABLES]:
        tabs = ", sep='\\t'" if _suffix(tables[0]) == ".tsv" else ""
        raise ConfigError(
            f"{setting}: {tables[0]} is a table, whose header and quotes are no text; convert it, "
            f"datasets.Dataset.from_csv(FILE{tabs}).to_parquet('x.parquet'), leave it out with a narrower glob, or "
            f"replace {_suffix(tables[0])} by .txt in its name"
        )
    times = Counter(map(_identity, files))
    if again := next((file for file in files if times[_identity(file)] > 1), None):
        repeated = sum(count > 1 for count in times.values())
        said = f"{setting}: {repeated} of the files are read more than once (e.g. {again})"
        say_once(f"{said}, and so are the documents held out from them")
    return tuple(groups)


def each_file(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The same files in the same order, one group each, named by the shortest end of the path that makes names unique.

    Hub data sets stay as they are.
    """
    paths = {Path(file).parts for group in groups for file in group.files}
    depth = next(d for d in range(1, 999) if len({parts[-d:] for parts in paths}) == len(paths))
    split: list[Group] = []
    for group in groups:
        names = ((_unicode("/".join(Path(file).parts[-depth:])), file) for file in group.files)
        split += [Group(name, group.kind, (file,)) for name, file in names] or [group]
    return tuple(split)


def _resolve_one(setting: str, entry: str, name: str, hub: Hub) -> list[Group]:
    path = os.path.abspath(os.path.expanduser(entry))
    if files := _files(setting, path, hub):
        of_kind: dict[str, list[str]] = {"text": [], "jsonl": [], "parquet": []}
        for file in files:
            if os.path.getsize(file):  # the readers fail on empty files
                of_kind[_kind(file)].append(file)
        if not any(of_kind.values()):
            raise ConfigError(
                f"{setting}: {entry!r} holds no text: its files ({len(files)}) are empty; give other files"
            )
        return [Group(name, kind, tuple(found)) for kind, found in of_kind.items() if found]
    there = glob.glob(path)  # an empty folder, or a pipe
    named = Path(entry).suffix not in {".txt", ".md", ".py", *_KINDS, *SUFFIXES} and _HUB.fullmatch(entry)
    if named and not there and not os.path.exists(named[1]):  # which `datasets` would read instead
        hub_name, revision, subset, split = named.groups()
        part = Hub(split or hub.split, subset or hub.subset, revision or hub.revision)
        _, first, end = part.rows()
        if "[" in part.split and (not _SLICE.fullmatch(part.split) or (end is not None and end <= first)):
            raise ConfigError(
                f"{setting}: {part.split!r} is no slice that can be read; a slice counts rows of one split, "
                "e.g. train[:5000000] or train[10000:]"
            )
        return [Group(name, "hub", hub_name=hub_name, hub=part)]
    special = "matches only folders, no file" if all(map(os.path.isdir, there)) else "is not a regular file"
    what = special if there else "matches no file"
    if not there and "://" in entry:
        raise ConfigError(
            f"{setting}: {entry!r} is an address, which is not read; download it, or give a folder where that storage "
            "is mounted, or a hub data set as owner/name"
        )
    raise ConfigError(
        f"{setting}: {entry!r} {what}; give a file, a folder, a glob such as 'books/**/*.txt', "
        "or a hub data set 'owner/name', 'owner/name:split', 'owner/name:subset:split' or 'owner/name@revision' (for "
        "a local folder, FOLDER:split or FOLDER:subset:split)"
    )


def _files(setting: str, path: str, hub: Hub) -> list[str]:
    """The files that a path, a glob, FOLDER:split or FOLDER:subset:split names."""
    if os.path.isdir(path):
        return _say_outside(setting, path, _folder_files(setting, path, hub))
    if os.path.isfile(path):
        return _say_no_split(setting, path, [path], hub)
    if parted := _parted(path):
        folder, *subset, split = parted
        if split.endswith("]") and "[" not in split:  # of train[:500] or train[:10%], cut at its colon
            raise ConfigError(
                f"{setting}: {path!r} has a slice, which only hub data sets can have; name the split alone"
            )
        part = replace(hub, split=split, **({"subset": subset[0]} if subset else {}))
        return _say_outside(setting, folder, _folder_files(setting, folder, part, f"{setting}: {path!r}"))
    found = sorted(glob.glob(path, recursive=True))
    _refuse_closed(setting, path)
    _refuse_broken_links(setting, found)
    return _say_no_split(setting, path, list(filter(os.path.isfile, found)), hub)


def _parted(path: str) -> list[str]:
    """FOLDER:split or FOLDER:subset:split in its parts; nothing if there is no such folder."""
    ways = (path.rsplit(":", colons) for colons in (1, 2) if path.count(":") >= colons)
    named = ([folder, *rest] for folder, *rest in ways if all(rest) and not any(os.sep in part for part in rest))
    return next((parts for parts in named if os.path.isdir(parts[0])), [])


def _refuse_closed(setting: str, pattern: str) -> None:
    """A glob leaves out folders that this user may not enter, without a word."""
    parts = Path(pattern).parts
    for number in range(1, len(parts) + (parts[-1] == "**")):
        needed = os.R_OK | os.X_OK if glob.has_magic("".join(parts[number : number + 1]) or "**") else os.X_OK
        entered = glob.glob(os.path.join(*parts[:number], ""), recursive=True)  # folders only
        closed = (path.rstrip(os.sep) for path in entered if not os.access(path, needed))
        if (first := next((path for path in closed if os.path.basename(path) != "lost+found"), None)) is not None:
            raise ConfigError(
                f"{setting}: cannot read the folder {first!r}: {os.strerror(errno.EACCES)}; grant access, or name "
                "folders or a glob that leave it out"
            )


def _refuse_broken_links(setting: str, paths: list[str]) -> None:
    if nowhere := [path for path in paths if not os.path.exists(path)]:
        raise ConfigError(f"{setting}: {nowhere[0]} is a broken symbolic link; fetch its file, or remove it")


def _say_no_split(setting: str, path: str, files: list[str], hub: Hub) -> list[str]:
    given = [f"--data.{name}" for name, value in vars(hub).items() if value != getattr(Hub, name)]
    if given and files:
        say_once(f"{setting}: {path} names files, so {' and '.join(given)} cannot take effect")
    return files


def _visible_files(setting: str, folder: str) -> list[str]:
    """Visible files in a folder and its subfolders, including linked folders, each once."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"{setting}: cannot read the folder {error.filename!r}: {error.strerror}; grant access, or name other "
            "files with a glob"
        ) from error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if _identity(root) in seen:
            folders.clear()
            continue
        seen.add(_identity(root))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        paths = [os.path.join(root, file) for file in files if not file.startswith(".")]
        _refuse_broken_links(setting, paths)
        found += [path for path in paths if os.path.isfile(path)]  # neither sockets nor pipes
    return found


def _folder_files(setting: str, folder: str, hub: Hub, split_setting: str = "--data.split") -> list[str]:
    """Every visible file; if the folder has jsonl or parquet files, only one split of these, as on the hub."""
    found = _visible_files(setting, folder)
    if all(_kind(file) == "text" for file in found):
        if split_setting != "--data.split":
            raise ConfigError(f"{split_setting}: {folder} holds plain text, which has no splits; name only the folder")
        if hub.split != Hub.split:
            say_once(f"{setting}: {folder} holds plain text, which has no splits; {hub.split!r} has no effect")
        return sorted(found)
    if arrow := next((file for file in found if file.endswith(".arrow")), None):
        saved = os.path.dirname(arrow)
        parent, split = os.path.split(saved)
        is_dict = os.path.exists(os.path.join(parent, "dataset_dict.json"))
        loaded = f"{parent!r})[{split!r}]" if is_dict else f"{saved!r})"
        raise ConfigError(
            f"{setting}: {folder} holds Arrow files, which are not read; convert it, "
            f"datasets.load_from_disk({loaded}.to_parquet('x.parquet')"
        )
    splits = _splits(setting, folder, hub, any(map(_is_new_to_hub, found)))
    pattern = glob.escape(folder)
    if hub.split not in splits:
        raise ConfigError(
            f"{split_setting}: no split {hub.split!r} in {folder!r}; there are: {', '.join(map(str, splits))} (from "
            f"its file names, as on the hub); name one, or give the files with a glob, {pattern}/*"
        )
    named = sorted(set(splits[hub.split]))  # `datasets` names a file twice if two of its globs match
    read = [file for file in named if _suffix(file) not in _ARCHIVES] or named  # .zip, which it would unpack
    # by name, not target: the folder's owner made its links, as in the hub's own cache
    inside = (folder, os.path.realpath(folder))  # `datasets` follows a link to the folder itself
    paths = {file: Path(os.path.abspath(file)) for file in read}
    if strangers := [file for file, path in paths.items() if not any(map(path.is_relative_to, inside))]:
        raise ConfigError(
            f"{setting}: the README.md of {folder!r} names {strangers[0]!r}, which is outside that folder; if "
            "you trust it, name it in the setting"
        )
    if all(_kind(file) == "text" for file in read):  # as on the hub: the more common kind
        others = sorted({Path(file).suffix for file in found if _kind(file) != "text"})
        raise ConfigError(
            f"{setting}: {folder} holds {' and '.join(others)} files but more plain text files; choose with a glob, "
            f"e.g. {pattern}/*{others[0]}, or give both"
        )
    are_read = set(map(_identity, read))
    if left := sorted(file for file in found if _identity(file) not in are_read):
        say_once(
            f"{setting}: {folder}, split {hub.split}: reads {len(read)} of {len(found)} files; left out: "
            f"{few(os.path.relpath(file, folder) for file in left)}"
        )
    return read


def _splits(setting: str, folder: str, hub: Hub, has_new: bool) -> dict[str, list[str]]:
    """Split -> its files, by the folder's description or its file names, as on the hub. `has_new`: some files are
    jsonl or parquet by our rules only (_is_new_to_hub)."""
    try:
        import datasets  # here, because it takes half a second, and files and prepared text need none of it

        configs, real = _configs(folder), os.path.realpath(folder)  # `datasets` looks there
        if elsewhere := _elsewhere(configs):
            raise ConfigError(
                f"{setting}: the README.md of {folder!r} names {elsewhere!r}, which is not a file of that folder; "
                "remove it there; if you need it, download it and name it in the setting"
            )
        script = Path(folder, f"{Path(folder).name}.py")  # which `datasets` refuses
        by_name = not (configs or hub.subset or script.exists())
        # otherwise `datasets` puts a lock file into its cache, for which a container's user may have no home
        with _listed_once(), TemporaryDirectory() as unused:
            if by_name and (has_new or glob.has_magic(real)):
                return _splits_by_name(real)
            if glob.has_magic(real):
                raise ConfigError(
                    f"{setting}: {real!r} has brackets, * or ? in its path, so its README.md and --data.subset cannot "
                    f"be followed; rename the folder, or give the files with a glob, {glob.escape(folder)}/*"
                )
            return datasets.load_dataset_builder(folder, hub.subset, cache_dir=unused).config.data_files or {}
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{setting}: cannot read the folder {folder!r}: {hub_error(error)}") from error


def _splits_by_name(folder: str) -> dict[str, list[str]]:
    """Like `_splits` of a folder without a description, for suffixes and paths that `datasets` has no way to read."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(folder)
    splits = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    counts = Counter(map(_kind, filter(_counts, chain.from_iterable(splits.values()))))
    kind = max(("parquet", "jsonl", "text"), key=counts.__getitem__)  # of equally many the first, as on the hub
    of_kind = {split: [file for file in files if _kind(file) == kind] for split, files in splits.items()}
    return {split: files for split, files in of_kind.items() if files}


def _counts(file: str) -> bool:
    """Whether the hub counts a file in its choice of a folder's kind: among plain text, it overlooks notes and code."""
    return _kind(file) != "text" or _suffix(file) in {".txt", *_TABLES}


def _is_new_to_hub(file: str) -> bool:
    """Whether a file is jsonl or parquet by our rules only: .jsonlines, or a suffix in upper case."""
    return _kind(file) != "text" and (set(_KINDS) - {".jsonlines"}).isdisjoint(Path(file).suffixes)


@contextmanager
def _listed_once() -> Iterator[None]:
    """Cache folder listings: `datasets` finds splits by 33 globs, and lists the folder and all files for each."""
    own = vars(fsspec.filesystem("file"))  # the instance that `datasets` uses, too
    own["ls"] = cache(fsspec.filesystem("file").ls)
    try:
        yield
    finally:
        del own["ls"]


def _configs(folder: str) -> list[Any]:
    """The subsets that a data folder's description lists, with their files."""
    card, more = Path(folder, "README.md"), Path(folder, ".huggingface.yaml")
    told = [metadata_load(card)] if card.is_file() else []
    told += [yaml.safe_load(more.read_bytes())] if more.is_file() else []
    return list(chain.from_iterable(each.get("configs") or () for each in told if isinstance(each, dict)))


def _elsewhere(configs: list[Any]) -> str | None:
    """An entry in a data folder's description that `datasets` would fetch from the network or an archive, if any."""
    named = (each.get(name) for each in configs if isinstance(each, dict) for name in ("data_files", "data_dir"))
    nodes, seen = list(named), set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, str) and ("://" in node or "::" in node):
            return node
        if isinstance(node, dict | list | tuple | set) and id(node) not in seen:  # YAML nodes may contain themselves
            seen.add(id(node))
            nodes += node.values() if isinstance(node, dict) else node
    return None


def _say_outside(setting: str, folder: str, files: list[str]) -> list[str]:
    """Report links out of the folder; they are followed, since the hub's cache and many large data sets use them."""
    here = Path(os.path.realpath(folder))
    here = here.parents[1] if here.parent.name == "snapshots" else here  # the hub's cache, with its blobs
    folders = {name: os.path.realpath(name) for name in set(map(os.path.dirname, files))}
    real = (os.path.realpath(file) if os.path.islink(file) else folders[os.path.dirname(file)] for file in files)
    if outside := [file for file, lies in zip(files, real, strict=True) if not Path(lies).is_relative_to(here)]:
        say_once(f"{setting}: {len(outside)} files of {folder} are links to files outside it (e.g. {outside[0]})")
    return files


def hub_error(error: Exception) -> str:
    """The message of `datasets` in one line, in terms of our settings."""
    said, _, example = one_line(error).partition(" Example of usage")
    return f"{said}: --data.subset NAME, or NAME in the source, owner/name:NAME:train" if example else said.rstrip(".")


@cache
def say_once(said: str) -> None:
    rank_zero_info(printable(said))  # a line break in a file's name would forge a line of the log


def _identity(path: str) -> tuple[int, int]:
    """Device and inode: the same under all names of a file or folder."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _kind(file: str) -> str:
    return _KINDS.get(_suffix(file), "text")


def _suffix(file: str) -> str:
    """The suffix, without that of a compression."""
    path = Path(file)
    return (Path(path.stem).suffix if path.suffix.lower() in SUFFIXES else path.suffix).lower()


def _unicode(name: str) -> str:
    """A file's name with bytes that are no UTF-8 written out: names of sources must differ in any encoding."""
    return name.encode(errors="backslashreplace").decode()


def _source_name(entry: str) -> str:
    """Short name for logs: the last part of a path that is not a pattern; a file's without its suffixes."""
    path = os.path.abspath(os.path.expanduser(entry))
    there = os.path.exists(path) or bool(_parted(path))  # then brackets in it are not a pattern
    if not there and (named := _HUB.fullmatch(entry)):
        # neither revision nor slice: a source that grows in a resumed run keeps its name, and so its place
        return entry.partition("/")[2].replace(f"@{named[2]}", "", 1).partition("[")[0]
    parts = [part for part in path.split(os.sep) if part and (there or not glob.has_magic(part))]
    last = parts[-1] if parts else entry
    return last.split(".")[0] or last if os.path.isfile(path) else last
