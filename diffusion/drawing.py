"""From labels to finished images, by any model, space, objective and sampler that are given.

A model has in_channels, input_size (height, width), num_classes, which is also the index of its null class,
trained_classes, the number of classes with training images, and class_names, their names or None. A space has a factor and
decode(x) (images/autoencoder.py).
"""

from difflib import get_close_matches

import torch

from .guidance import guided
from .noise import PerImageNoise, image_seeds

AT_ONCE = 64  # samples in one batch
IMAGENET_FAVOURITES = [207, 360, 387, 974, 88, 979, 417, 279]
REMEDIES = {
    "network": "--precision fp32, a smaller --cfg-scale or another checkpoint may help",
    "guidance": "a smaller --cfg-scale, or --guide-scale if there is a guide, may help",
    "sampler": "a smaller --cfg-scale or more steps may help",
    "decoder": "a smaller --cfg-scale, more steps or another --vae may help",
}


def choose_classes(model, wanted=None):
    """Returns the numbers of the wanted classes, given by number or name; by default up to 16 trained ones, or, of ImageNet's
    1000, eight favourites.

    A model without classes has only the null class, 0. ValueError for classes that do not exist or were not trained.
    """
    num_classes, trained = model.num_classes, model.trained_classes
    classes = wanted or (IMAGENET_FAVOURITES if trained == 1000 else list(range(max(min(trained, 16), 1))))
    if num_classes == 0 and wanted:
        raise ValueError("the checkpoint was trained without classes; there is none to choose")
    classes = [find_class(label, model.class_names) if isinstance(label, str) else label for label in classes]
    if wrong := [label for label in classes if not 0 <= label <= num_classes]:
        raise ValueError(f"class {wrong[0]} is out of range: the checkpoint has 0 to {num_classes - 1}, {num_classes} is none")
    if wrong := [label for label in classes if trained <= label < num_classes]:
        raise ValueError(f"class {wrong[0]} was not trained: there were images of 0 to {trained - 1}; {num_classes} is none")
    return classes


def find_class(name, names):
    """Returns the number of the class with that name, ignoring case if need be. ValueError for an unknown name, with the
    nearest ones, for an ambiguous one, or if classes have no names."""
    if not names:
        raise ValueError(f"class {name!r}: the checkpoint does not name its classes; give their numbers")
    if names.count(name) > 1:
        raise ValueError(f"several classes are called {name!r}: give one of their numbers, such as {names.index(name)}")
    if name in names:
        return names.index(name)
    plain = [known.casefold() for known in names]
    if plain.count(name.casefold()) == 1:
        return plain.index(name.casefold())
    near = [names[plain.index(match)] for match in get_close_matches(name.casefold(), plain, n=3, cutoff=0.5)]
    offered = f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
    raise ValueError(f"the checkpoint has no class {name!r}; {offered}")


def name_classes(model, labels):
    """Returns the class names of a list of labels, or None if the names are only the labels' numbers."""
    names = model.class_names or []
    named = [names[label] if label < len(names) else "" for label in labels]
    return named if any(name not in ("", str(label)) for name, label in zip(named, labels)) else None


def draw(model, space, objective, sampler, labels, seed, guidance, progress=True):
    """Draws one sample per label of a list, each from a seed of its own: uint8 (n, H, W, 3) on the CPU."""
    device, images = next(model.parameters()).device, []
    labels = torch.tensor(labels, device=device)
    for numbers in torch.arange(len(labels)).split(AT_ONCE):
        noise = PerImageNoise(image_seeds(seed, numbers.tolist(), "sampling"), device)
        some = labels[numbers]
        images.append(generate(model, space, objective, sampler, some, noise, guidance, progress, numbers.tolist()))
    return torch.cat(images)


def draw_numbered(model, space, objective, sampler, numbers, seed, guidance, balanced=False):
    """Draws the images with these numbers in a run: uint8 (n, H, W, 3) on the CPU.

    An image's seed determines its label, from the trained classes, and its noise. balanced: the image's number determines the
    label instead, so that classes are equally frequent; the noise is the same either way.
    """
    noise = PerImageNoise(image_seeds(seed, numbers, "sampling"), next(model.parameters()).device)
    labels = (noise.rand() * model.trained_classes).long()
    if balanced:
        labels = torch.tensor(numbers, device=labels.device) % model.trained_classes
    return generate(model, space, objective, sampler, labels, noise, guidance, progress=False, numbers=numbers)


def generate(model, space, objective, sampler, labels, noise, guidance, progress=True, numbers=None):
    """Draws one sample per label (n,), from `noise` (a PerImageNoise of n seeds): uint8 (n, H, W, 3) on the CPU.

    A model without classes is not guided by them. Pixels are clipped to their range, for diffusion at every step; latents have
    none. ValueError, which names the images by their numbers (n,), if any value on the way was not finite: once clipped, such
    images would look valid.
    """
    checked = []  # (where, which of the images were finite there (n,) bool), in the order of the calls

    def check(where, x):                                                   # (n, ...), or (2n, ...) of a doubled batch
        checked.append((where, x.isfinite().flatten(1).all(1).unflatten(0, (-1, len(labels))).all(0)))
        return x

    network = guided(model, objective, guidance)
    hook = model.register_forward_hook(lambda model, inputs, out: check("network", out))
    try:
        x = sampler(
            objective,
            model if network is model else lambda x, t, y: check("guidance", network(x, t, y)),
            noise.randn(model.in_channels, *model.input_size),
            model_kwargs=dict(y=labels),
            clip_denoised=space.factor == 1,
            progress=progress,
            randn_like=noise,
        )
    finally:
        hook.remove()
    images = check("decoder", space.decode(check("sampler", x)))
    finite = torch.stack([finite for _, finite in checked])                # (m, n) bool, tested once at the end: one GPU sync
    if not finite.all():
        raise ValueError(what_is_not_finite([where for where, _ in checked], finite.cpu(), numbers))
    return to_pixels(images)


def to_pixels(images):
    """Returns images (n, 3, H, W) in [-1, 1] as uint8 (n, H, W, 3) on the CPU."""
    pixels = (127.5 * images + 128).clamp(0, 255)                          # (n, 3, H, W)
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8)


def what_is_not_finite(places, finite, numbers):
    """Returns a sentence that says which images of a batch are not finite, where that was first so, and what may help.

    places: where each check was made, keys of REMEDIES. finite: which images were finite there, (checks, n) bool.
    """
    bad = [numbers[i] if numbers else i for i in (~finite.all(0)).nonzero()[:, 0].tolist()]
    first = int((~finite.all(1)).nonzero()[0])
    where, calls = places[first], places[: first + 1].count("network")
    some = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    which = f"{len(bad)} of {finite.shape[1]} images of a batch are not finite (numbers {some})"
    return f"{which}, first the {where}'s output at call {calls} of the network; {REMEDIES[where]}"
