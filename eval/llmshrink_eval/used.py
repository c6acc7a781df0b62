"""The options of an evaluation as they were used: what was left open, filled in with what it came to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from llmshrink_eval.options import Options
from llmshrink_eval.templates import DATE

if TYPE_CHECKING:
    from llmshrink_eval.prepare import Prepared


def settings_used(options: Options, prepared: Prepared, dtypes: Mapping[str, str]) -> dict[str, object]:
    """As results.Results.settings has them, plain data; `docs/results-json.md` describes each.

    dtypes: what each model computed in, by its name. The text, the models and the command stand elsewhere in the
    results. Where the cache is makes no difference, nor does what lies in it: tasks that the caller has put there have
    a name.
    """
    windows, data, running = prepared.windows, prepared.task_data, options.running
    settings: dict[str, object] = asdict(options)
    for name in ("command", "cache"):
        del settings[name]
    settings |= {
        "tasks_dir": [str(folder.absolute()) for folder in options.tasks_dir if options.cache not in folder.parents],
        "num_fewshot": None if data is None else data.num_fewshot,
        "prompts": prepared.prompts,
        "scoring": None
        if windows is None
        else {
            "protocol": windows.protocol,
            "window": windows.window,
            "stride": windows.stride,
            "max_tokens": options.scoring.max_tokens,
        },
        "running": {
            "engine": running.engine,
            "device": running.device,
            "dtype": dict(dtypes),
            "batch_size": prepared.batch_size,
            "offload": running.offload is not None,
            "trust_remote_code": running.trust_remote_code,
            "bos": prepared.bos,
        },
        "template_date": DATE if prepared.tasks is not None and options.apply_chat_template else None,
    }
    made: dict[str, object] = json.loads(json.dumps(settings))
    return made
