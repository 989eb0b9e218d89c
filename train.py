"""Trains a DiT, with attention or another mixer, on one process or, under torchrun, on many:

    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /imagenet/train
    python train.py --model DiT-N/2 --mixer pdessm --vae none --image-size 8 --num-classes 10      (digits, no data needed)

All randomness is tied to images and steps, not to processes: the number of processes changes only rounding.
"""

import argparse
import logging
from functools import partial
from itertools import islice
from time import perf_counter

import torch
from torch.utils.data import ConcatDataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from checkpoints import resume
from checkpoints.build import check_recognised
from checkpoints.read import average_of_length
from diffusion import add_objective_flags, create_objective, objective_settings
from evaluation.features import NETWORKS
from images.autoencoder import open_space
from images.dataset import CHECK, check_readable, worker_count
from images.dataset import center_crop_arr as center_crop_arr
from images.latents import CachedLatents
from images.named import DATASETS
from machine.cost import peak_flops, training_flops
from machine.flags import USE, Default, group, not_negative, positive, probability
from machine.precision import allow_tf32, be_deterministic, compile_blocks, in_precision
from machine.processes import launch
from machine.stops import postponed, received
from mixers import MIXERS, add_mixer_flags
from mixers.running import add_speed_flags, choose_backend
from models import MODELS, add_network_flags, families, model_name, network_options
from training import runs
from training.batches import BadImages, batches, draw_batch, images_of_step, make_loader, open_images
from training.checks import check
from training.learner import accumulate_gradients, create_learner, only_the_scale_falls, replicate, start_from, update
from training.probe import open_probe
from training.runs import log_to
from training.schedule import add_learning_flags, learning_rate
from training.trackers import TRACKERS
from training.watching import Watch

logger = logging.getLogger("train")


def main(args, processes):
    """Trains as the flags say, or goes on with a run that was stopped. Every process calls it."""
    device, leads = processes.device, processes.rank == 0
    set_up(processes, args.tf32, args.deterministic)
    space = open_space(args.vae)
    dataset, held_out = open_images(args.data_path, args.val_path, args.image_size, args.uncond, args.dataset, processes)
    check(args, processes, dataset, held_out, space)
    settings, how = vars(args) | settings_of(dataset, args.dataset, args.num_classes, processes), objective_settings(vars(args))
    workers = worker_count(args.num_workers, args.data_path)
    if args.check_data:
        most = None if isinstance(dataset, CachedLatents) else args.max_bad_images
        both = ConcatDataset([images for images in (dataset, held_out) if images])
        check_readable(both, processes, logger.warning, workers, most)
    compared = args.data_path, args.val_path, args.image_size, args.dataset
    probe = open_probe(*compared, args.features, args.weights, processes) if args.probe_every else None
    if args.sample_every or probe or not all(isinstance(images, CachedLatents) for images in (dataset, held_out) if images):
        space.load(device)
    settings["vae_digest"] = dataset.index["vae_digest"] if isinstance(dataset, CachedLatents) else space.digest()

    model = build_model(settings, space)
    model.trained_classes, model.class_names = dataset.num_classes, settings["class_names"]
    cost = training_flops(model, args.global_batch_size), peak_flops(device, args.precision, args.tf32)
    choose_backend(args.backend, model, device)  # after the count, which runs on the meta device, where no kernel does

    run = resume.find_run(args.resume, args.results_dir, args.model, processes)
    changes = resume.check_changes(run, settings, flags(), args.allow_changes) if run else []
    first, folder, before = (run["step"], run["folder"], run["args"]) if run else (0, None, {})
    bad = BadImages(before.get("bad_images", []), args.max_bad_images)
    settings |= dict(bad_images=bad.known) | resume.begun_with(before or settings)
    loader = make_loader(bad.replaced_in(dataset), args.global_batch_size, args.global_seed, processes, workers)
    total = min(args.epochs * len(loader), args.max_steps or args.epochs * len(loader))
    rate = learning_rate(args.lr, args.warmup_steps, args.lr_schedule, total)
    watch = Watch(space, args.objective, how, bad, held_out, args.sample_every, probe, args.probe_every)
    seen = processes.share(runs.seen_at(folder, first) if run and leads else set())
    if run and first >= total and not watch.due(first, True) - seen:
        logger.info(f"Done! All {total:,} steps were done before: {run['path']}")
        return

    begun_from = start_from(args.init_from, model, settings, processes) if args.init_from and not run else []
    folder = processes.share(runs.open_folder(folder, args.results_dir, args.model) if leads else None)
    with runs.removed_on_failure(folder if leads and not run else None):
        runs.describe(model, begun_from, dataset, held_out, args.data_path, probe)
        conditions, otherwise = resume.record_rounding(run, settings, processes)
        learner = begin(args, model, run, changes, otherwise, rate, processes)
        replica = replicate(learner.model, processes)  # outside `postponed`, so that a signal still ends the run at once
        track = TRACKERS[args.tracker](folder, settings, first) if args.tracker and leads else None
    journal, saved = runs.Journal(folder, leads, track), {first}

    def save(alone=False):
        if learner.step not in saved:  # a signal may come right after a checkpoint
            saved.add(learner.step)  # marked before writing, so that a failed checkpoint is not tried again
            with postponed():
                path = resume.save_run(folder, learner, settings, processes, conditions, alone)
                if leads:
                    with runs.best_effort("Deleting older checkpoints"):
                        resume.delete_older(folder, learner.step, args.keep_last, args.keep_every)
                logger.info(f"Saved checkpoint to {path}")

    network = in_precision(replica, args.precision, device)
    objective = create_objective(args.objective, **how)
    shared = dict(seed=args.global_seed, batch_size=args.global_batch_size, processes=processes, chances=model.random_numbers)
    shared |= dict(flip=dataset.flip, space=space, objective=objective, dropout=args.class_dropout or 0.1)

    def loss_of(images, labels, step, part):
        batch = draw_batch(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), step, part, **shared)
        return objective.training_losses(network, **batch)["loss"].mean() / args.grad_accum

    backward = partial(accumulate_gradients, learner.scaler, replica, loss_of, args.grad_accum)
    average = next(iter(learner.averages.values()))
    if run:
        watch.show(first, average, True, processes, journal, seen)  # a kill may have come before these
    runs.describe_steps(total, loader, args.global_batch_size, args.grad_accum, processes)
    with resume.rescue(learner, save), postponed(processes.size > 1):  # a single process stops at once, not after its step
        reader = islice(batches(loader, first, processes, save, bad), max(total - first, 0))
        progress = tqdm(reader, total=total, initial=first, unit="step", mininterval=0.5, disable=not leads)
        for step in train(args, processes, learner, backward, loader, progress, cost, journal, save):
            if step % args.ckpt_every == 0 or step == total:
                save()
            watch.show(step, average, step in saved, processes, journal)
    logger.info("Done!")


def train(args, processes, learner, backward, loader, progress, cost, journal, save):
    """Takes a step for each batch of progress, logs it, and yields its number; what the caller then does is not in the speed
    that is logged. backward(images, labels, step) computes gradients and returns the loss on this process."""
    losses, skipped, start = [], 0, perf_counter()
    for step, (images, labels) in enumerate(progress, start=learner.step + 1):
        loss = processes.mean(backward(images, labels, step))
        if update(learner, loss, step, args.max_grad_norm, args.ema_warmup):
            losses.append(loss)
            skipped = 0
        elif only_the_scale_falls(learner, loss):
            runs.log_scale(step, learner.scaler.get_scale(), journal.write_row)
        else:
            skipped += 1
            numbers = images_of_step(step, loader, args.global_batch_size, args.global_seed)
            runs.log_skipped(step, skipped, numbers, journal.write_row)
            if skipped == args.max_skipped:
                save()
                raise runs.too_many_skipped(step, skipped, numbers)
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if step % args.log_every == 0 or step == progress.total:
            runs.log_interval(step, losses, perf_counter() - start, cost, processes, journal.write_row, learner.rate)
            losses, start = [], perf_counter()
        paused = perf_counter()
        yield step
        start += perf_counter() - paused
    received.clear()  # ignore signals that came to one of several processes during the last step


def set_up(processes, tf32, deterministic):
    """Turns logging on for the first process, and sets PyTorch's precision and determinism as the flags say."""
    if processes.rank == 0:
        logger.setLevel(logging.INFO)
    allow_tf32(tf32)
    if deterministic:
        be_deterministic()


def settings_of(dataset, named, num_classes, processes):
    """Returns the settings that the images decide. ValueError if processes see different images."""
    class_names, data = dataset.classes if dataset.num_classes else None, dataset.fingerprint()
    if processes.any(data != processes.share(data))[0]:
        raise ValueError("the processes do not see the same images: --data-path differs from one machine to another")
    num_classes = dataset.num_classes if named or not dataset.num_classes else int(num_classes)
    return dict(num_classes=num_classes, class_names=class_names, data=data)


def build_model(settings, space):
    """Returns the model of a run's settings with its initial weights, the same on every process."""
    torch.manual_seed(settings["global_seed"])
    model = MODELS[settings["model"]](
        settings["image_size"] // space.factor,
        in_channels=space.channels,
        num_classes=settings["num_classes"],
        learn_sigma=settings["objective"] == "diffusion",
        mixer=settings["mixer"],
        **network_options(settings["model"], settings["mixer"], settings),
    )
    check_recognised(model, settings["model"], settings["mixer"])
    return model


def begin(args, model, run, changes, otherwise, rate, processes):
    """Returns the learner of a new run, or of a resumed one, whose folder then drops everything after the checkpoint."""
    if args.grad_checkpointing:
        model.checkpoint_gradients()
    sharded, float16 = args.parallel == "fsdp", args.precision == "fp16"
    adam = dict(betas=args.adam_betas, weight_decay=args.weight_decay, lr_coefficients=args.lr_coefficients)
    averages = [*args.ema_decay, *map(average_of_length, args.ema_lengths or [])]
    learner = create_learner(model, processes, args.lr, averages, args.ema_device, sharded, float16, **adam)
    learner.rate = rate
    if args.compile:
        compile_blocks(getattr(model, "blocks", [model]))
    if run:
        resume.restore(learner, run)
        if processes.rank == 0:
            runs.forget_rows_after(run["folder"], run["step"])
            resume.delete_half_written(run["folder"])
        logger.info("; ".join([f"Going on after step {run['step']:,}, from {run['path']}", *changes]))
        if otherwise:
            logger.info(otherwise)
    return learner


def flags():
    """Returns the parser of this command's flags. Those that are added by `vary` may change when a run goes on."""
    parser = argparse.ArgumentParser(
        description="Train a DiT.", usage=USE, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add, vary = group(parser, "images")
    add("--data-path", help="folder of images, one folder per class, or of CIFAR-10; without it, the digits of scikit-learn")
    add("--dataset", choices=DATASETS, help="which of the papers' data sets --data-path holds; checks that it is whole")
    vary("--check-data", action="store_true", help=CHECK)
    more = "replace up to N unreadable images by the next of their class, and name them; one more ends the run, after saving"
    vary("--max-bad-images", type=not_negative, default=0, metavar="N", help=more)
    vary("--val-path", help="held-out images of the same classes (or CIFAR-10), whose loss is logged with every checkpoint")
    add("--image-size", type=positive, default=256, help="side to which images are cropped, in pixels")
    add("--num-classes", type=positive, default=Default(1000), help="of the images; a --dataset brings its own")
    add("--uncond", action="store_true", help="train without classes; the folder then needs no class folders")
    add("--class-dropout", type=probability, metavar="P", help="share of images without class, for guidance; 0.1 unless given")
    vary("--num-workers", type=not_negative, default=4, help="processes that read images, per process; at most one per core")
    add, vary = group(parser, "network")
    add("--model", type=model_name, metavar="NAME", default="DiT-XL/2", help=f"one of {families()}")
    add("--mixer", choices=MIXERS, default="attention", help="what mixes the tokens; pdessm: see --pde-coupling")
    add_mixer_flags(add, conditioned=True)
    add_network_flags(add)
    add("--init-from", metavar="CKPT", help="begin with what fits of a checkpoint, with other classes, mixer or size")
    add("--vae", default="ema", help="autoencoder: ema, mse, a local folder, or none to work on pixels")
    add, vary = group(parser, "learning")
    add_objective_flags(add)
    vary("--epochs", type=positive, default=1400)
    vary("--max-steps", type=positive, help="stop after this many steps, if that comes before the last epoch's end")
    add("--global-batch-size", type=positive, default=256, help="over all processes")
    add("--global-seed", type=not_negative, default=0)
    add_learning_flags(add, vary)
    add, vary = group(parser, "machine")
    vary("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    add_speed_flags(add)
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="faster float32 products, with rounding of 1e-3")
    vary("--parallel", choices=("ddp", "fsdp"), default="ddp", help="every process holds the model, or a part (FSDP2)")
    vary("--grad-checkpointing", action="store_true", help="compute blocks twice instead of keeping their values: less memory")
    vary("--grad-accum", type=positive, default=1, metavar="PARTS", help="of a process's batch, one at a time: less memory")
    vary("--ema-device", choices=["cpu"], help="keep the averages in CPU memory; by default they are where the model is")
    add, vary = group(parser, "folder")
    vary("--results-dir", default="results", help="where the experiment's folder goes")
    vary(
        "--resume", metavar="auto|PATH", help="go on with a stopped run: an experiment's folder or a checkpoint in it; auto is "
        "the last experiment of this model in --results-dir, or a new one if there is none",
    )  # fmt: skip
    vary("--allow-changes", action="store_true", help="let --resume go on with other settings")
    vary("--ckpt-every", type=positive, default=50_000, help="steps; the last step is always saved")
    vary("--keep-last", type=positive, metavar="K", help="keep the newest K checkpoints only; all unless given")
    vary("--keep-every", type=positive, metavar="STEPS", help="with --keep-last: also keep, for good, a checkpoint every STEPS")
    add, vary = group(parser, "what a run shows")
    vary("--log-every", type=positive, default=100, help="steps")
    vary("--sample-every", type=positive, metavar="STEPS", help="draw a grid of samples; none unless given")
    vary("--probe-every", type=positive, metavar="STEPS", help="Frechet distance of a few samples; none unless given")
    vary("--features", choices=NETWORKS, default=NETWORKS[0], help="network of --probe-every")
    vary("--weights", metavar="FILE", help="of Inception for --probe-every; by default the file in PyTorch's hub cache")
    vary("--tracker", choices=TRACKERS, help="show numbers and samples there too; wandb is offline unless logged in")
    return parser


def parse_args(argv=None):
    return flags().parse_args(argv)


if __name__ == "__main__":
    log_to(logging.StreamHandler())
    with logging_redirect_tqdm([logger]):  # above the progress bar, not across it
        launch(main, parse_args())
