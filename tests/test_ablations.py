"""Ablations: arms differ in one thing, are judged by the same rows, and run."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import ablations, midtrain, pretrain, sft, sweep
from glm45_jax import main as door
from glm45_jax import values
from glm45_jax.data.pack import BestFit
from glm45_jax.data.prepare import documents, prepare
from glm45_jax.experiment import Report
from glm45_jax.metrics import read_jsonl
from glm45_jax.model import cost
from glm45_jax.model.transformer import specs
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.schedules import Wsd
from glm45_jax.params import leaves_with_path
from glm45_jax.train.parallel import Pmap

# What each ablation may change; everything else of its arms is the base's.
CHANGES = {
    "optimizer": {"optim", "optim.lr"},
    "schedule": {"optim.schedule"},
    "bias": {"train.bias_rate", "train.bias_rate.value", "train.balance_weight.value"},
    "mtp_weight": {"train.mtp_weight.value"},
    "qk_norm": {"model.mixer.qk_norm", "optim.lr"},
    "heads": {"model.mixer.heads"},
    "depth_width": {
        "model.n_moe",
        "model.d_model",
        "model.d_mlp",
        "model.mixer.heads",
        "model.moe.d_expert",
    },
    "fim_rate": {"data.sources.1.0"},
    "packing": {"data.packing", "data.packing.document_mask"},
}


def arms_of(name, base=None):
    return ablations.ABLATIONS[name](base or ablations.tiny()).arms


def quick(**train):
    """The tiny base with a slice of the text and a few steps."""
    base = ablations.tiny()
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, max_docs=40, seq_len=32),
        train=dataclasses.replace(
            base.train, **({"steps": 3, "validate_rows": 16, "validate_every": 0} | train)
        ),
        report=Report(),
    )


def test_every_ablation_is_listed_here():
    assert CHANGES.keys() == ablations.ABLATIONS.keys()


@pytest.mark.parametrize("base", [ablations.tiny, pretrain.mini], ids=["tiny", "mini"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_arms_differ_from_the_base_in_nothing_else_and_survive_json(name, base):
    base = base()
    arms = arms_of(name, base)
    if name == "fim_rate":  # the code is another of mini's sources
        at = [source.name for source, _ in base.data.sources].index("python")
        allowed = {f"data.sources.{at}.0"}
    else:
        allowed = CHANGES[name]
    for _, arm in arms:
        assert {path for path, _, _ in values.diff(base, arm)} <= allowed
        assert values.from_json(json.loads(json.dumps(values.to_json(arm)))) == arm
    names = [arm_name for arm_name, _ in arms]
    assert len(set(names)) == len(names) >= 2
    fingerprints = {values.fingerprint(arm) for _, arm in arms}
    assert len(fingerprints) == len(arms)


def test_the_base_is_an_arm_of_what_it_already_does():
    base = ablations.tiny()
    for name in ("optimizer", "schedule", "mtp_weight", "qk_norm", "depth_width", "packing"):
        assert base in [arm for _, arm in arms_of(name, base)], name


def test_deeper_is_narrower_at_nearly_the_same_active_parameters():
    for base in (ablations.tiny(), pretrain.mini()):
        models = [arm.model for _, arm in arms_of("depth_width", base)]
        assert [m.n_moe for m in models] == sorted({m.n_moe for m in models}, reverse=True)
        assert [m.d_model for m in models] == sorted(m.d_model for m in models)
        wanted = cost.param_counts(base.model).active_body
        # Widths go in steps of 8: at 64 no nearer than 15%.
        near = 0.15 if base.model.d_model == 64 else 0.03
        for model in models:
            assert cost.param_counts(model).active_body == pytest.approx(wanted, rel=near)


def test_heads_change_queries_and_outputs_and_leave_keys_and_the_cache_alone():
    shapes = [
        {path: spec.shape for path, spec in leaves_with_path(specs(arm.model))}
        for _, arm in arms_of("heads")
    ]
    differ = {path.rpartition(".")[2] for path in shapes[0] if shapes[0][path] != shapes[1][path]}
    assert differ == {"q_DNH", "out_NHD", "q_bias_NH"}


def test_both_optimizers_get_the_same_rates_schedule_decay_and_clip():
    base = ablations.tiny()
    arms = dict(arms_of("optimizer", base))
    assert sorted(n.removeprefix("adamw") for n in arms if n.startswith("adamw")) == sorted(
        n.removeprefix("muon") for n in arms if n.startswith("muon")
    )
    for name in ("lr", "schedule", "weight_decay", "decay_kinds", "clip_norm"):
        assert getattr(arms["adamw_lr_x3"].optim, name) == getattr(arms["muon_lr_x3"].optim, name)
    other_way = dict(arms_of("optimizer", dataclasses.replace(base, optim=AdamW(lr=1e-3))))
    assert other_way["muon_lr_x1"].optim.lr == other_way["adamw_lr_x1"].optim.lr == 1e-3


def test_both_schedules_warm_up_alike_and_end_at_the_same_rate_after_the_same_tokens():
    (_, cosine), *others = arms_of("schedule")
    end = cosine.optim.schedule.total
    for _, arm in others:
        assert isinstance(arm.optim.schedule, Wsd)
        for tokens in (0.0, 0.5 * cosine.optim.schedule.warmup, end, 2 * end):
            np.testing.assert_allclose(
                arm.optim.lr_at(tokens), cosine.optim.lr_at(tokens), rtol=1e-6
            )
        assert arm.optim.lr_at(0.5 * end) > cosine.optim.lr_at(0.5 * end)


def test_a_base_that_an_ablation_cannot_change_is_refused():
    staged = midtrain.tiny_recipe()
    for name in ("bias", "mtp_weight", "packing"):
        with pytest.raises(ValueError, match=r"tiny_recipe sets .* stage by stage"):
            ablations.ABLATIONS[name](staged)
    assert len(arms_of("optimizer", staged)) == 6
    with pytest.raises(ValueError, match=r"no source \['python'\] to infill.*topics"):
        ablations.fim_rate(pretrain.tiny())
    with pytest.raises(ValueError, match="sft_tiny reads Chats"):
        ablations.optimizer(sft.tiny())
    with pytest.raises(ValueError, match="attention is Mla"):
        ablations.heads(pretrain.glm47_flash())
    with pytest.raises(ValueError, match=r"no arms \['sgd'\]; there are \['cosine'"):
        sweep.only(ablations.schedule(ablations.tiny()), ["sgd"])


def test_a_run_of_stages_is_scored_on_ids_of_its_own_tokenizer():
    staged = midtrain.tiny_recipe()
    ((_, judge),) = ablations.optimizer(staged).judges
    assert len(judge.sources) < len(staged.data.sources)  # of one stage
    assert sweep.read_by(staged, judge) is staged.data
    (_, arm), *_ = ablations.fim_rate(quick()).arms
    for _, judge in ablations.fim_rate(quick()).judges:  # its documents are none of the run's
        assert sweep.read_by(arm, judge) is judge


def test_rates_of_infilling_share_documents_split_and_tokenizer(tmp_path):
    ablation = ablations.fim_rate(quick())
    datas = [arm.data for _, arm in ablation.arms] + [data for _, data in ablation.judges]
    prepared = [prepare(data, tmp_path) for data in datas]
    assert len({one.tokenizer.fingerprint for one in prepared}) == 1
    texts = [[doc.text for doc in documents(data)["python", "val"]] for data in datas[:2]]
    assert texts[0] == texts[1]
    assert len({one.train["python"].manifest.fingerprint for one in prepared}) > 2


@pytest.mark.slow
def test_an_arm_is_scored_as_its_run_validates(tmp_path):
    base = dataclasses.replace(quick(steps=2), mesh=Pmap(1))
    ablation = sweep.only(ablations.mtp_weight(base), ["mtp_0.3"])
    (one,) = sweep.run(ablation, tmp_path)
    last = read_jsonl(tmp_path / "mtp_0.3" / "0" / "metrics.jsonl")[-1].scalars
    assert one.losses["validation"] == pytest.approx(last["val/loss"], rel=1e-5)
    assert one.watched == {"loss/mtp": last["loss/mtp"]}
    assert (one.ended, one.tokens) == ("done", 2 * 16 * 32)
    assert f"| {one.losses['validation']:.4f} |" in sweep.table(ablation, [one])
    assert json.loads((tmp_path / "results.json").read_text()) == [dataclasses.asdict(one)]


def test_a_table_says_the_mean_of_the_seeds_and_how_far_they_are_apart():
    ablation = ablations.schedule(ablations.tiny())
    losses = {"cosine": (3.0, 3.5), "wsd_decay_0.2": (4.0, 4.0)}
    results = [
        sweep.Result(arm, seed, "done", {"validation": loss}, {}, 100, 10, 5)
        for arm, pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    shown = sweep.table(ablation, results)
    assert "| cosine | 3.2500 ± 0.2500 | 5 | 2 |" in shown
    assert "| wsd_decay_0.2 | 4.0000 ± 0.0000 | 5 | 2 |" in shown
    assert "wsd_decay_0.4" not in shown


@pytest.mark.slow
def test_the_command_runs_two_arms_on_one_corpus_and_goes_on_where_it_was(tmp_path, capsys):
    base = "experiments.ablations:tiny"
    argv = ["mtp_weight", "--workdir", str(tmp_path), "--base", base, "--arms", "mtp_0.3", "mtp_0"]
    for change in ("train.steps=3", "data.max_docs=40", "data.seq_len=32"):
        argv += ["--set", change]
    assert ablations.main(argv) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert [one["arm"] for one in found] == ["mtp_0.3", "mtp_0"]
    assert all(f"{one['losses']['validation']:.4f}" in shown for one in found)
    assert found[0]["losses"] != found[1]["losses"]
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert (tmp_path / "curves.png").stat().st_size > 5000
    logged = tmp_path / "mtp_0" / "0" / "metrics.jsonl"
    before = logged.read_bytes()
    assert ablations.main(argv) == 0
    assert logged.read_bytes() == before
    assert ablations.main([*argv, "--set", "optim.lr=0.1"]) == door.BAD_INPUT
    assert "optim.lr: 0.005 there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHANGES))
def test_every_arm_trains_and_is_scored_at_tiny_size(name, tmp_path: pathlib.Path):
    ablation = ablations.ABLATIONS[name](dataclasses.replace(quick(), mesh=Pmap(1)))
    results = sweep.run(ablation, tmp_path)
    assert [one.arm for one in results] == [arm for arm, _ in ablation.arms]
    for one in results:
        assert one.ended == "done" and one.losses.keys() == dict(ablation.judges).keys()
        assert all(3 < loss < 8 for loss in one.losses.values())
    jax.clear_caches()  # a program maps memory, and a process has 65,530 mappings
    shown = sweep.table(ablation, results)
    assert all(arm in shown for arm, _ in ablation.arms) and "nan" not in shown


def test_best_fit_is_judged_on_both_kinds_of_rows():
    judges = dict(ablations.packing(ablations.tiny()).judges)
    assert isinstance(judges["whole documents"].packing, BestFit)
    assert judges["joined rows"] == ablations.tiny().data
