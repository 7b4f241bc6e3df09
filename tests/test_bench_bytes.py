"""benchmarks/bench_bytes.py on a tiny checkpoint: it measures what the trainer makes, and refuses
what is not exact.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from artifact_helpers import model_arrays
from conftest import TINY, tiny_hp

import train_gpt
from benchmarks import bench_bytes
from presets import published

pytest.importorskip("brotli")


@pytest.fixture(autouse=True)
def parts_come_back(monkeypatch):
    """main installs presets/published.py: until the test ends."""
    for name in published.PARTS:
        monkeypatch.setattr(train_gpt, name, getattr(train_gpt, name))


@pytest.fixture
def model(monkeypatch, tmp_path, tiny_data, ops):
    """A model of random weights, in model.pt, and the environment of a sweep over it."""
    for name, value in (TINY | {"data_path": tiny_data, "compressor": "brotli"}).items():
        monkeypatch.setenv(name.upper(), str(int(value) if isinstance(value, bool) else value))
    model = train_gpt.GPT(tiny_hp(), ops, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    train_gpt.save_checkpoint(tmp_path / "model.pt", model, tiny_hp())
    return model


CLIPS = "MLP_CLIP_SIGMAS={0} ATTN_CLIP_SIGMAS={0} EMBED_CLIP_SIGMAS={0}"


def test_sweep_measures_bytes_error_and_bpb_of_every_point(monkeypatch, tmp_path, model, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("GPTQ_ROW_POWER", "0")  # the weighted error counts all rows alike
    command = ["bench", "sweep", str(tmp_path / "model.pt"), "--out", str(tmp_path / "sweep.png")]
    ways = {
        "plain": "COMPRESSOR=lzma GPTQ_COLUMN_STEPS=0 LQER_ENABLED=1",
        "steps of columns": "COMPRESSOR=entropy GPTQ_TRELLIS=0",
        "trellis": "COMPRESSOR=entropy",
    }
    for name, settings in ways.items():
        points = [f"{settings} {CLIPS.format(clip)}" for clip in (12, 25, 50)]
        command += ["--curve", name, *points]
    monkeypatch.setattr("sys.argv", command)
    bench_bytes.main()
    curves = json.loads((tmp_path / "sweep.json").read_text())
    assert list(curves) == list(ways)
    for name, (near, middle, coarse) in curves.items():
        assert near["bytes"] > middle["bytes"] > coarse["bytes"]
        assert near["weighted_error"] < 0.2 * coarse["weighted_error"]
        assert near["settings"] == f"{ways[name]} {CLIPS.format(12)}"
        assert all(-0.1 < point["gap"] < 0.1 for point in (near, middle, coarse))
    for scalar, trellis in zip(curves["steps of columns"], curves["trellis"], strict=True):
        assert trellis["weighted_error"] < 0.9 * scalar["weighted_error"]
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    assert abs(curves["plain"][0]["bpb"] - float(lines[0].split()[2])) < 0.05
    # the fp32 model, the points as they are measured, with their bytes, the pairs of curves
    assert len(lines) == 1 + 9 + 9 + 3
    assert lines[9].startswith(f"trellis: bpb {curves['trellis'][2]['bpb']:.6f}")
    assert f"{curves['trellis'][2]['bytes']} B" in lines[18]
    assert f"gap {curves['trellis'][2]['gap']:.5f}" in lines[18]
    assert lines[21].startswith("trellis against steps of columns at ")


def test_curves_are_compared_at_the_middle_point_of_the_first(capsys):
    def curve(*points):
        return [{"bytes": size, "bpb": bpb} for size, bpb in points]

    first = curve((1000, 2.0), (1200, 1.0), (800, 3.0))
    second = curve((600, 2.5), (900, 1.5), (1500, 0.5))
    third = curve((600, 1.5), (900, 1.2))
    bench_bytes.print_comparisons({"a": first, "b": second, "c": third})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "b against a at 1000 B: -25.00% bytes at equal BPB, -0.666667 BPB at equal bytes"
    )
    assert lines[1] == (
        "c against a at 1000 B: unknown bytes at equal BPB, unknown BPB at equal bytes"
    )
    assert lines[2] == (
        "c against b at 900 B: -33.33% bytes at equal BPB, -0.300000 BPB at equal bytes"
    )


def test_a_curve_of_one_point_is_compared_as_it_is(capsys):
    """No line goes through it: at equal bytes or BPB it says nothing."""
    before = [{"bytes": size, "bpb": bpb} for size, bpb in ((800, 3.0), (1000, 2.0), (1200, 1.0))]
    bench_bytes.print_comparisons({"a": before, "b": [{"bytes": 900, "bpb": 1.5}]})
    bench_bytes.print_comparisons({"b": [{"bytes": 900, "bpb": 2.25}], "a": before})
    assert capsys.readouterr().out.splitlines() == [
        "b against a at 1000 B: -10.00% bytes and -0.500000 BPB (a single point)",
        "a against b at 900 B: +5.56% bytes at equal BPB, +0.250000 BPB at equal bytes",
    ]


def results_kept(monkeypatch, name):
    """The list to which each later call of this function of train_gpt.py appends its result."""
    results = []
    function = getattr(train_gpt, name)

    def call_and_keep(*arguments):
        results.append(function(*arguments))
        return results[-1]

    monkeypatch.setattr(train_gpt, name, call_and_keep)
    return results


def test_a_measured_point_is_plain_figures_beside_its_bytes(monkeypatch, tmp_path, model):
    sweep = bench_bytes.Sweep(tmp_path / "model.pt")
    packed = results_kept(monkeypatch, "pack_weights")
    figures, size = sweep.measure("GPTQ_TRELLIS=0")
    assert json.loads(json.dumps(figures)) == figures and "bytes" not in figures
    assert size.result() == len(packed[0])
    curves = bench_bytes.measure_curves(sweep, [["plain", "GPTQ_TRELLIS=0"]])
    assert [point["bytes"] for point in curves["plain"]] == [len(packed[1])]


def test_a_point_is_of_its_own_settings_and_rebuilt_weights(monkeypatch, tmp_path, model):
    """Bytes by its own compressor; loss, BPB and error of the weights that its codes make."""
    published.install()
    sweep = bench_bytes.Sweep(tmp_path / "model.pt")
    made = results_kept(monkeypatch, "quantize_weights")
    figures, size = sweep.measure(f"COMPRESSOR=lzma GPTQ_COLUMN_STEPS=0 {CLIPS.format(200)}")
    assert size.result() == len(train_gpt.pack_weights(made[0], "lzma"))
    rebuilt = train_gpt.dequantize_weights(made[0])
    errors = []
    for name, hessian in sweep.hessians.items():
        w, difference = sweep.weights[name], sweep.weights[name] - rebuilt[name]
        energy = torch.einsum("ij,jk,ik->", w, hessian, w)
        errors.append(torch.einsum("ij,jk,ik->", difference, hessian, difference) / energy)
    assert figures["weighted_error"] == pytest.approx(float(sum(errors)) / len(errors), rel=1e-3)
    train_gpt.rebank(sweep.model, rebuilt)
    loss = train_gpt.held_out_loss(sweep.model, sweep.loader, sweep.hp, sweep.dist)
    assert figures["gap"] == pytest.approx(loss - sweep.fp32_loss, abs=1e-6) != 0
    assert figures["bpb"] == sweep.evaluator.evaluate_bpb()["bpb"]


def test_row_gradients_are_made_once_for_the_points_that_need_them(monkeypatch, tmp_path, model):
    made = results_kept(monkeypatch, "collect_row_gradients")
    monkeypatch.setenv("GPTQ_ROW_POWER", "0")
    assert bench_bytes.Sweep(tmp_path / "model.pt", ["GPTQ_DAMP=0.1"]).row_gradients is None
    sweep = bench_bytes.Sweep(tmp_path / "model.pt", ["", "GPTQ_ROW_POWER=0.5"])
    bench_bytes.check_points(["GPTQ_ROW_POWER=1 GPTQ_ROW_OCTAVES=1"])
    arrays = results_kept(monkeypatch, "quantize_weights")
    for settings in ("", "GPTQ_ROW_POWER=0.5", "GPTQ_ROW_POWER=0.5 GPTQ_ROW_OCTAVES=0"):
        sweep.measure(settings)
    assert len(made) == 1
    plain, moved, held = ({n: a.tobytes() for n, a in point.items()} for point in arrays)
    assert plain == held and moved != plain
    monkeypatch.setenv("GPTQ_ROW_POWER", "0.5")
    assert bench_bytes.Sweep(tmp_path / "model.pt").row_gradients.keys() == made[0].keys()


class Clock:
    """Stands in for the module time: it moves by what a function is said to take."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, seconds, function):
        def slowly(*arguments):
            self.now += seconds
            return function(*arguments)

        return slowly


def test_seconds_are_of_the_work_that_they_are_named_after(monkeypatch, tmp_path, model, capsys):
    sweep = bench_bytes.Sweep(tmp_path / "model.pt")
    clock = Clock()
    monkeypatch.setattr(bench_bytes, "time", clock)
    seconds = {"quantize_weights": 5, "held_out_loss": 100, "dequantize_weights": 30}
    for name, taken in (seconds | {"unpack_weights": 2}).items():
        monkeypatch.setattr(train_gpt, name, clock.taking(taken, getattr(train_gpt, name)))
    assert sweep.measure("GPTQ_TRELLIS=0")[0]["seconds_quantize"] == 5
    arrays = model_arrays()
    (tmp_path / "artifact.bin").write_bytes(train_gpt.pack_weights(arrays, "brotli"))
    monkeypatch.setattr(train_gpt, "pack_weights", clock.taking(7, train_gpt.pack_weights))
    capsys.readouterr()
    bench_bytes.compare_codes(tmp_path / "artifact.bin", ["brotli"])
    assert "pack    7.0 s  unpack   2.0 s" in capsys.readouterr().out


def test_a_missing_lrzip_is_said_before_the_hessians_are_made(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["bench", "sweep", str(tmp_path / "absent.pt"), "--curve", "plain"]
    monkeypatch.setattr("sys.argv", [*command, "", "COMPRESSOR=pergroup"])
    with pytest.raises(train_gpt.SettingError, match="lrzip"):
        bench_bytes.main()


def test_the_points_of_a_sweep_have_the_trellis_that_its_environment_lacks(
    monkeypatch, tmp_path, model
):
    """Its reference is a loop in Python, which takes minutes on a real model."""
    monkeypatch.setenv("GPTQ_TRELLIS", "0")
    monkeypatch.setenv("GPTQ_COLUMN_STEPS", "0")
    sweep = bench_bytes.Sweep(tmp_path / "model.pt")
    assert not sweep.hp.gptq_trellis and "trellis_round" in sweep.model.ops.names


@pytest.mark.parametrize(
    "setting", ["GPTQ_CALIBRATION_BATCHES=64", "MICRO_BATCH_TOKENS=64", "SEED=2", "NOSUCH=1"]
)
def test_a_setting_that_a_sweep_cannot_vary_is_refused(setting, monkeypatch, tmp_path):
    """Its Hessians are made once: every point would have given the same bytes."""
    command = [
        "bench",
        "sweep",
        str(tmp_path / "absent.pt"),
        "--curve",
        "ours",
        "",
        f"GPTQ_DAMP=0.1 {setting}",
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(train_gpt.SettingError, match=f"{setting.split('=')[0]} cannot differ"):
        bench_bytes.main()


def test_codes_compares_compressors_on_the_same_arrays(monkeypatch, tmp_path, capsys):
    arrays = model_arrays()
    (tmp_path / "artifact.bin").write_bytes(train_gpt.pack_weights(arrays, "brotli"))
    monkeypatch.setenv("PATH", str(tmp_path))  # without lrzip
    monkeypatch.setattr("sys.argv", ["bench", "codes", str(tmp_path / "artifact.bin")])
    bench_bytes.main()
    lines = capsys.readouterr().out.splitlines()
    assert f"{len(arrays)} arrays" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["order-0,", "entropy", "brotli"]
    assert int(lines[3].split()[1]) == len(train_gpt.pack_weights(arrays, "brotli"))


def test_codes_counts_the_entropy_of_codes_and_the_bytes_of_the_rest(tmp_path, capsys):
    assert bench_bytes.entropy_bytes(np.tile([-1, 0, 1, 5], 8)) == 32 * 2 / 8
    arrays = {
        "blocks.0.mlp.c_fc.weight:codes": np.tile(np.int8([0, 1]), (40, 100)),
        "blocks.0.mlp.c_fc.weight:scale": np.arange(40).astype(np.int8),
        "q_gain:fp16": np.ones(8, np.float16),
    }
    (tmp_path / "artifact.bin").write_bytes(train_gpt.pack_weights(arrays, "brotli"))
    bench_bytes.compare_codes(tmp_path / "artifact.bin", ["brotli"])
    order_0, brotli = capsys.readouterr().out.splitlines()[1:]
    assert order_0.split()[3:] == ["1056", "B", "up:1000", "scales:40", "small:16"]
    packed = bench_bytes.packed_groups(arrays, "brotli")
    assert packed["up"] < 100 < 8000 == arrays["blocks.0.mlp.c_fc.weight:codes"].nbytes
    assert brotli.endswith(" ".join(f"{group}:{size}" for group, size in packed.items()))


def test_codes_says_where_a_round_trip_is_not_exact(monkeypatch, tmp_path):
    (tmp_path / "artifact.bin").write_bytes(train_gpt.pack_weights(model_arrays(), "brotli"))
    unpack, seen = train_gpt.unpack_weights, []

    def unpack_wrongly(blob):
        seen.append(blob)
        arrays = unpack(blob)
        return {name: array + (len(seen) == 2) for name, array in arrays.items()}

    monkeypatch.setattr(train_gpt, "unpack_weights", unpack_wrongly)
    with pytest.raises(AssertionError, match="not exact"):
        bench_bytes.compare_codes(tmp_path / "artifact.bin", ["entropy"])


def test_the_bound_of_a_white_gaussian_matrix_is_the_textbook_one():
    w = torch.randn(400, 300, generator=torch.Generator().manual_seed(1))
    bits = np.array([1.0, 2.0, 3.5])
    bound = bench_bytes.gaussian_bound(w, torch.eye(300), 1e-9, bits)
    assert bound == pytest.approx(4.0**-bits, rel=0.02)


def test_the_bound_of_correlated_inputs_is_that_of_their_determinant():
    """At high rates: the geometric mean of the conditional variances, times 4 to the minus rate."""
    pair = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    hessian = torch.kron(torch.eye(150), pair)
    w = torch.randn(400, 300, generator=torch.Generator().manual_seed(3))
    bits = np.array([3.0, 4.0])
    bound = bench_bytes.gaussian_bound(w, hessian, 1e-9, bits)
    assert bound == pytest.approx((1 - 0.9**2) ** 0.5 * 4.0**-bits, rel=0.02)


def small_harness(w, inputs):
    """What measure_rates reads of a Sweep, for one matrix and the inputs that it is fed with."""
    name = "blocks.0.mlp.c_fc.weight"
    model = SimpleNamespace(ops=SimpleNamespace(trellis_round=train_gpt.trellis_round_ref))
    harness = SimpleNamespace(
        weights={name: w},
        hessians={name: inputs.T @ inputs / len(inputs)},
        hp=tiny_hp(gptq_row_power=0.5),  # which the curves leave out
        dist=train_gpt.Dist("cpu"),
        model=model,
    )
    return harness, name


def test_bits_a_weight_are_those_of_the_whole_packed_file(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(32, 16, generator=generator)
    harness, name = small_harness(w, torch.randn(60, 16, generator=generator))
    sizes = []
    pack_weights = train_gpt.pack_weights

    def pack_and_note(arrays, compressor):
        blob = pack_weights(arrays, compressor)
        sizes.append(len(blob))
        return blob

    monkeypatch.setattr(train_gpt, "pack_weights", pack_and_note)
    curves = bench_bytes.measure_rates(harness, name)
    bits = [bits for method in bench_bytes.METHODS for bits, _ in curves[method]]
    assert bits == [8 * size / w.numel() for size in sizes]


def test_a_trellis_comes_nearer_to_the_bound_than_codes_for_themselves():
    generator = torch.Generator().manual_seed(2)
    w = 0.02 * torch.randn(512, 96, generator=generator)
    harness, name = small_harness(w, torch.randn(400, 96, generator=generator))
    curves = bench_bytes.measure_rates(harness, name)
    bound_bits, bound_errors = zip(*curves["bound"], strict=True)

    def excess(method):  # at the middle factor: about three bits, two thousand weights a row step
        bits, error = curves[method][2]
        return bits - np.interp(-np.log(error), -np.log(bound_errors), bound_bits)

    assert 0 < excess("trellis") < excess("steps of columns") - 0.1
