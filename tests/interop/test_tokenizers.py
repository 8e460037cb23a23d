"""Claims about tokenizer files: ours come back as they were, OpenAI's are read without being run."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lomar.errors import UserError
from lomar.interop.tokenizers import load_tokenizer, save_tokenizer
from lomar.methods.tokenizer import DiscreteVAE, DVAEDecoder, DVAEEncoder

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def tokenizer(channels: int = 3, width: int = 12, vocab: int = 7, blocks: int = 2) -> DiscreteVAE:
    torch.manual_seed(0)
    low, high = [3.5] * channels, [200.25 + c for c in range(channels)]
    sizes = {"channels": channels, "width": width, "vocab": vocab, "blocks_per_group": blocks}
    return DiscreteVAE.build(**sizes, low=low, high=high).eval()


def pixels(channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (2, channels, 24, 40), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


# torch stores the source of a module's class with it, where it finds it.
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")


# Ours


@pytest.mark.parametrize("has_decoder", [True, False])
def test_a_saved_tokenizer_comes_back(has_decoder: bool, tmp_path: Path) -> None:
    dvae = DiscreteVAE.build(
        **tokenizer(channels=2).architecture | {"has_decoder": has_decoder, "pixel_type": "uint16"}
    )
    save_tokenizer(tmp_path / "t.safetensors", dvae)
    loaded = load_tokenizer(tmp_path / "t.safetensors")
    assert loaded.architecture == dvae.architecture
    assert torch.equal(loaded.tokens(pixels(2)), dvae.tokens(pixels(2)))
    if has_decoder:
        assert torch.equal(loaded.decode(dvae.tokens(pixels(2))), dvae.decode(dvae.tokens(pixels(2))))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_tokenizer_file_holds_the_learnt_tensors_under_dall_es_names(tmp_path: Path) -> None:
    dvae = tokenizer()
    save_tokenizer(tmp_path / "t.safetensors", dvae)
    names = {f"encoder.{name}" for name in DVAEEncoder(width=4, vocab=2).state_dict()}
    names |= {f"decoder.{name}" for name in DVAEDecoder(width=4, vocab=2).state_dict()}
    assert set(load_file(tmp_path / "t.safetensors")) == names


# OpenAI's


class Stranger(nn.Module):
    """A convolution as the package `dall_e` has it: `w` and `b`, and attributes that are no tensors."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.kw, self.use_float16, self.device, self.requires_grad = w.shape[-1], True, torch.device("cpu"), False
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)


class StrangeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.post_gain = 1 / 64
        self.unused = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="nearest"), nn.Identity(), nn.ReLU()


class StrangeNet(nn.Module):
    """Modules nested as the names of a state dict say."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name in sorted({name.rpartition(".")[0] for name in state}):
            place: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, StrangeBlock() if part.startswith("block_") else nn.Sequential())
                place = place.get_submodule(part)
            place.add_module(last, Stranger(state[f"{name}.w"], state[f"{name}.b"]))


@pytest.fixture
def dall_e(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, Path, bool], None]:
    """Saves whole modules as the package `dall_e` would; the package exists while it saves, not after."""

    def save(module: nn.Module, path: Path, zipped: bool) -> None:
        homes = {"dall_e.utils": Stranger, "dall_e.encoder": StrangeNet, "dall_e.decoder": StrangeBlock}
        with monkeypatch.context() as context:
            context.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            for home, kind in homes.items():
                there = types.ModuleType(home)
                setattr(there, kind.__name__, kind)
                context.setitem(sys.modules, home, there)
                context.setattr(kind, "__module__", home)
            torch.save(module, path, _use_new_zipfile_serialization=zipped)
        assert "dall_e.utils" not in sys.modules
        assert zipfile.is_zipfile(path) == zipped

    return save


def saved(dall_e, folder: Path, zipped: bool = True, decoder: bool = True, **sizes: int) -> DiscreteVAE:
    """What encoder.pkl and decoder.pkl, now in the folder, hold."""
    dvae = tokenizer(**sizes)
    dall_e(StrangeNet(dvae.encoder.state_dict()), folder / "encoder.pkl", zipped)
    if decoder:
        dall_e(StrangeNet(dvae.decoder.state_dict()), folder / "decoder.pkl", zipped)
    return dvae


@FORMATS
@pytest.mark.parametrize("decoder", [True, False], ids=["with decoder", "encoder alone"])
@pytest.mark.parametrize("name", [".", "encoder.pkl"])
def test_openais_files_are_read_without_their_package(
    dall_e, zipped: bool, decoder: bool, name: str, tmp_path: Path
) -> None:
    dvae = saved(dall_e, tmp_path, zipped, decoder)
    loaded = load_tokenizer(tmp_path / name)
    assert "dall_e" not in sys.modules
    for half in ("encoder", "decoder") if decoder else ("encoder",):
        for key, tensor in getattr(dvae, half).state_dict().items():
            assert torch.equal(getattr(loaded, half).state_dict()[key], tensor), key
    assert (loaded.decoder is not None) == decoder
    as_they_are = DiscreteVAE(dvae.encoder, None, [0] * 3, [255] * 3)
    assert torch.equal(loaded.tokens(pixels()), as_they_are.tokens(pixels()))
    assert loaded.pixel_type == "uint8"


@pytest.mark.parametrize("sizes", [(1, 4, 5, 1), (2, 20, 11, 3)])
def test_every_size_is_told_by_the_tensors(dall_e, sizes: tuple[int, ...], tmp_path: Path) -> None:
    names = ("channels", "width", "vocab", "blocks")
    saved(dall_e, tmp_path, **dict(zip(names, sizes, strict=True)))
    found = load_tokenizer(tmp_path).architecture
    assert tuple(found[n] for n in ("channels", "width", "vocab", "blocks_per_group")) == sizes
    assert (found["low"], found["high"]) == ([0.0] * sizes[0], [255.0] * sizes[0])


@FORMATS
def test_a_state_dict_of_the_encoder_does_as_well(zipped: bool, tmp_path: Path) -> None:
    dvae = tokenizer()
    torch.save(dvae.encoder.state_dict(), tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_tokenizer(tmp_path / "weights.pth")
    assert all(torch.equal(loaded.encoder.state_dict()[k], v) for k, v in dvae.encoder.state_dict().items())


def test_tensors_that_share_memory_and_half_precision_are_read(tmp_path: Path) -> None:
    state = tokenizer().encoder.state_dict()
    together = torch.cat([tensor.flatten() for tensor in state.values()]).half()
    parts = together.split([tensor.numel() for tensor in state.values()])
    views = {name: part.view_as(state[name]) for name, part in zip(state, parts, strict=True)}
    torch.save(views, tmp_path / "weights.pth")
    loaded = load_tokenizer(tmp_path / "weights.pth").encoder.state_dict()
    assert all(torch.equal(loaded[name], state[name].half().float()) for name in state)


# Refusals: one line that names the file


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


class Evil:
    """Leaves a mark where it is unpickled by someone who runs what a pickle asks for."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@FORMATS
@pytest.mark.parametrize("hidden", [False, True], ids=["alone", "inside a module"])
def test_a_pickle_that_asks_to_run_something_is_refused_and_runs_nothing(
    dall_e, zipped: bool, hidden: bool, tmp_path: Path
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "encoder.pkl"
    evil = Evil(f"touch {mark}")
    if hidden:
        module = StrangeNet(tokenizer().encoder.state_dict())
        module.blocks.get_submodule("group_1.block_1").post_gain = evil
        dall_e(module, path, zipped)
    else:
        torch.save({"blocks.input.w": evil}, path, _use_new_zipfile_serialization=zipped)
    assert "is refused: its pickle asks for posix.system" in refusal(path)
    assert not mark.exists()
    if not hidden:
        torch.load(path, weights_only=False)
        assert mark.exists()  # it would have


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.load", "dall_e_evil.run", "torch.nn.Module"]
)
def test_any_name_that_is_no_module_and_no_tensor_is_refused(name: str, tmp_path: Path) -> None:
    module, _, function = name.rpartition(".")
    pickled = b"c" + f"{module}\n{function}\n".encode() + b"."
    with zipfile.ZipFile(tmp_path / "encoder.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    assert f"asks for {name}" in refusal(tmp_path / "encoder.pkl")


@FORMATS
def test_a_truncated_file_is_refused(dall_e, zipped: bool, tmp_path: Path) -> None:
    saved(dall_e, tmp_path, zipped, decoder=False)
    path = tmp_path / "encoder.pkl"
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:length])
        assert "is not a module or state dict of torch.save" in refusal(path)


def test_more_numbers_than_the_file_has_are_not_made_room_for(tmp_path: Path) -> None:
    """By a storage said to be larger than the file, or by one number that is repeated."""
    path = tmp_path / "weights.pth"
    torch.save({"blocks.input.w": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert "is not a module or state dict" in refusal(path)
    torch.save({"blocks.input.w": torch.zeros(1000)}, path)
    forged = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(forged, "w") as copy:
        for info in archive.infolist():
            data = archive.read(info)
            if info.filename.endswith("data.pkl"):
                assert data.count(b"M\xe8\x03") == 2
                data = data.replace(b"M\xe8\x03", b"J\x00\x00\x00\x70")  # 1000 -> 1.9 billion
            copy.writestr(info.filename, data)
    path.write_bytes(forged.getvalue())
    assert "is not a module or state dict" in refusal(path)


def test_files_of_other_things_are_refused(dall_e, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    path.write_text("no pickle")
    assert "is not a module or state dict" in refusal(path)
    path.write_bytes(pickle.dumps([1, 2]))
    assert "is not a module or state dict" in refusal(path)
    torch.save([1, 2], path)
    assert "is not a module or state dict" in refusal(path)
    torch.save({"step": 3}, path)
    assert "holds something else than a module or a state dict" in refusal(path)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)), path)
    assert "there is no convolution blocks.input.w in it" in refusal(path)
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    assert "holds weights of something else, not the tokenizer" in refusal(file)


def test_the_decoder_in_the_encoders_place_is_told(dall_e, tmp_path: Path) -> None:
    saved(dall_e, tmp_path)
    assert "holds DALL-E's decoder; tokens are made by its encoder.pkl" in refusal(tmp_path / "decoder.pkl")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_tensor_that_does_not_fit_is_named_with_its_file(half: str, dall_e, tmp_path: Path) -> None:
    dvae = saved(dall_e, tmp_path)
    state, path = getattr(dvae, half).state_dict(), tmp_path / f"{half}.pkl"
    key = "blocks.group_2.block_2.res_path.conv_3.b"

    def message(**changed: Tensor) -> str:
        torch.save(state | changed, path)
        with pytest.raises(UserError) as error:
            load_tokenizer(tmp_path)
        return str(error.value).removeprefix(str(path))

    found = message(**{key: torch.zeros(8)})
    assert found == f" does not hold a tokenizer that fits: {key} is (8,), not {tuple(state[key].shape)}"
    assert message(more=torch.zeros(8)) == " does not hold a tokenizer: there is more in it"
    del state[key]
    assert message() == f" does not hold a whole tokenizer: {key} is missing"


def test_a_path_that_leads_nowhere_says_what_it_can_be(tmp_path: Path) -> None:
    assert "there is no tokenizer" in refusal(tmp_path / "nowhere.pkl")
    assert "holds no encoder.pkl; it can be a file of lomar tokenizer train" in refusal(tmp_path)
    (tmp_path / "encoder.pkl").mkdir()
    assert "cannot be read: Is a directory" in refusal(tmp_path)
