#!/usr/bin/env python3
"""Compares this project with PyTorch and diffusers in one run, and prints one table.

    make bench-peers                           # installs them into the user's cache, builds, runs this
    python benches/peers/bench_peers.py        # with your own packages (tools/record/record_unet.py names the versions)

Every side is a separate process, since allocator settings apply to a process; the sides alternate, round by round, and
the first one rotates. A ratio is the peer's figure over ours, the median over rounds with its quartiles: above 1
where this project is faster or smaller. The peers are

    as shipped   eager, channels first, glibc's defaults
    tuned        eager, channels last (except for bfloat16 on a CPU, where it is slower in PyTorch), and the allocator
                 settings of this project's programs
    compiled     the same with torch.compile, with frozen weights if nothing is trained

Before anything is timed, updates of each method are made on both sides from the same weights, states and draws: losses,
weights, averages and the number of passes must agree, or nothing is compared.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import rounds

PEER = pathlib.Path(__file__).with_name("peer.py")
WEIGHTS = rounds.ROOT / "assets/fashion-mnist-teacher/unet/diffusion_pytorch_model.safetensors"
METHODS = ("PD", "LCM", "DMD2")
KEPT = {"GLIBC_TUNABLES": rounds.TUNABLES}
SHIPPED = ("as shipped", (), {})
# Cases without memory formats.
KEEPING = ("tuned", (), KEPT)
# Tolerances for rounding: relative for losses, as a share of the distance moved for weights.
BOUNDS = {"float32": {"loss": 1e-4, "student": 0.02, "ema": 0.02}, "bfloat16": {"loss": 0.05, "student": 0.4, "ema": 0.4}}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "MiB": 1024.0}


@dataclass
class Row:
    """A row of a comparison: keys of the two sides' results. For memory, the peak beyond what networks and optimizers
    hold before the first round."""

    work: str
    ours: str = "seconds"
    peer: str = "seconds"
    unit: str = "ms"
    # Seconds per unit of a result.
    answered_in: float = 1.0


@dataclass
class Comparison:
    """Programs that run alternately."""

    ours: list
    peer: list
    rows: list
    rounds: int
    peers: tuple = (SHIPPED, KEEPING)
    # Whether the program prints a line when it is ready.
    greets: bool = True


def tuned(precision, device, *more):
    formats = () if precision == "bfloat16" and device == "cpu" else ("--channels-last",)
    return ("compiled" if more else "tuned", (*formats, *more), KEPT)


def peers_of(precision, device, compiled):
    compiled = (tuned(precision, device, "--compile"),) if compiled else ()
    return (SHIPPED, tuned(precision, device), *compiled)


def network_name(precision, batch):
    return f"{'f32' if precision == 'float32' else 'bf16'}, batch {batch}"


def forwards(options):
    for batch in (8,) if options.quick else (8, 64):
        for precision in ("float32", "bfloat16"):
            asked = ["forward", "--batch", batch, "--precision", precision, "--repeats", max(1, 64 // batch)]
            row = Row(f"U-Net of pixels, pass, {network_name(precision, batch)}")
            peers = peers_of(precision, options.device, compiled=not options.quick)
            yield Comparison(["update_times", *asked], asked, [row], options.rounds or (3 if options.quick else 15), peers)


def updates(options):
    batch = 8 if options.quick else 64
    for precision in ("float32", "bfloat16"):
        for name in METHODS:
            asked = ["update", name.lower(), "--batch", batch, "--precision", precision]
            what = f"{name} update, {network_name(precision, batch)}"
            memory = Row(f"{what}: peak memory", "peak_kib", "peak_kib", "MiB")
            # The host's allocator requests 64 MiB at a time, which hides the differences between small batches.
            rows = [Row(what)] if options.quick or options.device != "cpu" else [Row(what), memory]
            count = options.rounds or (3 if options.quick else 5 if name == "DMD2" else 9)
            peers = peers_of(precision, options.device, options.compile_updates)
            yield Comparison(["update_times", *asked], asked, rows, count, peers)
            if precision == "bfloat16":
                full = [*asked[:-1], "float32"]
                row = Row(f"{what}, against float32")
                yield Comparison(["update_times", *asked], full, [row], count, (SHIPPED,))


def optimizers(options):
    for clipped in ((), ("--clipped",)):
        limit = "above" if clipped else "below"
        row = Row(f"clip, AdamW, EMA of 10 million parameters in 200 tensors, norm {limit} the limit")
        asked = ["optimizer", *clipped]
        yield Comparison(["update_times", *asked], asked, [row], options.rounds or (3 if options.quick else 15))


def sampling(options):
    """Samples of four steps with a network that costs nothing: the sampler alone."""
    rows = []
    for shape in ("4x4x64x64", "16x4x128x128"):
        for case in ("DDIM", "DDIM, clamped", "LCM"):
            name = f"{case} {shape}"
            rows.append(Row(f"4 steps of {case}, {shape}", name, name, "us", 1e-6))
    count = options.rounds or (3 if options.quick else 15)
    yield Comparison(["sampling_times"], ["sampling"], rows, count, greets=False)


def large(options):
    """Passes of Stable Diffusion 1.5's network."""
    if not options.large:
        return
    from compare_networks import CASES

    for case in CASES:
        peer = ["network", case]
        row = Row(f"text-to-image U-Net, {case}", unit="s")
        count = options.rounds or (7 if case.endswith("GB") else 3)
        yield Comparison(["network_times", case], peer, [row], count, greets=False)


def comparisons(options):
    made = [c for group in (sampling, forwards, updates, optimizers, large) for c in group(options)]
    for comparison in made:
        # If a round times several cases, their shares of its processor time are not known.
        shown = [row for row in comparison.rows if row.answered_in == 1 or not options.processor]
        comparison.rows = [row for row in shown if options.only in row.work]
    return [comparison for comparison in made if comparison.rows]


def settings(threads, more):
    """The environment of every process. This machine's libtorch would take precedence over that of Python's torch."""
    unset = {"LD_LIBRARY_PATH": ""} if more is not None else {}
    return {"OMP_NUM_THREADS": str(threads), **unset, **(more or {})}


def our_command(comparison, programs, threads, device, folder):
    program, *asked = comparison.ours
    if comparison.greets:
        return [programs[program], "--threads", threads, "--device", device, *asked]
    device = [device] if program == "sampling_times" else []
    return [programs[program], threads, *device, *asked, *([folder] if program == "network_times" else [])]


def peer_command(comparison, threads, device, arguments, folder):
    where = ["--folder", folder] if comparison.peer[0] == "network" else []
    return [sys.executable, PEER, "--threads", threads, "--device", device, *comparison.peer, *arguments, *where]


def answered(line):
    answer = json.loads(line)
    return answer if isinstance(answer, dict) else {"seconds": answer}


def measure(comparison, programs, options, folder):
    """The results of every side by name, and the line that each printed when it was ready."""
    threads, device = options.threads, options.device
    with contextlib.ExitStack() as stack:
        ours = rounds.Program(*our_command(comparison, programs, threads, device, folder), settings=settings(threads, None))
        sides = {"ours": stack.enter_context(ours)}
        for name, arguments, more in comparison.peers:
            command = peer_command(comparison, threads, device, arguments, folder)
            sides[name] = stack.enter_context(rounds.Program(*command, settings=settings(threads, more)))
        greetings = {name: json.loads(side.line()) for name, side in sides.items() if name != "ours" or comparison.greets}
        # The first rounds are for warm-up and compilation.
        for _ in range(2):
            for side in sides.values():
                side.round()
        names, answers = list(sides), {name: [] for name in sides}
        for turn in range(comparison.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                before = sides[name].processor_seconds() if options.processor else 0.0
                answers[name].append(answered(sides[name].round()))
                if options.processor:
                    answers[name][-1]["seconds"] = sides[name].processor_seconds() - before
    return answers, greetings


def quartiles(values):
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def figures(row, answers, greetings):
    """Every side's figure in the row's unit, and for each peer the quartiles of its ratio to ours."""
    key = {name: row.ours if name == "ours" else row.peer for name in answers}
    if row.unit == "MiB":
        values = {
            name: [said[-1][key[name]] - greetings[name]["resident_kib"]] if said[-1][key[name]] else None
            for name, said in answers.items()
        }
        if None in values.values():
            return None
    else:
        values = {name: [answer[key[name]] * row.answered_in for answer in said] for name, said in answers.items()}
    ours = values["ours"]
    ratios = {
        name: quartiles([peer / own for peer, own in zip(theirs, ours)])
        for name, theirs in values.items() if name != "ours"
    }
    return {
        "work": row.work,
        "unit": row.unit,
        "figures": {name: statistics.median(found) / UNITS[row.unit] for name, found in values.items()},
        "ratios": ratios,
    }


def shown_number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def shown_ratio(ratio):
    if ratio is None:
        return ""
    low, middle, high = ratio
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f}-{high:.2f})"


COLUMNS = ("as shipped", "tuned", "compiled")


def print_header():
    titles = ["work", "unit", *(f"PyTorch {name}" for name in COLUMNS), "ours", *(f"{name} / ours" for name in COLUMNS)]
    print("| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles), flush=True)


def print_row(found):
    numbers = [shown_number(found["figures"][name]) if name in found["figures"] else "" for name in COLUMNS]
    ratios = [shown_ratio(found["ratios"].get(name)) for name in COLUMNS]
    cells = [found["work"], found["unit"], *numbers, shown_number(found["figures"]["ours"]), *ratios]
    print("| " + " | ".join(cells) + " |", flush=True)


def check(programs, options):
    """Runs updates of every method on both sides; prints the differences, and exits if they exceed rounding."""
    with tempfile.TemporaryDirectory() as folder:
        for found in replayed(programs, options, pathlib.Path(folder)):
            bounds = BOUNDS[found["precision"]]
            faults = [f"{what} {found[what]:.2g}, at most {bound}" for what, bound in bounds.items() if not found[what] <= bound]
            if found["passes_here"]:
                faults.append(f"passes {found['passes_here']} in PyTorch, {found['passes_there']} here")
            if faults:
                raise SystemExit(f"error: both sides do not do the same: {found['name']}: {'; '.join(faults)}")
            apart = ", ".join(f"{what} {found[what]:.1g}" for what in bounds)
            print(f"same updates, {found['name']}: {apart}", file=sys.stderr, flush=True)


def replayed(programs, options, folder):
    threads, folders = ["--threads", str(options.threads)], []
    for precision in BOUNDS:
        for method in METHODS:
            folders.append(str(folder / f"{method}-{precision}"))
            asked = ["--batch", "8", "--precision", precision, "--folder", folders[-1], "--weights", str(WEIGHTS)]
            subprocess.run([programs["update_times"], *threads, "record", method.lower(), *asked], check=True)
    command = [sys.executable, str(PEER), *threads, "replay", *folders]
    environment = os.environ | settings(options.threads, {})
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def load():
    return f"{os.getloadavg()[0]:.2f}"


def device_name(device):
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name(device)


def machine(options):
    model = "unknown processor"
    with contextlib.suppress(OSError):
        lines = open("/proc/cpuinfo").read().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=rounds.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout.strip()
    return {"processor": model, "cores": os.cpu_count(), "threads": options.threads, "device": device_name(options.device), "load": load(), "ddil": commit}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every process; default one a core")
    parser.add_argument("--device", default="cpu", help="`cpu`, `cuda` or `cuda:<index>`; memory is measured on the CPU only")
    parser.add_argument("--rounds", type=int, help="of every comparison; the default is its own")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds, nothing compiled: two minutes")
    parser.add_argument("--large", action="store_true", help="Stable Diffusion 1.5's network and loading it too: 12 GB, 4 GB of disk")
    parser.add_argument("--compile-updates", action="store_true", help="updates by torch.compile too: minutes more")
    parser.add_argument("--processor", action="store_true", help="measure processor time instead of wall-clock time: for a machine with other work")
    parser.add_argument("--only", default="", help="rows with this in their names")
    parser.add_argument("--no-check", action="store_true", help="skip the check that both sides do the same work")
    parser.add_argument("--json", type=pathlib.Path, help="writes all of it to this file")
    parser.add_argument("--programs", type=pathlib.Path, help="folder of this project's programs, for machines without cargo")
    parser.add_argument("--profile", default="release", help="cargo's, of this project's programs")
    return parser.parse_args()


def program(name, options):
    return options.programs / name if options.programs else rounds.built(name, options.profile)


def save_large_network(folder):
    command = "import sys; from diffusers import UNet2DConditionModel as Network;"
    command += "Network(sample_size=64, cross_attention_dim=768).save_pretrained(sys.argv[1], max_shard_size='9GB')"
    subprocess.run([sys.executable, "-c", command, folder], check=True)


def main():
    options = parsed()
    if options.large and options.device != "cpu":
        raise SystemExit("error: --large runs on the CPU only: network_times supports no other device")
    wanted = comparisons(options)
    if not wanted:
        raise SystemExit(f"error: no row has `{options.only}` in its name")
    names = {comparison.ours[0] for comparison in wanted} | {"update_times"}
    programs = {name: program(name, options) for name in sorted(names)}
    if not options.no_check:
        check(programs, options)
    about, rows, versions = machine(options), [], {}
    print(f"{about['processor']}, {about['cores']} cores; {about['threads']} threads; {about['device']}; load {about['load']}\n")
    print_header()
    with tempfile.TemporaryDirectory() as folder:
        if any(comparison.ours[-1].endswith("GB") for comparison in wanted if comparison.ours[0] == "network_times"):
            save_large_network(folder)
        for comparison in wanted:
            answers, greetings = measure(comparison, programs, options, folder)
            versions = greetings[comparison.peers[0][0]]["versions"]
            for found in filter(None, (figures(row, answers, greetings) for row in comparison.rows)):
                print_row(found)
                rows.append(found)
    about |= {"versions": versions, "load at the end": load()}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"\n{said}, ddil {about['ddil']}; load at the end {about['load at the end']}")
    if options.json:
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
