"""Runs of several processes, as torchrun starts them: one joint batch, one voice, one end."""

import csv
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from oracle import LOSS_DRIFT
from process_group import run

import genfast
from benchmarks import exchanges, nccl_model, scaling
from genfast import cli, functional
from genfast.backend import use_backend
from genfast.training.errors import BadInput, Elsewhere
from genfast.training.runs import api, checkpoint, loop, workers
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import prepare, prepare_resumed
from genfast.training.runs.schedule import Schedule

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
STEPS, TOGETHER = 20, 8  # Images of a step, of all processes.
SMALL = dict(nz=3, image_size=16, precision="fp32")
NARROW = SMALL | dict(ngf=4, ndf=4)
MODELS = {
    "dcgan": NARROW | dict(sync_bn=True, ema=0.5),
    # Adam moves a weight by as much whose gradient is a rounding: little then comes of those.
    "vae": SMALL | dict(lr=2e-5),
    "vae-gan": NARROW | dict(sync_bn=True),
}
TRAINED = {1: ("dcgan", "vae", "vae-gan"), 2: ("dcgan", "vae", "vae-gan"), 4: ("dcgan",)}


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    # Three joint batches an epoch, and two images that each epoch leaves out.
    np.save(path, np.random.default_rng(0).integers(0, 256, (26, 16, 16), dtype=np.uint8))
    return str(path)


def _rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def _share_noise(rank, count):
    """Let draws be this process's part of what one process would draw for all images."""
    generator = torch.Generator().manual_seed(3)

    def randn(images, *shape, **_):
        everyones = torch.randn(images * count, *shape, generator=generator)
        return everyones[rank * images : (rank + 1) * images]

    real, torch_randn = functional._draw_noise, torch.randn

    def own(*shape, generator=None, **options):
        return torch_randn(*shape, generator=generator) if generator else randn(*shape)

    torch.randn = own
    functional._draw_noise = lambda mu, generator: randn(*mu.shape)
    return lambda: (setattr(torch, "randn", torch_randn), setattr(functional, "_draw_noise", real))


def _trained(rank, count, images, folder):
    """Train each model on this process's part; where the first wrote what came of it."""
    team = workers.Several() if count > 1 else workers.ALONE
    for model in TRAINED[count]:
        settings = MODELS[model] | dict(batch_size=TOGETHER // count, steps=STEPS)
        if count == 1:
            settings.pop("sync_bn", None)
        config, loaded = prepare(model, images, settings, processes=count)
        put_back = _share_noise(rank, count)
        with use_backend("reference"):
            loop.train(config, loaded, Path(folder) / f"{model}{rank}", device=CPU, workers=team)
        put_back()


def test_processes_train_as_one_with_the_joint_batch(images, tmp_path):
    folders = {count: tmp_path / str(count) for count in (1, 2, 4)}
    for count, folder in folders.items():
        folder.mkdir()
        if count == 1:
            _trained(0, 1, images, folder)
        else:
            run(_trained, count, folder, count, images, str(folder))
    for model in TRAINED[1]:
        rows = np.array(_rows(folders[1] / f"{model}0")[1:], dtype=float)
        modules = read_checkpoint(folders[1] / f"{model}0/checkpoint.pt")["modules"]
        for count in (2, 4) if model in TRAINED[4] else (2,):
            out = folders[count] / f"{model}0"
            assert [p.name for p in folders[count].glob(f"{model}[0-9]")] == [out.name]
            found = np.array(_rows(out)[1:], dtype=float)
            assert found.shape == (STEPS, rows.shape[1])
            np.testing.assert_allclose(found, rows, rtol=LOSS_DRIFT, atol=1e-5)
            np.testing.assert_allclose(found[0], rows[0], rtol=1e-5, atol=1e-6)
            theirs = read_checkpoint(out / "checkpoint.pt")["modules"]
            for name, state in modules.items():
                for key, value in state.items():
                    expected = value.double() if value.is_floating_point() else value
                    torch.testing.assert_close(
                        theirs[name][key].to(expected.dtype), expected, rtol=1e-5, atol=1e-5
                    )


def _ways_of_a_run(rank, images, folder):
    """A run without a break, one that goes on, and one that a signal to one process stops."""
    team, folder = workers.Several(), Path(folder)
    augmented = NARROW | dict(augment="translation", flip=True, batch_size=4, steps=6)
    config, loaded = prepare("dcgan", images, augmented, processes=2)
    with use_backend("reference"):
        with exchanges.counted() as exchanged:
            loop.train(config, loaded, folder / "whole", device=CPU, workers=team, sample_every=2)

        half, _ = prepare("dcgan", images, augmented | dict(steps=3), processes=2)
        loop.train(half, loaded, folder / "parts", device=CPU, workers=team)
        drawn = team.gathered(torch.rand(3).tolist())
        again, _ = prepare_resumed("dcgan", None, dict(steps=6), folder / "parts")
        torch.manual_seed(0)
        loop.train(
            again, loaded, folder / "parts", device=CPU, workers=team,
            resume_from=folder / "parts", checkpoint_seconds=0,
        )  # fmt: skip

        # A script of one's own, whose processes have met.
        api.joined = lambda device: nullcontext((team, device))
        data = torch.from_numpy(np.load(images))[:, None]
        genfast.train("dcgan", data, out=folder / "script", device="cpu", quiet=True, **augmented)

        real = loop.build_step

        def build_step(*arguments):
            step = real(*arguments)
            if rank == 1:
                inner = step._result

                def result(*losses):
                    if step.calls == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return inner(*losses)

                step._result = result
            return step

        loop.build_step = build_step
        try:
            outcome = loop.train(config, loaded, folder / "stopped", device=CPU, workers=team)
        finally:
            loop.build_step = real
    return drawn, exchanged, outcome.interrupted, outcome.steps


def _going_wrong(rank, images, folder):
    """What each process raises, where something fails in one of them or is not the same."""
    team = workers.Several()
    config, loaded = prepare("vae", images, SMALL | dict(batch_size=4, steps=3), processes=2)
    other, _ = prepare("vae", images, SMALL | dict(batch_size=4, steps=3, seed=1), processes=2)

    def fail_in(failing, error):
        def act():
            if rank in failing:
                raise error

        return act  # fmt: skip

    def write_nothing(*arguments):
        raise OSError("no space left")

    def train(config, out):
        with use_backend("reference"):
            loop.train(config, loaded, Path(folder) / out, device=CPU, workers=team)

    def without_disk():
        real, checkpoint.save_checkpoint = checkpoint.save_checkpoint, write_nothing
        try:
            train(config, "full")
        finally:
            checkpoint.save_checkpoint = real

    def with_other_weights():
        real = loop.build_step

        def build_step(*arguments):
            step = real(*arguments)
            with torch.no_grad():
                next(step.model.parameters()).add_(rank)
            return step

        loop.build_step = build_step
        try:
            train(config, "weights")
        finally:
            loop.build_step = real

    ways = {
        "of the second": lambda: team.together(fail_in({1}, BadInput("expected a GPU"))),
        "of both": lambda: team.together(fail_in({0, 1}, BadInput("expected data"))),
        "settings": lambda: train(other if rank else config, "differ"),
        "disk": without_disk,
        "weights": with_other_weights,
    }
    raised = {}
    for name, way in ways.items():
        try:
            way()
        except Exception as error:
            raised[name] = type(error).__name__, str(error)
    return raised


def _both(rank, images, folder):
    return _ways_of_a_run(rank, images, folder), _going_wrong(rank, images, folder)


def test_runs_of_two_processes_go_on_stop_and_fail_together(images, tmp_path):
    results = run(_both, 2, tmp_path, images, str(tmp_path))
    (drawn, (calls, nbytes), *ends), (_, _, *other_ends) = (ways for ways, _ in results)
    assert drawn[0] != drawn[1], "both processes draw the same noise"
    assert ends == other_ends == [True, 2], "they did not stop at the same step"

    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole") == _rows(tmp_path / "script")
    parts, whole = (read_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("parts", "whole"))
    assert [torch.equal(a, b) for name in whole["modules"] for a, b in zip(
        parts["modules"][name].values(), whole["modules"][name].values(), strict=True
    )].count(False) == 0  # fmt: skip
    counts = {name: sum(
        t.numel() for key, t in state.items() if key.endswith(("weight", "bias"))
    ) for name, state in whole["modules"].items()}  # fmt: skip
    assert nbytes["gradients"] == 6 * 4 * sum(counts.values())
    # At each step the number of images, then the losses; a last question when all steps are made.
    assert (calls["gradients"], calls["losses"], calls["control"]) == (6 * 2, 6 * 2, 6 + 1)
    assert calls["statistics"] == 0
    assert [len(states["cpu"]) > 0 for states in whole["together"]["rng"]] == [True, True]
    assert sorted(p.name for p in (tmp_path / "whole/samples").iterdir()) == [
        f"step_000000{n}.png" for n in (2, 4, 6)
    ]

    first, second = (raised for _, raised in results)
    assert second["of the second"][0] == "BadInput"
    assert "expected a GPU; so says process 1 of 2" in second["of the second"][1]
    assert first["of the second"][0] == "Elsewhere"
    assert (first["of both"], second["of both"][0]) == (("BadInput", "expected data"), "Elsewhere")
    assert first["settings"] == (
        "BadInput", "expected the same --seed in all processes, got 1 in process 1 and 0 in the "
        "first",
    )  # fmt: skip
    assert {second[way][0] for way in ("settings", "disk", "weights")} == {"Elsewhere"}
    assert first["weights"][0] == "BadInput"
    assert "expected the same checksum of the weights to begin with in all" in first["weights"][1]
    assert first["disk"] == ("OSError", "no space left")

    # Six steps of eight images: two of the epochs that one process makes of six batches of four.
    config, loaded = prepare_resumed("dcgan", None, dict(epochs=3), tmp_path / "whole")
    with pytest.warns(UserWarning, match="is of a run of 2 processes, which goes on with one"):
        outcome = loop.train(
            config, loaded, tmp_path / "whole", device=CPU, resume_from=tmp_path / "whole"
        )
    assert [row[:2] for row in _rows(tmp_path / "whole")[7:]] == [
        [str(step), "3"] for step in range(7, 13)
    ]
    assert outcome.picture.name == "epoch_003.png"
    config, loaded = prepare_resumed("dcgan", None, dict(epochs=4), tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*processes")
        loop.train(config, loaded, tmp_path / "whole", device=CPU, resume_from=tmp_path / "whole")
    assert _rows(tmp_path / "whole")[-1][:2] == ["18", "4"]


def _meeting_again(rank, folder):
    """What two runs of one script gather, whose processes meet through torchrun's store."""
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_PORT="1")
    store = dist.FileStore(f"{folder}/of torchrun", 2)
    dist.rendezvous = lambda *_, **__: iter([(store, rank, 2)])
    workers.STEP_TIMEOUT = workers.WAIT_TIMEOUT = timedelta(seconds=20)
    gathered = []
    for run_number in range(2):
        # What the second left in the store is still there when the first comes again.
        time.sleep(0.5 * rank)
        with workers.joined("cpu") as (team, _):
            gathered.append(team.gathered((run_number, rank)))
    # What the process ends.
    dist.init_process_group("gloo", store=dist.PrefixStore("end", store), rank=rank, world_size=2)
    return gathered


def test_processes_of_a_script_meet_again(tmp_path):
    met = [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    assert run(_meeting_again, 2, tmp_path, str(tmp_path)) == [met, met]


def test_schedule_of_a_run_with_other_batches():
    schedule = Schedule.going_on(6, steps=7, position=7, length_then=3)
    assert [schedule.position(7), schedule.epoch(15), schedule.epoch(17)] == [14, 4, 4]
    assert [step for step in range(8, 30) if schedule.ends_epoch(step)] == [11, 17, 23, 29]


def test_a_warm_up_goes_on_at_its_epoch_with_other_batches(images, tmp_path):
    settings = SMALL | dict(batch_size=4, epochs=8, beta_warmup=4)
    config, _ = prepare("vae", images, settings)
    step = loop.build_step(config, CPU)
    for _ in range(7):  # Of two processes, whose epochs have three steps.
        step(torch.rand(4, 1, 16, 16))
    rng = (checkpoint.rng_states(CPU),) * 2
    together = checkpoint.Together(2, 7, 3, rng)
    checkpoint.save_checkpoint(tmp_path / "c.pt", step, config.as_dict(), 7, together)
    step = loop.build_step(config, CPU)
    with pytest.warns(UserWarning, match="is of a run of 2 processes, which goes on with one"):
        loop._beginning(config, tmp_path / "c.pt", step, 6, workers.ALONE)
    assert step.modules["kl_weight"]() == (2 * 6 + 2 + 1) / (4 * 6)


def test_a_run_goes_on_with_no_more_processes_than_its_batches_are_for(images, tmp_path):
    given, path = SMALL | dict(steps=1), tmp_path / "run/checkpoint.pt"
    config, loaded = prepare("vae", images, given)
    loop.train(config, loaded, tmp_path / "run", device=CPU)
    more = "vae", None, dict(steps=2), tmp_path / "run", path, None, CPU
    assert api.prepared(*more, 1)[0].batch_size == 26
    advice = f"expected 1 process at most .* 26 of its 26 images .* got 2: .* --init-from {path}$"
    with pytest.raises(BadInput, match=advice):
        api.prepared(*more, 2)
    config, _, beginning = api.prepared("vae", images, given, tmp_path / "b", None, path, CPU, 2)
    beginning.check(config)
    assert config.batch_size == 13


def test_torn_together_parts_are_refused(images, tmp_path):
    config, _ = prepare("vae", images, SMALL | dict(batch_size=4, steps=3))
    path = tmp_path / "c.pt"
    step = loop.build_step(config, CPU)
    for together in (
        checkpoint.Together(2, 3, 3, ({},)),
        checkpoint.Together(1, 3, 0, ({},)),
        checkpoint.Together(1, -1, 3, ({},)),
        checkpoint.Together(1, 1, 3, (None,)),
    ):
        checkpoint.save_checkpoint(path, step, config.as_dict(), 3, together)
        with pytest.raises(BadInput, match="what it says of the processes that trained together"):
            read_checkpoint(path)


def test_model_of_gpus_that_are_not_here():
    ring = nccl_model.all_reduce_seconds
    assert ring(1, 10**9) == 0
    assert ring(8, 370e9, calls=0) == pytest.approx(2 * 7 / 8)
    assert ring(2, 0, calls=3) == pytest.approx(60e-6)
    fact = {"batch_size": 64, "image_size": 64}
    local = fact | {"calls": {"gradients": 2}, "bytes": {"gradients": 25e6}}
    shared = fact | {"calls": {"gradients": 2, "norms": 13}, "bytes": {"gradients": 25e6}}
    rows = scaling.predict({False: local, True: shared})
    efficiencies = [float(row["efficiency"]) for row in rows if row["batch_size"] == 128]
    assert efficiencies[0] == efficiencies[4] == 1
    assert sorted(efficiencies[:4], reverse=True) == efficiencies[:4]
    assert all(a < b for a, b in zip(efficiencies[5:], efficiencies[1:4], strict=True))
    assert all(row["note"].startswith("a model, not a measurement") for row in rows)


GLOO = "[/src/third_party/gloo/gloo/transport"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        # As PyTorch 2.13 raises them where a process was killed, ended, or hung.
        (RuntimeError(f"{GLOO}/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2"), True),
        (RuntimeError(f"{GLOO}/tcp/pair.cc:537] Read error [127.0.0.1]:2: Connection reset"), True),
        (RuntimeError(f"{GLOO}/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for r"), True),
        (RuntimeError(f"{GLOO.replace('/', chr(92))}{chr(92)}uv{chr(92)}pair.cc:5] error"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (dist.DistStoreError("wait timeout after 3000ms"), True),
        # And not a person's own.
        (RuntimeError("expected gloomy images, got bright ones"), False),
        (RuntimeError("my_nccl_layer: connection reset, broken pipe, socket"), False),
        (RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:3] sizes differ"), False),
        (ConnectionResetError("connection reset by peer"), False),
    ],
)
def test_errors_of_a_lost_process(error, is_lost):
    assert workers.Several.is_lost(object.__new__(workers.Several), error) == is_lost


def test_who_speaks_before_they_meet(monkeypatch, capsys):
    monkeypatch.setattr(workers, "SPEAKING_SECONDS", 0)
    for name, value in dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(["demo"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["train", "vae", "--lr", "x"])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["demo"]) == 1
    assert "expected one process for genfast demo" in capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert workers._own_device("auto") == torch.device("cuda:1")
    with pytest.raises(BadInput, match="each of which takes a GPU of its own, got cuda:0"):
        workers._own_device("cuda:0")
    with pytest.raises(Elsewhere), workers.before_they_meet():
        raise BadInput("expected")


def test_one_process_tells_why_a_script_ends(monkeypatch, tmp_path):
    events, late = [], Elsewhere("another process tells of it")
    late.needs_time = False
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, _: events.append(str(error)))
    monkeypatch.setattr(workers, "let_speak", lambda: events.append("waited"))
    for name, value in dict(RANK=1, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))

    def end(rank, raised=None, **settings):
        def joined(device):
            raise raised

        monkeypatch.setattr(api, "joined", joined)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        data = torch.zeros(4, 8, 8, dtype=torch.uint8)
        events.clear()
        with pytest.raises((BadInput, Elsewhere, RuntimeError)) as caught:
            genfast.train("vae", data, out=tmp_path / "out", device="cpu", **settings)
        sys.excepthook(caught.type, caught.value, caught.tb)
        return list(events)

    bad_rate = "expected --lr to be a number above 0, got -1"
    assert end(0, lr=-1) == [bad_rate]
    assert end(1, lr=-1) == ["waited", bad_rate]  # If the first does not say the same meanwhile.
    assert end(1, BadInput("its own")) == ["its own"]  # They have met: it is this one's alone.
    assert end(1, Elsewhere("process 0 has failed")) == ["waited"]
    assert end(1, late) == []
    assert end(1, RuntimeError("a script's own")) == ["a script's own"]


def test_a_killed_process_ends_all_with_one_sentence(images, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "genfast",
        "train", "vae", "--data", images, "--nz", "3", "--epochs", "1000000", "--batch-size", "4",
        "--out", str(out), "--device", "cpu", "--quiet",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            ends = time.monotonic() + 100
            while not (out / "checkpoint.pt").exists() and time.monotonic() < ends:
                time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            first, second = sorted(map(int, children.split()), key=_rank)
            os.kill(second, signal.SIGKILL)
            killed = time.monotonic()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - killed < 60
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if "genfast:" in line]
    assert len(lines) == 1, errors
    assert "but one has ended or cannot be reached; the last good checkpoint is" in lines[0]
    assert read_checkpoint(out / "checkpoint.pt")["steps"] >= 1


def _rank(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v.partition(b"=")[2]) for v in variables if v.startswith(b"RANK="))
