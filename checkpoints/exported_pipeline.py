"""From classes to images by a diffusion transformer with a PDE in place of attention:

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    pipeline(class_labels=["rose", 3]).images[0].save("rose.png")
"""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class PDEPipeline(DiffusionPipeline):
    """transformer: the network. scheduler: of diffusion or, a FlowMatchEulerDiscreteScheduler, of a flow. vae: None for pixels.
    id2label: {number: name of a class}. time_scale: a flow's network sees time_scale times t, which runs from 0, noise, to 1,
    image. predict: what that network predicts, the velocity, or x, the image."""

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, transformer, scheduler, vae=None, id2label=None, time_scale=1000, predict="velocity"):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, time_scale=time_scale, predict=predict)
        self.flow = hasattr(scheduler, "sigmas") and "Flow" in type(scheduler).__name__
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self, class_labels, guidance_scale=4.0, guidance_channels=None, generator=None, num_inference_steps=50,
        output_type="pil", return_dict=True,
    ):  # fmt: skip
        """Draws an image for each class, given by its name or number; the number of classes is none of them.

        guidance_channels: how many channels are guided, all unless given. output_type: pil, np (B, H, W, 3) of 0 to 1, or pt.
        """
        network, device, n = self.transformer, self._execution_device, len(class_labels)
        known = [self.labels.get(label, label) for label in class_labels]
        classes = network.config.num_classes
        if unknown := [label for label in known if not (isinstance(label, int) and 0 <= label <= classes)]:
            known = ", ".join([*self.labels, f"{classes} for none"])
            raise ValueError(f"there is no class {unknown[0]!r}; known: {known}")
        y, null = torch.tensor(known, device=device), torch.full((n,), classes, device=device)
        channels = network.config.in_channels
        guided, x = guidance_channels or channels, (n, channels, *network.config.sample_size)
        x = randn_tensor(x, generator=generator, device=device, dtype=network.dtype)
        sigmas = dict(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)]) if self.flow else {}
        self.scheduler.set_timesteps(num_inference_steps, device=device, **sigmas)
        accepted = inspect.signature(self.scheduler.step).parameters
        how = dict(use_clipped_model_output=True) if "use_clipped_model_output" in accepted else {}
        for step in self.progress_bar(self.scheduler.timesteps):
            t = (1000 - step) * self.config.time_scale / 1000 if self.flow else step
            if guidance_scale == 1 or classes == 0:
                out = network(x, t.expand(n), y)
            else:
                out, without = network(x.repeat(2, 1, 1, 1), t.expand(2 * n), torch.cat([y, null])).chunk(2)
                mixed = torch.lerp(without[:, :guided], out[:, :guided], guidance_scale)
                out = torch.cat([mixed, out[:, guided:]], dim=1)
            out = out[:, :channels]
            if self.config.predict == "x":
                out = (out - x) / (step / 1000)
            x = self.scheduler.step(-out if self.flow else out, step, x, **how).prev_sample  # its flows lead to noise
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0)).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
