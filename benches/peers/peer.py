#!/usr/bin/env python3
"""PyTorch's and diffusers' side of bench_peers.py: initialises and responds to each line of its input with a measurement.

    python benches/peers/peer.py --threads N forward|update|optimizer|sampling|network ..
    python benches/peers/peer.py --threads N replay FOLDER ..

The protocol is that of benches/update_times.rs; `sampling` answers as benches/sampling_times.rs does. `replay` repeats the
updates that `update_times record` wrote, and prints the differences.
"""

import argparse
import json
import platform
import sys
import time

import diffusers
import torch


def status(key):
    """A figure of /proc/self/status in KiB; none if the file does not exist."""
    try:
        lines = open("/proc/self/status").read().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), None)


def forget_peak():
    try:
        open("/proc/self/clear_refs", "w").write("5")
    except OSError:
        return False
    return True


def wait():
    """Waits until all work submitted to the device is done."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def timed(run, repeats=1):
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - started) / repeats


def forward(options):
    from torch_updates import Data, Denoiser, Progressive, network

    if options.compile:
        import torch._inductor.config as inductor

        inductor.freezing = True
    unet = network().eval().requires_grad_(False)
    denoiser, batch = Denoiser(unet, options.precision == "bfloat16"), Data(Progressive.GRID, options.batch).noised()
    if options.channels_last:
        unet.to(memory_format=torch.channels_last)
        batch.x_t = batch.x_t.to(memory_format=torch.channels_last)
    if options.compile:
        unet.compile()

    @torch.no_grad()
    def run():
        denoiser.output(batch.x_t, batch.timesteps, batch.labels)

    return lambda: {"seconds": timed(run, options.repeats)}


def update(options):
    from torch_updates import METHODS, Data

    kinds = {"bfloat16": options.precision == "bfloat16", "channels_last": options.channels_last}
    method = METHODS[options.method](compiled=options.compile, **kinds)
    method.settle()
    data, turn, step = Data(method.GRID, options.batch), 5 if options.method == "DMD2" else 1, 0

    def one():
        nonlocal step
        method.update(step, data.noised())
        step += 1

    return lambda: {"seconds": timed(one, turn)}


def optimizer(options, tensors=200, shape=(250, 200), updates=10):
    from torch_updates import Average

    parameters = [torch.randn(shape).requires_grad_() for _ in range(tensors)]
    fused, average = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True), Average(parameters)
    size = (tensors * shape[0] * shape[1]) ** 0.5
    grads = [torch.randn(shape) * (1 if options.clipped else 0.5 / size) for _ in parameters]
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad.clone()

    def one():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True).item()
        fused.step()
        average.update()

    def run():
        seconds = 0.0
        for _ in range(updates):
            if options.clipped:
                torch._foreach_copy_([parameter.grad for parameter in parameters], grads)
            seconds += timed(one)
        return {"seconds": seconds / updates}

    return run


def sampling(options):
    from diffusers_sampling import Rounds

    return Rounds(options.threads).run


def network(options):
    from diffusers_network import case

    run = case(options.case, options.folder)
    return lambda: {"seconds": timed(run)}


def replay(options):
    from torch_updates import replay

    print(json.dumps([replay(folder) for folder in options.folders]))


def serve(run):
    forgotten = forget_peak()
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    print(json.dumps({"resident_kib": status("VmRSS:"), "versions": versions}), flush=True)
    for _ in sys.stdin:
        answer = run()
        print(json.dumps(answer | {"peak_kib": status("VmHWM:") if forgotten else None}), flush=True)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for make in (forward, update, optimizer, sampling, network, replay):
        sub = kinds.add_parser(make.__name__)
        sub.set_defaults(make=make)
        if make is replay:
            sub.add_argument("folders", nargs="+")
        if make is update:
            sub.add_argument("method", type=str.upper, choices=("PD", "LCM", "DMD2"))
        if make in (forward, update):
            sub.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
            sub.add_argument("--batch", type=int, required=True)
        if make is network:
            sub.add_argument("case")
        if make is optimizer:
            sub.add_argument("--clipped", action="store_true")
        sub.add_argument("--repeats", type=int, default=1)
        sub.add_argument("--folder")
        sub.add_argument("--channels-last", action="store_true")
        sub.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main():
    options = parsed()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    if options.kind == "replay":
        replay(options)
    else:
        serve(options.make(options))


if __name__ == "__main__":
    main()
