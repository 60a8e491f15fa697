"""The operator adds, replaces and removes plans while the server runs; no request sees half of one."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking_http import answered, completion, plan_body, tokens_of
from engine import prompts, reference, save_tiny
from running import ADMIN_KEY

from steersman import Steering
from waiting import HANGING

NAMES = ["experts", "vectors", "both", "against"]


@pytest.fixture
def operator(server: Any) -> Iterator[Any]:
    with server.http(ADMIN_KEY) as http:
        yield http


def listed(http: Any) -> dict[str, Any]:
    return {one["id"]: one for one in http.get("/v1/steerings").json()["data"]}


def test_what_can_be_asked_for_is_listed(server: Any, material: Any) -> None:
    with server.http() as http:
        told = http.get("/v1/steerings").json()
        one = http.get("/v1/steerings/both").json()
        assert http.get("/v1/steerings/other").status_code == 404
    assert [entry["id"] for entry in told["data"]] == NAMES
    assert [entry["fingerprint"] for entry in told["data"]] == [
        material.plans[name].fingerprint for name in NAMES
    ]
    assert (told["default"], told["aliases"], told["strengths"]) == (
        None,
        {"tiny-experts": "experts@0.5"},
        [-2, 2],
    )
    assert (told["dtype"], told["checkpoint_dtype"]) == ("float32", "float32")
    assert one == told["data"][2]
    assert [(edit["site"], edit["layers"], edit["scope"]) for edit in one["edits"]] == [
        (edit.point, list(edit.layers), edit.scope) for edit in material.plans["both"].edits
    ]
    assert str(material.folder.parent) not in str(told)


def test_a_plan_comes_is_replaced_and_goes(operator: Any, material: Any) -> None:
    (prompt,) = prompts(1, seed=2)
    experts, both = (plan_body(material.folders[name]) for name in ("experts", "both"))
    added = operator.post("/v1/steerings", json={"name": "late", **experts})
    assert (added.status_code, added.json()["fingerprint"]) == (201, material.plans["experts"].fingerprint)
    assert list(listed(operator)) == [*NAMES, "late"]
    assert follows(operator, "late", prompt, material, "experts")
    assert operator.post("/v1/steerings", json={"name": "late", **both}).status_code == 409
    assert follows(operator, "late", prompt, material, "experts")
    replaced = operator.put("/v1/steerings/late", json=both)
    assert (replaced.status_code, replaced.json()["replaced"]) == (200, True)
    assert follows(operator, "late", prompt, material, "both")
    assert operator.delete("/v1/steerings/late").json() == {
        "object": "steering",
        "id": "late",
        "deleted": True,
    }
    assert operator.delete("/v1/steerings/late").status_code == 404
    assert operator.post("/v1/completions", json=completion(prompt, "late")).status_code == 400


def follows(http: Any, asked: str | None, prompt: list[int], material: Any, plan: str | None) -> bool:
    """Whether a request is answered as under a plan."""
    answer = answered(http, completion(prompt, asked))
    expected = None if plan is None else material.plans[plan]
    fingerprint = None if expected is None else expected.fingerprint
    return (
        tokens_of(answer) == reference(material.model, expected, prompt).tokens
        and answer["steersman"]["fingerprint"] == fingerprint
    )


def test_the_default_is_changed(operator: Any, material: Any) -> None:
    (prompt,) = prompts(1, seed=2)
    assert operator.put("/v1/steerings-default", json={"steering": "vectors"}).json() == {
        "default": "vectors"
    }
    try:
        assert follows(operator, None, prompt, material, "vectors")
        assert follows(operator, "experts", prompt, material, "experts")
        assert follows(operator, "none", prompt, material, None)
        assert operator.delete("/v1/steerings/vectors").status_code == 409
        beams = completion(prompt, use_beam_search=True, n=2)
        assert operator.post("/v1/completions", json=beams).status_code == 400
        assert operator.post("/v1/completions", json={**beams, "steering": "none"}).status_code == 200
        for wrong in ("other", "", 3, ["vectors"], "vectors@9"):
            assert operator.put("/v1/steerings-default", json={"steering": wrong}).status_code == 400
    finally:
        assert operator.put("/v1/steerings-default", json={"steering": None}).status_code == 200
    assert follows(operator, None, prompt, material, None)


def test_what_an_alias_needs_stays(operator: Any) -> None:
    response = operator.delete("/v1/steerings/experts")
    assert response.status_code == 409
    assert "tiny-experts" in response.json()["error"]["message"]


@pytest.mark.parametrize("key", [None, "wrong", ADMIN_KEY + "x", ADMIN_KEY[:-1], "a-client"])
def test_only_the_operator_changes_plans(server: Any, material: Any, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = plan_body(material.folders["vectors"])
    with server.http() as http:
        del http.headers["Authorization"]
        before = http.get("/v1/steerings", headers={"Authorization": "Bearer a-client"}).json()
        for method, path, sent in (
            ("POST", "/v1/steerings", {"name": "mine", **body}),
            ("PUT", "/v1/steerings/experts", body),
            ("PUT", "/v1/steerings-default", {"steering": "vectors"}),
            ("DELETE", "/v1/steerings/both", None),
        ):
            assert http.request(method, path, json=sent, headers=headers).status_code == 401
        assert http.get("/v1/steerings", headers={"Authorization": "Bearer a-client"}).json() == before


def spoilt(material: Any, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Bodies that bring no plan for this server."""
    good = plan_body(material.folders["experts"])
    manifest = base64.b64decode(good["manifest"])
    other = save_tiny("qwen3_moe", tmp_path / "other")
    same_form = save_tiny("olmoe", tmp_path / "same", seed=9, vocab_size=341, max_position_embeddings=256)
    folders = {
        name: Steering.from_experts(model, activate={1: [1]}).save_pretrained(tmp_path / f"plan-{name}")
        or str(tmp_path / f"plan-{name}")
        for name, model in {"other": other, "same": same_form}.items()
    }

    def written(changed: bytes) -> str:
        return base64.b64encode(changed).decode()

    return {
        "nothing": {},
        "no tensors": {"manifest": good["manifest"]},
        "a path": {"path": material.folders["experts"]},
        "a path beside": {**good, "path": material.folders["experts"]},
        "numbers": {"manifest": 1, "tensors": 2},
        "no base64": {**good, "tensors": "…"},
        "empty": {"manifest": "", "tensors": ""},
        "cut": {**good, "tensors": good["tensors"][:-8]},
        "another's tensors": {**good, "tensors": plan_body(material.folders["vectors"])["tensors"]},
        "changed manifest": {**good, "manifest": written(manifest.replace(b'"all"', b'"prompt"'))},
        "no manifest": {**good, "manifest": written(b"[]")},
        "deep manifest": {**good, "manifest": written(b"[" * 100_000)},
        "binary manifest": {**good, "manifest": written(bytes(range(256)))},
        "another architecture": plan_body(folders["other"]),
        "other weights": plan_body(folders["same"]),
    }


def test_what_is_no_plan_for_this_server_is_refused(operator: Any, material: Any, tmp_path: Path) -> None:
    (prompt,) = prompts(1, seed=2)
    before = listed(operator)
    wrong = {}
    for name, body in spoilt(material, tmp_path).items():
        response = operator.put("/v1/steerings/experts", json=body)
        message = response.json().get("error", {}).get("message", "")
        if response.status_code != 400 or not message or str(material.folder) in message:
            wrong[name] = (response.status_code, response.text[:300])
    assert not wrong
    for name in ("none", "a b", "x" * 65, "-x", "ä"):
        response = operator.put(f"/v1/steerings/{name}", json=plan_body(material.folders["experts"]))
        assert response.status_code == 400, name
    assert operator.put("/v1/steerings/x", content=b"{").status_code == 400
    assert listed(operator) == before
    assert follows(operator, "experts", prompt, material, "experts")


def test_a_body_that_is_too_large_is_not_read(operator: Any) -> None:
    from steersman.vllm.server.plan_files import LARGEST

    def parts() -> Iterator[bytes]:
        sent = 0
        while sent <= LARGEST + 2**20:
            yield b" " * 2**20
            sent += 2**20

    assert operator.put("/v1/steerings/large", content=parts()).status_code == 413


def test_places_run_out_with_a_reason_and_come_back(operator: Any, material: Any) -> None:
    """Seven fit in; four are there."""
    body = plan_body(material.folders["vectors"])
    names = ["one", "two", "three"]
    try:
        for name in names:
            assert operator.put(f"/v1/steerings/{name}", json=body).status_code == 201
        full = operator.put("/v1/steerings/four", json=body)
        assert full.status_code == 400
        assert "all 7 places" in full.json()["error"]["message"]
        # Where nobody follows the one that is replaced, its place would serve, but only afterwards.
        assert operator.put("/v1/steerings/three", json=body).status_code == 400
    finally:
        for name in names:
            operator.delete(f"/v1/steerings/{name}")
    assert operator.put("/v1/steerings/one", json=body).status_code == 201
    assert operator.delete("/v1/steerings/one").status_code == 200


def test_a_plan_replaced_under_load_is_the_old_or_the_new_one(
    server: Any, operator: Any, material: Any
) -> None:
    """Each answer and its receipt are of one plan; which, is the receipt's to say."""
    texts = prompts(6, length=12, seed=11)
    of = {
        material.plans[name].fingerprint: {
            tuple(text): reference(material.model, material.plans[name], text).tokens for text in texts
        }
        for name in ("experts", "both")
    }
    bodies = [plan_body(material.folders[name]) for name in ("experts", "both")]
    assert operator.put("/v1/steerings/turning", json=bodies[0]).status_code == 201
    seen: list[str] = []
    failures: list[str] = []
    done = threading.Event()

    def ask(turn: int) -> None:
        with server.http() as http:
            while not done.is_set():
                text = texts[turn % len(texts)]
                response = http.post("/v1/completions", json=completion([text, text[::-1], text], "turning"))
                if response.status_code != 200:
                    failures.append(response.text)
                    return
                answer = response.json()
                fingerprint = answer["steersman"]["fingerprint"]
                expected = of[fingerprint][tuple(text)]
                if [tokens_of(answer, n) for n in (0, 2)] != [expected, expected]:
                    failures.append(f"{fingerprint}: {answer}")
                seen.append(fingerprint)

    threads = [threading.Thread(target=ask, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    replaced = 0
    try:
        for turn in range(60):
            response = operator.put("/v1/steerings/turning", json=bodies[(turn + 1) % 2])
            replaced += response.status_code == 200
            assert response.status_code == 200 or "places" in response.text
    finally:
        done.set()
        for thread in threads:
            thread.join(HANGING)
    assert not failures, failures[0]
    assert set(seen) == set(of)
    assert replaced > 20
    assert operator.delete("/v1/steerings/turning").status_code == 200
