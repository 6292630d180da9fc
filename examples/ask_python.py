"""Asking from Python: files and arrays, one input or several, a batch, a conversation.

Run: python examples/ask_python.py
"""

from importlib.resources import files

import numpy as np

import xblip

demo = files("xblip_numerals") / "demo"
six, two = demo / "image" / "six.png", demo / "image" / "two.jpg"
audio, video = demo / "audio" / "four.wav", demo / "video" / "seven.mp4"
points = np.load(demo / "point_cloud" / "four.npy")
model = xblip.load("numerals")

print(model.ask("Which number is in the image?", image=six))
print(model.ask("Which number is larger, the image or the audio?", image=six, audio=audio))
print(model.ask("What is the sum?", media=[("image", six), ("image", two)]))
print(model.ask("Do all three show the same number?", video=video, point_cloud=points, audio=audio))

batch = [
    {"video": video, "instruction": "Which way does it move?"},
    {"point_cloud": points, "image": two, "instruction": "Which number is the smaller one?"},
]
for answer in model.generate(batch, max_new_tokens=8):
    print(answer.text, f"({answer.num_prompt_tokens} positions of prompt)")

messages = [
    {"role": "user", "content": [{"type": "audio", "path": audio}, {"type": "text", "text": "Which number is it?"}]}
]
answer = model.chat(messages)
messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Is it loud or quiet?"}]
print(answer, "and", model.chat(messages))
