"""What the published networks cost here, measured: parity, speed, training steps, conversion.

    python tests/bench_official.py parity                   each recorded fixture: largest difference and tolerance
    python tests/bench_official.py speed [--preset paper]   ours beside the plain formulation, in turns, in one run
    python tests/bench_official.py train STAGE              one optimisation step of a stage at the paper's size
    python tests/bench_official.py convert                  peak memory of the conversion of a full-size checkpoint

Every part writes its results into data/benchmarks/official.json (--output) and leaves the other parts there alone.
Weights are random: what is measured does not depend on them. Speeds are medians over --repeats rounds, in processor
seconds; the seconds of a training step are those of the clock.
"""

import argparse
import copy
import inspect
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import parity_common
from difftsr import official
from difftsr.evaluate import machine
from difftsr.model import NETWORKS, DiffTSR, preset
from difftsr.recognizer import Reading
from difftsr.sampling import sample
from difftsr.text_lines import Alphabet, write_json
from difftsr.train import STAGES
from difftsr.unet import use_winograd

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5  # of a restoration that is measured whole
SLOW = bool(os.environ.get("DIFFTSR_SLOW"))


def record(output: Path, part: str, found: dict) -> None:
    """Print the results of one part and put them into the file beside the others."""
    print(json.dumps(found, indent=1, ensure_ascii=False))
    known = json.loads(output.read_text()) if output.exists() else {}
    for key, value in known.get(part, {}).items():  # a part may be measured in several runs
        if isinstance(value, dict):
            found[key] = {**value, **found.get(key, {})}
    known[part] = {**found, "machine": machine(), "torch": torch.__version__}
    write_json(output, known)


def peak_gigabytes() -> float:
    """Largest resident memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def resident_gigabytes() -> float:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def paper_model(parts: tuple[str, ...], **config) -> DiffTSR:
    """The paper's model with random weights in the named networks; the others stay without memory."""
    with init_empty_weights(include_buffers=False):
        model = DiffTSR(replace(preset("paper"), **config))
    for part in parts:
        for module in getattr(model, part).modules():
            for name, p in module.named_parameters(recurse=False):
                values = torch.empty(p.shape).uniform_(-0.03, 0.03)
                module.register_parameter(name, nn.Parameter(values if p.ndim > 1 else values + (name == "weight")))
    return model.eval()


# ---------------------------------------------------------------- speed


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as the specification writes it: scores, softmax, sum; every matrix is formed."""

    def explicit(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v

    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, explicit
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of processor time, all threads together: other work on the machine disturbs them less than the clock."""
    started = time.process_time()
    call()
    return time.process_time() - started


def twin(network: nn.Module) -> nn.Module:
    """A copy of a network that shares its weights."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def speed_model(name: str, only: list[str]) -> DiffTSR:
    """The model to be measured; of the paper's, the networks that the parts `only` need, and letters to read with."""
    if name != "paper":
        return DiffTSR.from_pretrained(name)
    needed = {"unet": ("idm",), "unet_4_lines": ("idm",), "vae_encode": ("vae",), "vae_decode": ("vae",),
              "mom_and_tdm": ("mom", "tdm"), "restore": NETWORKS}  # fmt: skip
    model = paper_model(tuple({network for part in only for network in needed[part]}), reference=True)
    model.vae.latent_scale.fill_(1 / official.LATENT_FACTOR)
    count = model.config.tdm.num_classes - 1
    model.alphabet = Alphabet("".join(chr(0x4E00 + i) for i in range(count)))
    model.reader_alphabet = Alphabet("".join(chr(0x4E00 + i) for i in range(model.config.recognizer.num_classes - 3)))
    return model


@torch.no_grad()
def speed(name: str, only: list[str], repeats: int) -> dict:
    """Median processor seconds a line of each network in several formulations, in turns; and the ratios.

    plain: explicit softmax, contiguous layout, everything computed anew. ours: fused attention, channels last, the
    text kept. winograd: the same with fewer multiplications. `unet_4_lines` is a batch of four, counted per line;
    `restore` a whole restoration of STEPS steps. The matrix product of this machine is measured beside.
    """
    model = speed_model(name, only)
    shape, width = model.vae.latent_shape(model.config.image_size), model.idm.unet.config.context_dim
    image, z, t = torch.zeros(1, 3, *model.config.image_size), torch.randn(1, *shape), torch.tensor([500])
    tokens, context = torch.randint(2, 99, (1, 24)), torch.randn(1, 24, width)
    reading = Reading.of(tokens)
    if name != "paper":
        reading.features = model.recognizer.features(image)

    def tdm() -> None:
        told = model.tdm.context(reading.features, z, model.mom.image_condition(tokens, z, z, t))
        model.tdm.posterior(model.tdm(tokens, t, told, reading).log_softmax(1), tokens, 500)
        model.mom.text_condition(tokens if name == "paper" else reading)

    x = torch.randn(1, model.idm.unet.config.in_channels, *shape[1:])
    x4, matrix = x.repeat(4, 1, 1, 1), torch.randn(2048, 2048)
    durations, outputs, kept = defaultdict(list), {}, ExitStack()
    calls = {"matrix_product": lambda: matrix @ matrix}
    for what, network in (("unet", model.idm.unet), ("vae", model.vae)):
        if not any(part.startswith(what) for part in only):
            continue
        forms = {"plain": copy.deepcopy(network).to(memory_format=torch.contiguous_format)}
        forms["ours"] = network.to(memory_format=torch.channels_last)
        forms["winograd"] = use_winograd(twin(forms["ours"]))
        for form, net in forms.items():
            if what == "vae":
                calls[f"vae_encode_{form}"] = partial(net.encode, image)
                calls[f"vae_decode_{form}"] = partial(net.decode, z)
                continue
            calls[f"unet_{form}"] = partial(net, x, t, context)
            if form != "plain":
                kept.enter_context(net.fixed_text())
                calls[f"unet_4_lines_{form}"] = partial(net, x4, t.repeat(4), context.repeat(4, 1, 1))
    calls |= {f"mom_and_tdm_{form}": tdm for form in ("plain", "ours")}
    calls |= {f"restore_{mode}": partial(sample, model, image, steps=STEPS, mode=mode) for mode in ("baseline", "full")}
    calls = {call: of for call, of in calls.items() if call == "matrix_product" or call.startswith(tuple(only))}
    calls = {call: of for call, of in calls.items() if "4_lines" not in call or "unet_4_lines" in only}
    with kept:
        for turn in range(repeats + 1):  # the first is for warming up: what is kept is made there
            for call, of in calls.items():
                with plain_attention() if call.endswith("plain") else nullcontext():
                    if not turn:
                        outputs[call] = of()
                        continue
                    durations[call].append(seconds_of(of) / (4 if "4_lines" in call else 1))
            print({key: [round(v, 3) for v in values] for key, values in durations.items()}, flush=True)
    found = {key: statistics.median(values) for key, values in durations.items()}
    ratios, differences = {}, {}
    for call, seconds in found.items():
        what, _, form = call.replace("_4_lines", "").rpartition("_")
        if form != "plain" and f"{what}_plain" in found:
            ratios[call] = found[f"{what}_plain"] / seconds
            if isinstance(outputs[call], Tensor):
                differences[call] = float((outputs[call][:1] - outputs[f"{what}_plain"]).abs().max())
    more = {"matrix_gflops": 2 * 2048**3 / found["matrix_product"] / 1e9, "peak_gb": peak_gigabytes()}
    if "unet" in only:
        with FlopCounterMode(display=False) as counter:
            model.idm.unet(x, t, context)
        more["unet_gflop"] = counter.get_total_flops() / 1e9
    by_call = {"seconds": rounded(found), "ratios": rounded(ratios), "differences": rounded(differences)}
    return {**by_call, "repeats": repeats, **rounded(more)}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}


# ---------------------------------------------------------------- parity


class ParityRecorder:
    """A pytest plugin: runs the tests that compare with recorded values, and notes how far off each fixture is."""

    def __init__(self) -> None:
        self.fixture, self.found = "", {}
        self.load, self.compare = parity_common.load_fixture, parity_common.assert_close
        parity_common.load_fixture, parity_common.assert_close = self.load_fixture, self.assert_close

    def load_fixture(self, name: str):
        self.fixture = name
        return self.load(name)

    def assert_close(self, actual, expected, *, atol: float = 2e-5, rtol: float = 1e-4, name: str = "") -> None:
        self.compare(actual, expected, atol=atol, rtol=rtol, name=name)
        fixture = self.fixture + " in tiles" * name.endswith(" in tiles")
        row = self.found.setdefault(fixture, {"comparisons": 0, "largest_difference": 0.0, "largest_value": 0.0})
        row["comparisons"] += 1
        row["largest_difference"] = max(row["largest_difference"], parity_common.max_difference(actual, expected))
        row["largest_value"] = max(row["largest_value"], float(torch.as_tensor(expected).abs().max()))
        row["atol"], row["rtol"] = max(atol, row.get("atol", 0)), max(rtol, row.get("rtol", 0))

    @staticmethod
    def pytest_collection_modifyitems(items: list) -> None:
        words = ("paper_size",) if SLOW else ("load_fixture", "recorded", "reference_loss")
        items[:] = [item for item in items if any(word in inspect.getsource(item.function) for word in words)]


def parity() -> dict:
    """Largest difference of each fixture, from the tests themselves; with DIFFTSR_SLOW=1 those of the paper's sizes."""
    recorder = ParityRecorder()
    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if file.stem != "test_degradation"]
    status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[recorder])
    if status:
        raise SystemExit(f"parity: the tests ended with status {status}")
    return {"fixtures": {name: {k: float(f"{v:.2g}") for k, v in recorder.found[name].items()}
                         for name in sorted(recorder.found)}}  # fmt: skip


# ---------------------------------------------------------------- training


NEEDS = {"vae": ("vae",), "recognizer": ("recognizer",), "idm": ("idm",), "tdm": ("tdm",),
         "mom": ("vae", "recognizer", "idm", "tdm", "mom")}  # fmt: skip


def train(stage_name: str, checkpoint: bool) -> dict:
    """One AdamW step of a stage at the paper's size, batch of 1 line; latents and reading are given, as when cached."""
    entry = STAGES[stage_name]
    model = paper_model(NEEDS[stage_name])
    model.idm.unet.config.use_checkpoint = checkpoint
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 6000, (1, 24), generator=g)
    batch = {name: torch.rand(1, 3, 128, 512, generator=g) * 2 - 1 for name in ("hr", "lr")}
    batch |= {name: torch.randn(1, 3, 32, 128, generator=g) for name in ("z_hr", "z_lr")}
    reading = Reading.of(tokens)
    reading.features = torch.zeros(1, 1024, 2, 16)
    batch |= {"tokens": tokens, "centers": torch.full((1, 24), -1.0), "reading": reading}
    settings = entry.training.paper() if hasattr(entry.training, "paper") else entry.training()
    stage = entry.stage(replace(settings, batch_size=1), model)
    network = getattr(model, stage_name)
    model.requires_grad_(False)
    network.requires_grad_(True)
    optimizer = stage.optimizers(model)[stage_name]
    optimizer.defaults["foreach"] = False
    for group in optimizer.param_groups:
        group["foreach"] = False  # one parameter after the other: no second copy of the gradients
    before, started = resident_gigabytes(), time.perf_counter()
    loss, _, logs = next(iter(stage.losses(model, batch, g)))
    forward, activations = time.perf_counter() - started, resident_gigabytes() - before
    loss.backward()
    backward = time.perf_counter() - started - forward
    optimizer.step()
    total = time.perf_counter() - started
    if not torch.isfinite(loss):
        raise SystemExit(f"{stage_name}: the loss is {loss}")
    trained = sum(p.numel() for p in network.parameters())
    return {"parameters": trained, "checkpointing": checkpoint, "activations_gb": round(activations, 2),
            "peak_gb": peak_gigabytes(), **rounded({"seconds_forward": forward, "seconds_backward": backward,
                                                    "seconds_step": total})}  # fmt: skip


# ---------------------------------------------------------------- conversion


def write_checkpoint(folder: Path) -> None:
    """A joint file, TransOCR weights and alphabets of the published sizes, with random content."""
    model = paper_model(("vae", "recognizer", "idm", "tdm", "mom"))
    names = {"IDM_Unet": "idm.unet", "TDM_Decoder": "tdm", "MoM_module": "mom", "VAE_model": "vae"}
    joint = {name: model.get_submodule(ours).state_dict() for name, ours in names.items()}
    joint["VAE_model"] = {key: value for key, value in joint["VAE_model"].items() if "latent_" not in key}
    torch.save(joint, folder / "DiffTSR.ckpt")
    torch.save({f"module.{k}": v for k, v in model.recognizer.state_dict().items()}, folder / "transocr.pth")
    for name, count in (("diffusion", 6735), ("recogniser", 7934)):
        text = "".join(chr(0x4E00 + i) for i in range(count))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def convert(folder: Path) -> dict:
    """Peak memory and seconds of `python -m difftsr.official` on a checkpoint of the published size."""
    command = "import sys, resource; from difftsr.official import main; s = main(sys.argv[1:]); "
    command += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9); raise SystemExit(s)"
    if not (folder / "DiffTSR.ckpt").exists():
        writer = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from pathlib import Path; "
        writer += f"from bench_official import write_checkpoint; write_checkpoint(Path({str(folder)!r}))"
        subprocess.run([sys.executable, "-c", writer], check=True)
    found = {"checkpoint_gb": round((folder / "DiffTSR.ckpt").stat().st_size / 1e9, 2)}
    for name, flags in (("half", ["--half"]), ("whole", [])):
        with tempfile.TemporaryDirectory(dir=folder) as output:
            call = [sys.executable, "-c", command, str(folder / "DiffTSR.ckpt"), "--output", output, *flags]
            call += ["--alphabet", str(folder / "diffusion.txt"), "--recognizer", str(folder / "transocr.pth")]
            started = time.perf_counter()
            out = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            size = sum(file.stat().st_size for file in Path(output).iterdir())
        peak = float(out.split()[-1])
        found[name] = rounded({"peak_gb": peak, "seconds": time.perf_counter() - started, "folder_gb": size / 1e9})
    return found


PARTS = ["unet", "unet_4_lines", "vae_encode", "vae_decode", "mom_and_tdm", "restore"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=["parity", "speed", "train", "convert"])
    options.add_argument("stage", nargs="?", choices=list(STAGES), default="tdm")
    options.add_argument("--preset", default="paper", help="speed: paper, or the name of some weights")
    options.add_argument("--no-checkpoint", action="store_true", help="train: keep all activations of the U-Net")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="speed: these parts")
    options.add_argument("--folder", type=Path, help="convert: where the large files go (default: a temporary folder)")
    options.add_argument("--output", type=Path, default=ROOT / "data" / "benchmarks" / "official.json")
    chosen = options.parse_args()
    if chosen.part == "parity":
        record(chosen.output, "parity_paper_size" if SLOW else "parity", parity())
    elif chosen.part == "speed":
        record(chosen.output, f"speed_{chosen.preset}", speed(chosen.preset, chosen.only, chosen.repeats))
    elif chosen.part == "train":
        name = f"train_{chosen.stage}" + ("_no_checkpointing" if chosen.no_checkpoint else "")
        record(chosen.output, name, train(chosen.stage, not chosen.no_checkpoint))
    elif chosen.folder:
        record(chosen.output, "convert", convert(chosen.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            record(chosen.output, "convert", convert(Path(folder)))


if __name__ == "__main__":
    main()
