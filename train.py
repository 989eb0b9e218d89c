"""Trains a DiT, with attention or another mixer, on one process or, under torchrun, on many:

    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /imagenet/train
    python train.py --model DiT-N/2 --mixer pdessm --vae none --image-size 8 --num-classes 10      (digits, no data needed)

All randomness belongs to images and steps, not to processes: the number of processes changes only rounding.
"""

import argparse
import json
import logging
import os
from copy import deepcopy
from functools import partial
from itertools import count, islice
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import sample
from checkpoint import initialize, save_checkpoint
from data import DATASETS, center_crop_arr, load_dataset, positive  # noqa: F401  (scripts take center_crop_arr from here)
from diffusion import OBJECTIVES, PATHS, TIMES, create_objective
from diffusion.samplers import PerImageNoise, image_seeds
from download import find_checkpoint
from latents import CachedLatents
from mixers import MIXERS
from models import MODELS, stride
from parallel import launch
from pde_ssm import COUPLINGS, TERMS
from tracker import TRACKERS
from vae import draw_latents, open_space

EMA_DECAY = 0.9999
HELD_OUT = 2560  # images of --val-path that a validation loss takes
SAMPLING_STEPS = 50  # of the samples that training shows
logger = logging.getLogger("train")


def main(args, processes):
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.manual_seed(args.global_seed)         # the same initial weights on every process
    device = processes.device
    space = open_space(args.vae)
    if args.dataset and processes.rank > 0:
        processes.barrier()  # rank 0 looks first: what it makes of a set's files, the others find
    dataset, held_out = load_dataset(args.data_path, args.image_size, args.uncond, name=args.dataset), None
    if args.val_path:
        held_out = load_dataset(args.val_path, args.image_size, args.uncond, held_out=True, name=args.dataset)
    if args.dataset and processes.rank == 0:
        processes.barrier()
    if args.dataset or not dataset.num_classes:
        args.num_classes = dataset.num_classes
    check(args, processes, dataset, held_out, space)

    model = MODELS[args.model](
        input_size=args.image_size // space.factor,
        in_channels=space.channels,
        num_classes=args.num_classes,
        learn_sigma=args.objective == "diffusion",
        mixer=args.mixer,
        **mixer_options(args),
    )
    begun_from = start_from(args.init_from, model, processes) if args.init_from else []
    folder = track = None
    if processes.rank == 0:
        folder = create_experiment(args)
        track = TRACKERS[args.tracker](folder, vars(args)) if args.tracker else None
        logger.info(f"Experiment directory created at {folder}")
    logger.info(f"DiT Parameters: {sum(p.numel() for p in model.parameters()):,}")
    for line in begun_from:
        logger.info(line)
    classes = f" of {dataset.num_classes} classes" if dataset.num_classes else ""
    logger.info(f"Dataset contains {len(dataset):,} images{classes} ({args.data_path or 'digits'})")
    write_row = partial(append_row, folder, track)
    if args.sample_every or not all(isinstance(images, CachedLatents) for images in (dataset, held_out) if images):
        space.load(device)

    model.to(device).train()
    ema = deepcopy(model).eval().requires_grad_(False)
    replica = DistributedDataParallel(model) if processes.size > 1 else model
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    objective = create_objective(args.objective, path=args.path or "linear", times=args.times or "uniform")
    loader = make_loader(dataset, args, processes)
    total = min(args.epochs * len(loader), args.max_steps or args.epochs * len(loader))

    def save(step):
        if processes.rank == 0:
            path = folder / "checkpoints" / f"{step:07d}.pt"
            contents = dict(model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), args=vars(args))
            save_checkpoint(path, **contents)
            logger.info(f"Saved checkpoint to {path}")

    logger.info(f"Training for {total:,} steps ({total / len(loader):.1f} epochs) on {processes.size} x {device.type}...")
    losses, start = [], perf_counter()
    progress = tqdm(islice(epochs(loader, save), total), total=total, unit="step", mininterval=0.5, disable=processes.rank > 0)
    for step, (images, labels) in enumerate(progress, start=1):
        batch = draw_batch(images.to(device), labels.to(device), step, args, processes, dataset.flip, space, objective)
        loss = objective.training_losses(replica, **batch)["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model, step)

        losses.append(loss.detach())
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if step % args.log_every == 0 or step == total:
            log_interval(step, losses, perf_counter() - start, args, processes, write_row)
            losses, start = [], perf_counter()
        if step % args.ckpt_every == 0 or step == total:
            save(step)
            if held_out:
                log_held_out(step, held_out_loss(ema, held_out, args, processes, space), processes, write_row)
        if args.sample_every and step % args.sample_every == 0:
            draw_samples(step, ema, args, processes, space, folder, track)
    logger.info("Done!")


def check(args, processes, dataset, held_out, space):
    """ValueError for settings that cannot work together."""
    least = stride(args.model) * space.factor
    if args.image_size % least:
        parts = f"{stride(args.model)} of {args.model}" + (f" x {space.factor} of the VAE" if space.factor > 1 else "")
        raise ValueError(f"--image-size {args.image_size} is not divisible by {least} ({parts})")
    if args.global_batch_size % processes.size:
        raise ValueError(f"--global-batch-size {args.global_batch_size} is not divisible by {processes.size} processes")
    if len(dataset) < args.global_batch_size:
        raise ValueError(f"the {len(dataset)} images do not fill one batch of --global-batch-size {args.global_batch_size}")
    if dataset.num_classes > args.num_classes:
        raise ValueError(f"the images are of {dataset.num_classes} classes, more than --num-classes {args.num_classes}")
    for latents in (images for images in (dataset, held_out) if isinstance(images, CachedLatents)):
        latents.check_vae(args.vae)
    if args.objective != "flow" and (args.path or args.times):
        raise ValueError("--path and --times mean nothing without --objective flow")
    if held_out:
        names = [images.classes for images in (held_out, dataset)]
        if dataset.num_classes and names[0] != names[1]:
            raise ValueError(f"--val-path has other classes ({names[0]}) than --data-path ({names[1]})")
        if len(held_out) < processes.size:
            raise ValueError(f"the {len(held_out)} images of --val-path are fewer than the {processes.size} processes")


def mixer_options(args):
    """The --pde-* flags that were given, as options of the mixer."""
    given = {name: value for name, value in vars(args).items() if name.startswith("pde_") and value not in (None, False)}
    if given and args.mixer == "attention":
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{flags} means nothing to --mixer attention")
    return {name.removeprefix("pde_"): value for name, value in given.items()}


def start_from(checkpoint, model, processes):
    """Initial weights for fine-tuning; returns what to say about it."""
    if processes.rank == 0:
        find_checkpoint(checkpoint)  # if it must be fetched, then once
    processes.barrier()
    return initialize(model, find_checkpoint(checkpoint))


def make_loader(dataset, args, processes):
    """This process's share of every global batch; an epoch's order is the same for any number of processes."""
    sampler = DistributedSampler(dataset, processes.size, processes.rank, seed=args.global_seed, drop_last=True)
    workers = min(args.num_workers, os.cpu_count() or 1) if args.data_path else 0
    return DataLoader(
        dataset,
        batch_size=args.global_batch_size // processes.size,
        sampler=sampler,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=processes.device.type == "cuda",
    )


def epochs(loader, save):
    """Batches without end, in a new order every epoch. If one cannot be read, what was learnt until then is saved."""
    step = 0
    for epoch in count():
        logger.info(f"Beginning epoch {epoch}...")
        loader.sampler.set_epoch(epoch)
        try:
            for batch in loader:
                yield batch
                step += 1
        except OSError:
            if step:
                save(step)
            raise


def draw_batch(images, labels, step, args, processes, flip, space, objective):
    """The arguments of training_losses, with everything random drawn from a generator per image.

    The n-th image that a run sees gets the n-th generator, whichever process it lands on.
    """
    first = (step - 1) * args.global_batch_size + processes.rank
    numbers = range(first, first + len(images) * processes.size, processes.size)
    noise = PerImageNoise(image_seeds(args.global_seed, numbers, "training"), images.device)
    mirrored, dropped, time = noise.rand(3).unbind(1)
    x = to_space(images, (mirrored < 0.5) & flip, noise, space)
    t = objective.draw_times(time)
    model_kwargs = dict(y=labels, drop=dropped < 0.1)
    return dict(x_start=x, t=t, model_kwargs=model_kwargs, noise=noise(x))


def to_space(images, mirrored, noise, space):
    """What the model sees of images (B, 3, H, W), those of mirrored (B,) bool turned around, or of their cached moments
    (B, flips, 2, C, h, w)."""
    if images.dim() == 6:
        moments = torch.where(mirrored[:, None, None, None, None], images[:, -1], images[:, 0])
        return draw_latents(moments, noise.randn(*moments.shape[2:]))
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    side = images.shape[2] // space.factor
    return space.encode(images, noise.randn(space.channels, side, side) if space.factor > 1 else None)


@torch.no_grad()
def held_out_loss(model, dataset, args, processes, space):
    """The mean of every term of the loss over up to HELD_OUT images, spread over the data set: a dict of floats.

    Noise and timesteps are the same in every call of every run, the timesteps evenly spread, so that two models or
    two steps of one differ by nothing else.
    """
    objective = create_objective(args.objective, path=args.path or "linear")
    n = min(len(dataset), HELD_OUT)
    sums = {}
    mine = range(processes.rank, n, processes.size)
    for start in range(0, len(mine), 64):
        numbers = mine[start : start + 64]
        images, labels = zip(*(dataset[number * len(dataset) // n] for number in numbers))
        noise = PerImageNoise(image_seeds(0, numbers, "validation"), processes.device)
        images, labels = torch.stack(images).to(processes.device), torch.tensor(labels, device=processes.device)
        x = to_space(images, torch.zeros(len(images), dtype=torch.bool, device=images.device), noise, space)
        # A prime that divides no n: a permutation, so that timesteps have nothing to do with an image's place in the set.
        shuffled = torch.tensor([number * 1_000_003 % n for number in numbers], device=processes.device)
        t = objective.draw_times((shuffled + noise.rand()) / n)
        losses = objective.training_losses(model, x, t, dict(y=labels), noise(x))
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.sum(dtype=torch.float64)
    total = torch.stack(list(sums.values())).float()
    if processes.size > 1:
        dist.all_reduce(total)
    return dict(zip(sums, (total / n).tolist()))


def update_ema(ema, model, step):
    """One step of the average, with a decay that rises to EMA_DECAY, lest short runs average their initial weights."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)


def create_experiment(args):
    """A new folder results/<index>-<model>, with a copy of the log in it."""
    root = Path(args.results_dir)
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(entry.name[:3]) for entry in root.iterdir() if entry.name[:3].isdigit()]
    for index in count(max(taken, default=-1) + 1):
        folder = root / f"{index:03d}-{args.model.replace('/', '-')}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue  # another run took it just now
    (folder / "checkpoints").mkdir()
    log_to(logging.FileHandler(folder / "log.txt"))
    logger.setLevel(logging.INFO)
    return folder


def log_to(handler):
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)


def log_interval(step, losses, seconds, args, processes, write_row):
    """The mean loss over all processes and the speed since the last line, as text and as a line of JSON."""
    loss = torch.stack(losses).mean()
    if processes.size > 1:
        dist.all_reduce(loss)
    if processes.rank == 0:
        row = dict(step=step, loss=loss.item() / processes.size, steps_per_sec=len(losses) / seconds)
        logger.info(f"(step={step:07d}) Train Loss: {row['loss']:.4f}, Train Steps/Sec: {row['steps_per_sec']:.2f}")
        write_row(row)


def log_held_out(step, losses, processes, write_row):
    if processes.rank == 0:
        logger.info(f"(step={step:07d}) Held-out Loss: {losses['loss']:.4f}")
        write_row(dict(step=step) | {f"held_out_{name}": loss for name, loss in losses.items()})


def append_row(folder, track, row):
    with open(folder / "log.jsonl", "a") as file:
        print(json.dumps(row), file=file)
    if track:
        track(row["step"], {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))})


def draw_samples(step, ema, args, processes, space, folder, track):
    """A grid of samples from the averaged weights, the same noise at every step: what sample.py draws of a checkpoint.

    It leaves the random numbers of training as they are. All processes draw, as they would have to wait anyway.
    """
    settings = sample.parse_args(["--num-sampling-steps", str(SAMPLING_STEPS)])
    objective, sampler = sample.create_sampler(settings, dict(objective=args.objective, path=args.path or "linear"))
    classes, guidance = sample.class_labels(settings, ema.num_classes), sample.read_guidance(settings)
    labels = [label for label in classes for _ in range(max(16 // len(classes), 1))]
    images = sample.draw(ema, space, objective, sampler, labels, settings.seed, guidance, progress=False)
    if processes.rank == 0:
        path = folder / "samples" / f"{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        sample.save_grid(images, path, columns=4)
        logger.info(f"(step={step:07d}) {len(labels)} samples are in {path}")
        if track:
            track(step, {}, path)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train a DiT.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data-path", help="folder of images, one folder per class, or of CIFAR-10; without it, the digits of scikit-learn")
    add("--dataset", choices=DATASETS, help="which of the paper's data sets --data-path holds; checks that it is whole")
    add("--val-path", help="held-out images of the same classes (or CIFAR-10), whose loss is logged with every checkpoint")
    add("--results-dir", default="results", help="where the experiment's folder goes")
    add("--model", choices=MODELS, metavar="NAME", default="DiT-XL/2", help=f"one of {', '.join(MODELS)}")
    add("--mixer", choices=MIXERS, default="attention", help="what mixes the tokens")
    add("--pde-coupling", choices=COUPLINGS, help="which channels of --mixer pdessm share a PDE; diagonal unless given")
    add("--pde-groups", type=positive, help="groups of channels that share one")
    add("--pde-state-dim", type=positive, help="channels of the PDE, the hidden size unless given")
    add("--pde-expand", type=float, help="the same, as a multiple of the hidden size")
    add("--pde-terms", nargs="+", choices=TERMS, metavar="TERM", help=f"some of {', '.join(TERMS)}; all unless given")
    add("--pde-components", type=positive, help="PDEs per channel, whose states are summed (not in the paper)")
    add("--pde-activation", action="store_true", help="silu before the PDE (not in the paper)")
    add("--pde-gate", action="store_true", help="multiply by a gate, project back (not in the paper)")
    add("--pde-conditioned", action="store_true", help="let timestep and class scale the PDE's time (not in the paper)")
    add("--init-from", metavar="CKPT", help="begin with what fits of a checkpoint, with other classes, mixer or size")
    add("--objective", choices=OBJECTIVES, default="diffusion", help="diffusion as in DiT, or flow matching")
    add("--path", choices=PATHS, help="of flow matching, from noise to image; linear unless given")
    add("--times", choices=TIMES, help="how flow matching draws its times; uniform unless given")
    add("--vae", default="ema", help="autoencoder: ema, mse, a local folder, or none to work on pixels")
    add("--image-size", type=positive, default=256, help="side to which images are cropped, in pixels")
    add("--num-classes", type=positive, default=1000, help="a --dataset brings its own")
    add("--uncond", action="store_true", help="train without classes; the folder then needs no class folders")
    add("--epochs", type=positive, default=1400)
    add("--max-steps", type=positive, help="stop after so many steps, if that comes before the last epoch's end")
    add("--global-batch-size", type=positive, default=256, help="over all processes")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW, constant")
    add("--global-seed", type=int, default=0)
    add("--num-workers", type=int, default=4, help="processes that read images, per training process; at most one per core")
    add("--log-every", type=positive, default=100, help="steps")
    add("--ckpt-every", type=positive, default=50_000, help="steps; the last step is always saved")
    add("--sample-every", type=positive, metavar="STEPS", help="draw a grid of samples; none unless given")
    add("--tracker", choices=TRACKERS, help="show numbers and samples there too; wandb is offline unless logged in")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    log_to(logging.StreamHandler())
    with logging_redirect_tqdm([logger]):  # above the progress bar, not across it
        launch(main, parse_args())
