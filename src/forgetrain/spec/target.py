"""The target: one TOML file that says which model, recipe, precision, hardware, data and reference.

Every default of ForgeTrain lives in this module, ``spec.model`` and ``spec.parallel``.
``Target.plain()`` is what travels to engines, which cannot import this package: a nested dict of plain values.

    target = load_target("targets/nano-cpu.toml", overrides=["recipe.lr=3e-4"])
    target.model.head_dim, target.name
"""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from forgetrain.errors import UserError
from forgetrain.spec.hardware import hardware_of
from forgetrain.spec.model import Model
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.section import NotNegative, Positive, PositiveFloat, Ratio, Section, refusal


class Recipe(Section):
    """How the model is trained. Weight decay applies to parameters of two or more dimensions only."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the layers' matrices; AdamW for all else
    lr: PositiveFloat = 3e-4
    min_lr: NotNegative = 0.0
    beta1: Ratio = 0.9
    beta2: Ratio = 0.95
    eps: PositiveFloat = 1e-8
    muon_momentum: Ratio = 0.95
    weight_decay: NotNegative = 0.1
    clip: PositiveFloat = 1.0  # the global gradient norm is clipped to this
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Annotated[int, Field(ge=0)] = 0  # WSD: the last steps, in which the rate falls to min_lr
    decay: Literal["linear", "exponential", "1-sqrt"] = "linear"
    batch_size: Positive  # sequences a step, over all ranks
    micro_batch_size: Positive
    sequence_length: Positive
    steps: Positive
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # TOML's whole numbers end there

    @model_validator(mode="after")
    def _divides(self) -> Recipe:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}, which falls to it")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps + decay_steps = {self.warmup_steps + self.decay_steps} exceed steps = {self.steps}"
            )
        return self


class Precision(Section):
    """``fp32``; ``bf16``: Megatron's policy (bf16 weights and activations, fp32 master weights that start from the
    rounded bf16 weights, gradients accumulated in fp32); or ``fp8``: the same, but that the products of the layers take
    operands rounded to fp8, scaled by the largest magnitude of the whole tensor, or of each block of it."""

    dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    scaling: Literal["tensor", "block"] = "tensor"

    @model_validator(mode="after")
    def _scaled(self) -> Precision:
        if self.scaling == "block" and self.dtype != "fp8":
            raise ValueError(f"scaling = 'block' is of fp8 operands, and dtype = {self.dtype!r}; leave it out")
        return self

    @property
    def kept(self) -> Literal["fp32", "bf16"]:
        """What weights and activations are kept in; and how references, which have no fp8, compute for this target."""
        return "fp32" if self.dtype == "fp32" else "bf16"


class Hardware(Section):
    """The machine an engine is made for. ``name`` is a key of ``forgetrain.spec.hardware.HARDWARE``."""

    name: str = "cpu"
    count: Positive = 1
    threads: Positive = 2  # CPU threads of each of ``count`` ranks: bits depend on it, so it is part of the target
    memory_gib: PositiveFloat | None = None

    def threads_of(self, ranks: int) -> int:
        """CPU threads of each of so many ranks on one host: more than ``count`` share what those have. Threads that
        wait for a core wait busily, and a step of two ranks took three times as long."""
        return self.threads if ranks <= self.count else max(1, self.threads * self.count // ranks)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.name == "cpu" else "cuda"


class Source(Section):
    """One source of documents: a file, a folder, ``python-stdlib``, ``hf:org/name``, or Megatron's ``.bin/.idx``.

    A record's text is its ``field``, or what ``template`` makes of its fields: ``"{title}\\n{text}"``.
    """

    path: Annotated[str, Field(min_length=1)]
    name: str | None = None  # what stages call it; its path when there is none
    weight: PositiveFloat = 1.0
    glob: Annotated[str, Field(min_length=1)] = "**/*"
    field: str | None = None  # "text" when there is no template either
    template: str | None = None
    config: str | None = None  # of a Hugging Face data set
    split: str | None = None  # of a Hugging Face data set, there or on disk; None is "train"
    revision: str | None = None  # of a Hugging Face data set: the commit that is read

    @model_validator(mode="after")
    def _of_the_hub(self) -> Source:
        if self.path.startswith("hf:"):
            if not self.path.removeprefix("hf:").strip("/"):
                raise ValueError(f"path = {self.path!r} names no data set; write hf:org/name")
            if self.glob != "**/*":
                raise ValueError(f"glob is of a folder, and {self.path} is on the hub; leave it out")
        elif (key := "config" if self.config else "revision" if self.revision else None) is not None:
            raise ValueError(f"{key} is of a data set of the hub, and {self.path} is none; leave it out")
        return self

    @model_validator(mode="after")
    def _one_text(self) -> Source:
        if self.field is not None and self.template is not None:
            raise ValueError("field and template are both set; keep exactly one")
        if self.template is not None:
            _require_plain_names(self.template)
        return self

    @property
    def fields(self) -> list[str]:
        """The names of the fields that make a record's text, each once, in their order."""
        if self.template is None:
            return [self.field or "text"]
        return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.template) if name is not None))

    @property
    def label(self) -> str:
        return self.name or self.path


def _require_plain_names(template: str) -> None:
    """A template holds text and ``{name}`` alone: no attributes, indices, conversions or formats."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write a brace of the text twice") from None
    names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    if not names:
        raise ValueError(f"template {template!r} names no field; write one as {{text}}")
    for name, spec, conversion in names:
        if not name or spec or conversion or set(name) & set(".["):
            raise ValueError(f"template {template!r}: a field is written as {{name}}, and nothing else within")


class StageSpec(Section):
    """A stretch of the run with a mixture, and perhaps a shape, of its own; stages follow one another as written.

    ``weights`` by the sources' names: a source left out is not read in this stage; none at all are the sources' own.
    None as a length or a batch is the recipe's.
    """

    name: Annotated[str, Field(min_length=1)]
    steps: Positive
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    sequence_length: Positive | None = None
    batch_size: Positive | None = None


class Data(Section):
    sources: list[Source] = Field(default_factory=lambda: [Source(path="python-stdlib", glob="**/*.py")], min_length=1)
    stages: list[StageSpec] = Field(default_factory=list)  # none: one stage of all the recipe's steps
    tokenizer: str | None = None  # a folder with tokenizer.json; None trains one of the model's vocab_size
    documents: Literal["ignore", "mask", "mask+reset"] = "ignore"  # attention across document boundaries, positions
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.01

    @model_validator(mode="after")
    def _names(self) -> Data:
        labels = [source.label for source in self.sources]
        for what, names in (("sources", labels), ("stages", [stage.name for stage in self.stages])):
            twice = next((name for name in names if names.count(name) > 1), None)
            if self.stages and twice is not None:
                raise ValueError(f"{what}: two are called {twice!r}; give each a name of its own")
        for stage in self.stages:
            unknown = next((name for name in stage.weights if name not in labels), None)
            if unknown is not None:
                raise ValueError(
                    f"stages: {stage.name!r} weighs {unknown!r}, but the sources are {', '.join(map(repr, labels))}"
                )
        return self


class ReferenceSpec(Section):
    """The trusted trainer. ``attention`` is the transformers implementation; Megatron's is its local one."""

    name: Literal["megatron", "transformers", "capture"] = "megatron"
    attention: Literal["eager", "sdpa"] = "eager"
    distributed_optimizer: bool = False  # Megatron's sharded optimizer; its gradient norm differs in the last bits


class Gates(Section):
    """The shape at which gates compare with the reference, and their thresholds (docs/gates.md says why each)."""

    batch_size: Positive = 2
    micro_batch_size: Positive = 1
    sequence_length: Positive = 128
    steps: Positive = 20
    ranks: int = Field(default=0, ge=0)  # processes of G3 and G9; 0 is two, or as many as [parallel] asks for
    race_batch_size: int = Field(default=0, ge=0)  # rows of a step of G7's race; 0 is the recipe's
    g4_fp32_ratio: NotNegative = 2.0
    g4_bf16_ratio: NotNegative = 1.5
    g5_relative: NotNegative = 5e-4
    g5_band: NotNegative = 3.0
    g5_seeds: Positive = 3
    g5_steps: Positive = 100
    g7_minimum: NotNegative = 0.01

    @model_validator(mode="after")
    def _divides(self) -> Gates:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
            )
        return self


_DURATION = re.compile(r"(?:(\d{1,9})-)?(?:(\d{1,9}):)?(\d{1,9}):(\d\d)")


def duration_seconds(text: str) -> float:
    """Seconds of "days-hours:minutes:seconds", the days and the hours left out where there are none.

    Raises:
        ValueError: it is written otherwise, or is no time at all.
    """
    match = _DURATION.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError("is no duration; write minutes, or hours:minutes:seconds, or days-hours:minutes:seconds")
    return float(total)


def _as_deadline(value: Any) -> Any:
    """Minutes, TOML's bare 23:30:00 (a time of day to TOML), or text; kept as text."""
    if isinstance(value, datetime.time):
        value = value.isoformat("seconds")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = round(value * 60) if 0 < value < 1e9 else 0  # no time, which is refused below: inf and nan, too
        value = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    if isinstance(value, str):
        duration_seconds(value)
    return value


Deadline = Annotated[str, BeforeValidator(_as_deadline)]


class Training(Section):
    """What ``forgetrain train`` does around the engine's steps; all counts are steps."""

    checkpoint_every: Positive = 500  # besides the last step, and one at every interruption
    keep_last: Positive = 2  # the newest checkpoints that are kept
    keep_every: Annotated[int, Field(ge=0)] = 0  # those at multiples of this are kept besides; 0 keeps none
    eval_every: Positive = 100
    eval_windows: Positive = 256  # held-out windows at each evaluation, at most; the last evaluation takes all
    log_every: Positive = 10  # GPU: how often metrics come to the host; on a CPU every step is logged
    skip_limit: Positive = 10  # so many steps in a row without a finite gradient norm end the run
    # A loss so many standard deviations above the last ones is a spike; 0 looks for none. Six: docs/train.md has why.
    spike_z: NotNegative = 6.0
    spike_window: Annotated[int, Field(ge=2)] = 64  # losses that are compared with
    spike_repeats: Positive = 3  # so many spikes in a row send the run back to a good checkpoint, past their batches
    rollback_limit: Positive = 3  # so many times to the same checkpoint; the next end the run
    recheck_every: Annotated[int, Field(ge=0)] = 0  # these steps are taken twice and compared bit for bit; 0: none
    deadline: Deadline | None = None  # time after the start at which the run saves and stops; None sets none
    wandb: Annotated[str, Field(min_length=1)] | None = None  # the Weights & Biases project that gets the metrics too

    @property
    def deadline_seconds(self) -> float | None:
        return None if self.deadline is None else duration_seconds(self.deadline)


class Search(Section):
    """The budget of ``forgetrain forge``; whichever ends first ends the run."""

    minutes: PositiveFloat = 30.0
    attempts: Positive = 200
    dollars: NotNegative = 0.0
    tokens: Annotated[int, Field(ge=0)] = 0
    verify_every: Positive = 10  # attempts, after which the champion is judged again


class Target(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    model: Model
    recipe: Recipe
    precision: Precision = Precision()
    hardware: Hardware = Hardware()
    parallel: Parallel = Parallel()
    data: Data = Data()
    reference: ReferenceSpec = ReferenceSpec()
    gates: Gates = Gates()
    train: Training = Training()
    search: Search = Search()

    @model_validator(mode="after")
    def _lengths(self) -> Target:
        for section, length in (("recipe", self.recipe.sequence_length), ("gates", self.gates.sequence_length)):
            if length > self.model.max_position_embeddings:
                raise ValueError(
                    f"{section}.sequence_length = {length} exceeds "
                    f"model.max_position_embeddings = {self.model.max_position_embeddings}"
                )
        return self

    @model_validator(mode="after")
    def _race(self) -> Target:
        rows, micro = self.gates.race_batch_size, self.recipe.micro_batch_size
        if rows % micro:
            raise ValueError(f"gates.race_batch_size = {rows} is no multiple of recipe.micro_batch_size = {micro}")
        return self

    @model_validator(mode="after")
    def _stages(self) -> Target:
        recipe, stages = self.recipe, self.data.stages
        if stages and (total := sum(stage.steps for stage in stages)) != recipe.steps:
            raise ValueError(f"the steps of data.stages add up to {total}, but recipe.steps = {recipe.steps}")
        for stage in stages:
            if (length := stage.sequence_length or 0) > (most := self.model.max_position_embeddings):
                raise ValueError(
                    f"data.stages: {stage.name!r} has sequence_length = {length}, which exceeds "
                    f"model.max_position_embeddings = {most}"
                )
            if (stage.batch_size or 0) % recipe.micro_batch_size:
                raise ValueError(
                    f"data.stages: {stage.name!r} has batch_size = {stage.batch_size}, no multiple of "
                    f"recipe.micro_batch_size = {recipe.micro_batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _tensor(self) -> Target:
        tensor = self.parallel.tensor
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
            if (size := getattr(self.model, key)) % tensor:
                raise ValueError(f"parallel.tensor = {tensor} does not divide model.{key} = {size}; choose a divisor")
        return self

    @model_validator(mode="after")
    def _ranks(self) -> Target:
        gates, sharing = self.gates, self.parallel.sharing
        if gates.ranks % sharing:
            raise ValueError(
                f"gates.ranks = {gates.ranks} is no multiple of the {sharing} ranks that [parallel] asks for"
            )
        if gates.batch_size % (gates.micro_batch_size * max(1, gates.ranks // sharing)):
            raise ValueError(
                f"gates.batch_size = {gates.batch_size} does not divide into micro-batches of {gates.micro_batch_size} "
                f"on {gates.ranks // sharing} data ranks, as gates.ranks = {gates.ranks} asks for"
            )
        return self

    @model_validator(mode="after")
    def _context(self) -> Target:
        context = self.parallel.context
        lengths = {f"data.stages: {s.name!r}: sequence_length": s.sequence_length for s in self.data.stages}
        lengths |= {f"{key}.sequence_length": getattr(self, key).sequence_length for key in ("recipe", "gates")}
        for what, length in lengths.items():
            if context > 1 and length is not None and length % (2 * context):
                raise ValueError(
                    f"{what} = {length} does not divide into {2 * context} chunks, two of each rank of "
                    f"parallel.context = {context}; choose a multiple of {2 * context}"
                )
        return self

    def plain(self, *, exclude_none: bool = False, exclude_defaults: bool = False) -> dict[str, Any]:
        """This target as nested plain values, as engines receive it; the options are those of ``model_dump``."""
        tree = self.model_dump(mode="json", exclude_none=exclude_none, exclude_defaults=exclude_defaults)
        if self.precision.dtype != "fp8":
            # where nothing is scaled the key says nothing: records, ledgers and checkpoints from before it stay good.
            # Not a serializer of that section's: pydantic calls it, and makes an error of its own of an interruption
            tree.get("precision", {}).pop("scaling", None)
        return tree

    def without_stages(self) -> Target:
        """This target with one stage, at the recipe's shape: what engines are judged at."""
        return self.model_copy(update={"data": self.data.model_copy(update={"stages": []})})

    def for_reference(self) -> Target:
        """This target as references can run it: without fp8, on ranks that share neither layers nor rows."""
        gates, precision = self.gates.model_copy(update={"ranks": 0}), Precision(dtype=self.precision.kept)
        return self.model_copy(update={"parallel": Parallel(), "gates": gates, "precision": precision})

    def at_gates_shape(self) -> Target:
        """This target, without stages, at the ``[gates]`` batch, micro-batch and sequence length."""
        shape = {key: getattr(self.gates, key) for key in ("batch_size", "micro_batch_size", "sequence_length")}
        return self.without_stages().model_copy(update={"recipe": self.recipe.model_copy(update=shape)})

    @property
    def gates_warm_up(self) -> int:
        """Steps over which the learning rates of a gate's training rise: the recipe's warm-up, as far as such a
        training goes. At once at full rate a model that is warmed up carries rounding so far that honest engines part:
        after four steps MiniCPM4-0.5B's losses were 13% apart on an H200, and nothing was left to see. One is none."""
        return max(1, min(self.recipe.warmup_steps, self.gates.g5_steps))

    def at_race_shape(self) -> Target:
        """This target, without stages, with as many rows a step as G7's race has; micro-batches are the recipe's."""
        rows = self.gates.race_batch_size or self.recipe.batch_size
        recipe = self.recipe.model_copy(update={"batch_size": rows})
        return self.without_stages().model_copy(update={"recipe": recipe})

    def in_micro_batches_of(self, rows: int) -> Target:
        """This target with other micro-batches, where they divide the batch; else this one."""
        if self.recipe.batch_size % rows:
            return self
        return self.model_copy(update={"recipe": self.recipe.model_copy(update={"micro_batch_size": rows})})


def load_target(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Target:
    """Reads a target file; ``overrides`` are ``section.key=value`` with TOML values (bare words count as strings).

    Raises:
        UserError: no such file, malformed TOML, unknown key, or a value that cannot be.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such target file", file=path, remedy="see targets/ for the ones that ship") from None
    except IsADirectoryError:
        raise UserError("is a folder, not a target file", file=path, remedy="name a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid TOML: {error}", file=path, remedy="fix the syntax at that place") from None
    for override in overrides:
        _apply(tree, override)
    return parse_target(tree, file=path)


def parse_target(tree: dict[str, Any], *, file: object = None) -> Target:
    """Validates nested values as a target. Raises UserError naming file, key, value and remedy."""
    try:
        target = Target.model_validate(tree)
    except ValidationError as error:
        raise refusal(error, file=file, missing="add it to the target", wrong="see docs/target.md") from None
    hardware_of(target.hardware, file=file)
    return target


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError("an override is written section.key=value", value=override, remedy="for example recipe.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError("is not a section", key=key, remedy="write section.key=value")
    node[last] = value
