"""The ready-to-use keyword of a model: synthetic voices that it was not made from, phrases that sound like it, and a corpus' unseen speech.

python benchmarks/bundled_keyword.py [--model edge] [--corpus DIR]
"""

import argparse
from pathlib import Path

import numpy as np

from edgekws import enrolment
from edgekws.detector import scores
from edgekws.engines import load_engine
from edgekws.errors import EdgekwsError
from edgekws.evaluation import wilson
from edgekws.model import find_model, load_model
from edgekws.training import material, synthesis
from edgekws.training.datasets import load_corpus
from edgekws.values import HOP_MS

VOICES, SEED = 60, 991  # the keyword was made from seed 17
ALIKE = ("hey jason", "hey justin", "hey there", "jet set", "hey jess", "hey jenny", "hate jets on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a built-in model's name or a directory")
    parser.add_argument("--corpus", type=Path, help="its negatives that the model was not trained on are listened to")
    options = parser.parse_args()
    model = load_model(find_model(options.model))
    engine = load_engine(model)
    (ready,) = enrolment.bundled(model)
    rng = np.random.default_rng(SEED)
    heard: dict[str, list[bool]] = {"clean": [], "10 dB noise": [], "phrases alike": []}
    for _ in range(VOICES):
        voice = synthesis.random_voice(rng)
        for name, text in (("clean", ready.keyword), ("10 dB noise", ready.keyword), ("phrases alike", str(rng.choice(ALIKE)))):
            try:
                samples = enrolment.pad(material.to_int16(material.at_level(synthesis.say(text, voice), -26)))
            except EdgekwsError:
                continue
            if name == "10 dB noise":
                noise = material.made_noise(rng, len(samples)) * material.active_rms(samples) * 10**-0.5
                samples = material.to_int16(samples + noise)
            heard[name].append(bool(scores(enrolment.embed(samples, engine), ready).max() >= ready.threshold))
    for name, found in heard.items():
        low, high = wilson(float(np.mean(found)), len(found))
        print(f'"{ready.keyword}", {name}: woke in {sum(found)} of {len(found)}, {np.mean(found):.2f} ({low:.2f} to {high:.2f})')
    if options.corpus:
        unseen = sorted({u.path for u in load_corpus(options.corpus) if u.split == "negative"})
        unseen = [path for path in unseen if material.sha256_16([path])[0] not in model.trained_on_sha256]
        streams = [scores(enrolment.embed(material.read_audio(path), engine), ready) for path in unseen]
        count = sum(int((enrolment.peaks(one, 50) >= ready.threshold).sum()) for one in streams)
        print(f"false wakes: {count} in {sum(map(len, streams)) * HOP_MS / 3_600_000:.2f} h of unseen speech")


if __name__ == "__main__":
    main()
