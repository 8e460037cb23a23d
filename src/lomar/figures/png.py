"""PNG files."""

from pathlib import Path

from PIL import Image

from lomar.files import write_atomically


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG that appears whole or not at all; one that was there is replaced."""
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", optimize=True))
