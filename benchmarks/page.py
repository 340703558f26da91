# SPDX-License-Identifier: Apache-2.0
"""One HTML page with a table and plots for each benchmark; plots are files beside it."""
import html
import json
import os

import results

_COLOURS = {"tandem": "#1b6ca8", "testpmd": "#d1862f", "ovs-dpdk": "#7a7a7a", "tap": "#a0529c", "unprotected": "#58a55c"}
_STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
img { max-width: 100% } .wide { overflow-x: auto }
"""


def _colour(system):
    return _COLOURS.get(system, "#444444")


def _label(row):
    plain = (str(value) for key, value in row.items()
             if key in ("direction", "bytes", "ring", "netdev", "cause", "heir", "guest", "polling", "frames_s"))
    words = " ".join(plain)
    return words + (" mergeable" if row.get("mergeable") else "")


def _bars(axes, rows, value="median"):
    """Grouped by everything but the system; the line on a bar is from smallest to largest sample."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    groups = list(dict.fromkeys(_label(row) for row in rows))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        own = {_label(row): row for row in rows if row["system"] == system and row[value] is not None}
        at = [groups.index(label) + number * width for label in own]
        middle = [row[value] for row in own.values()]
        spread = [[row[value] - row["min"] for row in own.values()], [row["max"] - row[value] for row in own.values()]]
        axes.bar(at, middle, width, yerr=spread, label=system, color=_colour(system), capsize=2)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], groups, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel(rows[0]["unit"])
    axes.legend()


def _distributions(axes, rows):
    """One line a row: which part of the samples is at most so long. Colours tell causes apart, kinds of line who takes over."""
    causes = list(dict.fromkeys(row["cause"] for row in rows))
    heirs = list(dict.fromkeys((row["system"], row["heir"]) for row in rows))
    styles = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 1, 1, 1, 1, 1)))
    for row in rows:
        samples = sorted(row["samples"])
        if not samples:
            continue
        parts = [(place + 1) / len(samples) for place in range(len(samples))]
        axes.step([samples[0], *samples], [0, *parts], where="post", label=f"{row['system']}: {_label(row)}",
                  color=f"C{causes.index(row['cause']) % 10}", linestyle=styles[heirs.index((row["system"], row["heir"])) % len(styles)])
    axes.set_xscale("log")
    axes.set_xlabel(rows[0]["unit"])
    axes.set_ylabel("part of the samples")
    axes.grid(True, which="both", alpha=0.3)
    # Between what goes on by itself and what is started again there are decades.
    axes.legend(fontsize=8, loc="center", bbox_to_anchor=(0.63, 0.5))


def _scale(axes, rows):
    for key, name in (("median", "last flow again"), ("takeover_us", "took over")):
        pairs = sorted((row["queue_pairs"], row[key]) for row in rows if row.get(key) is not None)
        axes.plot([pair[0] for pair in pairs], [pair[1] for pair in pairs], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("queue pairs")
    axes.set_ylabel("us from the kill")
    axes.grid(True, alpha=0.3)
    axes.legend()


# benchmark -> [(file name, how it is drawn, which rows)]
_PLOTS = {
    "throughput": [(f"throughput-{ring}-{length}.svg", _bars,
                    lambda row, ring=ring, length=length: row["ring"] == ring and row["bytes"] == length)
                   for ring in ("split", "packed") for length in (64, 512, 1518)],
    "failover": [("failover-cdf.svg", _distributions, lambda row: True)],
    "overhead": [("overhead.svg", _bars, lambda row: row["unit"] != "instructions/packet"),
                 ("overhead-instructions.svg", _bars, lambda row: row["unit"] == "instructions/packet")],
    "latency": [("latency-backend.svg", _bars, lambda row: row["guest"] == "prober"),
                ("latency-guest.svg", _bars, lambda row: row["guest"] != "prober")],
    "scale": [("scale.svg", _scale, lambda row: True)],
    "uplink": [("uplink.svg", _bars, lambda row: True)],
    "guest_to_guest": [("guest-to-guest.svg", _bars, lambda row: True)],
}


def _draw(pyplot, data, directory):
    """The names of the files that were drawn."""
    drawn = []
    for name, how, which in _PLOTS[data["benchmark"]]:
        rows = [row for row in data["rows"] if which(row) and row["median"] is not None]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(11, 5))
        how(axes, rows)
        figure.tight_layout()
        figure.savefig(os.path.join(directory, name))
        pyplot.close(figure)
        drawn.append(name)
    return drawn


def _section(data, plots):
    head, *rows = results.cells(data) if data["rows"] else [[]]
    parts = [f"<h2>{html.escape(data['benchmark'])}</h2><pre>{html.escape(json.dumps(data['environment']))}</pre>"]
    if data["quick"]:
        parts.append("<p><b>Quick run: these numbers show that the program works, nothing else.</b></p>")
    parts += [f"<p><img src='{name}' alt='{html.escape(data['benchmark'])}'></p>" for name in plots]
    parts.append("<div class='wide'><table><tr>" + "".join(f"<th>{html.escape(word)}</th>" for word in head) + "</tr>")
    parts += ["<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in row) + "</tr>" for row in rows]
    parts.append("</table></div><ul>")
    for kind in ("failed", "skipped"):
        parts += [f"<li>{kind}: {html.escape(entry['what'])}: {html.escape(entry['why'])}</li>" for entry in data[kind]]
    parts += [f"<li>{html.escape(text)}</li>" for text in data["notes"]]
    parts.append(f"</ul><p><a href='{data['benchmark']}.json'>all samples</a></p>")
    return "\n".join(parts)


def _found_in(directory):
    """What each benchmark's JSON file there says, in the order of _PLOTS."""
    for name in _PLOTS:
        path = os.path.join(directory, f"{name}.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                yield json.load(file)


def write(report, directory):
    """The report's JSON file, and index.html with plots of all such files there, also from other runs. Without matplotlib the
    page has tables only and says so."""
    os.makedirs(directory, exist_ok=True)
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        pyplot = None
        report.note("no plots: python3-matplotlib is not installed (benchmarks/install-peers)")
    report.write(os.path.join(directory, f"{report.data['benchmark']}.json"))
    sections = [_section(data, _draw(pyplot, data, directory) if pyplot else []) for data in _found_in(directory)]
    with open(os.path.join(directory, "index.html"), "w", encoding="utf-8") as file:
        file.write(f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>Tandem: benchmarks</title><style>{_STYLE}</style>"
                   f"<h1>Tandem: benchmarks</h1>{''.join(sections)}</html>\n")
