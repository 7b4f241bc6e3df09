"""Bytes of a trained model: compressors on equal codes, and BPB against bytes over settings.

    python benchmarks/bench_bytes.py codes runs/ID/artifact.bin
        # every compressor on the arrays of an artifact
    DATA_PATH=... python benchmarks/bench_bytes.py sweep runs/ID/model.pt --out sweep.png \\
        --curve "steps of columns" "GPTQ_TRELLIS=0 MLP_CLIP_SIGMAS=14" "GPTQ_TRELLIS=0" \\
        --curve trellis "MLP_CLIP_SIGMAS=14" ""
    DATA_PATH=... python benchmarks/bench_bytes.py rate runs/ID/model.pt --out rate.png --layer 5

`codes` prints bytes by group of tensors beside the order-0 entropy of its codes, and the seconds to
pack and unpack. `sweep` is the harness behind QUANT_ONLY=1: Hessians once, then GPTQ, packing,
rebuilding and evaluation for every point of every curve (settings as in the environment, which
holds for all points); a table, a .json and a .png beside it. Below the table stand the bytes at
equal BPB and the BPB at equal bytes of every two curves, on straight lines between their points,
"unknown" beyond them. A curve of one point has no line: its plain differences stand there. `gap`
is what quantization adds to the loss, in nats a token, on the training rows that neither training
nor the Hessians have seen (QUANT_CHECK_ROWS of them): a low error on the calibration rows alone is
no evidence.
`rate` draws distortion against rate for one matrix of each kind, for each of METHODS, beside the
bound of information theory: bits a weight are those of the packed file, steps and header included.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import presets.published as published  # noqa: E402
import train_gpt  # noqa: E402
from tools.guard import RunGuard, entropy_bytes  # noqa: E402
from tools.run_files import settings_of  # noqa: E402


def group_of(name: str) -> str:
    """Role of an array of codes.

    "scales" for the other fields of quantized matrices; "small" for the rest.
    """
    tensor, _, field = name.rpartition(":")
    role = train_gpt.quant_role(tensor)
    return "small" if role is None else role.group if field == "codes" else "scales"


def packed_groups(arrays: dict, compressor: str) -> dict[str, int]:
    """Bytes by group, each packed by itself and without headers."""
    groups = defaultdict(dict)
    for name, array in arrays.items():
        groups[group_of(name)][name] = array
    sizes = {}
    for group, members in groups.items():
        header = train_gpt.read_header(train_gpt.pack_weights(members, compressor))
        sizes[group] = sum(record.size for record in header.records)
    return sizes


def compare_codes(path: Path, compressors: list[str]) -> None:
    """Prints one line per compressor and, for the same arrays, the order-0 entropy."""
    arrays = train_gpt.unpack_weights(path.read_bytes())
    groups = defaultdict(float)
    for name, array in arrays.items():
        groups[group_of(name)] += entropy_bytes(array) if name.endswith(":codes") else array.nbytes
    print(
        f"{len(arrays)} arrays, {sum(a.size for a in arrays.values())} numbers, {os.cpu_count()}"
        " CPUs"
    )
    print(
        f"{'order-0, raw rest':18} {sum(groups.values()):10.0f} B  {' ' * 26}"
        + " ".join(f"{group}:{size:.0f}" for group, size in groups.items())
    )
    for compressor in compressors:
        start = time.perf_counter()
        blob = train_gpt.pack_weights(arrays, compressor)
        packed = time.perf_counter()
        rebuilt = train_gpt.unpack_weights(blob)
        unpacked = time.perf_counter()
        exact = all(np.array_equal(rebuilt[name], array) for name, array in arrays.items())
        assert exact, "not exact"
        groups = " ".join(
            f"{group}:{size}" for group, size in packed_groups(arrays, compressor).items()
        )
        seconds = f"pack {packed - start:6.1f} s  unpack {unpacked - packed:5.1f} s"
        print(f"{compressor:18} {len(blob):10d} B  {seconds}  {groups}", flush=True)


SWEPT = (
    "matrix_bits",
    "embed_bits",
    "mlp_clip_sigmas",
    "attn_clip_sigmas",
    "embed_clip_sigmas",
    "gptq_damp",
    "gptq_column_steps",
    "gptq_column_octaves",
    "gptq_trellis",
    "gptq_row_power",
    "gptq_row_octaves",
    "lqer_enabled",
    "compressor",
)


def check_points(points: list[str]) -> None:
    """SettingError for settings of a point that a sweep cannot vary.

    Its model, rows and Hessians are made once.
    """
    for settings in points:
        for name in settings_of(settings.split()):
            if name.lower() not in SWEPT:
                raise train_gpt.SettingError(
                    f"{name} cannot differ between the points of a sweep: set it in the"
                    " environment, for all of them"
                )


def weighted_error(w: torch.Tensor, rebuilt: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) of a matrix w (R, C), its error E = w - rebuilt and H (C, C)."""
    error = w - rebuilt.to(w)
    return float(((error @ hessian) * error).sum() / ((w @ hessian) * w).sum())


class Sweep:
    """One checkpoint, its Hessians, and its loss on the rows that were held out.

    Row gradients, too, if the environment or one of the points ("NAME=VALUE ...") has a
    GPTQ_ROW_POWER. Threads pack meanwhile: lrzip takes minutes.
    """

    def __init__(self, checkpoint: Path, points: Sequence[str] = ()):
        self.hp = hp = train_gpt.Hyperparameters.from_env(guard=RunGuard())
        self.dist = dist = train_gpt.Dist(hp.device)
        dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
        # points may take it
        with_trellis = dataclasses.replace(hp, gptq_column_steps=True, gptq_trellis=True)
        ops = train_gpt.select_ops(with_trellis, dist.device, dtype)
        self.model = train_gpt.GPT(hp, ops, dtype).to(dist.device)
        train_gpt.load_checkpoint(checkpoint, self.model)
        self.evaluator = train_gpt.Evaluator(self.model, train_gpt.ValidationSet(hp), hp, dist)
        loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
        self.hessians = train_gpt.collect_hessians(self.model, loader, hp, dist)
        self.row_gradients = None
        if any(self.settings_at(point).gptq_row_power for point in ("", *points)):
            self.row_gradients = train_gpt.collect_row_gradients(self.model, loader, hp, dist)
        self.weights = {
            name: w.detach().clone() for name, w in train_gpt.unbank(self.model).items()
        }
        self.loader, self.packing = loader, ThreadPoolExecutor(3)
        self.fp32_loss = train_gpt.held_out_loss(self.model, loader, hp, dist)

    def settings_at(self, point: str) -> train_gpt.Hyperparameters:
        """The settings of a point, "NAME=VALUE ..."."""
        environ = os.environ | settings_of(point.split())
        return train_gpt.Hyperparameters.from_env(environ, RunGuard())

    def measure(self, settings: str) -> tuple[dict, Future]:
        """Quantizes under "NAME=VALUE ..." -> figures, and the bytes, which threads still count.

        Figures: BPB, gap, mean relative weighted error, seconds of GPTQ.
        """
        hp = self.settings_at(settings)
        start = time.perf_counter()
        arrays = train_gpt.quantize_weights(
            self.weights,
            self.hessians,
            hp,
            self.dist,
            self.model.ops.trellis_round,
            self.row_gradients,
        )
        quantized = time.perf_counter()
        size = self.packing.submit(lambda: len(train_gpt.pack_weights(arrays, hp.compressor)))
        rebuilt = train_gpt.dequantize_weights(arrays)
        error = 0.0
        for name, hessian in self.hessians.items():
            error += weighted_error(self.weights[name].to(hessian), rebuilt[name], hessian)
        train_gpt.rebank(self.model, rebuilt)
        loss = train_gpt.held_out_loss(self.model, self.loader, self.hp, self.dist)
        figures = {
            "settings": settings,
            "weighted_error": error / len(self.hessians),
            "gap": None if loss is None else loss - self.fp32_loss,
            "bpb": self.evaluator.evaluate_bpb()["bpb"],
            "seconds_quantize": quantized - start,
        }
        return figures, size


def measure_curves(harness: Sweep, curves: list[list[str]]) -> dict[str, list[dict]]:
    """[[name, settings of a point, ...], ...] -> {name: figures of its points, "bytes" included}.

    Each point is printed when it is measured, so that a sweep that is killed before has shown it.
    """
    measured = []
    for name, *points in curves:
        for settings in points:
            figures, size = harness.measure(settings)
            measured.append((name, figures, size))
            print(f"{name}: bpb {figures['bpb']:.6f}  {settings}", flush=True)
    by_name = defaultdict(list)
    for name, figures, size in measured:
        by_name[name].append(figures | {"bytes": size.result()})
    return dict(by_name)


def point_line(name: str, point: dict) -> str:
    """A line of the table."""
    gap = "none" if point["gap"] is None else f"{point['gap']:.5f}"
    return (
        f"{name:16} {point['bytes']:10d} B  bpb {point['bpb']:.6f}  gap {gap}  error "
        f"{point['weighted_error']:.3e}  GPTQ {point['seconds_quantize']:.1f} s "
        f" {point['settings']}"
    )


METHODS = {
    "steps of rows": {"gptq_column_steps": False},
    "steps of columns": {"gptq_column_steps": True, "gptq_trellis": False},
    "trellis": {"gptq_column_steps": True, "gptq_trellis": True},
}
CLIP_FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)  # of the clips, and so of the step sizes
CLIPS = "mlp_clip_sigmas", "attn_clip_sigmas", "embed_clip_sigmas"


def gaussian_bound(
    w: torch.Tensor, hessian: torch.Tensor, damp: float, bits: np.ndarray
) -> list[float]:
    """The least relative weighted error at these rates for a Gaussian matrix of w's row variances.

    The weighted error of w (R, C) is a sum over columns of conditional variance times squared
    error: GPTQ sees to the rest. Reverse water-filling gives each of these R C components of
    variance v = row variance x conditional variance the error min(v, t) for log2(v / t) / 2 bits.
    """
    _, upper, _ = train_gpt.order_columns(w[None], hessian[None], damp, ["matrix"])
    conditional = upper[0].diagonal().double() ** -2
    variances = w.double().var(dim=1)[:, None] * conditional
    energy = ((w @ hessian) * w).sum().item()
    errors = []
    for rate in bits:
        low, high = variances.min().log2().item() - 60, variances.max().log2().item()
        for _ in range(60):
            middle = (low + high) / 2
            spent = (variances.log2() - middle).clamp(min=0).mean().item() / 2
            low, high = (middle, high) if spent > rate else (low, middle)
        errors.append(variances.clamp(max=2**middle).sum().item() / energy)
    return errors


def measure_rates(harness: Sweep, name: str) -> dict[str, list[tuple[float, float]]]:
    """For each of METHODS, then for the bound: bits a weight and relative weighted error."""
    w = harness.weights[name].float()
    hessian = harness.hessians[name].float()
    curves = defaultdict(list)
    for method, settings in METHODS.items():
        for factor in CLIP_FACTORS:
            clips = {clip: factor * getattr(harness.hp, clip) for clip in CLIPS}
            # this error counts all rows alike
            hp = dataclasses.replace(harness.hp, gptq_row_power=0.0, **settings, **clips)
            arrays = train_gpt.quantize_weights(
                {name: w}, {name: hessian}, hp, harness.dist, harness.model.ops.trellis_round
            )
            error = weighted_error(w, train_gpt.dequantize_weights(arrays)[name], hessian)
            bits = 8 * len(train_gpt.pack_weights(arrays, "entropy")) / w.numel()
            curves[method].append((bits, error))
    rates = [bits for curve in curves.values() for bits, _ in curve]
    bits = np.linspace(min(rates), max(rates), 20)
    bound = gaussian_bound(w, hessian, harness.hp.gptq_damp, bits)
    return curves | {"bound": list(zip(bits.tolist(), bound, strict=True))}


def compare_rates(checkpoint: Path, layer: int, path: Path) -> None:
    """Prints, for a matrix of each kind and each method, bits above the bound at equal error.

    Draws the curves into `path` with suffix .png, and adds a line for each matrix to its .jsonl.
    """
    os.environ["MPLBACKEND"] = "Agg"
    from matplotlib import pyplot

    harness = Sweep(checkpoint)
    names = [
        name
        for name in harness.hessians
        if name.startswith(f"blocks.{layer}.") or not name.startswith("blocks.")
    ]
    figure, panels = pyplot.subplots(2, -(-len(names) // 2), figsize=(16, 8), squeeze=False)
    for name, panel in zip(names, panels.flat, strict=False):
        curves = measure_rates(harness, name)
        at_error = list(zip(*curves["bound"], strict=True))
        excess = {}
        for method, points in curves.items():
            bits, errors = zip(*points, strict=True)
            panel.semilogy(bits, errors, "k--" if method == "bound" else "o-", label=method)
            # the bound's bits at these errors; np.interp wants rising abscissas
            needed = np.interp(-np.log(errors), -np.log(at_error[1]), at_error[0])
            excess[method] = np.round(np.array(bits) - needed, 3).tolist()
        panel.set(title=name, xlabel="bits a weight", ylabel="weighted error / energy")
        panel.legend()
        for method in METHODS:
            print(f"{name:28} {method:18} bits above the bound {excess[method]}", flush=True)
        with path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps({"name": name, "curves": curves}) + "\n")
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=100)


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """BPB, and the mean relative Hessian-weighted error, against bytes."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own backend need not exist in this environment
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5.6), layout="constrained")
    for panel, key in zip(panels, ("bpb", "weighted_error"), strict=True):
        for name, points in curves.items():
            points = sorted(points, key=lambda point: point["bytes"])
            panel.plot(
                [p["bytes"] / 1e6 for p in points], [p[key] for p in points], "o-", label=name
            )
        panel.set(
            xlabel="megabytes of weights",
            ylabel={"bpb": "bits per byte"}.get(key, "weighted error / energy"),
        )
    panels[1].set_yscale("log")
    # one legend for both, below them, where it hides no point
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def figure_at(points: list[dict], key: str, value: float, wanted: str) -> float:
    """The figure `wanted` where a curve has this value of `key`; NaN beyond its points."""
    points = sorted(points, key=lambda point: point[key])
    line = [point[key] for point in points], [point[wanted] for point in points]
    return float(np.interp(value, *line, left=np.nan, right=np.nan))


def comparison(points: list[dict], middle: dict) -> str:
    """How a curve lies to a point of another one, in words."""
    if len(points) == 1:
        size = points[0]["bytes"] / middle["bytes"] - 1
        bpb = points[0]["bpb"] - middle["bpb"]
        return f"{size:+.2%} bytes and {bpb:+.6f} BPB (a single point)"
    size = figure_at(points, "bpb", middle["bpb"], "bytes") / middle["bytes"] - 1
    bpb = figure_at(points, "bytes", middle["bytes"], "bpb") - middle["bpb"]
    sizes = "unknown" if np.isnan(size) else f"{size:+.2%}"
    scores = "unknown" if np.isnan(bpb) else f"{bpb:+.6f}"
    return f"{sizes} bytes at equal BPB, {scores} BPB at equal bytes"


def print_comparisons(curves: dict[str, list[dict]]) -> None:
    """How each curve lies to those before it, at the middle point of the earlier one."""
    for before, after in itertools.combinations(curves, 2):
        points = sorted(curves[before], key=lambda point: point["bytes"])
        middle = points[len(points) // 2]
        text = comparison(curves[after], middle)
        print(f"{after} against {before} at {middle['bytes']} B: {text}")


def main() -> None:
    """Runs the command line."""
    published.install()  # it knows all of train_gpt.py's settings, LQER and two compressors more
    with_lrzip = ["pergroup"] if shutil.which("lrzip") else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    codes = commands.add_parser("codes")
    codes.add_argument("artifact", type=Path)
    codes.add_argument("--compressors", nargs="+", default=["entropy", *with_lrzip, "brotli"])
    sweep = commands.add_parser("sweep")
    sweep.add_argument("checkpoint", type=Path)
    sweep.add_argument(
        "--curve", nargs="+", action="append", required=True, metavar=("NAME", "SETTINGS")
    )
    sweep.add_argument("--out", type=Path, default=Path("sweep.png"))
    rate = commands.add_parser("rate")
    rate.add_argument("checkpoint", type=Path)
    rate.add_argument("--layer", type=int, default=5)
    rate.add_argument("--out", type=Path, default=Path("rate.png"))
    options = parser.parse_args()
    if options.command == "codes":
        return compare_codes(options.artifact, options.compressors)
    if options.command == "rate":
        return compare_rates(options.checkpoint, options.layer, options.out)
    points = [settings for _, *of_curve in options.curve for settings in of_curve]
    check_points(points)
    if any("COMPRESSOR=pergroup" in point for point in points):
        published.check_lrzip()
    harness = Sweep(options.checkpoint, points)
    print(
        f"fp32: bpb {harness.evaluator.evaluate_bpb()['bpb']:.6f}  held-out loss"
        f" {harness.fp32_loss}",
        flush=True,
    )
    curves = measure_curves(harness, options.curve)
    for name, points in curves.items():
        for point in points:
            print(point_line(name, point), flush=True)
    options.out.with_suffix(".json").write_text(json.dumps(curves, indent=1))
    print_comparisons(curves)
    plot(curves, options.out.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main()
    except train_gpt.SettingError as error:
        sys.exit(f"bench_bytes.py: {error}")
