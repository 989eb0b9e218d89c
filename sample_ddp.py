"""Draws many samples, on one process or many, as PNG files and as the .npz that ADM's evaluator reads:

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/000-DiT-XL-2/checkpoints/0400000.pt --num-fid-samples 50000

Every image has its own seed, and batches are the same for any number of processes, so the images are too. Run again after a
stop, the command continues where it was. With --evaluate REF it then prints what evaluate.py would.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from checkpoints.build import for_sampler, load_model
from diffusion import create_sampler
from diffusion.drawing import draw_numbered
from diffusion.guidance import create_guidance
from download import find_checkpoint, public_checkpoint
from evaluation.features import NETWORKS, add_feature_flags, open_network
from evaluation.report import compare, look_ahead, report
from evaluation.sides import Source, measure, open_source
from images.autoencoder import DECODER, digest_of_weights, load_trained_space
from images.numbered import check_folder, claim_folder, gather_npz, image_path, unfinished_batches
from images.samples import save_png
from machine.flags import USE, from_zero, not_negative, positive
from machine.precision import allow_tf32
from machine.processes import launch
from mixers import untold
from mixers.running import prepare_to_sample
from sample import add_model_flags, in_words, with_guide


def main(args, processes):
    allow_tf32(args.tf32)
    count = args.num_fid_samples
    if not args.evaluate and (args.weights or args.features != NETWORKS[0]):
        raise ValueError("--features and --weights mean nothing without --evaluate REF")
    if count > 2**32:
        raise ValueError(f"--num-fid-samples {count:,}: seeds tell 4,294,967,296 images apart, not more")
    name = args.ckpt or public_checkpoint(args.model, args.mixer, args.image_size, args.num_classes)
    with processes.main_process_first():  # so that it is fetched once, if it must be fetched
        path = find_checkpoint(name)
    model, settings = load_model(path, vars(args), "ema", args.ema)
    objective, sampler = create_sampler(settings["objective"], args.sampler, args.num_sampling_steps, **for_sampler(settings))
    if args.evaluate:  # before any image is drawn, so that missing weights or files are found at once
        network = open_network(args.features, args.weights)
        reference = open_source(args.evaluate, network)
        look_ahead(reference, Source("the samples", None, range(count), {}, None), network, processes)
    guidance = create_guidance(args.cfg_scale, model.in_channels, args.cfg_channels, args.cfg_interval)
    if args.balanced_labels and not model.num_classes:
        raise ValueError("--balanced-labels means nothing to a checkpoint without classes")
    running = processes.device, args.precision, args.compile, args.backend, args.deterministic
    guidance = with_guide(guidance, args.guide_ckpt, args.guide_scale, model, settings, running)
    prepare_to_sample(model, *running)
    space = load_trained_space(settings["vae"], processes.device, None if args.vae else settings.get("vae_digest"))
    folder = Path(args.sample_dir) / folder_name(settings, args.ckpt, args.cfg_scale, args.global_seed)
    size = [side * space.factor for side in model.input_size]
    if processes.rank == 0:
        drawn = dict(sampler=sampler.__name__, num_sampling_steps=args.num_sampling_steps)
        drawn |= dict(cfg_channels=str(guidance.channels or "all"), cfg_interval=list(guidance.interval))
        drawn |= dict(balanced_labels=args.balanced_labels, guide_scale=guidance.guide_scale)
        drawn |= dict(guide=digest_of_weights(guidance.guide.state_dict()) if guidance.guide else None)
        made_with = settings_of_images(model, settings, space, drawn, args.precision)
        record = claim_folder(folder, made_with, count)  # noqa: F841  it locks the folder as long as it is open
        check_folder(folder, size, count)
        batches = unfinished_batches(folder, args.per_proc_batch_size, count)
    batches = processes.share(batches if processes.rank == 0 else None)  # another machine may see the folder as it was before
    mine = batches[processes.rank :: processes.size]
    if processes.rank == 0:
        drawn = in_words(model, settings, sampler, args.num_sampling_steps, args.precision, guidance)
        print(f"Sampling {sum(map(len, batches)):,} of {count:,} images into {folder}: {drawn}")

    for numbers in tqdm(mine, unit="batch", disable=processes.rank > 0):
        images = draw_numbered(model, space, objective, sampler, numbers, args.global_seed, guidance, args.balanced_labels)
        for number, image in zip(numbers, images):
            save_png(image.numpy(), image_path(folder, number))
    processes.barrier()
    if processes.rank == 0:
        print(f"Saved .npz file to {gather_npz(folder, count, size)}")
    processes.barrier()
    if args.evaluate:
        samples = open_source(f"{folder}.npz", network)
        sides = [measure(source, network, processes) for source in (reference, samples)]
        if processes.rank == 0:
            report(compare(*sides, network, progress=True), *sides, network, f"{folder}.json")


def folder_name(settings, checkpoint, cfg_scale, seed):
    """Names the folder as DiT does, where scripts look for it."""
    model = settings["model"].replace("/", "-")
    checkpoint = Path(checkpoint).stem if checkpoint else "pretrained"
    vae = Path(settings["vae"]).name
    size = settings["image_size"] if isinstance(settings["image_size"], int) else "{}x{}".format(*settings["image_size"])
    return f"{model}-{checkpoint}-size-{size}-vae-{vae}-cfg-{cfg_scale}-seed-{seed}"


def settings_of_images(model, settings, space, drawn, precision):
    """Collects everything that determines the images of a folder, since the folder's name does not distinguish checkpoints of
    two runs at the same step, two samplers, or autoencoders of the same name or folder.

    settings: the checkpoint's, as `load_model` returns them. drawn: those of sampler and guidance.
    """
    vae, flow = settings["vae"], {name: settings[name] for name in ("path", "time_scale", "predict", "time_shift")}
    vae = str(Path(vae).resolve()) if Path(vae).is_dir() else vae
    weights, decoder = digest_of_weights(model.state_dict()), space.digest(DECODER)
    network = dict(mixer_options=untold(settings["mixer"], settings["mixer_options"]), norm=settings.get("norm", "layer"))
    network |= dict(time_intervals=settings.get("time_intervals"), classes=model.trained_classes)
    return dict(weights=weights, **network, **drawn, vae=vae, **flow, decoder=decoder, precision=precision)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw samples from a DiT for evaluation.", usage=USE)
    add = parser.add_argument
    add_model_flags(add, vae="ema")
    add("--sample-dir", default="samples", help="where the folder of images and the .npz beside it go")
    add("--per-proc-batch-size", type=positive, default=32)
    add("--num-fid-samples", type=positive, default=50_000)
    add("--balanced-labels", action="store_true", help="every class equally often: the number of an image decides its label")
    add("--cfg-scale", type=from_zero, default=1.5, help="strength of classifier-free guidance; 1 is none")
    add("--global-seed", type=not_negative, default=0)
    add("--evaluate", metavar="REF", help="compare with this .npz or folder when done, as evaluate.py does; also as .json")
    add_feature_flags(add)
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="faster float32 products, with rounding of 1e-3")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
