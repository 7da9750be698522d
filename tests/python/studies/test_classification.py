"""The classification of texts: what is cut from where, masks, every router, what is reported."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from classified import DOMAINS, SEQUENCE, lively, numbered, random_texts
from refused import refused
from studies.classification import display, program, texts, training
from studies.classification.evaluation import KINDS, Findings, by_class, evaluate, wilson
from studies.classification.model import (
    EXPERTS,
    ROUTERS,
    TOP_K,
    Classifier,
    attention_of_cls,
)
from studies.classification.texts import LONGEST, SHORTEST, Stream, Task, Texts, as_texts
from studies.classification.training import Run, rate, train
from studies.classification.yardsticks import (
    Yardstick,
    log_likelihood,
    majority,
    measure,
    naive_bayes,
)
from training import ngrams
from training.corpus import CorpusError, Domain
from training.settings import SettingsError

# ---- numbers


def test_measure_against_plain_python() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    right, cost = 0, 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        right += row.index(max(row)) == label
        cost -= math.log2(math.exp(row[label]) / sum(map(math.exp, row))) / 40
    score = measure(logits, labels)
    assert score.accuracy == right / 40
    assert score.bits == pytest.approx(cost)


@pytest.mark.parametrize("router", ["linear", "expert_choice", "sequence_attention"])
def test_findings_against_plain_python(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.classification.evaluation.BATCH", 3)  # the last batch has one text
    model = lively(router)
    some = random_texts(50, 80, 65, 70, 90, 48, 51)
    some = Texts(some.tokens, some.token_mask, torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    found = evaluate(model, some)
    assert model.training  # as before training goes on
    right, load, distinct = 0, Counter[tuple[int, int]](), [0.0, 0.0]
    by_kind = [[[] for _ in KINDS], [[] for _ in KINDS]]
    for text in range(7):
        alone = some.part(text, text + 1)
        with torch.no_grad():
            scores = model.eval()(alone)
        right += int(scores.logits.argmax()) == int(some.labels[text])
        for layer, routing in enumerate(scores.routings):
            chosen = [[e for e in row if e >= 0] for row in routing.indices.tolist()]
            load.update((layer, expert) for row in chosen for expert in row)
            distinct[layer] += len({expert for row in chosen for expert in row}) / 7
            first = Counter(row[0] for row in chosen if row)
            shares = [first[expert] / first.total() for expert in range(EXPERTS)]
            assert found.favourites[layer, text].tolist() == pytest.approx(shares)
            slots = Counter(expert for row in chosen for expert in row)
            shares = [slots[expert] / slots.total() for expert in range(EXPERTS)]
            assert found.shares[layer, text].tolist() == pytest.approx(shares)
            by_kind[layer][0].append(len(chosen[0]))
            for row, byte in zip(chosen[1:], alone.bytes_of(0).tolist(), strict=True):
                kind = "digit" if chr(byte) in "0123456789" else None
                kind = "non-ASCII" if byte > 127 else kind
                if kind:
                    by_kind[layer][KINDS.index(kind)].append(len(row))
            if router == "sequence_attention":
                assert found.pooling is not None
                weights = routing.details["pooling_weights"][0].tolist()
                mask = some.token_mask[text]
                assert found.pooling[layer, text, mask].tolist() == pytest.approx(weights)
                assert (found.pooling[layer, text, ~mask] == 0).all()
    assert found.score.accuracy == right / 7
    for layer in range(2):
        loads = [load[layer, expert] for expert in range(EXPERTS)]
        assert found.load[layer].tolist() == loads
        assert found.experts_per_text[layer].item() == pytest.approx(distinct[layer])
        for kind in (0, KINDS.index("digit"), KINDS.index("non-ASCII")):
            counts = by_kind[layer][kind]
            mean = found.slots_by_kind[layer, kind].item()
            assert mean == pytest.approx(sum(counts) / len(counts))
    mean_load = [[load[layer, expert] for expert in range(EXPERTS)] for layer in range(2)]
    violations = [max(loads) * EXPERTS / sum(loads) - 1 for loads in mean_load]
    assert found.max_violation == pytest.approx(sum(violations) / 2)
    classes = by_class(found.favourites, some.labels, 3)
    assert classes.shape == (2, 3, EXPERTS)
    torch.testing.assert_close(classes[1, 2], found.favourites[1, [2, 5]].mean(dim=0))


def test_wilson() -> None:
    # Computed by hand from the formula of E. B. Wilson (1927) with z = 1.96.
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0


def task_of(train: list[bytes], test: list[list[bytes]]) -> Task:
    def tensor(text: bytes) -> Tensor:
        return torch.tensor(list(text), dtype=torch.uint8)

    pieces = [tensor(text) for some in test for text in some]
    labels = [label for label, some in enumerate(test) for _ in some]
    names = tuple(f"class {label}" for label in range(len(test)))
    return Task("tiny", names, [[tensor(text)] for text in train], as_texts(pieces, labels))


def test_naive_bayes_against_plain_python() -> None:
    train_texts = [b"abababababcab", b"bcbcbcacbcbca"]
    task = task_of(train_texts, [[b"abab", b"ababca"], [b"bcbcbcbc", b"cbc"]])
    models = [ngrams.fit(documents, 2) for documents in task.train]
    found = log_likelihood(task, models, 2)
    for row, text in enumerate((b"abab", b"ababca", b"bcbcbcbc", b"cbc")):
        for column, read in enumerate(train_texts):
            ones = Counter(read)
            pairs = Counter(pairwise(read))
            expected = 0.0
            for before, byte in pairwise(text):
                single = (ones[byte] + len(ones) / 256) / (len(read) + len(ones))
                after = {b: n for (a, b), n in pairs.items() if a == before}
                total = sum(after.values())
                expected += math.log(
                    (after.get(byte, 0) + len(after) * single) / (total + len(after))
                )
            assert found[row, column].item() == pytest.approx(expected)
    (score,) = naive_bayes(task, (2,)).values()
    assert score.accuracy == 1
    assert 0 < score.bits < 0.5


def test_majority() -> None:
    task = task_of([b"", b""], [[b"ab"] * 3, [b"cd"]])
    assert majority(task).accuracy == 0.75
    assert majority(task).bits == pytest.approx(0.8113, abs=1e-4)


def test_rate_rises_and_falls() -> None:
    rates = [rate(step, 100) for step in range(1, 101)]
    assert rates[0] == 1 / training.WARM_UP_STEPS
    assert max(rates) == rates[training.WARM_UP_STEPS - 1]
    assert rates[-1] == pytest.approx(0.01)
    assert rate(1, 1) == 1 / training.WARM_UP_STEPS


@pytest.mark.parametrize("router", ["linear", "sequence_attention"])
def test_learns(router: str) -> None:
    letters = [b"abcd " * 60, b"wxyz\n" * 60]
    test = [[text[at : at + 60] for at in range(20)] for text in letters]
    run = train(router, task_of(letters, test), 0, 25, 1e-2, lambda: None)
    assert run.findings.score.accuracy == 1
    assert run.training_bits[0] == pytest.approx(1, abs=0.05)  # even odds
    assert run.training_bits[-1] < 0.3
    assert 25 * 32 * SHORTEST < run.bytes_read < 25 * 32 * LONGEST


def test_same_seed_same_numbers() -> None:
    task = texts.domain_task(DOMAINS)
    runs = [train("sequence_given", task, seed, 4, 1e-2, lambda: None) for seed in (0, 0, 1)]
    first, again, other = (run.training_bits for run in runs)
    assert first == again != other
    # Other texts, not only another start.
    assert runs[0].bytes_read == runs[1].bytes_read != runs[2].bytes_read
    assert torch.equal(runs[0].findings.favourites, runs[1].findings.favourites)


def test_the_query_learns() -> None:
    some = Stream(texts.domain_task(DOMAINS), 0).batch(8)
    model = lively("sequence_attention", 2).train()
    functional.cross_entropy(model(some).logits, some.labels).backward()
    for block in model.blocks:
        assert block.moe.router.query.grad.abs().max() > 1e-7


def test_routing_teaches_the_attention_of_cls(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Stream(texts.domain_task(DOMAINS), 0).batch(8)
    given: list[Tensor] = []

    def recorded(*arguments: Any) -> Tensor:
        given.append(attention_of_cls(*arguments))
        return given[-1]

    monkeypatch.setattr("studies.classification.model.attention_of_cls", recorded)
    model = lively("sequence_given", 2).train()
    loss = functional.cross_entropy(model(some).logits, some.labels)
    gradients = torch.autograd.grad(loss, given, retain_graph=True)
    assert len(gradients) == 2
    assert all(gradient.abs().max() > 1e-7 for gradient in gradients)
    qkv = [block.attention.qkv.weight for block in model.blocks]
    assert all(
        gradient is not None and gradient.abs().max() > 1e-9
        for gradient in torch.autograd.grad(given[1].square().sum(), qkv)
    )


# ---- what is shown


def test_tenths() -> None:
    shares = (0, 0.01, 0.049, 0.06, 0.5, 0.94, 0.96, 1.0)
    assert "".join(map(display.tenths, shares)) == "-..159XX"


def test_one_line_has_a_character_for_each_byte() -> None:
    shown = display.one_line(torch.tensor([65, 10, 32, 27, 9, 200, 126, 127], dtype=torch.uint8))
    assert shown == "A↵ ···~·"


def test_marks_are_below_the_bytes_with_the_largest_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = bytes(range(ord("A"), ord("A") + 26)) * 4
    task = task_of([letters] * 2, [[letters[:100]], [letters[1:61]]])
    pooling = torch.zeros(2, 2, task.test.tokens.shape[1])
    marked = {0: (0, 3, 75, 76, 99), 1: (5, 6, 7, 8, 59)}
    pooling[0] = 9  # of another block
    for text, some in marked.items():
        pooling[1, text, [1 + place for place in some]] = 0.2
    pooling[:, :, 0] = 0.5  # CLS is no byte
    nothing = torch.zeros(0)
    found = Findings(Yardstick(1, 0), *[nothing] * 6, pooling)
    monkeypatch.setattr(display, "MARKED", 5)
    display.print_pooling(task, {"sequence_attention": [Run(found, [], 0, 0)]})
    lines = capsys.readouterr().out.splitlines()
    assert "class 0: they have 100 % of the weight (even: 5 %), CLS has 50 %" in lines
    assert [line[2:] for line in lines if set(line) == {" ", "^"}] == [
        "^  ^" + " " * 71 + "^",
        "^" + " " * 22 + "^",
        " " * 5 + "^^^^" + " " * 50 + "^",
    ]


def row_of(name: str, output: str) -> list[str]:
    (row,) = re.findall(rf"^ {re.escape(name)}  .*\d.*$", output, re.MULTILINE)
    return row.removeprefix(f" {name}").split()


# ---- the program

TINY = ["--steps", "3", "--seeds", "1"]


@pytest.fixture(scope="module")
def trained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short run of every router prints, and its folder."""
    folder = tmp_path_factory.mktemp("classify") / "new" / "folder"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert program.main([*TINY, "--data", *data, "--out", str(folder)]) == 0
    return output.getvalue(), folder


def test_table_and_json_agree(trained: tuple[str, Path]) -> None:
    output, folder = trained
    report = json.loads((folder / "classification-domain.json").read_text())
    assert list(report["results"]) == list(ROUTERS)
    assert report["classes"] == ["notes", "sums.txt"]
    assert report["steps"] == 3
    assert str(folder) not in json.dumps(report)
    count = report["test_texts"]
    assert f"test: {count} texts, {count // 2} of each class" in output
    for name, result in report["results"].items():
        (accuracy,), (bits,) = result["accuracy"], result["bits"]
        low, high = wilson(accuracy, count)
        assert result["interval"] == [[low, high]]
        cells = row_of(name, output)
        assert cells[0] == f"{100 * accuracy:.1f}"
        assert cells[1] == f"{100 * low:.1f}-{100 * high:.1f}"
        assert cells[2] == f"{bits:.3f}"
        assert cells[3] == f"{result['max_violation'][0]:.2f}"
        per_text = sum(result["experts_per_text_by_block"][0]) / 2
        assert cells[4] == f"{per_text:.1f}"
        if name in SEQUENCE:
            assert per_text == TOP_K
    for name, yardstick in report["yardsticks"].items():
        assert row_of(name, output)[0] == f"{100 * yardstick['accuracy']:.1f}"
    assert report["yardsticks"]["majority class"]["accuracy"] == 0.5


def test_shows_what_the_routers_do(trained: tuple[str, Path]) -> None:
    output, folder = trained
    assert re.search(r"^ class +sequence_first +.*sequence_given", output, re.MULTILINE)
    assert output.count("CLS has") == 2  # a text of each class
    assert "kind      % of all  block 0  block 1" in re.sub(r" {7,}", "      ", output)
    shown = output.partition("\nfigure: ")[0]
    assert max(map(len, shown.splitlines())) <= 101
    assert "…" not in output
    assert (folder / "classification-domain.png").stat().st_size > 10_000


def test_runs_the_module_task_with_a_few_routers(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "module", "--domain", "notes", "--modules", "3", "--routers", "linear"]
    options += ["hash", "--steps", "2", "--seeds", "2", "--out", str(tmp_path), "--data", *data]
    assert program.main(options) == 0
    output = capsys.readouterr().out
    assert "task: module of notes, 3 classes" in output
    report = json.loads((tmp_path / "classification-module.json").read_text())
    assert list(report["results"]) == ["linear", "hash"]
    assert len(report["results"]["hash"]["accuracy"]) == 2
    low, high = sorted(report["results"]["hash"]["accuracy"])
    assert row_of("hash", output)[2] == f"{100 * low:.1f}-{100 * high:.1f}"
    assert "first choice, -" not in output  # no router of theirs is there
    assert (tmp_path / "classification-module.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "option",
    [
        *("--task magic", "--routers magic", "--steps 0", "--steps 1.5", "--seeds 0", "--lr nan"),
        *("--modules 1", "--quick"),
    ],
)
def test_refuses(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, program.main, "--out", str(tmp_path), *option.split()).err
    assert error.startswith("python -m studies.classification: error: ")
    assert option.split()[0] in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task module --domain latin", "--domain must be one of notes, sums.txt, got latin"),
        ("--task module --domain notes --modules 9", "--modules must be at most 8, the documents"),
        ("--task module --domain sums.txt", "--modules must be at most 2, the documents"),
    ],
)
def test_refuses_what_the_text_does_not_have(
    options: str,
    message: str,
    data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--out", str(tmp_path), *options.split(), "--data", *data]
    error = refused(capsys, program.main, *arguments).err
    assert error.startswith(f"python -m studies.classification: error: {message}")


def test_refuses_one_domain_and_too_little_text() -> None:
    with pytest.raises(SettingsError, match="--data must name at least two paths"):
        texts.domain_task(DOMAINS[:1])
    short = Domain("short", [numbered("G", 300)], [numbered("H", 3)])
    with pytest.raises(CorpusError, match="short: too little text"):
        texts.domain_task([*DOMAINS, short])
    untrained = Domain("untrained", [numbered("G", 9)], [numbered("H", 300)])
    with pytest.raises(CorpusError, match="untrained: too little text"):
        texts.domain_task([*DOMAINS, untrained])


def test_a_loss_that_is_not_finite_ends_it(
    data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = Classifier.forward

    def infinite(model: Classifier, some: Texts) -> Any:
        scores = forward(model, some)
        return scores._replace(logits=scores.logits * torch.nan)

    monkeypatch.setattr(Classifier, "forward", infinite)
    arguments = [*TINY, "--lr", "2", "--data", *data, "--out", str(tmp_path)]
    assert refused(capsys, program.main, *arguments).err.startswith(
        "python -m studies.classification: error: --lr must be lower, got 2: the loss of linear is "
    )


def test_ctrl_c(
    data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "train", interrupted)
    assert program.main(["--data", *data, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ninterrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
