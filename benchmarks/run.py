"""Compare the speed of synchronized batch normalization with MXNet and PyTorch.

    make bench                                  # or
    python benchmarks/run.py [--quick] [--out DIR] [--torch-python PATH]

Each candidate runs in its own process, because two OpenMP teams in one process compete for the
cores.  Candidates take turns, because machines are shared: compare within a row, not across runs.
Before anything is timed, all results are checked against NumPy in float64.  Prints tables and
writes benchmark.json, benchmark.md and benchmark.png.  Takes under five minutes on two cores.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "tests", "helpers"))
from reference import batch_norm, largest_error  # noqa: E402

MAIN = [
    ((16, 64, 56, 56), 1),
    ((32, 256, 14, 14), 1),
    ((8, 64, 128, 128), 1),
    ((16, 56, 56, 64), -1),
]
ODD = [
    ((16, 3, 224, 224), 1),
    ((16, 65, 56, 56), 1),
    ((16, 56, 56, 3), -1),
    ((16, 56, 56, 65), -1),
    ((64, 512, 7, 7), 1),
    ((64, 7, 7, 512), -1),
    ((512, 1024, 1, 1), 1),
    ((1, 64, 128, 128), 1),
    ((4096, 256), 1),
    ((4096, 65), 1),
]
CHANNELS = [(16, c, 28, 28) for c in (16, 64, 256, 1024)]
SPATIAL = [(16, 64, s, s) for s in (7, 14, 28, 56, 112)]
SMALL = [((2, 16, 4, 4), 1), ((8, 64), 1), ((4, 64, 8, 8), 1)]
TOLERANCE = {"float16": 2e-3, "float32": 1e-4, "float64": 1e-10}


class Candidate:
    """A worker process; see worker.py."""

    def __init__(
        self, label, name=None, python=sys.executable, threads=2, library="", package=None
    ):
        self.label = label
        environment = {**os.environ, "GLUON_SYNCBN_BENCH_LIBRARY": library}
        environment.pop("OMP_NUM_THREADS", None)
        if package:  # the folder that has gluon_syncbn
            environment["PYTHONPATH"] = package
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [python, os.path.join(HERE, "worker.py"), name or label],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        first = self.process.stdout.readline()
        self.hello = json.loads(first) if first else {"missing": "it did not start"}

    @property
    def missing(self):
        return self.hello.get("missing")

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.label} ended while working on {order}")
        return json.loads(line)


def take_turns(entries, seconds, rounds):
    """Return the median milliseconds of each (candidate, case); None if it has no such case."""
    times = [[] for _ in entries]
    for _ in range(rounds):
        for collected, (candidate, case) in zip(times, entries):
            answer = candidate.ask(case=case, seconds=seconds / rounds)
            if answer["times"] is not None:
                collected.extend(answer["times"])
    for candidate in {id(c): c for c, _ in entries}.values():
        candidate.ask(free=True)
    return [statistics.median(t) if t else None for t in times]


def check(candidates, case):
    """Exit unless every candidate computes what NumPy computes in float64."""
    from worker import arrays_of

    x, dy, gamma, beta = arrays_of(case)
    want = batch_norm([x], [dy], gamma, beta, case["axis"])
    wanted = want.y[0], want.dx[0], want.dgamma[0], want.dbeta[0]
    with tempfile.TemporaryDirectory() as folder:
        for candidate in candidates:
            path = os.path.join(folder, "results.npz")
            answer = candidate.ask(case=case, save=path)
            if not answer.get("saved"):
                continue
            with np.load(path) as results:
                for name, array, w in zip(("y", "dx", "dgamma", "dbeta"), results.values(), wanted):
                    error = largest_error(array, w)
                    if not error < TOLERANCE[case["dtype"]]:
                        raise SystemExit(f"{candidate.label}: {name} of {case} is off by {error}")
            candidate.ask(free=True)


def named(shape, axis=1, dtype="float32"):
    text = "×".join(map(str, shape))
    return (
        text
        + (" channels last" if axis == -1 and len(shape) > 2 else "")
        + ("" if dtype == "float32" else f" {dtype}")
    )


class Report:
    """Collects tables, prints them and formats them as Markdown."""

    def __init__(self):
        self.tables = []

    def table(self, title, columns, note=""):
        self.tables.append({"title": title, "note": note, "columns": columns, "rows": []})
        print(f"\n{title}\n  {note}" if note else f"\n{title}", flush=True)
        print("  " + "  ".join(f"{c:>20}" for c in columns), flush=True)

    def row(self, *cells):
        self.tables[-1]["rows"].append(cells)
        print("  " + "  ".join(f"{self.text(c):>20}" for c in cells), flush=True)

    @staticmethod
    def text(cell):
        if cell is None:
            return "–"
        return cell if isinstance(cell, str) else f"{cell:.3g}"

    def markdown(self, about):
        lines = [about, ""]
        for table in self.tables:
            lines += [f"### {table['title']}", ""]
            if table["note"]:
                lines += [table["note"], ""]
            lines.append("| " + " | ".join(table["columns"]) + " |")
            lines.append("|" + " --- |" * len(table["columns"]))
            lines += ["| " + " | ".join(map(self.text, r)) + " |" for r in table["rows"]]
            lines.append("")
        return "\n".join(lines)


def ratio(a, b):
    return None if a is None or b is None else a / b


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def draw(report, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = report.tables[0]
    labels = table["columns"][2:]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        values = [row[i + 2] for row in table["rows"]]
        places = [j + (i - len(labels) / 2 + 0.5) * width for j, v in enumerate(values) if v]
        axes.bar(places, [v for v in values if v], width, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(top=4 * axes.get_ylim()[1])  # room for the legend
    axes.set_ylabel("time, as multiples of the floor")
    axes.set_xticks(range(len(table["rows"])), [row[0] for row in table["rows"]], fontsize=8)
    axes.legend(fontsize=8, ncols=4)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("forward + backward, float32, two threads; the floor is eight passes of a copy")
    figure.savefig(path, dpi=120)


def write(report, about, folder, name):
    os.makedirs(folder, exist_ok=True)
    prefix = os.path.join(folder, name)
    with open(f"{prefix}.json", "w", encoding="utf-8") as file:
        json.dump({"about": about, "tables": report.tables}, file, indent=1, ensure_ascii=False)
    with open(f"{prefix}.md", "w", encoding="utf-8") as file:
        file.write(report.markdown(about))
    print(f"\nwrote {prefix}.json and {prefix}.md")
    return prefix


def on_gpu(arguments):
    """Time the CUDA kernels, in the Python that has PyTorch."""
    import gpu

    python = os.path.abspath(arguments.torch_python)
    if gpu.unavailable().startswith("PyTorch is not") and os.path.exists(python):
        command = [os.path.abspath(__file__), *sys.argv[1:], "--torch-python", ""]
        os.execv(python, [python, *command])
    if gpu.unavailable():
        raise SystemExit(f"nothing to time on a GPU: {gpu.unavailable()}")
    report = Report()
    about = gpu.run(report, arguments.quick)
    print(about)
    write(report, about, arguments.out, "gpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="folder for the results")
    parser.add_argument(
        "--ctx", choices=["cpu", "gpu"], default="cpu", help="gpu: the CUDA kernels (see gpu.py)"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the time, more noise")
    parser.add_argument("--library", required=True, help="the library built from kernels_bench.cc")
    parser.add_argument(
        "--torch-python",
        default=os.path.join(HERE, "..", ".venv-torch", "bin", "python"),
        help="a Python with PyTorch (make torch); if it does not exist, this one.  PyTorch needs a "
        "NumPy that MXNet cannot use",
    )
    arguments = parser.parse_args()
    if arguments.ctx == "gpu":
        return on_gpu(arguments)
    seconds, rounds = (0.4, 3) if arguments.quick else (1.1, 5)

    floor, kernels = (Candidate(n, library=arguments.library) for n in ("floor", "kernels"))
    ours, plain = Candidate("ours"), Candidate("mxnet BatchNorm")
    exchanging = Candidate("ours, exchanging")
    plain_1 = Candidate("mxnet BatchNorm, its default threads", "mxnet BatchNorm", threads=None)
    own = Candidate("mxnet SyncBatchNorm")
    separate = os.path.exists(arguments.torch_python)
    torch = Candidate("pytorch", python=arguments.torch_python if separate else sys.executable)
    present = [c for c in (kernels, ours, exchanging, plain, plain_1, own, torch) if not c.missing]
    if torch.missing:
        print(f"without PyTorch: {torch.missing}")
    about = (
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, MXNet {ours.hello['ready']}, "
        f"PyTorch {torch.hello.get('ready', 'not there')}. Medians; candidates in turn."
    )
    print(about)

    def case(shape, axis=1, dtype="float32", **more):
        return {"shape": shape, "axis": axis, "dtype": dtype, **more}

    for shape, axis in [*MAIN, ((16, 65, 7, 7), 1), ((16, 7, 7, 3), -1)]:
        check(present, case(shape, axis))
    for dtype in ("float16", "float64"):
        check([kernels, ours], case((8, 64, 28, 28), 1, dtype))
    print("all candidates agree with NumPy in float64")

    report = Report()
    report.table(
        "Forward and backward, float32",
        ["shape", "floor (ms)", *[c.label for c in present]],
        "Multiples of the floor. Ours: one device alone (num_devices=1). Ours, exchanging: the "
        "same layer with the operators of several devices.",
    )
    for shape, axis in MAIN:
        entries = [(c, case(shape, axis)) for c in (floor, *present)]
        low, *times = take_turns(entries, seconds, rounds)
        report.row(named(shape, axis), low, *[ratio(t, low) for t in times])
    index = {c.label: i + 2 for i, c in enumerate(present)}
    main_rows = report.tables[0]["rows"]

    others = [c for c in present if c not in (kernels, ours)]
    report.table(
        "How many times as fast the layer is", ["shape", *[f"than {c.label}" for c in others]]
    )
    for row in main_rows:
        ratios = [ratio(row[index[c.label]], row[index["ours"]]) for c in others]
        report.row(row[0], *ratios)

    report.table(
        "The kernels one by one, float32",
        ["shape", "moments", "normalize", "normalize back", "moments back"],
        "Multiples of one pass of the floor, times the number of passes that the kernel makes "
        "(1, 2, 2, 3).",
    )
    for shape, axis in MAIN:
        entries = [(kernels, case(shape, axis, which=w)) for w in (1, 2, 3, 4)]
        low, *times = take_turns([(floor, case(shape, axis)), *entries], seconds, rounds)
        report.row(named(shape, axis), *[t / (low / 8 * p) for t, p in zip(times, (1, 2, 2, 3))])

    report.table(
        "float16 and float64",
        ["shape", "floor (ms)", "kernels", "ours"],
        "Multiples of the floor for the same number of bytes.",
    )
    for dtype in ("float16", "float64"):
        for shape, axis in MAIN:
            entries = [(c, case(shape, axis, dtype)) for c in (floor, kernels, ours)]
            low, *times = take_turns(entries, seconds / 2, rounds)
            report.row(named(shape, axis, dtype), low, *[t / low for t in times])

    report.table(
        "Odd sizes, float32",
        ["shape", "floor (ms)", "kernels", "ours"],
        "Multiples of the floor.",
    )
    for shape, axis in ODD:
        entries = [(c, case(shape, axis)) for c in (floor, kernels, ours)]
        low, *times = take_turns(entries, seconds / 2, rounds)
        report.row(named(shape, axis), low, *[t / low for t in times])

    report.table(
        "How the cost grows",
        ["shape", "floor (ms)", "kernels", "ours", "ours (ns per element)"],
        "With channels, then with spatial size; multiples of the floor.",
    )
    for shape in CHANNELS + SPATIAL:
        entries = [(c, case(shape)) for c in (floor, kernels, ours)]
        low, *times = take_turns(entries, seconds / 3, rounds)
        per_element = 1e6 * times[1] / np.prod(shape)
        report.row(named(shape), low, *[t / low for t in times], per_element)

    report.table("The fixed cost of a layer", ["shape", "ours (µs)", "nn.BatchNorm (µs)", "ratio"])
    for shape, axis in SMALL:
        times = take_turns([(c, case(shape, axis)) for c in (ours, plain)], seconds / 2, rounds)
        report.row(named(shape, axis), *[1e3 * t for t in times], times[0] / times[1])

    report.table("Inference, hybridized", ["shape", "ours (ms)", "nn.BatchNorm (ms)", "ratio"])
    for shape, axis in MAIN:
        entries = [(c, case(shape, axis, inference=True)) for c in (ours, plain)]
        times = take_turns(entries, seconds / 2, rounds)
        report.row(named(shape, axis), *times, times[0] / times[1])
    for shape, axis in MAIN[:2]:
        entries = [(c, case(shape, axis, convolution=True)) for c in (ours, plain)]
        times = take_turns(entries, seconds, rounds)
        report.row(named(shape, axis) + ", with conv and relu", *times, times[0] / times[1])
    for candidate in (floor, kernels, *present):
        candidate.process.stdin.close()

    synchronized = Candidate("synchronized", threads=1)
    layers = 20
    hows = "together", "each alone", "num_devices=1"
    report.table(
        "What the all-reduce costs",
        [
            "devices",
            *[f"{h} (ms)" for h in hows],
            "µs over the same graph",
            "µs over num_devices=1",
        ],
        f"{layers} layers of ours on 2×64×4×4; µs per layer and direction. Each alone: the same "
        "threads and operators, without waiting for the other devices.",
    )
    for devices in (2, 4, 8, 16):
        one = case((2, 64, 4, 4), devices=devices, layers=layers)
        times = take_turns([(synchronized, {**one, "how": h}) for h in hows], seconds, rounds)
        over = [1e3 * (times[0] - t) / layers / 2 for t in times[1:]]
        report.row(str(devices), *times, *over)
    synchronized.process.stdin.close()

    network = Candidate("network", threads=1)
    report.table(
        "ResNet-18, a training step",
        ["norm", "ms", "over nn.BatchNorm", "share of the step"],
        "2 CPU contexts, 8×3×64×64 on each. The share of the step is the time that it takes longer "
        "than without normalization.",
    )
    norms = ("ours", "nn.BatchNorm", "none")
    one = case((8, 3, 64, 64), devices=2)
    times = take_turns([(network, {**one, "norm": n}) for n in norms], 4 * seconds, rounds)
    for norm, t in zip(norms, times):
        report.row(norm, t, t / times[1], f"{100 * (1 - times[2] / t):.0f} %")
    network.process.stdin.close()

    prefix = write(report, about, arguments.out, "benchmark")
    draw(report, f"{prefix}.png")
    print(f"wrote {prefix}.png")


if __name__ == "__main__":
    main()
