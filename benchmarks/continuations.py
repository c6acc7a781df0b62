"""Downstream tasks' continuations beside lm-eval's own model: `python -m benchmarks.continuations MODEL TASKS`.

    OMP_NUM_THREADS=1 python -m benchmarks.continuations MODEL real_piqa,real_arc_easy --tasks-dir FOLDER [--items 100]

The same requests by both in turn, in float32 with the batch size that lm-eval is given here; CPU seconds of each, their
ratio, and how far the two are apart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.continuations import ContinuationLM
from llmshrink_eval.model import quiet
from llmshrink_eval.tasks import fitting_batch_size
from llmshrink_eval.taskset import TaskOptions, load_tasks
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print a line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("tasks", help="names, with commas between")
    parser.add_argument("--tasks-dir", type=Path, help="where they are, beside lm-eval's own")
    parser.add_argument("--items", type=int, default=100, help="of each task, the first")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    models: dict[type[Any], Any] = {}
    for kind in (HFLM, ContinuationLM):  # each its own: ours changes how a model's linears multiply
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        with quiet():
            models[kind] = kind(pretrained=model, tokenizer=tokenizer, batch_size=fitting_batch_size(model.config))
    names = tuple(options.tasks.split(","))
    loaded = load_tasks(TaskOptions(names=names, tasks_dir=options.tasks_dir))
    head = ("requests", "lm-eval, s", "ours, s", "ratio", "apart, nats", "otherwise greedy")
    print(" " * 24 + "".join(f"{word:>{max(10, len(word) + 2)}}" for word in head))
    for name, task in loaded.tasks.items():
        with quiet():
            task.build_all_requests(limit=options.items, rank=0, world_size=1)
        found, seconds = {}, {}
        for kind, lm in models.items():
            started = time.process_time()
            found[kind] = lm.loglikelihood(task.instances, disable_tqdm=True)
            seconds[kind] = time.process_time() - started
        pairs = list(zip(found[HFLM], found[ContinuationLM], strict=True))
        apart = max(abs(one[0] - other[0]) for one, other in pairs)
        greedy = sum(one[1] != other[1] for one, other in pairs)
        ratio = seconds[ContinuationLM] / seconds[HFLM]
        print(
            f"{name:24}{len(pairs):>10}{seconds[HFLM]:>12.1f}{seconds[ContinuationLM]:>10.1f}{ratio:>10.2f}{apart:>13.1e}"
            f"{greedy:>18}",
            flush=True,
        )


if __name__ == "__main__":
    main()
