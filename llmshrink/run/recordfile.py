"""The types of what a record (llmshrink.json), its seal and a journal may say, whoever wrote them.

Whatever is read of these three is held to this first, so that nobody behind has to doubt a field. A model here has the
fields that are read, and lets others be.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llmshrink.run import disk
from llmshrink.run.report import rows_of


def _file_name(value: str) -> str:
    if value in ("", ".", "..") or "/" in value or "\0" in value:
        raise ValueError("not the name of a file")
    return value


Text = str
"""Half of a surrogate pair is told where such a text is to be written (disk.unwritable)."""
Name = Annotated[str, AfterValidator(_file_name)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    """Numbers are numbers and texts are texts; nothing is converted."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Quality(Strict):
    """As heldout.Quality is written."""

    tokens: Count
    ppl_before: float
    ppl_after: float
    kl_mean: float
    kl_stderr: float
    top1_agreement: float


class Identity(Strict):
    """What of a run's identity is told or computed with."""

    device: Text
    dtype: Text
    batch_size: Annotated[int, Field(ge=1, lt=2**31)]
    threads: Count
    instructions: Text | None = None
    versions: dict[Text, Text]
    format: Text = "compressed-tensors"


class Structure(Strict):
    """What is said of another shape than the original's."""

    summary: Text


class Distilled(Strict):
    """What a distillation says of itself."""

    teacher: Text
    revision: Text | None
    data: Text
    windows: Annotated[list[Count], Field(min_length=2, max_length=2)]
    learned: Text
    steps: Count
    step_windows: Count
    trained: list[Text]
    before: Quality
    curve: list[dict[Text, float]]
    objective: dict[Text, Any]
    hidden_weight: float


class Record(Strict):
    """llmshrink.json, beside its sites. What may be left out, an earlier llmshrink didn't write."""

    model: Text
    revision: Text | None = None
    recipe: Text
    blocks: Count
    serve_tp: Annotated[int, Field(ge=1, lt=2**31)]
    held_out: Text
    quality: Quality
    bytes_before: Count
    identity: Identity
    notes: list[Text]
    cpu_notes: list[Text] = []
    kv_cache: dict[Text, Annotated[list[float], Field(min_length=2, max_length=2)]] | None = None
    structure: Structure | None = None
    shards: dict[Name, Text] = {}
    files: list[Text] | None = None
    distill: Distilled | None = None


class Place(Strict):
    """What a checkpoint was verified with."""

    device: Text
    threads: Count
    instructions: Text | None = None
    versions: dict[Text, Text]


class Seal(Strict):
    """verify/verified.json."""

    by: Text
    against: Text
    tolerance: float
    positions: Count
    files: dict[Text, Text]
    place: Place = Field(alias="with")


class Shard(Strict):
    """A finished file of weights."""

    sha256: Text
    bytes: Count


class Seen(Strict):
    """What a run has read of a source."""

    folder: Text
    files: dict[Text, list[int]]
    sums: dict[Text, int]


class Head(Strict):
    """A journal's first line."""

    identity: dict[Text, Any]
    kept: Count
    sources: dict[Text, Seen] = {}


class Sources(Strict):
    """A line of what was read since the one before."""

    sources: dict[Text, Seen]


class Finished(Strict):
    """A line of a finished part; one of a block has the report's rows."""

    name: Text
    shards: dict[Name, Shard]
    rows: list[dict[Text, Any]]


def check_line(value: Any, first: bool) -> None:
    """Raise ValueError, TypeError or KeyError for a journal's line that no run writes."""
    if first:
        Head.model_validate(value)
    elif "name" not in value:
        Sources.model_validate(value)
    elif Finished.model_validate(value).name.startswith("block "):
        rows_of(value["rows"])
    if (said := disk.unwritable(value)) is not None:
        raise ValueError(said)
