"""`lomar map`: an embedding as a map of thumbnails, and the nearest neighbours of some of its images."""

import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from lomar.data.augment import centre_crop
from lomar.data.decode import PixelFormat, read_image
from lomar.data.opening import images_at, is_there
from lomar.data.survey import spread
from lomar.downstream.embedding import Embedding, nearest, read_embedding, unit_length
from lomar.errors import BadImageError, UserError
from lomar.figures.map import MOST_COLOURS, NEAREST_PX, Shown, cell_px, map_figure, nearest_figure
from lomar.figures.png import save_png
from lomar.figures.sheet import Rgb, rgb, shown_range
from lomar.options import MapOptions

_LEAST = 3  # images of a map
_QUERIES = 6  # where none are chosen
_PERPLEXITY = 30.0  # scikit-learn's own; t-SNE asks for three times as many images
_NAMES_COMPARED = 50_000  # paths that one which is not there is compared with


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar map` with the options that were given; returns the exit status."""
    for name in ("embedding", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar map --help")
    options = MapOptions(**given)
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {options.out}; it must end in .png")
    beside = out.with_name(f"{out.stem}-nearest.png")
    for picture in (out, beside):
        if picture.exists() and not options.overwrite:
            raise UserError(f"--out: {picture} already exists; --overwrite replaces it")
    embedding = read_embedding(options.embedding)
    usable = _usable(embedding, options.embedding)
    photos = _Photos(embedding, _root(embedding, options.data))
    queries = _queries(embedding, usable, options.queries, photos.root)
    drawn, about_map = _map(embedding, usable, photos, options)
    sheet, about_sheet = _sheet(embedding, photos, queries, options.neighbours)
    try:
        save_png(drawn, out)
        save_png(sheet, beside)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"{out}: {about_map}\n{beside}: {about_sheet}\n")
    if photos.missing:
        sys.stdout.write(
            f"{len(photos.missing)} images are not there or cannot be read; their tiles are empty, "
            f"for example {_printable(min(photos.missing))}\n"
        )
    return 0


def _usable(embedding: Embedding, file: str) -> NDArray[np.int64]:
    """Numbers of the good images.

    Raises:
        UserError: they cannot be laid out.
    """
    if embedding.features.ndim != 2:
        shape = " x ".join(map(str, embedding.features.shape[1:]))
        raise UserError(
            f"--embedding {file} holds {shape} numbers an image, of patches; a map needs one vector an image"
        )
    usable = np.flatnonzero(embedding.good)
    if len(usable) < _LEAST:
        raise UserError(f"--embedding {file} holds {len(usable)} good images; a map needs at least {_LEAST}")
    if embedding.features.shape[1] < 2:
        raise UserError(f"--embedding {file} holds one number an image; a map needs two")
    return usable


def _root(embedding: Embedding, data: str | None) -> str:
    """The folder that paths start from.

    Raises:
        UserError: the one given is none.
    """
    if data is None:
        return embedding.root
    if not is_there(data) or Path(data).is_file():
        raise UserError(f"--data {data}: no such folder")
    return str(Path(data).absolute())


class _Photos:
    """The images of an embedding, read as thumbnails; `missing` are the files that could not be."""

    def __init__(self, embedding: Embedding, root: str) -> None:
        self._source = images_at(root, [os.fsencode(path) for path in embedding.paths], "--data")
        self.root = root
        self.missing: set[str] = set()

    def thumbnails(self, indices: Sequence[int], side: int) -> list[Rgb | None]:
        """The middle square of each image, (side, side, 3); None of those that cannot be read."""
        return [self._thumbnail(index, side) for index in indices]

    def _thumbnail(self, index: int, side: int) -> Rgb | None:
        path = os.fsdecode(self._source.path(index))
        try:
            image = read_image(self._source.read(index), path)
            box = centre_crop(image.height, image.width, share=1.0)
            pixels = image.crop(box, (side, side), PixelFormat(image.channels, image.dtype))
        except (BadImageError, OSError):
            self.missing.add(path)
            return None
        return rgb(pixels, shown_range(pixels))


def _queries(embedding: Embedding, usable: NDArray[np.int64], asked: tuple[str, ...] | None, root: str) -> list[int]:
    """Numbers of the images whose neighbours to draw.

    Raises:
        UserError: one is not among the good ones; with paths that are close to it.
    """
    if asked is None:
        return usable[spread(len(usable), _QUERIES)].tolist()
    numbers = {path: number for number, path in enumerate(embedding.paths)}
    queries = []
    for query in dict.fromkeys(asked):
        # As in the file; as the shell completes it, from here; or through another link.
        absolute, real = os.path.abspath(query), os.path.realpath(query)  # noqa: PTH100 (links stay)
        start = root or "/"
        spelled = (query, absolute, os.path.relpath(absolute, start), os.path.relpath(real, os.path.realpath(start)))
        number = next((numbers[path] for path in spelled if path in numbers), None)
        if number is None:
            raise UserError(f"--queries {query}: no such image in the embedding{_close_to(query, embedding.paths)}")
        if not embedding.good[number]:
            raise UserError(f"--queries {query}: it could not be used when the embedding was made")
        queries.append(number)
    return queries


def _close_to(query: str, paths: Sequence[str]) -> str:
    """' (there is ...)' for paths of the same file name, or of a similar spelling."""
    name = PurePath(query).name
    close = [path for path in paths if PurePath(path).name == name][:3]
    close = close or get_close_matches(query, paths[:_NAMES_COMPARED], n=3)
    return f" (there is {_printable(', '.join(close))})" if close else ""


def _map(
    embedding: Embedding, usable: NDArray[np.int64], photos: _Photos, options: MapOptions
) -> tuple[Image.Image, str]:
    """The map, and what it shows.

    Raises:
        UserError: no image is where it was, or all have the same features.
    """
    chosen = usable[spread(len(usable), options.limit)]
    # Read before the layout, which takes longest: without images there is nothing to lay out.
    thumbnails = photos.thumbnails(chosen.tolist(), cell_px(len(chosen)))
    if all(thumbnail is None for thumbnail in thumbnails):
        raise UserError(
            f"--embedding {options.embedding}: none of its images can be read, for example "
            f"{_printable(min(photos.missing))}; --data says where they are now"
        )
    try:
        places, method = layout(unit_length(embedding.features[chosen]), options.method, options.seed)
    except ValueError as error:
        raise UserError(f"--embedding {options.embedding}: {error}") from None
    groups, names = folders_of([embedding.paths[index] for index in chosen])
    note = ""
    if options.colour_by == "folder" and len(names) > MOST_COLOURS:
        note = f" {len(names)} folders are too many for colours."
    if options.colour_by == "none" or not 2 <= len(names) <= MOST_COLOURS:
        groups, names = [0] * len(chosen), []
    of = f" of {len(embedding.good)}" if len(chosen) < len(embedding.good) else ""
    about = f"{len(chosen)}{of} images by {method}.{note}"
    caption = f"{_subject(embedding)}: {about} Each image stands in the free cell nearest to its place."
    return map_figure(thumbnails, places, groups, [_printable(name) for name in names], caption), about


def layout(features: NDArray[np.float32], method: str, seed: int) -> tuple[NDArray[np.floating], str]:
    """Places (n, 2) of features (n, D), and how they came about.

    Args:
        features: of three images or more, at unit length.
        method: "tsne" or "pca".
        seed: fixes t-SNE.

    Raises:
        ValueError: all features are the same.
    """
    if not np.ptp(features, axis=0).any():
        raise ValueError("all images have the same features")
    if method == "pca":
        pca = PCA(2, random_state=seed)
        places = pca.fit_transform(features)
        first, second = pca.explained_variance_ratio_
        return places, f"PCA, whose two axes have {first:.0%} and {second:.0%} of the variance"
    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return tsne.fit_transform(features), f"t-SNE of perplexity {perplexity:.3g}"


def folders_of(paths: Sequence[str]) -> tuple[list[int], list[str]]:
    """Of each path the number of its first folder that not all paths share; and the names of these folders."""
    parts = [PurePath(path).parts[:-1] for path in paths]
    shared = 0
    while len({folders[: shared + 1] for folders in parts}) == 1 and len(parts[0]) > shared:
        shared += 1
    firsts = [folders[shared] if len(folders) > shared else "." for folders in parts]
    names = sorted(set(firsts))
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[first] for first in firsts], names


def _sheet(embedding: Embedding, photos: _Photos, queries: list[int], count: int) -> tuple[Image.Image, str]:
    """The nearest neighbours of the queries, and what the picture shows."""
    neighbours, similarities = nearest(embedding, queries, count)
    rows = []
    for query, places, values in zip(queries, neighbours.tolist(), similarities.tolist(), strict=True):
        titles = [PurePath(embedding.paths[query]).name, *(f"{value:.3f}" for value in values)]
        indices = [query, *places]
        folders = [PurePath(embedding.paths[index]).parent.name for index in indices]
        pictures = photos.thumbnails(indices, NEAREST_PX)
        rows.append(
            [
                Shown(picture, _printable(title), _printable(folder))
                for picture, title, folder in zip(pictures, titles, folders, strict=True)
            ]
        )
    about = f"{neighbours.shape[1]} neighbours of {len(queries)} images among {embedding.good.sum()}"
    caption = f"{_subject(embedding)}: {about}, by cosine similarity."
    return nearest_figure(rows, caption), about


def _subject(embedding: Embedding) -> str:
    """What was embedded with what, for a caption."""
    about = embedding.about
    return f"{about.get('model')}, layer {about.get('layer')}, {about.get('features')}"


def _printable(text: str) -> str:
    """A path as it can be shown: what is no text in it is replaced."""
    return os.fsencode(text).decode(errors="replace")
