"""detect in all its ways from the command line: kills and resumes, shards, continuations, what is told."""

from __future__ import annotations

import functools
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

import steersman.models.encoding
import steersman.pairs
from cli.command_line import run, write_pairs
from contrasts import assert_same
from steersman import RoutingContrast, Steering, load_model, load_pairs
from steersman.experts.encoding import counted_tokens
from steersman.models.encoding import EncodedPairs
from steersman.progress import units_done
from waiting import HANGING, wait_until

OPTIONS = ("--stratify", "position", "--bootstrap", 5, "--batch-size", 2)


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process of its own, which goes on."""
    command = [str(Path(sys.executable).with_name("steersman")), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_at_random(
    dice: random.Random, number: int, partial: Path, after: float, arguments: list[object]
) -> int:
    """Start the command, kill it at a random moment after it has got further; how far it had got."""
    before = units_done(partial)
    command = start(*arguments, *(["--resume"] if before else []))
    wait_until(lambda: units_done(partial) > before, command)
    time.sleep(dice.random() * after)
    command.send_signal(number)
    _, said = command.communicate(timeout=HANGING)
    assert command.returncode in (-number, 128 + number), f"it ended before the kill: {said}"
    if number != signal.SIGKILL:
        assert f"steersman: interrupted; go on with --resume (progress in {partial})\n" in said
    return units_done(partial)


def kills_change_nothing(tiny: Path, tmp_path: Path, kills: int, pairs: int, after: float) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", range(pairs))
    others = write_pairs(tmp_path / "others.jsonl", range(pairs, pairs + 60))
    arguments = ["detect", tiny, file, *OPTIONS, "--adjust", others]
    assert run(*arguments, "-o", tmp_path / "whole").status == 0
    out, partial, dice = tmp_path / "c", tmp_path / "c.partial", random.Random(kills)
    places = [
        killed_at_random(dice, signal.SIGKILL, partial, after, [*arguments, "-o", out]) for _ in range(kills)
    ]
    assert 0 < places[0] <= places[-1] < pairs + 60
    assert places == sorted(places)
    assert not out.exists()
    result = run(*arguments, "-o", out, "--resume", "--json").json
    assert result["resumed_after"] == places[-1]
    assert not partial.exists()
    assert_same(*(RoutingContrast.from_pretrained(path) for path in (out, tmp_path / "whole")))
    tensors = [(path / "tensors.safetensors").read_bytes() for path in (out, tmp_path / "whole")]
    assert tensors[0] == tensors[1]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_kill_and_a_resume_are_one_run(tiny: Path, tmp_path: Path) -> None:
    kills_change_nothing(tiny, tmp_path, kills=1, pairs=400, after=0.2)


@pytest.mark.long
def test_ten_kills_at_random_moments_are_one_run(tiny: Path, tmp_path: Path) -> None:
    kills_change_nothing(tiny, tmp_path, kills=10, pairs=6000, after=0.4)


def test_sigterm_leaves_progress_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(400))
    out, partial = tmp_path / "c", tmp_path / "c.partial"
    arguments: list[object] = ["detect", tiny, pairs, "-o", out, *OPTIONS]
    done = killed_at_random(random.Random(0), signal.SIGTERM, partial, 0.1, arguments)
    assert 0 < done < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.partial", "pairs.jsonl"]
    error = run(*arguments).error
    assert str(partial) in error
    assert "--resume" in error
    assert "--force" in error
    assert "differs in bootstrap" in run(*arguments, "--bootstrap", 6, "--resume").error
    assert units_done(partial) == done
    words = run(*arguments, "--resume").words
    assert f"resumed after {done} pairs" in words
    assert not partial.exists()


def test_force_starts_again(tiny: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(30))
    partial = tmp_path / "c.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    out = tmp_path / "c"
    assert "--force discards it" in run("detect", tiny, pairs, "-o", out, "--resume").error
    assert run("detect", tiny, pairs, "-o", out, "--force", "--json").json["pairs"] == 30
    assert not partial.exists()
    assert "resumed_after" not in run("detect", tiny, pairs, "-o", tmp_path / "d", "--json").json
    fresh = run("detect", tiny, pairs, "-o", tmp_path / "e", "--resume", "--json")
    assert json.loads(fresh.stdout)["resumed_after"] == 0
    assert fresh.remarks == (
        f"steersman: no progress in {tmp_path / 'e.partial'} to go on from: starting at the first pair\n"
    )


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", range(30))
    pairs = load_pairs(path)
    assert pairs[29].negative[0]["content"] == "The river is 29 miles long, and the town beside it is old."
    write_pairs(path, range(1, 32))
    with pytest.raises(ValueError, match=r"pairs\.jsonl: was changed since it was first read"):
        pairs[3]


def test_shards_merge_to_the_whole(tiny: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(30))
    for name, shard in (("1", "1/2"), ("2", "2/2"), ("whole", "1/1")):
        found = run("detect", tiny, pairs, "-o", tmp_path / name, "--shard", shard, *OPTIONS)
        assert found.status == 0, found.stderr
    run("merge", tmp_path / "2", tmp_path / "1", "-o", tmp_path / "merged")
    merged, whole = (RoutingContrast.from_pretrained(tmp_path / name) for name in ("merged", "whole"))
    assert_same(merged, whole, made_from=False)
    assert [set(source) for source in merged.made_from] == [{"kind", "name", "sha256"}]
    message = run("detect", tiny, pairs, "-o", tmp_path / "x", "--shard", "3/2").error
    assert "--shard 3/2: right is I/N with 1 ≤ I ≤ N" in message


def test_a_missing_shard_is_told(tiny: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(30))
    for shard in (1, 2):
        run("detect", tiny, pairs, "-o", tmp_path / str(shard), "--shard", f"{shard}/3")
    line = f"shards 1/3, 2/3 of {pairs}: 3/3 is missing"
    merged = run("merge", tmp_path / "2", tmp_path / "1", "-o", tmp_path / "merged").words
    assert merged.splitlines()[-1] == line
    result = run("show", tmp_path / "merged", "--json").json
    assert (result["shards"], result["missing"]) == (["1/3", "2/3"], ["3/3"])
    assert line in run("select", tmp_path / "merged", "-o", tmp_path / "s", "--top", 2).words
    assert f"shard 2/3 of {pairs}: 1/3, 3/3 are missing" in run("show", tmp_path / "2").words


def test_reading_many_pairs_shows_a_bar(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once = functools.partial(tqdm, mininterval=0)
    for module in (steersman.pairs, steersman.models.encoding):
        monkeypatch.setattr(module, "tqdm", lambda *given, delay, **how: at_once(*given, **how))
    file = write_pairs(tmp_path / "pairs.jsonl", range(5))
    pairs = load_pairs(file, progress=True)
    assert re.search(r"reading: .*B/s", capsys.readouterr().err)
    model, tokenizer = load_model(str(tiny), device="cpu")
    side = counted_tokens(model, tokenizer, "target")
    EncodedPairs(model, pairs, side, progress=True).close()
    assert "reading: 100%" in (said := capsys.readouterr().err)
    assert "5/5" in said
    EncodedPairs(model, load_pairs(file), side).close()
    assert capsys.readouterr().err == ""


def test_everything_that_was_counted_is_told(tiny: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(30))
    others = write_pairs(tmp_path / "others.jsonl", range(40, 66))
    options = ["--generate", 3, *OPTIONS, "--adjust", others]
    result = run("detect", tiny, pairs, "-o", tmp_path / "c", *options, "--json").json
    expected: dict[str, Any] = {
        "counted": "generated",
        "new_tokens": 3,
        "strata": [0, 1, 2, 4, 8, 16, 32],
        "bootstrap": 5,
    }
    assert {key: result[key] for key in expected} == expected
    assert result["adjustment"]["pairs"] + result["adjustment"]["skipped"] == 26
    assert {"stratified", "adjusted"} <= set(result["top"][0])
    shown = run("show", tmp_path / "c").words
    for words in (
        "up to 3 tokens of the model's own",
        "stratified: at like positions, from 0, 1, 2, 4",
        "times the nuisance (",
        "5 bootstrap replicates",
        "stratified  adjusted",
    ):
        assert words in shown
    assert run("show", tmp_path / "c", "--json").json["adjustment"] == result["adjustment"]
    table = tmp_path / "t.csv"
    assert run("show", tmp_path / "c", "--table", table).status == 0
    assert "adjusted_q" in table.read_text().splitlines()[0]


def test_select_says_how_stable_its_choice_is(tiny: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", range(30))
    others = write_pairs(tmp_path / "others.jsonl", range(40, 66))
    run("detect", tiny, pairs, "-o", tmp_path / "c", "--bootstrap", 20, "--adjust", others)
    chosen = run(
        "select", tmp_path / "c", "-o", tmp_path / "s", "--top", 6, "--by", "adjusted", "--json"
    ).json
    assert chosen["stability"]["replicates"] == 20
    assert len(chosen["stability"]["experts"]) == len(chosen["activated"]) + len(chosen["deactivated"])
    assert set(chosen["adjustment"]) == {"slope", "share"}
    saved = Steering.from_pretrained(tmp_path / "s")
    assert saved.provenance["stability"] == chosen["stability"]
    words = run("select", tmp_path / "c", "-o", tmp_path / "t", "--top", 6).words
    assert "of 6 are chosen in at least 95% of 20 bootstrap replicates" in words
    plain = run("select", tmp_path / "c", "-o", tmp_path / "u", "--top", 6, "--json").json
    assert "adjustment" not in plain
    few = write_pairs(tmp_path / "few.jsonl", range(5))
    run("detect", tiny, few, "-o", tmp_path / "few", "--adjust", others)
    message = run(
        "select", tmp_path / "few", "-o", tmp_path / "v", "--top", 1, "--by", "adjusted_lower_bound"
    )
    assert "20 clusters, there are 5" in message.error
    message = run("select", tmp_path / "few", "-o", tmp_path / "v", "--top", 1, "--by", "stratified")
    assert "--stratify position" in message.error


def test_parts_of_chats(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {
            side: [{"role": "user", "content": f"{side} {n}"}, {"role": "assistant", "content": "the town"}]
            for side in ("positive", "negative")
        }
        for n in range(5)
    ]
    pairs = tmp_path / "chats.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = {}
    for part in ("prompt", "answer", "target"):
        result = run("detect", tiny, pairs, "-o", tmp_path / part, "--tokens", part, "--json").json
        assert result["counted"] == part
        tokens[part] = result["tokens"]
    assert tokens["answer"] == tokens["target"]
    assert tokens["prompt"] != tokens["answer"]
    assert "the tokens of the prompts" in run("show", tmp_path / "prompt").words
    message = run("detect", tiny, pairs, "-o", tmp_path / "x", "--tokens", "answer", "--generate", 2).error
    assert "leave out tokens='answer'" in message
