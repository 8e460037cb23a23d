"""Claims about damaged files of our own: read as what they say, or refused by one line."""

import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzz.mutation import examples, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lomar as package
from lomar.cli import main
from lomar.data.labels import labelled_data
from lomar.data.opening import open_source
from lomar.data.shards import INDEX_FILE, is_finished, read_index
from lomar.downstream.embedding import read_embedding
from lomar.errors import UserError
from lomar.interop.tokenizers import load_tokenizer, save_tokenizer
from lomar.interop.weights import load_reconstructor
from lomar.methods.tokenizer import DiscreteVAE
from lomar.options import PretrainOptions, fields_of, read_config
from lomar.training.checkpoint import Checkpoints
from lomar.training.records import Metrics


def refused_in_one_line(read: Callable[[], Any]) -> Any:
    """What is read, or None where it is refused."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 600
        return None


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "images"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["prepare", "--data", str(photos), "--out", str(folder), "--workers", "0"]) == 0
    return folder


def test_a_damaged_index_of_shards_is_refused_or_leads_to_images_within_them(prepared: Path, tmp_path: Path) -> None:
    file = tmp_path / "images" / INDEX_FILE
    shutil.copytree(prepared, file.parent)

    @examples(150)
    @given(content=mutated([file.read_bytes()]))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        if is_finished(file.parent):
            index = refused_in_one_line(lambda: read_index(file.parent, "--data"))
            if index is not None:
                assert all(index.members.read(number) for number in range(len(index.ends)))
        refused_in_one_line(lambda: open_source(str(file.parent)))

    holds()


@pytest.mark.parametrize("name", ["encoder.safetensors", "reconstructor.safetensors", "tokenizer.safetensors"])
def test_damaged_weights_are_refused_or_are_a_model(name: str, finished_run: Path, tmp_path: Path) -> None:
    file, read = tmp_path / name, {"encoder": package.load, "reconstructor": load_reconstructor}.get(name.split(".")[0])
    if read is None:
        bounds = {"low": [0] * 3, "high": [255] * 3}
        save_tokenizer(file, DiscreteVAE.build(channels=3, width=4, vocab=11, blocks_per_group=1, **bounds))
        read = load_tokenizer
    else:
        shutil.copy(finished_run / name, file)

    @examples(150)
    @given(content=mutated([file.read_bytes()]))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        refused_in_one_line(lambda: read(file))

    holds()


def test_a_damaged_file_of_torch_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.pth"
    torch.save({"model": {"pos_embed": torch.zeros(1, 5, 8), "cls_token": torch.zeros(1, 1, 8)}}, file)

    @examples(60)
    @given(content=mutated([file.read_bytes()]))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        assert refused_in_one_line(lambda: package.load(file)) is None

    holds()


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_damaged_embedding_is_refused_or_is_one(
    ending: str, photos: Path, finished_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"some.{ending}"
    words = ["embed", "--model", str(finished_run), "--data", str(photos), "--out", str(file), "--workers", "0"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0

    @examples(100)
    @given(content=mutated([file.read_bytes()]))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        found = refused_in_one_line(lambda: read_embedding(file))
        if found is not None:
            assert len(found.features) == len(found.paths)

    holds()


def test_of_a_damaged_checkpoint_nothing_is_used(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"weights": torch.full((3,), float(step)), "finished": False})
    whole = checkpoints.path(2).read_bytes()

    @examples(150)
    @given(content=mutated([whole]))
    def holds(content: bytes) -> None:
        checkpoints.path(2).write_bytes(content)
        warnings: list[str] = []
        found = checkpoints.load(warnings.append)
        assert found is not None
        step, state = found
        assert state["weights"].tolist() == [step] * 3 and step == (2 if content == whole else 1)
        assert len(warnings) == (step == 1) and "\n" not in "".join(warnings)

    holds()


ODD_ROWS = b'{"step": 1e400}\n[1]\n{"step": true}\n\n'


def test_of_damaged_metrics_the_whole_rows_are_read(finished_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"

    @examples(150)
    @given(content=mutated([(finished_run / "metrics.jsonl").read_bytes(), ODD_ROWS]))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        rows = Metrics.read(file)
        assert all(isinstance(row["step"], int) for row in rows)
        Metrics.cut(file, after_step=2)
        assert Metrics.read(file) == [row for row in rows if row["step"] <= 2]

    holds()


def yaml_values() -> st.SearchStrategy[Any]:
    """What a line of YAML can hold."""
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    return plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=3), plain, max_size=2)


@examples(200)
@given(values=st.dictionaries(st.sampled_from(sorted(fields_of(PretrainOptions))) | st.text(max_size=9), yaml_values()))
def test_any_values_in_a_configuration_are_converted_or_refused(values: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(yaml.safe_dump(values))
        file.flush()
        read = refused_in_one_line(lambda: read_config(file.name, PretrainOptions))
        assert read is None or set(read) <= set(fields_of(PretrainOptions))


@pytest.mark.parametrize("form", ["mutated", "bytes"])
def test_a_damaged_configuration_is_read_or_refused(form: str, finished_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    odd = [b"&a [*a, *a]", b"!!python/object/apply:os.system [ls]", b"? [1, 2]\n: 3", b"a: &x {b: *x}", b"--- 1\n--- 2"]
    odd += [b"- " * 50, b"seed: 0o7777777777777777777777", b"views: 1_000", b"data: 2026-01-01 25:61:00"]
    whole = (finished_run / "config.yaml").read_bytes()
    contents = mutated([whole, *odd]) if form == "mutated" else st.binary(max_size=60) | st.sampled_from(odd)

    @examples(150)
    @given(content=contents)
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        refused_in_one_line(lambda: read_config(str(file), PretrainOptions))

    holds()


def test_a_run_whose_configuration_is_damaged_goes_on_or_is_refused(
    finished_run: Path, tmp_path: Path, miniature: None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    whole = (run / "config.yaml").read_bytes()

    @examples(60)
    @given(content=mutated([whole]))
    def holds(content: bytes) -> None:
        (run / "config.yaml").write_bytes(content)
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            status = main(["pretrain", "--resume", "--out", str(run)])
        told = errors.getvalue()
        assert status == 0 or (status == 2 and told.startswith("lomar: error: ") and told.count("\n") == 1), told

    holds()


def test_a_damaged_list_or_table_is_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    rows = [f"{label}/{number}.png" for label in "ab" for number in range(2)]
    table = "path,label,split\n" + "".join(f"{row},{row[0]},{'train' if '0' in row else 'val'}\n" for row in rows)

    @examples(100)
    @given(listed=mutated(["\n".join(rows).encode()]), content=mutated([table.encode()]))
    def holds(listed: bytes, content: bytes) -> None:
        (tmp_path / "some.txt").write_bytes(listed)
        source = refused_in_one_line(lambda: open_source(str(tmp_path / "some.txt")))
        for index in range(len(source) if source else 0):
            with contextlib.suppress(OSError):
                source.read(index)
        (tmp_path / "some.csv").write_bytes(content)
        refused_in_one_line(lambda: labelled_data(str(tmp_path / "some.csv"), seed=0))

    holds()


# Each once ended in another error, or would have filled the memory.
ODD_CONFIGURATIONS = {
    "a date that is none": ("data: 2026-01-01 25:61:00", "hour must be in 0..23"),
    "lists without end": ("[" * 1000, "is not valid YAML"),
    "references without end": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{chr(c)}: &{chr(c)} [{', '.join(['*' + chr(c - 1)] * 9)}]\n" for c in range(98, 108))
        + "views: *k",
        "there is no option 'a'",
    ),
    "a value of references": (
        "views: [&a [1, 1, 1, 1, 1, 1, 1, 1, 1], "
        + ", ".join(f"&{chr(c)} [{', '.join(['*' + chr(c - 1)] * 9)}]" for c in range(98, 108))
        + "]",
        "--views is [[1, 1, 1, 1, 1, 1, ...], [[...], [...],",
    ),
    "a number of thousands of digits": ("views: 0x1" + "0" * 5_000, "--views is a very large number"),
    "more steps than can be counted": ("epochs: 1.0e+300", "it must be a number, at most 1,000,000,000"),
    "a batch that fills the memory": ("batch_size: 99999999999", "at most 16,777,216"),
}


@pytest.mark.parametrize("kind", ODD_CONFIGURATIONS)
def test_an_odd_configuration_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    text, reason = ODD_CONFIGURATIONS[kind]
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(str(tmp_path / "some.yaml"), PretrainOptions)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("encoder", {"num_heads": 0, "patch_size": 0}), ("reconstructor", {"num_heads": 0})],
)
def test_weights_whose_numbers_are_changed_are_refused(
    name: str, numbers: dict[str, int], finished_run: Path, tmp_path: Path
) -> None:
    """Each in its own way: by a division, by a size that does not fit."""
    whole = (finished_run / f"{name}.safetensors").read_bytes()
    for number, value in numbers.items():
        content = re.sub(rf'({number}\\": )(\d+)'.encode(), rb"\g<1>" + str(value).encode(), whole)
        content = (int.from_bytes(whole[:8], "little") + len(content) - len(whole)).to_bytes(8, "little") + content[8:]
        (tmp_path / "some.safetensors").write_bytes(content)
        read = package.load if name == "encoder" else load_reconstructor
        assert content != whole
        with pytest.raises(UserError, match=f"does not hold a whole {name}"):
            read(tmp_path / "some.safetensors")
