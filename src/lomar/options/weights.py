"""Options of the commands that translate weights."""

from dataclasses import dataclass

from lomar.options.fields import option


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Turn a checkpoint of LoMaR, MAE, BEiT, DINO or MoCo v3 into lomar's files, or lomar's files into such a one."""

    model: str = option(
        "released checkpoint (.pth), pretrained or fine-tuned; with --to official: a run's folder, or one of its "
        ".safetensors",
        metavar="FILE",
    )
    out: str = option(
        "FILE.safetensors: the encoder; a folder: encoder.safetensors, and reconstructor.safetensors where all of "
        "pretraining is there; with --to official: FILE.pth",
        metavar="OUT",
    )
    to: str = option("whose files to write", default="lomar", choices=("lomar", "official"), metavar="NAME")
    image_size: int | None = option(
        "resize tables of positions for images of this side, in pixels", default=None, low=1, metavar="PX"
    )
    heads: int | None = option(
        "attention heads of MAE's, DINO's or MoCo v3's encoder, if not as released: width / 64 for most",
        default=None,
        low=1,
        metavar="N",
    )
    decoder_heads: int | None = option(
        "attention heads of MAE's decoder, if not as released: width / 32", default=None, low=1, metavar="N"
    )
    target: str | None = option(
        "what LoMaR or MAE predicted, if the checkpoint does not say",
        default=None,
        choices=("normalised-pixels", "pixels"),
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write an encoder or a classifier for other tools: timm and the Hugging Face hub, ONNX, torch.export."""

    model: str = option(
        "a run's folder, a file of its weights, a folder that this command wrote, or a released checkpoint",
        metavar="RUN",
    )
    to: str = option("what to write", choices=("hub-folder", "onnx", "torch-export"), metavar="NAME")
    out: str = option("hub-folder: a folder; onnx: FILE.onnx; torch-export: FILE.pt2", metavar="OUT")
    image_size: tuple[int, ...] | None = option(
        "side of the image, or height and width, in pixels", default=None, auto="the model's", low=1, metavar="PX"
    )
    output: str = option(
        "what it gives: logits or pooled features, or all tokens after the last norm",
        default="head",
        choices=("head", "tokens"),
        metavar="NAME",
    )
    opset: int = option("ONNX operator set", default=18, low=18, metavar="N")
    license: str | None = option(
        "licence of the weights, for the hub's model card: apache-2.0, mit, cc-by-4.0, other ...",
        default=None,
        metavar="ID",
    )
    overwrite: bool = option("replace what is in --out", default=False)
