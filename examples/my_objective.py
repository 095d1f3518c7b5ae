import torch

from bco_fast import register_objective


def margin(logps, ref_logps, labels, *, beta):  # all [B]; logps are sums over a completion's tokens, in nats
    rewards = beta * (logps - ref_logps)
    return torch.relu(1 - torch.where(labels, rewards, -rewards))  # the cost of each row


register_objective("margin", margin, data="labels", beta=0.1)
