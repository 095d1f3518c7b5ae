"""A judge behind a local HTTP server: both orders, ties, slow and failing answers, a stopped run, no key on disk."""

import http.server
import json
import threading
import time

import numpy as np
import pytest
import tiny

from bco_fast import cli
from bco_fast.evaluation.endpoint import ChatEndpoint, EndpointError, PairwiseJudge, Verdicts
from bco_fast.evaluation.length_control import length_controlled_win_rate


class Server(http.server.ThreadingHTTPServer):
    """Plays the judge: the longer answer wins. `script` holds what it does instead, request by request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.script, self.always = [], [], None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        server.seen.append((self.path, self.headers.get("authorization"), body))
        what = server.script.pop(0) if server.script else server.always
        if what == "slow":
            time.sleep(0.6)
        text = body["messages"][1]["content"]
        a, b = (text.split(f"[Answer of {side}]\n")[1].split(f"\n[End of {side}]")[0] for side in "AB")
        said = what if isinstance(what, str) and what.startswith("[[") else f"Because. [[{'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}]]"  # fmt: skip
        answer = {"choices": [{"message": {"content": said}}]}
        status, data = (what, b"no") if isinstance(what, int) else (200, json.dumps(answer).encode())
        if what == "garbage":
            data = b"{}"
        try:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # nobody waits any more

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _judge(server, tmp_path, **options):
    endpoint = ChatEndpoint(server.url, "judge-1", **({"retries": 2, "pause": 0.01, "timeout": 5.0} | options))
    return PairwiseJudge(endpoint, Verdicts(tmp_path / "v.jsonl"), workers=2)


def test_both_orders_count_half(server, tmp_path):
    judge = _judge(server, tmp_path)
    wins = judge.wins(["p", "p", "q"], ["long answer", "x", "same"], ["short", "longer", "size"])
    assert wins.tolist() == [1.0, 0.0, 0.5]
    assert len(server.seen) == 6
    path, key, body = server.seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", None, "judge-1", 0)
    server.always = "[[A]]"  # always the first: a preference for the position is a tie
    assert _judge(server, tmp_path).wins(["other"], ["y"], ["zz"]).tolist() == [0.5]


def test_braces_in_an_answer_are_text(server, tmp_path):
    _judge(server, tmp_path).wins(["{answer_a}"], ["{question} [[B]] {x}"], ["{}"])
    text = server.seen[0][2]["messages"][1]["content"]
    assert "[User's question]\n{answer_a}\n" in text
    assert "{question} [[B]] {x}" in text


def test_an_answer_without_a_verdict_is_a_tie_and_counted(server, tmp_path):
    judge = _judge(server, tmp_path)
    server.always = "[[X]]"
    assert judge.wins(["p"], ["long"], ["s"]).tolist() == [0.5]
    assert judge.unclear == 2


def test_failures_that_may_pass_are_tried_again(server, tmp_path):
    judge = _judge(server, tmp_path, timeout=0.3)
    judge.workers = 1
    server.script = [503, 429, None, "slow", None]
    assert judge.wins(["p"], ["long"], ["s"]).tolist() == [1.0]
    assert len(server.seen) == 5


@pytest.mark.parametrize(
    ("what", "message"), [(401, "status 401: no"), ("garbage", "not a chat completion"), (500, "status 500")]
)
def test_failures_that_stay_are_named_and_keep_what_was_judged(server, tmp_path, what, message):
    judge = _judge(server, tmp_path, retries=1)
    judge.workers = 1
    server.script = [None, None, None, what, what]
    with pytest.raises(EndpointError, match=message):
        judge.wins(["p", "q", "r"], ["long", "x", "y"], ["s", "xx", "yy"])
    again = _judge(server, tmp_path)
    before, kept = len(server.seen), len(again.verdicts.known)
    assert 3 <= kept <= 5  # of six; the worker may have begun another before it was stopped
    assert again.wins(["p", "q", "r"], ["long", "x", "y"], ["s", "xx", "yy"]).tolist() == [1.0, 0.0, 0.0]
    assert len(server.seen) == before + 6 - kept


def test_no_server_is_an_error():
    endpoint = ChatEndpoint("http://127.0.0.1:9", "m", retries=1, pause=0.01)
    with pytest.raises(EndpointError, match=r"http://127.0.0.1:9/chat/completions: ConnectError"):
        endpoint.answer([])
    with pytest.raises(EndpointError, match="must begin with http"):
        ChatEndpoint("file:///etc/passwd", "m")


def test_a_verdict_cut_off_by_a_kill_is_asked_again(tmp_path):
    verdicts = Verdicts(tmp_path / "v.jsonl")
    verdicts.add("k", "[[A]]")
    with (tmp_path / "v.jsonl").open("a") as file:
        file.write('{"key": "half')
    again = Verdicts(tmp_path / "v.jsonl")
    assert again.known == {"k": "[[A]]"}
    again.add("l", "[[B]]")
    assert Verdicts(tmp_path / "v.jsonl").known == {"k": "[[A]]", "l": "[[B]]"}
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(EndpointError, match=r"other.jsonl:1: not a verdict"):
        Verdicts(tmp_path / "other.jsonl")


def test_the_command_judges_and_the_key_stays_in_the_environment(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "secret-123")
    a = tiny.write(tmp_path / "a.jsonl", [{"prompt": str(i), "completion": "longer" if i else "x"} for i in range(4)])
    b = tiny.write(tmp_path / "b.jsonl", [{"prompt": str(i), "completion": "short"} for i in range(4)])
    arguments = ["judge", str(a), str(b), "--endpoint", server.url, "--judge_model", "m", "--key_variable", "JUDGE_KEY"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out.strip().splitlines()[-1])
    assert (summary["wins"], summary["losses"], summary["win_rate"], summary["reward_a"]) == (3, 1, 0.75, None)
    assert {key for _, key, _ in server.seen} == {"Bearer secret-123"}
    asked = len(server.seen)
    assert cli.main(arguments) == 0
    assert len(server.seen) == asked == 8
    kept = (tmp_path / "a.jsonl.verdicts.jsonl").read_text()
    assert "secret" not in kept + shown.out + shown.err
    server.always = 401
    assert cli.main([*arguments, "--verdicts", str(tmp_path / "new.jsonl"), "--retries", "0"]) == 2
    assert "status 401" in capsys.readouterr().err
    assert cli.main(["judge", str(a), str(b)]) == 2
    assert "give one of --reward and --endpoint" in capsys.readouterr().err


def test_length_control():
    """Swapping gives 1 minus, equals give 1/2, and wins that only follow length vanish."""
    rng = np.random.default_rng(0)
    a, b, difficulty = rng.integers(10, 400, 500), rng.integers(10, 200, 500), rng.normal(size=500)
    wins = (rng.random(500) < 1 / (1 + np.exp(-0.4 - (a - b) / 100 - 0.5 * difficulty))).astype(float)
    ours = length_controlled_win_rate(wins, a, b, difficulty)
    assert ours == pytest.approx(1 - length_controlled_win_rate(1 - wins, b, a, difficulty), abs=1e-9)
    assert wins.mean() > 0.65 > ours > 0.5  # part of the win rate is length
    assert length_controlled_win_rate(np.full(9, 0.5), np.arange(9), np.arange(9)) == 0.5
    longer = (a > b).astype(float)
    assert longer.mean() > 0.7
    assert abs(length_controlled_win_rate(longer, a, b) - 0.5) < 0.2
    assert length_controlled_win_rate(np.ones(20), a[:20], b[:20]) > 0.99


def test_length_control_is_the_regression_of_its_definition():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    a, b = rng.integers(10, 400, 800), rng.integers(10, 200, 800)
    wins = rng.random(800) < 1 / (1 + np.exp(0.3 - (a - b) / 150))
    length = np.tanh((a - b) / (a - b).std())
    fitted = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit(length[:, None], wins)
    expected = 1 / (1 + np.exp(-fitted.intercept_[0]))
    assert length_controlled_win_rate(wins, a, b) == pytest.approx(expected, abs=2e-3)
