import json

from palm_rlhf_pytorch.metrics import MetricsLog, read_metrics


def rows(*steps):
    return [{"step": step, "loss": 1 / step} for step in steps]


def filled(path, steps):
    log = MetricsLog(path)
    for row in rows(*steps):
        log.append(row)
    return log


def test_the_file_equals_the_history(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    log = filled(path, (1, 2, 3))
    assert read_metrics(path) == log.history == rows(1, 2, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.history


def test_a_new_log_replaces_an_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, (1, 2, 3))
    new = MetricsLog(path)
    assert len(read_metrics(path)) == 3  # nothing is lost before there is something to write
    new.append({"step": 9})
    assert read_metrics(path) == [{"step": 9}]


def test_restore_drops_later_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, (1, 2, 3))
    log = MetricsLog(path)
    log.restore(rows(1, 2))
    assert read_metrics(path) == rows(1, 2)
    log.append({"step": 3, "loss": 0.0})
    assert read_metrics(path) == log.history == [*rows(1, 2), {"step": 3, "loss": 0.0}]


def test_restoring_to_nothing_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = filled(path, (1, 2))
    log.restore([])
    assert log.history == [] and read_metrics(path) == []
    log.append({"step": 1})
    assert read_metrics(path) == [{"step": 1}]


def test_history_without_a_file():
    log = filled(None, (1, 2))
    log.restore(rows(1))
    assert log.history == rows(1)


class Recorder:
    """Stands in for an Accelerator with a tracker."""

    log_with = ["anything"]

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


def test_trackers_see_every_row_under_its_step():
    recorder = Recorder()
    log = MetricsLog(accelerator=recorder)
    log.append({"step": 4, "loss": 0.5})
    assert recorder.logged == [(4, {"loss": 0.5})]
    recorder.log_with = []
    log.append({"step": 5, "loss": 0.5})
    assert len(recorder.logged) == 1


def test_the_file_of_an_earlier_run_is_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for reward in (1.0, 2.0, 3.0):
        MetricsLog(path).append({"step": 1, "reward": reward})
    assert [read_metrics(tmp_path / name)[0]["reward"] for name in ("metrics.jsonl.1", "metrics.jsonl.2")] == [1.0, 2.0]
    assert read_metrics(path)[0]["reward"] == 3.0
