import errno
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from forgetrain.engine.contract import Shard
from forgetrain.errors import UserError
from forgetrain.train import checkpoint
from forgetrain.train.world import World

ALONE = World(0, 1, "cpu", None, None)


class Engine:
    """Holds a state, in pieces where asked."""

    def __init__(self, tensors, rows=None):
        self.tensors, self.rows = tensors, rows

    def state(self):
        shards = {}
        for name, tensor in self.tensors.items():
            offsets = (0,) * tensor.dim()
            piece = tensor
            if self.rows is not None and tensor.dim():
                piece, offsets = tensor[self.rows], (self.rows.start, *offsets[1:])
            shards[name] = Shard(piece.clone(), tuple(tensor.shape), offsets)
        return shards

    def restore(self, state):
        self.restored = {name: shard.tensor for name, shard in state.items()}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "master/a": torch.randn(8, 3, generator=generator),
        "exp_avg/a": torch.randn(8, 3, generator=generator),
        "master/b": torch.randn(5, generator=generator),
        "step": torch.tensor(7),
    }


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def saved(tensors, tokenizer, tmp_path):
    root = tmp_path / "checkpoints"
    for step in (10, 20):
        checkpoint.save(Engine(tensors).state(), root, step, {"note": "kept"}, tokenizer, ALONE)
    return root


def test_round_trip(saved, tensors):
    found = checkpoint.newest(saved, warn=pytest.fail)
    assert (found.step, found.manifest["note"]) == (20, "kept")
    assert (found.path / "tokenizer" / "tokenizer.json").is_file()
    engine = Engine({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    checkpoint.load(engine, found.path, ALONE)
    assert all(torch.equal(engine.restored[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in saved.iterdir()] == [path.name for path in saved.glob("step-*")]


def test_masters_are_read_alone(saved, tensors):
    weights = checkpoint.read_masters(saved / "step-00000020", {"b": (5,)})
    assert torch.equal(weights["b"], tensors["master/b"])


@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 7), slice(7, 8)])
def test_a_piece_is_read_out_of_a_whole(saved, tensors, rows):
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    engine = Engine({name: torch.zeros_like(tensor) for name, tensor in matrices.items()}, rows)
    checkpoint.load(engine, saved / "step-00000020", ALONE)
    assert all(torch.equal(engine.restored[name], tensor[rows]) for name, tensor in matrices.items())


def test_pieces_know_their_place(tensors):
    piece = checkpoint.Piece.of(Shard(tensors["master/a"][2:5], (8, 3), (2, 0)))
    item = piece.__create_write_items__("master/a", piece)[0]
    assert (item.tensor_data.size, item.tensor_data.chunk.sizes, item.index.offset) == ((8, 3), (3, 3), (2, 0))


def damage_flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_flip, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is truncated"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_newest_falls_back_to_the_one_before(saved, damage, says):
    damage(saved / "step-00000020" / "__0_0.distcp")
    warnings = []
    found = checkpoint.newest(saved, warn=warnings.append)
    assert found.step == 10
    assert len(warnings) == 1
    assert "step-00000020/__0_0.distcp" in warnings[0]
    assert says in warnings[0]


def test_when_all_are_damaged_nothing_is_started_over(saved):
    for path in saved.glob("step-*"):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.newest(saved, warn=lambda line: None)


def test_a_half_written_checkpoint_is_none(saved, tensors, tokenizer):
    (saved / "step-00000020").rename(saved / ".step-00000030.partial")  # as a kill while saving leaves it
    assert checkpoint.newest(saved, warn=pytest.fail).step == 10
    checkpoint.save(Engine(tensors).state(), saved, 30, {}, tokenizer, ALONE)
    assert checkpoint.newest(saved, warn=pytest.fail).step == 30


@pytest.mark.parametrize("place", ["_write", "_finish"])
def test_an_interrupted_save_leaves_the_earlier_ones(saved, tensors, tokenizer, monkeypatch, place):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(Engine(tensors).state(), saved, 30, {}, tokenizer, ALONE)
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_full_disk_in_the_middle_of_a_save_loses_nothing(saved, tmp_path):
    """A file-size limit is the full disk that any user can make."""
    code = """
import json, resource, sys
from pathlib import Path
import torch
from forgetrain.errors import UserError
from forgetrain.train import checkpoint
from tests.train.test_checkpoint import ALONE, Engine
root, tokenizer = map(Path, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(Engine({"master/big": torch.zeros(1000, 1000)}).state(), root, 30, {}, tokenizer, ALONE)
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(saved), str(tmp_path / "tokenizer")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "step-00000030: cannot be written: file too large" in done.stdout, done.stderr
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000010", "step-00000020"]
    assert checkpoint.newest(saved, warn=pytest.fail).step == 20


def test_a_disk_that_is_full_for_the_tokenizer_already_is_named_and_nothing_is_left(
    saved, tensors, tokenizer, monkeypatch
):
    def full(source, target, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    # copytree wraps its copying function's errors in one without a number
    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, full, False, False))
    with pytest.raises(UserError, match="step-00000030: cannot be written: no space left on device"):
        checkpoint.save(Engine(tensors).state(), saved, 30, {}, tokenizer, ALONE)
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000010", "step-00000020"]


def test_old_ones_are_pruned(tensors, tokenizer, tmp_path):
    for step in range(10, 70, 10):
        checkpoint.save(Engine(tensors).state(), tmp_path / "c", step, {}, tokenizer, ALONE)
    checkpoint.prune(tmp_path / "c", keep_last=2, keep_every=30)
    assert sorted(int(path.name[5:]) for path in (tmp_path / "c").iterdir()) == [30, 50, 60]


def test_a_copy_beside_the_checkpoints_is_left_alone(saved, tensors, tokenizer):
    copies = [saved / name for name in ("step-00000020.bak", "step-best", "step-00000030 (copy)")]
    for copy in copies:
        shutil.copytree(saved / "step-00000020", copy)
    checkpoint.save(Engine(tensors).state(), saved, 40, {}, tokenizer, ALONE)
    checkpoint.prune(saved, keep_last=1, keep_every=0)
    assert [path.name for path in checkpoint.steps_in(saved)] == ["step-00000040"]
    assert all((copy / "manifest.json").is_file() for copy in copies)
    assert checkpoint.resolve(copies[0], pytest.fail).step == 20


def test_what_a_command_may_name(saved):
    run = saved.parent
    for path in (run, saved, saved / "step-00000020"):
        assert checkpoint.resolve(path, pytest.fail).step == 20
    assert checkpoint.resolve(saved / "step-00000010", pytest.fail).step == 10
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.resolve(run / "tokenizer", pytest.fail)


def test_another_shape_does_not_fit(saved):
    engine = SimpleNamespace(state=lambda: {"master/b": Shard(torch.zeros(9), (9,), (0,))})
    with pytest.raises(UserError, match="step-00000020: does not fit"):
        checkpoint.load(engine, saved / "step-00000020", ALONE)


def test_the_manifest_names_every_file(saved):
    manifest = json.loads((saved / "step-00000020" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [".metadata", "__0_0.distcp", "tokenizer/tokenizer.json"]
