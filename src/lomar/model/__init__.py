"""The encoder. Importing this package registers `lomar_vit_*` with timm."""

from lomar.model.encoder import SIZES, Encoder

__all__ = ["SIZES", "Encoder"]
