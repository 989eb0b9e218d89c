"""How a folder of latents begins, and how those without classes train."""

import json
import multiprocessing
import os
import time

import pytest

import train
from autoencoders import save_autoencoder
from checkpoints.read import read_checkpoint
from commands import ALONE, in_forks
from images import encode
from images.latents import claim_folder, read_index

MADE_OF = dict(vae="ema", vae_digest="2f", source="digits", image_size=8, images=1, names=None, num_classes=0, classes=None)
MADE_OF |= dict(flip=False, shape=[4, 1, 1], shard_size=1)


def test_of_encoders_that_begin_at_once_one_works_and_its_index_stays(tmp_path, monkeypatch, one_thread):
    both = multiprocessing.get_context("fork").Barrier(2)

    def run(rank):
        monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.2 + rank))  # one is slower in writing its index
        index, status = MADE_OF | dict(image_size=8 + rank), 0
        both.wait()
        try:
            claim = claim_folder(tmp_path / "a", index)  # noqa: F841  until both have tried
        except ValueError as error:
            status = 1 if "another process is at work in" in str(error) else 2
        both.wait()
        os._exit(status or 3 * (read_index(tmp_path / "a") != index))

    assert sorted(in_forks(2, run)) == [0, 1]


@pytest.mark.parametrize("text", ["", '{"vae": "em'])
def test_an_index_that_a_kill_cut_short_is_written_again_unless_there_are_shards(tmp_path, text):
    (tmp_path / "latents.json").write_text(text)
    (tmp_path / "00000.safetensors").touch()
    with pytest.raises(ValueError, match=r"latents\.json is no index of cached latents"):
        claim_folder(tmp_path, MADE_OF)
    assert (tmp_path / "latents.json").read_text() == text
    (tmp_path / "00000.safetensors").unlink()
    claim_folder(tmp_path, MADE_OF).close()
    assert json.loads((tmp_path / "latents.json").read_text()) == MADE_OF


@pytest.mark.parametrize("uncond", [[], ["--uncond"]])
def test_latents_without_classes_train_without_and_the_log_says_so(tmp_path, photos, uncond):
    """Also beside held-out images that have classes."""
    flags = ["--vae", save_autoencoder(tmp_path / "vae", levels=3, channels=4), "--image-size", "16", "--num-workers", "0"]
    flags += ["--device", "cpu"]
    out, results = tmp_path / "a", tmp_path / "r"
    encode.encode(encode.parse_args(["--data-path", photos, "--out", str(out), "--uncond", *flags]), ALONE)
    flags += ["--model", "DiT-N/4", "--data-path", str(out), "--val-path", photos, "--results-dir", str(results)]
    flags += ["--global-batch-size", "8", "--max-steps", "1", *uncond]
    why = "to --uncond, which trains without classes" if uncond else "here: the images have no classes"
    with pytest.raises(ValueError, match=f"^--class-dropout means nothing {why}$"):
        train.main(train.parse_args([*flags, "--class-dropout", "0.2"]), ALONE)
    train.main(train.parse_args(flags), ALONE)
    (folder,) = results.iterdir()
    assert read_checkpoint(folder / "checkpoints" / "0000001.pt")["args"]["num_classes"] == 0
    log = (folder / "log.txt").read_text()
    assert log.count("The latents have no classes, so that the model learns none, as with --uncond") == (not uncond)
    assert "Held-out Loss" in log
