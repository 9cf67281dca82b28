"""What a run would cost on a machine that is not here: targets, collectives of compiled programs,
roofline, settings that fit, hardware to serve with, and the command.
"""

import ast
import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from experiments import pretrain
from glm45_jax import sharding, values
from glm45_jax.model import config
from glm45_jax.plan import command, hlo, inference, nearest, report, roofline, targets, wheels
from glm45_jax.plan import compile as compiling
from glm45_jax.plan.compile import Compiled, Job

ROOT = Path(__file__).resolve().parent.parent
TINY = "experiments.pretrain:tiny"
H100, V5P = targets.parse("h100:64x8"), targets.parse("v5p:8x8x8")

# As TPU's compiler writes it: a loop whose length only its condition says, a scattered sum as a
# fusion, groups as names of a mesh, a started exchange, and a loop that ends by data.
TPU_TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: bf16[64,16]) -> bf16[16,16] {
  %x = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,16]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[16,16]{1,0} slice(%all-reduce.1), slice={[0:16], [0:16]}
}

%body (p: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %p = (s32[]{:T(128)}, bf16[64,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %y = bf16[64,16]{1,0} get-tuple-element(%p), index=1
  %f = bf16[16,16]{1,0:T(8,128)(2,1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %g = bf16[64,16]{1,0} all-gather(%f), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
  ROOT %t = (s32[], bf16[64,16]{1,0}) tuple(%i, %g)
}

%cond (p.1: (s32[], bf16[64,16])) -> pred[] {
  %c = s32[]{:T(128)} constant(89)
  %p.1 = (s32[]{:T(128)}, bf16[64,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %c), direction=LT
}

%until (p.2: (s32[], s32[], bf16[64,16])) -> pred[] {
  %p.2 = (s32[], s32[], bf16[64,16]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %n.2 = s32[] get-tuple-element(%p.2), index=1
  ROOT %lt.2 = pred[] compare(%i.2, %n.2), direction=LT
}

ENTRY %main (x.1: bf16[64,16]) -> bf16[64,16] {
  %x.1 = bf16[64,16]{1,0} parameter(0)
  %w = (s32[], /*index=1*/bf16[64,16]{1,0}) while(%t.1), condition=%cond, body=%body
  %d = (s32[], s32[], bf16[64,16]{1,0}) while(%t.2), condition=%until, body=%body
  %s = (bf16[64,16]{1,0}, bf16[64,16]{1,0}, u32[]) collective-permute-start(%x.1), \
source_target_pairs={{0,1},{1,0}}
  ROOT %e = bf16[64,16]{1,0} collective-permute-done(%s)
}
"""


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def glm45(*sets):
    return values.override(values.find("experiments.pretrain:glm45")(), sets)


@pytest.mark.parametrize(
    "text, devices, on_a_host",
    [
        ("v5p:8x8x8", 512, 512),
        ("V6E:16x16", 256, 256),
        ("2*v6e:16x16", 512, 256),
        ("h100:64x8", 512, 8),
        ("h100:1x4", 4, 4),
    ],
)
def test_a_target_reads_back_as_it_is_written(text, devices, on_a_host):
    target = targets.parse(text)
    assert str(target) == text.lower() and targets.parse(str(target)) == target
    assert (target.devices, target.on_a_host) == (devices, on_a_host)


@pytest.mark.parametrize(
    "text, words",
    [
        ("v5p", ["chip:sides", "v5p:8x8x8"]),
        ("v5q:2x2x2", ["'v5q'", "did you mean ['v5p'"]),
        ("v5p:8x8", ["3 sides", "(8, 8)"]),
        ("h100:2x9", ["up to 8 GPUs", "9"]),
        ("v6e:0x4", ["(0, 4)"]),
        ("0*v6e:4x4", ["0 slices"]),
        ("2*h100:4x8", ["2 slices", "GPUs have hosts"]),
    ],
)
def test_a_target_that_no_machine_has_is_refused_with_the_way_out(text, words):
    with pytest.raises(ValueError) as error:
        targets.parse(text)
    assert all(word in str(error.value) for word in words), error.value


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """What `make_mesh` asks of a TPU."""

    id: int
    slice_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0


def test_the_first_axis_of_a_mesh_goes_over_slices_and_the_others_stay_inside():
    two = [FakeChip(16 * s + n, s, (n % 4, n // 4, 0)) for s in range(2) for n in range(16)]
    for shape in (sharding.MeshShape(1, fsdp=8, expert=4), sharding.MeshShape(data=2, fsdp=16)):
        flat = list(sharding.make_mesh(shape, two).devices.flat)
        assert sorted(chip.id for chip in flat) == list(range(32))
        assert [chip.slice_index for chip in flat] == [0] * 16 + [1] * 16
    with pytest.raises(ValueError, match=r"'data' of 3 devices.* 2 slices"):
        three = [FakeChip(n, n % 2, (0, n // 2, 0)) for n in range(6)]
        sharding.make_mesh(sharding.MeshShape(data=3, fsdp=2), three)


def test_slices_are_joined_by_the_network_of_their_hosts():
    two = targets.parse("2*v6e:16x16")
    inside = roofline.seconds_of(collective("all-gather", range(256)), two)
    across = roofline.seconds_of(collective("all-gather", range(512)), two)
    assert across > inside > 0


def test_collectives_of_a_compiled_loop_count_as_often_as_it_runs():
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4), jax.devices())

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec("fsdp"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def f(x_m):
        def one(y_m, _):
            return jnp.tanh(jax.lax.psum(y_m, "fsdp")), None

        y_m, _ = jax.lax.scan(one, x_m, None, length=5)
        return jax.lax.all_gather(y_m, "fsdp", tiled=True)

    text = jax.jit(f).lower(jnp.ones(64)).compile().as_text()
    counted = hlo.count(text, 8)
    assert counted.unknown_loops == 0
    found = {c.kind: c for c in counted.collectives}
    summed, gathered = found["all-reduce"], found["all-gather"]
    assert len(counted.collectives) == 2
    assert (summed.runs, summed.bytes, len(summed.group)) == (5, 16 * 4, 4)
    assert (gathered.runs, gathered.bytes, len(gathered.group)) == (1, 64 * 4, 4)
    sent = 5 * 2 * 64 * 3 / 4, 256 * 3 / 4
    assert counted.by_kind() == {"all-reduce": (5, sent[0]), "all-gather": (1, sent[1])}


def test_what_tpus_compiler_writes_is_read():
    counted = hlo.count(TPU_TEXT, 8)
    assert counted.unknown_loops == 1
    found = [(c.kind, c.runs, c.bytes, c.group) for c in counted.collectives]
    size = 64 * 16 * 2
    assert found == [
        ("reduce-scatter", 89, size, (0, 1, 2, 3)),
        ("all-gather", 89, size, (0, 1, 2, 3)),
        ("collective-permute", 1, size, (0, 1)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "replica_groups={{0,2,4,6},{1,3,5,7}}, x",
        "replica_groups=[2,4]<=[4,2]T(1,0), x",
        "replica_groups=mesh['a'=4,'b'=2] {'a'}, x",
    ],
)
def test_one_group_reads_the_same_in_every_form(text):
    assert hlo.group_of(text, 8) == (0, 2, 4, 6)


def test_arrays_of_a_shape_have_their_bytes():
    shape = "(bf16[4,32]{1,0:T(8,128)(2,1)}, /*index=1*/s32[], f8e4m3fn[16]{0}, pred[3])"
    assert hlo.array_bytes(shape) == [256, 4, 16, 3]


def collective(kind, group):
    return hlo.Collective(kind, 1, 8e9, tuple(group))


@pytest.mark.parametrize("kind", hlo.KINDS)
def test_a_collective_over_hosts_is_never_faster_than_inside_one(kind):
    inside = roofline.seconds_of(collective(kind, range(8)), H100)
    across = roofline.seconds_of(collective(kind, range(0, 64, 8)), H100)
    assert across > inside > 0


def test_members_of_a_host_share_its_network_cards_where_all_need_the_same():
    one = roofline.seconds_of(collective("all-gather", range(0, 64, 8)), H100)
    eight = roofline.seconds_of(collective("all-gather", range(64)), H100)
    assert eight == pytest.approx(one * (63 / 64) / (7 / 8) / 8)
    swap = roofline.seconds_of(collective("all-to-all", range(64)), H100)
    assert swap == pytest.approx(8e9 * 63 / 64 * (56 / 63) / 50e9)


def test_arithmetic_of_a_step_is_that_of_its_tokens():
    exp = glm45()
    terms = nearest.terms(exp, 16384, V5P)
    whole = roofline.of(exp, 16384, V5P, terms, None)
    half = roofline.of(exp, 8192, V5P, terms, None)
    rest = whole.compute - whole.muon
    assert rest == pytest.approx(2 * (half.compute - half.muon)) and whole.muon == half.muon
    assert whole.links is None and whole.mfu(whole.at_least) < 3 / 4 + 0.05  # a pass is repeated
    assert whole.at_least <= whole.at_most


def test_newton_schulz_costs_what_its_products_do():
    """Wider by n at a fixed short side m: two products of 2·m·m·n FLOPs a step, in 3 matrices."""
    exp = values.find(TINY)()
    m, n = exp.model.d_model, exp.model.d_mlp
    wide = dataclasses.replace(exp.model, d_mlp=2 * n)
    more = roofline.newton_schulz_flops(wide, exp.optim)
    more -= roofline.newton_schulz_flops(exp.model, exp.optim)
    assert n > m and more == exp.model.n_dense * 3 * exp.optim.steps * 4 * m * m * n


def test_the_table_of_hardware_needs_is_the_published_one():
    models = (config.glm45(), config.glm45_air(), config.glm47_flash())
    short = [[inference.need(m, fp8=fp8).cards for fp8 in (False, True)] for m in models]
    assert short[0] == [16, 8] and short[1] == [4, 2] and short[2][0] == 1
    for model, cards in zip(models[:2], short[:2], strict=True):
        full = [inference.need(model, fp8=f, tokens=131_072).cards for f in (False, True)]
        assert full == [2 * n for n in cards]  # "full 128K context needs twice as many"


# GiB of a device that the compilers said (docs/log.md): experiment, stage, target, overrides.
PRETRAIN, MIDTRAIN = "experiments.pretrain:", "experiments.midtrain:"
LOW = ("optim.master_dtype=bfloat16", "optim.momentum_dtype=bfloat16")
COMPILED = (
    (PRETRAIN + "glm45", None, "h100:64x8", (), 30.08),
    (PRETRAIN + "glm45", None, "h100:64x8", LOW, 22.30),
    (PRETRAIN + "glm45_air", None, "h100:8x8", (), 53.19),
    (MIDTRAIN + "glm45_long", "repositories", "h100:64x8", (), 30.61),
    (MIDTRAIN + "glm45_long", "long_agent", "h100:64x8", (), 55.77),
    (MIDTRAIN + "glm45_air", "repositories", "h100:32x8", (), 58.69),
    (MIDTRAIN + "glm45_air_long", "long_agent", "h100:32x8", (), 40.14),
    (PRETRAIN + "glm45_air", None, "v5p:4x4x4", (), 49.09),
    (MIDTRAIN + "glm45_long", "long_agent", "v5p:8x8x8", (), 44.48),
    (MIDTRAIN + "glm45", "repositories", "v5p:8x8x8", (), 71.58),
    (MIDTRAIN + "glm45_long", "repositories", "2*v6e:16x16", (), 28.29),
    (MIDTRAIN + "glm45_v6e_long", "long_agent", "4*v6e:16x16", (), 28.36),
    (MIDTRAIN + "glm45_air_v6e_long", "repositories", "v6e:16x16", (), 18.32),
)
LESS_NEAR = (  # 13% too much, 10.4% too little
    (MIDTRAIN + "glm45_air_long", "long_agent", "v5p:4x8x8", (), 28.85),
    (PRETRAIN + "glm45", None, "2*v6e:16x16", (), 28.35),
)


@pytest.mark.parametrize("name,stage,target,sets,said", COMPILED + LESS_NEAR, ids=lambda x: str(x))
def test_the_estimate_is_near_what_the_compiler_said(name, stage, target, sets, said):
    exp, rows = compiling.part(values.override(values.find(name)(), sets), stage)
    where = targets.parse(target)
    held = nearest.terms(exp, rows, where)["total"] / targets.GIB
    near = 0.06 if where.chip.platform == "gpu" else 0.1
    if (name, stage, target, sets, said) in LESS_NEAR:
        near = 0.13
    assert held == pytest.approx(said, rel=near)


def test_settings_that_fit_come_nearest_first_and_hold_what_they_say():
    exp = glm45("train.micro_rows=1024", "model.remat=outputs")
    held = nearest.terms(exp, 16384, V5P)["total"]
    small = targets.Target(dataclasses.replace(V5P.chip, hbm_bytes=0.9 * held), V5P.sides)
    found = nearest.search(exp, 16384, small, scale=1.0)
    assert len(found) == 3
    for setting in found:
        changed = values.override(exp, [f"{path}={value}" for path, value in setting.changes])
        assert nearest.terms(changed, 16384, small)["total"] == pytest.approx(setting.bytes)
        assert setting.bytes <= small.chip.hbm_bytes
        nearest.check(changed, 16384, small)
    changes = [set(s.changes) for s in found]
    assert not any(a < b for a in changes for b in changes)  # none is another with more
    assert not nearest.search(exp, 16384, small, scale=100.0)


def test_a_remat_policy_that_keeps_more_repeats_less_and_the_first_that_fits_is_chosen():
    exp = glm45()
    found = nearest.policies(exp, 16384, V5P)
    assert [p.name for p in found] == list(nearest.REMAT)
    for more, less in itertools.pairwise(found):
        assert more.bytes > less.bytes and more.again_s <= less.again_s
    assert found[0].again_s == 0
    by_name = {p.name: p for p in found}
    held = nearest.terms(exp, 16384, V5P)
    assert by_name[exp.model.remat].bytes == held["total"]
    whole = roofline.of(exp, 16384, V5P, held, None)  # what is repeated is in the roofline's sum
    none = roofline.of(glm45("model.remat=none"), 16384, V5P, held, None)
    again = by_name[exp.model.remat].again_s
    assert whole.compute - none.compute == pytest.approx(again)
    room = by_name["dots"].bytes / nearest.MARGIN
    small = targets.Target(dataclasses.replace(V5P.chip, hbm_bytes=room), V5P.sides)
    fits = [p.name for p in nearest.policies(exp, 16384, small) if p.fits]
    assert fits == ["dots", "outputs", "full"]
    assert not any(p.fits for p in nearest.policies(exp, 16384, small, scale=100.0))


def test_the_command_chooses_what_a_block_keeps(capsys):
    argv = ["experiments.pretrain:glm45", "--target", "v5p:8x8x8", "--estimate"]
    command.main(argv)
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if "cheapest that fits" in line)
    chosen = line.split()[0]
    assert "remat full" in told and line.endswith(f"--set model.remat={chosen}")
    command.main([*argv, "--choose-remat"])
    text = capsys.readouterr().out
    assert f"remat {chosen}" in text and "--set model.remat" not in text


def test_weights_in_bfloat16_are_named_where_little_else_fits():
    exp = glm45("train.micro_rows=512")
    held = nearest.terms(exp, 16384, V5P)
    least = glm45("optim.master_dtype=bfloat16", "optim.momentum_dtype=bfloat16")
    room = nearest.terms(least, 16384, V5P)["total"] / nearest.MARGIN
    assert room < held["total"]
    small = targets.Target(dataclasses.replace(V5P.chip, hbm_bytes=room), V5P.sides)
    found = nearest.search(exp, 16384, small, scale=1.0)
    wanted = {("optim.momentum_dtype", "bfloat16"), ("optim.master_dtype", "bfloat16")}
    assert wanted in [set(s.changes) for s in found]


def test_long_rows_are_split_where_a_device_cannot_hold_one():
    exp, rows = compiling.part(values.find("experiments.midtrain:glm45")(), "long_agent")
    assert exp.data.seq_len == 131_072
    assert nearest.terms(exp, rows, V5P)["total"] > V5P.chip.hbm_bytes
    (setting,) = nearest.search(exp, rows, V5P, scale=1.0, wanted=1)
    assert dict(setting.changes)["mesh.context"] > 1
    assert "--set \"rules.experts=('context',)\"" in setting.text()


def test_scores_of_a_row_are_counted_only_where_no_kernel_takes_it():
    large, small = pretrain.glm45(), pretrain.tiny()  # small: float32, rows of one tile
    assert not nearest.keeps_scores(large, "tpu") and not nearest.keeps_scores(large, "gpu")
    assert nearest.keeps_scores(small, "tpu") and not nearest.keeps_scores(small, "gpu")


def test_what_a_compiler_says_of_an_overflow_is_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory. Used 128.74G of 95.73G hbm. Exceeded"
    assert compiling.overflow(message) == pytest.approx(128.74 * 2**30)
    assert compiling.overflow("INTERNAL: something else") == 0


def verdict(compiled, missing=""):
    exp = glm45("train.micro_rows=1024", "model.remat=outputs")
    job = Job("experiments.pretrain:glm45", str(V5P))
    return report.report(exp, 16384, job, V5P, compiled, missing)


def test_the_verdict_is_the_compilers_and_no_estimates_stand_in_for_it():
    fits, code = verdict(Compiled(peak=34 * 2**30))
    assert code == report.FITS and "fits         34.00 of 95.73 GiB" in fits
    tight, code = verdict(Compiled(peak=0.99 * V5P.chip.hbm_bytes))  # above what estimates may fill
    assert code == report.FITS
    (line,) = (line for line in tight.splitlines() if line.startswith("  outputs "))
    assert line.split()[1] == "94.77" and "does not fit" not in line
    text, code = verdict(Compiled(error="RESOURCE_EXHAUSTED", used=100.5 * 2**30))
    assert code == report.DOES_NOT_FIT and "does not fit 100.50 of 95.73 GiB" in text
    assert text.count("--set ") >= 3 and "by estimate" in text
    text, code = verdict(Compiled(error="stopped: not compiled within 3 s"))
    assert code == report.STOPPED and "NOT COMPILED stopped" in text and "fits " not in text
    text, code = verdict(None, "no wheel")
    assert code == report.NOT_COMPILED and "NOT COMPILED by estimate" in text


@pytest.mark.parametrize(
    "argv, words",
    [
        ([TINY], ["--target", "--inference"]),
        ([TINY, "--target", "v9:2x2"], ["'v9'"]),
        (["experiments.pretrain:glm45", "--target", "v5p:2x2x1"], ["has 4 devices", "512"]),
        ([TINY, "--target", "v5p:2x2x1", "--stage", "128k"], ["no stage '128k'"]),
        ([TINY, "--target", "v5p:2x2x1", "--set", "train.rows=18"], ["18", "4 devices"]),
        ([TINY, "--target", "v5p:2x2x1", "--set", "train.row=16"], ["did you mean", "rows"]),
        (["experiments.midtrain:tiny_recipe", "--target", "v5p:2x2x1"], ["mesh=MeshShape"]),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_compiled(capsys, argv, words):
    assert command.main(argv) == report.BAD_INPUT
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_without_a_compiler_the_estimates_are_printed_and_the_code_says_so(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(wheels, "_installed", lambda platform: False)
    monkeypatch.setattr(wheels, "folder", lambda platform: tmp_path / platform)
    code = command.main(["experiments.pretrain:glm45", "--target", "h100:64x8"])
    text = capsys.readouterr().out
    assert code == report.NOT_COMPILED
    assert "NOT COMPILED" in text and "--install" in text and "plan-gpu" in text
    assert "E saved activations" in text and "arithmetic" in text


def test_the_inference_table_is_printed(capsys):
    assert command.main(["--inference"]) == 0
    assert "GLM-4.7-Flash" in capsys.readouterr().out


@pytest.mark.parametrize(
    "limits, words",
    [
        (dict(limit_s=0.3, limit_bytes=1e12), "within 0.3 s"),
        (dict(limit_s=60, limit_bytes=1), "GiB"),
    ],
)
def test_a_compiler_past_a_limit_is_stopped_and_says_which(limits, words):
    compiled = compiling.run(Job(TINY, "v5p:2x2x1"), **limits)
    assert words in compiled.error and "--limit" in compiled.error


def test_a_childs_last_words_are_passed_on_without_jaxs_remark():
    text = "a\nValueError: x\n-----\nFor simplicity ... JAX_TRACEBACK_FILTERING=off to include\n"
    assert compiling.last_words(text) == "a | ValueError: x"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_pins_of_the_compilers_are_written_once(platform):
    lines = (ROOT / f"requirements-plan-{platform}.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == list(wheels.PINS[platform])
    tree = ast.parse((ROOT / "setup.py").read_text())
    (extras,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EXTRAS"
    )
    by_name = {ast.literal_eval(k): v for k, v in zip(extras.keys, extras.values, strict=True)}
    assert ast.literal_eval(by_name[f"plan-{platform}"]) == list(wheels.PINS[platform])


def test_a_step_is_lowered_for_devices_whose_arrays_do_not_exist():
    exp = values.override(values.find(TINY)(), ["mesh.fsdp=8"])
    lowered = compiling.lower(exp, 16, jax.devices())
    given = jax.tree.leaves(lowered.args_info)
    donated = sum(math.prod(x.shape) for x in given if x.donated)
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(lowered.out_info[0].params))
    assert donated > 2 * weights * 0.9  # parameters and momentum, not the batch
    assert not any(x.donated for x in given if x.shape == (16, 32))


@pytest.mark.slow
def test_a_small_experiment_compiles_for_a_small_torus(capsys):
    if why := wheels.missing("tpu"):
        try:
            wheels.install("tpu")
        except ValueError as error:
            pytest.skip(f"TPU targets are not checked here: {why}; {error}")
    sets = ["--set", "model.dtype=bfloat16"]
    assert command.main([TINY, "--target", "v5p:2x2x1", *sets]) == report.FITS
    text = capsys.readouterr().out
    peak = float(text.split("peak")[1].split()[0])
    assert 0 < peak < 1 and "all-gather" in text and "attention on tpu" in text


@pytest.mark.slow
def test_gradients_of_bfloat16_vocabularies_are_scattered_and_not_reduced_whole():
    if why := wheels.missing("gpu"):
        pytest.skip(f"GPU targets are not checked here: {why}")
    sets = ("model.vocab=8192", "data.vocab=8192", "model.dtype=bfloat16")
    sets += ("optim.master_dtype=bfloat16", "optim.steps=1", "model.n_moe=1", "model.n_dense=0")
    sets += ("model.impl.attention=reference", "model.impl.grouped_matmul=reference")
    sets += ("mesh.fsdp=4", "mesh.expert=2", "train.micro_rows=8")
    found = compiling.run(Job(TINY, "h100:1x8", sets), limit_s=1800, limit_bytes=8e9)
    assert not found.error
    exp = values.override(values.find(TINY)(), sets)
    whole = exp.train.accum(exp.train.rows) * exp.model.vocab * exp.model.d_model * 2
    assert 0 < found.sends["all-reduce"][1] < whole
