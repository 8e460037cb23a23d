"""LoMaR: self-supervised vision transformers from a folder of images.

    import lomar
    encoder = lomar.load("run")            # timm-compatible
    lomar.pretrain(data="photos", out="run")
    lomar.finetune(model="run", data="labelled", out="classifier")

Importing lomar loads neither torch nor timm.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["finetune", "load", "pretrain"]

if TYPE_CHECKING:
    from lomar.commands.finetune import finetune
    from lomar.commands.pretrain import pretrain
    from lomar.interop.weights import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from lomar.interop.weights import load

        return load
    if name == "pretrain":
        from lomar.commands.pretrain import pretrain

        return pretrain
    if name == "finetune":
        from lomar.commands.finetune import finetune

        return finetune
    raise AttributeError(f"module 'lomar' has no attribute {name!r}")
