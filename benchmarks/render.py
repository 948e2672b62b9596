"""Generates benchmarks/RESULTS.md and the tables of docs/field.md. Run it after the other benchmarks.

python benchmarks/render.py
"""

import json
from pathlib import Path
from typing import Any

from field_page import write_page

RESULTS = Path(__file__).parent / "results"

INTRODUCTION = """# Results

The figures in each table come from the command above it. `python benchmarks/render.py` generates this page from the
files that these commands wrote to `benchmarks/results/`. Unless stated otherwise, intervals are Wilson intervals at
95%, over the episodes of all models together. "models" gives the lowest and highest rate of a single model.
[docs/protocols.md](../docs/protocols.md) describes the protocols. Speeds were measured on a shared machine, so compare
ratios within one run rather than absolute figures.
"""


def main() -> None:
    parts = [INTRODUCTION]
    parts.append(side_by_side())
    for name in (
        "two-room",
        "two-room-25",
        "four-rooms",
        "maze",
        "pusht",
        "reacher",
        "point-maze",
        "cube-state",
        "cube",
    ):
        path = RESULTS / f"success-{name}.json"
        if path.exists():
            parts.append(success(name, json.loads(path.read_text())))
    parts.append(far_goals())
    parts.append(guardrails())
    path = RESULTS / "weaving.json"
    if path.exists():
        parts.append(weaving(json.loads(path.read_text())))
    for name, part in (
        ("clash", weaving_clash),
        ("bytes_rooms", weaving_bytes),
        ("bytes_robot", weaving_bytes),
        ("malicious", weaving_malicious),
        ("privacy", weaving_privacy),
    ):
        path = RESULTS / f"weaving_{name}.json"
        if path.exists():
            parts.append(part(json.loads(path.read_text())))
    path = RESULTS / "anti-collapse.json"
    if path.exists():
        parts.append(anti_collapse(json.loads(path.read_text())))
    path = RESULTS / "control-loop.json"
    if path.exists():
        parts.append(control_loop(json.loads(path.read_text())))
    path = RESULTS / "control-rate.json"
    if path.exists():
        parts.append(control_rate(json.loads(path.read_text())))
    for name in ("training", "planning", "windows", "collecting", "convert_large"):
        path = RESULTS / f"{name}.jsonl"
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
            parts.append(speeds(name, lines))
    path = RESULTS / "busy.jsonl"
    if path.exists():
        parts.append(busy([json.loads(line) for line in path.read_text().splitlines()]))
    path = RESULTS / "checking.json"
    if path.exists():
        parts.append(checking(json.loads(path.read_text())))
    (Path(__file__).parent / "RESULTS.md").write_text("\n".join(parts))
    write_page()


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# Success in per cent at a goal offset of 25 and a budget of 50, as published for LeWM, DINO-WM and PLDM.
PUBLISHED = {
    "pusht": (96, 92, 78),
    "reacher": (86, 79, 78),
    "cube-state": (74, 86, 65),
    "two-room-25": (87, 100, 97),
    "cube": (74, 86, 65),
    "point-maze": None,
}


def side_by_side() -> str:
    rows = []
    for name, published in PUBLISHED.items():
        path = RESULTS / f"success-{name}.json"
        if not path.exists():
            continue
        values = json.loads(path.read_text())
        pooled = {row["method"]: row for row in values["results"]["rows"]}
        planner = values["planner"]
        rows.append(
            [
                name.removesuffix("-25"),
                planner,
                *(
                    f"{100 * row['rate']:.0f}% [{100 * row['interval'][0]:.0f}, {100 * row['interval'][1]:.0f}]"
                    for row in (pooled[planner], pooled["random"], pooled["behaviour cloning"])
                ),
                f"{pooled[planner]['n']}, {counted(len(values['training_minutes']), 'seed')}",
                f"{values['frames'][0]:,}",
                # A run that was trained before has no time of its own.
                ", ".join("-" if minutes < 0.1 else str(minutes) for minutes in values["training_minutes"]),
                "-" if published is None else " / ".join(map(str, published)),
            ]
        )
    header = ["world", "planner of the recipe", "success", "random", "cloning", "n", "frames", "training minutes"]
    return (
        "## Comparison with published results\n\nGoals are 25 steps ahead, with a budget of 50 (protocols "
        "`NAME-25@1`). [docs/protocols.md](../docs/protocols.md) compares every convention. The main difference: data "
        "and goals here come from policies without an aim, whereas published data and goals for PushT come from "
        "experts. cube-state sees the state vector; the published figures use pixels, where random actions reach "
        "48.\n\n" + table([*header, "published (LeWM / DINO-WM / PLDM)"], rows)
    )


def success(name: str, values: dict[str, Any]) -> str:
    header, *rows = values["table"]
    columns = ["model", "collecting, s", "training, s", "evaluating, s"]
    columns += ["rank correlation, learned distance", "rank correlation, latent L2"]
    lines = [
        [str(number), *(f"{seconds[part]:.0f}" for part in ("collect", "train", "evaluate")),
         *(f"{head[f'rank_correlation/{metric}']:.2f}" for metric in ("distance", "latent"))]
        for number, (seconds, head) in enumerate(zip(values["seconds"], values["heads"], strict=True), start=1)
    ]  # fmt: skip
    reversible = {"yes" if head["reversible"] else "no" for head in values["heads"]}
    return (
        f"## Zero-shot success: {name}\n\n    {values['command']}\n\n{table(header, rows)}\n"
        f"{several_splits(header)}{table(columns, lines)}\n"
        f"Training covers the world model, the distance, the reactive policy and cloning. A resumed run counts only "
        f"the remaining time. Rank correlations compare a metric with the number of steps in the data. Dynamics "
        f"measured as reversible: {', '.join(sorted(reversible))}. {describe(values['hardware'])}\n"
    )


def several_splits(header: list[str]) -> str:
    """Return how to read cells with a slash, if the table has more than one split."""
    return "Cells with a slash list the splits in order.\n\n" if sum("(n=" in title for title in header) > 1 else ""


def anti_collapse(values: dict[str, Any]) -> str:
    rows = []
    for row in values["rows"]:
        figures, rates = row["figures"], row["success"]
        rows.append(
            [
                row["variant"],
                f"{figures['effective_rank']:.1f}",
                f"{figures['probe/position/error']:.2f}",
                f"{figures['open_loop/position/8']:.2f}",
                f"{figures['inverse_dynamics']:.2f}",
                ", ".join(row["alarms"]) or "none",
                *(
                    f"{100 * rates[key]['rate']:.0f}% [{100 * rates[key]['interval'][0]:.0f}, "
                    f"{100 * rates[key]['interval'][1]:.0f}]"
                    for key in ("CEM, latent L2/cross-room", "tree search/cross-room", "tree search/same-room")
                ),
            ]
        )
    header = ["variant", "effective rank", "probe (px)", "8 blocks open loop (px)", "inverse dynamics", "alarms"]
    header += ["CEM cross-room", "tree cross-room", "tree same-room"]
    n = next(iter(values["rows"][0]["success"].values()))["n"]
    return (
        f"## Anti-collapse variants on the demo's data\n\n    {values['command']}\n\n{table(header, rows)}\n"
        f"One training seed ({values['training_seeds'][0]}), n = {n} for each rate. Errors are those of a linear "
        f"probe of the position on held-out episodes. 'inverse dynamics' is the unexplained share of the action's "
        f"variance. {describe(values['hardware'])}\n"
    )


def control_loop(values: dict[str, Any]) -> str:
    rows = []
    for mode in ("as it is", "slowed"):
        loop, plant = values[mode]["loop"], values[mode]["plant"]
        plan, reaction = loop["plan_ms"], plant["reaction_ms"]
        rows.append(
            [
                {"as it is": "unmodified"}.get(mode, mode),
                f"{loop['periods']:,}",
                f"{loop['rate_held']:g} Hz",
                f"{loop['misses']:,}",
                str(plant["unnoticed"]),
                f"{plan['p50']:.1f} / {plan['p99']:.1f} / {plan['max']:.0f}",
                "-" if reaction is None else f"{reaction['max']:.1f}",
                f"{values[mode]['reached']} of {values[mode]['goals']}",
            ]
        )
    header = ["planner", "periods", "achieved rate", "missed", "of these unnoticed", "plan ms: median / p99 / maximum"]
    return (
        f"## Real-time loop on an arm\n\n    python benchmarks/control_loop.py --seconds {values['seconds']:g}\n\n"
        + table([*header, "safe action after the deadline, ms at most", "goals"], rows)
        + f"\nThe deadline is {values['as it is']['loop']['deadline_ms']:g} ms after the observation; see "
        f"[docs/deploy.md](../docs/deploy.md). {describe(values['hardware'])}\n"
    )


def guardrails() -> str:
    """Return how often limits are broken, and the cost of guardrails; parts without measurements are omitted."""
    parts = ["## Guardrails\n"]
    if (path := RESULTS / "guardrails.json").exists():
        values = json.loads(path.read_text())
        seeds, about = len(values["seeds"]), describe(values["hardware"])
        parts.append(f"    {values['command']}\n\n{seeds} training seeds. {about}\n")
        for risk, one in values.get("risks", {}).items():
            parts.append(f"### A stated risk of {100 * float(risk):g}%\n\n{limits_table(one)}")
            parts.append(calibrations(one["margins"]))
        for title, one in values.get("shifts", {}).items():
            when = "" if title == "as calibrated" else ", from the middle of each episode"
            parts.append(f"### Dynamics: {title}{when}\n\n{limits_table(one)}")
    if (path := RESULTS / "attacks.json").exists():
        values = json.loads(path.read_text())
        header = ["attack", "method", "n", "goal reached", "limit broken", "of these in the audit log"]
        header += ["seen by the agent itself", "plans rejected"]
        lines = [
            [row["attack"], row["method"], str(row["n"]), rate(row["reached rate"]), rate(row["broken rate"]),
             *(of_broken(row, key) for key in ("logged", "seen")), f"{row['refused']:,}"]
            for row in values["rows"]
        ]  # fmt: skip
        parts.append(f"### Attacks\n\n    {values['command']}\n\n{table(header, lines)}")
    if (path := RESULTS / "two-rule-sets.json").exists():
        values = json.loads(path.read_text())
        header = ["owner", "n", "goal reached", "fell into a pit", "entered the garden", "longest step, median px"]
        lines = [
            [
                row["owner"],
                str(row["n"]),
                *(rate(row[key]) for key in ("reached", "fell", "entered")),
                f"{row['step']:.2f}",
            ]
            for row in values["rows"]
        ]
        parts.append(
            f"### One model, two rule sets\n\n    {values['command']}\n\n{table(header, lines)}\n"
            "![paths of the two owners](results/two-rule-sets.svg)\n"
        )
    if (path := RESULTS / "guardrail-cost.json").exists():
        values = json.loads(path.read_text())
        header = [
            "threads",
            "environments",
            "n",
            "ms without",
            "ms with five",
            "ratio [95%]",
            "plans that satisfy all",
        ]
        lines = [
            [
                *(str(row[key]) for key in ("threads", "environments", "n")),
                *(f"{row[key]:.2f}" for key in ("without", "with")),
                f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                f"{row['held']:.0%}",
            ]
            for row in values["rows"]
        ]
        hardware = describe(values["hardware"])
        parts.append(f"### Cost of guardrails\n\n    {values['command']}\n\n{table(header, lines)}\n{hardware}\n")
    return "\n".join(parts) if len(parts) > 1 else ""


def of_broken(row: dict[str, Any], key: str) -> str:
    """Return how many of the broken limits have a property, or a dash for a method without an audit log."""
    return "-" if row["method"] == "no guardrail" else f"{row[key]} of {row['broken']}"


def weaving(values: dict[str, Any]) -> str:
    """Return what each owner reaches at home with each model."""
    ways = [cell["way"] for cell in values["rows"][0]["cells"]]
    owners = [row["owner"] for row in values["rows"] if row["owner"] != "all"]
    lines = [
        [row["owner"], str(row["cells"][0]["n"]), *(interval(cell["rate"], cell) for cell in row["cells"])]
        for row in values["rows"]
    ]
    return (
        f"## Many owners\n\n    {values['command']}\n\n{table(['owner', 'n', *ways], lines)}\n"
        f"The table gives the goals reached at home by tree search, over {counted(len(values['seeds']), 'seed')}. All "
        f"models of an owner train for equally many steps from the same initialisation; `pooled` trains for as many as "
        f"the first owner's. `woven` shares everything except statistics. In `woven + sovereign`, each owner has its "
        f"own stems of camera and actions. The last base of both settled at home. With the first seed, the owners of "
        f"examples/five_owners.yaml sent {values['bytes'] / 1e6:.0f} MB in total. "
        f"{describe(values['hardware'])}\n\n{last_bases(values['base losses'], owners)}"
    )


def last_bases(every: list[dict[str, Any]], owners: list[str]) -> str:
    """Return each owner's held-out loss under the last base, before fine-tuning."""
    lines = [
        [each["way"], *(", ".join(f"{one[owner]:.2f}" for one in each["losses"]) for owner in owners)] for each in every
    ]
    return (
        f"Held-out loss under the last base before it settles at home, by seed. Stems that stay at home let the owners "
        f"share one convention.\n\n"
        f"{table(['way', *owners], lines)}"
    )


def weaving_clash(values: dict[str, Any]) -> str:
    """Return how conflicting conventions of actions affect the base, with and without sovereign stems."""
    lines = [
        [
            *(row["way"], row["owner"], str(row["n"]), interval(row["rate"], row)),
            ", ".join(f"{loss:.2f}" for loss in row["losses"]),
        ]
        for row in values["rows"]
    ]
    header = ["way", "owner", "n", "goals reached", "held-out loss, by seed"]
    return (
        f"## Many owners: two conventions of actions\n\n    {values['command']}\n\n{table(header, lines)}\n"
        f"The actions of `turned` mean the opposite of those of `straight`. The table gives the goals reached at home "
        f"by tree search with the last base, before it settles. {counted(len(values['seeds']), 'seed')}. "
        f"{describe(values['hardware'])}\n"
    )


def weaving_bytes(values: dict[str, Any]) -> str:
    """Return the bytes that infrequent and quantised exchange saves, and its cost in loss."""
    unit, lines = values["unit"], []
    for row in values["rows"]:
        sent = (row["up"], row["all up"] + row["all down"])
        fewer = ("-" if row.get(key) is None else f"{row[key]:,.0f}" for key in ("fewer up", "fewer in all"))
        errors = (estimate(row["error"], ".4f"), estimate(row["place"], ".2f" if unit == "px" else ".3f"))
        worse = (estimate(row[f"worse {key}"], "+.1%") if f"worse {key}" in row else "-" for key in ("error", "place"))
        both = (f"{1e-6 * size:,.1f}" for size in sent)
        lines.append([row["way"], *(cell for pair in zip(both, fewer, strict=True) for cell in pair), *errors, *worse])
    header = ["way", "MB up", "times fewer", "MB up and down", "times fewer", "error", unit]
    header += ["error, against synchronous", f"{unit}, against synchronous"]
    pairs = "".join(
        f"- {pair['what']}: error {estimate(pair['error'], '+.1%')}, {unit} {estimate(pair['place'], '+.1%')}\n"
        for pair in values["pairs"]
    )
    settings = values["settings"]
    return (
        f"## Many owners: bytes against loss, {'pixels' if values['world'] == 'rooms' else 'sensors'}\n\n"
        f"    {values['command']}\n\n{table(header, lines)}\n{pairs}\n"
        f"{values['owners']} owners of one world, each with {settings['episodes']} episodes, train for "
        f"{settings['steps']} steps of {settings['batch']} windows each. One owner trains the first "
        f"{settings['pilot']} steps alone, and all others start from its base.\n\n"
        f"- 'MB up' counts the contributions in the ledger (synchronous: a float32 gradient for each owner and step). "
        f"'MB up and down' counts all messages, including evaluations and the bases that are evaluated.\n"
        f"- 'error' is the error of latents predicted 8 blocks ahead in new episodes, as a share of their variance. "
        f"'{unit}' is the error of the position that a linear probe reads from them.\n"
        f"- The outer step is {settings['outer']['learning_rate']} with momentum {settings['outer']['momentum']}. "
        f"{'The statistics of the frames are shared. ' if settings['partition'] else ''}"
        f"{f'Synchronous steps use a rate of {rate}. ' if (rate := settings['rate']) else ''}"
        f"These settings were chosen on another seed.\n\n"
        f"{over_seeds(values)} {describe(values['hardware'])}\n"
    )


def weaving_malicious(values: dict[str, Any]) -> str:
    """Return the effect of one malicious owner, for each defence."""
    lines = []
    for row in values["rows"]:
        rates = ["-" if (one := row[key]) is None else interval(one["rate"], one) for key in ("reached", "patched")]
        n = "0" if row["reached"] is None else str(row["reached"]["n"])
        out = [f"{row['attacker out']} of {row['rounds']}", f"{row['honest out']} of {4 * row['rounds']}"]
        loss = "-" if row["loss"] is None else f"{row['loss']:.2f}"
        lines.append([row["attack"], row["defence"], *rates, n, loss, *out, str(row["stopped"])])
    header = [
        "attack",
        "defence",
        "goals reached",
        "with the patch",
        "n",
        "held-out loss",
        "attacker out",
        "honest out",
    ]
    return (
        f"## Many owners: one of five attacks\n\n    {values['command']}\n\n{table([*header, 'stopped'], lines)}\n"
        f"The table shows an honest owner at home, with tree search and Wilson intervals. 'with the patch' repeats the "
        f"evaluation with the backdoor's patch in every frame. 'attacker out' and 'honest out' count the rounds in "
        f"which they had no weight, according to the ledger. 'stopped' counts seeds that produced no model because "
        f"their losses were no longer finite. {counted(len(values['seeds']), 'seed')}. "
        f"{describe(values['hardware'])}\n"
    )


def weaving_privacy(values: dict[str, Any]) -> str:
    """Return the cost and guarantee of noise, and what attacks find."""
    untrained = [estimate(values["untrained"][key], ".3g") for key in ("loss", "places")]
    lines = [["untrained", "-", "-", *untrained, *["-"] * 4]]
    attacks = ("losses", "picture", "one frame", "cosine")
    for row in values["rows"]:
        epsilon = "none" if row["epsilon"] is None else f"{row['epsilon']:,.3g}"
        costs = ["not finite" if row[key] is None else estimate(row[key], ".3g") for key in ("loss", "places")]
        found = [estimate(row[key], ".2f") for key in attacks]
        noise = "not clipped" if row["noise"] is None else f"{row['noise']:g}"
        lines.append([noise, "the sum" if row["secure"] else "each delta", epsilon, *costs, *found])
    header = ["noise, in clips", "visible", "epsilon", "held-out loss", "places", "by losses", "by picture"]
    settings = values["settings"]
    return (
        f"## Many owners: privacy\n\n    {values['command']}\n\n{table([*header, 'one frame', 'cosine'], lines)}\n"
        f"{settings['owners']} owners send {values['values']:,} values each, in {settings['rounds']} rounds.\n\n"
        f"- 'visible' is what the coordinator sees. Epsilon is per owner, over all rounds, at delta "
        f"{values['delta']:g}.\n"
        f"- 'places' is the error of a probe that reads the position of a spot, in spacings of receptors.\n"
        f"- 'by losses' and 'by picture' are attacks that infer which episodes were trained on: from losses, and from "
        f"the input that the first layer reveals. Figures are AUROCs; 0.5 is guessing.\n"
        f"- 'one frame' is the AUROC of recognising a frame that was an owner's only one, after one plain gradient "
        f"step. 'cosine' compares its reconstruction with the frame.\n"
        f"- Intervals of attacks are over owners and seeds (n = {values['rows'][0]['n']}); intervals of costs are over "
        f"seeds.\n\n{over_seeds(values)} {describe(values['hardware'])}\n"
    )


def over_seeds(values: dict[str, Any]) -> str:
    """Return the number of seeds, and the kind of intervals."""
    count = len(values["seeds"])
    return f"{count} seeds; intervals are Student's t at 95%." if count > 1 else "One seed, so no intervals over seeds."


def estimate(value: dict[str, Any], form: str) -> str:
    """Return a mean with its interval, if there is one."""
    ends = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{ends}"


def limits_table(one: dict[str, Any]) -> str:
    """Return a table of goals reached and limits broken, with all splits together first."""
    header = ["method", "split", "n", "goal reached", "limit broken", "models"]
    rows = sorted(one["rows"], key=lambda row: row["split"] != "all")
    lines = [
        [row["method"], row["split"], str(row["n"]), rate(row["reached rate"]), rate(row["broken rate"]),
         ", ".join(f"{100 * seed['broken'] / seed['n']:.1f}" for seed in row["seeds"].values())]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def calibrations(models: list[dict[str, Any] | None]) -> str:
    """Return the margin factors that the calibration of each model tried."""
    lines, failures = [], []
    for number, margins in enumerate(models, start=1):
        found = (margins or {}).get("calibrated", {})
        if "refused" in found:
            failures.append(f"Model {number} was not calibrated: {found['refused']}.\n")
        for each in found.get("rounds", []):
            broken = f"{each['broken']} of {each['episodes']}"
            lines.append([str(number), f"{each['factor']:.2f}", broken, f"{each['success']:.0%}"])
    header = ["model", "margin factor tried", "limit broken", "goals reached in the first split"]
    return "\n".join(["Calibration rounds:\n", *([table(header, lines)] if lines else []), *failures])


def rate(value: list[float]) -> str:
    middle, low, high = (100 * each for each in value)
    return f"{middle:.1f}% [{low:.1f}, {high:.1f}]"


def far_goals() -> str:
    """Return the results of memory, landmarks and hierarchy; parts without measurements are omitted."""
    parts = ["## Far goals\n"]
    for name in ("maze-100", "maze-200", "maze-400", "closing-doors", "pusht-hierarchy"):
        if (path := RESULTS / f"success-{name}.json").exists():
            values = json.loads(path.read_text())
            header, *rows = values["table"]
            seeds = len(values["seconds"])
            shown = [index for index, title in enumerate(header) if title not in ("steps / shortest", "SPL")]
            lines = [[row[index] for index in shown] for row in rows]
            about = f"{several_splits(header)}{seeds} training seeds. {describe(values['hardware'])}"
            parts.append(f"    {values['command']}\n\n{table([header[index] for index in shown], lines)}\n{about}\n")
    if (path := RESULTS / "restart.json").exists():
        values = json.loads(path.read_text())
        lines = [
            [
                row["what"],
                interval(row["success"], row),
                str(row["n"]),
                ", ".join(f"{100 * x:.0f}" for x in row["models"]),
            ]
            for row in values["rows"]
        ]
        parts.append(
            f"### After a restart\n\n    {values['command']}\n\n"
            + table(["the memory", "success", "n", "models"], lines)
            + "\nThe process that explored was killed with SIGKILL before another process received the goals. "
            f"{values['note']} {describe(values['hardware'])}\n"
        )
    if (path := RESULTS / "curiosity.json").exists():
        values = json.loads(path.read_text())
        marks = list(dict.fromkeys(row["steps"] for row in values["rows"]))
        lines = []
        for name in dict.fromkeys(row["explorer"] for row in values["rows"]):
            mine = [row for row in values["rows"] if row["explorer"] == name]
            lines.append([name, *(interval(row["share"], row) for row in mine)])
        parts.append(
            f"### Curiosity\n\n    {values['command']}\n\n"
            + table(["explorer", *(f"after {mark:,} steps" for mark in marks)], lines)
            + f"\nThe table gives the share of a new maze's cells that the agent entered, with n = "
            f"{values['rows'][0]['n']} mazes over all models. Intervals are Student's t. "
            f"{describe(values['hardware'])}\n"
        )
    if (path := RESULTS / "memory-recall.json").exists():
        values = json.loads(path.read_text())
        columns = ["memories", "queries", "recall@10", "p50 ms", "p99 ms", "exact search p50 ms"]
        lines = [[show(row[column]) for column in columns] for row in values["rows"].values()]
        parts.append(
            f"### Recall\n\n    {values['command']}\n\n{table(columns, lines)}\n{describe(values['hardware'])}\n"
        )
    if (path := RESULTS / "memory-kills.json").exists():
        values = json.loads(path.read_text())
        lines = [
            [name, *(f"{row[key]:,}" for key in ("kills", "acknowledged", "reads beside")), str(len(row["wrong"]))]
            for name, row in values["rows"].items()
        ]
        parts.append(
            f"### SIGKILL during appends\n\n    {values['command']}\n\n"
            + table(["memory", "kills", "acknowledged", "concurrent reads", "lost or half-written"], lines)
            + f"\n{describe(values['hardware'])}\n"
        )
    return "\n".join(parts)


def interval(value: float, row: dict[str, Any]) -> str:
    return f"{100 * value:.1f}% [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def control_rate(values: dict[str, Any]) -> str:
    threads = list(values["latency"])
    splits = list(dict.fromkeys(row["split"] for row in values["success"]))
    rows = []
    for name in values["methods"]:
        times = [values["latency"][each][name] for each in threads]
        line = [name, *(f"{one['median_ms']:.2f} / {one['p99_ms']:.2f} (n = {one['n']})" for one in times)]
        line.append(" / ".join(f"{one['times_faster']:.0f}" for one in times))
        for split in splits:
            row = next(row for row in values["success"] if (row["method"], row["split"]) == (name, split))
            low, high = (round(100 * bound) for bound in row["interval"])
            line.append(f"{100 * row['rate']:.0f} ({low} to {high}), n = {row['n']}")
        rows.append(line)
    header = ["method", *(f"{counted(int(each), 'thread')}: ms, median / p99" for each in threads)]
    return (
        f"## Planning at control rate\n\n    {values['command']}\n\n"
        + table([*header, f"speedup: {' / '.join(threads)} threads", *(f"{split}, %" for split in splits)], rows)
        + f"\nThe table gives one decision for one environment (encoding and planning), on {values['protocol']} with "
        f"training seeds {', '.join(map(str, values['seeds']))}. CEM lists samples x iterations x blocks. "
        f"{values['note']} {describe(values['hardware'])}\n"
    )


def speeds(name: str, lines: list[dict[str, Any]]) -> str:
    hardware = next((line["hardware"] for line in lines if "hardware" in line), {})
    blocks = []
    for line in lines:
        flat = flatten({key: value for key, value in line.items() if key not in ("hardware", "benchmark")})
        blocks.append(table(["figure", "value"], [[key, show(value)] for key, value in flat.items()]))
    if len(lines) > 2:
        keys = [key for key in lines[0] if key not in ("hardware", "benchmark") and not isinstance(lines[0][key], dict)]
        blocks = [table(keys, [[show(line.get(key, "")) for key in keys] for line in lines])]
    adds_itself = name == "convert_large"
    command = f"{name}.py --gib 20" if adds_itself else f"{name}.py >> benchmarks/results/{name}.jsonl"
    return f"## Speed: {name}\n\n    python benchmarks/{command}\n\n" + "\n".join(blocks) + f"\n{describe(hardware)}\n"


def busy(lines: list[dict[str, Any]]) -> str:
    fixed = list(dict.fromkeys(mode for line in lines for mode in line["rates"] if mode != "chosen"))
    rows = [
        [
            line["benchmark"].removeprefix("busy "),
            str(line["neighbours"]),
            line["unit"],
            *(
                f"{line['rates'][mode]:,.{0 if line['rates'][mode] > 100 else 1}f} (n = {len(line['by_repeat'][mode])})"
                for mode in ("chosen", *fixed)
            ),
            ", ".join(map(str, line["chosen_threads"])),
            f"{line['share']:.2f}",
        ]
        for line in lines
    ]
    header = ["work", "busy processes", "unit", "chosen", *(counted(int(mode), "thread") for mode in fixed)]
    return (
        "## Threads on a busy machine\n\n    python benchmarks/busy.py\n\n"
        + table([*header, "threads that were chosen", "chosen / best fixed number"], rows)
        + f"\n{describe(lines[0]['hardware'])}\n"
    )


def checking(values: dict[str, Any]) -> str:
    def ratio(median: float, low: float, high: float) -> str:
        return f"{median:.3f} ({low:.3f} to {high:.3f})"

    rows = [
        [
            row["data"],
            str(row["pairs"]),
            str(row["steps"]),
            *(f"{row[which]['frames_per_second']:,.0f}" for which in ("with", "without")),
            ratio(*row["ratio"]),
            ratio(*row["cpu_ratio"]),
        ]
        for row in values["rows"]
    ]
    header = ["data", "pairs", "steps", "frames/s with checks", "without", "ratio (lowest to highest)", "in CPU time"]
    return (
        f"## Speed: checking digests\n\n    python benchmarks/checking.py\n\n{values['frames']:,} frames.\n\n"
        + table(header, rows)
        + f"\n{describe(values['hardware'])}\n"
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}: ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def counted(count: int, what: str) -> str:
    """Return a count with its noun, singular or plural."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def describe(hardware: Any) -> str:
    if isinstance(hardware, list):
        hardware = hardware[0] if hardware else {}
    if not hardware:
        return ""
    accelerator = hardware.get("accelerator") or "no accelerator"
    return (
        f"Measured on {hardware['processor']}, {hardware['cores']} cores, {counted(hardware['threads'], 'thread')}, "
        f"{hardware['memory_gib']} GiB, {accelerator}."
    )


if __name__ == "__main__":
    main()
