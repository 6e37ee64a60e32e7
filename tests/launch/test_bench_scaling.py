"""Ways to share a sequence compute the same, but for the one that is another operation; cells, views and the report."""

from __future__ import annotations

import copy
import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import lasp
from lasp.launch.bench import BENCHMARKS, main, report, scaling
from lasp.launch.bench.cells import NOT_BEGUN, OK, OUT_OF_MEMORY, Cell
from lasp.launch.bench.ways import ACTIVATIONS, SOFTMAX_RING, WAYS, shared
from lasp.launch.threads import run
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS, DOCUMENTS = 40, (0, 3, 21, 40)


def model_of(mixer: str) -> Any:
    torch.manual_seed(0)
    config = LinearLlamaConfig(**SIZES, mixer=mixer, pattern="LN", attention="ring")
    return LinearLlamaForCausalLM(config).double().train()


def step(model: Any, way: str | None, group: lasp.SequenceGroup | None) -> dict[str, torch.Tensor]:
    """The loss and this rank's parts of the gradients of a model, by a way to share its sequence."""
    own = copy.deepcopy(model)
    if way is not None and group is not None:
        own = shared(own, way, group)
    ids = torch.arange(TOKENS).unsqueeze(0) % 64
    batch = {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor(DOCUMENTS)}
    loss = own(**lasp.shard_batch(batch, group)).loss
    loss.backward()
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in own.named_parameters()}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("mixer", ["lightning", "gated_deltanet"])
@pytest.mark.parametrize("way", [*(way for way in WAYS if way in ("two_level", "heads", ACTIVATIONS)), SOFTMAX_RING])
def test_ways_compute_the_same(way: str, mixer: str) -> None:
    """A benchmark of two different things would measure nothing. The softmax ring is another operation by intent: it
    computes what one rank does in the same way."""
    model = model_of(mixer)
    (alone,) = run(1, partial(step, model, way)) if way == SOFTMAX_RING else [step(model, None, None)]
    parts = run(4, partial(step, model, way), "contiguous", node_size=2)
    for name, wanted in alone.items():
        found = parts[0][name] if name == "loss" else torch.stack([part[name] for part in parts]).sum(0)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cell_that_wants_too_much_is_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And so is one that cannot be; the cells behind it are measured."""
    file = tmp_path / "figures.json"
    small = ["--hidden", "48", "--heads", "3", "--layers", "1", "--mixers", "lightning", "--repeat", "1"]
    cells = ["--tokens", "32768", "256", "--ranks", "2", "--ways", "gather", "heads", "--memory", "0.05"]
    assert main(["model", *small, *cells, "--json", str(file)]) == 0
    records = json.loads(file.read_text())["records"]
    assert [record["status"].partition(":")[0] for record in records] == [OUT_OF_MEMORY, "ValueError", OK, "ValueError"]
    found = records[2]
    state = 3 * 16 * 16 * 4
    assert found["received"] > 2 * state, "and gradients"
    assert found["rate"] == found["tokens"] / found["seconds"]
    assert 0 < found["peak_bytes"] < 0.05 * 2**30
    told = capsys.readouterr().out
    assert "| 32768 | 2 | gather | OOM | OOM |" in told
    assert "2 of 4 cells cannot be: ValueError: 2 ranks do not divide 3 heads" in told


def fake(cell: Cell) -> list[dict[str, Any]]:
    """Records of a machine on which every token takes a millisecond and a KiB, and the softmax ring twice of both."""
    records = []
    for way in cell.ways:
        times = 2 if way == SOFTMAX_RING else 1
        size, seconds = times * 1024 * cell.tokens // cell.ranks, times * 1e-3 * cell.tokens
        fits = cell.memory is None or size <= cell.memory * 2**30
        record = {"way": way, "tokens": cell.tokens, "ranks": cell.ranks, "network": cell.rate or "loopback"}
        record |= {"documents": cell.documents and len(cell.documents) - 1, "memory_limit": cell.memory, "received": 0}
        record |= {"mixer": cell.mixer, "pattern": cell.pattern, "layout": cell.layout, "model": cell.sizes}
        record |= {"status": OK if fits else OUT_OF_MEMORY, "peak_bytes": size, "rate": cell.tokens / seconds}
        records.append(record)
    return records


def test_the_views(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scaling, "records_of", fake)
    file = tmp_path / "figures.json"
    ways = ["--ways", "gather", SOFTMAX_RING, "heads", "--longest-ways", "gather", SOFTMAX_RING]
    assert main(["scaling", *ways, "--memory", "1", "--tokens", "4096", "4000000", "--json", str(file)]) == 0
    told = capsys.readouterr().out
    assert "| softmax ring | 500 | 500 | 500 | OOM | OOM | 500 |" in told
    assert "| softmax ring | 50 % | 50 % | 50 % | 50 % |" in told
    assert "| data parallel, tokens/s | 1000 |" in told
    # Of a KiB a token: what was tried about the limit, 2**20 tokens of each rank, and a tenth more.
    assert "| gather | 2097152 | 2306816 | 4194304 | 4613632 |" in told
    assert "8192 tokens on 4 ranks, as one text and as" in told
    with pytest.raises(SystemExit, match="2"):
        main(["scaling", "--memory", "0"])
    assert "argument --memory: must be a number above 0, got '0'" in capsys.readouterr().err
    figures = json.loads(file.read_text())
    assert (figures["benchmark"], figures["command"].split()[:3]) == ("scaling", ["lasp", "bench", "scaling"])


def test_what_there_is_no_time_for_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "records_of", lambda cell: pytest.fail("begun"))
    file = tmp_path / "figures.json"
    assert main(["scaling", "--minutes", "1e-9", "--json", str(file)]) == 0
    records = [record for view in json.loads(file.read_text())["views"].values() for record in view]
    assert {record["status"] for record in records} == {NOT_BEGUN}


def test_lengths_of_documents_have_a_long_tail() -> None:
    bounds = scaling.document_bounds(200_000)
    lengths = sorted(b - a for a, b in pairwise(bounds))
    assert (bounds[0], bounds[-1], lengths[0] > 0) == (0, 200_000, True)
    assert 150 < lengths[len(lengths) // 2] < 260
    assert lengths[-1] > 2000


# The report -----------------------------------------------------------------------------------------------------


def test_the_document_is_what_the_figures_say() -> None:
    """`lasp bench report` was run after its figures."""
    document = ROOT / "docs" / "benchmarks.md"
    assert report.written(document, BENCHMARKS) == document.read_text(encoding="utf-8")


def test_a_report_changes_its_sections_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, figures = tmp_path / "text.md", tmp_path / "figures" / "wrapped.json"
    figures.parent.mkdir()
    told = {"benchmark": "wrapped", "command": "lasp bench wrapped", "seconds": {"lasp": 0.5}, "times_faster": 2.0}
    told |= {"shape": {"layers": 1}, "machine": {"chip": "a chip", "threads": 1, "torch": "2"}}
    figures.write_text(json.dumps(told))
    mark = "<!-- lasp bench report: figures/wrapped.json -->\n"
    document.write_text(f"before\n\n{mark}old\n<!-- end -->\n\nbehind\n")
    assert main(["report", "--document", str(document)]) == 0
    once = document.read_text()
    assert once.startswith(f"before\n\n{mark}\n    lasp bench wrapped\n\n| Llama, one device | step, ms of CPU time |")
    assert "| lasp | 500.0 |" in once
    assert once.endswith("\n\n<!-- end -->\n\nbehind\n")
    assert main(["report", "--document", str(document)]) == 0
    assert document.read_text() == once
    figures.unlink()
    with pytest.raises(SystemExit, match="2"):
        main(["report", "--document", str(document)])
    assert "wrapped.json: there are no such figures" in capsys.readouterr().err


@pytest.mark.slow
def test_plots_are_drawn_from_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "records_of", fake)
    file = tmp_path / "figures.json"
    assert main(["scaling", "--json", str(file)]) == 0
    for name in ("one.png", "two.png"):
        scaling.plot(json.loads(file.read_text()), tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    assert one == two
