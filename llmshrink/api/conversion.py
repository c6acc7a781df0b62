"""`llmshrink.convert`: a 2:4 checkpoint from one format to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmshrink.api.checkpoints import _folder
from llmshrink.api.runs import check_format, check_types
from llmshrink.errors import PathLike
from llmshrink.paths import output_folder

if TYPE_CHECKING:
    from llmshrink.run.convert import ConvertReport


def convert(
    path: PathLike,
    *,
    output: PathLike,
    format: Literal["compressed-tensors", "llmshrink"],
    overwrite: bool = False,
) -> ConvertReport:
    """Store a 2:4 checkpoint that llmshrink wrote in the other format; every weight stays as it is, to the bit.

    format: "compressed-tensors" is a standard checkpoint, zeros and all; "llmshrink" leaves them out
    (docs/formats-sparse24.md). output: the folder to make; it appears only whole, and verified. Raises LlmshrinkError
    for bad input, among it a model that isn't 2:4: the line names the first layer, row and inputs that aren't.
    """
    check_types(output=output, overwrite=overwrite)
    check_format(format)
    folder = _folder(path)
    from llmshrink.run.convert import convert as run

    return run(folder, output_folder(output), format, overwrite=overwrite)
