"""From the value of `--data` to its images: a folder, a list of paths, what `lomar prepare` wrote, tar files, an
address, a library or the sample. Each kind of source has a file of its own below this one.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lomar.data.addresses import is_address
from lomar.data.archives import local_tars, open_address, open_tars
from lomar.data.libraries import open_library
from lomar.data.shards import is_finished, is_unfinished, read_index
from lomar.data.sources import ENDINGS, EXTENSIONS, ImageSource
from lomar.errors import UserError

_LIBRARIES = ("hf:", "torchvision:")

# Real photographs that the wheels of lomar's own dependencies carry: (package, folder, files).
_SAMPLE = (
    (
        "skimage",
        "data",
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg",
    ),
    ("sklearn", "datasets/images", "china.jpg flower.jpg"),
)

_RUN_MARKS = {b"config.yaml", b"train.log"}  # every folder of a run holds them


def open_source(data: str, flag: str = "--data") -> ImageSource:
    """The images that a command-line value names.

    Args:
        data: a folder (searched recursively, in sorted order, without hidden files), a `.txt` list of paths
            (one a line, relative to the list's folder; blank lines and lines that begin with # are skipped),
            one image file, a folder that `lomar prepare` wrote or a path of the originals in it (`prepared/train`),
            tar files (one, `x-{000..011}.tar`, `x-*.tar` or a folder that holds no image but tar files) or a path in
            them, the address of tar files or of a prepared folder, `hf:NAME` or `torchvision:NAME`, or the word
            `sample` (a folder of that name is reached as `./sample`).
        flag: the option the value came from, for messages.

    Raises:
        UserError: nothing there, no image in it, a prepared folder that is not finished or damaged, an address that
            cannot be read, or a library that is not installed.
    """
    if data == "sample":
        return _embedded_sample(flag)
    if elsewhere := _elsewhere(data, flag):
        return elsewhere
    path = Path(data)
    prepared = _prepared(path, flag)
    if prepared is not None:
        return _open_prepared(*prepared, data, flag)
    try:
        return _open_files(path, data, flag)
    except OSError as error:
        raise UserError(f"{flag} {data}: cannot read {error.filename!r}: {error.strerror}") from error


def _open_files(path: Path, data: str, flag: str) -> ImageSource:
    """The images of a folder, a list, or one file; or in the tar files of a folder that holds no image.

    Raises:
        OSError: the folder or list cannot be read.
        UserError: there is none, or it is of another kind.
    """
    if path.is_dir():
        source = ImageSource(data, _files_below(os.fsencode(data), ENDINGS))
        if len(source) == 0 and (tars := list(_files_below(os.fsencode(data), (b".tar",)))):
            return open_tars([str(Path(data, os.fsdecode(tar))) for tar in tars], "", data, flag)
        missing = f"no image in this folder; looked for {', '.join(EXTENSIONS)}"
    elif path.is_file() and path.suffix.lower() == ".txt":
        source = images_at(str(path.parent), list(_listed(path)), flag)
        missing = "the list names no file"
    elif path.is_file() and os.fsencode(data).lower().endswith(ENDINGS):
        return ImageSource(str(path.parent), [os.fsencode(path.name)])
    elif path.exists():
        raise UserError(f"{flag} {data}: neither a folder, an image, a .txt list of paths, a .tar file nor 'sample'")
    elif tars_above := _folder_of_tars(path):
        return open_tars(*tars_above, data, flag)
    else:
        raise UserError(f"{flag} {data}: no such folder or file")
    if len(source) == 0:
        raise UserError(f"{flag} {data}: {missing}")
    return source


def _elsewhere(data: str, flag: str) -> ImageSource | None:
    """The images of tar files, an address or a library; None where the value is none of them.

    Raises:
        UserError: they cannot be read.
    """
    if data.startswith(_LIBRARIES):
        return open_library(data, flag)
    if is_address(data):
        return open_address(data, flag)
    tars = local_tars(data, flag)
    return open_tars(*tars, data, flag) if tars else None


def _folder_of_tars(path: Path) -> tuple[list[str], str] | None:
    """The tar files in the folder that a path leads into, and the path in them; None where it leads into no such."""
    folder = next((place for place in path.parents if place.is_dir()), Path())
    tars = sorted(folder.glob("*.tar")) if folder != Path() else []  # where one happens to be is not asked for
    return ([str(tar) for tar in tars], path.relative_to(folder).as_posix()) if tars else None


def images_at(root: str, paths: Sequence[bytes], flag: str) -> ImageSource:
    """The files of these paths; where the root is or lies in a prepared folder or tar files, those that they hold.

    Args:
        root: what relative paths start from.
        paths: relative or absolute; that there is nothing at a path is found out when it is read.
        flag: the option they came from, for messages.

    Raises:
        UserError: the prepared folder is not finished, or damaged.
    """
    held: ImageSource
    if root and (tars := local_tars(root, flag)):
        held = open_tars(*tars, root, flag)
    elif root and (prepared := _prepared(Path(root), flag)):
        held = _open_prepared(*prepared, root, flag)
    else:
        return ImageSource(root, paths)
    asked = {os.path.normpath(path): -1 for path in paths}
    for index in range(len(held)):
        path = held.relative_path(index)
        if path in asked:
            asked[path] = index
    assert held.members is not None
    return ImageSource(root, paths, held.members.subset([asked[os.path.normpath(path)] for path in paths]))


def is_there(path: str) -> bool:
    """Whether there is a file or folder of this name, or one in a prepared folder or tar files of this machine."""
    if path.startswith(_LIBRARIES) or is_address(path):
        return False
    try:
        if Path(path).exists():
            return True
        tars = local_tars(path, "")
        if not tars and (prepared := _prepared(Path(path), "")):
            return len(_open_prepared(*prepared, path, "")) > 0
        tars = tars or _folder_of_tars(Path(path))
        return tars is not None and (not tars[1] or len(open_tars(*tars, path, "")) > 0)
    except (UserError, OSError, ValueError):  # also a name that is too long, or no name
        return False


def folders_in(path: str, flag: str) -> list[str]:
    """Names of the folders right below a folder, prepared or not, or in tar files; none where it cannot be read.

    Raises:
        UserError: the prepared folder is not finished, or damaged, or the tar files cannot be read.
    """
    if path.startswith(_LIBRARIES):
        return []
    source = _elsewhere(path, flag)
    if source is None and (prepared := _prepared(Path(path), flag)) is not None:
        source = _open_prepared(*prepared, path, flag)
    if source is None:
        try:
            with os.scandir(path) as entries:
                children = [(entry.name, entry.is_dir()) for entry in entries]
        except OSError:
            return []
        folders = [name for name, is_folder in children if is_folder]
        if folders or not any(name.endswith(".tar") for name, _ in children):
            return folders
        source = open_source(path, flag)
    source = source.listed()
    parts = (source.relative_path(index).split(b"/", 1) for index in range(len(source)))
    return sorted({os.fsdecode(part[0]) for part in parts if len(part) > 1})


def _prepared(path: Path, flag: str) -> tuple[Path, bytes] | None:
    """The prepared folder that a path names or leads into, and the path of the originals below; None if none does.

    Raises:
        UserError: preparing it was not finished.
    """
    try:
        folder = next(place for place in (path, *path.parents) if place.exists())
    except (StopIteration, OSError, ValueError):
        return None
    if is_unfinished(folder):
        raise UserError(f"{flag} {folder}: not finished; lomar prepare --out {folder} --resume goes on with it")
    if not is_finished(folder):
        return None
    inside = path.relative_to(folder).as_posix()
    return folder, b"" if inside == "." else os.fsencode(inside)


def _open_prepared(folder: Path, inside: bytes, data: str, flag: str) -> ImageSource:
    """The images of a prepared folder, of a folder among its originals, or one image of it.

    Raises:
        UserError: there is no such image or folder, or the prepared folder is damaged.
    """
    index = read_index(folder, f"{flag} {folder}")
    everything = range(len(index.ends))
    if not inside:
        return ImageSource(data, map(index.path, everything), index.members)
    below = inside + b"/"
    found = [number for number in everything if index.path(number).startswith(below)]
    if found:
        paths = (index.path(number).removeprefix(below) for number in found)
        return ImageSource(data, paths, index.members.subset(found))
    found = [number for number in everything if index.path(number) == inside]
    if not found:
        raise UserError(f"{flag} {data}: no such folder or file among the images prepared in {folder}")
    return ImageSource(str(Path(data).parent), [inside.rsplit(b"/", 1)[-1]], index.members.subset(found))


def _files_below(root: bytes, endings: tuple[bytes, ...]) -> Iterator[bytes]:
    """Paths of the files of some endings below a folder, relative to it, sorted folder by folder; runs of lomar are
    left out."""
    seen: set[tuple[int, int]] = set()  # a symbolic link may lead back up: enter each real folder once

    def walk(folder: bytes, prefix: bytes) -> Iterator[bytes]:
        status = os.stat(folder)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return
        seen.add(identity)
        with os.scandir(folder) as entries:
            # Only the names are kept: the entries of a flat folder of a million files would be large.
            children = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[:1] != b".")
        if {name for name, _ in children} >= _RUN_MARKS:
            return  # a run's own pictures are no data
        for name, is_folder in children:
            if is_folder:
                yield from walk(os.path.join(folder, name), prefix + name + b"/")  # noqa: PTH118
            elif name.lower().endswith(endings):
                yield prefix + name

    return walk(root, b"")


def _listed(path: Path) -> Iterator[bytes]:
    for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines():  # some editors write a BOM
        entry = line.strip()
        if entry and not entry.startswith(b"#"):
            yield entry


def _embedded_sample(flag: str) -> ImageSource:
    files: list[bytes] = []
    for package, folder, names in _SAMPLE:
        spec = importlib.util.find_spec(package)  # finds the package without importing it
        for location in (spec.submodule_search_locations or []) if spec else []:
            candidates = (Path(location, folder, name) for name in names.split())
            files += [os.fsencode(path) for path in candidates if path.is_file()]
    if not files:
        raise UserError(f"{flag} sample: the installed scikit-image and scikit-learn carry no photographs")
    return ImageSource("", files)
