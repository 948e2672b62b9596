"""Computes what storing, reading and training on a large video dataset needs: arithmetic, not a measurement.

    python benchmarks/scale_arithmetic.py [--bytes 1e15] [--bytes-per-frame 1200] [--days 30] [--passes 1] ...

Every input is an option; --help shows the defaults. `docs/scale.md` contains the table for the defaults.
"""

import argparse
from dataclasses import dataclass, fields

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The inputs of the arithmetic."""

    bytes: float = 1e15  # what a child sees in its first four years, by LeCun's estimate
    bytes_per_frame: float = 1_200.0  # stored, compressed: 64x64 RGB at 0.098 bytes a pixel value (about 10:1)
    passes: float = 1.0  # how often each frame is trained on
    days: float = 30.0  # time limit for training
    cpu_frames_per_second: float = 18_020.0  # measured: the default model, 2 cores (benchmarks/RESULTS.md)
    cpu_gflops: float = 128.6  # measured in the same run
    gpu_peak_tflops: float = 989.0  # published: H100 SXM, bf16, dense
    utilisation: float = 0.35  # of the peak; an assumption
    machine_gbit: float = 25.0  # network of one machine
    bucket_gbit: float = 100.0  # network of the object store, for all readers
    encoder_gflop: float = 0.0  # forward and backward, per frame; 0: from the two measured figures


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The results of the arithmetic."""

    frames: float
    gflop_per_frame: float
    total_flop: float
    cpu_pair_days: float
    cpu_pairs: float
    gpu_frames_per_second: float
    gpu_days: float
    gpus: float
    bytes_per_second: float
    machine_bytes_per_second: float
    readers_for_network: float
    days_for_bucket: float
    machines: float  # with one GPU each: the larger of what compute and network need


def compute(given: Assumptions) -> Answer:
    """Return bytes -> frames -> FLOP -> device-days -> machines, and the bandwidth that feeds them."""
    frames = given.bytes / given.bytes_per_frame * given.passes
    default_gflop = given.cpu_gflops / given.cpu_frames_per_second
    gflop = given.encoder_gflop or default_gflop
    cpu_rate = given.cpu_frames_per_second * default_gflop / gflop
    gpu_rate = given.gpu_peak_tflops * 1e3 * given.utilisation / gflop
    needed = given.bytes * given.passes / (given.days * DAY)
    return Answer(
        frames=frames,
        gflop_per_frame=gflop,
        total_flop=frames * gflop * 1e9,
        cpu_pair_days=frames / cpu_rate / DAY,
        cpu_pairs=frames / cpu_rate / DAY / given.days,
        gpu_frames_per_second=gpu_rate,
        gpu_days=frames / gpu_rate / DAY,
        gpus=frames / gpu_rate / DAY / given.days,
        bytes_per_second=needed,
        machine_bytes_per_second=gpu_rate * given.bytes_per_frame,
        readers_for_network=needed / (given.machine_gbit * 1e9 / 8),
        machines=max(frames / gpu_rate / DAY, given.bytes * given.passes / (given.machine_gbit * 1e9 / 8) / DAY)
        / given.days,
        days_for_bucket=given.bytes * given.passes / (given.bucket_gbit * 1e9 / 8) / DAY,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Assumptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default, help="%(default)g")
    given = Assumptions(**vars(parser.parse_args()))
    print("| quantity | value |\n| --- | --- |")
    for part in (given, compute(given)):
        for field in fields(part):
            print(f"| {field.name} | {getattr(part, field.name):.4g} |")


if __name__ == "__main__":
    main()
