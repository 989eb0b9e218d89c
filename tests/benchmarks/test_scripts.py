"""The shell scripts of reproduce/, stopped, started again, or given what cannot be, with a pretender in place of Python."""

from test_reproduce import PRETENDER, commands_of, run_script

import train


def test_what_was_stopped_after_its_last_checkpoint_is_trained_to_its_end(tmp_path):
    """Since the held-out loss of a checkpoint is logged after it."""
    (tmp_path / "runs" / "DiT-0" / "000" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "DiT-0" / "000" / "checkpoints" / "0000002.pt").touch()
    flags = dict(SCALE="small", STEPS="2")
    commands = commands_of("table1_cifar10.sh", tmp_path, ONLY="DiT", **flags)
    assert [c[0] for c in commands] == ["-c", "evaluate.py", "train.py", "sample_ddp.py", "evaluate.py", "-m", "-m"]
    flags = dict(SIZES="N", MIXERS="pdessm", STEPS="2", WORK=str(tmp_path / "scaling"))
    for names in (["train.py", "-m"], ["-m"]):
        commands = commands_of("scaling.sh", tmp_path, **flags)
        assert [c[0] for c in commands] == names
    next(tmp_path.glob("scaling/*/trained-2")).unlink()
    train.parse_args(commands_of("scaling.sh", tmp_path, **flags)[0][1:])


def test_runs_that_have_gone_on_are_not_sampled_earlier(tmp_path):
    """By sample_ddp.py --ckpt "", which would fetch the public DiT-XL/2."""
    (tmp_path / "python").write_text(PRETENDER.replace('int(flags["--max-steps"])', "400"))
    (tmp_path / "python").chmod(0o755)
    flags = dict(PYTHON=str(tmp_path / "python"), SEEN=str(tmp_path / "seen"), SCALE="small", ONLY="DiT", STEPS="200")
    done = run_script("table1_cifar10.sh", tmp_path, tmp_path, **flags)
    assert done.returncode == 2
    assert "DiT-0 was trained for more than STEPS=200 and has no checkpoint there: give another WORK" in done.stderr
    assert "sample_ddp" not in (tmp_path / "seen").read_text()


def test_another_reference_is_another_evaluation(tmp_path):
    flags = dict(SCALE="small", ONLY="DiT")
    commands_of("table1_cifar10.sh", tmp_path, **flags)
    flags["REFERENCE"] = str(tmp_path / "all.npz")
    (tmp_path / "all.npz").touch()
    anew, nothing = ["-c", "sample_ddp.py", "evaluate.py", "-m", "-m"], ["-c", "-m"]
    for expected in (anew, nothing):
        assert [c[0] for c in commands_of("table1_cifar10.sh", tmp_path, **flags)] == expected
    next((tmp_path / "runs" / "DiT-0").glob("recorded*")).write_text("")   # as it was before it named the reference
    assert [c[0] for c in commands_of("table1_cifar10.sh", tmp_path, **flags)] == nothing
