"""DiTPipeline with the frequencies of timesteps that DiT was trained with:

    DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)

DiT's 128 frequencies fall from 1 to almost 1 / 10000; those of diffusers fall all the way. Without this file the network sees
slightly different timesteps and draws slightly different images.
"""

from diffusers import DiTPipeline


class ExactDiTPipeline(DiTPipeline):
    def __init__(self, transformer, vae, scheduler, id2label=None):
        super().__init__(transformer, vae, scheduler, id2label)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
