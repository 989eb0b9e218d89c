"""Puts the operator in place of the self-attention of timm's vision transformer, and trains both on handwritten digits."""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from pde_ssm import replace_attention


def digits():
    """Returns scikit-learn's digits, shuffled: images (1797, 1, 8, 8) from -1 to 1 and classes (1797,)."""
    data = load_digits()
    order = torch.randperm(len(data.target))
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images[order], torch.from_numpy(data.target)[order]


def accuracy(model, images, classes, steps, batch=64):
    """Trains on all but the last 397 images, and returns the model's accuracy on those."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(images) - 397, (batch,))
        loss = cross_entropy(model(images[some]), classes[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (model.eval()(images[-397:]).argmax(1) == classes[-397:]).float().mean().item()


def main(steps=400):
    """Trains the transformer with attention and with PDEs; returns the accuracy of each on held-out digits."""
    found = {}
    for mixer in ("attention", "pdessm"):
        torch.manual_seed(0)
        images, classes = digits()
        size = dict(img_size=8, patch_size=2, embed_dim=48, depth=3, num_heads=3, in_chans=1, num_classes=10)
        vit = timm.create_model("vit_tiny_patch16_224", **size, global_pool="avg", class_token=False)
        if mixer != "attention":
            replace_attention(vit, mixer)
        found[mixer] = accuracy(vit, images, classes, steps)
        print(f"{mixer}: {found[mixer]:.1%} of 397 held-out digits, {sum(p.numel() for p in vit.parameters()):,} parameters")
    return found


if __name__ == "__main__":
    main()
