"""What a training left behind of itself: the loss of every step and the student at each evaluation.

`distillation.csv` has the numbers and `distillation.svg` the picture, both the same bytes for the same run; README.md
has the picture, the evaluations and what the student was taught with.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from llmshrink_eval.inert import escaped

from llmshrink.run.heldout import Quality

TABLE = "distillation.csv"
PICTURE = "distillation.svg"
PALE, DARK, OTHER = "#9ab4d8", "#123a75", "#a03a00"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmshrink",
    "font.size": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curves:
    """losses: of the training, the mean of each step, from step 1. points: {"step", "kl", "perplexity"}, held out."""

    losses: tuple[float, ...]
    points: tuple[dict[str, float], ...]

    @classmethod
    def of(cls, history: Sequence[Mapping[str, float]]) -> Curves:
        """From what the Trainer logged, which its checkpoints hold, so that a run that went on has all of it."""
        losses = {int(line["step"]): float(line["loss"]) for line in history if "loss" in line}
        assert sorted(losses) == list(range(1, len(losses) + 1)), sorted(losses)
        return cls(
            tuple(losses[step] for step in sorted(losses)),
            tuple(
                {"step": line["step"], "kl": line["eval_kl"], "perplexity": line["eval_perplexity"]}
                for line in history
                if "eval_kl" in line
            ),
        )

    def table(self, before: Quality) -> str:
        """CSV: a line a step, from 0, the student as it was; empty where nothing was measured."""
        judged = {int(point["step"]): point for point in _from(before, self.points)}
        lines = ["step,loss,kl,perplexity"]
        for step in range(max(len(self.losses), *judged) + 1):
            loss = repr(self.losses[step - 1]) if 0 < step <= len(self.losses) else ""
            point = judged.get(step)
            lines.append(f"{step},{loss}," + ("," if point is None else f"{point['kl']!r},{point['perplexity']!r}"))
        return "\n".join(lines) + "\n"

    def picture(self, before: Quality) -> str:
        """SVG: the loss of every step with the held-out KL over it, and the held-out perplexity below."""
        import matplotlib
        from matplotlib.figure import Figure

        judged = _from(before, self.points)
        steps = [point["step"] for point in judged]
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of matplotlib's own about its defaults
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            figure = Figure(figsize=(8, 6), layout="constrained")
            upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
            upper.plot(range(1, len(self.losses) + 1), self.losses, color=PALE, lw=1, label="training loss")
            upper.plot(steps, [point["kl"] for point in judged], "o-", color=DARK, ms=4, label="held-out KL")
            upper.set_ylabel("nats/token")
            upper.set_ylim(bottom=0)
            lower.plot(steps, [point["perplexity"] for point in judged], "o-", color=DARK, ms=4, label="student")
            lower.axhline(before.ppl_before, color=OTHER, ls="--", lw=1, label="teacher")
            lower.set_ylabel("held-out perplexity")
            lower.set_xlabel("step")
            for axes in (upper, lower):
                axes.legend(loc="upper right")
            drawn = StringIO()
            figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        return drawn.getvalue()


def _from(before: Quality, points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The evaluations, the start among them as step 0."""
    return [{"step": 0, "kl": before.kl_mean, "perplexity": before.ppl_after}, *points]


def section(record: Mapping[str, Any]) -> str:
    """The end of README.md: how the student was taught, in words, in a picture and by its evaluations."""
    made = record["distill"]
    before, after = Quality(**made["before"]), Quality(**record["quality"])
    revision = f" (revision {escaped(made['revision'])})" if made["revision"] else ""
    windows, length = made["windows"]
    lines = [
        "## How it was taught",
        "",
        f"- Teacher: {escaped(made['teacher'])}{revision}.",
        f"- Data: {windows:,} windows of {length:,} tokens of {escaped(made['data'])}; {escaped(made['learned'])}.",
        f"- Training: {made['steps']:,} steps of {made['step_windows']:,} windows; trained: "
        f"{escaped(', '.join(made['trained']))}.",
        f"- Loss: {_loss(made)}.",
        f"- KL from the teacher on {after.tokens:,} held-out tokens: {before.kl_mean:.5f} before, "
        f"{after.kl_mean:.5f} after (standard error {after.kl_stderr:.5f}).",
        "",
        f"![Training loss, held-out KL and perplexity by step]({PICTURE})",
        "",
        "| step | KL | perplexity |",
        "|---|---|---|",
        *(
            f"| {point['step']:.0f} | {point['kl']:.5f} | {point['perplexity']:.3f} |"
            for point in _from(before, made["curve"])
        ),
        "",
        f"The evaluation with the lowest KL is what is kept. The loss of every step is in `{TABLE}`.",
        "",
    ]
    return "\n".join(lines)


def _loss(made: Mapping[str, Any]) -> str:
    """The objective in words."""
    goal = made["objective"]
    alpha, temperature = goal["alpha"], goal["temperature"]
    names = {
        "forward_kl": "KL(teacher || student)",
        "reverse_kl": "KL(student || teacher)",
        "jsd": f"the generalised Jensen-Shannon divergence with beta {goal['beta']:g}",
    }
    parts = [f"{alpha:g} x cross-entropy"] if alpha > 0 else []
    if alpha < 1:
        share = "" if alpha == 0 else f"{1 - alpha:g} x "
        hot = "" if temperature == 1 else f" at temperature {temperature:g}, times {temperature**2:g}"
        parts.append(f"{share}{names[goal['divergence']]}{hot}")
    if made["hidden_weight"]:
        parts.append(f"{made['hidden_weight']:g} x the relative squared error of the hidden states")
    return " + ".join(parts)
