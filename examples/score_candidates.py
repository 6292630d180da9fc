"""Ranking candidate answers by their log-likelihood, instead of generating one.

Run: python examples/score_candidates.py
"""

from importlib.resources import files

import torch

import xblip

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
demo = files("xblip_numerals") / "demo"
model = xblip.load("numerals")

samples = [
    {"image": demo / "image" / "six.png", "instruction": "Which number is in the image?"},
    {"audio": demo / "audio" / "four.wav", "instruction": "Which number does the audio say?"},
]
for sample, scores in zip(samples, model.score(samples, NUMBERS), strict=True):
    # Shares among these ten alone; exp(score) is the LLM's probability of that very answer.
    shares = torch.tensor(scores).softmax(0)
    best = shares.argsort(descending=True)[:3]
    print(sample["instruction"], *(f"{NUMBERS[index]} {shares[index]:.3f}" for index in best))
