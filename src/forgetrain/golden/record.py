"""The golden record: what the reference did, on disk, with a hash of every file and of what its bits depend on.

    record = GoldenRecord.open("runs/nano-cpu/golden")
    record.evidence["model.layers.0.input_layernorm#fwd@0"]       # read from disk when asked for
    record.trajectory(ranks=2)[0].loss

    manifest.json          target, reference with versions and shims, environment, seed, learning rates, verdicts,
                           SHA-256 of every file and of itself
    weights.safetensors    the weights from which everything begins, canonical names, fp32
    batches.safetensors    ``<step>/<field>`` of every batch
    taps.safetensors       taps, results and state of the first step, under the names of ``gates.g1.evidence_names``
    later.safetensors      of a captured record: the same of its last step, and ``start/<state>`` from which that began
    trajectory.jsonl       loss, gradient norm, applied and weight hash of every step, for each number of ranks
    timing.json            seconds of each step

A record is written into a folder beside its own and renamed, so it is whole or it is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetrain.durable import new_folder, read_json, sha256_file, write_json
from forgetrain.engine.contract import Batch
from forgetrain.errors import UserError
from forgetrain.spec.target import Target, parse_target

FORMAT = 2  # 1 had no hash of the manifest itself
#: What of the recipe the record's bits depend on.
_RECIPE_KEYS = (
    *("batch_size", "micro_batch_size", "sequence_length", "optimizer", "beta1", "beta2", "eps", "muon_momentum"),
    *("weight_decay", "clip"),
)
MANIFEST, WEIGHTS, BATCHES, EVIDENCE = "manifest.json", "weights.safetensors", "batches.safetensors", "taps.safetensors"
TRAJECTORY, TIMING, LATER = "trajectory.jsonl", "timing.json", "later.safetensors"


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of all else that it says, in its order, so that a change of it shows."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**said, "sha256": hashlib.sha256(json.dumps(said).encode()).hexdigest()}


class Evidence(Mapping[str, Tensor]):
    """The tensors of one safetensors file, each read when it is asked for."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class GoldenRecord:
    """A record that was opened and whose files were found to be what its manifest says."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path, *, remedy: str = "run forgetrain collect again") -> GoldenRecord:
        """Reads the manifest and checks its own hash and every file's.

        Raises:
            UserError: there is no record, its manifest is damaged or of another format, or a file was changed.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST, remedy)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"is not a golden record of format {FORMAT}", file=folder / MANIFEST, remedy=remedy)
        if manifest != sealed(manifest):
            raise UserError("was changed: it is not what its own hash says", file=folder / MANIFEST, remedy=remedy)
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise UserError("is missing from the golden record", file=path, remedy=remedy)
            if sha256_file(path) != expected:
                raise UserError("was changed: it is not what the manifest says", file=path, remedy=remedy)
        return cls(folder, manifest)

    def misfit(self, target: Target, precision: str, environment: Mapping[str, Any]) -> str | None:
        """Why this record is not of this target in this environment, in one line, or None when it is."""
        if self.manifest["precision"] != precision:
            return f"it was collected in {self.manifest['precision']}, not {precision}"
        for section in ("model", "reference", "data"):
            theirs, ours = self.manifest["target"][section], target.plain()[section]
            keys = [key for key in ours if section != "data" or key == "documents"]
            for key in keys:
                if theirs.get(key) != ours[key]:
                    return f"its target has {section}.{key} = {theirs.get(key)!r}, this one {ours[key]!r}"
        recipe = parse_target(self.manifest["target"]).recipe.model_dump()  # with defaults of keys that came later
        ours = target.at_gates_shape().plain()["recipe"]
        for key in _RECIPE_KEYS:
            if recipe[key] != ours[key]:
                return f"its target has {key} = {recipe[key]!r} at the gates' shape, this one {ours[key]!r}"
        if len(self.trajectory(1)) != target.gates.steps:
            return f"it has {len(self.trajectory(1))} steps, the target's gates ask for {target.gates.steps}"
        for key, value in environment.items():
            if self.manifest["environment"].get(key) != value:
                return (
                    f"it is from another environment: {key} {self.manifest['environment'].get(key)!r}, here {value!r}"
                )
        return None

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / WEIGHTS)

    @property
    def batches(self) -> list[Batch]:
        tensors = load_file(self.folder / BATCHES)
        count = 1 + max(int(name.partition("/")[0]) for name in tensors)
        return [Batch(*(tensors[f"{step}/{field}"] for field in Batch._fields)) for step in range(count)]

    @property
    def evidence(self) -> Evidence:
        return Evidence(self.folder / EVIDENCE)

    @property
    def later(self) -> Evidence | None:
        """The last step of a captured record, whose reference cannot be asked for one; None in other records."""
        return Evidence(self.folder / LATER) if LATER in self.manifest["files"] else None

    def trajectory(self, ranks: int) -> list[dict[str, Any]]:
        """loss, grad_norm, applied and weight_hash of each step with this many ranks; empty when there is none."""
        lines = (self.folder / TRAJECTORY).read_text(encoding="utf-8").splitlines()
        points = [json.loads(line) for line in lines]
        return [point for point in points if point.pop("ranks") == ranks]

    @property
    def learning_rates(self) -> list[float]:
        return self.manifest["learning_rates"]


def write_record(
    folder: str | Path,
    *,
    weights: Mapping[str, Tensor],
    batches: list[Batch],
    evidence: Mapping[str, Tensor],
    trajectories: Mapping[int, list[dict[str, Any]]],
    timing: Mapping[str, Any],
    manifest: Mapping[str, Any],
    later: Mapping[str, Tensor] | None = None,
) -> GoldenRecord:
    """Writes a record whole, in place of an older one. ``manifest`` is what it says besides format, files and
    its hash."""
    folder = Path(folder)
    with new_folder(folder) as partial:
        _save(weights, partial / WEIGHTS)
        fields = {f"{step}/{name}": getattr(b, name) for step, b in enumerate(batches) for name in Batch._fields}
        _save(fields, partial / BATCHES)
        _save(evidence, partial / EVIDENCE)
        if later is not None:
            _save(later, partial / LATER)
        with (partial / TRAJECTORY).open("w", encoding="utf-8") as file:
            for ranks, points in trajectories.items():
                file.writelines(json.dumps({"ranks": ranks, **point}) + "\n" for point in points)
        write_json(partial / TIMING, dict(timing))
        files = {path.name: sha256_file(path) for path in sorted(partial.iterdir())}
        write_json(partial / MANIFEST, sealed({"format": FORMAT, **manifest, "files": files}))
    return GoldenRecord.open(folder)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes contiguous copies that share no memory, as safetensors wants them."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(plain, path)
