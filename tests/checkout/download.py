import torch


def find_model(path):
    return torch.load(path)["ema"]
