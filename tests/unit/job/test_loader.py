"""Reading jobs: what is accepted, and how every mistake is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dst_train.job import Job, JobError, digest, dump, load
from tests.unit.job.conftest import TEXT

Write = Callable[..., Path]


def _lines(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(JobError) as caught:
        load(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_defaults_and_numbers(base: Job) -> None:
    assert base.optimizer.lr == 1e-3  # YAML 1.1 alone reads 1e-3 as text
    assert base.deepspeed.zero_optimization.stage == 1
    assert base.sparsity is not None
    assert base.sparsity.rules[0].sparsity == 0.9


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("method: rigl", "method: rigle", "job.yaml:6 topology.method: 'rigle' is unknown; did you mean 'rigl'? (choose one of static, set, rigl, mest, cht, chts, srigl, chase, dynadiag)"),
        ("method: rigl", "metod: rigl", "job.yaml:6 topology.metod: unknown key; did you mean 'method'? (allowed: method, update, drop_fraction, grow_signal, gradient_weight, cold_start, gamma_sal, channel_sparsity, explore, alpha_lr, temperature)"),
        ("sparsity: 0.9", "sparsity: 1.0", "job.yaml:5 sparsity.rules.0.sparsity: input should be less than 1, got 1.0"),
        ("sparsity: 0.9", "sparsity: -0.1", "job.yaml:5 sparsity.rules.0.sparsity: input should be greater than or equal to 0, got -0.1"),
        ("sparsity: 0.9", "sparsity: 0.9, bnd: 2", "job.yaml:5 sparsity.rules.0.bnd: unknown key; did you mean 'band'? (allowed: match, pattern, sparsity, band, size, permute)"),
        ("sparsity: 0.9", "sparsity: 0.9, pattern: blok", "job.yaml:5 sparsity.rules.0.pattern: 'blok' is unknown; did you mean 'block'? (choose one of diagonal, unstructured, constant_fan_in, n_m, block, shuffled_block, tile_wise, sr_ste, butterfly, sdgp)"),
        ("sparsity: 0.9", "sparsity: 0.9, permute: lerned", "job.yaml:5 sparsity.rules.0.permute: 'lerned' is unknown; did you mean 'learned'? (choose one of none, learned)"),
        ("sparsity:\n", "sparsity:\n  low_rank: {rank: 0}\n", "job.yaml:4 sparsity.low_rank.rank: input should be greater than or equal to 1, got 0"),
        ("sparsity:\n", "sparsity:\n  low_rank: {rank: 8, start: 1.0}\n", "job.yaml:4 sparsity.low_rank.start: input should be less than 1, got 1.0"),
        ("samples: 1000", "samples: many", "job.yaml:8 data.train.samples: input should be a valid integer, got 'many'"),
        ("samples: 1000", "samples: 10.5", "job.yaml:8 data.train.samples: input should be a valid integer, got 10.5"),
        ("  epochs: 2\n", "", "job.yaml:9 train: give exactly one of epochs and steps, got epochs=None, steps=None"),
        ("  epochs: 2\n", "  epochs: 2\n  steps: 3\n", "job.yaml:9 train: give exactly one of epochs and steps, got epochs=2, steps=3"),
        ("  batch_size: 100\n", "", "job.yaml:9 train.batch_size: this key is required"),
        ("builder: mlp", "builder: mpl", "job.yaml:2 model.builder: 'mpl' is unknown; did you mean 'mlp'? (choose one of timm, transformers, mlp)"),
        ("builder: mlp, ", "", "job.yaml:2 model.builder: this key is required"),
        ("num_classes: 10", "num_clases: 10", "job.yaml:2 model.num_clases: unknown key; did you mean 'num_classes'? (allowed: builder, in_features, hidden_features, num_classes)"),
        ("name: base", "name: a b", "job.yaml:1 name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got 'a b'"),
        ("name: base", "nam: base\nname: base", "job.yaml:1 nam: unknown key; did you mean 'name'? (allowed: name, seed,"),
        ("{lr: 1e-3}", "{lr: 1e-3, betas: [0.9, 1.0]}", "job.yaml:13 optimizer.betas.1: input should be less than 1, got 1.0"),
        ("{lr: 1e-3}", "{lr: 1e-3}\ncheckpoint: {keep: 1}", "job.yaml:14 checkpoint.keep: input should be greater than or equal to 2, got 1"),
        ("{lr: 1e-3}", "{lr: 1e-3}\ndeepspeed: {zero_optimization: {stage: 4}}", "job.yaml:14 deepspeed.zero_optimization.stage: input should be less than or equal to 3, got 4"),
        ("{method: rigl}", "[rigl]", "job.yaml:6 topology: input should be a valid dictionary or instance of Topology, got ['rigl']"),
        ("name: base", "name: base\nseed: 1\nseed: 2", "job.yaml:3 seed: stands twice, first at job.yaml:2"),
        ("name: base", "name: base\n3: 2", "job.yaml:2: the key '3' is not text; put it in quotes"),
        ("name: base", "name: base\n<<: {seed: 1}", "job.yaml:2: merge keys are not read; write the keys out, or use `extends`"),
        ('"layers.*"', "*", "job.yaml:5: not valid YAML: expected alphabetic or numeric character, but found ','; a value that begins with * must be in quotes"),
        ("name: base", "name: base\n\tseed: 1", "job.yaml:2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ("name: base", "name: [base", "job.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("lr: 1e-3", "lr: 1e-3, lr: 1", "job.yaml:13 optimizer.lr: stands twice"),
        ("{lr: 1e-3}", "{lr: 1e-3, 1: 2}", "job.yaml:13 optimizer: the key '1' is not text; put it in quotes"),
        ("name: base", "name: base\nseed: 08", "job.yaml:2 seed: input should be a valid integer, got '08'"),
        ("name: base", "name: base\nseed: 010", "job.yaml:2 seed: input should be a valid integer, got '010'"),
        ("name: base", "name: base\nseed: !!int abc", "job.yaml:2 seed: 'abc' is not a valid int"),
        ("name: base", "name: base\nseed: !!bool 7", "job.yaml:2 seed: '7' is not a valid bool"),
        ("lr: 1e-3", "lr: !!float ''", "job.yaml:13 optimizer.lr: '' is not a valid float"),
        ("name: base", "name: !!timestamp now", "job.yaml:1 name: the tag tag:yaml.org,2002:timestamp does not fit this value"),
        ("[64, 64]", "!!set [64]", "job.yaml:2 model.hidden_features: the tag tag:yaml.org,2002:set does not fit this value"),
        ("{method: rigl}", "!rigl {}", "job.yaml:6 topology: the tag !rigl does not fit this value"),
        ("name: base", "name: base\nseed: " + "1" * 5000, "job.yaml:2 seed: '1111"),
        ("name: base", "name: base\nseed: 18446744073709551616", "job.yaml:2 seed: input should be less than 18446744073709551616"),
        ("lr: 1e-3", "lr: ._", "job.yaml:13 optimizer.lr: input should be a valid number, got '._'"),
        ("{method: rigl}", "&x {method: *x}", "job.yaml:6 topology.method: an alias stands inside of what it stands for"),
        ("[64, 64]", "&x [64, [*x]]", "job.yaml:2 model.hidden_features.1.0: an alias stands inside of what it stands for"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_place(write: Write, old: str, new: str, expected: str) -> None:
    assert old in TEXT
    lines = _lines(write(TEXT.replace(old, new, 1)))
    assert any(line.startswith(expected) for line in lines), lines


def test_all_mistakes_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = TEXT.replace("rigl", "riggle").replace("0.9", "7").replace("1e-3", "-1")
    assert [line.split()[0] for line in _lines(write(text))] == ["job.yaml:5", "job.yaml:6", "job.yaml:13"]


def test_sections_that_do_not_go_together_are_named_by_the_line_of_the_key_and_all_at_once(write: Write) -> None:
    overrides = ("train.max_skipped_steps=3", "deepspeed.zero_optimization.stage=0", "optimizer.name=sgd")
    text = TEXT.replace("rigl", "dynadiag") + "schedule: {min_lr: 1}\n"
    skipped, method, rate = _lines(write(text), overrides)
    assert method.startswith("job.yaml:6 topology.method: dynadiag with optimizer.name sgd")
    assert rate.startswith("job.yaml:14 schedule.min_lr: 1 is above optimizer.lr 0.001")
    assert skipped.startswith("--set train.max_skipped_steps=3: train.max_skipped_steps: 3 with")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.precision=bf16_params", "deepspeed.zero_optimization.stage=0"), "takes a false first optimiser step"),
        (("train.max_skipped_steps=3", "deepspeed.zero_optimization.stage=0"), "train.max_skipped_steps: 3 with deepspeed.zero_optimization.stage 0"),
    ],
)  # fmt: skip
def test_what_stage_0_cannot_do(write: Write, overrides: tuple[str, ...], message: str) -> None:
    (line,) = _lines(write(), overrides)
    assert message in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "job.yaml:1: a job or a study is a mapping"),
        ("", "job.yaml:1: a job or a study is a mapping"),
        ("a: \x00", "job.yaml: not valid YAML: unacceptable character"),
        ("a: " + 3000 * "[", "job.yaml: is nested too deeply"),
    ],
)
def test_files_that_are_no_job(write: Write, text: str, expected: str) -> None:
    assert _lines(write(text))[0].startswith(expected)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert _lines(tmp_path / "none.yaml")[0].startswith("none.yaml: cannot be read: ")


def test_extends_merges_mappings_and_replaces_lists(write: Write) -> None:
    write(name="base.yaml")
    write(
        "extends: base.yaml\nname: middle\ntrain: {batch_size: 50}\nsparsity: {rules: [{match: '*', sparsity: 0.5}]}\n",
        "middle.yaml",
    )
    job = load(write("extends: middle.yaml\nname: leaf\ntopology: {update: {every: 7}}\n", "leaf.yaml"))
    assert (job.name, job.train.batch_size, job.train.micro_batch_size) == ("leaf", 50, 25)
    assert (job.topology.method, job.topology.update.every) == ("rigl", 7)
    assert job.sparsity is not None
    assert [rule.match for rule in job.sparsity.rules] == ["*"]
    assert load(write("extends: base.yaml\nsparsity: null\n", "dense.yaml")).sparsity is None


def test_what_an_alias_stands_for_is_a_copy(write: Write) -> None:
    text = TEXT.replace("train: {shards", "train: &split {shards").replace("digits}\n", "digits}\n  eval: *split\n")
    base = write(text, "base.yaml")
    leaf = write("extends: base.yaml\ndata: {train: {samples: 50}}\n", "leaf.yaml")
    for job in (load(base, ["data.train.samples=50"]), load(leaf)):
        assert job.data.eval is not None
        assert (job.data.train.samples, job.data.eval.samples) == (50, 1000)


def test_a_list_that_an_alias_stands_for_is_a_copy(write: Write) -> None:
    text = TEXT.replace("[64, 64]", "&sizes [64, 64]").replace("{lr: 1e-3}", "{lr: 1e-3, betas: *sizes}")
    lines = _lines(write(text), ("model.hidden_features.0=1",))
    assert "job.yaml:2 optimizer.betas.0: input should be less than 1, got 64" in lines


@pytest.mark.parametrize("name", ["08", "010", "2024-13-45", "2024-01-31", "0x10"])
def test_text_that_looks_like_a_number_or_a_date(write: Write, name: str) -> None:
    assert load(write(TEXT.replace("name: base", f"name: {name}"))).name == name


@pytest.mark.parametrize(("text", "seed"), [("0", 0), ("+7", 7), ("1_000", 1000), ("18446744073709551615", 2**64 - 1)])
def test_integers(write: Write, text: str, seed: int) -> None:
    assert load(write(), [f"seed={text}"]).seed == seed


@pytest.mark.parametrize(
    ("text", "lr"), [("2", 2), ("1.", 1), (".5", 0.5), ("0.5e1", 5), ("1e-3", 1e-3), ("+1_0.5", 10.5)]
)
def test_numbers(write: Write, text: str, lr: float) -> None:
    assert load(write(), [f"optimizer.lr={text}"]).optimizer.lr == lr


def test_mistakes_name_the_file_in_which_they_stand(write: Write) -> None:
    write(TEXT.replace("rigl", "riggle").replace("  micro_batch_size: 25\n", ""), "base.yaml")
    lines = _lines(write("extends: base.yaml\ntrain:\n  batchsize: 50\n", "leaf.yaml"))
    assert len(lines) == 3
    assert any(line.startswith("base.yaml:6 topology.method") for line in lines)
    assert any(
        line.startswith("leaf.yaml:3 train.batchsize: unknown key; did you mean 'batch_size'?") for line in lines
    )
    assert any("train.micro_batch_size: this key is required" in line for line in lines)


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        ("leaf.yaml", "extends itself through"),
        ("none.yaml", "leaf.yaml:1 extends: none.yaml does not exist"),
        ("..", "leaf.yaml:1 extends: .. is no file"),
        ("[a, b]", "leaf.yaml:1 extends: ['a', 'b'] is not the path of one YAML file"),
    ],
)
def test_extends_errors(write: Write, parent: str, expected: str) -> None:
    assert expected in _lines(write(f"extends: {parent}\n", "leaf.yaml"))[0]


def test_overrides(write: Write) -> None:
    job = load(
        write(),
        ["train.batch_size=200", "run_root=a=b", "optimizer.betas=[0.5, 0.6]", "sparsity=null", "schedule.min_lr=1e-5"],
    )
    assert (job.train.batch_size, job.run_root, job.sparsity) == (200, "a=b", None)
    assert job.optimizer.betas == (0.5, 0.6)
    assert job.schedule.min_lr == 1e-5
    assert load(write(), ["train.epochs=null", "train.steps=5"]).train.steps == 5
    replaced = load(write(), ["model={builder: timm, name: x}"])
    assert replaced.model.model_dump() == {"builder": "timm", "name": "x", "args": {}}


def test_overrides_reach_into_lists(write: Write) -> None:
    text = TEXT.replace("0.9}", "0.9, band: 2}\n    - {match: '*', sparsity: 0.8}")
    job = load(write(text), ["sparsity.rules.0.sparsity=0.5", "model.hidden_features.1=32"])
    assert job.sparsity is not None
    assert [(r.match, r.sparsity, r.band) for r in job.sparsity.rules] == [("layers.*", 0.5, 2), ("*", 0.8, 1)]
    assert job.model.model_dump()["hidden_features"] == [64, 32]
    replaced = load(write(text), ["sparsity.rules.1={match: a, sparsity: 0.1}", "sparsity.rules.1.band=4"])
    assert replaced.sparsity is not None
    assert replaced.sparsity.rules[1].model_dump() == {
        "match": "a",
        "pattern": "diagonal",
        "sparsity": 0.1,
        "band": 4,
        "size": 1,
        "permute": "none",
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size", "--set train.batch_size: expected KEY=VALUE"),
        ("train..x=1", "--set train..x=1: expected KEY=VALUE"),
        ("seed=[", "--set seed=[: the value is not valid YAML"),
        ("sparsity.rules.0.match=*", "--set sparsity.rules.0.match=*: the value is not valid YAML: expected alphabetic or numeric character"),
        ("seed=" + 3000 * "[", "--set seed=" + 3000 * "[" + ": the value is nested too deeply"),
        ("train.epochs=1000000000000000000000", "--set train.epochs=1000000000000000000000: train.epochs: input should be less than 2147483648"),
        ("schedule.min_lr=1", "--set schedule.min_lr=1: schedule.min_lr: 1 is above optimizer.lr 0.001, from which the rate decays to it"),
        ("seed=", "--set seed=: seed: input should be a valid integer, got None"),
        ("seed=08", "--set seed=08: seed: input should be a valid integer, got '08'"),
        ("seed=!!int x", "--set seed=!!int x: seed: 'x' is not a valid int"),
        ("topology=&x {method: *x}", "--set topology=&x {method: *x}: topology.method: an alias stands inside of what"),
        ("optimizer={lr: 1, lr: 2}", "--set optimizer={lr: 1, lr: 2}: optimizer.lr: stands twice"),
        ("optimizer={1: 2}", "--set optimizer={1: 2}: optimizer: the key '1' is not text; put it in quotes"),
        ("extends=foo.yaml", "--set extends=foo.yaml: a job extends another in its file only"),
        ("seed=x", "--set seed=x: seed: input should be a valid integer, got 'x'"),
        ("train.sede=1", "--set train.sede=1: train.sede: unknown key"),
        ("sparsity.rules.1.sparsity=0.5", "--set sparsity.rules.1.sparsity=0.5: sparsity.rules is a list of 1; '1' is not the index (from 0) of one of its items"),
        ("sparsity.rules.-1.band=2", "--set sparsity.rules.-1.band=2: sparsity.rules is a list of 1; '-1' is not"),
        ("sparsity.rules.first.band=2", "--set sparsity.rules.first.band=2: sparsity.rules is a list of 1; 'first' is not"),
        ("optimizer.lr=.inf", "--set optimizer.lr=.inf: optimizer.lr: input should be a finite number, got inf"),
        ("topology.cold_start=.nan", "--set topology.cold_start=.nan: topology.cold_start: input should be a finite number, got nan"),
        ("sparsity.rules.0.sparsity=2", "--set sparsity.rules.0.sparsity=2: sparsity.rules.0.sparsity: input should be less than 1, got 2"),
        ("sparsity.rules.0.bnd=2", "--set sparsity.rules.0.bnd=2: sparsity.rules.0.bnd: unknown key; did you mean 'band'?"),
        ("topology=rigl", "--set topology=rigl: topology: input should be a valid dictionary"),
        ("seed.x=1", "--set seed.x=1: seed: input should be a valid integer, got {'x': 1}"),
        ("deepspeed.stage=1", "--set deepspeed.stage=1: deepspeed.stage: unknown key (allowed: zero_optimization)"),
    ],
)  # fmt: skip
def test_override_errors(write: Write, override: str, expected: str) -> None:
    assert any(line.startswith(expected) for line in _lines(write(), (override,)))


def test_environment_variables_stand_in_paths_only(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DST_TEST", "/data")
    monkeypatch.delenv("DST_NONE", raising=False)
    text = TEXT.replace("a-{000..003}", "${DST_TEST}/a-{000..003}").replace("layers.*", "${DST_TEST}")
    job = load(write(text), ["data.cache_dir=${DST_TEST}/cache", "run_root=$HOME/${DST_TEST}"])
    assert job.data.train.shards == "/data/a-{000..003}.tar"
    assert (job.data.cache_dir, job.run_root) == ("/data/cache", "$HOME//data")
    assert job.sparsity is not None
    assert job.sparsity.rules[0].match == "${DST_TEST}"
    lines = _lines(write(TEXT.replace("a-{", "${DST_NONE}/a-{")))
    assert lines == [
        "job.yaml:8 data.train.shards: the environment variable DST_NONE is not set (any value will do where the files are not read)"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "1234e56",
        "08",
        "010",
        "0x10",
        "1_0",
        "1.",
        ".5",
        ".inf",
        "1:30",
        "2024-01-31",
        "true",
        "no",
        "~",
        "<<",
        "=",
    ],
)
def test_text_that_would_be_none_without_quotes_reads_back(write: Write, base: Job, text: str) -> None:
    model = {"builder": "timm", "name": text, "args": {text: text, "numbers": [1e-5, 1e22, 3, True, None]}}
    job = Job.model_validate({**base.model_dump(), "run_root": text, "model": model})
    assert load(write(dump(job), "again.yaml")) == job
    assert yaml.safe_load(dump(job)) == job.model_dump(mode="json")  # as results.py and others read it


def test_a_study_is_told_from_a_job(write: Write) -> None:
    path = write("name: a\njob: job.yaml\naxes: {}\n", "study.yaml")
    assert _lines(path) == ["study.yaml:1: this is a study: run it with dst-train study study.yaml"]


def test_dump_reads_back_and_the_digest_tells_jobs_apart(write: Write, base: Job) -> None:
    again = load(write(dump(base), "again.yaml"))
    assert again == base
    assert digest(again) == digest(base)
    assert digest(load(write(), ["seed=1"])) != digest(base)
