"""The benchmark of the kernels: right first, and no speed for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.bench import kernel_cases, kernel_report, pages
from zoo.bench import kernels as measuring
from zoo.bench.kernel_cases import Case, cases, causal_pairs, inputs
from zoo.bench.kernels import Cell, Check, Plan, measure
from zoo.errors import ZooError

pytest.importorskip("triton", reason="the benchmark of kernels needs triton")


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    """A record of the smoke mode, all cases."""
    return kernel_report.as_json(measure(Plan(smoke=True, seconds=600)))


def test_every_kernel_is_right_and_timed_in_the_smoke_mode(smoke: dict[str, Any]) -> None:
    names = [case.name for case in cases(smoke=True)]
    assert list(dict.fromkeys(check["case"] for check in smoke["checks"])) == names
    wrong = [check for check in smoke["checks"] if not check["right"]]
    assert not wrong
    timed = {c["case"] for c in smoke["cells"] if c["contender"] == "triton" and c["seconds"]}
    assert timed == set(names)
    assert {check["dtype"] for check in smoke["checks"]} == {"bfloat16", "float32"}
    assert min(smoke["peaks"].values()) > 0


def test_the_record_becomes_tables_in_a_page(smoke: dict[str, Any], tmp_path: Path) -> None:
    path = kernel_report.save(smoke, tmp_path)
    assert json.loads(path.read_text()) == smoke
    page = f"<!-- begin bench {path.name} -->\n<!-- end bench -->\n"
    text = pages.renew(page, tmp_path)
    assert "the times mean nothing" in text
    assert text.count("| right |") == len(smoke["checks"])
    assert "flash-linear-attention is not installed" in text
    assert pages.renew(text, tmp_path) == text


def _false(name: str = "false") -> Case:
    def form(backend: str, length: int) -> kernel_cases.Form:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend == "triton" and name == "broken":
                raise RuntimeError("out of\n cheese")
            return q * k * v * (1.5 if backend == "triton" and name == "false" else 1.0)

        return attend

    return Case(name, form, causal_pairs, check=(5,), smoke=8, heads=2, head_dim=4)


@pytest.mark.parametrize("name", ["false", "broken"])
def test_a_kernel_that_is_wrong_gets_no_speed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "cases", lambda smoke: [_false(name), _false("fine")])
    report = measure(Plan(smoke=True))
    for cell in report.cells:
        wrong = cell.case == name and cell.contender == "triton"
        assert (cell.seconds is None) == (cell.speed is None) == wrong
        assert (cell.error == "the results are wrong; see the checks") == wrong
    said = [check.error for check in report.checks if check.case == name]
    assert set(said) == {None if name == "false" else "RuntimeError: out of cheese"}
    text = kernel_report.tables(kernel_report.as_json(report))
    assert text.count("WRONG") == 2
    assert f"- {name}, triton: the results are wrong" in text


def test_rates_count_useful_work_only() -> None:
    case = Case("x", lambda backend, n: None, causal_pairs, batch=2, heads=3, head_dim=16)  # type: ignore[arg-type, return-value]
    assert case.flops(10, both=False) == 2 * 2 * 55 * 16 * 6
    assert case.flops(10, both=True) == 2 * 7 * 55 * 16 * 6
    assert case.bytes(10, both=False, size=2) == 4 * 10 * 16 * 6 * 2
    cell = Cell("x", "triton", 10, "forward", seconds=0.5)
    measuring._rate(Plan(smoke=True), case, cell, False, {"matmul": 1e9, "copy": 1e9}, 1.0)
    assert cell.speed == 2.0
    assert cell.tflops == pytest.approx(2 * 2 * 55 * 16 * 6 / 0.5 / 1e12)
    assert cell.of_matmul == pytest.approx(cell.tflops * 1e3)
    assert cell.gbytes == pytest.approx(4 * 10 * 16 * 6 * 2 / 0.5 / 1e9)


@pytest.mark.parametrize(
    ("name", "length", "pairs"),
    [("moba b16 k3", 40, 2 * 136 + 36 + 16 * 16 + 8 * 32), ("window 24", 30, 300 + 6 * 24)],
)
def test_pairs_by_hand(name: str, length: int, pairs: int) -> None:
    case = next(case for case in cases(smoke=True) if case.name == name)
    assert case.pairs is not None
    assert case.pairs(length) == pairs


def test_slow_contenders_and_late_cells_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "cases", lambda smoke: [_false("fine")])
    monkeypatch.setattr(measuring, "GIVE_UP", 0.0)
    plan = Plan(smoke=True)
    case, taken = _false("fine"), dict[tuple[str, str, str], tuple[int, float]]()
    peaks = {"matmul": 1.0, "copy": 1.0}
    first = measuring._stage(plan, case, 8, True, peaks, taken, {})
    second = measuring._stage(plan, case, 16, True, peaks, taken, {})
    assert not any(cell.error for cell in first)
    assert all("left out" in str(cell.error) for cell in second)
    late = measure(Plan(smoke=True, seconds=1e-9))
    assert late.left_out == ["fine at N = 8: the time was up"]
    assert not late.cells
    assert late.checks, "what is not timed is checked all the same"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"only": ["mobla"]}, "mobla.*moba"),
        ({"lengths": [0]}, "lengths"),
        ({"seconds": 0}, "seconds"),
    ],
)
def test_bad_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        Plan(smoke=True, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_measured() -> None:
    with pytest.raises(ZooError, match=r"torch finds none.*smoke"):
        Plan()


def test_checks_are_held_to_the_type() -> None:
    assert Check("x", 1, "bfloat16", 5e-3, 1e-2).right
    assert not Check("x", 1, "float32", 5e-3, 1e-2).right
    assert not Check("x", 1, "float32", 1e-6, 1e-6, error="no").right
    assert not Check("x", 1, "float32").right


def test_inputs_are_the_same_for_all_contenders() -> None:
    case = _false()
    a, b = (inputs(case, 7, torch.bfloat16, "cpu") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(x.requires_grad and x.is_leaf and x.shape == (1, 2, 7, 4) for x in a)
