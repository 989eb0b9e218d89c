"""Encoding, sampling and evaluation that are stopped: what is whole stays, and docs/faults.md says so."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import dataloader

import evaluate
import sample_ddp
from autoencoders import save_autoencoder
from commands import FEW_STEPS, Colours
from evaluation import sides
from faults import end_of, in_call, reader, send
from images import encode, latents
from images.samples import write_npz
from machine import stops


@pytest.fixture
def shards(tmp_path, photos):
    vae = save_autoencoder(tmp_path / "vae", levels=3, channels=4)
    flags = ["--data-path", photos, "--vae", vae, "--out", tmp_path / "l", "--image-size", 8, "--shard-size", 10]
    return encode.parse_args([*map(str, flags), "--device", "cpu", "--num-workers", "1"])


@pytest.mark.parametrize("end", [75, "ended by SIGKILL"])
def test_an_encoder_keeps_its_whole_shards(shards, tmp_path, monkeypatch, capfd, end):
    def write(path, *rest, write=latents.write_shard):
        if path.name == "00001.safetensors":
            send(signal.SIGTERM)() if end == 75 else send(signal.SIGKILL, to=reader)()
        return write(path, *rest)

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    monkeypatch.setattr(latents, "write_shard", write)
    monkeypatch.setattr(shards, "batch_size", 1)  # so many batches are not read ahead
    how = end_of(encode.encode, shards)
    assert how == 75 if end == 75 else end in how
    kept = 1 if end == 75 else 2
    assert sorted(os.listdir(tmp_path / "l")) == [*(f"0000{i}.safetensors" for i in range(kept)), "latents.json"]
    monkeypatch.undo()
    stops.received.clear()
    assert end_of(encode.encode, shards) == 0
    assert f"Encoding {4 - kept} of 4 shards" in capfd.readouterr().out


def test_a_stopped_sampler_keeps_its_whole_images(tmp_path, monkeypatch, capfd, checkpoint):
    def save(pixels, path, save=sample_ddp.save_png):
        if path.name == "000002.png":
            in_call(os, "replace", send(signal.SIGTERM))(monkeypatch)
        return save(pixels, path)

    monkeypatch.setattr(sample_ddp, "save_png", save)
    flags = ["--ckpt", checkpoint(), "--sample-dir", tmp_path / "s", *FEW_STEPS, "--num-fid-samples", 4]
    assert end_of(sample_ddp.main, sample_ddp.parse_args(list(map(str, flags)))) == 75
    assert "stopped by SIGTERM" in capfd.readouterr().err
    (folder,) = (tmp_path / "s").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "000001.png", "settings.json"]


def test_a_stopped_evaluation_says_so(tmp_path, monkeypatch, capfd):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    write_npz(tmp_path / "a.npz", pixels, len(pixels))
    monkeypatch.setattr(evaluate, "open_network", lambda *_: Colours())
    in_call(sides, "features_of", send(signal.SIGINT))(monkeypatch)
    args = [str(tmp_path / "a.npz")] * 2 + ["--json", str(tmp_path / "out.json"), "--device", "cpu"]
    assert end_of(evaluate.main, evaluate.parse_args(args)) == 75
    assert capfd.readouterr().err.splitlines()[-1].endswith(": stopped by SIGINT")
    assert not Path(tmp_path / "out.json").exists()
