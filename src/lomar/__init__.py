"""LoMaR: self-supervised vision transformers from a folder of images.

    import lomar
    encoder = lomar.load("run")            # timm-compatible
    lomar.prepare(data="photos", out="small")
    lomar.pretrain(data="photos", out="run")
    lomar.finetune(model="run", data="labelled", out="classifier")
    lomar.evaluate(model="classifier", data="labelled")
    lomar.predict(model="classifier", images="photos", out="predictions.csv")
    lomar.detect(model="run", data="coco", out="detector")
    lomar.detect_evaluate(model="detector", data="coco")
    lomar.detect_predict(model="detector", images="photos", out="found")
    lomar.embed(model="run", data="photos", out="photos.safetensors")
    lomar.report(run="run")                # run/report.html

Importing lomar loads neither torch nor timm.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "detect",
    "detect_evaluate",
    "detect_predict",
    "embed",
    "evaluate",
    "finetune",
    "load",
    "predict",
    "prepare",
    "pretrain",
    "report",
]

if TYPE_CHECKING:
    from lomar.commands.detect import detect
    from lomar.commands.detect_evaluate import detect_evaluate
    from lomar.commands.detect_predict import detect_predict
    from lomar.commands.embed import embed
    from lomar.commands.evaluate import evaluate
    from lomar.commands.finetune import finetune
    from lomar.commands.predict import predict
    from lomar.commands.prepare import prepare
    from lomar.commands.pretrain import pretrain
    from lomar.commands.report import report
    from lomar.interop.weights import load


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lomar' has no attribute {name!r}")
    home = "lomar.interop.weights" if name == "load" else f"lomar.commands.{name}"
    return getattr(importlib.import_module(home), name)
