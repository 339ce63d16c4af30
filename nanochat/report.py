"""The report card of a run as Markdown and HTML.

Exported from chapters/A4_recipe.py (chapter A4, The recipe of a run); edit there, not here.
"""

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

from nanochat.common import COLORS, atomic_write, figure, format_seconds, read_metrics
from nanochat.recipe import MODELS, STAGES, Run, chance_levels, machine_facts, price_of

__all__ = [
    "METRICS",
    "STYLE",
    "as_image",
    "by_step",
    "cost_table",
    "exchange_rows",
    "finished_stages",
    "html_table",
    "machine_of",
    "markdown_cell",
    "markdown_table",
    "mine_rows",
    "plot_reward",
    "plot_stages",
    "plot_training",
    "points",
    "report_sections",
    "stage_scores",
    "stage_table",
    "write_report",
]


METRICS = {
    "bits_per_byte": "validation bits per byte",
    "core": "tiny-world CORE (centred)",
    "exam": "tiny-world exam, all",
    "exam_multiple_choice": "... multiple choice",
    "exam_cloze": "... cloze",
    "exam_generative": "... open questions",
    "exam_letters": "choice by letter",
    "mmlu": "MMLU",
    "arc_easy": "ARC-Easy",
    "gsm8k": "GSM8K",
    "arithmetic": "arithmetic, pass@1",
    "arithmetic_pass_at_4": "arithmetic, pass@4",
    "spelling": "spelling and counting",
    "identity": "identity",
}


def stage_scores(run: Run) -> dict[str, dict[str, Any]]:
    """Return the last judgement of each stage that has one, by stage name."""
    return {event["stage"]: event for event in read_metrics(run.log.path, "judged")}


def stage_table(run: Run) -> list[list[str]]:
    """Return the table of scores as rows of text: one row a metric, one column a stage.

    The second column is what guessing scores (for bits per byte: 8, a byte at random).
    """
    scores, chance = stage_scores(run), chance_levels(run)
    stages = [stage for stage in MODELS if stage in scores]
    rows = [["metric", "chance", *stages]]
    for key, label in METRICS.items():
        if any(key in scores[stage] for stage in stages):
            values = [f"{scores[s][key]:.3f}" if key in scores[s] else "-" for s in stages]
            guess = "-" if key == "arithmetic_pass_at_4" else f"{chance.get(key, 0.0):.3f}"
            rows.append([label, guess, *values])
    return rows


def finished_stages(run: Run) -> dict[str, dict[str, Any]]:
    """Return what the log says of each finished stage, in order: time, speed, memory, machine."""
    ended = {event["stage"]: event for event in read_metrics(run.log.path, "stage")}
    return {stage: ended[stage] for stage in STAGES if stage in ended}


def machine_of(run: Run) -> dict[str, str]:
    """Return the facts of the machine that trained the run's last stage, or of this one."""
    ended = [*finished_stages(run).values()]
    return (ended[-1].get("machine") if ended else None) or machine_facts()


def cost_table(run: Run) -> list[list[str]]:
    """Return time, speed and memory of each finished stage as rows of text, and the rent."""
    rows = [["stage", "time", "judged in", "steps", "trained tokens/s", "MFU", "peak memory"]]
    total, gpus = 0.0, 1
    for stage, done in finished_stages(run).items():
        judged, mfu = done.get("judge_seconds"), done.get("mfu")
        total, gpus = total + done["seconds"] + (judged or 0.0), max(gpus, done.get("processes", 1))
        rows.append(
            [
                stage,
                format_seconds(done["seconds"]),
                format_seconds(judged) if judged else "-",
                f"{done['steps']:,}" if "steps" in done else "-",
                f"{done['tokens_per_second']:,.0f}" if "tokens_per_second" in done else "-",
                f"{mfu:.1%}" if mfu else "-",
                f"{done['peak_bytes'] / 2**30:.2f} GiB",
            ]
        )
    rows.append(["all", format_seconds(total), "", "", "", "", ""])
    price = price_of(machine_of(run)["GPUs"])
    if price:
        rows.append(["rent", f"${total / 3600 * gpus * price:.2f}", "", "", "", "", ""])
    return rows


def by_step(run: Run, event: str, stage: str) -> list[dict[str, Any]]:
    """Return a stage's events of one kind, one a step: of a step done twice, the later one."""
    return [*{e["step"]: e for e in read_metrics(run.log.path, event, stage=stage)}.values()]


def points(events: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps of events and their values of one name, to draw."""
    return [event["step"] for event in events], [event[name] for event in events]


def plot_training(run: Run, stage: str) -> Any:
    """Draw a stage's training loss (or reward) from the log; returns the figure."""
    if stage == "rl":
        return plot_reward(run)
    events, evals = by_step(run, "step", stage), by_step(run, "eval", stage)
    title = f"{stage}: loss {events[0]['loss']:.2f} at first, {events[-1]['loss']:.2f} at last"
    fig, ax = figure(title, "step", "loss (nats per token)", alt=f"Loss by step of {stage}.")
    ax.plot(*points(events, "loss"))
    if evals and "reply_loss" in evals[0]:
        ax.plot(*points(evals, "reply_loss"), "o-", color=COLORS[1], label="held-out replies")
        ax.legend(fontsize=8)
    elif evals:
        right = ax.twinx()
        right.plot(*points(evals, "bits_per_byte"), "o-", color=COLORS[1])
        right.set_ylabel("validation bits per byte", fontsize=9, color=COLORS[1])
        right.set_ylim(bottom=0)
    return fig


def plot_reward(run: Run) -> Any:
    """Draw the reward of reinforcement learning and pass@k from the log; returns the figure."""
    events, evals = by_step(run, "rl_step", "rl"), by_step(run, "eval", "rl")
    title = f"rl: reward {events[0]['reward']:.2f} at first, {events[-1]['reward']:.2f} at last"
    fig, ax = figure(title, "step", "share of right samples", alt="Reward by step of RL.")
    ax.plot(*points(events, "reward"), label="reward")
    for name in ("pass_at_1", "pass_at_k") if evals else ():
        label = name.replace("_k", f"_{evals[0]['k']}").replace("_at_", "@") + ", held out"
        ax.plot(*points(evals, name), "o-", label=label)
    ax.set_ylim(0, 1.02)
    ax.legend(fontsize=8)
    return fig


def plot_stages(run: Run) -> Any:
    """Draw the scores of all stages as bars over chance; returns the figure."""
    scores, chance = stage_scores(run), chance_levels(run)
    keys = ("exam", "mmlu", "arc_easy", "gsm8k", "arithmetic", "spelling", "identity")
    keys = [key for key in keys if any(key in found for found in scores.values())]
    title = "What each stage scores, and what guessing would (dashed)"
    alt = "Bars of the scores by metric, one for each stage, with a line at the level of chance."
    fig, ax = figure(title, "", "share right", (6, 3), alt)
    for i, stage in enumerate(s for s in MODELS if s in scores):
        values = [scores[stage].get(key, 0.0) for key in keys]
        ax.bar([x + 0.2 * i for x in range(len(keys))], values, 0.18, label=stage)
    for x, key in enumerate(keys):
        level = chance.get(key, 0.0)
        label = "chance" if x == 0 else None
        ax.plot([x - 0.1, x + 0.7], [level, level], "--", color="#444444", label=label)
    ax.set_xticks([x + 0.3 for x in range(len(keys))], keys)
    ax.legend(fontsize=7, frameon=False, ncols=5)
    ax.set_ylim(0, 1.12)
    return fig


def markdown_cell(text: str) -> str:
    """Return text that a Markdown table shows as it is: no markup, no new column, one line."""
    text = re.sub(r"([\\|`*\[\]~$]|\b_|_\b)", r"\\\1", html.escape(text, quote=False))
    return " ".join(text.split())


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows of text as a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def html_table(rows: list[list[str]]) -> str:
    """Return rows of text as an HTML table, escaped."""

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


def exchange_rows(run: Run) -> list[list[str]]:
    """Return the last questions and answers of the run as rows of text."""
    rows = [["question", "answer", "calculator", "right"]]
    last = {e["question"]: e for e in read_metrics(run.log.path, "exchange")}
    for event in last.values():
        tools, right = "; ".join(event["calculator"]), "yes" if event["right"] else "no"
        rows.append([event["question"], event["reply"].replace("\n", " "), tools, right])
    return rows


def mine_rows(run: Run) -> list[list[str]]:
    """Return the learner's exercises that the run used and the functions they replaced."""
    used = {name: None for event in read_metrics(run.log.path, "mine") for name in event["used"]}
    return [name.rstrip(")").split(" (") for name in used]


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.2rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}thead{border-bottom:2px solid}
tr:nth-child(even){background:#8881}img{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}img{background:#fff}}"""


def as_image(fig: Any) -> str:
    """Return a figure as an HTML image that carries its own data, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(fig.get_label())}" src="data:image/png;base64,{data}"></p>'


def report_sections(run: Run) -> dict[str, list[list[str]]]:
    """Return the tables of a report by their titles, rows of text with the head first."""
    sections = {
        "What each stage brought": stage_table(run),
        "The last exchange": exchange_rows(run),
        "What it cost": cost_table(run),
        "The machine": [["fact", "value"], *map(list, machine_of(run).items())],
        "The recipe": [["setting", "value"], *([k, str(v)] for k, v in vars(run.recipe).items())],
    }
    if mine_rows(run):
        sections["Your code"] = [["exercise", "in place of"], *mine_rows(run)]
    return sections


def write_report(run: Run) -> tuple[Path, Path]:
    """Write report.md and report.html (one file, pictures inside) from the log; return their paths.

    Every number in them is read from the log and the recipe: nothing is measured again.
    """
    title = f"Report card of run {run.recipe.name}"
    text, page = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for head, rows in report_sections(run).items():
        text += [f"## {head}", markdown_table(rows)]
        page += [f"<h2>{html.escape(head)}</h2>", html_table(rows)]
        if head == "What each stage brought":
            trained = [stage for stage in MODELS if stage in finished_stages(run)]
            drawn = [plot_stages(run)] if trained else []
            page += [as_image(fig) for fig in drawn + [plot_training(run, s) for s in trained]]
    paths = run.directory / "report.md", run.directory / "report.html"
    atomic_write(paths[0], "\n\n".join(text) + "\n")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(page)
    atomic_write(paths[1], f"<!doctype html><html lang=en><head>{head}</head>\n{body}</html>\n")
    return paths
