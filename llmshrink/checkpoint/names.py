"""Two spellings of one weight: the name a module has in the model, and the key it has in the checkpoint.

They are equal for most models. Checkpoints saved from the base model lack its prefix (`layers.0...` for
`model.layers.0...`), and a tied head has no key of its own: it reads the embedding's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from llmshrink.errors import CheckpointError


def map_names(
    parameters: Collection[str],
    keys: Collection[str],
    *,
    base_prefix: str,
    tied: Mapping[str, str],
    why_not: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Checkpoint key of every parameter.

    parameters: names in the model; keys: the checkpoint's; tied: parameter -> the parameter whose tensor it shares.
    why_not: keys that the checkpoint doesn't give -> why, where its files say so.
    Raises CheckpointError naming the first parameters that no key fills.
    """
    available = set(keys)
    prefix = f"{base_prefix}." if base_prefix else ""

    def find(name: str) -> str | None:
        candidates = [name, name.removeprefix(prefix), prefix + name]
        if name in tied:
            candidates.append(tied[name])
            candidates.append(tied[name].removeprefix(prefix))
        return next((c for c in candidates if c in available), None)

    found = {name: find(name) for name in parameters}
    missing = sorted(name for name, key in found.items() if key is None)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        said = f"the checkpoint has no tensor for {', '.join(missing[:3])}{more}"
        # A missing matrix whose module has other tensors was replaced by them: codes, scales, zero-points.
        instead = sorted(k for k in keys if k.startswith(missing[0].removesuffix("weight")) and k not in parameters)
        if missing[0].endswith(".weight") and instead:
            raise CheckpointError(
                f"{said}, instead {', '.join(instead[:3])}: it is already quantized, though config.json has no "
                "quantization_config; start from the original model"
            )
        reasons = why_not or {}
        spelt = (missing[0], missing[0].removeprefix(prefix))
        # A compressed matrix is stored under names that go on: weight_packed, weight_scale.
        lost = next((key for name in spelt for key in reasons if key == name or key.startswith(f"{name}_")), None)
        if lost is not None:
            raise CheckpointError(f"{said}: {reasons[lost]}; download or copy both again")
        raise CheckpointError(f"{said}; it doesn't match its config.json: download it again")
    return {name: key for name, key in found.items() if key is not None}
