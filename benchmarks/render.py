"""Writes benchmarks/RESULTS.md from benchmarks/results/: run it after the other benchmarks.

python benchmarks/render.py
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

INTRODUCTION = """# Results

Every figure here was printed by the command above it; `python benchmarks/render.py` writes this page from what these
commands left in `benchmarks/results/`. Intervals are Wilson's at 95%, over the episodes of all models together;
"models" gives the lowest and the highest rate of one model. Protocols are in
[docs/protocols.md](../docs/protocols.md). Speeds are of a shared machine: take ratios within one run rather than the
figures themselves.
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
    (Path(__file__).parent / "RESULTS.md").write_text("\n".join(parts))


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
                f"{pooled[planner]['n']}, {len(values['training_minutes'])} seed(s)",
                f"{values['frames'][0]:,}",
                ", ".join(map(str, values["training_minutes"])),
                "-" if published is None else " / ".join(map(str, published)),
            ]
        )
    header = ["world", "planner, the recipe's own", "success", "random", "cloning", "n", "frames", "training minutes"]
    return (
        "## Beside the field\n\nGoals 25 steps ahead, budget 50, protocols `NAME-25@1`; "
        "[docs/protocols.md](../docs/protocols.md) puts every convention side by side, and says what differs: above "
        "all, data and goals here are of policies that aim at nothing, there of experts for PushT. cube-state sees the "
        "state vector, the published figures are from pixels, where random actions reach 48.\n\n"
        + table([*header, "published (LeWM / DINO-WM / PLDM)"], rows)
    )


def success(name: str, values: dict[str, Any]) -> str:
    header, *rows = values["table"]
    seconds = ", ".join(
        f"{each['collect']:.0f} + {each['train']:.0f} + {each['evaluate']:.0f} s" for each in values["seconds"]
    )
    reversible = {head["reversible"] for head in values["heads"]}
    ranks = ", ".join(f"{head['rank_correlation/distance']:.2f}" for head in values["heads"])
    latent = ", ".join(f"{head['rank_correlation/latent']:.2f}" for head in values["heads"])
    return (
        f"## Zero-shot success: {name}\n\n    {values['command']}\n\n{table(header, rows)}\n"
        f"To the left of a slash is the first split, to the right the next. Collecting + training (world model, "
        f"distance, reactive policy, cloning) + evaluating all methods, for each model: {seconds} "
        f"(of a run that was taken up, only what was left). Dynamics found "
        f"reversible: {', '.join(map(str, sorted(reversible)))}. Rank correlation with the steps that the data took: "
        f"learned distance {ranks}; latent L2 {latent}. {describe(values['hardware'])}\n"
    )


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
        f"One training seed ({values['training_seeds'][0]}), n = {n} for each rate. Errors are of a linear probe of "
        f"the position on held-out episodes; 'inverse dynamics' is the unexplained share of the action's variance. "
        f"{describe(values['hardware'])}\n"
    )


def control_loop(values: dict[str, Any]) -> str:
    rows = []
    for mode in ("as it is", "slowed"):
        loop, plant = values[mode]["loop"], values[mode]["plant"]
        plan, reaction = loop["plan_ms"], plant["reaction_ms"]
        rows.append(
            [
                mode,
                f"{loop['periods']:,}",
                f"{loop['rate_held']:g} Hz",
                f"{loop['misses']:,}",
                str(plant["unnoticed"]),
                f"{plan['p50']:.1f} / {plan['p99']:.1f} / {plan['max']:.0f}",
                "-" if reaction is None else f"{reaction['max']:.1f}",
                f"{values[mode]['reached']} of {values[mode]['goals']}",
            ]
        )
    header = ["planner", "periods", "rate held", "missed", "of these unnoticed", "plan ms: median / p99 / largest"]
    return (
        f"## Real-time loop on an arm\n\n    python benchmarks/control_loop.py --seconds {values['seconds']:g}\n\n"
        + table([*header, "safe action after the deadline, ms at most", "goals"], rows)
        + f"\nThe deadline is {values['as it is']['loop']['deadline_ms']:g} ms after the observation; see "
        f"[docs/deploy.md](../docs/deploy.md). {describe(values['hardware'])}\n"
    )


def guardrails() -> str:
    """Return how well limits are kept, and what that costs; a part that was not measured is left out."""
    parts = ["## Guardrails\n"]
    if (path := RESULTS / "guardrails.json").exists():
        values = json.loads(path.read_text())
        seeds, about = len(values["seeds"]), describe(values["hardware"])
        parts.append(f"    {values['command']}\n\n{seeds} training seeds. {about}\n")
        for risk, one in values.get("risks", {}).items():
            parts.append(f"### A stated risk of {100 * float(risk):g}%\n\n{kept_limits(one)}")
            for place, margins in enumerate(one["margins"]):
                parts.append(calibration_told(place, margins))
        for title, one in values.get("shifts", {}).items():
            when = "" if title == "as calibrated" else ", from the middle of each episode on"
            parts.append(f"### Dynamics {title}{when}\n\n{kept_limits(one)}")
    if (path := RESULTS / "attacks.json").exists():
        values = json.loads(path.read_text())
        header = ["attack", "method", "n", "goal reached", "limit broken", "of these in the audit log"]
        header += ["seen by the agent itself", "plans refused"]
        lines = [
            [row["attack"], row["method"], str(row["n"]), rate(row["reached rate"]), rate(row["broken rate"]),
             *(of_broken(row, key) for key in ("logged", "seen")), f"{row['refused']:,}"]
            for row in values["rows"]
        ]  # fmt: skip
        parts.append(f"### Attacks\n\n    {values['command']}\n\n{table(header, lines)}")
    if (path := RESULTS / "two-policies.json").exists():
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
            f"### One model, two policies\n\n    {values['command']}\n\n{table(header, lines)}\n"
            "![ways of the two owners](results/two-policies.svg)\n"
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
            "plans in which all held",
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
        told = describe(values["hardware"])
        parts.append(f"### What guardrails cost\n\n    {values['command']}\n\n{table(header, lines)}\n{told}\n")
    return "\n".join(parts) if len(parts) > 1 else ""


def of_broken(row: dict[str, Any], key: str) -> str:
    """Say of how many broken limits something holds; nothing of a method that keeps no log."""
    return "-" if row["method"] == "no guardrail" else f"{row[key]} of {row['broken']}"


def weaving(values: dict[str, Any]) -> str:
    """Return what each owner reaches at home, by every way to a model."""
    ways = [cell["way"] for cell in values["rows"][0]["cells"]]
    owners = [row["owner"] for row in values["rows"] if row["owner"] != "all"]
    lines = [
        [row["owner"], str(row["cells"][0]["n"]), *(interval(cell["rate"], cell) for cell in row["cells"])]
        for row in values["rows"]
    ]
    return (
        f"## Many owners\n\n    {values['command']}\n\n{table(['owner', 'n', *ways], lines)}\n"
        f"Goals reached at home by tree search, over {len(values['seeds'])} seed(s); an owner's ways take as many "
        f"steps from the same beginning, `pooled` as many as the first owner's. In `woven` all is shared but "
        f"statistics, in `woven + sovereign` the stems of camera and actions are each owner's own; the last base of "
        f"both settled at home. The owners of examples/five_owners.yaml sent {values['bytes'] / 1e6:.0f} MB in all at "
        f"the first seed. "
        f"{describe(values['hardware'])}\n\n{last_bases(values['base losses'], owners)}"
    )


def last_bases(every: list[dict[str, Any]], owners: list[str]) -> str:
    """Return what the last base is worth to each owner as it came."""
    lines = [
        [each["way"], *(", ".join(f"{one[owner]:.2f}" for one in each["losses"]) for owner in owners)] for each in every
    ]
    return (
        f"Held-out loss under the last base as it came, by seed; at home stems let one convention be shared.\n\n"
        f"{table(['way', *owners], lines)}"
    )


def weaving_clash(values: dict[str, Any]) -> str:
    """Return what clashing conventions of actions do to the base, and what sovereign stems do for it."""
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
        f"The actions of `turned` mean the opposite of those of `straight`. Goals reached at home by tree search, with "
        f"the last base as it came. {len(values['seeds'])} seed(s). {describe(values['hardware'])}\n"
    )


def weaving_bytes(values: dict[str, Any]) -> str:
    """Return what seldom and coarse exchange saves, and what it costs."""
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
        f"{values['owners']} owners of one world, each with {settings['episodes']} episodes, "
        f"{settings['steps']} steps of {settings['batch']} windows each, the first {settings['pilot']} of them one "
        f"owner's alone, whose base all others take. 'MB up' is of the contributions that the ledger names "
        f"(synchronous: a float32 gradient for each owner and step); 'up and down' of all messages, verdicts and the "
        f"bases that are judged included. The error is of latents 8 blocks ahead in new episodes, in shares of their "
        f"variance; {unit} is of the place that a linear probe reads there. Outer step: "
        f"{settings['outer']['learning_rate']} with momentum {settings['outer']['momentum']}"
        f"{', statistics of the frames shared' if settings['partition'] else ''}"
        f"{f', synchronous steps at rate {rate}' if (rate := settings['rate']) else ''}; chosen on another seed. "
        f"{over_seeds(values)} {describe(values['hardware'])}\n"
    )


def weaving_malicious(values: dict[str, Any]) -> str:
    """Return what one malicious owner does, by what the rules defend with."""
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
        f"Of an honest owner, at home, by tree search; intervals are Wilson's. 'Out' are rounds without a say, by the "
        f"ledger; 'stopped' are seeds in which losses were not finite any more, and no model came of it. "
        f"{len(values['seeds'])} seed(s). {describe(values['hardware'])}\n"
    )


def weaving_privacy(values: dict[str, Any]) -> str:
    """Return what noise costs and promises, and what attacks find."""
    untrained = [estimate(values["untrained"][key], ".3g") for key in ("loss", "places")]
    lines = [["untrained", "-", "-", *untrained, *["-"] * 4]]
    attacks = ("losses", "picture", "one frame", "cosine")
    for row in values["rows"]:
        epsilon = "none" if row["epsilon"] is None else f"{row['epsilon']:,.3g}"
        costs = ["not finite" if row[key] is None else estimate(row[key], ".3g") for key in ("loss", "places")]
        found = [estimate(row[key], ".2f") for key in attacks]
        noise = "not clipped" if row["noise"] is None else f"{row['noise']:g}"
        lines.append([noise, "the sum" if row["secure"] else "each delta", epsilon, *costs, *found])
    header = ["noise, in clips", "seen", "epsilon", "held-out loss", "places", "by losses", "by picture"]
    settings = values["settings"]
    return (
        f"## Many owners: privacy\n\n    {values['command']}\n\n{table([*header, 'one frame', 'cosine'], lines)}\n"
        f"Epsilon is an owner's, at delta {values['delta']:g}, of {settings['rounds']} rounds; {settings['owners']} "
        f"owners send {values['values']:,} values each. 'Places' is how far off a probe reads a spot, in spacings of "
        f"receptors. The attacks are AUROCs, 0.5 is guessing: what was trained on, told by losses and by the picture "
        f"that the first layer gives away; and a frame that was the only one, in one plain step, with the cosine of "
        f"what is made of it. Intervals are Student's, over owners and seeds (n = {values['rows'][0]['n']}), "
        f"those of costs over seeds. {over_seeds(values)} {describe(values['hardware'])}\n"
    )


def over_seeds(values: dict[str, Any]) -> str:
    """Say how many seeds there are, and what intervals they give."""
    count = len(values["seeds"])
    return (
        f"{count} seeds; intervals are Student's at 95%." if count > 1 else "One seed, so without intervals over seeds."
    )


def estimate(value: dict[str, Any], form: str) -> str:
    """Return a mean with its interval, where there is one."""
    ends = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{ends}"


def kept_limits(one: dict[str, Any]) -> str:
    """Return a table of goals reached and limits broken, over all splits first."""
    header = ["method", "split", "n", "goal reached", "limit broken", "models"]
    rows = sorted(one["rows"], key=lambda row: row["split"] != "all")
    lines = [
        [row["method"], row["split"], str(row["n"]), rate(row["reached rate"]), rate(row["broken rate"]),
         ", ".join(f"{100 * seed['broken'] / seed['n']:.1f}" for seed in row["seeds"].values())]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def calibration_told(place: int, margins: dict[str, Any] | None) -> str:
    """Say how the calibration of one model went."""
    found = (margins or {}).get("calibrated", {})
    if "refused" in found:
        return f"Model {place + 1} was not calibrated: {found['refused']}.\n"
    rounds = [
        f"{each['factor']:.2f} ({each['broken']} of {each['episodes']} broken, {each['success']:.0%} reached in the "
        f"first split)"
        for each in found.get("rounds", [])
    ]
    return f"Model {place + 1}: stretches of the margins tried in calibration: {'; '.join(rounds)}.\n"


def rate(value: list[float]) -> str:
    middle, low, high = (100 * each for each in value)
    return f"{middle:.1f}% [{low:.1f}, {high:.1f}]"


def far_goals() -> str:
    """Return what memory, landmarks and hierarchy are good for; a part that was not measured is left out."""
    parts = ["## Far goals\n"]
    for name in ("maze-100", "maze-200", "maze-400", "closing-doors", "pusht-hierarchy"):
        if (path := RESULTS / f"success-{name}.json").exists():
            values = json.loads(path.read_text())
            header, *rows = values["table"]
            seeds = len(values["seconds"])
            kept = [index for index, title in enumerate(header) if title not in ("steps / shortest", "SPL")]
            lines = [[row[index] for index in kept] for row in rows]
            about = f"{seeds} training seeds. {values.get('beside', '')} {describe(values['hardware'])}"
            parts.append(f"    {values['command']}\n\n{table([header[index] for index in kept], lines)}\n{about}\n")
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
            + "\nThe process that explored was killed with SIGKILL before another was told the goals. "
            f"{values.get('beside', '')} {describe(values['hardware'])}\n"
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
            + f"\nThe share of a new maze's cells that were entered, n = {values['rows'][0]['n']} mazes over all "
            f"models; intervals are Student's. {describe(values['hardware'])}\n"
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
            + table(["memory", "kills", "acknowledged", "reads beside", "lost or half-written"], lines)
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
    header = ["method", *(f"{each} threads: ms, median / p99" for each in threads)]
    return (
        f"## Planning at control rate\n\n    {values['command']}\n\n"
        + table([*header, f"times faster: {' / '.join(threads)} threads", *(f"{split}, %" for split in splits)], rows)
        + f"\nOne decision for one environment: encode and plan. CEM is samples x iterations x blocks, "
        f"on {values['protocol']} at training seeds {', '.join(map(str, values['seeds']))}. {values.get('beside', '')} "
        f"{describe(values['hardware'])}\n"
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


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}: ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def describe(hardware: Any) -> str:
    if isinstance(hardware, list):
        hardware = hardware[0] if hardware else {}
    if not hardware:
        return ""
    accelerator = hardware.get("accelerator") or "no accelerator"
    return (
        f"Measured on {hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads, "
        f"{hardware['memory_gib']} GiB, {accelerator}."
    )


if __name__ == "__main__":
    main()
